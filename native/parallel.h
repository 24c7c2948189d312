// Threads: torch's own OpenMP team, borrowed, so that two pools never fight for the same cores.
//
// kernels/native.py hands over the addresses of torch's runtime (decal_use_openmp). Where there is
// none to borrow, threads are started for every call. How many is an argument of every kernel.
#pragma once
#include <atomic>
#include <cstdint>

namespace decal {

// Runs body(context, thread, threads) on up to `threads` threads; fewer if the runtime says so.
void run(int threads, void (*body)(void*, int, int), void* context);

// for_each_thread(n, [&](int thread, int threads) { ... })
template <class F>
void for_each_thread(int threads, F&& body) {
    if (threads <= 1) {
        body(0, 1);
        return;
    }
    run(threads, [](void* f, int thread, int of) { (*static_cast<F*>(f))(thread, of); }, &body);
}

// Where the threads of one team wait for each other.
struct Meeting {
    std::atomic<int> here{0}, round{0};
};
void meet(Meeting& meeting, int threads);

double seconds();  // of a clock that only goes on

struct Range {
    int64_t begin, end;
};

// The part of [0, n) that is `thread`'s, cut at multiples of `grain`.
__attribute__((always_inline)) inline Range share(int64_t n, int thread, int threads,
                                                  int64_t grain = 1) {
    int64_t blocks = (n + grain - 1) / grain;
    int64_t begin = blocks * thread / threads * grain;
    int64_t end = blocks * (thread + 1) / threads * grain;
    return {begin < n ? begin : n, end < n ? end : n};
}

}  // namespace decal
