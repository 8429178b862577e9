// Linear layers of few rows, as sampling has them, in bfloat16: each weight is read once, where it lies. A low-rank part
// is a few more products into the same sums; where a mask is given, each row has its own share of the rank.
//
// By AMX outputs are computed transposed, so that weights are the left operands of the tiles, which need no packing; x,
// which is small, is packed. By AVX-512 both are read as they are.

#include <algorithm>

#include "buffer.h"
#include "numbers.h"
#include "tiles.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t BLOCK = 32;  // outputs of one task

struct Layer {
    const Bfloat16 *weight, *a, *b;
    const float* mask;  // [row][rank]; without one all rows have all of it
    int64_t inputs, outputs, rank;
    // What is left of a low-rank number: nothing, whatever it is, where the mask is 0.
    float left(float low, int64_t row, int64_t at) const {
        const float share = mask ? mask[row * rank + at] : 1.0f;
        return share == 0.0f ? 0.0f : low * share;
    }
};

// Sums of the products of M rows of `x` with N rows of `weight`, M * N = 16, each by a vector: sum m * N + n.
template <int M, int N>
struct Sums {
    __m512 of[16];

    void clear() {
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++) of[s] = _mm512_setzero_ps();
    }

    void add(const Bfloat16* x, const Bfloat16* weight, int64_t depth) {
        for (int64_t k = 0; k < depth; k += 32) {
            __m512bh rows[M];
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) rows[m] = read(x + m * depth + k);
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                const __m512bh own = read(weight + n * depth + k);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) of[m * N + n] = _mm512_dpbf16_ps(of[m * N + n], rows[m], own);
            }
        }
    }

    // to[m * to_row + n]: neighbours are added until each of 16 lanes has all of one vector.
    void put(float* to, int64_t to_row) const {
        __m512 quarters[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const __m512 first = pairs(of[4 * q], of[4 * q + 1]), second = pairs(of[4 * q + 2], of[4 * q + 3]);
            const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
            const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
            quarters[q] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        }
        const __m512 all = halves(halves(quarters[0], quarters[1]), halves(quarters[2], quarters[3]));
        alignas(64) float found[16];
        _mm512_store_ps(found, all);
        for (int m = 0; m < M; m++) std::memcpy(to + m * to_row, found + m * N, N * 4);
    }

    static __m512bh read(const Bfloat16* at) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at)); }
    static __m512 pairs(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    static __m512 halves(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
};

// Of M rows and 16 outputs: sums[row][output], `row` apart; the low-rank part, of rank 0 or more, is added.
template <int M>
inline void products(const Bfloat16* x, const Bfloat16* weight, int64_t inputs, const Bfloat16* low, const Bfloat16* b,
                     int64_t rank, float* sums, int64_t row) {
    constexpr int N = 16 / M;
    for (int n = 0; n < 16; n += N) {
        Sums<M, N> own;
        own.clear();
        own.add(x, weight + n * inputs, inputs);
        if (rank) own.add(low, b + n * rank, rank);
        own.put(sums + n, row);
    }
}

// out[row][output] of 16 outputs, for all rows.
void outputs_of(const Bfloat16* x, const Bfloat16* weight, int64_t rows, int64_t inputs, const Bfloat16* low,
                const Bfloat16* b, int64_t rank, float* sums) {
    int64_t at = 0;
    for (; at + 4 <= rows; at += 4)
        products<4>(x + at * inputs, weight, inputs, low + at * rank, b, rank, sums + at * 16, 16);
    for (; at + 2 <= rows; at += 2)
        products<2>(x + at * inputs, weight, inputs, low + at * rank, b, rank, sums + at * 16, 16);
    for (; at < rows; at++)
        products<1>(x + at * inputs, weight, inputs, low + at * rank, b, rank, sums + at * 16, 16);
}

void by_vectors(const Layer& layer, const Bfloat16* x, Bfloat16* out, int64_t rows) {
    const Buffer sums(rows * 16), words(rows * layer.rank / 2 + 1);
    auto* low = reinterpret_cast<Bfloat16*>(words.at.get());
    for (int64_t r = 0; r < layer.rank; r += 16) {
        outputs_of(x, layer.a + r * layer.inputs, rows, layer.inputs, nullptr, nullptr, 0, sums);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t own = 0; own < 16; own++)
                put(low[row * layer.rank + r + own], layer.left(sums[row * 16 + own], row, r + own));
    }
#pragma omp for schedule(static) nowait
    for (int64_t start = 0; start < layer.outputs; start += BLOCK)
        for (int64_t first = start; first < start + BLOCK; first += 16) {
            outputs_of(x, layer.weight + first * layer.inputs, rows, layer.inputs, low, layer.b + first * layer.rank,
                       layer.rank, sums);
            for (int64_t row = 0; row < rows; row++)
                store(out + row * layer.outputs + first, load(sums + row * 16));
        }
}

}  // namespace

#endif

#ifdef TILES

