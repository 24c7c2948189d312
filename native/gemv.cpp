// y = x W^T + bias + z B^T + add for at most 8 rows of x: decoding, where every weight is read once
// and memory decides.
//
// A row of W is multiplied by all rows of x at once, summed in float and rounded at the end, after
// the low-rank part, the bias and `add`. Threads share the rows of W, so each reads one stream.
//
// Packed codes are looked up in registers. A register of packed bytes is W words of 32 bits, 8
// codes each (or 2W words of 16 bits, 4 codes each); shifting all words by 4 j bits brings the j-th
// code of every word to the lowest bits, the only ones that a lookup reads. Nothing is put back in
// order: x is arranged once per call as the codes come out (`prepared`). The table is scaled per
// block: as bf16 where the processor multiplies pairs of them, the values that dequantizing gives,
// else as float. Scaling the sum of a block instead would cost an addition per block for every row
// of x. With AVX2, whose lookups are in bytes, the table holds integers of 16 bits, x becomes
// integers that share exponents (block_float.h), and the products that a lane adds up of a block
// are summed exactly. Int8 codes are exact in bf16, and their scale is the row's: it is applied to
// the sum.
//
// How many rows come together decides in how many chains a row is summed, as far as registers go:
// in the last digits of float a row may depend on that, but never on what the others hold.
//
// A code4 weight whose rows are not whole blocks of 64 is unpacked in pieces that stay in the L1
// cache (stored.h), and then multiplied as a dense one is.
#include "block_float.h"
#include "parallel.h"
#include "room.h"
#include "stored.h"
#include "vec.h"

namespace NAMESPACE {
namespace {

using decal::Range;

constexpr int64_t PIECE = 2048;      // values of a row that are unpacked at a time
constexpr int64_t STEP = 128;        // rows of x are padded to a multiple
constexpr int64_t SERIAL = 1 << 15;  // weights below which threads do not pay
constexpr int64_t PACKED = 8 * W;    // codes in one register of packed bytes
constexpr int64_t AHEAD = 2048;      // bytes between a prefetch and its use

#if defined(DOT_BF16)
using Input = bf16;
constexpr int LANES = 2 * W;
INLINE vf add_product(vf sum, const Input* x, vf weight) {
    __m512bh pairs = (__m512bh)_mm512_loadu_si512(x);
    return (vf)_mm512_dpbf16_ps((__m512)sum, pairs, (__m512bh)weight);
}
INLINE vf weights(const bf16* p) { return (vf)_mm512_loadu_si512(p); }
INLINE vf weights(const int8_t* p) {
    return (vf)_mm512_cvtne2ps_pbh((__m512)whole_numbers(p + W), (__m512)whole_numbers(p));
}
INLINE Input input(bf16 x) { return x; }
#else
using Input = float;
constexpr int LANES = W;
INLINE vf add_product(vf sum, const Input* x, vf weight) { return sum + load(x) * weight; }
INLINE vf weights(const bf16* p) { return load(p); }
INLINE vf weights(const int8_t* p) { return whole_numbers(p); }
INLINE Input input(bf16 x) { return to_float(x); }
#endif
constexpr int PLACES = PACKED / LANES;  // codes in one word

// Whether codes can be looked up in registers: rows are whole blocks of 64, or of whole registers.
bool by_words(const Stored& w) {
    return w.format == code4 && w.cols % w.block_size == 0 &&
           (w.block_size == 64 || w.block_size % 128 == 0);
}

// The rows of x one after the other, `ld` values apart, zeros behind the last column; begins with a
// cache line. `arranged`: among PACKED values those of the same place in their words lie together.
const Input* prepared(Room<Input>& room, const bf16* x, int64_t ldx, int64_t rows, int64_t columns,
                      int64_t ld, bool arranged) {
    Input* first = room.get(rows * ld);
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* from = x + row * ldx;
        Input* out = first + row * ld;
        int64_t i = 0;
        for (; arranged && i + PACKED <= columns; i += PACKED)
            for (int place = 0; place < PLACES; ++place)
                for (int lane = 0; lane < LANES; ++lane)
                    out[i + place * LANES + lane] = input(from[i + lane * PLACES + (place ^ 1)]);
        if (!arranged)
            for (; i < columns; ++i) out[i] = input(from[i]);
        memset(out + i, 0, (ld - i) * sizeof(Input));
        for (int64_t at = i; at < columns; ++at) {
            int64_t lane = (at - i) / PLACES, place = ((at - i) % PLACES) ^ 1;
            out[i + place * LANES + lane] = input(from[at]);
        }
    }
    return first;
}

// What comes to x W^T, and where the result goes.
struct Rest {
    const bf16* bias;
    const Input* z;
    int64_t ldz, rank;
    const bf16* B;
    int64_t ldb;
    const bf16* add;
    int64_t ldadd;
    bf16* y;
    int64_t ldy;

