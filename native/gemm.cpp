// C [M, N] = sum over segments of a [M, k] times a stored weight: every linear layer, both ways.
//
// One engine serves forward (y = x W^T + z B^T), backward (dx = g W + keep . (dz A)), the products
// into and out of the rank, and the gradients of the factors. A segment is a bf16 matrix `a` and a
// weight that is read along its rows (W^T: output columns are rows of W) or across them (W: the
// contraction runs over rows of W). A segment may serve some rows of C only, so that several
// adapters share one product with the frozen weight. Weights stay packed; what a product needs of
// them becomes bf16 in the cache and never reaches memory.
//
//     for each strip of columns (a few vectors wide)          of this thread's columns
//         pack the strip of all segments                      panel: L2, a pass deep at most
//         for each block of rows                              of this thread's rows
//             C block = a panel, segment by segment; mask after the leading ones if asked
//             bias, addend, rounding, store
//
// A deep contraction goes in passes, with C in float between them. The panel holds
// pairs along the contraction, (k, k + 1) of one column side by side, for the dot products of bf16
// pairs; without these it holds floats, and rows of `a` are widened block by block: with vectors of
// 8 and fewer floats, where strips are narrow, once for a group of strips that L2 holds. With AVX2
// large products run in integers that share exponents (block_float.h): panels hold pairs of these,
// and the rows of a pass become integers before it.
//
// Threads share C, never a sum, and every sum runs along the contraction in one order: results do
// not depend on the number of threads, nor on what else is in the batch. NaN and infinity in `a`
// reach every column of their row. Products of bf16 pairs take denormals as zeros.
//
// Rejected: packing bf16 of `a` too (it is read by rows, which the broadcast of a pair can do in
// place); one panel per thread row block; with AVX-512 a group of strips packed together (no gain,
// more L2).
#include <algorithm>

#include "tile_sweep.h"

namespace NAMESPACE {

// --- packing -------------------------------------------------------------------------------------

#if defined(DOT_BF16)
// 16 rows of 16 pairs -> 16 pairs of 16 rows.
INLINE void transpose(const bf16* const* rows, int64_t at, Panel* out, int64_t stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        __m512i low = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        __m512i high = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        _mm512_storeu_si512(out + i * stride, low);
        _mm512_storeu_si512(out + (i + 8) * stride, high);
    }
}
#endif

// A strip of W^T: columns [n0, n0 + width) of C are rows of W; the contraction is [k0, k1) of them.
inline void pack_along(const Segment& s, int64_t n0, int64_t N, int width, int64_t k0, int64_t k1,
                       [[maybe_unused]] const Integers* integers, Panel* panel, bf16* room) {
    int64_t depth = k1 - k0, padded = (depth + 31) / 32 * 32;
    const bf16* rows[WIDTH];
    for (int j = 0; j < width; ++j) {
        bf16* own = room + j * padded;
        if (n0 + j >= N) {
            memset(own, 0, padded * sizeof(bf16));
            rows[j] = own;
            continue;
        }
        rows[j] = row_values(s.weight, n0 + j, k0, k1, own);
        if (padded == depth) continue;
        if (rows[j] != own) memcpy(own, rows[j], depth * sizeof(bf16));
        memset(own + depth, 0, (padded - depth) * sizeof(bf16));
        rows[j] = own;
    }
#if defined(DOT_BF16)
    for (int j = 0; j < width; j += 16)
        for (int64_t k = 0; k < padded; k += 32) {
            if (s.weight.format == dense)
                for (int i = 16; i < 32; ++i) row_ahead(s.weight, n0 + j + i, k0 + k, k0 + k + 32);
            transpose(rows + j, k, panel + k / 2 * width + j, width);
        }
#else
#if defined(BLOCK_FLOAT)
    if (integers) return strip_along(width, depth, rows, *integers, panel);
#endif
    for (int64_t k = 0; k < depth; ++k)
        for (int j = 0; j < width; ++j) panel[k * width + j] = to_float(rows[j][k]);
#endif
}

constexpr int64_t ROWS_AHEAD = 16;

