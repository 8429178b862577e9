// Attention over a prefix tree and over a cache; called by native.py.
//
// A group is up to GROUP queries, one to a lane: tokens, and of each token the heads that share a key/value head. So a
// softmax runs down the keys without a sum across lanes, and keys may lie anywhere. The logits of a group exist at one
// time: GROUP * keys floats a thread. Nothing depends on timing: equal inputs and threads give equal bits.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Makes probabilities of a group's products; `log_sums` are the logarithms of each lane's sum of exponentials.
inline void softmax(int vectors, float* logits, int64_t count, float scaling, float* log_sums) {
    for (int first = 0; first < vectors * LANES; first += LANES) {
        float* column = logits + first;
        Vec top = all(-3.0e38f), sum = Vec{};
        for (int64_t key = 0; key < count; key++) {
            const Vec row = load(column + key * GROUP);
            top = row > top ? row : top;
        }
        for (int64_t key = 0; key < count; key++) {
            const Vec odds = exponential((load(column + key * GROUP) - top) * scaling);
            sum += odds;
            store(column + key * GROUP, odds);
        }
        for (int l = 0; l < LANES; l++) log_sums[first + l] = top[l] * scaling + std::log(sum[l]);
        const Vec share = 1.0f / sum;
        for (int64_t key = 0; key < count; key++) store(column + key * GROUP, load(column + key * GROUP) * share);
    }
}

struct Strides {  // of one [heads, tokens, width] tensor, in elements
    int64_t head, token;
};

struct Tree {
    int64_t heads, kv_heads, tokens, width, pieces;
    const int64_t* piece;  // [pieces][6]: first query, its key's place, tokens, first span, spans, and `behind`
    const int64_t* span;   // [spans][2]: place of the first key, tokens; what comes before a piece
    float scaling;
    int threads;

    int64_t share() const { return heads / kv_heads; }
    // Query i of the piece sees no key before number `behind + i` of the piece's path: its window has left them behind.
    int64_t behind(int64_t p) const { return piece[6 * p + 5]; }
    int64_t query(int64_t p) const { return piece[6 * p]; }
    int64_t length(int64_t p) const { return piece[6 * p + 2]; }
    int64_t before(int64_t p) const {
        int64_t sum = 0;
        for (int64_t s = 0; s < piece[6 * p + 4]; s++) sum += span[2 * (piece[6 * p + 3] + s) + 1];
        return sum;
    }
    int64_t longest() const {
        int64_t found = 0;
        for (int64_t p = 0; p < pieces; p++) found = std::max(found, before(p) + length(p));
        return found;
    }
    template <class F>
    void path(int64_t p, F at) const {  // at(number on the path, key's place) for all that the piece's last token sees
        int64_t number = 0;
        for (int64_t s = 0; s < piece[6 * p + 4]; s++) {
            const int64_t* of = span + 2 * (piece[6 * p + 3] + s);
            for (int64_t t = 0; t < of[1]; t++) at(number++, of[0] + t);
        }
        for (int64_t t = 0; t < length(p); t++) at(number++, piece[6 * p + 1] + t);
    }
};

// The lanes of a piece's group, and how many keys its last lane sees.
struct Group {
    int64_t lane, lanes, keys;
    int vectors;
    Group(int64_t lane, int64_t all, int64_t share, int64_t before)
        : lane(lane), lanes(std::min<int64_t>(GROUP, all - lane)) {
        keys = before + (lane + lanes - 1) / share + 1;
        vectors = static_cast<int>((lanes + LANES - 1) / LANES);
    }
};

// `value` where a lane's token comes before the key's, or so far after it that its window doesn't reach it.
void hide(float* table, const Group& group, int64_t share, int64_t before, int64_t behind, float value) {
    const int64_t last = behind + (group.lane + group.lanes - 1) / share;
    for (int64_t key = 0; key < std::min(last, group.keys); key++) {
        // Lanes of tokens from number key - behind + 1 on.
        const int64_t from = std::max<int64_t>(0, (key - behind + 1) * share - group.lane);
        for (int64_t l = from; l < group.lanes; l++) table[key * GROUP + l] = value;
    }
    for (int64_t key = std::max<int64_t>(before, before + group.lane / share); key < group.keys; key++) {
        int64_t hidden = std::min(group.lanes, (key - before) * share - group.lane);
        for (int64_t l = 0; l < hidden; l++) table[key * GROUP + l] = value;
    }
}

template <class T>
struct Rows {  // of a [heads, tokens, width] tensor
    T* at;
    Strides of;
    T* row(int64_t head, int64_t token) const { return at + head * of.head + token * of.token; }
};

