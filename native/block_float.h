// Products of bf16 by integers, for processors that multiply no bf16: block floating point.
//
// 64 values that follow each other along the contraction become integers of 16 bits that share an
// exponent. `vpmaddwd` multiplies sixteen pairs of them and adds them two by two, where a fused
// multiply-add of floats does eight, and a block's sum in 32 bits is exact:
//
//     value = integer * unit + rest * unit of the rest,  units powers of two;
//     |integer| <= 16320 in rows of the left, 2040 in columns of the right;
//     16320 * 2040 * 64 < 2^31
//
// A bf16 has 8 significant bits. So on the left, where activations and gradients are, the rest is
// nothing for what is less than 2^6 times smaller than the largest of its block, on the right,
// where weights are, 2^3 times; and at most half a unit for any other value. In most blocks rests
// are worth less than a tenth of what rounding y to bf16 is, and are left out. Not where a few
// values dwarf the others, as it happens in activations, or where the features of x differ in size
// and the columns of W make up for it: small values would lose digits that matter. So where the
// block of the row or that of the column loses more than a small share of its small values, their
// rests are multiplied as well:
//
//     y = integer integer                               all pairs of a row's and a column's block
//       + rest integer + integer rest                   pairs of which one loses too much
//
// What is left out then are a rest times a rest, and what rests lose in their turn: nothing that
// counts until a row's outliers and those of a column, in other places, are 500 times larger than
// the rest of each, or one side's a million times.
//
// Which pairs depends on the two alone, so no row's result depends on others. Short of that share
// the error of a row may be up to ten times what rounding makes it, where a part of the features is
// 16 times larger than the others or more, and its weights as much smaller; for values of one size,
// or with outliers, it is a few percent more.
//
// Blocks are summed in float, in their order. A block with NaN or infinity is NaN; one whose
// largest magnitude is below 2^-113 is zero. Weights beyond 2^100 may overflow.
#pragma once
#include "vec.h"

#if DECAL_W == 8
#define BLOCK_FLOAT
#endif

namespace NAMESPACE {

constexpr int64_t SHARED = 64;  // values that share an exponent

// Rows of the left operand, from `first` of C on: `ld` integers each, for each of their `blocks`
// the scales of a block, and the bf16 that they were made of, `lda` apart, for the few rests.
struct Integers {
    const int16_t* values;
    const float* scales;
    const bf16* a;
    int64_t ld, lda, blocks, first;
    const uint8_t* losing;  // blocks in which some row loses too much; null if there are none
};

// Of a block: its unit, the unit of its rests, and 1 if it loses too much, else 0.
enum Scale { unit = 0, rest_unit = 1, loses = 2, SCALES = 3 };

#if defined(BLOCK_FLOAT)
namespace {

constexpr int LEFT_BITS = 13, RIGHT_BITS = 10;  // of the largest, below its leading bit
constexpr int64_t AHEAD_OF_L1 = 512;            // floats: 2 KB from L2
static_assert(SHARED * ((2LL << LEFT_BITS) - 1) * ((2LL << RIGHT_BITS) - 1) < 1LL << 31,
              "a block of products is summed in 32 bits");
// A block loses too much if that is more than a share of its values, the upper half of the range
// left out and the rest cut at a sixteenth; or a fifth of a unit each, as where nearly all of them
// are less than a hundredth of the largest. In a trained model one block of what SwiGLU makes in a
// hundred does, of other activations, gradients and weights one in a thousand, and a sixth of a
// loss's gradients.
constexpr float SHARE = 1.0f / 256, EACH = 0.2f;

INLINE constexpr float rests_in_unit(int bits) { return static_cast<float>(2 << bits); }

// What values are multiplied with, and what their integers stand for, by the bits of the largest
// magnitude as bf16. One of eight blocks per lane.
struct Exponents {
    vf factor, unit;
    INLINE Exponents(vu largest, int bits) {
        vu exponent = largest >> 7;
        vi kept = exponent > 13u, number = exponent < 255u;  // units are above 2^-126
        factor = (vf)(((uint32_t)(254 + bits) - exponent) << 23 & (vu)(kept & number));
        unit = (vf)(((exponent - (uint32_t)bits) << 23 & (vu)kept) | (0x7fc00000u & ~(vu)number));
    }
};

INLINE __m256i halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256i magnitudes(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)); }
INLINE uint32_t largest_half(__m256i x) {
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    // minpos finds the smallest, which the largest becomes when all bits are turned.
    __m128i turned = _mm_xor_si128(most, _mm_set1_epi16(-1));
    return 0xffffu & ~static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(turned)));
}
INLINE __m256i whole(vf x) { return _mm256_cvtps_epi32((__m256)x); }

