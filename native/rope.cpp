// Rotary position embedding: see kernels/reference_rope.py. Rows of x and of the result may be
// strided; heads and features lie one after the other. The result may be x.
#include "parallel.h"
#include "rows.h"

namespace NAMESPACE {

struct Heads {
    int64_t rows, heads, size;
    int64_t width;  // of cos and sin; features from here on are copied
    int64_t from_stride, to_stride;
    bool inverse;
};

template <class T, class A>
INLINE void turn_head(const Heads& shape, const T* x, const A* cos, const A* sin, T* out) {
    int64_t half = shape.width / 2;
    over(half, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
        vf first = get(x + i, count), second = get(x + half + i, count);
        vf cos_1 = get(cos + i, count), cos_2 = get(cos + half + i, count);
        vf sin_1 = get(sin + i, count), sin_2 = get(sin + half + i, count);
        vf to_first = shape.inverse ? second * sin_2 : -(second * sin_1);
        vf to_second = shape.inverse ? -(first * sin_1) : first * sin_2;
        put(out + i, first * cos_1 + to_first, count);
        put(out + half + i, second * cos_2 + to_second, count);
    });
    if (out != x)
        memcpy(out + shape.width, x + shape.width, (shape.size - shape.width) * sizeof(T));
}

template <class T, class A>
void turn(const Heads& shape, const T* x, const A* cos, const A* sin, T* out, int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(shape.rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row) {
            const A *row_cos = cos + row * shape.width, *row_sin = sin + row * shape.width;
            for (int64_t head = 0; head < shape.heads; ++head) {
                const T* from = x + row * shape.from_stride + head * shape.size;
                T* to = out + row * shape.to_stride + head * shape.size;
                turn_head(shape, from, row_cos, row_sin, to);
            }
        }
    });
}

}  // namespace NAMESPACE

EXPORT(rotate)(const void* x, int64_t x_stride, int half, const void* cos, const void* sin,
               int half_angles, int inverse, int64_t rows, int64_t heads, int64_t size,
               int64_t width, void* out, int64_t out_stride, int threads) {
    using namespace NAMESPACE;
    Heads shape{rows, heads, size, width, x_stride, out_stride, inverse != 0};
    auto run = [&](auto type, auto angle) {
        using T = decltype(type);
        using A = decltype(angle);
        turn(shape, static_cast<const T*>(x), static_cast<const A*>(cos),
             static_cast<const A*>(sin), static_cast<T*>(out), threads);
    };
    if (half)
        half_angles ? run(bf16{}, bf16{}) : run(bf16{}, float{});
    else
        half_angles ? run(float{}, bf16{}) : run(float{}, float{});
}
