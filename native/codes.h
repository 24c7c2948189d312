// Lookup of 4-bit codes in a table of sixteen bf16, the inner loop of whoever unpacks weights.
#pragma once
#include "vec.h"

namespace NAMESPACE {

// Sixteen values in registers, in the order of their codes.
struct Sixteen {
    vh part[16 / W];
};

#if defined(__AVX2__) && !defined(__AVX512BW__)
constexpr int64_t CODES = 16;
#else
constexpr int64_t CODES = 32;
#endif

// Two values per byte of `packed`, the one of the high nibble first; `bytes` is a multiple of
// CODES / 2. A strip of a product is CODES values wide, or more.
INLINE void look_up(const uint8_t* packed, int64_t bytes, const Sixteen& table, bf16* out) {
#if defined(__AVX512BW__)
    // Only the low five bits of a lookup count, so the table stands twice and bit 4 is left as is.
    __m512i words = _mm512_broadcast_i64x4((__m256i)table.part[0]);
    for (int64_t i = 0; i < bytes; i += 16) {
        __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
        _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, words));
    }
#elif defined(__AVX2__)
    // One table of low bytes and one of high bytes, whose results are interleaved.
    __m128i byte = _mm_set1_epi16(255), nibble = _mm_set1_epi8(15);
    __m128i a = (__m128i)table.part[0], b = (__m128i)table.part[1];
    __m128i lows = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    __m128i highs = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    for (int64_t i = 0; i < bytes; i += 8) {
        __m128i pair = _mm_loadl_epi64((const __m128i*)(packed + i));
        __m128i first = _mm_and_si128(_mm_srli_epi16(pair, 4), nibble);
        __m128i index = _mm_unpacklo_epi8(first, _mm_and_si128(pair, nibble));
        __m128i low = _mm_shuffle_epi8(lows, index), high = _mm_shuffle_epi8(highs, index);
        __m128i* to = (__m128i*)(out + 2 * i);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(low, high));
    }
#else
    bf16 values[16];
    memcpy(values, &table, sizeof values);
    for (int64_t i = 0; i < bytes; ++i) {
        out[2 * i] = values[packed[i] >> 4];
        out[2 * i + 1] = values[packed[i] & 15];
    }
#endif
}

// W integers of 8 bits as floats. (GCC 12 cuts the conversion of a whole vector into pieces.)
INLINE vf whole_numbers(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t vc __attribute__((vector_size(DECAL_W), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const vc*>(p), vf);
#endif
}

}  // namespace NAMESPACE
