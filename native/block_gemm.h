// Small products of blocks that lie in the cache, and packing their operands.
//
//     C [M, N] (+)= A [M, depth] B [depth, N]          C in float, row by row
//
// Operands are held in words of 32 bits. With DOT_BF16 a word is a pair of bf16 that follow each
// other along the contraction; else it is one float. A lies row by row, B as depth / PAIR rows of N
// words. Both come from bf16 rows in memory by one of four ways of packing: words taken along a row
// or across rows, stored as they are or transposed. So nothing here reads past a row's end.
//
//     contraction over the columns of X:   A = X          along, straight      B = X^T   along,
//     transposed contraction over the rows of X:      B = X          across, straight     A = X^T
//     across, transposed
//
// All names are local to the source that includes this: every source may have its own like them.
#pragma once
#include "room.h"
#include "tiles.h"
#include "vec.h"

namespace NAMESPACE {
namespace {

#if defined(DOT_BF16)
using word = uint32_t;
using vw = vu;
constexpr int64_t PAIR = 2;
#else
using word = float;
using vw = vf;
constexpr int64_t PAIR = 1;
#endif

// Rows and vectors of the part of C that is held in registers.
constexpr int TALL = 6;
#if DECAL_W == 16
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif

INLINE int64_t words(int64_t depth) { return (depth + PAIR - 1) / PAIR; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE vw load_words(const word* p) { return *reinterpret_cast<const vw*>(p); }
INLINE void store_words(word* p, vw x) { *reinterpret_cast<vw*>(p) = x; }

INLINE vf dot(vf sum, word a, vw b) {
#if defined(DOT_BF16)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    return sum + a * b;
#endif
}

template <int ROWS, int VECS>
void register_block(int64_t depth, const word* a, int64_t lda, const word* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
    vf sums[ROWS][VECS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) sums[i][j] = add ? load(c + i * ldc + j * W) : vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vw across[VECS];
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) across[j] = load_words(b + k * ldb + j * W);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < VECS; ++j) sums[i][j] = dot(sums[i][j], a[i * lda + k], across[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) store(c + i * ldc + j * W, sums[i][j]);
}

template <int VECS>
void register_blocks(int64_t rows, int64_t depth, const word* a, int64_t lda, const word* b,
                     int64_t ldb, float* c, int64_t ldc, bool add) {
    for (; rows >= TALL; rows -= TALL, a += TALL * lda, c += TALL * ldc)
        register_block<TALL, VECS>(depth, a, lda, b, ldb, c, ldc, add);
    switch (rows) {
        case 5:
            return register_block<5, VECS>(depth, a, lda, b, ldb, c, ldc, add);
        case 4:
            return register_block<4, VECS>(depth, a, lda, b, ldb, c, ldc, add);
        case 3:
            return register_block<3, VECS>(depth, a, lda, b, ldb, c, ldc, add);
        case 2:
            return register_block<2, VECS>(depth, a, lda, b, ldb, c, ldc, add);
        case 1:
            return register_block<1, VECS>(depth, a, lda, b, ldb, c, ldc, add);
    }
}

// C [rows, vectors * W] (+)= A B in registers; depth, lda and ldb count words.
void multiply_in_registers(int64_t rows, int64_t vectors, int64_t depth, const word* a, int64_t lda,
                           const word* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    for (; vectors >= WIDE; vectors -= WIDE, b += WIDE * W, c += WIDE * W)
        register_blocks<WIDE>(rows, depth, a, lda, b, ldb, c, ldc, add);
#if DECAL_W == 16
    if (vectors == 3) return register_blocks<3>(rows, depth, a, lda, b, ldb, c, ldc, add);
    if (vectors == 2) return register_blocks<2>(rows, depth, a, lda, b, ldb, c, ldc, add);
#endif
    if (vectors == 1) register_blocks<1>(rows, depth, a, lda, b, ldb, c, ldc, add);
}

#if defined(AMX)
// H x V tiles of C; depth is a multiple of 16 words.
template <int H, int V>
INLINE void tile_block(int64_t depth, const word* a, int64_t lda, const word* b, int64_t ldb,
                       float* c, int64_t ldc, bool add) {
    lda *= 4, ldb *= 4;
    const int64_t bytes = ldc * 4;
    float* below = c + 16 * ldc;
    if (add) {
        tile_load<0>(c, bytes);
        if (V == 2) tile_load<1>(c + 16, bytes);
        if (H == 2) tile_load<2>(below, bytes);
        if (H == 2 && V == 2) tile_load<3>(below + 16, bytes);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t k = 0; k < depth; k += 16, a += 16, b += 4 * ldb) {
        tile_load<4>(a, lda);
        tile_load<6>(b, ldb);
        tile_dot<0, 4, 6>();
        if (V == 2) {
            tile_load<7>(b + 16, ldb);
            tile_dot<1, 4, 7>();
        }
        if (H == 2) {
            tile_load<5>(a + 4 * lda, lda);
            tile_dot<2, 5, 6>();
            if (V == 2) tile_dot<3, 5, 7>();
        }
    }
    tile_store<0>(c, bytes);
    if (V == 2) tile_store<1>(c + 16, bytes);
    if (H == 2) tile_store<2>(below, bytes);
    if (H == 2 && V == 2) tile_store<3>(below + 16, bytes);
}

template <int H>
INLINE void tile_row(int64_t vectors, int64_t depth, const word* a, int64_t lda, const word* b,
                     int64_t ldb, float* c, int64_t ldc, bool add) {
    for (; vectors >= 2; vectors -= 2, b += 32, c += 32)
        tile_block<H, 2>(depth, a, lda, b, ldb, c, ldc, add);
    if (vectors) tile_block<H, 1>(depth, a, lda, b, ldb, c, ldc, add);
}

// What is whole in tiles; the last rows and the end of the contraction in registers.
void multiply(int64_t rows, int64_t vectors, int64_t depth, const word* a, int64_t lda,
              const word* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    const int64_t whole = depth / 16 * 16, tall = whole ? rows / 16 * 16 : 0;
    int64_t i = 0;
    for (; i + 32 <= tall; i += 32)
        tile_row<2>(vectors, whole, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    if (i < tall) tile_row<1>(vectors, whole, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    if (whole && whole < depth && tall)
        multiply_in_registers(tall, vectors, depth - whole, a + whole, lda, b + whole * ldb, ldb, c,
                              ldc, true);
    if (tall < rows)
        multiply_in_registers(rows - tall, vectors, depth, a + tall * lda, lda, b, ldb,
                              c + tall * ldc, ldc, add);
}
#else
void multiply(int64_t rows, int64_t vectors, int64_t depth, const word* a, int64_t lda,
              const word* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    multiply_in_registers(rows, vectors, depth, a, lda, b, ldb, c, ldc, add);
}
#endif

// x[i][j] <-> x[j][i]
#if defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // of GCC's own header, in what is masked out
template <class V>
INLINE void transpose(V (&x)[W]) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 g + c] holds, in its quarter q, column 4 q + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i later_even = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i later_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        x[c] = (V)_mm512_shuffle_i32x4(even, later_even, 0x88);
        x[c + 4] = (V)_mm512_shuffle_i32x4(odd, later_odd, 0x88);
        x[c + 8] = (V)_mm512_shuffle_i32x4(even, later_even, 0xdd);
        x[c + 12] = (V)_mm512_shuffle_i32x4(odd, later_odd, 0xdd);
    }
}
#pragma GCC diagnostic pop
#else
template <class V>
INLINE void transpose(V (&x)[W]) {
    V turned[W] = {};
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < W; ++j) turned[i][j] = x[j][i];
    for (int i = 0; i < W; ++i) x[i] = turned[i];
}
#endif

