/* The steps rans.1, trellis.1 and grid.1, which few files have: rans.js loads this when one does. `begin` reads
 * everything but the codes, then any chunk can be decoded by `chunk`, in any order. Addresses are in the exported
 * memory, which the caller lays out from `heap` on. Behind a source there must be 16 more bytes, as whole words are read, and before it 16.
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

/* The module is compiled for its size, its inner loops are unrolled all the same. */
#define EACH(i, n) _Pragma("clang loop unroll(full)") for (u32 i = 0; i < (n); i++)

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

/* Bytes that `chunk` and `pair` need at `space`, aligned like a vector, for the means and levels of the columns of a
 * line, of two chunks. */
u32 EXPORT(workspace)(void) { return stream.contexts && stream.chunks ? 6 * (stream.stride + BLOCK) : 0; }

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

/* Sixteen columns of eight tokens become eight rows of sixteen: four times, halves are zipped as cards are. */
INLINE void turn(const u8* tokens, v128_t* rows) {
    EACH(i, 8) rows[i] = wasm_v128_load(tokens + 16 * i);
    EACH(round, 4) {
        v128_t zipped[8];
        EACH(i, 8)
            zipped[i] = i & 1 ? ZIP(rows[i / 2], rows[i / 2 + 4], 8) : ZIP(rows[i / 2], rows[i / 2 + 4], 0);
        EACH(i, 8) rows[i] = zipped[i];
    }
}