// The heads that share a key/value head, of one token after the other: which row a lane of a piece is.
struct Places {
    int64_t head, share, start;
    template <class T>
    T* row(const Rows<T>& of, int64_t lane) const {
        return of.row(head * share + lane % share, start + lane / share);
    }
};

template <class P, class T>
void fill(const Tree& tree, int64_t p, int64_t head, Rows<const T> key, Rows<const T> value, typename P::Path& keys,
          typename P::Path& values) {
    tree.path(p, [&](int64_t number, int64_t token) {
        keys.put_row(number, key.row(head, token));
        values.put_row(number, value.row(head, token));
    });
    keys.finish(tree.before(p) + tree.length(p));
    values.finish(tree.before(p) + tree.length(p));
}

template <class P, class T>
void gather(const Rows<const T>& from, const Places& places, const Group& group, typename P::Lanes& to) {
    for (int64_t l = 0; l < group.lanes; l++) to.put_lane(l, places.row(from, group.lane + l));
    to.finish(group.lanes);
}

template <class P, class T>
void attend(const Tree& tree, Rows<const T> query, Rows<const T> key, Rows<const T> value, Rows<T> out,
            float* log_sums) {
    const int64_t share = tree.share(), most = tree.longest(), tasks = tree.kv_heads * tree.pieces;
#pragma omp parallel num_threads(tree.threads)
    {
        P products(most, tree.width);
        typename P::Path keys(most, tree.width), values(most, tree.width);
        typename P::Lanes queries(tree.width);
        Buffer logits((most + LANES) * GROUP), mixed((tree.width + LANES) * GROUP);
        float sums[GROUP];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t head = task % tree.kv_heads, p = task / tree.kv_heads;
            const int64_t start = tree.query(p), length = tree.length(p), before = tree.before(p);
            const Places places{head, share, start};
            fill<P, T>(tree, p, head, key, value, keys, values);
            values.transpose(before + length);
            for (int64_t lane = 0; lane < length * share; lane += GROUP) {
                const Group group(lane, length * share, share, before);
                gather<P, T>(query, places, group, queries);
                products.logits(group.vectors, keys, queries, logits, group.keys);
                hide(logits, group, share, before, tree.behind(p), NEVER);
                softmax(group.vectors, logits, group.keys, tree.scaling, sums);
                products.mix(group.vectors, logits, values, mixed, group.keys);
                for (int64_t l = 0; l < group.lanes; l++) {
                    T* to = places.row(out, lane + l);
                    for (int64_t d = 0; d < tree.width; d++) put(to[d], mixed[d * GROUP + l]);
                    *places.row(Rows<float>{log_sums, {tree.tokens, 1}}, lane + l) = sums[l];
                }
            }
        }
    }
}

// Pieces of one token each, as serving has them: over their paths where they lie, for all heads that share their keys.
template <class T>
void attend_one(const Tree& tree, Rows<const T> query, Rows<const T> key, Rows<const T> value, Rows<T> out) {
    const int64_t share = tree.share(), width = tree.width, tasks = tree.kv_heads * tree.pieces;
    const int64_t most = (tree.longest() + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(tree.threads)
    {
        Buffer queries(share * width), logits(share * most), sums(share * width);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t head = task % tree.kv_heads, p = task / tree.kv_heads, keys = tree.before(p) + 1;
            const Places places{head, share, tree.query(p)};
            for (int64_t h = 0; h < share; h++) {
                const T* from = places.row(query, h);
                for (int64_t d = 0; d < width; d++) queries[h * width + d] = wide(from[d]) * tree.scaling;
            }
            tree.path(p, [&](int64_t number, int64_t token) {
                const T* from = key.row(head, token);
                for (int64_t h = 0; h < share; h++) {
                    const float* own = queries + h * width;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t d = 0; d < width; d++) sum += wide(from[d]) * own[d];
                    logits[h * most + number] = sum;
                }
            });
            for (int64_t h = 0; h < share; h++) {
                float* own = logits + h * most;
                float top = NEVER, sum = 0.0f;
                for (int64_t k = 0; k < keys; k++) top = std::max(top, own[k]);
                for (int64_t k = keys; k < (keys + LANES - 1) / LANES * LANES; k++) own[k] = -3.0e38f;
                for (int64_t k = 0; k < keys; k += LANES) store(own + k, exponential(load(own + k) - top));
                for (int64_t k = 0; k < keys; k++) sum += own[k];
                for (int64_t k = 0; k < keys; k++) own[k] /= sum;
            }
            std::memset(sums, 0, share * width * 4);
            tree.path(p, [&](int64_t number, int64_t token) {
                const T* from = value.row(head, token);
                for (int64_t h = 0; h < share; h++) {
                    const float weight = logits[h * most + number];
                    float* own = sums + h * width;
#pragma omp simd
                    for (int64_t d = 0; d < width; d++) own[d] += weight * wide(from[d]);
                }
            });
            for (int64_t h = 0; h < share; h++) {
                T* to = places.row(out, h);
                for (int64_t d = 0; d < width; d++) put(to[d], sums[h * width + d]);
            }
        }
    }
}