#if !defined(DOT_BF16)
// A whole strip of a dense W as floats: what gradients of factors spend much of their time with.
inline void pack_dense_across(const Stored& w, int64_t n0, int width, int64_t k0, int64_t k1,
                              const Keep* keep, float* panel) {
    for (int64_t k = k0; k < k1; ++k, panel += width) {
        const bf16* row = static_cast<const bf16*>(w.data) + k * w.stride + n0;
        __builtin_prefetch(row + ROWS_AHEAD * w.stride);
        for (int j = 0; j < width; j += W) {
            vf x = load(row + j);
            if (keep) x = (vf)((vi)x & keep->mask(k, n0 + j));
            store(panel + j, x);
        }
    }
}
#endif

// --- multiplying ---------------------------------------------------------------------------------

constexpr int64_t APART = 16;  // so that rows of 2,048 do not share sets of the cache
constexpr bool WIDENS = STEP == 1;

// Rows of one block: `count` of them are there, the others may be read as any of these. Without dot
// products of pairs `wide` is where they lie as floats, [tall, depth + APART], or are to be put.
struct Rows {
    const bf16* a;
    int64_t lda;
    int count;
    float* wide;
    bool widened;
};

#if defined(AMX)
constexpr int TALLEST = TILE_ROWS;
#else
constexpr int TALLEST = DECAL_W == 16 ? 12 : 6;
INLINE constexpr int tall(int vectors) {
    return DECAL_W < 16 ? 6 : vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
}
#endif

#if defined(AMX)
// tile_sweep.h
#elif defined(DOT_BF16)
template <int V>
void multiply(const Rows& rows, const Panel* panel, int64_t depth, float* c, bool fresh) {
    constexpr int R = tall(V);
    const bf16* a[R];
    for (int i = 0; i < R; ++i) a[i] = rows.a + std::min(i, rows.count - 1) * rows.lda;
    __m512 sums[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v)
            sums[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + (i * V + v) * 16);
    auto step = [&](const Panel* b, auto&& pair) INLINE_LAMBDA {
        __m512bh column[V];
        for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
        for (int i = 0; i < R; ++i) {
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair(a[i]));
            for (int v = 0; v < V; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], value, column[v]);
        }
    };
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2) {
        step(panel + k / 2 * (V * 16), [k](const bf16* row) INLINE_LAMBDA {
            int32_t pair;
            memcpy(&pair, row + k, 4);
            return pair;
        });
    }
    if (k < depth)
        step(panel + k / 2 * (V * 16),
             [k](const bf16* row) INLINE_LAMBDA { return static_cast<int32_t>(row[k]); });
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + (i * V + v) * 16, sums[i][v]);
}
#else
INLINE void widen(const Rows& rows, int tall, int64_t depth) {
    for (int i = 0; i < tall; ++i) {
        const bf16* row = rows.a + std::min(i, rows.count - 1) * rows.lda;
        float* own = rows.wide + i * (depth + APART);
        int64_t k = 0;
        for (; k + W <= depth; k += W) store(own + k, load(row + k));
        for (; k < depth; ++k) own[k] = to_float(row[k]);
    }
}

template <int V>
void multiply(const Rows& rows, const Panel* panel, int64_t depth, float* c, bool fresh) {
    constexpr int R = tall(V);
    if (!rows.widened) widen(rows, R, depth);
    vf sums[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] = fresh ? vf{} : load(c + (i * V + v) * W);
    const float* a = rows.wide;
    const int64_t stride = depth + APART;
    for (int64_t k = 0; k < depth; ++k, panel += V * W) {
        vf column[V];
        for (int v = 0; v < V; ++v) column[v] = load(panel + v * W);
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < V; ++v) sums[i][v] += a[i * stride + k] * column[v];
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) store(c + (i * V + v) * W, sums[i][v]);
}
#endif

// --- one thread's part ---------------------------------------------------------------------------

INLINE int64_t panel_depth(int64_t k) { return STEP == 2 ? (k + 31) / 32 * 32 / 2 : k; }

// Whether a segment is multiplied in integers. Says nothing of the rows: what a row's result is
// must not depend on how many there are.
INLINE bool shares_exponents([[maybe_unused]] const Product& p, [[maybe_unused]] const Segment& s) {
#if defined(BLOCK_FLOAT)
    return p.output == rounded && p.masked <= after_leading && p.N >= 64 && s.k >= 128;
#else
    return false;
#endif
}
INLINE int64_t panel_depth(int64_t k, [[maybe_unused]] bool shares) {
#if defined(BLOCK_FLOAT)
    if (shares) return 2 * strip_depth(k);
#endif
    return panel_depth(k);
}

