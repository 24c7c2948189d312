// Products of bf16 by integers, for processors that multiply no bf16: block floating point.
//
// 128 values that follow each other along the contraction become integers of 16 bits that share an
// exponent. `vpmaddwd` multiplies sixteen pairs of them and adds them two by two, where a fused
// multiply-add of floats does eight, and a block's sum in 32 bits is exact:
//
//     value = integer * unit,  unit a power of two;  |left| <= 8160, |right| <= 2040,
//     8160 * 2040 * 128 < 2^31
//
// A bf16 has 8 significant bits. So what is less than 2^5 times smaller than the largest of its
// block is exact on the left, where activations and gradients are, and less than 2^3 times on the
// right, where weights are. Smaller values are rounded to the nearest unit. That is less than a
// fifth of what rounding y to bf16 is, unless one value on the left dwarfs the others of its block,
// as it happens in activations: the others would lose their digits, and so might the weight that
// the large one meets. Where a block of the left loses more than rounding it to bf16 anew would,
// what both sides lost is multiplied too, in rounds of their own:
//
//     y = first first + rest first + first rest
//
// What is left: a weight that dwarfs the others of its block (a hundred times) takes digits from
// them, which matters where what it meets on the left is small. NF4 and int8 have no such weights.
//
// Blocks are summed in float, in their order. A block with NaN or infinity is NaN; one whose
// largest magnitude is below 2^-114 is zero.
#pragma once
#include "room.h"
#include "vec.h"

#if DECAL_W == 8
#define BLOCK_FLOAT
#endif