INLINE void move_columns(const v128_t* rows, u16* mean, u8* level, u32 rate) {
    v128_t const most = wasm_i8x16_const_splat(EXACT), factor = wasm_i32x4_splat((i32)rate);
    v128_t sum = wasm_i8x16_const_splat(0);
    EACH(l, 8)
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

/* A chunk on its way: where eight lanes of it stand, and the line that they begin. */
struct Eight { v128_t a, b, mean; const u8 *words, *end; u8* line; struct Columns columns; };

/* A code of each lane; 0 when words run out. */
INLINE int next_column(struct Eight* at, u8* tokens, u32 column, u32 const contexts) {
    v128_t const low = wasm_i32x4_const_splat(4 * (SLOTS - 1)), most = wasm_i16x8_const_splat(EXACT);
    v128_t from_a = wasm_v128_and(wasm_i32x4_shl(at->a, 2), low), from_b = wasm_v128_and(wasm_i32x4_shl(at->b, 2), low);
    if (contexts) {
        v128_t const level = wasm_v128_load8_splat(at->columns.level + column);
        v128_t const table = wasm_u16x8_extend_low_u8x16(tables_of(wasm_i8x16_add(levels_of(at->mean), level)));
        from_a = wasm_v128_or(from_a, wasm_i32x4_shl(wasm_u32x4_extend_low_u16x8(table), SLOT_BITS + 2));
        from_b = wasm_v128_or(from_b, wasm_i32x4_shl(wasm_u32x4_extend_high_u16x8(table), SLOT_BITS + 2));
    }
    v128_t const slot_a = gathered(from_a), slot_b = gathered(from_b);
    v128_t const token = wasm_i16x8_narrow_i32x4(wasm_u32x4_shr(slot_a, 24), wasm_u32x4_shr(slot_b, 24));
    at->a = advanced(at->a, slot_a, &at->words);
    at->b = advanced(at->b, slot_b, &at->words);
    wasm_v128_store64_lane(tokens, wasm_u8x16_narrow_i16x8(token, token), 0);
    if (contexts) {
        v128_t const magnitude = wasm_i16x8_min(wasm_i16x8_abs(wasm_i16x8_sub(token, most)), most);
        v128_t const off = wasm_i16x8_sub(wasm_i16x8_shl(magnitude, 8), at->mean);
        at->mean = wasm_i16x8_add(at->mean, wasm_i16x8_shr(off, 5));
    }
    return at->words <= at->end;
}

/* The values of `count` columns from `left` on; 0 when one does not fit. */
static __attribute__((noinline)) int put_columns(struct Lanes* lanes, u8* tokens, u32 left, u32 count, u8* line,
                                                 struct Columns columns, u32 rate) {
    u32 const width = stream.width, stride = stream.stride;
    v128_t const exact = wasm_i8x16_const_splat(EXACT);
    v128_t rows[8];
    for (u32 i = 8 * count; i < 8 * BLOCK; i++) tokens[i] = EXACT;
    turn(tokens, rows);
    v128_t largest = rows[0];
    EACH(l, 8) {
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
    if (stream.contexts) move_columns(rows, columns.mean + left, columns.level + left, rate);
    if (!wasm_v128_any_true(wasm_u8x16_ge(largest, wasm_i8x16_const_splat(ESCAPE)))) return 1;
    for (u32 i = 0; i < 8 * count; i++)
        if (tokens[i] >= ESCAPE &&
            !put_escaped(lanes, tokens[i], line + ((size_t)(i & 7) * stride + left + (i >> 3)) * width))
            return 0;
    return 1;
}

struct Chunk { struct Lanes lanes; struct Columns columns; u32 first, last; };

/* The same as `some_lanes` for eight lanes and whole lines, sixteen columns at a time, of `n` chunks: what one of them
 * waits for leaves time for the other. */
INLINE int eight_lanes(struct Chunk* chunk, u32 group, u32 rate, u32 const contexts, u32 const n) {
    u32 const stride = stream.stride;
    struct Eight at[2];
    EACH(k, n) {
        at[k].a = wasm_v128_load(chunk[k].lanes.x), at[k].b = wasm_v128_load(chunk[k].lanes.x + 4);
        at[k].mean = wasm_i16x8_splat((int16_t)stream.mean);
        at[k].words = chunk[k].lanes.words, at[k].end = chunk[k].lanes.end, at[k].columns = chunk[k].columns;
        at[k].line = target + (size_t)(chunk[k].first + 8 * group) * stride * stream.width;
    }
    for (u32 left = 0; left < stride; left += BLOCK) {
        u32 const count = stride - left < BLOCK ? stride - left : BLOCK;
        u8 tokens[2][BLOCK * 8] __attribute__((aligned(16)));
        for (u32 j = 0; j < count; j++)
            EACH(k, n)
                if (!next_column(&at[k], tokens[k] + 8 * j, left + j, contexts)) return 0;
        EACH(k, n)
            if (!put_columns(&chunk[k].lanes, tokens[k], left, count, at[k].line, at[k].columns, rate)) return 0;
    }
    EACH(k, n) {
        wasm_v128_store(chunk[k].lanes.x, at[k].a);
        wasm_v128_store(chunk[k].lanes.x + 4, at[k].b);
        chunk[k].lanes.words = at[k].words;
    }
    return 1;
}

/* Functions of their own: a browser swaps in its better code between two calls. */
#define GROUP(name, contexts, n)                                                          \
    static __attribute__((noinline)) int name(struct Chunk* chunk, u32 group, u32 rate) { \
        return eight_lanes(chunk, group, rate, contexts, n);                              \
    }
GROUP(static_group, 0, 1)
GROUP(context_group, 1, 1)
GROUP(static_groups, 0, 2)
GROUP(context_groups, 1, 2)

/* 0 where a chunk does not even begin well. */
static int open_chunk(struct Chunk* chunk, u32 number, u8* space) {
    u32 const lanes_count = 1u << stream.lane_bits, length = stream.lengths[number];
    const u8* source = chunks;
    for (u32 i = 0; i < number; i++) source += stream.lengths[i];
    chunk->first = number * stream.band;
    chunk->last = stream.lines - chunk->first > stream.band ? chunk->first + stream.band : stream.lines;
    chunk->columns = (struct Columns){(u16*)space, space + 2 * (stream.stride + BLOCK)};
    struct Lanes* const lanes = &chunk->lanes;
    lanes->words = source + 4 * lanes_count, lanes->end = source + length;
    lanes->bits = 0, lanes->most_bits = 8 * length;
    if (length < 4 * lanes_count || length >> 28) return 0;
    for (u32 l = 0; l < lanes_count; l++) {
        __builtin_memcpy(&lanes->x[l], source + 4 * l, 4);
        if (lanes->x[l] < LOWEST) return 0;
    }
    if (stream.contexts)
        for (u32 j = 0; j < stream.stride; j++) {
            chunk->columns.mean[j] = (u16)stream.mean;
            chunk->columns.level[j] = (u8)level_of(stream.mean);
        }
    return 1;
}

/* The groups of a chunk from `group` on; 1 when it is whole. */
static int end_chunk(struct Chunk* chunk, u32 group) {
    u32 const lanes_count = 1u << stream.lane_bits;
    u32 const short_line = stream.count - (stream.lines - 1) * stream.stride;
    struct Lanes* const lanes = &chunk->lanes;
    for (u32 at = chunk->first + group * lanes_count; at < chunk->last; at += lanes_count, group++) {
        u32 const active = chunk->last - at < lanes_count ? chunk->last - at : lanes_count;
        u32 const whole = at + active == stream.lines ? short_line : stream.stride;
        u32 const rate = column_rate(group, stream.lane_bits);
        if (active == 8 && whole == stream.stride) {
            if (!(stream.contexts ? context_group(chunk, group, rate) : static_group(chunk, group, rate))) return 0;
            continue;
        }
        u8* const line = target + (size_t)at * stream.stride * stream.width;
        for (u32 l = 0; l < active; l++) lanes->mean[l] = stream.mean;
        if (!some_lanes(lanes, active, 0, whole, line, chunk->columns, rate) ||
            (active > 1 && !some_lanes(lanes, active - 1, whole, stream.stride, line, chunk->columns, rate)))
            return 0;
    }
    for (u32 l = 0; l < lanes_count; l++)
        if (lanes->x[l] != LOWEST) return 0;
    return lanes->bits <= lanes->most_bits && lanes->words == lanes->end - (lanes->bits + 7) / 8;
}

/* 1 when chunk `number` is whole; its codes then lie where they belong. */
int EXPORT(chunk)(u32 number, u8* space) {
    struct Chunk chunk;
    return number < stream.chunks && open_chunk(&chunk, number, space) && end_chunk(&chunk, 0);
}

/* The same for this chunk and the next: two take much less time than one after the other. 0 also where there are none. */
int EXPORT(pair)(u32 number, u8* space) {
    struct Chunk chunk[2];
    if (number >= stream.chunks || stream.chunks - number < 2 || stream.lane_bits != 3) return 0;
    if (!open_chunk(chunk, number, space) || !open_chunk(chunk + 1, number + 1, space + 3 * (stream.stride + BLOCK)))
        return 0;
    /* Only the last line of all can be short, and the second chunk has no more lines than the first. */
    u32 const lines = chunk[1].last - chunk[1].first - (chunk[1].last == stream.lines), common = lines / 8;
    for (u32 group = 0; group < common; group++) {
        u32 const rate = column_rate(group, 3);
        if (!(stream.contexts ? context_groups(chunk, group, rate) : static_groups(chunk, group, rate))) return 0;
    }
    return end_chunk(chunk, common) && end_chunk(chunk + 1, common);
}

/* By a state of trellis.1's machine and the lowest bits of the next eight codes: in which of them it is odd, and from bit
 * 8 on the state after them. */
static u16 machine[8 * 256];

static void fill_machine(void) {
    for (u32 i = 0; i < 8 * 256; i++) {
        u32 state = i >> 8, odd = 0;
        for (u32 j = 0; j < 8; j++) {
            odd |= (state & 1) << j;
            /* The state after an even code is one of these, by the state before; after an odd one its second bit turns. */
            state = (0x73426150u >> 4 * state & 7) ^ (i >> j & 1) << 1;
        }
        machine[i] = (u16)(odd | state << 8);
    }
}

/* Eight codes k of trellis.1: 2k, or 2k − sgn(k) where the state is odd; `large` gets a sign where k is too large. */
INLINE v128_t eight_values(v128_t code, u32* state, v128_t* large) {
    v128_t const bits = wasm_i16x8_const(1, 2, 4, 8, 16, 32, 64, 128), none = wasm_i16x8_const_splat(0);
    v128_t const twice = wasm_i16x8_shl(code, 1);
    u32 const entry = machine[*state << 8 | wasm_i16x8_bitmask(wasm_i16x8_shl(code, 15))];
    v128_t const odd = wasm_i16x8_eq(wasm_v128_and(wasm_i16x8_splat((int16_t)entry), bits), bits);
    v128_t const sign = wasm_i16x8_sub(wasm_i16x8_lt(code, none), wasm_i16x8_gt(code, none));
    *large = wasm_v128_or(*large, wasm_v128_xor(code, twice));
    *state = entry >> 8;
    return wasm_i16x8_sub(twice, wasm_v128_and(sign, odd));
}

/* trellis.1: values (rows, columns) of two bytes for codes of `width`; 1 when none is too large. */
int EXPORT(trellis)(u8* to, const u8* codes, u32 width, u32 rows, u32 columns) {
    v128_t large = wasm_i16x8_const_splat(0);
    u32 rest = rows * columns;
    if (!machine[1]) fill_machine();
    for (u32 i = 0; i < rows && rest; i++) {
        u32 state = 0;
        for (u32 left = columns, count; left; left -= count, rest -= count) {
            count = left < 8 ? left : 8;
            if (rest >= 8) {
                /* What lies past the row's end is written anew with the next one. */
                v128_t const code = width == 1 ? wasm_i16x8_load8x8(codes) : wasm_v128_load(codes);
                wasm_v128_store(to, eight_values(code, &state, &large));
            } else {
                u8 last[16] = {0};
                __builtin_memcpy(last, codes, rest * width);
                v128_t const code = width == 1 ? wasm_i16x8_load8x8(last) : wasm_v128_load(last);
                wasm_v128_store(last, eight_values(code, &state, &large));
                __builtin_memcpy(to, last, 2 * rest);
            }
            to += 2 * count, codes += count * width;
        }
    }
    return !wasm_i16x8_bitmask(large);
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
