/* The steps rans.1 and grid.1, which few files have: rans.js loads this when one does. `begin` reads everything but the
 * codes, then any chunk can be decoded by `chunk`, in any order. Addresses are in the exported memory, which the caller
 * lays out from `heap` on. Behind a source there must be 16 more bytes, as whole words are read, and before it 16.
 * `python -m tests.web.build` makes rans.wasm of it.
 */
#include <wasm_simd128.h>

#include "rans.h"

extern unsigned char __heap_base;

u32 EXPORT(heap)(void) { return (u32)(size_t)&__heap_base; }

/* The header's bits, as an arithmetic coder wrote them; nothing is read behind the end. */
struct Coder { const u8 *at, *end; u32 low, high, value, missing; };

static u32 next_byte(struct Coder* coder) {
    if (coder->at < coder->end) return *coder->at++;
    coder->missing++;
    return 0;
}

static u32 code_bit(struct Coder* coder, u32 one, u32 value) {
    u32 const middle = coder->low + (u32)((u64)(coder->high - coder->low) * one >> 16);
    value = coder->value <= middle;
    if (value) coder->high = middle; else coder->low = middle + 1;
    while (!((coder->low ^ coder->high) >> 24)) {
        coder->low <<= 8;
        coder->high = coder->high << 8 | 255;
        coder->value = coder->value << 8 | next_byte(coder);
    }
    return value;
}

#define BLOCK 16u

static void fill_ranks(void);
static u8 ranks[16][16];
static struct Stream stream;
static u8 *target;
static const u8 *chunks, *chunks_end;
/* For every slot of every table: frequency − 1, slot − first slot of the token, token. */
static u32 slots[TABLES_AT_MOST * SLOTS];
static u8 table_of[64];

static void fill_slots(u32* slot, const u16* frequencies) {
    for (u32 token = 0; token < TOKENS; token++)
        for (u32 i = 0; i < frequencies[token]; i++) *slot++ = (frequencies[token] - 1u) | i << 12 | token << 24;
}

/* The number of chunks, or −1 where the header is damaged; the head then lies at `to`, the codes go behind it. */
i32 EXPORT(begin)(u8* to, const u8* source, u32 length, u32 rows, u32 columns, u32 head, u32 width) {
    static const u8 ways[2];
    const u8* const end = source + length;
    u32 size = 0, shift = 0;
    clear(&stream, sizeof stream);
    __builtin_memset(stream.levels, 255, sizeof stream.levels);
    do {
        if (source == end || shift > 28) return -1;
        size |= (u32)(*source & 127) << shift;
        shift += 7;
    } while (*source++ & 128);
    if (size > (u32)(end - source)) return -1;
    struct Coder coder = {source, source + size, 0, ~0u, 0, 0};
    for (int i = 0; i < 4; i++) coder.value = coder.value << 8 | next_byte(&coder);
    stream.rows = rows, stream.columns = columns, stream.head = head, stream.width = width;
    if (!code_layout(&coder, &stream)) return -1;
    if (stream.count && !code_tables(&coder, &stream)) return -1;
    code_head(&coder, &stream, to, ways);
    if (coder.missing != 3) return -1;
    target = to + head, chunks = source + size, chunks_end = end;
    if (!stream.chunks) return chunks == end ? 0 : -1;
    u64 known = 0;
    for (u32 i = 0; i + 1 < stream.chunks; i++) known += stream.lengths[i];
    if (known > (u64)(end - chunks)) return -1;
    stream.lengths[stream.chunks - 1] = (u32)(end - chunks - known);
    for (u32 t = 0; t < stream.tables; t++) fill_slots(slots + t * SLOTS, stream.frequencies[t]);
    for (u32 i = 0; i < CONTEXTS; i++) table_of[i] = stream.map[i];
    if (!ranks[1][1]) fill_ranks();
    return (i32)stream.chunks;
}

/* Bytes that `chunk` needs at `space`, aligned like a vector, for the means and levels of the columns of a line. */
u32 EXPORT(workspace)(void) { return stream.contexts && stream.chunks ? 3 * (stream.stride + BLOCK) : 0; }

struct Columns { u16* mean; u8* level; };
struct Lanes { u32 x[LANES_AT_MOST], mean[LANES_AT_MOST]; const u8 *words, *end; u32 bits, most_bits; };

