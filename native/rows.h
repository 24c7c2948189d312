// Loops over the values of a row, unrolled four times, the last few of a row included.
#pragma once
#include <type_traits>

#include "vec.h"

namespace NAMESPACE {

// How many values a step of a loop handles: all W, known to the compiler, or what is left.
using All = std::integral_constant<int64_t, W>;
template <int I>
using Lane = std::integral_constant<int, I>;

template <class T>
INLINE vf get(const T* p, All, float = 0) {
    return load(p);
}
// Values beyond the first n are `rest`.
template <class T>
INLINE vf get(const T* p, int64_t n, float rest = 0) {
    T held[W];
    store(held, splat(rest));
    memcpy(held, p, n * sizeof(T));
    return load(held);
}

template <class T>
INLINE void put(T* p, vf x, All) {
    store(p, x);
}
template <class T>
INLINE void put(T* p, vf x, int64_t n) {
    store_part(p, x, n);
}

// step(at, how many, lane) over [0, n): the lane, 0 to 3, says which of four accumulators to use,
// so that one addition need not wait for the one before.
template <class Step>
INLINE void over(int64_t n, Step&& step) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        step(i, All{}, Lane<0>{});
        step(i + W, All{}, Lane<1>{});
        step(i + 2 * W, All{}, Lane<2>{});
        step(i + 3 * W, All{}, Lane<3>{});
    }
    for (; i + W <= n; i += W) step(i, All{}, Lane<0>{});
    if (i < n) step(i, n - i, Lane<1>{});
}

INLINE float sum(const vf (&x)[4]) { return sum((x[0] + x[1]) + (x[2] + x[3])); }

// What x is once it has been stored as T.
template <class T>
INLINE vf rounded(vf x) {
    if constexpr (std::is_same_v<T, bf16>) return widen(narrow(x));
    return x;
}

}  // namespace NAMESPACE
