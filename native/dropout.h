// Which elements are kept: the second stage of the hash in kernels/reference_dropout.py.
#pragma once
#include "vec.h"

namespace NAMESPACE {

// kernels/native_project.py has the same fields in the same order.
struct Keep {
    const int32_t* offset;  // [T]
    const int32_t* factor;  // [T]
    const int32_t* column;  // [F]
    const int32_t* least;   // [T], or one for all rows
    int64_t every;          // 1, or 0 where there is one
};

// All ones where element (row, columns c.. of `column`) is kept.
INLINE vi kept(vi column, int32_t offset, int32_t factor, int32_t least) {
    vi x = (vi)((vu)column + static_cast<uint32_t>(offset));
    x = x ^ (x >> 15);
    return (vi)((vu)x * static_cast<uint32_t>(factor)) >= least;
}

INLINE bool kept(int32_t column, int32_t offset, int32_t factor, int32_t least) {
    uint32_t sum = static_cast<uint32_t>(column) + static_cast<uint32_t>(offset);
    int32_t x = static_cast<int32_t>(sum);
    x ^= x >> 15;
    return static_cast<int32_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(factor)) >= least;
}

// values[i] = kept ? values[i] : 0 for columns begin.. of one row; `out` may be `values`.
INLINE void drop(const Keep& keep, int64_t row, int64_t begin, int64_t n, const bf16* values,
                 bf16* out) {
    int32_t offset = keep.offset[row], factor = keep.factor[row];
    int32_t least = keep.least[row * keep.every];
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vi bits =
            kept(*reinterpret_cast<const vi*>(keep.column + begin + i), offset, factor, least);
        typedef int16_t vs __attribute__((vector_size(2 * DECAL_W), aligned(2), may_alias));
        vs mask = __builtin_convertvector(bits, vs);
        *reinterpret_cast<vs*>(out + i) = *reinterpret_cast<const vs*>(values + i) & mask;
    }
    for (; i < n; ++i)
        out[i] = kept(keep.column[begin + i], offset, factor, least) ? values[i] : bf16{0};
}

INLINE void drop(const Keep& keep, int64_t row, int64_t begin, int64_t n, float* values) {
    int32_t offset = keep.offset[row], factor = keep.factor[row];
    int32_t least = keep.least[row * keep.every];
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vi bits =
            kept(*reinterpret_cast<const vi*>(keep.column + begin + i), offset, factor, least);
        *reinterpret_cast<vi*>(values + i) &= bits;
    }
    for (; i < n; ++i)
        if (!kept(keep.column[begin + i], offset, factor, least)) values[i] = 0;
}

}  // namespace NAMESPACE
