// Products of small matrices in float32, made for few rows of many columns: blocks of ROWS rows by up to three vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "numbers.h"

constexpr int VECTORS = 3, GROUP = LANES * VECTORS;

struct Buffer {  // floats, not initialised
    explicit Buffer(int64_t size)
        : size(size), at(static_cast<float*>(std::aligned_alloc(64, (size * 4 + 127) / 64 * 64)), &std::free) {}
    void clear() { std::memset(at.get(), 0, size * 4); }
    operator float*() { return at.get(); }
    int64_t size;
    std::unique_ptr<float, void (*)(void*)> at;
};

// out[m][:] (+)= sum_k a[m * a_row + k * a_column] b[k * b_row + :], for M rows of N vectors.
template <int M, int N, bool ADD>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t depth,
                 float* out, int64_t out_row) {
    Vec sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sums[m][n] = ADD ? load(out + m * out_row + n * LANES) : Vec{};
    for (int64_t k = 0; k < depth; k++) {
        Vec row[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) row[n] = load(b + k * b_row + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            float factor = a[m * a_row + k * a_column];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sums[m][n] += factor * row[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(out + m * out_row + n * LANES, sums[m][n]);
}

template <int N, bool ADD>
void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t depth, float* out,
             int64_t out_row, int64_t rows) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS)
        tile<ROWS, N, ADD>(a + m * a_row, a_row, a_column, b, b_row, depth, out + m * out_row, out_row);
    for (; m + 2 <= rows; m += 2)
        tile<2, N, ADD>(a + m * a_row, a_row, a_column, b, b_row, depth, out + m * out_row, out_row);
    if (m < rows) tile<1, N, ADD>(a + m * a_row, a_row, a_column, b, b_row, depth, out + m * out_row, out_row);
}

template <bool ADD>
void product(int vectors, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
             int64_t depth, float* out, int64_t out_row, int64_t rows) {
    if (vectors == 3) product<3, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
    if (vectors == 2) product<2, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
    if (vectors == 1) product<1, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
}