// The pieces of each thread: the dearest first, each to the thread that has least to do.
std::vector<std::vector<int64_t>> dealt(const Tree& tree) {
    std::vector<int64_t> cost(tree.pieces), order(tree.pieces), load(tree.threads, 0);
    for (int64_t p = 0; p < tree.pieces; p++)
        cost[p] = (tree.before(p) + tree.length(p)) * tree.length(p);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    std::vector<std::vector<int64_t>> of(tree.threads);
    for (int64_t p : order) {
        auto least = std::min_element(load.begin(), load.end()) - load.begin();
        of[least].push_back(p);
        load[least] += cost[p];
    }
    return of;
}

// A piece's gradients by its queries, and by the keys (times 1 / scaling) and values of its path, which are added to
// `by_key` and `by_value`.
template <class P, class T>
struct Backward {
    const Tree& tree;
    Rows<const T> query, key, value, out, grad;
    Rows<const float> log_sums;
    P products;
    typename P::Path keys, values;
    typename P::Lanes queries, grads;
    Buffer path_keys, path_values, p, inner, mixed;

    Backward(const Tree& tree, int64_t most, Rows<const T> query, Rows<const T> key, Rows<const T> value,
             Rows<const T> out, Rows<const T> grad, const float* log_sums)
        : tree(tree), query(query), key(key), value(value), out(out), grad(grad),
          log_sums{log_sums, {tree.tokens, 1}}, products(most, tree.width), keys(most, tree.width),
          values(most, tree.width), queries(tree.width), grads(tree.width), path_keys((most + LANES) * keys.padded),
          path_values((most + LANES) * keys.padded), p((most + LANES) * GROUP), inner((most + LANES) * GROUP),
          mixed(GROUP * (tree.width + LANES)) {}

    void piece(int64_t number, int64_t head, Rows<T> by_query, float* by_key, float* by_value) {
        const int64_t padded = keys.padded, share = tree.share(), before = tree.before(number);
        const int64_t start = tree.query(number), length = tree.length(number);
        const Places places{head, share, start};
        fill<P, T>(tree, number, head, key, value, keys, values);
        keys.transpose(before + length);
        std::memset(path_keys, 0, (before + length) * padded * 4);
        std::memset(path_values, 0, (before + length) * padded * 4);
        for (int64_t lane = 0; lane < length * share; lane += GROUP) {
            const Group group(lane, length * share, share, before);
            gather<P, T>(query, places, group, queries);
            gather<P, T>(grad, places, group, grads);
            slopes(group, places, before, tree.behind(number));
            products.spread(inner, queries, group.lanes, path_keys, group.keys);
            products.spread(p, grads, group.lanes, path_values, group.keys);
            products.mix(group.vectors, inner, keys, mixed, group.keys);
            for (int64_t l = 0; l < group.lanes; l++) {
                T* to = places.row(by_query, lane + l);
                for (int64_t d = 0; d < tree.width; d++) put(to[d], mixed[d * GROUP + l] * tree.scaling);
            }
        }
        tree.path(number, [&](int64_t at, int64_t token) {
            for (int64_t d = 0; d < padded; d++) {
                by_key[token * padded + d] += path_keys[at * padded + d];
                by_value[token * padded + d] += path_values[at * padded + d];
            }
        });
    }

    // Probabilities p, and the gradient of the logits: p (grad . value - sum(grad * out)).
    void slopes(const Group& group, const Places& places, int64_t before, int64_t behind) {
        float log_sum[GROUP] = {}, along[GROUP] = {};
        for (int64_t l = 0; l < group.lanes; l++) {
            const T *mine = places.row(out, group.lane + l), *above = places.row(grad, group.lane + l);
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < tree.width; d++) sum += wide(mine[d]) * wide(above[d]);
            along[l] = sum;
            log_sum[l] = *places.row(log_sums, group.lane + l);
        }
        products.logits(group.vectors, keys, queries, p, group.keys);
        products.logits(group.vectors, values, grads, inner, group.keys);
        hide(p, group, places.share, before, behind, NEVER);
        const int lanes = group.vectors * LANES;
        for (int64_t k = 0; k < group.keys * GROUP; k += GROUP)
            for (int l = 0; l < lanes; l += LANES) {
                const Vec odds = exponential(load(p + k + l) * tree.scaling - load(log_sum + l));
                store(p + k + l, odds);
                store(inner + k + l, odds * (load(inner + k + l) - load(along + l)));
            }
    }
};

