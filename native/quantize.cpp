// Blocks of 4 and 8 bits and rows of 8-bit integers, bit for bit as in kernels/reference_quant.py
// and kernels/reference_int8.py, which say the layouts and the formulas.
//
// Compiled without contraction: no product may be fused with an addition. Full blocks multiply by
// the reciprocal of their scale, the short last block divides; 127 / absmax is a reciprocal and a
// product, as torch computes it. bf16 is rounded by integers, because the processor's own
// conversion flushes denormals.
//
// The nearest of 16 values is the count of midpoints below x: fifteen comparisons on whole vectors,
// or with AVX-512 four steps of a binary search whose table is one register. Both are fast enough
// to wait for memory. Dequantizing scales the 16 values once per block, rounds them once, and then
// only looks up (codes.h).
#include "codes.h"
#include "parallel.h"
#include "vec.h"

namespace NAMESPACE {
namespace {

using decal::for_each_thread;
using decal::Range;
using decal::share;

constexpr float TINY = 1e-38f;
constexpr float PER_STEP = 7.874015718698502e-3f;  // 1 / 127
constexpr int64_t SERIAL = 1 << 15;                // values below which threads do not pay

INLINE int team(int64_t n, int threads) { return n < SERIAL ? 1 : threads; }

INLINE float value_at(const bf16* x, int64_t i) { return to_float(x[i]); }
INLINE float value_at(const float* x, int64_t i) { return x[i]; }
#if defined(__AVX512F__)
INLINE vi larger(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#else
INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
#endif

// Rounding to bf16 of finite values, denormals included.
INLINE vh rounded(vf x) {
    vu bits = (vu)x;
    return low_halves((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void put(bf16* p, vf x) { *reinterpret_cast<vh*>(p) = rounded(x); }
INLINE void put(float* p, vf x) { store(p, x); }
INLINE void put(bf16* p, float x) { *p = to_bf16(x); }
INLINE void put(float* p, float x) { *p = x; }

// The largest magnitude; NaN if there is one. Bits of magnitudes are in the order of the numbers as
// integers, NaN above infinity, which the maxima of floats leave out.
template <class T>
INLINE float absmax_of(const T* x, int64_t n) {
    vi most = vi{}, other = vi{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        most = larger(most, (vi)magnitude(load(x + i)));
        other = larger(other, (vi)magnitude(load(x + i + W)));
    }
    most = larger(most, other);
    for (; i < n; i += W)
        most = larger(most, (vi)magnitude(load_part(x + i, n - i < W ? n - i : W)));
#if defined(__AVX512F__)
    int32_t bits = _mm512_reduce_max_epi32((__m512i)most);
#else
    int32_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits = most[lane] > bits ? most[lane] : bits;
#endif
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// --- 4 bits: the nearest of 16 -------------------------------------------------------------------

struct Nearest {
    const float* midpoints;  // 15, ascending
    const uint8_t* order;    // code of each rank, or null where they are the same
#if defined(__AVX512F__)
    __m512 table;
    __m512i codes;
#else
    vf table[15];
#endif

    explicit Nearest(const float* given, const uint8_t* ranked) : midpoints(given), order(ranked) {
#if defined(__AVX512F__)
        alignas(64) int32_t wide[16];
        for (int i = 0; i < 16; ++i) wide[i] = order ? order[i] : i;
        table = _mm512_maskz_loadu_ps(0x7fff, given);
        codes = _mm512_load_si512(wide);
#else
        for (int i = 0; i < 15; ++i) table[i] = splat(given[i]);
#endif
    }

    // What `pack` takes: codes already with AVX-512, else ranks.
    INLINE vi ranks(vf x) const {
#if defined(__AVX512F__)
        __m512i rank = _mm512_setzero_si512();
        __m512 value = (__m512)x;
        for (int step = 8; step; step >>= 1) {
            __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            __mmask16 above =
                _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(probe, table), _CMP_GT_OQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        return (vi)_mm512_permutexvar_epi32(rank, codes);
#else
        vi rank = vi{};
        for (int i = 0; i < 15; ++i) rank -= x > table[i];
        return rank;
#endif
    }

    INLINE int code(float x) const {
        int rank = 0;
        for (int i = 0; i < 15; ++i) rank += x > midpoints[i];
        return order ? order[rank] : rank;
    }
};

typedef uint64_t vl __attribute__((vector_size(4 * DECAL_W), aligned(4), may_alias));
typedef uint8_t vb __attribute__((vector_size(DECAL_W / 2), aligned(1), may_alias));

// W ranks to W / 2 bytes, the first of two in the high nibble.
INLINE void pack(uint8_t* out, vi ranks) {
    vl pairs = (vl)ranks;
    *reinterpret_cast<vb*>(out) = __builtin_convertvector((pairs << 4) | (pairs >> 32), vb);
}

#if defined(__AVX512F__)
struct Reordered {
    explicit Reordered(const uint8_t*) {}
    INLINE void apply(uint8_t*, int64_t) const {}
};
#else
// The codes of ranks, two in a byte at a time.
struct Reordered {
    bool same;
    uint8_t byte[256];
    explicit Reordered(const uint8_t* order) : same(!order) {
        for (int i = 0; order && i < 256; ++i)
            byte[i] = static_cast<uint8_t>(order[i >> 4] << 4 | order[i & 15]);
    }
    INLINE void apply(uint8_t* packed, int64_t bytes) const {
        for (int64_t i = 0; !same && i < bytes; ++i) packed[i] = byte[packed[i]];
    }
};
#endif

template <class T>
void quantize_4bit_of(const T* x, int64_t n, int64_t block, const float* midpoints,
                      const uint8_t* order, uint8_t* packed, float* absmax, int threads) {
    int64_t full = n / block;
    for_each_thread(team(n, threads), [&](int thread, int of) {
        Nearest nearest(midpoints, order);
        Reordered codes(order);
        Range mine = share(full, thread, of);
        for (int64_t b = mine.begin; b < mine.end; ++b) {
            const T* values = x + b * block;
            uint8_t* out = packed + b * block / 2;
            float scale = absmax_of(values, block);
            absmax[b] = scale;
            float factor = 1.0f / (scale < TINY ? TINY : scale);
            for (int64_t i = 0; i < block; i += W)
                pack(out + i / 2, nearest.ranks(load(values + i) * factor));
            codes.apply(out, block / 2);
        }
    });
    int64_t begin = full * block;
    if (begin == n) return;
    Nearest nearest(midpoints, order);
    float scale = absmax_of(x + begin, n - begin);
    scale = scale < TINY ? TINY : scale;
    absmax[full] = scale;
    for (int64_t i = begin; i < n; i += 2) {
        int low = i + 1 < n ? nearest.code(value_at(x, i + 1) / scale) : nearest.code(0.0f);
        packed[i / 2] = static_cast<uint8_t>(nearest.code(value_at(x, i) / scale) << 4 | low);
    }
}

// --- 4 bits: the values --------------------------------------------------------------------------

// The values of one block: `bytes` pairs of codes, a multiple of 16, times `scale`.
INLINE void expand(const uint8_t* packed, int64_t bytes, const float* code, float scale,
                   bf16* out) {
    Sixteen table;
    for (int i = 0; i < 16; i += W) table.part[i / W] = rounded(load(code + i) * scale);
    look_up(packed, bytes, table, out);
}

INLINE void expand(const uint8_t* packed, int64_t bytes, const float* code, float scale,
                   float* out) {
#if defined(__AVX512F__)
    __m512 words = (__m512)(load(code) * scale);
    __m512i nibble = _mm512_set1_epi64(15);
    for (int64_t i = 0; i < bytes; i += 8) {
        __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i)));
        __m512i first = _mm512_srli_epi64(pair, 4);
        __m512i second = _mm512_slli_epi64(_mm512_and_si512(pair, nibble), 32);
        _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(_mm512_or_si512(first, second), words));
    }
#else
    float table[16];
    for (int i = 0; i < 16; i += W) store(table + i, load(code + i) * scale);
    for (int64_t i = 0; i < bytes; ++i) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
#endif
}

template <class T>
void dequantize_4bit_to(const uint8_t* packed, const float* absmax, const float* code,
                        int64_t block, int64_t n, T* out, int threads) {
    int64_t full = n / block;
    for_each_thread(team(n, threads), [&](int thread, int of) {
        Range mine = share(full, thread, of);
        for (int64_t b = mine.begin; b < mine.end; ++b)
            expand(packed + b * block / 2, block / 2, code, absmax[b], out + b * block);
    });
    for (int64_t i = full * block; i < n; ++i) {
        int byte = packed[i / 2];
        put(out + i, code[i % 2 ? byte & 15 : byte >> 4] * absmax[full]);
    }
}

// --- 8 bits: the nearest of 256 ------------------------------------------------------------------

INLINE vf pick(const float* table, vi index) {
#if defined(__AVX512F__)
    return (vf)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (vf)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    vf out;
    for (int i = 0; i < W; ++i) out[i] = table[index[i]];
    return out;
#endif
}

// The number of `midpoints` (255 and an infinity behind them) below each of W values.
INLINE vi search(vf x, const float* midpoints) {
    vi rank = vi{};
    for (int step = 128; step; step >>= 1) rank += (x > pick(midpoints, rank + (step - 1))) & step;
    return rank;
}

// --- rows of 8-bit integers ----------------------------------------------------------------------

// Halves go to the even neighbour: adding 1.5 * 2^23 leaves no bits for a fraction.
INLINE int8_t whole(float x) {
    constexpr float shift = 12582912.0f;
    return magnitude(x) <= 127.5f ? static_cast<int8_t>((x + shift) - shift) : 0;
}

template <class T>
void quantize_rows_of(const T* x, int64_t rows, int64_t columns, int8_t* codes, float* absmax,
                      int threads) {
    for_each_thread(team(rows * columns, threads), [&](int thread, int of) {
        Range mine = share(rows, thread, of);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const T* values = x + row * columns;
            int8_t* out = codes + row * columns;
            float scale = absmax_of(values, columns);
            absmax[row] = scale;
            float factor = scale > 0 ? 1.0f / scale * 127.0f : 0.0f;
            for (int64_t i = 0; i < columns; ++i) out[i] = whole(value_at(values, i) * factor);
        }
    });
}

template <class T>
void dequantize_rows_to(const int8_t* codes, const float* absmax, int64_t rows, int64_t columns,
                        T* out, int threads) {
    for_each_thread(team(rows * columns, threads), [&](int thread, int of) {
        Range mine = share(rows, thread, of);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const int8_t* given = codes + row * columns;
            T* values = out + row * columns;
            float scale = absmax[row];
            int64_t i = 0;
            for (; i + W <= columns; i += W)
                put(values + i, whole_numbers(given + i) * scale * PER_STEP);
            for (; i < columns; ++i)
                put(values + i, static_cast<float>(given[i]) * scale * PER_STEP);
        }
    });
}

}  // namespace
}  // namespace NAMESPACE