INLINE vf nearest(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

// What scaled values lose as integers, lane by lane, and what that is held against.
struct Losses {
    vf lost{}, kept{};
    INLINE void add(vf value, int bits) {
        const float little = static_cast<float>(1 << (bits - 4));
        vf size = magnitude(value);
        lost += magnitude(value - nearest(value));
        kept += (vf)((vi)min(size, splat(little)) & (size < 8 * little));
    }
};

// SHARED values that follow each other, read as often as it takes.
struct Block {
    const bf16* x;
    int bits;
    Exponents e;

    // The first n values of `from`, and zeros, by way of `edge` where there are fewer than SHARED.
    INLINE Block(const bf16* from, int64_t n, int given, bf16* edge)
        : x(filled(from, n, edge)), bits(given), e(largest() - vu{}, given) {}

    INLINE float unit() const { return e.unit[0]; }
    INLINE float unit_of_rests() const { return e.unit[0] / rests_in_unit(bits); }
    INLINE void integers(int16_t* out) const {
        for (int i = 0; i < SHARED; i += 16) put(out + i, scaled(i), scaled(i + 8));
    }
    INLINE void rests(int16_t* out) const {
        for (int i = 0; i < SHARED; i += 16) put(out + i, rest_at(i), rest_at(i + 8));
    }
    INLINE bool loses_too_much() const {
        Losses losses;
        for (int i = 0; i < SHARED; i += 8) losses.add(scaled(i), bits);
        const float all = sum(losses.lost);
        return all > SHARE * sum(losses.kept) || all > EACH * SHARED;
    }

  private:
    INLINE static const bf16* filled(const bf16* from, int64_t n, bf16* edge) {
        if (n == SHARED) return from;
        memset(edge, 0, SHARED * sizeof(bf16));
        memcpy(edge, from, n * sizeof(bf16));
        return edge;
    }
    INLINE uint32_t largest() const {
        __m256i most = magnitudes(halves(x));
        for (int i = 16; i < SHARED; i += 16)
            most = _mm256_max_epu16(most, magnitudes(halves(x + i)));
        return largest_half(most);
    }
    INLINE vf scaled(int i) const { return load(x + i) * e.factor; }
    INLINE vf rest_at(int i) const {
        vf value = scaled(i);
        return (value - nearest(value)) * rests_in_unit(bits);
    }
    INLINE static void put(int16_t* out, vf a, vf b) {
        __m256i both = _mm256_packs_epi32(whole(a), whole(b));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
    }
};

// A row of k values as integers, with zeros up to whole blocks; `losing` is told where it loses too
// much.
inline void left_row(const bf16* x, int64_t k, int16_t* out, float* scales, uint8_t* losing) {
    alignas(32) bf16 edge[SHARED];
    for (int64_t at = 0, b = 0; at < k; at += SHARED, ++b, scales += SCALES) {
        const Block block(x + at, k - at < SHARED ? k - at : SHARED, LEFT_BITS, edge);
        const bool much = block.loses_too_much();
        block.integers(out + at);
        scales[unit] = block.unit();
        scales[rest_unit] = block.unit_of_rests();
        scales[loses] = much ? 1.0f : 0.0f;
        losing[b] |= much;
    }
}

INLINE int64_t blocks_of(int64_t k) { return (k + SHARED - 1) / SHARED; }

// A strip of the right operand: for each block the three scales of `width` columns, then SHARED / 2
// rows of pairs. Behind it another of the rests, whose blocks are written where they are needed.
constexpr int64_t BLOCK_ROWS = SCALES + SHARED / 2;
INLINE int64_t strip_depth(int64_t k) { return blocks_of(k) * BLOCK_ROWS; }

// A block of a strip that is being packed.
struct Packed {
    float* at;
    int width;
    int64_t to_rests;  // floats
    bool needed;       // some row's block loses too much
    INLINE Packed(float* strip, int wide, int64_t depth, const Integers& left, int64_t block)
        : at(strip + block * BLOCK_ROWS * wide),
          width(wide),
          to_rests(strip_depth(depth) * wide),
          needed(left.losing && left.losing[block]) {}
    INLINE float* scales(Scale which) const { return at + which * width; }
    INLINE float* pairs() const { return at + SCALES * width; }
};

// Eight rows of eight pairs -> eight pairs of eight rows.
INLINE void turn(const int16_t* from, int64_t ld, float* to, int64_t stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i)
        r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * ld));
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// `width` rows of `depth` bf16, whose contraction is along them.
inline void strip_along(int width, int64_t depth, const bf16* const* rows, const Integers& left,
                        float* strip) {
    alignas(32) bf16 edge[SHARED];
    alignas(32) int16_t room[16 * SHARED], rests[16 * SHARED];
    for (int64_t k = 0; k < depth; k += SHARED) {
        const int64_t n = depth - k < SHARED ? depth - k : SHARED;
        Packed to(strip, width, depth, left, k / SHARED);
        for (int j = 0; j < width; ++j) {
            const Block block(rows[j] + k, n, RIGHT_BITS, edge);
            const bool much = block.loses_too_much();
            block.integers(room + j * SHARED);
            to.scales(unit)[j] = block.unit();
            to.scales(rest_unit)[j] = block.unit_of_rests();
            to.scales(loses)[j] = much ? 1.0f : 0.0f;
            to.needed |= much;
        }
        for (int j = 0; to.needed && j < width; ++j)
            Block(rows[j] + k, n, RIGHT_BITS, edge).rests(rests + j * SHARED);
        for (int j = 0; j < width; j += 8)
            for (int64_t i = 0; i < (n + 1) / 2; i += 8) {
                float* pairs = to.pairs() + i * width + j;
                turn(room + j * SHARED + 2 * i, SHARED, pairs, width);
                if (to.needed) turn(rests + j * SHARED + 2 * i, SHARED, pairs + to.to_rests, width);
            }
    }
}