// The rows of a pass as integers, where pieces are multiplied so.
struct Lefts {
    Room<int16_t> values;
    Room<float> scales;
    Room<uint8_t> losing;

    // `most`: pieces of a pass.
    void make([[maybe_unused]] const Product& p, [[maybe_unused]] Piece* pieces,
              [[maybe_unused]] int count, [[maybe_unused]] int most, [[maybe_unused]] Range rows) {
#if defined(BLOCK_FLOAT)
        int64_t shared = 0, height = rows.end - rows.begin;
        for (int i = 0; i < p.count; ++i)
            if (shares_exponents(p, p.segments[i])) shared += p.segments[i].k;
        if (!shared) return;
        // Of the largest pass, so that the next one does not ask for another size.
        int64_t in_pass = std::min<int64_t>(p.count, most);
        int64_t blocks_needed = std::min(shared, DEPTH) / SHARED + in_pass;
        int64_t width = blocks_needed * SHARED + in_pass * BETWEEN_ROWS;
        int16_t* at = values.get(height * width);
        float* scale = scales.get(SCALES * height * blocks_needed);
        uint8_t* some = losing.get(blocks_needed);
        memset(some, 0, blocks_needed);
        for (int i = 0; i < count; ++i) {
            if (!pieces[i].shares) continue;
            const Segment& s = *pieces[i].segment;
            int64_t depth = pieces[i].end - pieces[i].begin, blocks = blocks_of(depth);
            int64_t ld = distance(pieces[i]), first = std::max(rows.begin, s.begin);
            const bf16* a = s.a + (first - s.begin) * s.lda + pieces[i].begin;
            for (int64_t row = 0; row < std::min(rows.end, s.end) - first; ++row)
                left_row(a + row * s.lda, depth, at + row * ld, scale + row * blocks * SCALES,
                         some);
            bool any = false;
            for (int64_t b = 0; b < blocks; ++b) any |= some[b] != 0;
            pieces[i].integers = {at, scale, a, ld, s.lda, blocks, first, any ? some : nullptr};
            at += height * ld;
            scale += SCALES * height * blocks;
            some += blocks;
        }
#endif
    }

  private:
#if defined(BLOCK_FLOAT)
    // Rows of whole pages would share a few places of the L1 cache.
    static constexpr int64_t BETWEEN_ROWS = 32;
    INLINE static int64_t distance(const Piece& piece) {
        return blocks_of(piece.end - piece.begin) * SHARED + BETWEEN_ROWS;
    }
#endif
};

#if !defined(AMX)
// Rows that the same segments serve. `between` holds their C in float where there are several
// passes.
template <int V>
void sweep(const Product& p, const Pass& pass, int64_t n0, Range rows, float* between) {
    constexpr int R = tall(V), width = V * W;
    alignas(64) float c[TALLEST * WIDTH];
    static thread_local Room<bf16> masked;
    for (int64_t row = rows.begin; row < rows.end; row += R) {
        int height = static_cast<int>(std::min<int64_t>(R, rows.end - row));
        float* held = between ? between + (row - rows.begin) * width : nullptr;
        if (!pass.first) memcpy(c, held, height * width * sizeof(float));
        bool fresh = pass.first;
        for (int i = 0; i < pass.count; ++i) {
            const Piece& piece = pass.pieces[i];
            const Segment& s = *piece.segment;
            if (row < s.begin || row >= s.end) continue;
            int64_t depth = piece.end - piece.begin;
#if defined(BLOCK_FLOAT)
            if (piece.shares) {
                multiply_integers<R, V>(piece.integers, row, height, depth,
                                        pass.panel + piece.panel * width, c, fresh);
                fresh = false;
                if (masks(p, piece)) mask(p, row, height, n0, width, c);
                continue;
            }
#endif
            Rows block{s.a + (row - s.begin) * s.lda + piece.begin, s.lda, height,
                       WIDENS ? pass.wide + piece.wide * R : nullptr, pass.widened};
            if (p.masked == left && !pass.widened) {
                bf16* room = masked.get(R * depth);
                for (int h = 0; h < height; ++h)
                    drop(*p.keep, row + h, piece.begin, depth, block.a + h * s.lda,
                         room + h * depth);
                block.a = room;
                block.lda = depth;
            }
            multiply<V>(block, pass.panel + piece.panel * width, depth, c, fresh);
            fresh = false;
            if (masks(p, piece)) mask(p, row, height, n0, width, c);
        }
        if (fresh) memset(c, 0, height * width * sizeof(float));
        if (pass.last)
            finish(p, c, row, height, n0, width);
        else
            memcpy(held, c, height * width * sizeof(float));
    }
}

