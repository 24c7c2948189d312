// Vectors of one instruction set, without intrinsics where the compiler's vector extensions do.
//
// Every kernel is written once on `vf` (W floats) and compiled once per instruction set, into a
// namespace and exported names of its own (EXPORT). build.py says which flags belong to which set:
//
//     portable    W 4    SSE2 on x86-64, NEON on arm64
//     avx2        W 8    with FMA
//     avx512      W 16   F, BW, DQ, VL
//     avx512bf16  W 16   and dot products of bf16 pairs (DOT_BF16)
//     amx         W 16   and tiles (DOT_BF16, AMX)
//
// bf16 is held as uint16_t. Converting rounds to nearest even and keeps NaN a NaN, as torch does.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef ISA
#error "compiled by build.py, which defines ISA"
#endif

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define NAMESPACE JOIN(decal_, ISA)
// The name under which kernels/native.py finds a function of this instruction set.
#define EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) void JOIN(decal_##name##_, ISA)

#if defined(__AVX512F__)
#define DECAL_W 16
#elif defined(__AVX2__)
#define DECAL_W 8
#else
#define DECAL_W 4
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace NAMESPACE {

using bf16 = uint16_t;
constexpr int W = DECAL_W;

typedef float vf __attribute__((vector_size(4 * DECAL_W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * DECAL_W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * DECAL_W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * DECAL_W), aligned(2), may_alias));

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }

INLINE float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// (GCC 12 cuts the conversion of a whole vector into halves, hence the intrinsics.)
INLINE vf widen(vh x) {
#if defined(__AVX512F__)
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined(__AVX2__)
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
    return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}

// Of words below 2^16.
INLINE vh low_halves(vu x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i halves = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
    return __builtin_convertvector(x, vh);
#endif
}

INLINE vh narrow(vf x) {
#if defined(DOT_BF16)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vi nan = x != x;
    rounded = (rounded & ~(vu)nan) | (0x7fc0u & (vu)nan);
    return low_halves(rounded);
#endif
}

INLINE vf load(const bf16* p) { return widen(*reinterpret_cast<const vh*>(p)); }
INLINE void store(bf16* p, vf x) { *reinterpret_cast<vh*>(p) = narrow(x); }

// The first n < W values; the others are zero.
template <class T>
INLINE vf load_part(const T* p, int64_t n) {
    T held[W] = {};
    memcpy(held, p, n * sizeof(T));
    return load(held);
}
template <class T>
INLINE void store_part(T* p, vf x, int64_t n) {
    T held[W];
    store(held, x);
    memcpy(p, held, n * sizeof(T));
}

INLINE float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float out = 0;
    for (int i = 0; i < W; ++i) out += x[i];
    return out;
#endif
}
INLINE float largest(vf x) {
    float out = x[0];
    for (int i = 1; i < W; ++i) out = x[i] > out ? x[i] : out;
    return out;
}
// Where a and b cannot be compared, b. The intrinsics are what gcc does not make of the
// comparisons.
#if defined(__AVX512F__)
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif

INLINE float magnitude(float x) { return __builtin_fabsf(x); }
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// exp to 2 units in the last place of a float: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
// (degree 6, minimax). Below -87.3 it is 0 to rounding, above 88.3 it stays at the largest power;
// NaN stays NaN, because min and max return their second argument where they cannot compare.
INLINE vf exp(vf x) {
    vf bounded = min(splat(88.37626f), max(splat(-87.33654f), x));
    vf n = bounded * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f;
    vf t = bounded - n * 0.693359375f;
    t = t - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * t + 1.3981999507e-3f;
    p = p * t + 8.3334519073e-3f;
    p = p * t + 4.1665795894e-2f;
    p = p * t + 1.6666665459e-1f;
    p = p * t + 5.0000001201e-1f;
    p = p * t * t + t + 1.0f;
    vu power = (vu)(__builtin_convertvector(n, vi) + 127) << 23;
    return p * (vf)power;
}

}  // namespace NAMESPACE
