// Linear layers of few rows, as sampling has them, whose weights are numbers of a table of 16 times a scale for each 64.
//
// Each weight is read once, where it lies, two to a byte, the first in the higher half. Of two vectors of inputs the even
// ones come before the odd ones, here and in x, so that halves of bytes needn't be put in order.

#include <algorithm>

#include "buffer.h"
#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 64;         // weights of a scale
constexpr int OUTPUTS = 4, MOST = 4;  // of a task; rows whose sums are in registers

// 2 * LANES numbers, as products take them: `Number` is what x and the weights, read back, are kept as meanwhile.
template <class T>
struct Products {
    typedef float Number;
    struct Pair {
        Vec first, second;
    };
    static void put_pair(float* at, Vec first, Vec second) {
        store(at, first);
        store(at + LANES, second);
    }
    static Pair get(const float* at) { return {load(at), load(at + LANES)}; }
    static Vec add(Vec sum, Pair one, Pair other) { return sum + one.first * other.first + one.second * other.second; }
};

#ifdef __AVX512BF16__
template <>
struct Products<Bfloat16> {
    typedef Bfloat16 Number;
    typedef __m512bh Pair;
    static void put_pair(Bfloat16* at, Vec first, Vec second) {
        const auto pair = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
        std::memcpy(at, &pair, sizeof pair);
    }
    static Pair get(const Bfloat16* at) {
        Pair found;
        std::memcpy(&found, at, sizeof found);
        return found;
    }
    static Vec add(Vec sum, Pair one, Pair other) {
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), one, other));
    }
};
#endif

// The numbers as the layer's own weight has them, which is rounded to its dtype.
inline Vec rounded(Vec value, const float*) { return value; }
inline Vec rounded(Vec value, const Bfloat16*) {
    Bfloat16 there[LANES];
    store(there, value);
    return load(there);
}

// Of each 2 * LANES inputs, which are LANES bytes, the even ones before the odd ones.
template <class T>
void read_back(const uint8_t* packed, const float* scales, const float* table, typename Products<T>::Number* to,
               int64_t inputs) {
    const T* kind = nullptr;
    for (int64_t start = 0; start < inputs; start += 2 * LANES) {
        const Vec scale = all(scales[start / BLOCK]);
        const uint8_t* from = packed + start / 2;
        Vec even, odd;
#ifdef __AVX512F__
        const __m512 values = _mm512_loadu_ps(table);
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        even = reinterpret_cast<Vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
        odd = reinterpret_cast<Vec>(_mm512_permutexvar_ps(bytes, values));  // the lower half of a byte counts
#else
        for (int lane = 0; lane < LANES; lane++) {
            even[lane] = table[from[lane] >> 4];
            odd[lane] = table[from[lane] & 15];
        }
#endif
        Products<T>::put_pair(to + start, rounded(even * scale, kind), rounded(odd * scale, kind));
    }
}

template <int M, class T>
void products(const typename Products<T>::Number* weights, const typename Products<T>::Number* x, T* out,
              int64_t inputs, int64_t outputs, int64_t count) {
    typedef Products<T> Own;
    Vec sums[OUTPUTS][M] = {};
    for (int64_t k = 0; k < inputs; k += 2 * LANES) {
        typename Own::Pair row[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) row[m] = Own::get(x + m * inputs + k);
#pragma GCC unroll 4
        for (int n = 0; n < OUTPUTS; n++) {
            const auto weight = Own::get(weights + n * inputs + k);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) sums[n][m] = Own::add(sums[n][m], weight, row[m]);
        }
    }
    for (int64_t n = 0; n < count; n++)
        for (int m = 0; m < M; m++) {
            float sum = 0.0f;
            for (int lane = 0; lane < LANES; lane++) sum += sums[n][m][lane];
            put(out[m * outputs + n], sum);
        }
}

template <class T>
void linear(const T* x, const uint8_t* packed, const float* scales, const float* table, T* out, int64_t rows,
            int64_t inputs, int64_t outputs, int threads) {
    typedef typename Products<T>::Number Number;
    const Buffer memory(rows * inputs);
    Number* ordered = reinterpret_cast<Number*>(static_cast<float*>(memory));
    for (int64_t start = 0; start < rows * inputs; start += 2 * LANES)
        for (int64_t pair = 0; pair < LANES; pair++) {
            put(ordered[start + pair], wide(x[start + 2 * pair]));
            put(ordered[start + LANES + pair], wide(x[start + 2 * pair + 1]));
        }
#pragma omp parallel num_threads(threads)
    {
        Buffer own(OUTPUTS * inputs);
        own.clear();
        Number* weights = reinterpret_cast<Number*>(static_cast<float*>(own));
#pragma omp for schedule(static)
        for (int64_t start = 0; start < outputs; start += OUTPUTS) {
            const int64_t count = std::min<int64_t>(OUTPUTS, outputs - start);
            for (int64_t n = 0; n < count; n++)
                read_back<T>(packed + (start + n) * inputs / 2, scales + (start + n) * inputs / BLOCK, table,
                             weights + n * inputs, inputs);
            int64_t r = 0;
            for (; r + MOST <= rows; r += MOST)
                products<MOST>(weights, ordered + r * inputs, out + r * outputs + start, inputs, outputs, count);
            for (; r < rows; r++)
                products<1>(weights, ordered + r * inputs, out + r * outputs + start, inputs, outputs, count);
        }
    }
}

}  // namespace

extern "C" {
// `inputs` is a multiple of 64.
void four_bits_float32(const float* x, const uint8_t* packed, const float* scales, const float* table, float* out,
                       int64_t rows, int64_t inputs, int64_t outputs, int threads) {
    linear(x, packed, scales, table, out, rows, inputs, outputs, threads);
}
void four_bits_bfloat16(const Bfloat16* x, const uint8_t* packed, const float* scales, const float* table,
                        Bfloat16* out, int64_t rows, int64_t inputs, int64_t outputs, int threads) {
    linear(x, packed, scales, table, out, rows, inputs, outputs, threads);
}
}
