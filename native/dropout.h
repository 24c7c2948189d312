// Which elements are kept: the second stage of the hash in kernels/reference_dropout.py.
#pragma once
#include "vec.h"

namespace NAMESPACE {

// All ones where element (row, columns c.. of `column`) is kept.
INLINE vi kept(vi column, int32_t offset, int32_t factor, int32_t least) {
    vi x = (vi)((vu)column + static_cast<uint32_t>(offset));
    x = x ^ (x >> 15);
    return (vi)((vu)x * static_cast<uint32_t>(factor)) >= least;
}

// kernels/native_project.py has the same fields in the same order.
struct Keep {
    const int32_t* offset;  // [T]
    const int32_t* factor;  // [T]
    const int32_t* column;  // [F]
    const int32_t* least;   // [T], or one for all rows
    int64_t every;          // 1, or 0 where there is one

    // All ones where element (row, features f ..) is kept.
    INLINE vi mask(int64_t row, int64_t f) const {
        return kept(*reinterpret_cast<const vi*>(column + f), offset[row], factor[row],
                    least[row * every]);
    }
};

INLINE bool kept(int32_t column, int32_t offset, int32_t factor, int32_t least) {
    uint32_t sum = static_cast<uint32_t>(column) + static_cast<uint32_t>(offset);
    int32_t x = static_cast<int32_t>(sum);
    x ^= x >> 15;
    return static_cast<int32_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(factor)) >= least;
}

#if defined(__AVX512BW__)
// A bit for each of 16 columns.
INLINE __mmask16 kept(const int32_t* column, __m512i offset, __m512i factor, __m512i least) {
    __m512i x = _mm512_add_epi32(_mm512_loadu_si512(column), offset);
    x = _mm512_xor_si512(x, _mm512_srai_epi32(x, 15));
    return _mm512_cmpge_epi32_mask(_mm512_mullo_epi32(x, factor), least);
}
#endif

// values[i] = kept ? values[i] : 0 for columns begin.. of one row; `out` may be `values`.
INLINE void drop(const Keep& keep, int64_t row, int64_t begin, int64_t n, const bf16* values,
                 bf16* out) {
    int32_t offset = keep.offset[row], factor = keep.factor[row];
    int32_t least = keep.least[row * keep.every];
    int64_t i = 0;
#if defined(__AVX512BW__)
    const __m512i offsets = _mm512_set1_epi32(offset), factors = _mm512_set1_epi32(factor);
    const __m512i leasts = _mm512_set1_epi32(least);
    for (; i + 2 * W <= n; i += 2 * W) {
        const int32_t* column = keep.column + begin + i;
        __mmask16 low = kept(column, offsets, factors, leasts);
        __mmask16 high = kept(column + W, offsets, factors, leasts);
        __m512i both = _mm512_loadu_si512(values + i);
        both = _mm512_maskz_mov_epi16(_mm512_kunpackw(high, low), both);
        _mm512_storeu_si512(out + i, both);
    }
#endif
    for (; i + W <= n; i += W) {
        vi bits =
            kept(*reinterpret_cast<const vi*>(keep.column + begin + i), offset, factor, least);
        vh mask = low_halves((vu)bits >> 16);
        *reinterpret_cast<vh*>(out + i) = *reinterpret_cast<const vh*>(values + i) & mask;
    }
    for (; i < n; ++i)
        out[i] = kept(keep.column[begin + i], offset, factor, least) ? values[i] : bf16{0};
}

INLINE void drop(const Keep& keep, int64_t row, int64_t begin, int64_t n, float* values) {
    int32_t offset = keep.offset[row], factor = keep.factor[row];
    int32_t least = keep.least[row * keep.every];
    int64_t i = 0;
#if defined(__AVX512BW__)
    const __m512i offsets = _mm512_set1_epi32(offset), factors = _mm512_set1_epi32(factor);
    const __m512i leasts = _mm512_set1_epi32(least);
    for (; i + W <= n; i += W) {
        __mmask16 bits = kept(keep.column + begin + i, offsets, factors, leasts);
        store(values + i, (vf)_mm512_maskz_loadu_ps(bits, values + i));
    }
#else
    for (; i + W <= n; i += W) {
        vi bits =
            kept(*reinterpret_cast<const vi*>(keep.column + begin + i), offset, factor, least);
        *reinterpret_cast<vi*>(values + i) &= bits;
    }
#endif
    for (; i < n; ++i)
        if (!kept(keep.column[begin + i], offset, factor, least)) values[i] = 0;
}

}  // namespace NAMESPACE
