// Scratch memory of kernels.
//
// std::vector would do, but its functions have one name for all instruction sets: what the compiler
// leaves as calls, the linker takes from any of them, and a processor may not have that one. So
// kernels use no template of the standard library that is more than a few inlined instructions.
#pragma once
#include <cstdlib>

#include "vec.h"

namespace NAMESPACE {

// Memory of one thread that grows and is used again by its next call.
template <class T>
struct Room {
    T* at = nullptr;
    size_t size = 0;
    T* get(size_t n) {
        if (n > size) {
            free(at);
            size = (n * sizeof(T) + 4095) / 4096 * 4096 / sizeof(T);
            at = static_cast<T*>(aligned_alloc(4096, size * sizeof(T)));
        }
        return at;
    }
    ~Room() { free(at); }
};

}  // namespace NAMESPACE
