// Float32 and bfloat16 numbers, alone and by vector, for the kernels of this folder, which compute in float32.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// ROWS * VECTORS sums and VECTORS operands have to fit the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4, VECTORS = 3;
#else
constexpr int LANES = 4, ROWS = 6, VECTORS = 4;
#endif
constexpr int64_t GROUP = LANES * VECTORS;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct Bfloat16 {
    uint16_t bits;
};

inline Vec all(float value) { return value - Vec{}; }

inline Vec load(const float* at) {
    Vec found;
    std::memcpy(&found, at, sizeof found);
    return found;
}
inline Vec load(const Bfloat16* at) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

inline void store(float* at, Vec value) { std::memcpy(at, &value, sizeof value); }
inline void store(Bfloat16* at, Vec value) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
#else
    Bits bits = reinterpret_cast<Bits>(value);
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits nothing = Bits{} + 0x7fc0;  // not a number
    Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nothing : rounded, Halves);
#endif
    std::memcpy(at, &halves, sizeof halves);
}

// The first `count` numbers, 0 in the other lanes; and back.
template <class T>
inline Vec load_some(const T* at, int64_t count) {
    if (count == LANES) return load(at);
    T some[LANES] = {};
    std::memcpy(some, at, count * sizeof(T));
    return load(some);
}
template <class T>
inline void store_some(T* at, Vec value, int64_t count) {
    if (count == LANES) return store(at, value);
    T some[LANES];
    store(some, value);
    std::memcpy(at, some, count * sizeof(T));
}

inline float wide(float value) { return value; }
inline float wide(Bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}
inline void put(float& at, float value) { at = value; }
inline void put(Bfloat16& at, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    at.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// e^x to about two units of the last place: x = n log 2 + r, and e^r by its series up to r^6. Not-a-number stays. Below
// e^-70 it is 0: smaller shares of a sum are lost anyway, and products of denormal numbers are a hundred times slower.
inline Vec exponential(Vec given) {
    const Vec low = all(-70.0f), high = all(88.0f), half = all(0.5f);
    Vec x = given < low ? low : given;
    x = x > high ? high : x;
    Vec scaled = x * 1.44269504f;
    Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? -half : half), Ints);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    Vec sum = all(1.0f / 720);
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    Vec found = sum * reinterpret_cast<Vec>((n << 23) + 0x3f800000);
    return given < low ? Vec{} : found;
}
