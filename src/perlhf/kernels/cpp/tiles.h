// The products of attention in bfloat16, by AMX: tiles of 16 by 16 sums, to which 32 products each are added at a time.
//
// A left operand is 16 rows of 32 numbers, read where it lies; a right operand is 16 pairs of rows, interleaved.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "buffer.h"
#include "numbers.h"

constexpr int64_t TILE = 16, DEPTH = 32;

// Whether the system lets this process use the tiles; asked once.
inline bool tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

// While it lives, this thread's eight tiles have 16 rows of 64 bytes.
struct TileShapes {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    TileShapes() {
        for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = TILE;
        _tile_loadconfig(&shapes);
    }
    ~TileShapes() { _tile_release(); }
};

struct Bfloat16s {  // not initialised
    explicit Bfloat16s(int64_t size) : words(size / 2 + 1) {}
    operator Bfloat16*() const { return reinterpret_cast<Bfloat16*>(words.at.get()); }
    Buffer words;
};

// LANES pairs: the numbers of `low` and those of `high`, interleaved.
inline void store_pairs(Bfloat16* to, Vec low, Vec high) {
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)));
}

// Sums 0 to N - 1 += `depth` numbers of each of 16 rows of `left` (`left_row` apart), times N tiles side by side of
// `right`, whose pairs of rows are `right_row` numbers apart.
template <int N>
inline void add_tiles(const Bfloat16* left, int64_t left_row, const Bfloat16* right, int64_t right_row, int64_t depth) {
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const Bfloat16* own = right + k / 2 * right_row;
        _tile_loadd(4, left + k, left_row * 2);
        _tile_loadd(5, own, right_row * 2);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (N > 1) {
            _tile_loadd(6, own + 32, right_row * 2);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (N > 2) {
            _tile_loadd(7, own + 64, right_row * 2);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (N > 3) {
            _tile_loadd(5, own + 96, right_row * 2);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
}

template <int N>
inline void clear_tiles() {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
}

template <int N>
inline void load_tiles(const float* from, int64_t row) {
    _tile_loadd(0, from, row * 4);
    if constexpr (N > 1) _tile_loadd(1, from + TILE, row * 4);
    if constexpr (N > 2) _tile_loadd(2, from + 2 * TILE, row * 4);
    if constexpr (N > 3) _tile_loadd(3, from + 3 * TILE, row * 4);
}

template <int N>
inline void store_tiles(float* to, int64_t row) {
    _tile_stored(0, to, row * 4);
    if constexpr (N > 1) _tile_stored(1, to + TILE, row * 4);
    if constexpr (N > 2) _tile_stored(2, to + 2 * TILE, row * 4);
    if constexpr (N > 3) _tile_stored(3, to + 3 * TILE, row * 4);
}

// out[row][:] (+)= left[row] right, for whole tiles of rows.
template <int N, bool ADD>
void tile_product(const Bfloat16* left, int64_t left_row, const Bfloat16* right, int64_t right_row, int64_t depth,
                  float* out, int64_t out_row, int64_t rows) {
    for (int64_t row = 0; row < rows; row += TILE) {
        ADD ? load_tiles<N>(out + row * out_row, out_row) : clear_tiles<N>();
        add_tiles<N>(left + row * left_row, left_row, right, right_row, depth);
        store_tiles<N>(out + row * out_row, out_row);
    }
}

template <bool ADD>
void tile_product(int64_t tiles, const Bfloat16* left, int64_t left_row, const Bfloat16* right, int64_t right_row,
                  int64_t depth, float* out, int64_t out_row, int64_t rows) {
    if (tiles == 4) tile_product<4, ADD>(left, left_row, right, right_row, depth, out, out_row, rows);
    if (tiles == 3) tile_product<3, ADD>(left, left_row, right, right_row, depth, out, out_row, rows);
    if (tiles == 2) tile_product<2, ADD>(left, left_row, right, right_row, depth, out, out_row, rows);
    if (tiles == 1) tile_product<1, ADD>(left, left_row, right, right_row, depth, out, out_row, rows);
}

inline int64_t up(int64_t count, int64_t block) { return (count + block - 1) / block * block; }

// As `Vectors`, with weights rounded to bfloat16. Float32 buffers have room for whole tiles of rows.
struct Tiles {
    static bool fits(int64_t width) { return width % DEPTH == 0 && tiles_allowed(); }

    struct Path {
        int64_t width, padded, across;
        Bfloat16s rows, columns;  // [key][width], [width][across]
        Path(int64_t most, int64_t width)
            : width(width), padded(width), across(up(most, DEPTH) + DEPTH), rows(across * width),
              columns(across * width) {}
        void put_row(int64_t number, const Bfloat16* from) { std::memcpy(rows + number * width, from, width * 2); }
        void finish(int64_t count) { std::memset(rows + count * width, 0, (up(count, DEPTH) - count) * width * 2); }
        void transpose(int64_t count) {
            for (int64_t first = 0; first < up(count, DEPTH); first += DEPTH)
                for (int64_t d = 0; d < width; d++)
                    for (int64_t key = first; key < first + DEPTH; key++)
                        columns[d * across + key] = rows[key * width + d];
        }
    };

    struct Lanes {
        int64_t width;
        Bfloat16s own, across, along;  // [lane][width], [pair of columns][lane][2], [pair of lanes][width][2]
        explicit Lanes(int64_t width) : width(width), own(GROUP * width), across(GROUP * width), along(GROUP * width) {}
        void put_lane(int64_t lane, const Bfloat16* from) { std::memcpy(own + lane * width, from, width * 2); }
        void finish(int64_t lanes) {
            std::memset(own + lanes * width, 0, (GROUP - lanes) * width * 2);
            for (int64_t pair = 0; pair < width / 2; pair++)
                for (int64_t lane = 0; lane < GROUP; lane++)
                    std::memcpy(across + (pair * GROUP + lane) * 2, own + lane * width + pair * 2, 4);
            for (int64_t lane = 0; lane < GROUP; lane += 2)
                for (int64_t d = 0; d < width; d += LANES)
                    store_pairs(along + lane * width + d * 2, load(own + lane * width + d),
                                load(own + (lane + 1) * width + d));
        }
    };

    TileShapes shapes;
    Bfloat16s packed;
    Tiles(int64_t most, int64_t) : packed((up(most, DEPTH) + DEPTH) * GROUP) {}

    void logits(int vectors, const Path& keys, const Lanes& queries, float* logits, int64_t count) {
        tile_product<false>(vectors, keys.rows, keys.width, queries.across, GROUP * 2, keys.width, logits, GROUP,
                            up(count, TILE));
    }

    void mix(int vectors, const float* weights, const Path& values, float* mixed, int64_t count) {
        const int64_t depth = up(count, DEPTH);
        for (int64_t key = 0; key < depth; key += 2)
            for (int64_t l = 0; l < vectors * LANES; l += LANES)
                store_pairs(packed + key * GROUP + l * 2, key < count ? load(weights + key * GROUP + l) : Vec{},
                            key + 1 < count ? load(weights + (key + 1) * GROUP + l) : Vec{});
        tile_product<false>(vectors, values.columns, values.across, packed, GROUP * 2, depth, mixed, GROUP,
                            values.width);
    }

    void spread(const float* weights, const Lanes& lanes, int64_t used, float* total, int64_t count) {
        const int64_t rows = up(count, TILE), depth = up(used, DEPTH);
        for (int64_t key = 0; key < rows; key++)
            for (int64_t l = 0; l < depth; l += LANES)
                store(packed + key * GROUP + l, key < count && l < used ? load(weights + key * GROUP + l) : Vec{});
        for (int64_t d = 0; d < lanes.width; d += 4 * TILE)
            tile_product<true>(std::min<int64_t>(4, (lanes.width - d) / TILE), packed, GROUP, lanes.along + d * 2,
                               lanes.width * 2, depth, total + d, lanes.width, rows);
    }
};

#endif