template <class P, class T>
void attend_backward(const Tree& tree, Rows<const T> query, Rows<const T> key, Rows<const T> value, Rows<const T> out,
                     Rows<const T> grad, const float* log_sums, Rows<T> by_query, Rows<T> by_key, Rows<T> by_value) {
    const int64_t most = tree.longest(), padded = typename P::Path(0, tree.width).padded;
    const auto mine = dealt(tree);
    std::vector<Buffer> of_keys, of_values;
    for (int t = 0; t < tree.threads; t++) {
        of_keys.emplace_back(tree.tokens * padded);
        of_values.emplace_back(tree.tokens * padded);
    }
#pragma omp parallel num_threads(tree.threads)
    {
        Backward<P, T> work(tree, most, query, key, value, out, grad, log_sums);
        for (int64_t head = 0; head < tree.kv_heads; head++) {
#pragma omp for schedule(static, 1)
            for (int t = 0; t < tree.threads; t++) {
                of_keys[t].clear();
                of_values[t].clear();
                for (int64_t p : mine[t]) work.piece(p, head, by_query, of_keys[t], of_values[t]);
            }
#pragma omp for schedule(static)
            for (int64_t token = 0; token < tree.tokens; token++) {
                T *to_key = by_key.row(head, token), *to_value = by_value.row(head, token);
                for (int64_t d = 0; d < tree.width; d++) {
                    float key_sum = 0.0f, value_sum = 0.0f;
                    for (int t = 0; t < tree.threads; t++) {
                        key_sum += of_keys[t][token * padded + d];
                        value_sum += of_values[t][token * padded + d];
                    }
                    put(to_key[d], key_sum * tree.scaling);
                    put(to_value[d], value_sum);
                }
            }
        }
    }
}

// One new token a row over its prompt's keys, shared by the rows of that prompt, and the row's own; from the depth
// `seen` of its prompt on.
template <class T>
void decode(Rows<const T> query, Rows<const T> key, Rows<const T> value, const T* keys, const T* values, T* own_keys,
            T* own_values, Rows<T> out,
            const int64_t* lengths, const int64_t* seen, const int64_t* first_row, int64_t prompts, int64_t longest,
            int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity, int64_t time, float scaling,
            int threads) {
    const int64_t share = heads / kv_heads, tasks = prompts * kv_heads;
#pragma omp parallel num_threads(threads)
    {
        Vectors<T> products(longest, width);
        typename Vectors<T>::Path shared_keys(longest, width), shared_values(longest, width);
        typename Vectors<T>::Lanes queries(width);
        Buffer logits((longest + time) * GROUP), mixed((width + LANES) * GROUP), sums(width);
        float log_sums[GROUP];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t head = task % kv_heads, prompt = task / kv_heads;
            const int64_t skipped = std::min(seen[prompt], lengths[prompt]), length = lengths[prompt] - skipped;
            const int64_t early = std::max<int64_t>(0, seen[prompt] - lengths[prompt]), late = time - early;
            const int64_t first = first_row[prompt], count = (first_row[prompt + 1] - first) * share;
            const Places places{head, share, first};
            for (int64_t t = 0; t < length; t++) {
                const int64_t at = ((prompt * kv_heads + head) * longest + skipped + t) * width;
                shared_keys.put_row(t, keys + at);
                shared_values.put_row(t, values + at);
            }
            for (int64_t row = first; row < first_row[prompt + 1]; row++) {
                const int64_t at = ((row * kv_heads + head) * capacity + time - 1) * width;
                std::copy_n(key.row(head, row), width, own_keys + at);
                std::copy_n(value.row(head, row), width, own_values + at);
            }
            for (int64_t lane = 0; lane < count; lane += GROUP) {
                const Group group(lane, count, share, 0);
                gather<Vectors<T>, T>(query, places, group, queries);
                products.logits(group.vectors, shared_keys, queries, logits, length);
                std::memset(logits + length * GROUP, 0, late * GROUP * 4);
                for (int64_t l = 0; l < group.lanes; l++) {
                    const int64_t own = ((first + (lane + l) / share) * kv_heads + head) * capacity + early;
                    const T* mine = own_keys + own * width;
                    const float* row = queries.own.rows + l * queries.own.padded;
                    for (int64_t t = 0; t < late; t++) {
                        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                        for (int64_t d = 0; d < width; d++) sum += wide(mine[t * width + d]) * row[d];
                        logits[(length + t) * GROUP + l] = sum;
                    }
                }
                softmax(group.vectors, logits, length + late, scaling, log_sums);
                products.mix(group.vectors, logits, shared_values, mixed, length);
                for (int64_t l = 0; l < group.lanes; l++) {
                    const int64_t own = ((first + (lane + l) / share) * kv_heads + head) * capacity + early;
                    const T* mine = own_values + own * width;
                    for (int64_t d = 0; d < width; d++) sums[d] = mixed[d * GROUP + l];
                    for (int64_t t = 0; t < late; t++) {
                        const float weight = logits[(length + t) * GROUP + l];
                        for (int64_t d = 0; d < width; d++) sums[d] += weight * wide(mine[t * width + d]);
                    }
                    T* to = places.row(out, lane + l);
                    for (int64_t d = 0; d < width; d++) put(to[d], sums[d]);
                }
            }
        }
    }
}

}  // namespace

