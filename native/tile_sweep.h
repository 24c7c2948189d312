// A block of rows of a product against strips of its columns, in AMX tiles: gemm.cpp's inner part.
//
// Rows of A lie in L1 while the strips' panels stream past it (tile_product.h). A contraction that
// L1 does not hold goes in chunks, and C waits in float between them. While one strip multiplies,
// vectors round and store the one before it, and mask the one behind it.
//
// Rejected: fetching panels into L1, and what is written to, ahead of time (slower or the same);
// chunks of 12, 16 and 24 steps; strips of 64 columns.
#pragma once
#include "product.h"
#include "room.h"
#include "tile_product.h"

#if defined(AMX)
namespace NAMESPACE {

// A chunk of the contraction whose rows of A stay in L1 while strips pass by.
constexpr int64_t CHUNK = 20;  // steps

// What of a pass a block of rows meets, in stages: all strips go through one before the next.
struct Stages {
    static constexpr int MOST = 48;
    Run runs[MOST];
    int count = 0;
    int ends[MOST];     // of each stage, in runs
    bool masked[MOST];  // what they leave
    int stages = 0;

    void close(bool masks) {
        ends[stages] = count;
        masked[stages++] = masks;
    }
};

// Rows of a whole strip that wait in floats: they are finished while the next is multiplied.
struct Ending {
    const float *at, *end;
    bf16* out;
    int64_t ldout;
    const bf16 *bias, *add;
    int64_t ldadd;

    Ending() = default;
    Ending(const Product& p, const float* c, Range rows, int64_t n0)
        : at(c),
          end(c + (rows.end - rows.begin) * WIDTH),
          out(static_cast<bf16*>(p.out) + rows.begin * p.ldout + n0),
          ldout(p.ldout),
          bias(p.bias ? p.bias + n0 : nullptr),
          add(p.add ? p.add + rows.begin * p.ldadd + n0 : nullptr),
          ldadd(p.ldadd) {}

    INLINE void go_on(int rows) {
        for (; at < end && rows; --rows, at += WIDTH, out += ldout) {
            vf low = load(at), high = load(at + W);
            if (bias) low += load(bias), high += load(bias + W);
            if (add) {
                low += load(add), high += load(add + W);
                add += ldadd;
            }
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
    }
};

// Rows of a strip that wait to be masked before more is added to them.
struct Masking {
    const Keep* keep;
    float* at;
    int64_t row, end, n0, held, width;