/* The value behind an escape: its lower bits and its sign, read from the end of the chunk backwards. */
static __attribute__((noinline)) i32 escaped(struct Lanes* lanes, u32 token) {
    u32 const half = token - ESCAPE, octave = 4 + (half >> 1);
    if (lanes->bits + octave > lanes->most_bits) {
        lanes->bits = ~0u >> 1;
        return 0;
    }
    u32 word;
    __builtin_memcpy(&word, lanes->end - 4 - (lanes->bits >> 3), 4);
    word = word << (lanes->bits & 7) >> (32 - octave);
    lanes->bits += octave;
    i32 const magnitude = (i32)(((2 + (half & 1)) << (octave - 1)) + (word >> 1));
    return word & 1 ? -magnitude : magnitude;
}

/* 0 where the value does not fit the width. */
static int put_escaped(struct Lanes* lanes, u32 token, u8* at) {
    i32 const value = escaped(lanes, token);
    __builtin_memcpy(at, &value, stream.width);
    return stream.width == 1 ? value == (int8_t)value : value == (int16_t)value;
}

/* Columns `from` to `to` of the lines of one group; 0 when words run out or a value does not fit. */
static int some_lanes(struct Lanes* lanes, u32 active, u32 from, u32 to, u8* line, struct Columns columns, u32 rate) {
    u32 const width = stream.width, stride = stream.stride * width;
    line += from * width;
    for (u32 j = from; j < to; j++, line += width) {
        u32 sum = 0;
        for (u32 l = 0; l < active; l++) {
            u32 const table = stream.contexts ? table_of[columns.level[j] + level_of(lanes->mean[l])] : 0;
            u32 const slot = slots[table * SLOTS + (lanes->x[l] & (SLOTS - 1))], token = slot >> 24;
            i32 const value = (i32)token - EXACT;
            u32 const whole = (u32)(value < 0 ? -value : value), magnitude = whole < EXACT ? whole : EXACT;
            u32 const next = ((slot & (SLOTS - 1)) + 1) * (lanes->x[l] >> SLOT_BITS) + (slot >> 12 & (SLOTS - 1));
            u16 word;
            __builtin_memcpy(&word, lanes->words, 2);
            lanes->x[l] = next < LOWEST ? next << 16 | word : next;
            lanes->words += next < LOWEST ? 2 : 0;
            lanes->mean[l] = row_mean(lanes->mean[l], magnitude);
            sum += magnitude;
            if (token < ESCAPE) __builtin_memcpy(line + l * stride, &value, width);
            else if (!put_escaped(lanes, token, line + l * stride)) return 0;
        }
        if (lanes->words > lanes->end) return 0;
        if (stream.contexts) {
            columns.mean[j] = (u16)column_mean(columns.mean[j], sum, stream.lane_bits, rate);
            columns.level[j] = (u8)level_of(columns.mean[j]);
        }
    }
    return 1;
}

/* For each set of hungry lanes out of four, where in the next words each finds its own. */
static void fill_ranks(void) {
    for (u32 mask = 0; mask < 16; mask++)
        for (u32 lane = 0, rank = 0; lane < 4; lane++) {
            u32 const hungry = mask >> lane & 1;
            for (u32 i = 0; i < 4; i++) ranks[mask][4 * lane + i] = hungry && i < 2 ? (u8)(2 * rank + i) : 255;
            rank += hungry;
        }
}

INLINE v128_t gathered(v128_t index) {
    const u8* const base = (const u8*)slots;
    v128_t out = wasm_v128_load32_zero(base + wasm_u32x4_extract_lane(index, 0));
    out = wasm_v128_load32_lane(base + wasm_u32x4_extract_lane(index, 1), out, 1);
    out = wasm_v128_load32_lane(base + wasm_u32x4_extract_lane(index, 2), out, 2);
    return wasm_v128_load32_lane(base + wasm_u32x4_extract_lane(index, 3), out, 3);
}

/* The states after the codes in these slots, where the hungry ones have taken words in. */
INLINE v128_t advanced(v128_t x, v128_t slot, const u8** words) {
    v128_t const low = wasm_i32x4_const_splat(SLOTS - 1);
    v128_t const frequency = wasm_i32x4_add(wasm_v128_and(slot, low), wasm_i32x4_const_splat(1));
    v128_t const offset = wasm_v128_and(wasm_u32x4_shr(slot, 12), low);
    v128_t const next = wasm_i32x4_add(wasm_i32x4_mul(frequency, wasm_u32x4_shr(x, SLOT_BITS)), offset);
    v128_t const hungry = wasm_i32x4_eq(wasm_u32x4_shr(next, 16), wasm_i32x4_const_splat(0));
    u32 const mask = wasm_i32x4_bitmask(hungry);
    v128_t const word = wasm_i8x16_swizzle(wasm_v128_load64_zero(*words), wasm_v128_load(ranks[mask]));
    *words += 2 * __builtin_popcount(mask);
    return wasm_v128_bitselect(wasm_v128_or(wasm_i32x4_shl(next, 16), word), next, hungry);
}