// Up to SHARED rows of bf16, `ld` apart, whose contraction runs over the rows, as one block. Behind
// the last row there is one of zeros; 16 values of each can be read.
inline void block_across(int64_t n, const bf16* rows, int64_t ld, Packed to) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t k = 0; k < n; ++k)
        most = _mm256_max_epu16(most, magnitudes(halves(rows + k * ld)));
    alignas(32) uint16_t largest[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(largest), most);
    auto put = [](float* at, vf first, vf second) INLINE_LAMBDA {
        __m256i pair = _mm256_slli_epi32(whole(second), 16);
        pair = _mm256_blend_epi16(whole(first), pair, 0xaa);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), pair);
    };
    constexpr float RESTS = rests_in_unit(RIGHT_BITS);
    vf factors[2];
    for (int j = 0; j < to.width; j += 8) {
        const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(largest + j));
        const Exponents e((vu)_mm256_cvtepu16_epi32(eight), RIGHT_BITS);
        factors[j / 8] = e.factor;
        store(to.scales(unit) + j, e.unit);
        store(to.scales(rest_unit) + j, e.unit / RESTS);
        Losses losses;
        for (int64_t k = 0; k < n; k += 2) {
            const bf16* two = rows + k * ld + j;
            vf first = load(two) * e.factor, second = load(two + ld) * e.factor;
            put(to.pairs() + k / 2 * to.width + j, first, second);
            losses.add(first, RIGHT_BITS);
            losses.add(second, RIGHT_BITS);
        }
        const vi much = (losses.lost > SHARE * losses.kept) | (losses.lost > EACH * SHARED);
        store(to.scales(loses) + j, (vf)((vi)splat(1.0f) & much));
        to.needed |= _mm256_movemask_ps((__m256)much) != 0;
    }
    for (int j = 0; to.needed && j < to.width; j += 8)
        for (int64_t k = 0; k < n; k += 2) {
            const bf16* two = rows + k * ld + j;
            vf first = load(two) * factors[j / 8], second = load(two + ld) * factors[j / 8];
            put(to.pairs() + to.to_rests + k / 2 * to.width + j, (first - nearest(first)) * RESTS,
                (second - nearest(second)) * RESTS);
        }
}