    INLINE void go_on(int rows) {
        for (; row < end && rows; --rows, ++row, at += width) drop(*keep, row, n0, held, at);
    }
};

// A piece's rows in whole tiles: where they lie, or a copy of them in `room`, which moves on.
inline Run rows_of(const Product& p, const Piece& piece, Range rows, bf16*& room) {
    const Segment& s = *piece.segment;
    const int64_t depth = piece.end - piece.begin, height = rows.end - rows.begin;
    Run run{s.a + (rows.begin - s.begin) * s.lda + piece.begin, s.lda,
            (depth + TILE_STEP - 1) / TILE_STEP, piece.panel, rows.end < s.end};
    const bool drops = p.masked == Masked::left;
    // Tiles read whole rows of whole tiles; and rows 2 KB apart would share sets of L1.
    if (!drops && height == TILE_ROWS && depth % TILE_STEP == 0 && s.lda % 1024) return run;
    const int64_t wide = run.steps * TILE_STEP, ld = wide + TILE_STEP;
    for (int h = 0; h < TILE_ROWS; ++h) {
        bf16* own = room + h * ld;
        int64_t held = h < height ? depth : 0;
        if (held && drops)
            drop(*p.keep, rows.begin + h, piece.begin, held, run.a + h * s.lda, own);
        else if (held)
            memcpy(own, run.a + h * s.lda, held * sizeof(bf16));
        memset(own + held, 0, (wide - held) * sizeof(bf16));
    }
    run = {room, ld, run.steps, run.at, false};
    room += TILE_ROWS * ld;
    return run;
}

inline Stages stages_of(const Product& p, const Pass& pass, Range rows) {
    static thread_local Room<bf16> copies;
    Stages stages;
    int64_t copied = 0, deep = 0;
    for (int i = 0; i < pass.count; ++i)
        copied += pass.pieces[i].end - pass.pieces[i].begin + 2 * TILE_STEP;
    bf16* room = copies.get(TILE_ROWS * copied);
    for (int i = 0; i < pass.count; ++i) {
        const Piece& piece = pass.pieces[i];
        if (rows.begin < piece.segment->begin || rows.begin >= piece.segment->end) continue;
        Run run = rows_of(p, piece, rows, room);
        const int64_t chunks = (run.steps + CHUNK - 1) / CHUNK;
        const int64_t most = chunks ? (run.steps + chunks - 1) / chunks : 0;
        for (int64_t left = run.steps; left; left -= run.steps) {
            run.steps = std::min(left, most);
            if (deep && deep + run.steps > CHUNK) stages.close(false), deep = 0;
            stages.runs[stages.count++] = run;
            deep += run.steps;
            run.a += run.steps * TILE_STEP;
            run.at += run.steps * TILE_STEP / 2;
        }
        if (masks(p, piece)) stages.close(true), deep = 0;
    }
    stages.close(false);
    return stages;
}

// 32 rows of C, or fewer, that the same segments serve, against strips whose panels lie `apart`.
inline void sweep(const Product& p, const Pass& pass, const Strip* strips, int64_t count,
                  int64_t apart, Range rows, int64_t below) {
    static thread_local Room<float> scratch;
    constexpr int64_t SIZE = TILE_ROWS * WIDTH;
    const int height = static_cast<int>(rows.end - rows.begin);
    const Stages stages = stages_of(p, pass, rows);
    float* own = scratch.get((stages.stages > 1 ? count : 2) * SIZE);
    auto masking = [&](int64_t i) INLINE_LAMBDA {
        const int64_t n0 = strips[i].n0, width = strips[i].vectors * W;
        const int64_t held = std::min(width, p.N - n0);
        return Masking{p.keep, own + i * SIZE, rows.begin, rows.end, n0, held, width};
    };
    Ending ending{};
    for (int stage = 0; stage < stages.stages; ++stage) {
        const Run* runs = stages.runs + (stage ? stages.ends[stage - 1] : 0);
        const int held = static_cast<int>(stages.runs + stages.ends[stage] - runs);
        const bool first = stage == 0, last = stage + 1 == stages.stages;
        const bool masked = stage && stages.masked[stage - 1];
        if (masked) masking(0).go_on(TILE_ROWS);
        for (int64_t i = 0; i < count; ++i) {
            const int width = strips[i].vectors * W;
            float* c = own + (stages.stages > 1 ? i : i % 2) * SIZE;
            float* between = strips[i].between ? strips[i].between + below * width : nullptr;
            if (first && !pass.first) memcpy(c, between, height * width * sizeof(float));
            const float* from = first && pass.first ? nullptr : c;
            Masking behind = masked && i + 1 < count ? masking(i + 1) : Masking{};
            auto meanwhile = [&]() INLINE_LAMBDA {
                ending.go_on(2);
                behind.go_on(2);
            };
            const int at = static_cast<int>(i), of = static_cast<int>(count);
            const Range soon = decal::share(TILE_ROWS, at, of);
            const Range next{soon.begin + TILE_ROWS, soon.end + TILE_ROWS};
            const Panel* panel = pass.panel + i * apart;
            if (width == WIDTH)
                tile_product<2>(runs, held, panel, from, c, next, meanwhile);
            else
                tile_product<1>(runs, held, panel, from, c, next, meanwhile);
            ending.go_on(TILE_ROWS);
            behind.go_on(TILE_ROWS);
            if (!last) continue;
            if (!pass.last)
                memcpy(between, c, height * width * sizeof(float));
            else if (p.output != rounded || i + 1 == count || strips[i].n0 + WIDTH > p.N)
                finish(p, c, rows.begin, height, strips[i].n0, width);
            else
                ending = Ending(p, c, rows, strips[i].n0);
        }
    }
}

}  // namespace NAMESPACE
#endif
