// y = x W^T for at most 8 rows of x: decoding, where every weight is read once and memory decides.
//
// A row of W is unpacked in pieces that stay in the L1 cache (stored.h) and multiplied by all rows
// of x at once, in float. Threads share the rows of W, so each reads one stream. x is copied before,
// as the product takes it: padded with zeros, and widened to float where the processor has no
// products of bf16 pairs. Unpacking into registers instead of L1 was not needed to keep up with
// memory, and one loop serves all formats.
#include <vector>

#include "parallel.h"
#include "stored.h"
#include "vec.h"

namespace NAMESPACE {
namespace {

using decal::Range;

constexpr int64_t PIECE = 2048;      // values of a row that are unpacked at a time
constexpr int64_t STEP = 128;        // pieces are padded to a multiple
constexpr int64_t SERIAL = 1 << 15;  // weights below which threads do not pay

#if defined(DOT_BF16)
using Input = bf16;
constexpr int LANES = 2 * W;
INLINE vf add_product(vf sum, const Input* x, vf weight) {
    __m512bh pairs = (__m512bh)_mm512_loadu_si512(x);
    return (vf)_mm512_dpbf16_ps((__m512)sum, pairs, (__m512bh)weight);
}
INLINE vf weights(const bf16* p) { return (vf)_mm512_loadu_si512(p); }
#else
using Input = float;
constexpr int LANES = W;
INLINE vf add_product(vf sum, const Input* x, vf weight) { return sum + load(x) * weight; }
INLINE vf weights(const bf16* p) { return load(p); }
#endif

// The rows of x one after the other, `ld` values apart, zeros behind the last column; begins with a
// cache line.
const Input* prepared(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, int64_t ld) {
    static thread_local std::vector<Input> room;
    constexpr uintptr_t line = 64;
    room.assign(rows * ld + line / sizeof(Input), Input{});
    uintptr_t begin = reinterpret_cast<uintptr_t>(room.data());
    Input* out = reinterpret_cast<Input*>((begin + line - 1) / line * line);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; ++i)
#if defined(DOT_BF16)
            out[row * ld + i] = x[row * ldx + i];
#else
            out[row * ld + i] = to_float(x[row * ldx + i]);
#endif
    return out;
}

// Several chains of additions for each row of x, as far as there are registers for them.
template <int T>
struct Sums {
    static constexpr int CHAINS = T <= 2 ? 4 : W == 16 || T <= 4 ? 2 : 1;
    vf part[T][CHAINS] = {};

    // n is a multiple of STEP.
    INLINE void add(const bf16* row, const Input* x, int64_t ld, int64_t n) {
        for (int64_t i = 0; i < n; i += CHAINS * LANES)
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain) {
                vf weight = weights(row + i + chain * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    part[t][chain] =
                        add_product(part[t][chain], x + t * ld + i + chain * LANES, weight);
            }
    }
    INLINE float total(int t) const {
        vf all = part[t][0];
        for (int chain = 1; chain < CHAINS; ++chain) all += part[t][chain];
        return sum(all);
    }
};

// Scales of `count` blocks from `first` on; product and sum are rounded one by one.
INLINE void scales_of(const Stored& w, int64_t first, int64_t count, float* out) {
    if (!w.nested) {
        memcpy(out, static_cast<const float*>(w.scales) + first, count * sizeof(float));
        return;
    }
    const uint8_t* index = static_cast<const uint8_t*>(w.scales) + first;
    for (int64_t i = 0; i < count;) {
        int64_t end = (first + i) / 256 * 256 + 256 - first;
        float nested = w.nested[(first + i) / 256];
        for (end = end < count ? end : count; i < end; ++i) out[i] = w.table[index[i]] * nested;
    }
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < count; ++i) out[i] += w.offset;
}

// Whether no block of 4-bit codes straddles two rows or two pieces.
bool aligned(const Stored& w) {
    return w.format == code4 && w.cols % w.block_size == 0 && w.block_size % 32 == 0 &&
           (PIECE % w.block_size == 0 || w.block_size % PIECE == 0);
}

// n values of the flattened weight from `at` on, a piece of an aligned one.
INLINE const bf16* unpacked(const Stored& w, int64_t at, int64_t first, int64_t n, bf16* room) {
    int64_t block = w.block_size < PIECE ? w.block_size : PIECE, count = n / block;
    float scale[PIECE / 32];
    scales_of(w, first, count, scale);
    const uint8_t* packed = static_cast<const uint8_t*>(w.data) + at / 2;
    vf code[16 / W];
    for (int i = 0; i < 16; i += W) code[i / W] = load(w.code + i);
    for (int64_t b = 0; b < count; ++b) {
        Sixteen table;
        for (int i = 0; i < 16 / W; ++i) table.part[i] = narrow(code[i] * scale[b]);
        if (block == 64)
            look_up(packed + b * 32, 32, table, room + b * 64);
        else
            look_up(packed + b * block / 2, block / 2, table, room + b * block);
    }
    return room;
}

template <int T>
void some_rows(const Stored& w, Range rows, const Input* x, int64_t ld, bf16* y, int64_t ldy) {
    alignas(64) bf16 room[PIECE], last[STEP];
    int64_t piece = w.format == dense ? w.cols : PIECE;
    bool whole_blocks = aligned(w);
    int64_t blocks = whole_blocks ? w.cols / w.block_size : 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        Sums<T> sums;
        for (int64_t begin = 0; begin < w.cols; begin += piece) {
            int64_t n = w.cols - begin < piece ? w.cols - begin : piece, whole = n / STEP * STEP;
            const bf16* values =
                whole_blocks ? unpacked(w, row * w.cols + begin,
                                        row * blocks + begin / w.block_size, n, room)
                             : row_values(w, row, begin, begin + n, room);
            sums.add(values, x + begin, ld, whole);
            if (whole == n) continue;
            memset(last, 0, sizeof last);
            memcpy(last, values + whole, (n - whole) * sizeof(bf16));
            sums.add(last, x + begin + whole, ld, STEP);
        }
        for (int t = 0; t < T; ++t) y[t * ldy + row] = to_bf16(sums.total(t));
    }
}

}  // namespace
}  // namespace NAMESPACE

using namespace NAMESPACE;

// x [rows, w.cols] and y [rows, w.rows] in bf16, with distances between rows; rows from 1 to 8.
EXPORT(gemv)(const Stored* w, const bf16* x, int64_t ldx, int64_t rows, bf16* y, int64_t ldy,
             int threads) {
    using Body = void (*)(const Stored&, Range, const Input*, int64_t, bf16*, int64_t);
    static constexpr Body bodies[] = {some_rows<1>, some_rows<2>, some_rows<3>, some_rows<4>,
                                      some_rows<5>, some_rows<6>, some_rows<7>, some_rows<8>};
    // One more cache line: rows whole pages apart would share a few places of the L1 cache.
    int64_t ld = (w->cols + STEP - 1) / STEP * STEP + 64 / sizeof(Input);
    const Input* input = prepared(x, ldx, rows, w->cols, ld);
    int team = w->rows * w->cols < SERIAL ? 1 : threads;
    decal::for_each_thread(team, [&](int thread, int of) {
        bodies[rows - 1](*w, decal::share(w->rows, thread, of), input, ld, y, ldy);
    });
}
