// SwiGLU and its gradient: see kernels/reference_swiglu.py. Rows of the inputs may be strided.
#include "parallel.h"
#include "rows.h"

namespace NAMESPACE {

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
void swiglu(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t rows,
            int64_t n, T* out, int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row) {
            const T *gates = gate + row * gate_stride, *ups = up + row * up_stride;
            T* to = out + row * n;
            over(n, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
                vf g = get(gates + i, count);
                put(to + i, g * sigmoid(g) * get(ups + i, count), count);
            });
        }
    });
}

template <class T>
struct Gradients {
    T *gate, *up, *h;
};

template <class T>
void back(const T* const (&from)[3], const int64_t (&strides)[3], int64_t rows, int64_t n,
          Gradients<T> to, int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row) {
            const T *grad = from[0] + row * strides[0], *gate = from[1] + row * strides[1];
            const T* up = from[2] + row * strides[2];
            int64_t first = row * n;
            over(n, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
                vf d = get(grad + i, count), g = get(gate + i, count), u = get(up + i, count);
                vf s = sigmoid(g);
                vf active = g * s;
                put(to.gate + first + i, d * u * (s * (1.0f + g * (1.0f - s))), count);
                put(to.up + first + i, d * active, count);
                put(to.h + first + i, active * u, count);
            });
        }
    });
}

}  // namespace NAMESPACE

EXPORT(swiglu)(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int half,
               int64_t rows, int64_t features, void* out, int threads) {
    using namespace NAMESPACE;
    auto run = [&](auto type) {
        using T = decltype(type);
        swiglu(static_cast<const T*>(gate), gate_stride, static_cast<const T*>(up), up_stride, rows,
               features, static_cast<T*>(out), threads);
    };
    half ? run(bf16{}) : run(float{});
}

EXPORT(swiglu_backward)(const void* grad, int64_t grad_stride, const void* gate,
                        int64_t gate_stride, const void* up, int64_t up_stride, int half,
                        int64_t rows, int64_t features, void* d_gate, void* d_up, void* h,
                        int threads) {
    using namespace NAMESPACE;
    auto run = [&](auto type) {
        using T = decltype(type);
        const T* from[3] = {static_cast<const T*>(grad), static_cast<const T*>(gate),
                            static_cast<const T*>(up)};
        int64_t strides[3] = {grad_stride, gate_stride, up_stride};
        Gradients<T> to{static_cast<T*>(d_gate), static_cast<T*>(d_up), static_cast<T*>(h)};
        back(from, strides, rows, features, to, threads);
    };
    half ? run(bf16{}) : run(float{});
}
