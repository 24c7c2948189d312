// Causal attention inside each sequence of a flattened batch, forward and backward.
//
//     s[i, j] = scale * q[i] . k[j]              visible: j <= i, and i - j < window
//     p = exp(s - lse),  out = p v               lse[i] = log sum_j exp(s[i, j])
//     dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q
//     delta[i] = dout[i] . out[i]
//
// A task is one key head of one sequence with all query heads that share it, so that dk and dv are
// summed in one place and no result depends on the number of threads; the forward pass also cuts
// the queries. Tasks are taken from a counter, the costly ones first: causal work is a triangle.
//
// Scores are held transposed, [keys, queries]: a query is a lane of a vector. Maxima, sums and
// masks then run down the lanes without a reduction inside a vector, k and v are used row by row as
// they lie in memory, and the transposed scores are the operand that dk and dv need; only q, dout
// and the results out and dq are turned. (The other way round k, v and both p and ds must be
// turned.)
//
// Blocks have BLOCK queries and BLOCK keys. On the diagonal keys come in pieces of half a block,
// and the second piece computes only the queries that see it. The softmax runs block by block with
// a running maximum that may lag behind by SLACK; backward takes p from lse.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "block_gemm.h"
#include "parallel.h"

namespace NAMESPACE {
namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t PIECE = BLOCK / 2;
constexpr int64_t BLOCK_WORDS = BLOCK / PAIR;
constexpr int64_t QUERIES = 4 * BLOCK;  // of one forward task
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -1e30f;  // of a running maximum, so that differences stay numbers
constexpr float SLACK =
    8;  // a maximum that 2^8 times the share exceeds is kept: nothing to rescale

// 2^x to 1e-7 relative for x < 128, exactly 1 at 0 and exactly 0 from -127 down: a hidden key has
// no share. NaN stays NaN.
INLINE vf power_of_2(vf x) {
    vf bounded = splat(-127.0f) > x ? splat(-127.0f) : x;
    vf shifted = bounded + 12582912.0f;
    vf t = bounded - (shifted - 12582912.0f);
    vf p = splat(1.326472939e-3f);
    p = p * t + 9.671513071e-3f;
    p = p * t + 5.550733735e-2f;
    p = p * t + 2.402224208e-1f;
    p = p * t + 6.931469776e-1f;
    p = p * t + 1.0f;
    return (vf)((vu)p + ((vu)shifted << 23));
}

struct Attention {
    int64_t query_heads, key_heads, dim, value_dim;
    int64_t q_stride, k_stride, v_stride;  // elements from one token to the next
    int64_t tokens;
    float scale;
    int64_t window;

    int64_t group() const { return query_heads / key_heads; }
    int64_t out_stride() const { return query_heads * value_dim; }
    int64_t first_key(int64_t query) const { return std::max<int64_t>(0, query - window + 1); }
};

// Queries first .. last of a sequence that starts at token `start`; all keys they see.
struct Task {
    int64_t start, first, last, key_head;
    double cost() const { return static_cast<double>(last - first) * (first + last); }
};

std::vector<Task> tasks_of(const Attention& a, const int64_t* edges, int64_t sequences,
                           int64_t queries) {
    std::vector<Task> found;
    for (int64_t i = 0; i < sequences; ++i) {
        int64_t length = edges[i + 1] - edges[i];
        for (int64_t first = 0; first < length; first += queries)
            for (int64_t head = 0; head < a.key_heads; ++head)
                found.push_back({edges[i], first, std::min(first + queries, length), head});
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Task& x, const Task& y) { return x.cost() > y.cost(); });
    return found;
}

template <class F>
void run_tasks(const std::vector<Task>& tasks, int threads, F&& body) {
    std::atomic<size_t> next{0};
    decal::for_each_thread(threads, [&](int, int) {
        [[maybe_unused]] Tiles tiles;
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();)
            body(tasks[i]);
    });
}

// Keys `at` .. at + keys against the vectors `from` .. `to` of a block of queries; counted from the
// sequence's start. `hides`: not all of these queries see all of these keys.
struct Piece {
    int64_t at, keys;
    int64_t from, to;
    bool hides;
};

