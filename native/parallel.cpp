#include "parallel.h"

#include <chrono>
#include <thread>
#include <vector>

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

Parallel openmp_parallel = nullptr;
Number openmp_thread = nullptr;
Number openmp_threads = nullptr;

struct Call {
    void (*body)(void*, int, int);
    void* context;
};

void in_team(void* given) {
    const Call& call = *static_cast<const Call*>(given);
    call.body(call.context, openmp_thread(), openmp_threads());
}

}  // namespace

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch has loaded.
extern "C" __attribute__((visibility("default"))) void decal_use_openmp(void* parallel,
                                                                        void* thread,
                                                                        void* threads) {
    openmp_parallel = reinterpret_cast<Parallel>(parallel);
    openmp_thread = reinterpret_cast<Number>(thread);
    openmp_threads = reinterpret_cast<Number>(threads);
}

void decal::run(int threads, void (*body)(void*, int, int), void* context) {
    if (openmp_parallel) {
        Call call{body, context};
        openmp_parallel(in_team, &call, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(body, context, i, threads);
    body(context, 0, threads);
    for (std::thread& member : team) member.join();
}

// Products of a few tens of microseconds meet here: sleeping would take longer than they do. The
// yield is for a team of more threads than there are processors.
void decal::meet(Meeting& meeting, int threads) {
    if (threads == 1) return;
    const int round = meeting.round.load(std::memory_order_relaxed);
    if (meeting.here.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        meeting.here.store(0, std::memory_order_relaxed);
        meeting.round.store(round + 1, std::memory_order_release);
        return;
    }
    for (int turns = 0; meeting.round.load(std::memory_order_acquire) == round; ++turns) {
#if defined(__x86_64__)
        if (turns < 1000) __builtin_ia32_pause();
#endif
        if (turns >= 1000) std::this_thread::yield();
    }
}

double decal::seconds() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(now).count();
}

// How many threads a kernel gets that asks for `threads`.
extern "C" __attribute__((visibility("default"))) int decal_team(int threads) {
    int found = 0;
    decal::for_each_thread(threads, [&](int thread, int of) {
        if (thread == 0) found = of;
    });
    return found;
}