    // The same for rows of x from `first` on.
    Rest from(int64_t first) const {
        Rest other = *this;
        if (z) other.z = z + first * ldz;
        if (add) other.add = add + first * ldadd;
        other.y = y + first * ldy;
        return other;
    }

    template <int T>
    INLINE void finish(int64_t row, vf (&part)[T]) const {
        for (int64_t k = 0; k < rank; k += LANES) {
            vf weight = values_of_b(B + row * ldb + k, rank - k);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) part[t] = add_product(part[t], z + t * ldz + k, weight);
        }
        float base = bias ? to_float(bias[row]) : 0.0f;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            float total = sum(part[t]) + base;
            if (add) total += to_float(add[t * ldadd + row]);
            y[t * ldy + row] = to_bf16(total);
        }
    }

    INLINE static vf values_of_b(const bf16* p, int64_t n) {
        if (n >= LANES) return weights(p);
#if defined(DOT_BF16)
        return (vf)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
#else
        return load_part(p, n);
#endif
    }
};

// One value in all lanes, by a load: gcc would compute with one lane and spread the result, and
// lookups already keep the shuffling units busy.
INLINE vf spread(const float* p) {
    vf out = splat(*p);
#if defined(__AVX512F__)
    asm("" : "+v"(out));
#endif
    return out;
}

// The scale of a block in all lanes, for one who goes through the blocks in order.
struct Floats {
    const float* scales;
    INLINE explicit Floats(const Stored& w) : scales(static_cast<const float*>(w.scales)) {}
    INLINE vf at(int64_t block) const { return spread(scales + block); }
};
// With AVX-512 what the 256 bytes stand for is worked out once for the 256 blocks that share a
// scale of scales, which saves 4 to 14 % of the time. With AVX2 that would take 8 % longer.
struct Bytes {
    const uint8_t* scales;
    const float *table, *nested;
    vf offset;
    INLINE explicit Bytes(const Stored& w)
        : scales(static_cast<const uint8_t*>(w.scales)),
          table(w.table),
          nested(w.nested),
          offset(splat(w.offset)) {}
#if defined(__AVX512F__)
    int64_t group = -1;
    alignas(64) float held[256];
    INLINE vf at(int64_t block) {
        if (block >> 8 != group) {
            group = block >> 8;
            vf factor = spread(nested + group);
            for (int i = 0; i < 256; i += W) store(held + i, load(table + i) * factor + offset);
        }
        return spread(held + scales[block]);
    }
#else
    INLINE vf at(int64_t block) const {
        return spread(table + scales[block]) * spread(nested + (block >> 8)) + offset;
    }
#endif
};

#if !defined(BLOCK_FLOAT)
// The values of up to two blocks' codes. Bits of an index above its code are ignored; where a
// register holds two blocks of 64, an index's bit 4 says which.
struct Values {
#if defined(DOT_BF16)
    __m512i table;
    INLINE Values(const vf (&code)[16 / W], vf first, vf second)
        : table((__m512i)_mm512_cvtne2ps_pbh((__m512)(code[0] * second),
                                             (__m512)(code[0] * first))) {}
    INLINE vf at(__m512i words, int place) const {
        __m512i which = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * place),
                                                  _mm512_set1_epi16(15), which, 0xea);
        return (vf)_mm512_permutexvar_epi16(index, table);
    }
#elif defined(__AVX512F__)
    vf first, second;
    INLINE Values(const vf (&code)[1], vf a, vf b) : first(code[0] * a), second(code[0] * b) {}
    INLINE vf at(__m512i words, int place) const {
        __m512i which = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 1);
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * place),
                                                  _mm512_set1_epi32(15), which, 0xea);
        return (vf)_mm512_permutex2var_ps((__m512)first, index, (__m512)second);
    }
#else
    float table[16];
    INLINE Values(const vf (&code)[16 / W], vf a, vf) {
        for (int i = 0; i < 16 / W; ++i) store(table + i * W, code[i] * a);
    }
    INLINE vf at(vu words, int place) const {
        vf out;
        for (int i = 0; i < W; ++i) out[i] = table[(words[i] >> (4 * place)) & 15];
        return out;
    }
