// Cross-entropy over rows of logits: see kernels/reference_loss.py.
//
// A row stays in the L2 cache while it is read for its maximum, for the sum of exponentials and,
// with the gradient, once more to be overwritten. The exponentials are computed twice: keeping them
// would take four bytes each where the logit takes two.
#include <cmath>
#include <limits>

#include "parallel.h"
#include "rows.h"

namespace NAMESPACE {

constexpr int64_t IGNORED = -100;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// exp, and 0 instead of the smallest normal number where x lies below it.
INLINE vf share_of(vf x) {
    vf value = exp(x);
    return x < -87.33654f ? vf{} : value;
}

template <class T>
INLINE float loss_row(T* logits, int64_t n, int64_t target, bool gradient) {
    vf tops[4] = {splat(LOWEST), splat(LOWEST), splat(LOWEST), splat(LOWEST)};
    over(n, [&](int64_t i, auto count, auto lane)
                INLINE_LAMBDA { tops[lane] = max(get(logits + i, count, LOWEST), tops[lane]); });
    float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    vf sums[4] = {};
    over(n, [&](int64_t i, auto count, auto lane)
                INLINE_LAMBDA { sums[lane] += share_of(get(logits + i, count, LOWEST) - top); });
    float total = sum(sums);
    float below = top - get(logits + target, 1)[0];
    if (gradient) {
        float scale = 1.0f / total;
        float aimed = share_of(splat(-below))[0] * scale;
        over(n, [&](int64_t i, auto count, auto) INLINE_LAMBDA {
            put(logits + i, share_of(get(logits + i, count) - top) * scale, count);
        });
        put(logits + target, splat(aimed - 1.0f), 1);
    }
    return std::log(total) + below;
}

// Rows are dealt in turn, since those without a loss take no time.
template <class T>
void losses_of(T* logits, int64_t stride, const int64_t* targets, int64_t rows, int64_t n,
               bool gradient, float* losses, int threads) {
    decal::for_each_thread(threads, [&](int thread, int of) {
        for (int64_t row = thread; row < rows; row += of) {
            T* at = logits + row * stride;
            bool ignored = targets[row] == IGNORED;
            losses[row] = ignored ? 0.0f : loss_row(at, n, targets[row], gradient);
            if (ignored && gradient) memset(at, 0, n * sizeof(T));
        }
    });
}

}  // namespace NAMESPACE

// Targets must be in [0, vocabulary), or -100.
EXPORT(softmax_loss)(void* logits, int64_t stride, int half, const int64_t* targets, int64_t rows,
                     int64_t vocabulary, int gradient, float* losses, int threads) {
    using namespace NAMESPACE;
    auto run = [&](auto type) {
        using T = decltype(type);
        losses_of(static_cast<T*>(logits), stride, targets, rows, vocabulary, gradient != 0, losses,
                  threads);
    };
    half ? run(bf16{}) : run(float{});
}