// Calls body(piece) for the keys that queries `query` .. query + queries see, from key `low` on.
template <class F>
INLINE void for_pieces(const Attention& a, int64_t low, int64_t query, int64_t queries, F&& body) {
    int64_t vectors = round_up(queries, W) / W;
    int64_t begin = std::max(low, a.first_key(query) / BLOCK * BLOCK);
    for (int64_t at = begin; at < query; at += BLOCK) {
        bool hides = query + queries - 1 - at >= a.window;
        body(Piece{at, BLOCK, 0, vectors, hides});
    }
    for (int64_t at = 0; at < queries; at += PIECE)
        body(Piece{query + at, std::min(PIECE, queries - at), at / W, vectors, true});
}

// Which lanes of the W queries from `query` see key `key`.
INLINE vi sees(const Attention& a, int64_t query, int64_t key) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    int64_t apart = query - key;
    int64_t room = std::min<int64_t>(a.window - apart, BLOCK);
    vi seen = lane >= static_cast<int32_t>(-apart);
    return seen & (lane < static_cast<int32_t>(room));
}

INLINE bool any(vi x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
    int32_t all = 0;
    for (int i = 0; i < W; ++i) all |= x[i];
    return all;
#endif
}

// Word rows [keys / PAIR, queries] of two rows of shares.
INLINE void store_across(word* to, vf first, vf second) {
#if defined(DOT_BF16)
    alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    store_words(to, (vu)_mm512_permutexvar_epi16(_mm512_load_si512(order), both));
#else
    store_words(to, first);
    store_words(to + BLOCK, second);
#endif
}

// Words along the queries, of one key.
INLINE void store_along(word* row, int64_t vector, vf x) {
#if defined(DOT_BF16)
    store(reinterpret_cast<bf16*>(row) + vector * W, x);
#else
    store(row + vector * W, x);
#endif
}

// --- forward -------------------------------------------------------------------------------------

struct ForwardRoom {
    Room<word> keys, values, queries, shares;
    Room<float> scores, out;
    alignas(64) float top[BLOCK], total[BLOCK], factor[BLOCK];
};

// Scores -> shares against the running maximum, one vector of queries. Returns by how much the
// former maximum was above the new one, as a factor.
INLINE vf soften(const Attention& a, const Piece& piece, int64_t query, float* scores, word* shares,
                 vf& top, vf& total) {
    float slope = a.scale * LOG2_E;
    vf highest = splat(-INFINITY);
    for (int64_t r = 0; r < piece.keys; ++r) {
        vf s = load(scores + r * BLOCK);
        if (piece.hides) {
            s = sees(a, query, piece.at + r) ? s : splat(-INFINITY);
            store(scores + r * BLOCK, s);
        }
        highest = max(s, highest);
    }
    highest = highest * slope;
    vf now = highest > top + SLACK ? highest : top;
    vf before = power_of_2(top - now), sum = vf{};
    int64_t r = 0;
    for (; r + 2 <= piece.keys; r += 2) {
        vf first = power_of_2(load(scores + r * BLOCK) * slope - now);
        vf second = power_of_2(load(scores + (r + 1) * BLOCK) * slope - now);
        sum += first + second;
        store_across(shares + r / PAIR * BLOCK, first, second);
    }
    if (r < piece.keys) {
        vf last = power_of_2(load(scores + r * BLOCK) * slope - now);
        sum += last;
        store_across(shares + r / PAIR * BLOCK, last, vf{});
    }
    total = total * before + sum;
    top = now;
    return before;
}

// One head's block of queries: `out` becomes [value_dim, BLOCK], with top and total beside it.
void attend(const Attention& a, ForwardRoom& room, int64_t low, int64_t query, int64_t queries,
            int64_t value_rows) {
    int64_t depth = words(a.dim), ld = round_up(depth, W);
    float *scores = room.scores.at, *out = room.out.at;
    word* shares = room.shares.at;
    for (int64_t i = 0; i < BLOCK; i += W) {
        store(room.top + i, splat(LOWEST));
        store(room.total + i, vf{});
    }
    bool begun = false;
    for_pieces(a, low, query, queries, [&](const Piece& piece) {
        int64_t from = piece.from * W, vectors = piece.to - piece.from, at = piece.at - low;
        multiply(piece.keys, vectors, depth, room.keys.at + at * ld, ld, room.queries.at + from,
                 BLOCK, scores + from, BLOCK, false);
        for (int64_t c = from; c < piece.to * W; c += W) {
            vf top = load(room.top + c), total = load(room.total + c);
            vf factor = soften(a, piece, query + c, scores + c, shares + c, top, total);
            store(room.top + c, top);
            store(room.total + c, total);
            if (!begun || !any(factor != 1.0f)) continue;
            for (int64_t d = 0; d < a.value_dim; ++d)
                store(out + d * BLOCK + c, factor * load(out + d * BLOCK + c));
        }
        const word* values = room.values.at + at / BLOCK * value_rows * BLOCK_WORDS;
        multiply(a.value_dim, vectors, words(piece.keys), values + at % BLOCK / PAIR, BLOCK_WORDS,
                 shares + from, BLOCK, out + from, BLOCK, begun);
        begun = true;
    });
}

