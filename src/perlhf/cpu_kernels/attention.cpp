// Attention over a prefix tree and over a cache; compiled and called by __init__.py.
//
// A group is up to GROUP queries, one to a lane: tokens, and of each token the heads that share a key/value head. So a
// softmax runs down the keys without a sum across lanes, and keys may lie anywhere. The logits of a group exist at one
// time: GROUP * keys floats a thread. Nothing depends on timing: equal inputs and threads give equal bits.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "product.h"

namespace {

constexpr int64_t BLOCK = 128;  // keys whose probabilities are read again and again while they are in the cache
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// logits[key][lane] = keys[key] . queries[:, lane]
inline void logits_of(int vectors, const float* keys, int64_t padded, const float* queries, float* logits,
                      int64_t count) {
    product<false>(vectors, keys, padded, 1, queries, GROUP, padded, logits, GROUP, count);
}

// mixed[column][lane] = sum over keys of weights[key][lane] values[key][column]
inline void mix(int vectors, const float* weights, const float* values, int64_t padded, float* mixed, int64_t count) {
    std::memset(mixed, 0, padded * GROUP * 4);
    for (int64_t key = 0; key < count; key += BLOCK)
        product<true>(vectors, values + key * padded, 1, padded, weights + key * GROUP, GROUP,
                      std::min(BLOCK, count - key), mixed, GROUP, padded);
}

// total[key] += sum over lanes of weights[key][lane] rows[lane]
inline void spread(const float* weights, const float* rows, int64_t padded, int64_t lanes, float* total,
                   int64_t count) {
    int64_t column = 0;
    for (; column + 2 * LANES <= padded; column += 2 * LANES)
        product<2, true>(weights, GROUP, 1, rows + column, padded, lanes, total + column, padded, count);
    if (column < padded)
        product<1, true>(weights, GROUP, 1, rows + column, padded, lanes, total + column, padded, count);
}

// Makes probabilities of a group's logits; `largest` and `total` are each lane's maximum and sum of exponentials.
inline void softmax(int vectors, float* logits, int64_t count, float* largest, float* total) {
    for (int first = 0; first < vectors * LANES; first += LANES) {
        float* column = logits + first;
        Vec top = all(-3.0e38f), sum = Vec{};
        for (int64_t key = 0; key < count; key++) {
            const Vec row = load(column + key * GROUP);
            top = row > top ? row : top;
        }
        for (int64_t key = 0; key < count; key++) {
            const Vec odds = exponential(load(column + key * GROUP) - top);
            sum += odds;
            store(column + key * GROUP, odds);
        }
        store(largest + first, top);
        store(total + first, sum);
        const Vec share = 1.0f / sum;
        for (int64_t key = 0; key < count; key++) store(column + key * GROUP, load(column + key * GROUP) * share);
    }
}

struct Strides {  // of one [heads, tokens, width] tensor, in elements
    int64_t head, token;
};

struct Tree {
    int64_t heads, kv_heads, tokens, width, pieces;
    const int64_t* piece;  // [pieces][4]: first token, tokens, first span, spans
    const int64_t* span;   // [spans][2]: first token, tokens; what comes before a piece
    float scaling;
    int threads;