#ifdef TILES
template <class T, class F>
void with_products(int64_t width, F run) {  // run(products), the fastest that fit
    if constexpr (std::is_same_v<T, Bfloat16>)
        if (Tiles::fits(width)) return run(static_cast<Tiles*>(nullptr));
    run(static_cast<Vectors<T>*>(nullptr));
}
#else
template <class T, class F>
void with_products(int64_t, F run) {
    run(static_cast<Vectors<T>*>(nullptr));
}
#endif

#define EXPORTS(T, NAME)                                                                                              \
    void attend_##NAME(const T* query, const T* key, const T* value, T* out, float* log_sums, const int64_t* strides,  \
                       const int64_t* sizes, const int64_t* piece, const int64_t* span, float scaling, int threads) {  \
        const Tree tree{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], piece, span, scaling, threads};              \
        const Strides* of = reinterpret_cast<const Strides*>(strides);                                                \
        with_products<T>(tree.width, [&](auto* products) {                                                            \
            using P = std::remove_pointer_t<decltype(products)>;                                                      \
            attend<P, T>(tree, {query, of[0]}, {key, of[1]}, {value, of[2]}, {out, of[3]}, log_sums);                  \
        });                                                                                                           \
    }                                                                                                                 \
    void attend_backward_##NAME(const T* query, const T* key, const T* value, const T* out, const T* grad,             \
                                const float* log_sums, T* by_query, T* by_key, T* by_value, const int64_t* strides,    \
                                const int64_t* sizes, const int64_t* piece, const int64_t* span, float scaling,        \
                                int threads) {                                                                        \
        const Tree tree{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], piece, span, scaling, threads};              \
        const Strides* of = reinterpret_cast<const Strides*>(strides);                                                \
        with_products<T>(tree.width, [&](auto* products) {                                                            \
            using P = std::remove_pointer_t<decltype(products)>;                                                      \
            attend_backward<P, T>(tree, {query, of[0]}, {key, of[1]}, {value, of[2]}, {out, of[3]}, {grad, of[4]},     \
                                  log_sums, {by_query, of[5]}, {by_key, of[6]}, {by_value, of[7]});                    \
        });                                                                                                           \
    }                                                                                                                 \
    void attend_one_##NAME(const T* query, const T* key, const T* value, T* out, const int64_t* strides,               \
                           const int64_t* sizes, const int64_t* piece, const int64_t* span, float scaling,             \
                           int threads) {                                                                             \
        const Tree tree{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], piece, span, scaling, threads};              \
        const Strides* of = reinterpret_cast<const Strides*>(strides);                                                \
        attend_one<T>(tree, {query, of[0]}, {key, of[1]}, {value, of[2]}, {out, of[3]});                              \
    }                                                                                                                 \
    void decode_##NAME(const T* query, const T* key, const T* value, const T* keys, const T* values, T* own_keys,      \
                       T* own_values, T* out, const int64_t* lengths, const int64_t* seen, const int64_t* first_row,   \
                       const int64_t* sizes, float scaling, int threads) {                                            \
        const Strides of{sizes[4], sizes[2] * sizes[4]}, of_key{sizes[4], sizes[3] * sizes[4]};                        \
        decode<T>({query, of}, {key, of_key}, {value, of_key}, keys, values, own_keys, own_values, {out, of}, lengths, \
                  seen, first_row, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], scaling,      \
                  threads);                                                                                           \
    }

extern "C" {
EXPORTS(float, float32)
EXPORTS(Bfloat16, bfloat16)
}
