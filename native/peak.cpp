// The yardstick of the benches: how fast this instruction set multiplies matrices at best.
//
// One block of C += A B that stays in registers, with A and B in L1: every operand is loaded as a
// real product loads it, and nothing else is done. What a kernel reaches is stated as a share of
// this. Nothing in the library calls it.
//
//     amx         2 x 2 tiles of float32 from bf16 tiles       16 KB of A, 16 KB of B
//     DOT_BF16    6 x 4 vectors of float32 from bf16 pairs      1.5 KB of A, 16 KB of B
//     AVX2        6 x 2 vectors of int32 from int16 pairs       1.5 KB of A, 4 KB of B
//     otherwise   6 x COLUMNS vectors of float32                1.5 KB of A, up to 16 KB of B
#include "block_float.h"
#include "parallel.h"
#include "tiles.h"

namespace NAMESPACE {

#if defined(DOT_BF16)
using Element = bf16;
#elif defined(BLOCK_FLOAT)
using Element = int16_t;
#else
using Element = float;
#endif

#if defined(AMX)

struct alignas(64) Operands {
    static constexpr int steps = 8;
    bf16 a[steps][2][16 * 32];
    bf16 b[steps][2][16 * 32];
    float c[4][16 * 16];
};

constexpr double flops_per_step = 4.0 * 2 * 16 * 16 * 32;

void multiply(Operands& o, int64_t rounds) {
    [[maybe_unused]] Tiles tiles;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t round = 0; round < rounds; ++round) {
        for (int k = 0; k < Operands::steps; ++k) {
            tile_load<4>(o.a[k][0], 64);
            tile_load<6>(o.b[k][0], 64);
            tile_dot<0, 4, 6>();
            tile_load<7>(o.b[k][1], 64);
            tile_dot<1, 4, 7>();
            tile_load<5>(o.a[k][1], 64);
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
        }
    }
    tile_store<0>(o.c[0], 64);
    tile_store<1>(o.c[1], 64);
    tile_store<2>(o.c[2], 64);
    tile_store<3>(o.c[3], 64);
}

#else

constexpr int ROWS = 6;
#if defined(__AVX512F__)
constexpr int COLUMNS = 4;  // 24 of 32 registers
#else
constexpr int COLUMNS = 2;  // 12 of 16
#endif

struct alignas(64) Operands {
    static constexpr int steps = 64;
    float a[steps][ROWS];  // each may stand for a pair of elements, as in b
    float b[steps][COLUMNS * W];
    float c[ROWS][COLUMNS * W];
};

constexpr double flops_per_step = 2.0 * sizeof(float) / sizeof(Element) * ROWS * COLUMNS * W;
INLINE vf spread(const float* word) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vf)_mm256_broadcast_ss(word);
#else
    return splat(*word);
#endif
}
INLINE void multiply_add(vf& c, vf a, vf b) {
#if defined(DOT_BF16)
    c = (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#elif defined(BLOCK_FLOAT)
    add_products(c, a, b);
#else
    c += a * b;
#endif
}

void multiply(Operands& o, int64_t rounds) {
    vf c[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) c[i][j] = vf{};
    for (int64_t round = 0; round < rounds; ++round) {
        for (int k = 0; k < Operands::steps; ++k) {
            vf b[COLUMNS];
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; ++j) b[j] = load(o.b[k] + j * W);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < COLUMNS; ++j) multiply_add(c[i][j], spread(o.a[k] + i), b[j]);
        }
        // Another round must not be the sum of the rounds before it, or be left out.
        asm volatile("" ::: "memory");
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) store(o.c[i] + j * W, c[i][j]);
}

#endif

// Random numbers of both signs: multiplying zeros takes less power, and so less time.
void scatter(void* to, size_t bytes) {
    uint32_t state = 1;
    for (size_t i = 0; i < bytes / sizeof(Element); ++i) {
        state = state * 1664525u + 1013904223u;
        float value = static_cast<int32_t>(state) * 0x1p-31f;
#if defined(DOT_BF16)
        Element element = to_bf16(value);
#elif defined(BLOCK_FLOAT)
        Element element = static_cast<Element>(value * 2047);
#else
        Element element = value;
#endif
        memcpy(static_cast<Element*>(to) + i, &element, sizeof element);
    }
}

void fill(Operands& o) {
    scatter(o.a, sizeof o.a);
    scatter(o.b, sizeof o.b);
}

}  // namespace NAMESPACE

// Runs `rounds` blocks on each of at most `threads` threads; done[t] are the operations of thread
// t.
EXPORT(peak)(int64_t rounds, double* done, int threads) {
    using namespace NAMESPACE;
    decal::for_each_thread(threads, [&](int thread, int) {
        static thread_local Operands operands;
        fill(operands);
        multiply(operands, rounds);
        done[thread] = rounds * Operands::steps * flops_per_step;
    });
}