using namespace NAMESPACE;

// `half` says that the floats are bf16; `block` is a multiple of 32.
EXPORT(quantize_4bit)(const void* x, int half, int64_t n, int64_t block, const float* midpoints,
                      const uint8_t* order, uint8_t* packed, float* absmax, int threads) {
    if (half)
        quantize_4bit_of(static_cast<const bf16*>(x), n, block, midpoints, order, packed, absmax,
                         threads);
    else
        quantize_4bit_of(static_cast<const float*>(x), n, block, midpoints, order, packed, absmax,
                         threads);
}

EXPORT(dequantize_4bit)(const uint8_t* packed, const float* absmax, const float* code,
                        int64_t block, int64_t n, void* out, int half, int threads) {
    if (half)
        dequantize_4bit_to(packed, absmax, code, block, n, static_cast<bf16*>(out), threads);
    else
        dequantize_4bit_to(packed, absmax, code, block, n, static_cast<float*>(out), threads);
}

// `midpoints`: 255, ascending, and an infinity.
EXPORT(quantize_8bit)(const float* x, int64_t n, int64_t block, const float* midpoints,
                      uint8_t* index, float* absmax, int threads) {
    int64_t full = n / block;
    for_each_thread(team(n, threads), [&](int thread, int of) {
        Range mine = share((n + block - 1) / block, thread, of);
        typedef uint8_t vc __attribute__((vector_size(DECAL_W), aligned(1), may_alias));
        for (int64_t b = mine.begin; b < mine.end; ++b) {
            int64_t i = b * block, end = b < full ? i + block : n;
            float scale = absmax_of(x + i, end - i);
            float divisor = scale < TINY ? TINY : scale, factor = 1.0f / divisor;
            absmax[b] = b < full ? scale : divisor;
            for (; b < full && i + W <= end; i += W) {
                vi rank = search(load(x + i) * factor, midpoints);
                *reinterpret_cast<vc*>(index + i) = __builtin_convertvector(rank, vc);
            }
            for (; i < end; ++i) {
                float value = b < full ? x[i] * factor : x[i] / divisor;
                index[i] = static_cast<uint8_t>(search(splat(value), midpoints)[0]);
            }
        }
    });
}

