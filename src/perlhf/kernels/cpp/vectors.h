// The products of attention in float32, by vectors: blocks of ROWS rows by up to VECTORS vectors.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "numbers.h"

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
    if constexpr (VECTORS == 4)
        if (vectors == 4) product<4, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
    if (vectors == 3) product<3, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
    if (vectors == 2) product<2, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
    if (vectors == 1) product<1, ADD>(a, a_row, a_column, b, b_row, depth, out, out_row, rows);
}

// Keys or values on a path, and a group's queries or gradients: each as both kinds of products read them.
template <class T>
struct Vectors {
    static bool fits(int64_t) { return true; }

    struct Path {
        int64_t width, padded;
        Buffer rows;
        Path(int64_t most, int64_t width)
            : width(width), padded((width + LANES - 1) / LANES * LANES), rows(most * padded) {}
        void put_row(int64_t number, const T* from) {
            float* to = rows + number * padded;
            for (int64_t d = 0; d < width; d++) to[d] = wide(from[d]);
            for (int64_t d = width; d < padded; d++) to[d] = 0.0f;
        }
        void finish(int64_t) {}
        void transpose(int64_t) {}
    };

    struct Lanes {
        Path own;
        Buffer columns;
        explicit Lanes(int64_t width) : own(GROUP, width), columns(GROUP * own.padded) {}
        void put_lane(int64_t lane, const T* from) { own.put_row(lane, from); }
        void finish(int64_t lanes) {
            std::memset(own.rows + lanes * own.padded, 0, (GROUP - lanes) * own.padded * 4);
            for (int64_t d = 0; d < own.padded; d++)
                for (int64_t l = 0; l < GROUP; l++) columns[d * GROUP + l] = own.rows[l * own.padded + d];
        }
    };

    Vectors(int64_t, int64_t) {}

    // logits[key][lane] = keys[key] . queries[lane]
    void logits(int vectors, const Path& keys, const Lanes& queries, float* logits, int64_t count) {
        product<false>(vectors, keys.rows, keys.padded, 1, queries.columns, GROUP, keys.padded, logits, GROUP, count);
    }

    // mixed[column][lane] = sum over keys of weights[key][lane] values[key][column]
    void mix(int vectors, const float* weights, const Path& values, float* mixed, int64_t count) {
        constexpr int64_t BLOCK = 128;  // keys whose weights are read again and again while they are in the cache
        std::memset(mixed, 0, values.padded * GROUP * 4);
        for (int64_t key = 0; key < count; key += BLOCK)
            product<true>(vectors, values.rows + key * values.padded, 1, values.padded, weights + key * GROUP, GROUP,
                          std::min(BLOCK, count - key), mixed, GROUP, values.padded);
    }

    // total[key] += sum over lanes of weights[key][lane] lanes[lane]
    void spread(const float* weights, const Lanes& lanes, int64_t used, float* total, int64_t count) {
        const int64_t padded = lanes.own.padded;
        int64_t column = 0;
        for (; column + 2 * LANES <= padded; column += 2 * LANES)
            product<2, true>(weights, GROUP, 1, lanes.own.rows + column, padded, used, total + column, padded, count);
        if (column < padded)
            product<1, true>(weights, GROUP, 1, lanes.own.rows + column, padded, used, total + column, padded, count);
    }
};