void forward_task(const Attention& a, const Task& task, const bf16* q, const bf16* k, const bf16* v,
                  bf16* out, float* lse) {
    static thread_local ForwardRoom room;
    int64_t low = a.first_key(task.first) / BLOCK * BLOCK, keys = task.last - low;
    int64_t ld = round_up(words(a.dim), W), value_rows = round_up(a.value_dim, W);
    k += (task.start + low) * a.k_stride + task.key_head * a.dim;
    v += (task.start + low) * a.v_stride + task.key_head * a.value_dim;
    Along{k, a.k_stride, keys, a.dim}.straight(room.keys.get(keys * ld), ld);
    room.values.get(round_up(keys, BLOCK) * value_rows / PAIR);
    for (int64_t at = 0; at < keys; at += BLOCK)
        Across{v + at * a.v_stride, a.v_stride, std::min(BLOCK, keys - at), a.value_dim}.transposed(
            room.values.at + at / PAIR * value_rows, BLOCK_WORDS);
    room.queries.get(ld * BLOCK);
    room.shares.get(BLOCK_WORDS * BLOCK);
    room.scores.get(BLOCK * BLOCK);
    room.out.get(value_rows * BLOCK);

    for (int64_t head = task.key_head * a.group(); head < (task.key_head + 1) * a.group(); ++head)
        for (int64_t query = task.first; query < task.last; query += BLOCK) {
            int64_t queries = std::min(BLOCK, task.last - query), token = task.start + query;
            const bf16* from = q + token * a.q_stride + head * a.dim;
            Along{from, a.q_stride, queries, a.dim}.transposed(room.queries.at, BLOCK);
            attend(a, room, low, query, queries, value_rows);
            for (int64_t i = 0; i < queries; ++i) {
                room.factor[i] = 1.0f / room.total[i];
                float in_powers_of_2 = room.top[i] + std::log2(room.total[i]);
                lse[head * a.tokens + token + i] = in_powers_of_2 / LOG2_E;
            }
            bf16* to = out + token * a.out_stride() + head * a.value_dim;
            round_transposed(room.out.at, BLOCK, queries, a.value_dim, room.factor, to,
                             a.out_stride());
        }
}

// --- backward ------------------------------------------------------------------------------------

struct Gradients {
    const bf16 *grad, *q, *k, *v, *out;
    const float* lse;
    bf16 *dq, *dk, *dv;
};

// Operands of one key head: k and v by rows, k turned; and the sums over its query heads.
// Operands of one block of queries: q and dout turned (for scores) and across (for dk, dv).
struct BackwardRoom {
    Room<word> k, v, k_turned;
    Room<float> dk, dv;
    Room<word> q_turned, grad_turned, q_across, grad_across, shares, along, across;
    Room<float> scores, slopes, dq;
    alignas(64) float lse[BLOCK], delta[BLOCK], factor[BLOCK];
};

// p and ds of one vector of queries, from scores and from dout v^T.
INLINE void differentiate(const Attention& a, const Piece& piece, int64_t query, int64_t c,
                          BackwardRoom& room) {
    float slope = a.scale * LOG2_E;
    vf lse = load(room.lse + c), delta = load(room.delta + c);
    for (int64_t r = 0; r < piece.keys; r += 2) {
        vf change[2] = {};
        for (int64_t i = 0; i < 2 && r + i < piece.keys; ++i) {
            int64_t at = (r + i) * BLOCK + c;
            vf share = power_of_2(load(room.scores.at + at) * slope - lse);
            if (piece.hides) share = sees(a, query + c, piece.at + r + i) ? share : vf{};
            change[i] = share * (load(room.slopes.at + at) - delta);
            store_along(room.shares.at + (r + i) * BLOCK_WORDS, c / W, share);
            store_along(room.along.at + (r + i) * BLOCK_WORDS, c / W, change[i]);
        }
        store_across(room.across.at + r / PAIR * BLOCK + c, change[0], change[1]);
    }
}

