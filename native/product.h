// What a product of gemm.cpp is given, how it is cut, and what becomes of its sums.
#pragma once
#include <algorithm>

#include "block_float.h"
#include "dropout.h"
#include "parallel.h"
#include "stored.h"

namespace NAMESPACE {

using decal::Range;

// kernels/native_project.py has the same fields in the same order.
struct Segment {
    const bf16* a;
    int64_t lda;
    int64_t k;
    int64_t begin, end;  // the rows of C that it serves; `a` begins with the first of them
    int32_t across;
    int32_t turned;  // `a` lies as [k, rows]; of a product's only segment
    Stored weight;
};

enum Masked : int32_t { nothing = 0, after_leading = 1, left = 2, right = 3 };
enum Output : int32_t { rounded = 0, floats = 1, floats_transposed = 2 };

struct Product {
    const Segment* segments;
    int32_t count;
    int32_t leading;  // segments at the beginning that `after_leading` masks; one a row at most
    int64_t M, N;
    const Keep* keep;
    int32_t masked;
    const bf16* bias;
    const bf16* add;
    int64_t ldadd;
    void* out;
    int64_t ldout;
    int32_t output;
    float factor;    // of what is left in floats
    double seconds;  // what it took, for benches
};

constexpr int64_t DEPTH = 2048;
// Gradients of factors, which alone are left in floats: few rows use a panel. 30 % less time with
// AVX-512, 10 % with AVX2, than in passes of DEPTH.
constexpr int64_t SHALLOW = 256;
INLINE int64_t depth_of_pass(const Product& p) { return p.output == rounded ? DEPTH : SHALLOW; }
#if DECAL_W == 16 && !defined(AMX)
constexpr int WIDEST = 4;
#else
constexpr int WIDEST = 2;
#endif
constexpr int WIDTH = WIDEST * W;

#if defined(DOT_BF16)
using Panel = uint32_t;  // one pair of bf16
constexpr int64_t STEP = 2;
#else
using Panel = float;
constexpr int64_t STEP = 1;
#endif

struct Piece {
    const Segment* segment;
    int64_t begin, end;  // of the segment's contraction
    int64_t panel;       // where its panel begins
    int64_t wide;        // and its rows as floats
    bool shares;         // exponents: it is multiplied in integers
    Integers integers;
};

struct Strip {
    int64_t n0;
    int vectors;
    float* between;  // C of all rows in float, where there are several passes
};

// One row of a strip in its final form.
INLINE void finish_row(const Product& p, const float* sums, int64_t row, int64_t n0,
                       int64_t width) {
    const int64_t held = std::min(width, p.N - n0);
    if (p.output == floats) {
        float* out = static_cast<float*>(p.out) + row * p.ldout + n0;
        for (int64_t j = 0; j < held; ++j) out[j] = p.factor * sums[j];
        return;
    }
    bf16* out = static_cast<bf16*>(p.out) + row * p.ldout + n0;
    const bf16* add = p.add ? p.add + row * p.ldadd + n0 : nullptr;
    const bf16* bias = p.bias ? p.bias + n0 : nullptr;
    int64_t j = 0;
    for (; j + W <= held; j += W) {
        vf y = load(sums + j);
        if (bias) y += load(bias + j);
        if (add) y += load(add + j);
        store(out + j, y);
    }
    if (j < held) {
        vf y = load(sums + j);
        if (bias) y += load_part(bias + j, held - j);
        if (add) y += load_part(add + j, held - j);
        store_part(out + j, y, held - j);
    }
}

inline void finish(const Product& p, const float* c, int64_t row, int rows, int64_t n0, int width) {
    if (p.output == floats_transposed) {
        for (int64_t j = 0; j < std::min<int64_t>(width, p.N - n0); ++j) {
            float* out = static_cast<float*>(p.out) + (n0 + j) * p.ldout + row;
            for (int i = 0; i < rows; ++i) out[i] = p.factor * c[i * width + j];
        }
        return;
    }
    for (int i = 0; i < rows; ++i) finish_row(p, c + i * width, row + i, n0, width);
}

// One pass over a strip: what of the contraction it covers, packed.
struct Pass {
    const Piece* pieces;
    int count;
    const Panel* panel;
    bool first, last;
    float* wide;   // room for the floats of a block of rows, all pieces
    bool widened;  // they are there: the rows are one block, and met another strip before
};

// Behind the last leading piece of a row, its mask.
INLINE bool masks(const Product& p, const Piece& piece) {
    return p.masked == after_leading && piece.segment < p.segments + p.leading &&
           piece.end == piece.segment->k;
}
INLINE void mask(const Product& p, int64_t row, int rows, int64_t n0, int width, float* c) {
    for (int h = 0; h < rows; ++h)
        drop(*p.keep, row + h, n0, std::min<int64_t>(width, p.N - n0), c + h * width);
}

}  // namespace NAMESPACE