namespace NAMESPACE {

constexpr int64_t SHARED = 128;  // values that share an exponent

// Rows of the left operand, from `first` of C on: `ld` integers each, and for each of their
// `blocks` two units, of these integers and of the rest, 0 where that is left out. Rests lie `rest`
// values on.
struct Integers {
    const int16_t* values;
    const float* units;
    int64_t ld, blocks, rest, first;
    const uint8_t* rests;  // blocks in which some row has a rest; null if there are none
};

#if defined(BLOCK_FLOAT)
namespace {

constexpr int LEFT_BITS = 12, RIGHT_BITS = 10;  // of the largest, below its leading bit
constexpr int64_t AHEAD_OF_L1 = 512;            // floats: 2 KB from L2
// A rest matters where it is more than this share of the values, the largest left out and large
// ones cut. In a block of normal values it is a fiftieth to a twentieth of that.
constexpr float LOST = 0x1p-8f, LARGE = 256.0f, LARGEST = 2048.0f;
INLINE constexpr float rests_in_unit(int bits) { return static_cast<float>(2 << bits); }

// What values are multiplied with, and what their integers stand for, by the bits of the largest
// magnitude as bf16. One of eight blocks per lane.
struct Exponents {
    vf factor, unit;
    INLINE Exponents(vu largest, int bits) {
        vu exponent = largest >> 7;
        vi kept = exponent > 12u, number = exponent < 255u;
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
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// SHARED values that follow each other, read as often as it takes.
struct Block {
    const bf16* x;
    int bits;
    Exponents e;

    // The first n values of `from`, and zeros, by way of `edge` where there are fewer than SHARED.
    INLINE Block(const bf16* from, int64_t n, int given, bf16* edge)
        : x(filled(from, n, edge)), bits(given), e(largest() - vu{}, given) {}

    INLINE float unit() const { return e.unit[0]; }
    INLINE float unit_of_rest() const { return e.unit[0] / rests_in_unit(bits); }
    INLINE void integers(int16_t* out) const {
        for (int i = 0; i < SHARED; i += 16) put(out + i, scaled(i), scaled(i + 8));
    }
    INLINE void rest(int16_t* out) const {
        for (int i = 0; i < SHARED; i += 16) put(out + i, rest_at(i), rest_at(i + 8));
    }
    INLINE bool loses() const {
        vf lost{}, kept{};
        for (int i = 0; i < SHARED; i += 8) {
            vf value = scaled(i);
            lost += magnitude(value - nearest(value));
            vi counts = magnitude(value) < LARGEST;
            kept += (vf)((vi)min(magnitude(value), splat(LARGE)) & counts);
        }
        return sum(lost) > LOST * sum(kept);
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

// A row of k values as integers, with zeros up to whole blocks; `rests` is told where it has any.
inline void left_row(const bf16* x, int64_t k, int16_t* out, int16_t* rest, float* units,
                     uint8_t* rests) {
    alignas(32) bf16 edge[SHARED];
    for (int64_t at = 0, b = 0; at < k; at += SHARED, ++b) {
        const Block block(x + at, k - at < SHARED ? k - at : SHARED, LEFT_BITS, edge);
        block.integers(out + at);
        units[2 * b] = block.unit();
        units[2 * b + 1] = 0.0f;
        if (!block.loses()) continue;
        block.rest(rest + at);
        units[2 * b + 1] = block.unit_of_rest();
        rests[b] = 1;
    }
}

INLINE int64_t blocks_of(int64_t k) { return (k + SHARED - 1) / SHARED; }

// A strip of the right operand: for each block `width` units, then SHARED / 2 rows of pairs. Behind
// it another of the rests, if the left has any.
INLINE int64_t strip_depth(int64_t k) { return blocks_of(k) * (SHARED / 2 + 1); }

// A strip that is packed, block by block.
struct Strips {
    float* at;
    int64_t rest;  // floats from a block to its rest
    const uint8_t* rests;
    INLINE Strips(float* panel, int width, int64_t depth, const Integers& left)
        : at(panel), rest(strip_depth(depth) * width), rests(left.rests) {}
    INLINE bool has_rest(int64_t block) const { return rests && rests[block]; }
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

// `width` rows of bf16, whose contraction is along them.
inline void strip_along(int width, int64_t depth, const bf16* const* rows, Strips strips) {
    alignas(32) bf16 edge[SHARED];
    alignas(32) int16_t room[16 * SHARED], rest[16 * SHARED];
    for (int64_t k = 0, b = 0; k < depth; k += SHARED, ++b, strips.at += (SHARED / 2 + 1) * width) {
        int64_t n = depth - k < SHARED ? depth - k : SHARED;
        bool both = strips.has_rest(b);
        for (int j = 0; j < width; ++j) {
            const Block block(rows[j] + k, n, RIGHT_BITS, edge);
            block.integers(room + j * SHARED);
            strips.at[j] = block.unit();
            if (!both) continue;
            block.rest(rest + j * SHARED);
            strips.at[strips.rest + j] = block.unit_of_rest();
        }
        float* pairs = strips.at + width;
        for (int j = 0; j < width; j += 8)
            for (int64_t i = 0; i < (n + 1) / 2; i += 8) {
                turn(room + j * SHARED + 2 * i, SHARED, pairs + i * width + j, width);
                if (both)
                    turn(rest + j * SHARED + 2 * i, SHARED, pairs + strips.rest + i * width + j,
                         width);
            }
    }
}

// Up to SHARED rows of `width` values in bf16, whose contraction runs over the rows, as one block.
// Behind the last row there is one of zeros.
inline void block_across(int width, int64_t n, const bf16 (*rows)[16], const Strips& strips,
                         bool both) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t k = 0; k < n; ++k) most = _mm256_max_epu16(most, magnitudes(halves(rows[k])));
    alignas(32) uint16_t largest[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(largest), most);
    auto put = [](float* to, vf first, vf second) INLINE_LAMBDA {
        __m256i pair = _mm256_slli_epi32(whole(second), 16);
        pair = _mm256_blend_epi16(whole(first), pair, 0xaa);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pair);
    };
    constexpr float RESTS = rests_in_unit(RIGHT_BITS);
    float* pairs = strips.at + width;
    for (int j = 0; j < width; j += 8) {
        const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(largest + j));
        const Exponents e((vu)_mm256_cvtepu16_epi32(eight), RIGHT_BITS);
        store(strips.at + j, e.unit);
        if (both) store(strips.at + strips.rest + j, e.unit / RESTS);
        for (int64_t k = 0; k < n; k += 2) {
            float* to = pairs + k / 2 * width + j;
            vf first = load(rows[k] + j) * e.factor, second = load(rows[k + 1] + j) * e.factor;
            put(to, first, second);
            if (both)
                put(to + strips.rest, (first - nearest(first)) * RESTS,
                    (second - nearest(second)) * RESTS);
        }
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

// C [ROWS, V vectors] (+)= integers [k, end) of the rows times a block, in units of the two.
template <int ROWS, int V>
INLINE void round_of_block(const int16_t* const (&values)[ROWS], int64_t k, int64_t end,
                           const float* block, const float (&units)[ROWS], float* c, bool fresh) {
    __m256i sums[ROWS][V];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[i][v] = _mm256_setzero_si256();
    for (const float* pairs = block + V * W; k < end; k += 2, pairs += V * W) {
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
            vf sum = (vf)_mm256_cvtepi32_ps(sums[i][v]) * units[i];
            float* out = c + (i * V + v) * W;
            vf before = fresh ? vf{} : load(out);
            store(out, before + sum * load(block + v * W));
        }
}

// C [ROWS, V vectors] (+)= rows of integers from `row` on, `count` of them there, times a strip.
template <int ROWS, int V>
void multiply_integers(const Integers& left, int64_t row, int count, int64_t depth,
                       const float* strip, float* c, bool fresh) {
    const int16_t* values[ROWS];
    const float* units[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        int64_t own = row - left.first + (i < count ? i : count - 1);
        values[i] = left.values + own * left.ld;
        units[i] = left.units + own * 2 * left.blocks;
    }
    const int64_t to_rest = strip_depth(depth) * V * W;
    for (int64_t k = 0, b = 0; k < depth; k += SHARED, ++b, strip += (SHARED / 2 + 1) * V * W) {
        int64_t end = k + SHARED < depth ? k + SHARED : depth;
        float first[ROWS], rest[ROWS], own[ROWS];
        bool any = false;
        for (int i = 0; i < ROWS; ++i) {
            first[i] = units[i][2 * b];
            rest[i] = units[i][2 * b + 1];
            own[i] = rest[i] != 0.0f ? first[i] : 0.0f;
            any |= rest[i] != 0.0f;
        }
        round_of_block<ROWS, V>(values, k, end, strip, first, c, fresh && k == 0);
        if (!any) continue;
        // Rows without a rest meet what is left there of another product, in units of zero.
        int64_t to = left.rest;
        round_of_block<ROWS, V>(values, k + to, end + to, strip, rest, c, false);
        round_of_block<ROWS, V>(values, k, end, strip + to_rest, own, c, false);
    }
}

}  // namespace
#endif

}  // namespace NAMESPACE