namespace {

constexpr int64_t PACKED = TILE * DEPTH;  // numbers of a tile
static_assert(BLOCK == 2 * TILE);

// x as right operands: for each DEPTH inputs and TILE rows, 16 pairs of inputs by 16 rows.
void pack(const Bfloat16* x, Bfloat16* packed, int64_t rows, int64_t inputs, int64_t tiles) {
    for (int64_t block = 0; block < inputs / DEPTH; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            Bfloat16* to = packed + (block * tiles + tile) * PACKED;
            const int64_t count = std::min(TILE, rows - tile * TILE);
            if (count < TILE) std::memset(to, 0, PACKED * 2);
            for (int64_t r = 0; r < count; r++) {
                const Bfloat16* from = x + (tile * TILE + r) * inputs + block * DEPTH;
                for (int64_t pair = 0; pair < DEPTH / 2; pair++)
                    std::memcpy(to + (pair * TILE + r) * 2, from + pair * 2, 4);
            }
        }
}

// Adds BLOCK rows of `left` times one or two packed tiles of `right`, to the tiles 0 and 1 (first 16 rows), 2 and 3.
template <bool TWO>
inline void add(const Bfloat16* left, const Bfloat16* right, int64_t depth, int64_t tiles) {
    for (int64_t block = 0; block < depth / DEPTH; block++) {
        const Bfloat16* own = right + block * tiles * PACKED;
        _tile_loadd(4, left + block * DEPTH, depth * 2);
        _tile_loadd(5, left + TILE * depth + block * DEPTH, depth * 2);
        _tile_loadd(6, own, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (TWO) {
            _tile_loadd(7, own + PACKED, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void read(float* sums) {  // [BLOCK][2 * TILE]
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + TILE, 128);
    _tile_stored(2, sums + TILE * 2 * TILE, 128);
    _tile_stored(3, sums + TILE * 2 * TILE + TILE, 128);
}

// Up to two tiles of rows, the first of them number `before`: out[row][output].
template <bool TWO>
void rows_of(const Layer& layer, const Bfloat16* packed, int64_t tiles, Bfloat16* out, int64_t rows, int64_t before) {
    alignas(64) float sums[BLOCK * 2 * TILE];
    const Bfloat16s low(layer.rank * 2 * TILE);  // packed as x is, by two tiles
    for (int64_t r = 0; r < layer.rank; r += BLOCK) {
        clear();
        add<TWO>(layer.a + r * layer.inputs, packed, layer.inputs, tiles);
        read(sums);
        for (int64_t own = 0; own < BLOCK; own++)
            for (int64_t row = 0; row < 2 * TILE; row++)
                put(low[(r / DEPTH * 2 + row / TILE) * PACKED + (own / 2 * TILE + row % TILE) * 2 + own % 2],
                    row < rows ? layer.left(sums[own * 2 * TILE + row], before + row, r + own) : 0.0f);
    }
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_slli_epi32(ramp, 5);
#pragma omp for schedule(static) nowait
    for (int64_t start = 0; start < layer.outputs; start += BLOCK) {
        clear();
        add<TWO>(layer.weight + start * layer.inputs, packed, layer.inputs, tiles);
        if (layer.rank) add<TWO>(layer.b + start * layer.rank, low, layer.rank, 2);
        read(sums);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t half = 0; half < BLOCK; half += TILE) {
                const float* column = sums + half * 2 * TILE + row;
                const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, places, column, 4);
                store(out + row * layer.outputs + start + half, reinterpret_cast<Vec>(values));
            }
    }
}

void by_tiles(const Layer& layer, const Bfloat16* packed, Bfloat16* out, int64_t rows) {
    const int64_t tiles = (rows + TILE - 1) / TILE;
    const TileShapes shapes;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int64_t before = tile * TILE, count = std::min(2 * TILE, rows - before);
        const Bfloat16* own = packed + tile * PACKED;
        Bfloat16* to = out + before * layer.outputs;
        tile + 1 < tiles ? rows_of<true>(layer, own, tiles, to, count, before)
                         : rows_of<false>(layer, own, tiles, to, count, before);
    }
}

}  // namespace

#endif

#ifdef __AVX512BF16__

extern "C" {
int has_linear() { return 1; }

// inputs, outputs and rank are multiples of 32; without a low-rank part rank is 0. The mask is [row][rank], or null.
void linear_bfloat16(const Bfloat16* x, const Bfloat16* weight, const Bfloat16* a, const Bfloat16* b, const float* mask,
                     Bfloat16* out, int64_t rows, int64_t inputs, int64_t outputs, int64_t rank, int threads) {
    const Layer layer{weight, a, b, mask, inputs, outputs, rank};
#ifdef TILES
    if (tiles_allowed()) {
        const int64_t tiles = (rows + TILE - 1) / TILE;
        const Bfloat16s packed(inputs * tiles * TILE);
        pack(x, packed, rows, inputs, tiles);
#pragma omp parallel num_threads(threads)
        by_tiles(layer, packed, out, rows);
        return;
    }
#endif
#pragma omp parallel num_threads(threads)
    by_vectors(layer, x, out, rows);
}
}

#else

extern "C" int has_linear() { return 0; }

#endif