#endif
};

#if defined(__AVX512F__)
using Words = __m512i;
INLINE Words words_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Words half_words_at(const uint8_t* p) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
}
#else
using Words = vu;
INLINE Words words_at(const uint8_t* p) {
    vu words;
    memcpy(&words, p, sizeof words);
    return words;
}
INLINE Words half_words_at(const uint8_t* p) { return words_at(p); }
#endif

// Two rows of W at a time, which share what is loaded of x.
template <int T>
struct Pair {
    static constexpr int CHAINS = W < 16 ? 1 : T <= 2 ? 4 : T <= 4 ? 2 : 1;
    vf part[2][T][CHAINS] = {};

    INLINE void add(const Input* x, int64_t ld, const Words (&words)[2],
                    const Values (&values)[2]) {
#pragma GCC unroll 8
        for (int place = 0; place < PLACES; ++place) {
            vf weight[2] = {values[0].at(words[0], place), values[1].at(words[1], place)};
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
                for (int r = 0; r < 2; ++r) {
                    vf& sum = part[r][t][place % CHAINS];
                    sum = add_product(sum, x + t * ld + place * LANES, weight[r]);
                }
        }
    }
    INLINE void finish(int r, int64_t row, const Rest& rest) {
        vf all[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            all[t] = part[r][t][0];
            for (int chain = 1; chain < CHAINS; ++chain) all[t] += part[r][t][chain];
        }
        rest.finish<T>(row, all);
    }
};

template <int T, class Scales>
void packed_rows(const Stored& w, Range rows, const Input* x, int64_t ld, const Rest& rest) {
    Scales scales[2] = {Scales(w), Scales(w)};
    const int64_t blocks = w.cols / w.block_size;
    // Blocks of 64 come two to a register of 128 codes; larger ones fill it.
    const int64_t second = w.block_size == 64 && PACKED == 128 ? 1 : 0;
    vf code[16 / W];
    for (int i = 0; i < 16 / W; ++i) code[i] = load(w.code + i * W);
    // The two rows lie half of the thread's rows apart: two streams, each without gaps.
    int64_t half = (rows.end - rows.begin + 1) / 2;
    for (int64_t row = rows.begin; row < rows.begin + half; ++row) {
        int64_t other = row + half < rows.end ? row + half : row;
        const uint8_t* p = static_cast<const uint8_t*>(w.data) + row * w.cols / 2;
        const uint8_t* q = static_cast<const uint8_t*>(w.data) + other * w.cols / 2;
        int64_t a = row * blocks, b = other * blocks, i = 0, inside = 0;
        Pair<T> sums;
        for (; i + PACKED <= w.cols; i += PACKED) {
            __builtin_prefetch(p + i / 2 + AHEAD);
            __builtin_prefetch(q + i / 2 + AHEAD);
            sums.add(x + i, ld, {words_at(p + i / 2), words_at(q + i / 2)},
                     {{code, scales[0].at(a), scales[0].at(a + second)},
                      {code, scales[1].at(b), scales[1].at(b + second)}});
            for (inside += PACKED; inside >= w.block_size; inside -= w.block_size) ++a, ++b;
        }
        if (i < w.cols)
            sums.add(x + i, ld, {half_words_at(p + i / 2), half_words_at(q + i / 2)},
                     {{code, scales[0].at(a), vf{}}, {code, scales[1].at(b), vf{}}});
        sums.finish(0, row, rest);
        if (other != row) sums.finish(1, other, rest);
    }
}
#else
static_assert(SHARED == 2 * 4 * W, "a block of x meets the codes of one register of packed bytes");
constexpr int LARGEST_LEVEL = 16383;
static_assert(8LL * 16320 * LARGEST_LEVEL < 1LL << 31, "a lane adds up eight products");

// The sixteen values of codes as integers, and what these stand for.
struct Levels {
    __m256i low, high;  // bytes
    float unit;
    explicit Levels(const float* code) {
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = __builtin_fmaxf(largest, __builtin_fabsf(code[i]));
        unit = largest / LARGEST_LEVEL;
        alignas(16) uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
            int level = static_cast<int>(__builtin_rintf(code[i] / unit));
            bytes[0][i] = static_cast<uint8_t>(level);
            bytes[1][i] = static_cast<uint8_t>(level >> 8);
        }
        low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
        high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
    }
    INLINE void at(const uint8_t* packed, __m256i (&out)[4]) const {
        const __m256i words = halves(packed), nibble = _mm256_set1_epi8(15);
        for (int half = 0; half < 2; ++half) {
            __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(words, 4) : words, nibble);
            __m256i a = _mm256_shuffle_epi8(low, index), b = _mm256_shuffle_epi8(high, index);
            out[2 * half] = _mm256_unpacklo_epi8(a, b);
            out[2 * half + 1] = _mm256_unpackhi_epi8(a, b);
        }
    }
};