EXPORT(dequantize_8bit)(const uint8_t* index, const float* absmax, const float* code, int64_t block,
                        int64_t n, float* out, int threads) {
    for_each_thread(team(n, threads), [&](int thread, int of) {
        Range mine = share((n + block - 1) / block, thread, of);
        for (int64_t b = mine.begin; b < mine.end; ++b) {
            int64_t end = (b + 1) * block < n ? (b + 1) * block : n;
            float scale = absmax[b];
            for (int64_t i = b * block; i < end; ++i) out[i] = code[index[i]] * scale;
        }
    });
}

EXPORT(quantize_rows)(const void* x, int half, int64_t rows, int64_t columns, int8_t* codes,
                      float* absmax, int threads) {
    if (half)
        quantize_rows_of(static_cast<const bf16*>(x), rows, columns, codes, absmax, threads);
    else
        quantize_rows_of(static_cast<const float*>(x), rows, columns, codes, absmax, threads);
}

EXPORT(dequantize_rows)(const int8_t* codes, const float* absmax, int64_t rows, int64_t columns,
                        void* out, int half, int threads) {
    if (half)
        dequantize_rows_to(codes, absmax, rows, columns, static_cast<bf16*>(out), threads);
    else
        dequantize_rows_to(codes, absmax, rows, columns, static_cast<float*>(out), threads);
}