    int64_t padded() const { return (width + LANES - 1) / LANES * LANES; }
    int64_t share() const { return heads / kv_heads; }
    int64_t before(int64_t p) const {
        int64_t sum = 0;
        for (int64_t s = 0; s < piece[4 * p + 3]; s++) sum += span[2 * (piece[4 * p + 2] + s) + 1];
        return sum;
    }
    int64_t longest() const {
        int64_t found = 0;
        for (int64_t p = 0; p < pieces; p++) found = std::max(found, before(p) + piece[4 * p + 1]);
        return found;
    }
    template <class F>
    void path(int64_t p, F at) const {  // at(number on the path, packed token) for all that the piece's last token sees
        int64_t number = 0;
        for (int64_t s = 0; s < piece[4 * p + 3]; s++) {
            const int64_t* of = span + 2 * (piece[4 * p + 2] + s);
            for (int64_t t = 0; t < of[1]; t++) at(number++, of[0] + t);
        }
        for (int64_t t = 0; t < piece[4 * p + 1]; t++) at(number++, piece[4 * p] + t);
    }
};

template <class T>
inline void widen(const T* from, float* to, int64_t width, int64_t padded, float factor = 1.0f) {
    for (int64_t d = 0; d < width; d++) to[d] = wide(from[d]) * factor;
    for (int64_t d = width; d < padded; d++) to[d] = 0.0f;
}

// A group's rows of [heads, tokens, width], as they are and (or) with a lane to a row; lanes beyond the group are 0.
template <class T>
void gather(const T* from, Strides of, int64_t first_head, int64_t first_token, int64_t lane, int64_t lanes,
            const Tree& tree, float factor, float* rows, float* columns) {
    int64_t share = tree.share(), padded = tree.padded();
    for (int64_t l = 0; l < GROUP; l++) {
        float* row = rows + l * padded;
        if (l >= lanes) {
            std::memset(row, 0, padded * 4);
            continue;
        }
        int64_t at = lane + l;
        widen(from + (first_head + at % share) * of.head + (first_token + at / share) * of.token, row, tree.width,
              padded, factor);
    }
    for (int64_t d = 0; d < padded; d++)
        for (int64_t l = 0; l < GROUP; l++) columns[d * GROUP + l] = rows[l * padded + d];
}

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

// `value` where a lane's token comes before the key's.
void hide(float* table, const Group& group, int64_t share, int64_t before, float value) {
    for (int64_t key = std::max<int64_t>(before, before + group.lane / share); key < group.keys; key++) {
        int64_t hidden = std::min(group.lanes, (key - before) * share - group.lane);
        for (int64_t l = 0; l < hidden; l++) table[key * GROUP + l] = value;
    }
}

template <class T>
void attend(const Tree& tree, const T* query, const T* key, const T* value, T* out, float* log_sums, Strides of_query,
            Strides of_key, Strides of_value, Strides of_out) {
    int64_t padded = tree.padded(), share = tree.share(), most = tree.longest(), tasks = tree.kv_heads * tree.pieces;
#pragma omp parallel num_threads(tree.threads)
    {
        Buffer keys(most * padded), values(most * padded), rows(GROUP * padded), columns(GROUP * padded);
        Buffer logits(most * GROUP), mixed(padded * GROUP);
        float largest[GROUP], total[GROUP];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t head = task % tree.kv_heads, p = task / tree.kv_heads;
            int64_t start = tree.piece[4 * p], length = tree.piece[4 * p + 1], before = tree.before(p);
            tree.path(p, [&](int64_t number, int64_t token) {
                widen(key + head * of_key.head + token * of_key.token, keys + number * padded, tree.width, padded);
                widen(value + head * of_value.head + token * of_value.token, values + number * padded, tree.width,
                      padded);
            });
            for (int64_t lane = 0; lane < length * share; lane += GROUP) {
                Group group(lane, length * share, share, before);
                gather(query, of_query, head * share, start, lane, group.lanes, tree, tree.scaling, rows, columns);
                logits_of(group.vectors, keys, padded, columns, logits, group.keys);
                hide(logits, group, share, before, NEVER);
                softmax(group.vectors, logits, group.keys, largest, total);
                mix(group.vectors, logits, values, padded, mixed, group.keys);
                for (int64_t l = 0; l < group.lanes; l++) {
                    int64_t own = head * share + (lane + l) % share, token = start + (lane + l) / share;
                    T* to = out + own * of_out.head + token * of_out.token;
                    for (int64_t d = 0; d < tree.width; d++) put(to[d], mixed[d * GROUP + l]);
                    log_sums[own * tree.tokens + token] = largest[l] + std::log(total[l]);
                }
            }
        }
    }
}