// x in integers, in the order in which `Levels` gives the codes.
struct Integral {
    const int16_t* values;  // [rows, ld]
    const float* units;     // [rows, blocks]
    int64_t ld, blocks, rows;
    bool rests;     // as many rows again are what these lose
    Levels levels;  // what they meet

    // Of rows of x, whose columns are whole blocks. The unit of what they meet is taken into
    // theirs, since sums of products of integers alone would be too large for some floats.
    static Integral of(const bf16* x, int64_t ldx, int64_t rows, int64_t columns,
                       const Levels& levels, Room<int16_t>& values, Room<float>& units) {
        const int64_t blocks = columns / SHARED;
        int16_t* out = values.get(2 * rows * columns);
        float* unit = units.get(2 * rows * blocks);
        bool rests = false;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t b = 0; b < blocks; ++b) {
                const Block block(x + row * ldx + b * SHARED, SHARED, LEFT_BITS, nullptr);
                alignas(32) int16_t first[SHARED], rest[SHARED] = {};
                block.integers(first);
                const bool much = block.loses_too_much();
                if (much) block.rests(rest);
                rests |= much;
                int64_t at = row * blocks + b;
                arrange(first, out + at * SHARED);
                arrange(rest, out + (rows * blocks + at) * SHARED);
                unit[at] = block.unit() * levels.unit;
                unit[rows * blocks + at] = much ? block.unit_of_rests() * levels.unit : 0.0f;
            }
        return {out, unit, columns, blocks, rows, rests, levels};
    }

  private:
    // Odd values come from low nibbles, even ones from high nibbles; bytes are widened in halves of
    // 128 bits.
    INLINE static void arrange(const int16_t* from, int16_t* to) {
        for (int half = 0; half < 2; ++half)
            for (int part = 0; part < 2; ++part)
                for (int lane = 0; lane < 2; ++lane)
                    for (int i = 0; i < 8; ++i)
                        *to++ = from[2 * (16 * lane + 8 * part + i) + 1 - half];
    }
};

// T rows of x from `first` on, and with TWICE their rests.
template <int T, bool TWICE, class Scales>
void integer_rows(const Stored& w, Range rows, const Integral& x, int64_t first, const Rest& rest) {
    constexpr int ALL = TWICE ? 2 * T : T;
    Scales scales[2] = {Scales(w), Scales(w)};
    const Levels levels = x.levels;
    const int64_t blocks = w.cols / w.block_size, steps = w.block_size / SHARED;
    const int16_t* values[ALL];
    const float* units[ALL];
    for (int t = 0; t < ALL; ++t) {
        int64_t own = first + (t < T ? t : x.rows + t - T);
        values[t] = x.values + own * x.ld;
        units[t] = x.units + own * x.blocks;
    }
    // The two rows lie half of the thread's rows apart: two streams, each without gaps.
    int64_t half = (rows.end - rows.begin + 1) / 2;
    for (int64_t row = rows.begin; row < rows.begin + half; ++row) {
        const int64_t both[2] = {row, row + half < rows.end ? row + half : row};
        const uint8_t* packed[2];
        for (int r = 0; r < 2; ++r)
            packed[r] = static_cast<const uint8_t*>(w.data) + both[r] * w.cols / 2;
        vf sums[2][ALL] = {};
        for (int64_t b = 0, at = 0; b < blocks; ++b) {
            const vf scale[2] = {scales[0].at(both[0] * blocks + b),
                                 scales[1].at(both[1] * blocks + b)};
            // At least once: said so, the only step of blocks of 64 costs no loop.
            int64_t end = at + steps;
            do {
#pragma GCC unroll 2
                for (int r = 0; r < 2; ++r) {
                    __builtin_prefetch(packed[r] + AHEAD);
                    __m256i level[4];
                    levels.at(packed[r], level);
                    packed[r] += SHARED / 2;
#pragma GCC unroll 8
                    for (int t = 0; t < ALL; ++t) {
                        __m256i sum = _mm256_setzero_si256();
                        for (int i = 0; i < 4; ++i) {
                            __m256i own = halves(values[t] + at * SHARED + 16 * i);
                            __m256i product = _mm256_madd_epi16(level[i], own);
                            sum = i ? _mm256_add_epi32(sum, product) : product;
                        }
                        sums[r][t] += (vf)_mm256_cvtepi32_ps(sum) * (scale[r] * units[t][at]);
                    }
                }
            } while (++at < end);
        }
        for (int r = 0; r < (both[1] == row ? 1 : 2); ++r) {
            vf part[T];
            for (int t = 0; t < T; ++t) {
                part[t] = sums[r][t];
                if constexpr (TWICE) part[t] += sums[r][T + t];
            }
            rest.finish<T>(both[r], part);
        }
    }
}

