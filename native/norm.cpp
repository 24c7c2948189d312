// RMSNorm and its gradient: see kernels/reference_norm.py. A row is read twice, from the cache the
// second time.
#include <cmath>

#include "parallel.h"
#include "rows.h"

namespace NAMESPACE {

template <class T>
INLINE void norm_row(const T* x, const T* weight, float eps, int64_t n, T* y, float* rstd) {
    vf squares[4] = {};
    over(n, [&](int64_t i, auto count, auto lane) INLINE_LAMBDA {
        vf value = get(x + i, count);
        squares[lane] += value * value;
    });
    float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
    *rstd = scale;
    over(n, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
        put(y + i, rounded<T>(get(x + i, count) * scale) * get(weight + i, count), count);
    });
}

template <class T>
INLINE void back_row(const T* grad, const T* x, const T* weight, float rstd, const T* add,
                     int64_t n, T* dx) {
    vf products[4] = {};
    over(n, [&](int64_t i, auto count, auto lane) INLINE_LAMBDA {
        products[lane] +=
            get(grad + i, count) * get(weight + i, count) * (get(x + i, count) * rstd);
    });
    float mean = sum(products) / static_cast<float>(n);
    over(n, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
        vf inner = get(grad + i, count) * get(weight + i, count);
        vf value = (inner - get(x + i, count) * rstd * mean) * rstd;
        if (add) value += get(add + i, count);
        put(dx + i, value, count);
    });
}

template <class T>
void norm(const T* x, const T* weight, float eps, int64_t rows, int64_t n, T* y, float* rstd,
          int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row)
            norm_row(x + row * n, weight, eps, n, y + row * n, rstd + row);
    });
}

template <class T>
void back(const T* grad, const T* x, const T* weight, const float* rstd, const T* add, int64_t rows,
          int64_t n, T* dx, int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row) {
            int64_t at = row * n;
            back_row(grad + at, x + at, weight, rstd[row], add ? add + at : add, n, dx + at);
        }
    });
}

}  // namespace NAMESPACE

EXPORT(rms_norm)(const void* x, const void* weight, int half, float eps, int64_t rows,
                 int64_t features, void* y, float* rstd, int threads) {
    using namespace NAMESPACE;
    auto run = [&](auto type) {
        using T = decltype(type);
        norm(static_cast<const T*>(x), static_cast<const T*>(weight), eps, rows, features,
             static_cast<T*>(y), rstd, threads);
    };
    half ? run(bf16{}) : run(float{});
}

// `add` may be null.
EXPORT(rms_norm_backward)(const void* grad, const void* x, const void* weight, const float* rstd,
                          const void* add, int half, int64_t rows, int64_t features, void* dx,
                          int threads) {
    using namespace NAMESPACE;
    auto run = [&](auto type) {
        using T = decltype(type);
        back(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(weight),
             rstd, static_cast<const T*>(add), rows, features, static_cast<T*>(dx), threads);
    };
    half ? run(bf16{}) : run(float{});
}