/* Levels of eight means, as bytes in the lower half. */
INLINE v128_t levels_of(v128_t mean) {
    v128_t const v = wasm_i16x8_add(wasm_u16x8_shr(mean, 2), wasm_i16x8_const_splat(4));
    /* The exponent of a float and the first two bits of its fraction. */
    v128_t const low = wasm_u32x4_shr(wasm_f32x4_convert_i32x4(wasm_u32x4_extend_low_u16x8(v)), 21);
    v128_t const high = wasm_u32x4_shr(wasm_f32x4_convert_i32x4(wasm_u32x4_extend_high_u16x8(v)), 21);
    v128_t const both = wasm_i16x8_sub(wasm_i16x8_narrow_i32x4(low, high), wasm_i16x8_const_splat(4 * 129));
    return wasm_u8x16_narrow_i16x8(both, both);
}

INLINE v128_t tables_of(v128_t context) {
    v128_t const sixteen = wasm_i8x16_const_splat(16);
    v128_t out = wasm_i8x16_swizzle(wasm_v128_load(table_of), context);
#pragma clang loop unroll(full)
    for (u32 i = 16; i < 64; i += 16) {
        context = wasm_i8x16_sub(context, sixteen);
        out = wasm_v128_or(out, wasm_i8x16_swizzle(wasm_v128_load(table_of + i), context));
    }
    return out;
}

#define ZIP(a, b, i)                                                                                        \
    wasm_i8x16_shuffle(a, b, i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, \
                       i + 21, i + 6, i + 22, i + 7, i + 23)

/* Sixteen columns of eight tokens become eight rows of sixteen: three times, halves are zipped as cards are. */
INLINE void turn(const u8* tokens, v128_t* rows) {
    v128_t a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = wasm_v128_load(tokens + 16 * i);
    for (int i = 0; i < 4; i++) b[2 * i] = ZIP(a[i], a[i + 4], 0), b[2 * i + 1] = ZIP(a[i], a[i + 4], 8);
    for (int i = 0; i < 4; i++) a[2 * i] = ZIP(b[i], b[i + 4], 0), a[2 * i + 1] = ZIP(b[i], b[i + 4], 8);
    for (int i = 0; i < 4; i++) b[2 * i] = ZIP(a[i], a[i + 4], 0), b[2 * i + 1] = ZIP(a[i], a[i + 4], 8);
    for (int i = 0; i < 4; i++) rows[2 * i] = ZIP(b[i], b[i + 4], 0), rows[2 * i + 1] = ZIP(b[i], b[i + 4], 8);
}

INLINE void move_columns(const v128_t* rows, u16* mean, u8* level, u32 rate) {
    v128_t const most = wasm_i8x16_const_splat(EXACT), factor = wasm_i32x4_splat((i32)rate);
    v128_t sum = wasm_i8x16_const_splat(0);
    for (int l = 0; l < 8; l++)
        sum = wasm_i8x16_add(sum, wasm_u8x16_min(wasm_i8x16_abs(wasm_i8x16_sub(rows[l], most)), most));
    for (u32 half = 0; half < 2; half++, mean += 8, level += 8) {
        v128_t const before = wasm_v128_load(mean);
        v128_t const wide = half ? wasm_u16x8_extend_high_u8x16(sum) : wasm_u16x8_extend_low_u8x16(sum);
        v128_t const off = wasm_i16x8_sub(wasm_i16x8_shl(wide, 5), before);
        v128_t const low = wasm_i32x4_shr(wasm_i32x4_mul(wasm_i32x4_extend_low_i16x8(off), factor), 12);
        v128_t const high = wasm_i32x4_shr(wasm_i32x4_mul(wasm_i32x4_extend_high_i16x8(off), factor), 12);
        v128_t const now = wasm_i16x8_add(before, wasm_i16x8_narrow_i32x4(low, high));
        wasm_v128_store(mean, now);
        wasm_v128_store64_lane(level, levels_of(now), 0);
    }
}