template <int T, bool TWICE>
void some_integer_rows(const Stored& w, Range rows, const Integral& x, int64_t first,
                       const Rest& rest) {
    w.nested ? integer_rows<T, TWICE, Bytes>(w, rows, x, first, rest)
             : integer_rows<T, TWICE, Floats>(w, rows, x, first, rest);
}

// All rows of x. Rests double what there is to multiply, so these go four at a time.
void integer_rows(const Stored& w, Range rows, const Integral& x, const Rest& rest) {
    using Body = void (*)(const Stored&, Range, const Integral&, int64_t, const Rest&);
    static constexpr Body once[] = {some_integer_rows<1, false>, some_integer_rows<2, false>,
                                    some_integer_rows<3, false>, some_integer_rows<4, false>};
    static constexpr Body twice[] = {some_integer_rows<1, true>, some_integer_rows<2, true>,
                                     some_integer_rows<3, true>, some_integer_rows<4, true>};
    for (int64_t first = 0; first < x.rows; first += 4) {
        int64_t count = x.rows - first < 4 ? x.rows - first : 4;
        (x.rests ? twice : once)[count - 1](w, rows, x, first, rest.from(first));
    }
}
#endif

// Several chains of additions for each row of x, as far as there are registers for them.
template <int T>
struct Sums {
    static constexpr int CHAINS = T <= 2 ? 4 : W == 16 || T <= 4 ? 2 : 1;
    vf part[T][CHAINS] = {};

    template <class Weight>
    INLINE void add(const Weight* row, const Input* x, int64_t ld, int64_t n) {
        int64_t i = 0;
        for (; i + STEP <= n; i += STEP) add_step(row + i, x + i, ld);
        if (i == n) return;
        Weight last[STEP] = {};
        memcpy(last, row + i, (n - i) * sizeof(Weight));
        add_step(last, x + i, ld);
    }
    INLINE void finish(int64_t row, float scale, const Rest& rest) {
        vf all[T];
        for (int t = 0; t < T; ++t) {
            all[t] = part[t][0];
            for (int chain = 1; chain < CHAINS; ++chain) all[t] += part[t][chain];
            all[t] *= scale;
        }
        rest.finish<T>(row, all);
    }

  private:
    template <class Weight>
    INLINE void add_step(const Weight* row, const Input* x, int64_t ld) {
        for (int64_t i = 0; i < STEP; i += CHAINS * LANES)
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain) {
                vf weight = weights(row + i + chain * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    part[t][chain] =
                        add_product(part[t][chain], x + t * ld + i + chain * LANES, weight);
            }
    }
};

template <int T>
void plain_rows(const Stored& w, Range rows, const Input* x, int64_t ld, const Rest& rest) {
    alignas(64) bf16 room[PIECE];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        Sums<T> sums;
        float scale = 1.0f;
        if (w.format == rows8) {
            sums.add(static_cast<const int8_t*>(w.data) + row * w.cols, x, ld, w.cols);
            scale = static_cast<const float*>(w.scales)[row] * PER_STEP;
        } else if (w.format == dense) {
            sums.add(static_cast<const bf16*>(w.data) + row * w.stride, x, ld, w.cols);
        } else {
            for (int64_t begin = 0; begin < w.cols; begin += PIECE) {
                int64_t end = w.cols - begin < PIECE ? w.cols : begin + PIECE;
                sums.add(row_values(w, row, begin, end, room), x + begin, ld, end - begin);
            }
        }
        sums.finish(row, scale, rest);
    }
}

template <int T>
void some_rows(const Stored& w, Range rows, const Input* x, int64_t ld, const Rest& rest) {
#if !defined(BLOCK_FLOAT)
    if (by_words(w))
        return w.nested ? packed_rows<T, Bytes>(w, rows, x, ld, rest)
                        : packed_rows<T, Floats>(w, rows, x, ld, rest);
#endif
    plain_rows<T>(w, rows, x, ld, rest);
}