// Rows that begin `below` rows under the thread's first.
inline void strip(const Product& p, const Pass& pass, const Strip& s, Range rows, int64_t below) {
    float* between = s.between ? s.between + below * s.vectors * W : nullptr;
    switch (s.vectors) {
        case 1:
            return sweep<1>(p, pass, s.n0, rows, between);
        case 2:
            return sweep<2>(p, pass, s.n0, rows, between);
#if DECAL_W == 16
        case 3:
            return sweep<3>(p, pass, s.n0, rows, between);
        case 4:
            return sweep<4>(p, pass, s.n0, rows, between);
#endif
    }
}
#endif

// Vectors of the next strip where `left` are to be covered: wide ones, but 3 + 3 for 2 or 4 + 2.
INLINE int next_width(int64_t left) {
    if (WIDEST < 4 || left % 4 == 0 || left < 3)
        return static_cast<int>(std::min<int64_t>(left, WIDEST));
    return left % 4 == 3 && left > 3 ? 4 : 3;
}

#if defined(AMX)
// Tiles eat a panel faster than L3 delivers rows: panels of many strips fill L2, and each block of
// rows meets them all while it is in L1.
constexpr int64_t GROUP = 1 << 18, BLOCK = TILE_ROWS;
#elif DECAL_W < 16
// So do blocks that rows must be widened for: once for all strips.
constexpr int64_t GROUP = 1 << 16, BLOCK = TALLEST;
#else
constexpr int64_t GROUP = 0, BLOCK = INT64_MAX / 2;
#endif
constexpr bool WIDENS_ONCE = WIDENS && BLOCK == TALLEST;

// Floats of C between passes. All strips that fit go through a pass together, so that the rows of a
// deep weight are read once, side by side, and not 128 bytes at a time all over it.
constexpr int64_t BETWEEN = 1 << 20;

// Where the next rows begin that other segments serve, `end` if that comes first.
inline int64_t border(const Product& p, int64_t row, int64_t end) {
    for (int i = 0; i < p.count; ++i) {
        if (p.segments[i].begin > row) end = std::min(end, p.segments[i].begin);
        if (p.segments[i].end > row) end = std::min(end, p.segments[i].end);
    }
    return end;
}

// Columns of strips whose rows are unpacked together.
constexpr int64_t BESIDE = 1024;

// Strips of W, `count` side by side: columns of C are columns of W; the contraction is rows of it,
// [piece.begin, piece.end). `panel` is where the first strip's panel begins, `apart` how far it is
// to the next.
inline void pack_across(const Piece& piece, const Strip* strips, int64_t count, int64_t N,
                        const Keep* keep, Panel* panel, int64_t apart) {
    alignas(64) bf16 room[2][BESIDE];
    const Stored& w = piece.segment->weight;
    const Strip& last = strips[count - 1];
    const int64_t n0 = strips->n0, width = last.n0 + last.vectors * W - n0;
    const int64_t held = std::min(width, N - n0), k0 = piece.begin, k1 = piece.end;
#if !defined(DOT_BF16)
    if (w.format == dense && held == width) {
        for (int64_t i = 0; i < count; ++i)
            pack_dense_across(w, strips[i].n0, strips[i].vectors * W, k0, k1, keep,
                              panel + i * apart + piece.panel * strips[i].vectors * W);
        return;
    }
#endif
    int64_t end = STEP == 2 ? k0 + (k1 - k0 + 31) / 32 * 32 : k1;
    for (int64_t k = k0; k < end; k += STEP) {
        for (int64_t i = 0; i < STEP; ++i) row_ahead(w, k + i + ROWS_AHEAD, n0, n0 + held);
        const bf16* rows[2];
        for (int64_t i = 0; i < STEP; ++i) {
            rows[i] = room[i];
            if (k + i >= k1) {
                memset(room[i], 0, width * sizeof(bf16));
                continue;
            }
            rows[i] = row_values(w, k + i, n0, n0 + held, room[i]);
            if (keep) {
                drop(*keep, k + i, n0, held, rows[i], room[i]);
                rows[i] = room[i];
            }
            if (held == width) continue;
            if (rows[i] != room[i]) memcpy(room[i], rows[i], held * sizeof(bf16));
            memset(room[i] + held, 0, (width - held) * sizeof(bf16));
            rows[i] = room[i];
        }
        for (int64_t i = 0, n = 0; i < count; ++i) {
            const int wide = strips[i].vectors * W;
            Panel* out = panel + i * apart + (piece.panel + (k - k0) / STEP) * wide;
            for (int j = 0; j < wide; j += W, n += W) {
#if defined(DOT_BF16)
                vu first = (vu)load(rows[0] + n) >> 16;
                *reinterpret_cast<vu*>(out + j) = first | (vu)load(rows[1] + n);
#else
                store(out + j, load(rows[0] + n));
#endif
            }
        }
    }
}