/* The same as `some_lanes` for eight lanes and whole lines, sixteen columns at a time. */
INLINE int eight_lanes(struct Lanes* lanes, u8* line, struct Columns columns, u32 rate, u32 const contexts) {
    u32 const width = stream.width, stride = stream.stride;
    v128_t const low = wasm_i32x4_const_splat(4 * (SLOTS - 1)), exact = wasm_i8x16_const_splat(EXACT);
    v128_t const most = wasm_i16x8_const_splat(EXACT);
    v128_t a = wasm_v128_load(lanes->x), b = wasm_v128_load(lanes->x + 4);
    v128_t mean = wasm_i16x8_splat((int16_t)stream.mean);
    const u8* words = lanes->words;
    for (u32 left = 0; left < stride; left += BLOCK) {
        u32 const count = stride - left < BLOCK ? stride - left : BLOCK;
        u8 tokens[BLOCK * 8] __attribute__((aligned(16)));
        v128_t rows[8];
        for (u32 j = 0; j < count; j++) {
            v128_t from_a = wasm_v128_and(wasm_i32x4_shl(a, 2), low), from_b = wasm_v128_and(wasm_i32x4_shl(b, 2), low);
            if (contexts) {
                v128_t const context = wasm_i8x16_add(levels_of(mean), wasm_v128_load8_splat(columns.level + left + j));
                v128_t const table = wasm_u16x8_extend_low_u8x16(tables_of(context));
                from_a = wasm_v128_or(from_a, wasm_i32x4_shl(wasm_u32x4_extend_low_u16x8(table), SLOT_BITS + 2));
                from_b = wasm_v128_or(from_b, wasm_i32x4_shl(wasm_u32x4_extend_high_u16x8(table), SLOT_BITS + 2));
            }
            v128_t const slot_a = gathered(from_a), slot_b = gathered(from_b);
            v128_t const token = wasm_i16x8_narrow_i32x4(wasm_u32x4_shr(slot_a, 24), wasm_u32x4_shr(slot_b, 24));
            a = advanced(a, slot_a, &words);
            b = advanced(b, slot_b, &words);
            if (words > lanes->end) return 0;
            wasm_v128_store64_lane(tokens + 8 * j, wasm_u8x16_narrow_i16x8(token, token), 0);
            if (contexts) {
                v128_t const magnitude = wasm_i16x8_min(wasm_i16x8_abs(wasm_i16x8_sub(token, most)), most);
                v128_t const off = wasm_i16x8_sub(wasm_i16x8_shl(magnitude, 8), mean);
                mean = wasm_i16x8_add(mean, wasm_i16x8_shr(off, 5));
            }
        }
        for (u32 i = 8 * count; i < 8 * BLOCK; i++) tokens[i] = EXACT;
        turn(tokens, rows);
        v128_t largest = rows[0];
        for (u32 l = 0; l < 8; l++) {
            u8* const out = line + ((size_t)l * stride + left) * width;
            v128_t const values = wasm_i8x16_sub(rows[l], exact);
            largest = wasm_u8x16_max(largest, rows[l]);
            u8 rest[2 * BLOCK];
            u8* const to = count == BLOCK ? out : rest;
            if (width == 1) wasm_v128_store(to, values);
            else {
                wasm_v128_store(to, wasm_i16x8_extend_low_i8x16(values));
                wasm_v128_store(to + 16, wasm_i16x8_extend_high_i8x16(values));
            }
            if (count < BLOCK) __builtin_memcpy(out, rest, count * width);
        }
        if (contexts) move_columns(rows, columns.mean + left, columns.level + left, rate);
        if (!wasm_v128_any_true(wasm_u8x16_ge(largest, wasm_i8x16_const_splat(ESCAPE)))) continue;
        for (u32 i = 0; i < 8 * count; i++)
            if (tokens[i] >= ESCAPE &&
                !put_escaped(lanes, tokens[i], line + ((size_t)(i & 7) * stride + left + (i >> 3)) * width))
                return 0;
    }
    wasm_v128_store(lanes->x, a);
    wasm_v128_store(lanes->x + 4, b);
    lanes->words = words;
    return 1;
}

/* Functions of their own: a browser swaps in its better code between two calls. */
static __attribute__((noinline)) int static_group(struct Lanes* lanes, u8* line, struct Columns columns) {
    return eight_lanes(lanes, line, columns, 0, 0);
}

static __attribute__((noinline)) int context_group(struct Lanes* lanes, u8* line, struct Columns columns, u32 rate) {
    return eight_lanes(lanes, line, columns, rate, 1);
}

