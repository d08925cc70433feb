/* What a payload of rans.1 is made of; shrink/entropy.py says what it means. Reader and writer share all of it: each
 * brings a `code_bit`, and the fields come and go through the same lines. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(#name))) name
#define INLINE static inline __attribute__((always_inline))

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;

/* Frequencies are shares of 2^SLOT_BITS; states of the coder are at least LOWEST between two codes. */
#define SLOT_BITS 12
#define SLOTS (1u << SLOT_BITS)
#define LOWEST 65536u

/* Codes up to EXACT have a token each, −15 … 15; larger magnitudes share one per half octave, from 16 … 23 on. */
#define EXACT 15
#define ESCAPE 31u
#define TOKENS 54u
#define CLASSES 39u

#define LANES_AT_MOST 8u
#define TABLES_AT_MOST 16u
#define CHUNKS_AT_MOST 4096u
#define CONTEXTS 63u

/* An adaptive bit: 2^16 times how likely a one is, and how often it was seen. */
struct Bit { u16 one, seen; };
#define MOST_SEEN 24u

struct Coder;
/* One bit; `one` is 2^16 times how likely a one is. The reader gives it, the writer takes `value`. */
static u32 code_bit(struct Coder* coder, u32 one, u32 value);

static u32 adaptive(struct Coder* coder, struct Bit* bit, u32 value) {
    u32 const rate = 131072 / (2 * bit->seen + 3);
    value = code_bit(coder, bit->one, value);
    bit->one += value ? (65535u - bit->one) * rate >> 16 : -(bit->one * rate >> 16);
    bit->seen += bit->seen < MOST_SEEN;
    return value;
}

static u32 direct(struct Coder* coder, u32 bits, u32 value) {
    u32 out = 0;
    while (bits-- > 0) out = out << 1 | code_bit(coder, 32768, value >> bits & 1);
    return out;
}

/* A small number: is it zero, its sign, then one bit per step of its magnitude, at most `most`. */
#define UNARY 14u
struct Number { struct Bit zero, sign, more[UNARY]; };

static i32 number(struct Coder* coder, struct Number* bits, i32 most, i32 value) {
    if (!adaptive(coder, &bits->zero, value != 0)) return 0;
    u32 const negative = adaptive(coder, &bits->sign, value < 0);
    i32 const wanted = value < 0 ? -value : value;
    i32 magnitude = 1;
    while (magnitude < most) {
        u32 const place = magnitude - 1 < (i32)UNARY ? (u32)magnitude - 1 : UNARY - 1;
        if (!adaptive(coder, &bits->more[place], magnitude < wanted)) break;
        magnitude++;
    }
    return negative ? -magnitude : magnitude;
}

struct Stream {
    u32 rows, columns, head, width;
    /* The codes, row after row, in lines of `stride`; `band` lines are a chunk. */
    u32 count, lane_bits, flat, stride, lines, many, band, chunks;
    u32 contexts, mean, tables, precision;
    u8 map[CONTEXTS];
    int16_t levels[TABLES_AT_MOST][TOKENS];
    u16 frequencies[TABLES_AT_MOST][TOKENS];
    u32 lengths[CHUNKS_AT_MOST];
};

static void clear(void* memory, size_t size) { __builtin_memset(memory, 0, size); }

static void fresh(void* bits, size_t size) {
    struct Bit* const bit = bits;
    for (size_t i = 0; i < size / sizeof(struct Bit); i++) bit[i] = (struct Bit){32768, 0};
}

/* The head's bytes: of rows and of columns, where it has one for each, else one part. A part is raw, or the
 * differences to its first byte, or to the byte before. `ways` are two of these, three times each. */
static void code_head(struct Coder* coder, const struct Stream* s, u8* head, const u8* ways) {
    struct Number bits[3];
    u32 const split = s->head == (u64)s->rows + s->columns ? s->rows : s->head;
    for (u32 part = 0; part < 2; part++) {
        u32 const first = part ? split : 0, end = part ? s->head : split;
        if (first == end) continue;
        u32 const way = direct(coder, 2, ways[part]);
        u32 before = 1;
        fresh(bits, sizeof bits);
        for (u32 i = first; i < end; i++) {
            if (i == first || way == 0) {
                head[i] = (u8)direct(coder, 8, head[i]);
                continue;
            }
            u8 const near = way == 1 ? head[first] : head[i - 1];
            i32 const off = number(coder, &bits[before], 128, (int8_t)(u8)(head[i] - near));
            before = off < 0 ? 0 : off > 0 ? 2 : 1;
            head[i] = (u8)(near + off);
        }
    }
}

/* 0 where the fields make no sense. */
static int code_layout(struct Coder* coder, struct Stream* s) {
    s->lane_bits = direct(coder, 2, s->lane_bits);
    s->flat = direct(coder, 1, s->flat);
    s->contexts = direct(coder, 1, s->contexts);
    s->many = direct(coder, 1, s->many);
    u32 const lanes = 1u << s->lane_bits;
    s->count = s->rows * s->columns;
    s->stride = s->flat ? s->count / lanes + !!(s->count % lanes) : s->columns;
    s->lines = s->count ? (s->count - 1) / s->stride + 1 : 0;
    s->band = s->many ? direct(coder, 32, s->band) : s->lines;
    if (!s->lines) return !s->many;
    if (!s->band) return 0;
    s->chunks = (s->lines - 1) / s->band + 1;
    if (s->chunks > CHUNKS_AT_MOST) return 0;
    for (u32 i = 0; i + 1 < s->chunks; i++) s->lengths[i] = direct(coder, 32, s->lengths[i]);
    return 1;
}

