// Which instruction sets this processor runs, and the operating system's leave for AMX; and which
// sources the library is of.
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
bool amx_allowed() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool has_cpuid_bit(unsigned leaf, unsigned subleaf, char which, int bit) {
    unsigned a = leaf, b = 0, c = subleaf, d = 0;
    unsigned highest = 0;
    asm volatile("cpuid" : "=a"(highest) : "a"(0) : "ebx", "ecx", "edx");
    if (highest < leaf) return false;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    unsigned found = which == 'a' ? a : which == 'd' ? d : b;
    return found >> bit & 1;
}
#endif

}  // namespace

// 1 if the kernels compiled for `name` run here. Asking for amx asks Linux for leave to use the
// tiles. Leave is the process's: it holds for threads that run already, is inherited by fork and
// lost by exec. It is refused while some thread has a signal stack too small for the larger state;
// then amx is not supported here.
extern "C" __attribute__((visibility("default"))) int decal_supports(const char* name) {
    if (!strcmp(name, "portable")) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool bf16 = avx512 && has_cpuid_bit(7, 1, 'a', 5);
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512bf16")) return bf16;
#if defined(EMULATED_TILES)
    if (!strcmp(name, "amx")) return bf16;
#endif
    if (!strcmp(name, "amx"))
        return bf16 && has_cpuid_bit(7, 0, 'd', 22) && has_cpuid_bit(7, 0, 'd', 24) &&
               amx_allowed();
#endif
    return 0;
}

// Callers cannot see a compiled function's parameters: of other sources, they must not call it.
extern "C" __attribute__((visibility("default"))) const char* decal_sources() { return SOURCES; }
