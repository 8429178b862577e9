// Norms, rotary positions and gated products, each in one pass over memory; called by native.py.

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace {

constexpr int64_t SMALL = 32768;  // elements that aren't worth a second thread

template <class T>
void norm(const T* x, const T* weight, T* out, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const T* from = x + r * width;
        T* to = out + r * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; d++) sum += wide(from[d]) * wide(from[d]);
        const float scale = inverse[r] = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
        for (int64_t d = 0; d < width; d++) {
            T normed;  // rounded before it is weighted, as the network's own module does
            put(normed, wide(from[d]) * scale);
            put(to[d], wide(normed) * wide(weight[d]));
        }
    }
}

// With r = (mean(x^2) + eps)^(-1/2): dx = r (g w) - x r^3 mean(g w x).
template <class T>
void norm_backward(const T* x, const T* weight, const float* inverse, const T* grad, T* by_x, int64_t rows,
                   int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const T *from = x + r * width, *above = grad + r * width;
        T* to = by_x + r * width;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < width; d++) along += wide(above[d]) * wide(weight[d]) * wide(from[d]);
        const float scale = inverse[r];
        along *= scale * scale * scale / width;
#pragma omp simd
        for (int64_t d = 0; d < width; d++)
            put(to[d], wide(above[d]) * wide(weight[d]) * scale - wide(from[d]) * along);
    }
}

// Each head of a row turned by its position; `back` turns a gradient the other way.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t rows, int64_t heads, int64_t width, int64_t back,
            int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (rows * heads * width > SMALL)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + (r * heads + h) * width, *c = cos + r * width, *s = sin + r * width;
            T* to = out + (r * heads + h) * width;
            if (back)
#pragma omp simd
                for (int64_t d = 0; d < half; d++) {
                    const float first = wide(from[d]), second = wide(from[d + half]);
                    put(to[d], first * wide(c[d]) + second * wide(s[d + half]));
                    put(to[d + half], second * wide(c[d + half]) - first * wide(s[d]));
                }
            else
#pragma omp simd
                for (int64_t d = 0; d < half; d++) {
                    const float first = wide(from[d]), second = wide(from[d + half]);
                    put(to[d], first * wide(c[d]) - second * wide(s[d]));
                    put(to[d + half], second * wide(c[d + half]) + first * wide(s[d + half]));
                }
        }
}

inline Vec logistic(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

template <class F>
void by_vector(int64_t size, int threads, F each) {  // each(first element, elements), at most LANES of them
#pragma omp parallel for num_threads(threads) if (size > SMALL)
    for (int64_t at = 0; at < size; at += LANES) each(at, std::min<int64_t>(LANES, size - at));
}

template <class T>
void gated(const T* gate, const T* up, T* out, int64_t size, int threads) {
    by_vector(size, threads, [=](int64_t at, int64_t count) {
        const Vec g = load_some(gate + at, count);
        T activated[LANES];  // rounded before the product, as the network's own operations do
        store(activated, g * logistic(g));
        store_some(out + at, load(activated) * load_some(up + at, count), count);
    });
}

template <class T>
void gated_backward(const T* gate, const T* up, const T* grad, T* by_gate, T* by_up, int64_t size, int threads) {
    by_vector(size, threads, [=](int64_t at, int64_t count) {
        const Vec g = load_some(gate + at, count), above = load_some(grad + at, count), part = logistic(g);
        store_some(by_up + at, above * g * part, count);
        store_some(by_gate + at, above * load_some(up + at, count) * part * (1.0f + g * (1.0f - part)), count);
    });
}

}  // namespace

#define EXPORTS(T, NAME)                                                                                             \
    void norm_##NAME(const T* x, const T* weight, T* out, float* inverse, int64_t rows, int64_t width, float eps,     \
                     int threads) {                                                                                  \
        norm(x, weight, out, inverse, rows, width, eps, threads);                                                    \
    }                                                                                                                \
    void norm_backward_##NAME(const T* x, const T* weight, const float* inverse, const T* grad, T* by_x,              \
                              int64_t rows, int64_t width, int threads) {                                            \
        norm_backward(x, weight, inverse, grad, by_x, rows, width, threads);                                         \
    }                                                                                                                \
    void rotate_##NAME(const T* x, const T* cos, const T* sin, T* out, int64_t rows, int64_t heads, int64_t width,    \
                       int64_t back, int threads) {                                                                  \
        rotate(x, cos, sin, out, rows, heads, width, back, threads);                                                 \
    }                                                                                                                \
    void gated_##NAME(const T* gate, const T* up, T* out, int64_t size, int threads) {                                \
        gated(gate, up, out, size, threads);                                                                         \
    }                                                                                                                \
    void gated_backward_##NAME(const T* gate, const T* up, const T* grad, T* by_gate, T* by_up, int64_t size,         \
                               int threads) {                                                                        \
        gated_backward(gate, up, grad, by_gate, by_up, size, threads);                                               \
    }

extern "C" {
EXPORTS(float, float32)
EXPORTS(Bfloat16, bfloat16)
}