// One head's block of queries: adds to dk and dv, leaves dq [dim, BLOCK].
void pull_back(const Attention& a, BackwardRoom& room, int64_t query, int64_t queries) {
    int64_t depth = words(a.dim), ld = round_up(depth, W), dims = round_up(a.dim, W);
    int64_t value_depth = words(a.value_dim), value_ld = round_up(value_depth, W);
    int64_t value_dims = round_up(a.value_dim, W);
    bool begun = false;
    for_pieces(a, 0, query, queries, [&](const Piece& piece) {
        int64_t from = piece.from * W, vectors = piece.to - piece.from, at = piece.at;
        int64_t skip = from / PAIR, left = words(queries) - skip;
        multiply(piece.keys, vectors, depth, room.k.at + at * ld, ld, room.q_turned.at + from,
                 BLOCK, room.scores.at + from, BLOCK, false);
        multiply(piece.keys, vectors, value_depth, room.v.at + at * value_ld, value_ld,
                 room.grad_turned.at + from, BLOCK, room.slopes.at + from, BLOCK, false);
        for (int64_t c = from; c < piece.to * W; c += W) differentiate(a, piece, query, c, room);
        multiply(piece.keys, value_dims / W, left, room.shares.at + skip, BLOCK_WORDS,
                 room.grad_across.at + skip * value_dims, value_dims, room.dv.at + at * value_dims,
                 value_dims, true);
        multiply(piece.keys, dims / W, left, room.along.at + skip, BLOCK_WORDS,
                 room.q_across.at + skip * dims, dims, room.dk.at + at * dims, dims, true);
        const word* turned = room.k_turned.at + at / BLOCK * dims * BLOCK_WORDS;
        multiply(a.dim, vectors, words(piece.keys), turned + at % BLOCK / PAIR, BLOCK_WORDS,
                 room.across.at + from, BLOCK, room.dq.at + from, BLOCK, begun);
        begun = true;
    });
}

float dot_rows(const bf16* a, const bf16* b, int64_t n) {
    vf total{};
    int64_t i = 0;
    for (; i + W <= n; i += W) total += load(a + i) * load(b + i);
    if (i < n) total += load_part(a + i, n - i) * load_part(b + i, n - i);
    return sum(total);
}

void make_room(const Attention& a, int64_t keys, BackwardRoom& room) {
    int64_t ld = round_up(words(a.dim), W), dims = round_up(a.dim, W);
    int64_t value_ld = round_up(words(a.value_dim), W), value_dims = round_up(a.value_dim, W);
    room.k.get(keys * ld);
    room.v.get(keys * value_ld);
    room.k_turned.get(round_up(keys, BLOCK) * dims / PAIR);
    memset(room.dk.get(keys * dims), 0, keys * dims * sizeof(float));
    memset(room.dv.get(keys * value_dims), 0, keys * value_dims * sizeof(float));
    room.q_turned.get(ld * BLOCK);
    room.grad_turned.get(value_ld * BLOCK);
    room.q_across.get(BLOCK_WORDS * dims);
    room.grad_across.get(BLOCK_WORDS * value_dims);
    room.shares.get(BLOCK_WORDS * BLOCK);
    room.along.get(BLOCK_WORDS * BLOCK);
    room.across.get(BLOCK_WORDS * BLOCK);
    room.scores.get(BLOCK * BLOCK);
    room.slopes.get(BLOCK * BLOCK);
    room.dq.get(dims * BLOCK);
    for (int64_t i = 0; i < BLOCK; ++i) room.factor[i] = a.scale;
}