/* 2^(i/16) · 2^12. */
static const u16 POWERS[16] = {4096, 4277, 4467, 4664, 4871, 5087, 5312, 5547,
                               5793, 6049, 6317, 6597, 6889, 7194, 7512, 7845};

/* Frequencies of a table: 2^(level / 2^(precision + 1)), made to come to SLOTS; 0 where there is no token. */
static int make_frequencies(u16* frequencies, const int16_t* levels, u32 precision) {
    u32 weights[TOKENS], largest = 0;
    u64 sum = 0;
    i32 left = SLOTS;
    for (u32 t = 0; t < TOKENS; t++) {
        u32 const fine = levels[t] < 0 ? 0 : (u32)levels[t] << (3 - precision);
        weights[t] = levels[t] < 0 ? 0 : (u32)POWERS[fine & 15] << (fine >> 4);
        sum += weights[t];
    }
    if (!sum) return 0;
    for (u32 t = 0; t < TOKENS; t++) {
        u32 const share = (u32)(((u64)weights[t] << SLOT_BITS) / sum);
        frequencies[t] = (u16)(weights[t] && !share ? 1 : share);
        left -= frequencies[t];
        if (weights[t] > weights[largest]) largest = t;
    }
    frequencies[largest] = (u16)(frequencies[largest] + left);
    return 1;
}

/* Tokens by magnitude, each level told by how far it is from what the two magnitudes before let expect. */
struct TableBits { struct Bit present[4][2]; struct Number level[4]; };

static int code_table(struct Coder* coder, struct TableBits* bits, int16_t* levels, u32 precision) {
    i32 const top = 12 << (precision + 1);
    i32 means[CLASSES];
    u32 classes = CLASSES, before = 1;
    while (classes && levels[classes > 16 ? ESCAPE + classes - 17 : EXACT + classes - 1] < 0 &&
           (classes > 16 || levels[EXACT + 1 - classes] < 0))
        classes--;
    classes = direct(coder, 6, classes);
    if (classes > CLASSES) return 0;
    for (u32 c = 0; c < classes; c++) {
        i32 expected = c ? means[c - 1] : top, found = 0, sum = 0;
        if (c > 2) expected += (means[c - 1] - means[c - 3]) >> 1;
        expected = expected < 0 ? 0 : expected > top ? top : expected;
        for (u32 side = 0; side < (c && c < 16 ? 2 : 1); side++) {
            u32 const kind = c == 0 ? 0 : c > 15 ? 3 : 1 + side;
            int16_t* const level = levels + (c > 15 ? ESCAPE + c - 16 : side ? EXACT - c : EXACT + c);
            before = adaptive(coder, &bits->present[kind][before], *level >= 0);
            if (!before) {
                *level = -1;
                continue;
            }
            i32 const near = found ? sum : expected;
            *level = (int16_t)(near + number(coder, &bits->level[kind], top, *level - near));
            if (*level < 0 || *level > top) return 0;
            sum += *level;
            found++;
        }
        means[c] = found ? sum / found : expected;
    }
    return 1;
}

static int code_tables(struct Coder* coder, struct Stream* s) {
    struct TableBits bits;
    struct Bit next;
    fresh(&bits, sizeof bits);
    fresh(&next, sizeof next);
    s->precision = direct(coder, 2, s->precision);
    s->tables = 1;
    if (s->contexts) {
        s->mean = direct(coder, 12, s->mean);
        if (s->mean > EXACT << 8) return 0;
        for (u32 i = 1; i < CONTEXTS; i++) {
            s->tables += adaptive(coder, &next, s->map[i] > s->map[i - 1]);
            if (s->tables > TABLES_AT_MOST) return 0;
            s->map[i] = (u8)(s->tables - 1);
        }
    }
    for (u32 t = 0; t < s->tables; t++)
        if (!code_table(coder, &bits, s->levels[t], s->precision) ||
            !make_frequencies(s->frequencies[t], s->levels[t], s->precision))
            return 0;
    return 1;
}

/* The quarter octave of a mean of magnitudes in 256ths, of mean / 4 + 4 rather, linear within an octave: 0 … 31. */
INLINE u32 level_of(u32 mean) {
    u32 const v = (mean >> 2) + 4, octave = 29 - (u32)__builtin_clz(v);
    return 4 * octave + (v >> octave) - 4;
}

INLINE u32 row_mean(u32 mean, u32 magnitude) { return (u32)((i32)mean + (((i32)(magnitude << 8) - (i32)mean) >> 5)); }

/* `group` counts the groups of lines of a chunk; the sum is over the lanes. */
INLINE u32 column_rate(u32 group, u32 lane_bits) {
    u32 const first = 4096 / (group + 2), least = 64u << lane_bits;
    return first > least ? first : least;
}
INLINE u32 column_mean(u32 mean, u32 sum, u32 lane_bits, u32 rate) {
    return (u32)((i32)mean + (((i32)(sum << 8 >> lane_bits) - (i32)mean) * (i32)rate >> 12));
}