// bf16 rows in memory, seen as words; zero outside of them.
template <bool ACROSS>
struct Packing {
    const bf16* at;
    int64_t stride, rows, columns;

    INLINE int64_t tall() const { return ACROSS ? words(rows) : rows; }
    INLINE int64_t wide() const { return ACROSS ? columns : words(columns); }

    // Words c .. c + W of word row i.
    INLINE vw get(int64_t i, int64_t c) const {
        if (i >= tall()) return vw{};
#if defined(DOT_BF16)
        if constexpr (ACROSS) {
            const bf16* row = at + 2 * i * stride + c;
            int64_t left = columns - c;
            vu first = (vu)(left >= W ? load(row) : load_part(row, left)) >> 16;
            if (2 * i + 1 >= rows) return first;
            row += stride;
            return first | (vu)(left >= W ? load(row) : load_part(row, left));
        } else {
            const bf16* row = at + i * stride + 2 * c;
            int64_t left = columns - 2 * c;
            vu held{};
            if (left >= 2 * W)
                memcpy(&held, row, sizeof held);
            else
                memcpy(&held, row, left * sizeof(bf16));
            return held;
        }
#else
        const bf16* row = at + i * stride + c;
        int64_t left = columns - c;
        return left >= W ? load(row) : load_part(row, left);
#endif
    }

    // to [tall, wide rounded up to W]
    void straight(word* to, int64_t ld) const {
        for (int64_t i = 0; i < tall(); ++i)
            for (int64_t c = 0; c < wide(); c += W) store_words(to + i * ld + c, get(i, c));
    }

    // to [wide, tall], both rounded up to W
    void transposed(word* to, int64_t ld) const {
        for (int64_t i = 0; i < tall(); i += W)
            for (int64_t c = 0; c < wide(); c += W) {
                vw x[W];
                for (int r = 0; r < W; ++r) x[r] = get(i + r, c);
                transpose(x);
                for (int r = 0; r < W; ++r) store_words(to + (c + r) * ld + i, x[r]);
            }
    }
};
using Along = Packing<false>;
using Across = Packing<true>;

INLINE void store_row(bf16* to, vf x, int64_t left) {
    if (left >= W)
        store(to, x);
    else
        store_part(to, x, left);
}

// bf16 rows = factors[row] * float rows; `from` [rows, columns rounded up to W]
void round_rows(const float* from, int64_t ld, int64_t rows, int64_t columns, float factor,
                bf16* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += W)
            store_row(to + i * stride + c, factor * load(from + i * ld + c), columns - c);
}

// The same from `from` [columns, rows], both rounded up to W; one factor per row.
void round_transposed(const float* from, int64_t ld, int64_t rows, int64_t columns,
                      const float* factors, bf16* to, int64_t stride) {
    for (int64_t c = 0; c < columns; c += W)
        for (int64_t i = 0; i < rows; i += W) {
            vf x[W];
            for (int r = 0; r < W; ++r) x[r] = load(from + (c + r) * ld + i);
            transpose(x);
            for (int r = 0; r < W && i + r < rows; ++r)
                store_row(to + (i + r) * stride + c, factors[i + r] * x[r], columns - c);
        }
}

}  // namespace
}  // namespace NAMESPACE
