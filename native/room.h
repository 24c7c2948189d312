// Scratch memory of kernels.
//
// std::vector<float> would do, but its functions have one name for all instruction sets: what the
// compiler leaves as calls, the linker takes from any of them, and a processor may not have that
// one. So kernels use templates of the standard library only on types of their own namespace, or
// where nothing is left of them but a few instructions (std::min). tests/test_build.py looks.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "vec.h"

namespace NAMESPACE {

// Memory of one thread that is used again by its next call. It grows; it shrinks where it is large
// and most of it was for a call that needed far more, so that one long sequence does not hold its
// scratch for ever. There is no way to report that memory has run out, so that ends the process.
template <class T>
struct Room {
    static constexpr size_t PAGE = 4096, KEPT = size_t{4} << 20;
    T* at = nullptr;
    size_t held = 0;  // bytes

    T* get(size_t n) {
        size_t bytes = (n * sizeof(T) + PAGE - 1) / PAGE * PAGE;
        if (bytes > held || (held > KEPT && bytes < held / 4)) {
            free(at);
            at = bytes ? static_cast<T*>(aligned_alloc(PAGE, bytes)) : nullptr;
            if (bytes && !at) {
                fprintf(stderr, "decal: no memory for %zu bytes of scratch\n", bytes);
                abort();
            }
            held = bytes;
        }
        return at;
    }
    ~Room() { free(at); }
};

}  // namespace NAMESPACE