// sum += products of pairs. Left to itself, gcc gives every sum a second register where there are
// just enough for one.
template <class V>
INLINE void add_products(V& sum, V left, V right) {
    V product;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(product)
        : "x"(left), "x"(right));
}

// C [ROWS, V vectors] (+)= n integers of each row times those of a block, by the units of the rows
// and columns; with `row_loses` and `column_loses` only where one of them is 1.
template <int ROWS, int V>
INLINE void round_of_block(const int16_t* const (&values)[ROWS], int64_t n, const float* pairs,
                           const float (&units)[ROWS], const float* columns, float* c, bool fresh,
                           const float* row_loses = nullptr, const float* column_loses = nullptr) {
    __m256i sums[ROWS][V];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[i][v] = _mm256_setzero_si256();
    for (int64_t k = 0; k < n; k += 2, pairs += V * W) {
        __builtin_prefetch(pairs + AHEAD_OF_L1);
        __m256i column[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) column[v] = halves(pairs + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            int32_t pair;
            memcpy(&pair, values[i] + k, sizeof pair);
            __m256i value = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) add_products(sums[i][v], value, column[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            // The column's unit first: weights are of a size, a row may be near the largest float.
            vf sum = (vf)_mm256_cvtepi32_ps(sums[i][v]) * load(columns + v * W);
            float* out = c + (i * V + v) * W;
            vf before = fresh ? vf{} : load(out), scale = splat(units[i]);
            if (row_loses) {
                scale *= max(splat(row_loses[i]), load(column_loses + v * W));
                sum = (vf)((vi)sum & (scale != 0.0f));  // 0 times infinity is not 0
            }
            store(out, before + sum * scale);
        }
}

// C [ROWS, V vectors] (+)= rows of integers from `row` on, `count` of them there, times a strip.
template <int ROWS, int V>
void multiply_integers(const Integers& left, int64_t row, int count, int64_t depth,
                       const float* strip, float* c, bool fresh) {
    constexpr int64_t width = V * W;
    const int16_t* values[ROWS];
    const float* scales[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        int64_t own = row - left.first + (i < count ? i : count - 1);
        values[i] = left.values + own * left.ld;
        scales[i] = left.scales + own * left.blocks * SCALES;
    }
    const int64_t strip_to_rests = strip_depth(depth) * width;
    for (int64_t k = 0; k < depth; k += SHARED, strip += BLOCK_ROWS * width) {
        const int64_t n = depth - k < SHARED ? depth - k : SHARED;
        const float *pairs = strip + SCALES * width, *column_loses = strip + loses * width;
        float units[ROWS], rest_units[ROWS], row_loses[ROWS];
        float most = 0;
        for (int i = 0; i < ROWS; ++i) {
            units[i] = scales[i][unit];
            rest_units[i] = scales[i][rest_unit];
            row_loses[i] = scales[i][loses];
            most += row_loses[i];
            scales[i] += SCALES;
        }
        round_of_block<ROWS, V>(values, n, pairs, units, strip + unit * width, c, fresh);
        fresh = false;
        vf any = splat(most);
        for (int v = 0; v < V; ++v) any = max(any, load(column_loses + v * W));
        if (_mm256_movemask_ps((__m256)(any > 0.0f))) {
            round_of_block<ROWS, V>(values, n, pairs + strip_to_rests, units,
                                    strip + rest_unit * width, c, false, row_loses, column_loses);
            alignas(32) int16_t rests[ROWS][SHARED];
            alignas(32) bf16 edge[SHARED];
            const int16_t* at[ROWS];
            for (int i = 0; i < ROWS; ++i) {
                int64_t own = row - left.first + (i < count ? i : count - 1);
                Block(left.a + own * left.lda + k, n, LEFT_BITS, edge).rests(rests[i]);
                at[i] = rests[i];
            }
            round_of_block<ROWS, V>(at, n, pairs, rest_units, strip + unit * width, c, false,
                                    row_loses, column_loses);
        }
        for (int i = 0; i < ROWS; ++i) values[i] += SHARED;
    }
}

}  // namespace
#endif

}  // namespace NAMESPACE