void backward_task(const Attention& a, const Task& task, const Gradients& g) {
    static thread_local BackwardRoom room;
    int64_t keys = task.last, ld = round_up(words(a.dim), W), dims = round_up(a.dim, W);
    int64_t value_ld = round_up(words(a.value_dim), W), value_dims = round_up(a.value_dim, W);
    make_room(a, keys, room);
    const bf16* k = g.k + task.start * a.k_stride + task.key_head * a.dim;
    const bf16* v = g.v + task.start * a.v_stride + task.key_head * a.value_dim;
    Along{k, a.k_stride, keys, a.dim}.straight(room.k.at, ld);
    Along{v, a.v_stride, keys, a.value_dim}.straight(room.v.at, value_ld);
    for (int64_t at = 0; at < keys; at += BLOCK)
        Across{k + at * a.k_stride, a.k_stride, std::min(BLOCK, keys - at), a.dim}.transposed(
            room.k_turned.at + at / PAIR * dims, BLOCK_WORDS);

    for (int64_t head = task.key_head * a.group(); head < (task.key_head + 1) * a.group(); ++head)
        for (int64_t query = 0; query < keys; query += BLOCK) {
            int64_t queries = std::min(BLOCK, keys - query), token = task.start + query;
            const bf16* q = g.q + token * a.q_stride + head * a.dim;
            int64_t at = token * a.out_stride() + head * a.value_dim;
            for (int64_t i = 0; i < queries; ++i) {
                room.lse[i] = g.lse[head * a.tokens + token + i] * LOG2_E;
                int64_t row = at + i * a.out_stride();
                room.delta[i] = dot_rows(g.grad + row, g.out + row, a.value_dim);
            }
            for (int64_t i = queries; i < BLOCK; ++i) room.lse[i] = room.delta[i] = 0;
            Along{q, a.q_stride, queries, a.dim}.transposed(room.q_turned.at, BLOCK);
            Across{q, a.q_stride, queries, a.dim}.straight(room.q_across.at, dims);
            Along grad{g.grad + at, a.out_stride(), queries, a.value_dim};
            grad.transposed(room.grad_turned.at, BLOCK);
            Across{grad.at, grad.stride, queries, a.value_dim}.straight(room.grad_across.at,
                                                                        value_dims);
            pull_back(a, room, query, queries);
            bf16* to = g.dq + (token * a.query_heads + head) * a.dim;
            round_transposed(room.dq.at, BLOCK, queries, a.dim, room.factor, to,
                             a.query_heads * a.dim);
        }
    bf16* dk = g.dk + (task.start * a.key_heads + task.key_head) * a.dim;
    bf16* dv = g.dv + (task.start * a.key_heads + task.key_head) * a.value_dim;
    round_rows(room.dk.at, dims, keys, a.dim, a.scale, dk, a.key_heads * a.dim);
    round_rows(room.dv.at, value_dims, keys, a.value_dim, 1.0f, dv, a.key_heads * a.value_dim);
}

}  // namespace

// q [tokens, query_heads, dim], k [tokens, key_heads, dim], v [tokens, key_heads, value_dim] with
// their own strides from token to token; out [tokens, query_heads, value_dim] and lse [query_heads,
// tokens] without gaps. edges [sequences + 1] ascend from 0 to tokens; scale and window > 0.
EXPORT(attention_forward)(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                          const int64_t* edges, int64_t sequences, const int64_t* shape,
                          float scale, int threads) {
    Attention a{shape[0], shape[1], shape[2],         shape[3], shape[4],
                shape[5], shape[6], edges[sequences], scale,    shape[7]};
    run_tasks(tasks_of(a, edges, sequences, QUERIES), threads,
              [&](const Task& task) { forward_task(a, task, q, k, v, out, lse); });
}

// The gradients of q, k and v, all without gaps, from that of out (grad, without gaps).
EXPORT(attention_backward)(const bf16* grad, const bf16* q, const bf16* k, const bf16* v,
                           const bf16* out, const float* lse, bf16* dq, bf16* dk, bf16* dv,
                           const int64_t* edges, int64_t sequences, const int64_t* shape,
                           float scale, int threads) {
    Attention a{shape[0], shape[1], shape[2],         shape[3], shape[4],
                shape[5], shape[6], edges[sequences], scale,    shape[7]};
    Gradients g{grad, q, k, v, out, lse, dq, dk, dv};
    run_tasks(tasks_of(a, edges, sequences, INT64_MAX / 2), threads,
              [&](const Task& task) { backward_task(a, task, g); });
}

}  // namespace NAMESPACE
