// AMX tiles: eight of 16 rows by 64 bytes, one configuration for all kernels.
//
// The configuration belongs to the thread, and oneDNN changes it: `Tiles` loads ours on entry to a
// parallel region and releases it on exit. With EMULATED_TILES the instructions are plain loops, so
// that everything around them can be tested on a processor without them.
#pragma once
#include "vec.h"

namespace NAMESPACE {

#if defined(AMX) && defined(EMULATED_TILES)

alignas(64) inline thread_local unsigned char emulated_tiles[8][16][64];

template <int tile>
INLINE void tile_load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        memcpy(emulated_tiles[tile][i], static_cast<const char*>(from) + i * stride, 64);
}
template <int tile>
INLINE void tile_stream(const void* from, int64_t stride) {
    tile_load<tile>(from, stride);
}
template <int tile>
INLINE void tile_zero() {
    memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}
template <int tile>
INLINE void tile_store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[tile][i], 64);
}
template <int c, int a, int b>
INLINE void tile_dot() {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 16; ++j) {
                bf16 x[2], y[2];
                float sum;
                memcpy(x, emulated_tiles[a][i] + 4 * k, 4);
                memcpy(y, emulated_tiles[b][k] + 4 * j, 4);
                memcpy(&sum, emulated_tiles[c][i] + 4 * j, 4);
                sum += to_float(x[0]) * to_float(y[0]);
                sum += to_float(x[1]) * to_float(y[1]);
                memcpy(emulated_tiles[c][i] + 4 * j, &sum, 4);
            }
}
struct Tiles {};

#elif defined(AMX)

// The compilers' own intrinsics take literal tile numbers only.
template <int tile>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
// What is read once from L2 and must not push the rest out of L1.
template <int tile>
INLINE void tile_stream(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int c, int a, int b>
INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
struct Tiles {
    Tiles() {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        // (The compilers' intrinsic says that it reads eight bytes; they may leave out the others.)
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { asm volatile("tilerelease"); }
};

#else

struct Tiles {};

#endif

}  // namespace NAMESPACE