#if defined(BLOCK_FLOAT)
constexpr int64_t INTEGERS_BESIDE = 4;  // strips

// Strips of W whose contraction runs over its rows, in integers: blocks of rows, gathered in L1.
// `panel` is where the first strip's panel begins, `apart` how far it is to the next.
inline void pack_integers_across(const Piece& piece, int64_t N, const Strip* strips, int64_t count,
                                 Panel* panel, int64_t apart) {
    constexpr int64_t WIDE = INTEGERS_BESIDE * WIDTH;
    alignas(32) bf16 rows[SHARED + 1][WIDE];
    const Strip& last = strips[count - 1];
    const int64_t n0 = strips[0].n0, end = std::min(last.n0 + last.vectors * W, N);
    if (end - n0 < WIDE) memset(rows, 0, sizeof rows);
    for (int64_t k = piece.begin, b = 0; k < piece.end; k += SHARED, ++b) {
        int64_t n = std::min(SHARED, piece.end - k);
        for (int64_t i = 0; i < n; ++i) {
            row_ahead(piece.segment->weight, k + i + ROWS_AHEAD, n0, end);
            const bf16* row = row_values(piece.segment->weight, k + i, n0, end, rows[i]);
            if (row != rows[i]) memcpy(rows[i], row, (end - n0) * sizeof(bf16));
        }
        memset(rows[n], 0, sizeof rows[n]);  // the other half of an odd last pair
        for (int64_t s = 0; s < count; ++s) {
            int width = strips[s].vectors * W;
            Packed to(panel + s * apart + piece.panel * width, width, piece.end - piece.begin,
                      piece.integers, b);
            block_across(n, rows[0] + (strips[s].n0 - n0), WIDE, to);
        }
    }
}
#endif

// Packs a piece of the first of `count` strips that lie `apart`, or of several; returns how many.
inline int64_t pack(const Product& p, const Piece& piece, const Strip* strips,
                    [[maybe_unused]] int64_t count, Panel* panel, [[maybe_unused]] int64_t apart,
                    bf16* room) {
    const Segment& s = *piece.segment;
#if defined(BLOCK_FLOAT)
    if (s.across && piece.shares) {
        count = std::min(count, INTEGERS_BESIDE);
        pack_integers_across(piece, p.N, strips, count, panel, apart);
        return count;
    }
#endif
    if (s.across) {
        count = std::min(count, BESIDE / WIDTH);
        const Keep* keep = p.masked == right ? p.keep : nullptr;
        pack_across(piece, strips, count, p.N, keep, panel, apart);
        return count;
    }
    int width = strips->vectors * W;
    pack_along(s, strips->n0, p.N, width, piece.begin, piece.end,
               piece.shares ? &piece.integers : nullptr, panel + piece.panel * width, room);
    return 1;
}