// One more cache line than padded rows take: whole pages apart they would share a few places of
// the L1 cache.
int64_t distance(int64_t columns) {
    return (columns + STEP - 1) / STEP * STEP + 64 / static_cast<int64_t>(sizeof(Input));
}

// x [rows, w.cols] in bf16, `ldx` between rows, from 1 to 8 of them; `rest` without its z, which
// comes as bf16 [rows, rank] and may be null where the rank is 0.
void run(const Stored& w, const bf16* x, int64_t ldx, int64_t rows, const bf16* z, int64_t ldz,
         Rest rest, int threads) {
    using Body = void (*)(const Stored&, Range, const Input*, int64_t, const Rest&);
    static constexpr Body bodies[] = {some_rows<1>, some_rows<2>, some_rows<3>, some_rows<4>,
                                      some_rows<5>, some_rows<6>, some_rows<7>, some_rows<8>};
    static thread_local Room<Input> room, low;
    rest.ldz = distance(rest.rank);
    if (z) rest.z = prepared(low, z, ldz, rows, rest.rank, rest.ldz, false);
    int team = w.rows * w.cols < SERIAL ? 1 : threads;
#if defined(BLOCK_FLOAT)
    if (by_words(w)) {
        static thread_local Room<int16_t> values;
        static thread_local Room<float> units;
        const Integral integral = Integral::of(x, ldx, rows, w.cols, Levels(w.code), values, units);
        decal::for_each_thread(team, [&](int thread, int of) {
            integer_rows(w, decal::share(w.rows, thread, of), integral, rest);
        });
        return;
    }
#endif
    int64_t ld = distance(w.cols);
    const Input* from = prepared(room, x, ldx, rows, w.cols, ld, by_words(w));
    decal::for_each_thread(team, [&](int thread, int of) {
        bodies[rows - 1](w, decal::share(w.rows, thread, of), from, ld, rest);
    });
}

// to[i] = scale * from[i]
void round_all(const float* from, int64_t n, float scale, bf16* to, int threads) {
    decal::for_each_thread(n < SERIAL ? 1 : threads, [&](int thread, int of) {
        Range own = decal::share(n, thread, of, W);
        int64_t i = own.begin;
        for (; i + W <= own.end; i += W) store(to + i, load(from + i) * scale);
        if (i < own.end) store_part(to + i, load_part(from + i, own.end - i) * scale, own.end - i);
    });
}

}  // namespace
}  // namespace NAMESPACE

using namespace NAMESPACE;

// y [rows, w.rows]; bias [w.rows], z [rows, rank] with B [w.rows, rank], and add [rows, w.rows] may
// be null.
EXPORT(gemv)(const Stored* w, const bf16* x, int64_t ldx, int64_t rows, const bf16* bias,
             const bf16* z, int64_t ldz, int64_t rank, const bf16* B, int64_t ldb, const bf16* add,
             int64_t ldadd, bf16* y, int64_t ldy, int threads) {
    const Rest rest{bias, nullptr, 0, z ? rank : 0, B, ldb, add, ldadd, y, ldy};
    run(*w, x, ldx, rows, z, ldz, rest, threads);
}

// y = x W^T + bias + z (scale B)^T with z = x A^T, for the float masters A [rank, w.cols] and
// B [w.rows, rank]: in one call what else are two, and two casts.
EXPORT(gemv_adapted)(const Stored* w, const bf16* x, int64_t ldx, int64_t rows, const bf16* bias,
                     const float* A, const float* B, int64_t rank, float scale, bf16* y,
                     int64_t ldy, int threads) {
    static thread_local Room<bf16> factors;
    const int64_t of_a = rank * w->cols, of_b = rank * w->rows;
    bf16* a = factors.get(of_a + of_b + rows * rank);
    bf16 *b = a + of_a, *z = b + of_b;
    round_all(A, of_a, 1.0f, a, threads);
    round_all(B, of_b, scale, b, threads);
    const Stored first{dense, 0, rank, w->cols, w->cols, a, nullptr, nullptr, nullptr, nullptr, 0};
    const Rest alone{nullptr, nullptr, 0, 0, nullptr, 0, nullptr, 0, z, rank};
    run(first, x, ldx, rows, nullptr, 0, alone, threads);
    const Rest rest{bias, nullptr, 0, rank, b, rank, nullptr, 0, y, ldy};
    run(*w, x, ldx, rows, z, rank, rest, threads);
}