/* 1 when chunk `number` is whole; its codes then lie where they belong. */
int EXPORT(chunk)(u32 number, void* space) {
    if (number >= stream.chunks) return 0;
    u32 const lanes_count = 1u << stream.lane_bits, length = stream.lengths[number];
    u32 const first = number * stream.band;
    u32 const last = stream.lines - first > stream.band ? first + stream.band : stream.lines;
    u32 const short_line = stream.count - (stream.lines - 1) * stream.stride;
    const u8* source = chunks;
    for (u32 i = 0; i < number; i++) source += stream.lengths[i];
    struct Lanes lanes = {.words = source + 4 * lanes_count, .end = source + length, .most_bits = 8 * length};
    if (length < 4 * lanes_count || length >> 28) return 0;
    for (u32 l = 0; l < lanes_count; l++) {
        __builtin_memcpy(&lanes.x[l], source + 4 * l, 4);
        if (lanes.x[l] < LOWEST) return 0;
    }
    struct Columns const columns = {space, (u8*)space + 2 * (stream.stride + BLOCK)};
    if (stream.contexts)
        for (u32 j = 0; j < stream.stride; j++) {
            columns.mean[j] = (u16)stream.mean;
            columns.level[j] = (u8)level_of(stream.mean);
        }
    for (u32 at = first, group = 0; at < last; at += lanes_count, group++) {
        u32 const active = last - at < lanes_count ? last - at : lanes_count;
        u32 const whole = at + active == stream.lines ? short_line : stream.stride;
        u32 const rate = column_rate(group, stream.lane_bits);
        u8* const line = target + (size_t)at * stream.stride * stream.width;
        for (u32 l = 0; l < active; l++) lanes.mean[l] = stream.mean;
        if (active == 8 && whole == stream.stride) {
            if (!(stream.contexts ? context_group(&lanes, line, columns, rate) : static_group(&lanes, line, columns)))
                return 0;
        } else if (!some_lanes(&lanes, active, 0, whole, line, columns, rate) ||
                   (active > 1 && !some_lanes(&lanes, active - 1, whole, stream.stride, line, columns, rate)))
            return 0;
    }
    for (u32 l = 0; l < lanes_count; l++)
        if (lanes.x[l] != LOWEST) return 0;
    return lanes.bits <= lanes.most_bits && lanes.words == lanes.end - (lanes.bits + 7) / 8;
}

/* `count` factors f32(scale · 2^(exponent / 2)) of signed bytes. */
void EXPORT(factors)(float* to, const u8* exponents, u32 count, double scale) {
    for (u32 i = 0; i < count; i++) {
        i32 const exponent = (int8_t)exponents[i];
        u64 const bits = (u64)(1023 + (exponent >> 1)) << 52;
        double power;
        __builtin_memcpy(&power, &bits, 8);
        to[i] = (float)(scale * (exponent & 1 ? power * 1.4142135623730951 : power));
    }
}

#define TILE 16u

/* grid.1: values (rows, columns) = codes · column · row, that of row i and column j at row_at[i] + column_at[j];
 * without `column_at` the columns are in order. 1 when all are finite. */
int EXPORT(grid)(float* to, const u8* codes, u32 width, u32 rows, u32 columns, const float* row, const float* column,
                 const u32* row_at, const u32* column_at) {
    v128_t const infinity = wasm_f32x4_splat(__builtin_inff());
    v128_t good = wasm_i32x4_splat(-1);
    /* What is not finite minus itself is not a number, and stays so. */
    float odd = 0;
    u32 const tile = column_at ? TILE : columns;
    for (u32 left = 0, right; left < columns; left = right) {
        right = columns - left > tile ? left + tile : columns;
        for (u32 i = 0; i < rows; i++) {
            float* const out = to + row_at[i];
            const u8* const line = codes + (size_t)i * columns * width;
            v128_t const factor = wasm_f32x4_splat(row[i]);
            u32 j = left;
            for (; !column_at && right - j >= 8; j += 8) {
                v128_t const whole = width == 1 ? wasm_i16x8_load8x8(line + j) : wasm_v128_load(line + 2 * j);
                v128_t const a = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(whole));
                v128_t const b = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(whole));
                v128_t const c = wasm_f32x4_mul(wasm_f32x4_mul(a, wasm_v128_load(column + j)), factor);
                v128_t const d = wasm_f32x4_mul(wasm_f32x4_mul(b, wasm_v128_load(column + j + 4)), factor);
                good = wasm_v128_and(good, wasm_f32x4_lt(wasm_f32x4_abs(c), infinity));
                good = wasm_v128_and(good, wasm_f32x4_lt(wasm_f32x4_abs(d), infinity));
                wasm_v128_store(out + j, c);
                wasm_v128_store(out + j + 4, d);
            }
            for (; j < right; j++) {
                int16_t code;
                if (width == 1) code = (int8_t)line[j];
                else __builtin_memcpy(&code, line + 2 * j, 2);
                float const value = (float)code * column[j] * row[i];
                odd += value - value;
                out[column_at ? column_at[j] : j] = value;
            }
        }
    }
    return wasm_i32x4_all_true(good) && odd == 0;
}