// The pieces of each thread: the dearest first, each to the thread that has least to do.
std::vector<std::vector<int64_t>> dealt(const Tree& tree) {
    std::vector<int64_t> cost(tree.pieces), order(tree.pieces), load(tree.threads, 0);
    for (int64_t p = 0; p < tree.pieces; p++) cost[p] = (tree.before(p) + tree.piece[4 * p + 1]) * tree.piece[4 * p + 1];
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

template <class T>
struct Gradient {
    T* at;
    Strides of;
    T* row(int64_t head, int64_t token) const { return at + head * of.head + token * of.token; }
};

// A piece's gradients by its queries, and by the keys and values of its path, which are added to `by_key`, `by_value`.
template <class T>
struct Backward {
    const Tree& tree;
    const T *query, *key, *value, *out, *grad;
    const float* log_sums;
    Strides of_query, of_key, of_value, of_out, of_grad;
    Buffer keys, values, path_keys, path_values, query_rows, query_columns, grad_rows, grad_columns, p, inner, mixed;

    Backward(const Tree& tree, int64_t most, const T* query, const T* key, const T* value, const T* out, const T* grad,
             const float* log_sums, const Strides* of)
        : tree(tree), query(query), key(key), value(value), out(out), grad(grad), log_sums(log_sums), of_query(of[0]),
          of_key(of[1]), of_value(of[2]), of_out(of[3]), of_grad(of[4]), keys(most * tree.padded()),
          values(most * tree.padded()), path_keys(most * tree.padded()), path_values(most * tree.padded()),
          query_rows(GROUP * tree.padded()), query_columns(GROUP * tree.padded()), grad_rows(GROUP * tree.padded()),
          grad_columns(GROUP * tree.padded()), p(most * GROUP), inner(most * GROUP), mixed(GROUP * tree.padded()) {}

    void piece(int64_t number, int64_t head, Gradient<T> by_query, float* by_key, float* by_value) {
        int64_t padded = tree.padded(), share = tree.share(), before = tree.before(number);
        int64_t start = tree.piece[4 * number], length = tree.piece[4 * number + 1], count = before + length;
        tree.path(number, [&](int64_t at, int64_t token) {
            widen(key + head * of_key.head + token * of_key.token, keys + at * padded, tree.width, padded);
            widen(value + head * of_value.head + token * of_value.token, values + at * padded, tree.width, padded);
        });
        std::memset(path_keys, 0, count * padded * 4);
        std::memset(path_values, 0, count * padded * 4);
        for (int64_t lane = 0; lane < length * share; lane += GROUP) {
            Group group(lane, length * share, share, before);
            gather(query, of_query, head * share, start, lane, group.lanes, tree, tree.scaling, query_rows,
                   query_columns);
            gather(grad, of_grad, head * share, start, lane, group.lanes, tree, 1.0f, grad_rows, grad_columns);
            slopes(group, head, start, before);
            spread(inner, query_rows, padded, group.lanes, path_keys, group.keys);
            spread(p, grad_rows, padded, group.lanes, path_values, group.keys);
            mix(group.vectors, inner, keys, padded, mixed, group.keys);
            for (int64_t l = 0; l < group.lanes; l++) {
                int64_t own = head * share + (lane + l) % share, token = start + (lane + l) / share;
                T* to = by_query.row(own, token);
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
    void slopes(const Group& group, int64_t head, int64_t start, int64_t before) {
        int64_t padded = tree.padded(), share = tree.share();
        float log_sum[GROUP] = {}, along[GROUP] = {};
        for (int64_t l = 0; l < group.lanes; l++) {
            int64_t own = head * share + (group.lane + l) % share, token = start + (group.lane + l) / share;
            const T* row = out + own * of_out.head + token * of_out.token;
            log_sum[l] = log_sums[own * tree.tokens + token];
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < tree.width; d++) sum += wide(row[d]) * grad_rows[l * padded + d];
            along[l] = sum;
        }
        logits_of(group.vectors, keys, padded, query_columns, p, group.keys);
        logits_of(group.vectors, values, padded, grad_columns, inner, group.keys);
        const int lanes = group.vectors * LANES;
        for (int64_t k = 0; k < group.keys * GROUP; k += GROUP)
            for (int l = 0; l < lanes; l += LANES) store(p + k + l, exponential(load(p + k + l) - load(log_sum + l)));
        hide(p, group, share, before, 0.0f);
        for (int64_t k = 0; k < group.keys * GROUP; k += GROUP)
            for (int l = 0; l < lanes; l += LANES)
                store(inner + k + l, load(p + k + l) * (load(inner + k + l) - load(along + l)));
    }
};

template <class T>
void attend_backward(const Tree& tree, const T* query, const T* key, const T* value, const T* out, const T* grad,
                     const float* log_sums, const Strides* of, Gradient<T> by_query, Gradient<T> to_keys,
                     Gradient<T> to_values) {
    int64_t padded = tree.padded(), most = tree.longest(), size = tree.tokens * padded;
    auto mine = dealt(tree);
    std::vector<Buffer> by_key, by_value;
    for (int t = 0; t < tree.threads; t++) by_key.emplace_back(size), by_value.emplace_back(size);
#pragma omp parallel num_threads(tree.threads)
    {
        Backward<T> work(tree, most, query, key, value, out, grad, log_sums, of);
        for (int64_t head = 0; head < tree.kv_heads; head++) {
#pragma omp for schedule(static, 1)
            for (int t = 0; t < tree.threads; t++) {
                by_key[t].clear();
                by_value[t].clear();
                for (int64_t p : mine[t]) work.piece(p, head, by_query, by_key[t], by_value[t]);
            }
#pragma omp for schedule(static)
            for (int64_t token = 0; token < tree.tokens; token++) {
                T *keys = to_keys.row(head, token), *values = to_values.row(head, token);
                for (int64_t d = 0; d < tree.width; d++) {
                    float key_sum = 0.0f, value_sum = 0.0f;
                    for (int t = 0; t < tree.threads; t++) {
                        key_sum += by_key[t][token * padded + d];
                        value_sum += by_value[t][token * padded + d];
                    }
                    put(keys[d], key_sum);
                    put(values[d], value_sum);
                }
            }
        }
    }
}

// One new token a row over its prompt's keys, shared by the rows of that prompt, and the row's own.
template <class T>
void decode(const T* query, const T* keys, const T* values, const T* own_keys, const T* own_values, T* out,
            const int64_t* lengths, const int64_t* first_row, int64_t prompts, int64_t longest, int64_t heads,
            int64_t kv_heads, int64_t width, int64_t capacity, int64_t time, float scaling, int threads) {
    int64_t share = heads / kv_heads, tasks = prompts * kv_heads;
    const Tree tree{heads, kv_heads, 0, width, 0, nullptr, nullptr, scaling, threads};
    int64_t padded = tree.padded();
#pragma omp parallel num_threads(threads)
    {
        Buffer rows(GROUP * padded), columns(GROUP * padded), logits((longest + time) * GROUP), mixed(padded * GROUP);
        Buffer prompt_keys(longest * padded), prompt_values(longest * padded), sums(padded);
        float largest[GROUP], total[GROUP];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t head = task % kv_heads, prompt = task / kv_heads, length = lengths[prompt];
            int64_t first = first_row[prompt], count = (first_row[prompt + 1] - first) * share;
            const T* shared_keys = keys + (prompt * kv_heads + head) * longest * width;
            const T* shared_values = values + (prompt * kv_heads + head) * longest * width;
            for (int64_t t = 0; t < length; t++) {
                widen(shared_keys + t * width, prompt_keys + t * padded, width, padded);
                widen(shared_values + t * width, prompt_values + t * padded, width, padded);
            }
            for (int64_t lane = 0; lane < count; lane += GROUP) {
                int64_t lanes = std::min<int64_t>(GROUP, count - lane);
                int vectors = static_cast<int>((lanes + LANES - 1) / LANES);
                gather(query, {width, heads * width}, head * share, first, lane, lanes, tree, scaling, rows, columns);
                logits_of(vectors, prompt_keys, padded, columns, logits, length);
                std::memset(logits + length * GROUP, 0, time * GROUP * 4);
                auto own = [&](const T* from, int64_t l) {
                    return from + ((first + (lane + l) / share) * kv_heads + head) * capacity * width;
                };
                for (int64_t l = 0; l < lanes; l++) {
                    const T* mine = own(own_keys, l);
                    for (int64_t t = 0; t < time; t++) {
                        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                        for (int64_t d = 0; d < width; d++) sum += wide(mine[t * width + d]) * rows[l * padded + d];
                        logits[(length + t) * GROUP + l] = sum;
                    }
                }
                softmax(vectors, logits, length + time, largest, total);
                mix(vectors, logits, prompt_values, padded, mixed, length);
                for (int64_t l = 0; l < lanes; l++) {
                    const T* mine = own(own_values, l);
                    for (int64_t d = 0; d < width; d++) sums[d] = mixed[d * GROUP + l];
                    for (int64_t t = 0; t < time; t++) {
                        float weight = logits[(length + t) * GROUP + l];
                        for (int64_t d = 0; d < width; d++) sums[d] += weight * wide(mine[t * width + d]);
                    }
                    T* to = out + ((first + (lane + l) / share) * heads + head * share + (lane + l) % share) * width;
                    for (int64_t d = 0; d < width; d++) put(to[d], sums[d]);
                }
            }
        }
    }
}

}  // namespace

#define EXPORTS(T, NAME)                                                                                              \
    void attend_##NAME(const T* query, const T* key, const T* value, T* out, float* log_sums, const int64_t* strides,  \
                       const int64_t* sizes, const int64_t* piece, const int64_t* span, float scaling, int threads) {  \
        const Tree tree{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], piece, span, scaling, threads};              \
        const Strides* of = reinterpret_cast<const Strides*>(strides);                                                \
        attend(tree, query, key, value, out, log_sums, of[0], of[1], of[2], of[3]);                                    \
    }                                                                                                                 \
    void attend_backward_##NAME(const T* query, const T* key, const T* value, const T* out, const T* grad,             \
                                const float* log_sums, T* by_query, T* by_key, T* by_value, const int64_t* strides,    \
                                const int64_t* sizes, const int64_t* piece, const int64_t* span, float scaling,        \
                                int threads) {                                                                        \
        const Tree tree{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], piece, span, scaling, threads};              \
        const Strides* of = reinterpret_cast<const Strides*>(strides);                                                \
        attend_backward(tree, query, key, value, out, grad, log_sums, of, Gradient<T>{by_query, of[5]},                \
                        Gradient<T>{by_key, of[6]}, Gradient<T>{by_value, of[7]});                                     \
    }                                                                                                                 \
    void decode_##NAME(const T* query, const T* keys, const T* values, const T* own_keys, const T* own_values,         \
                       T* out, const int64_t* lengths, const int64_t* first_row, const int64_t* sizes, float scaling,  \
                       int threads) {                                                                                 \
        decode(query, keys, values, own_keys, own_values, out, lengths, first_row, sizes[0], sizes[1], sizes[2],       \
               sizes[3], sizes[4], sizes[5], sizes[6], scaling, threads);                                              \
    }

extern "C" {
EXPORTS(float, float32)
EXPORTS(Bfloat16, bfloat16)
}