// The pieces that come next: a pass deep at most. Moves `segment` and `at` behind them.
inline int take(const Product& p, int& segment, int64_t& at, Piece* pieces, int most) {
    int count = 0;
    int64_t depth = 0, used = 0, wide = 0;
    const int64_t deepest = depth_of_pass(p);
    while (segment < p.count && (depth < deepest || !p.segments[segment].k) && count < most) {
        const Segment& s = p.segments[segment];
        bool shares = shares_exponents(p, s);
        int64_t end = std::min(s.k, at + deepest - depth);
        // Not inside what is summed before it comes to C, a block of integers or a row of tiles:
        // the order of a row's sums must not depend on the segments of others.
        const int64_t grain = shares ? SHARED : STEP == 2 ? 32 : 1;
        if (end < s.k && (end = end / grain * grain) <= at) break;
        pieces[count++] = {&s, at, end, used, wide, shares, {}};
        used += panel_depth(end - at, shares);
        if (!shares) wide += end - at + APART;
        depth += end - at;
        at = end;
        if (at == s.k) {
            ++segment;
            at = 0;
        }
    }
    return count;
}

// No pass needs more rows of a panel.
inline int64_t largest_panel(const Product& p, int most) {
    int64_t plain = 0, shared = 0;
    for (int i = 0; i < p.count; ++i)
        (shares_exponents(p, p.segments[i]) ? shared : plain) += p.segments[i].k;
    int64_t pieces = std::min(p.count, most);
    int64_t needed = panel_depth(std::min(plain, depth_of_pass(p))) + 16 * (pieces + 1);
    // Every piece may end inside a block.
    if (shared) needed += panel_depth(std::min(shared, DEPTH) + pieces * SHARED, true);
    return needed;
}

// In how many parts a thread's rows go, each with panels of its own: more than one only where
// integers of them would take more than MOST_INTEGERS.
inline int64_t parts_of([[maybe_unused]] const Product& p, [[maybe_unused]] int64_t rows) {
#if defined(BLOCK_FLOAT)
    constexpr int64_t MOST_INTEGERS = 1 << 21;
    int64_t shared = 0;
    for (int i = 0; i < p.count; ++i)
        if (shares_exponents(p, p.segments[i])) shared += p.segments[i].k;
    return (rows * std::min(shared, DEPTH) + MOST_INTEGERS - 1) / MOST_INTEGERS;
#else
    return 1;
#endif
}

inline void part(const Product& p, Range rows, Range columns) {
    static thread_local Room<Panel> panels;
    static thread_local Room<bf16> rooms;
    static thread_local Room<float> floats_between;
    static thread_local Room<float> floats_of_rows;
    static thread_local Lefts lefts;
    constexpr int MOST = 16;
    Piece pieces[MOST];
    int64_t deep = 0;
    for (int i = 0; i < p.count; ++i) deep += p.segments[i].k;
    bool passes = deep > depth_of_pass(p) || p.count > MOST;
    int64_t height = rows.end - rows.begin;
    int64_t size = (largest_panel(p, MOST) | 1) * WIDTH;
    constexpr int64_t STRIPS = 64;
    Strip strips[STRIPS];
    int64_t group = std::clamp<int64_t>(GROUP / size, 1, STRIPS), most = group;
    if (passes) {
        most = std::clamp<int64_t>(BETWEEN / (height * WIDTH), 1, STRIPS);
        group = std::min(group, most);
    }
    Panel* panel = panels.get(group * size);
    [[maybe_unused]] float* wide =
        WIDENS ? floats_of_rows.get(TALLEST * (std::min(deep, DEPTH) + MOST * APART)) : nullptr;
    bf16* room = rooms.get((DEPTH + 32) * WIDTH);
    float* between = passes ? floats_between.get(most * height * WIDTH) : nullptr;
    int segment = 0, count = 0;
    int64_t at = 0;
    for (int64_t n0 = columns.begin; n0 < columns.end;) {
        int64_t held = 0;
        for (; held < most && n0 < columns.end; ++held) {
            int vectors = next_width((columns.end - n0 + W - 1) / W);
            strips[held] = {n0, vectors, between ? between + held * height * WIDTH : nullptr};
            n0 += vectors * W;
        }
        if (passes) segment = 0, at = 0;
        for (bool first = true; first || segment < p.count; first = false) {
            // The pieces of an only pass serve all strips.
            if (passes || !count) {
                count = take(p, segment, at, pieces, MOST);
                lefts.make(p, pieces, count, MOST, rows);
            }
            for (int64_t begin = 0; begin < held; begin += group) {
                int64_t end = std::min(held, begin + group);
                for (int j = 0; j < count; ++j) {
                    const Segment& s = *pieces[j].segment;
                    if (s.begin >= rows.end || s.end <= rows.begin) continue;
                    for (int64_t i = begin; i < end;)
                        i += pack(p, pieces[j], strips + i, end - i, panel + (i - begin) * size,
                                  size, room);
                }
                for (int64_t row = rows.begin, next; row < rows.end; row = next) {
                    next = border(p, row, std::min(rows.end, row + BLOCK));
#if defined(AMX)
                    Pass pass{pieces, count, panel, first, segment == p.count, nullptr, false};
                    sweep(p, pass, strips + begin, end - begin, size, {row, next},
                          row - rows.begin);
#else
                    for (int64_t i = begin; i < end; ++i) {
                        Pass pass{pieces,
                                  count,
                                  panel + (i - begin) * size,
                                  first,
                                  segment == p.count,
                                  wide,
                                  WIDENS_ONCE && i > begin};
                        strip(p, pass, strips[i], {row, next}, row - rows.begin);
                    }
#endif
                }
            }
        }
    }
}

