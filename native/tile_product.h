// C [32, 16 V] = sum of A [32, 32 steps] B [32 steps, 16 V], in tiles: what gemm.cpp does with AMX.
//
// A lies in rows, in L1 for as long as several B meet it; B lies in panels that L2 holds, pairs
// along the contraction side by side, and is read once for these rows of A. So its tiles are loaded
// past L1, which is 1.3 times as fast as any prefetching of them into it.
#pragma once
#include "parallel.h"
#include "tiles.h"

#if defined(AMX)
namespace NAMESPACE {

constexpr int64_t TILE_ROWS = 32;  // of C
constexpr int64_t TILE_STEP = 32;  // of the contraction

struct Run {
    const bf16* a;
    int64_t lda;
    int64_t steps;
    int64_t at;    // row of the panel, a pair of the contraction each
    bool goes_on;  // A has more rows behind these
};

// `from`: what is added to, or null. `from` and `to` are [32, 16 V]. `meanwhile` is called once in
// every step: tiles multiply while vectors do something else. Of the next rows of A, those `soon`
// are fetched into L2: between its rows lie too many bytes for the processor to look ahead.
template <int V, class F>
INLINE void tile_product(const Run* runs, int count, const uint32_t* panel, const float* from,
                         float* to, decal::Range soon, F&& meanwhile) {
    constexpr int64_t wide = 16 * V, bytes = wide * 4;
    if (from) {
        tile_load<0>(from, bytes), tile_load<1>(from + 16 * wide, bytes);
        if (V == 2) tile_load<2>(from + 16, bytes), tile_load<3>(from + 16 * wide + 16, bytes);
    } else {
        tile_zero<0>(), tile_zero<1>();
        if (V == 2) tile_zero<2>(), tile_zero<3>();
    }
    for (int i = 0; i < count; ++i) {
        const bf16* a = runs[i].a;
        const int64_t lda = runs[i].lda;
        const uint32_t* b = panel + runs[i].at * wide;
        const decal::Range next = runs[i].goes_on ? soon : decal::Range{0, 0};
        for (int64_t k = 0; k < runs[i].steps; ++k, a += TILE_STEP, b += TILE_STEP / 2 * wide) {
            tile_load<4>(a, lda * 2);
            tile_stream<6>(b, bytes);
            tile_dot<0, 4, 6>();
            tile_load<5>(a + 16 * lda, lda * 2);
            tile_dot<1, 5, 6>();
            if (V == 2) {
                tile_stream<7>(b + 16, bytes);
                tile_dot<2, 4, 7>();
                tile_dot<3, 5, 7>();
            }
            for (int64_t row = next.begin; row < next.end; ++row)
                _mm_prefetch(reinterpret_cast<const char*>(a + row * lda), _MM_HINT_T1);
            meanwhile();
        }
    }
    tile_store<0>(to, bytes), tile_store<1>(to + 16 * wide, bytes);
    if (V == 2) tile_store<2>(to + 16, bytes), tile_store<3>(to + 16 * wide + 16, bytes);
}

}  // namespace NAMESPACE
#endif
