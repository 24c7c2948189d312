// A stored weight [rows, cols] and its rows as bf16: what kernels/stored.py calls `Stored`.
//
//     dense   bf16, `stride` values between rows
//     code4   two 4-bit codes a byte, the first in the high nibble, rows without gaps between them;
//             value = code[index] * scale of its block, in float, rounded once. Blocks run over the
//             flattened weight. Scales are float, or bytes: table[byte] * nested[block / 256] +
//             offset (double quantization).
//     rows8   int8 and one float a row: value = code * scale / 127
#pragma once
#include "codes.h"
#include "vec.h"

namespace NAMESPACE {

constexpr float PER_STEP = 7.874015718698502e-3f;  // 1 / 127

enum Format : int32_t { dense = 0, code4 = 1, rows8 = 2 };

// kernels/native_stored.py has the same fields in the same order.
struct Stored {
    int32_t format;
    int32_t block_size;
    int64_t rows, cols;
    int64_t stride;
    const void* data;
    const void* scales;
    const float* nested;
    const float* table;
    const float* code;
    float offset;

    INLINE float scale(int64_t block) const {
        if (!nested) return static_cast<const float*>(scales)[block];
        // Product and sum are rounded one by one, as the reference does.
        volatile float product =
            table[static_cast<const uint8_t*>(scales)[block]] * nested[block / 256];
        return product + offset;
    }
};

// Values `begin` to `end` (exclusive) of the flattened code4 weight, inside one block.
INLINE void block_values(const Stored& w, float scale, int64_t begin, int64_t end, bf16* out) {
    Sixteen sixteen;
    for (int i = 0; i < 16; i += W) sixteen.part[i / W] = narrow(load(w.code + i) * scale);
    const uint8_t* bytes = static_cast<const uint8_t*>(w.data);
    int64_t at = begin;
    if (at % 2 == 0) {
        int64_t whole = (end - begin) / CODES * CODES;
        look_up(bytes + at / 2, whole / 2, sixteen, out);
        at += whole;
        out += whole;
    }
    if (at == end) return;
    bf16 table[16];
    memcpy(table, &sixteen, sizeof table);
    for (; at < end; ++at) *out++ = table[at % 2 ? bytes[at / 2] & 15 : bytes[at / 2] >> 4];
}

// Fetches these columns of a row into the cache. Pieces of rows are further apart than the
// processor looks ahead by itself. A row behind the last is harmless.
INLINE void row_ahead(const Stored& w, int64_t row, int64_t begin, int64_t end) {
    int64_t first = w.format == dense ? 2 * (row * w.stride + begin) : row * w.cols + begin;
    int64_t bytes = w.format == dense ? 2 * (end - begin) : end - begin;
    if (w.format == code4) first /= 2, bytes /= 2;
    const char* from = static_cast<const char*>(w.data) + first;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Columns `begin` to `end` of one row as bf16: in the weight's own memory, or in `room`.
INLINE const bf16* row_values(const Stored& w, int64_t row, int64_t begin, int64_t end,
                              bf16* room) {
    if (w.format == dense) return static_cast<const bf16*>(w.data) + row * w.stride + begin;
    if (w.format == rows8) {
        const int8_t* codes = static_cast<const int8_t*>(w.data) + row * w.cols;
        float scale = static_cast<const float*>(w.scales)[row];
        int64_t i = begin;
        for (; i + W <= end; i += W)
            store(room + (i - begin), whole_numbers(codes + i) * scale * PER_STEP);
        for (; i < end; ++i)
            room[i - begin] = to_bf16(static_cast<float>(codes[i]) * scale * PER_STEP);
        return room;
    }
    int64_t first = row * w.cols + begin, last = row * w.cols + end;
    for (int64_t at = first, block = at / w.block_size; at < last; ++block) {
        int64_t stop = (block + 1) * w.block_size;
        stop = stop < last ? stop : last;
        block_values(w, w.scale(block), at, stop, room + (at - first));
        at = stop;
    }
    return room;
}

}  // namespace NAMESPACE