// Multiplications below which waking a second thread takes longer than it saves.
constexpr int64_t SMALL = 1 << 21;

// Threads along rows and columns: the grid whose largest part, packing included, is the least work.
inline void grid(int64_t M, int64_t N, int threads, int& tall_, int& wide) {
    constexpr int64_t packing = 48;               // rows' worth of work to pack a strip
    constexpr int64_t widening = WIDENS ? 2 : 0;  // vectors' worth of work to widen a row
    int64_t best = INT64_MAX;
    for (int along = 1; along <= threads; ++along) {
        if (threads % along) continue;
        int64_t across = threads / along;
        int64_t rows = ((M + along - 1) / along + 5) / 6 * 6;
        int64_t columns = ((N + W - 1) / W + across - 1) / across;
        int64_t work = (rows + packing) * (columns + widening);
        if (work < best) best = work, tall_ = along, wide = static_cast<int>(across);
    }
}

// The rows of `a` that lies as [k, M], in memory of the thread. (Few: the rank's.)
inline const bf16* upright(const Segment& s, int64_t M, int64_t ld) {
    static thread_local Room<bf16> room;
    bf16* rows = room.get(M * ld);
    for (int64_t k = 0; k < s.k; ++k)
        for (int64_t i = 0; i < M; ++i) rows[i * ld + k] = s.a[k * s.lda + i];
    return rows;
}

// Whether it is worth a second thread.
inline bool large(const Product& p) {
    int64_t deep = 0;
    for (int i = 0; i < p.count; ++i) deep += p.segments[i].k;
    return p.M * p.N * deep >= SMALL;
}

inline void work_on(const Product& p, int thread, int threads) {
    int along = 1, across = 1;
    grid(p.M, p.N, threads, along, across);
    Range rows = decal::share(p.M, thread / across, along);
    Range columns = decal::share(p.N, thread % across, across, W);
    if (rows.begin == rows.end || columns.begin == columns.end) return;
    Product own = p;
    Segment only;
    if (p.count == 1 && p.segments->turned) {
        only = *p.segments;
        only.lda = only.k + 2 * APART;
        only.a = upright(*p.segments, p.M, only.lda);
        own.segments = &only;
    }
    int64_t parts = std::max<int64_t>(1, parts_of(own, rows.end - rows.begin));
    for (int64_t i = 0; i < parts; ++i) {
        int64_t height = (rows.end - rows.begin + parts - 1) / parts;
        int64_t begin = rows.begin + i * height;
        if (begin < rows.end) part(own, {begin, std::min(begin + height, rows.end)}, columns);
    }
}

}  // namespace NAMESPACE

// Products one after the other; each may read what those before it have written.
EXPORT(gemm)(NAMESPACE::Product* const* given, int64_t count, int threads) {
    using namespace NAMESPACE;
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= large(*given[i]);
    decal::Meeting meeting;
    decal::for_each_thread(any ? threads : 1, [&](int thread, int of) {
        [[maybe_unused]] Tiles tiles;
        double begun = decal::seconds();
        for (int64_t i = 0; i < count; ++i) {
            Product& p = *given[i];
            const bool all = large(p);
            if (p.M && p.N && (all || thread == 0)) work_on(p, all ? thread : 0, all ? of : 1);
            decal::meet(meeting, of);
            if (thread) continue;
            double now = decal::seconds();
            p.seconds = now - begun;
            begun = now;
        }
    });
}
