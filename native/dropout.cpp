// Dropout bits: both stages of the hash in kernels/reference_dropout.py, bit for bit.
#include "dropout.h"

#include "parallel.h"

namespace NAMESPACE {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;

INLINE uint64_t mix(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
    return word ^ (word >> 31);
}

INLINE uint64_t chained(uint64_t word, int64_t counter) {
    return mix(word * GOLDEN + static_cast<uint64_t>(counter) + 1);
}

INLINE void keep_row(const Keep& keep, int64_t row, int64_t n, uint8_t* out) {
    typedef int8_t bytes __attribute__((vector_size(DECAL_W), aligned(1), may_alias));
    int32_t offset = keep.offset[row], factor = keep.factor[row];
    int32_t least = keep.least[row * keep.every];
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vi column = *reinterpret_cast<const vi*>(keep.column + i);
        vi bits = kept(column, offset, factor, least);
        *reinterpret_cast<bytes*>(out + i) = __builtin_convertvector(bits, bytes) & 1;
    }
    for (; i < n; ++i) out[i] = kept(keep.column[i], offset, factor, least);
}

}  // namespace NAMESPACE

// The first stage: `start` is the hash of what all rows share.
EXPORT(dropout_words)(uint64_t start, const int64_t* sample_ids, const int64_t* positions,
                      int64_t rows, int32_t* offset, int32_t* factor) {
    using namespace NAMESPACE;
    for (int64_t i = 0; i < rows; ++i) {
        uint64_t word = chained(chained(start, sample_ids[i]), positions[i]);
        offset[i] = static_cast<int32_t>(static_cast<uint32_t>(word));
        factor[i] = static_cast<int32_t>(static_cast<uint32_t>(word >> 32) | 1u);
    }
}

// The second: one byte an element, 1 where it is kept.
EXPORT(dropout_keep)(const int32_t* offset, const int32_t* factor, const int32_t* column,
                     int32_t least, int64_t rows, int64_t features, uint8_t* out, int threads) {
    using namespace NAMESPACE;
    Keep keep{offset, factor, column, &least, 0};
    decal::for_each_thread(threads, [&](int thread, int of) {
        decal::Range part = decal::share(rows, thread, of);
        for (int64_t row = part.begin; row < part.end; ++row)
            keep_row(keep, row, features, out + row * features);
    });
}
