// Linear layers of few rows, as sampling has them, in bfloat16 by AMX: each weight is read once, where it lies.
//
// Outputs are computed transposed, so that weights are the left operands of the tiles, which need no packing; x, which
// is small, is packed. A low-rank part is a few more products into the same sums.

#include "tiles.h"

#ifdef TILES

namespace {

constexpr int64_t PACKED = TILE * DEPTH;  // numbers of a tile
constexpr int64_t BLOCK = 2 * TILE;       // outputs of one task

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

struct Layer {
    const Bfloat16 *weight, *a, *b;
    int64_t inputs, outputs, rank;
};

// Up to two tiles of rows: out[row][output].
template <bool TWO>
void rows_of(const Layer& layer, const Bfloat16* packed, int64_t tiles, Bfloat16* out, int64_t rows) {
    alignas(64) float sums[BLOCK * 2 * TILE];
    const Bfloat16s low(layer.rank * 2 * TILE);  // packed as x is, by two tiles
    for (int64_t r = 0; r < layer.rank; r += BLOCK) {
        clear();
        add<TWO>(layer.a + r * layer.inputs, packed, layer.inputs, tiles);
        read(sums);
        for (int64_t own = 0; own < BLOCK; own++)
            for (int64_t row = 0; row < 2 * TILE; row++)
                put(low[(r / DEPTH * 2 + row / TILE) * PACKED + (own / 2 * TILE + row % TILE) * 2 + own % 2],
                    sums[own * 2 * TILE + row]);
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

}  // namespace

extern "C" {
int has_linear() { return tiles_allowed(); }

// inputs, outputs and rank are multiples of 32; without a low-rank part rank is 0.
void linear_bfloat16(const Bfloat16* x, const Bfloat16* weight, const Bfloat16* a, const Bfloat16* b, Bfloat16* out,
                     int64_t rows, int64_t inputs, int64_t outputs, int64_t rank, int threads) {
    const Layer layer{weight, a, b, inputs, outputs, rank};
    const int64_t tiles = (rows + TILE - 1) / TILE;
    const Bfloat16s packed(inputs * tiles * TILE);
    pack(x, packed, rows, inputs, tiles);
#pragma omp parallel num_threads(threads)
    {
        const TileShapes shapes;
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const int64_t count = std::min(2 * TILE, rows - tile * TILE);
            Bfloat16* to = out + tile * TILE * outputs;
            if (tile + 1 < tiles)
                rows_of<true>(layer, packed + tile * PACKED, tiles, to, count);
            else
                rows_of<false>(layer, packed + tile * PACKED, tiles, to, count);
        }
    }
}
}

#else

extern "C" int has_linear() { return 0; }

#endif
