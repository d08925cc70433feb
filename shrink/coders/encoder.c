/* What only Python runs, and NumPy is too slow at: writing payloads of rans.1, and rounding with feedback.
 *
 * The caller lays out the memory from `heap` on. `python -m tests.web.build` makes encoder.wasm of it.
 */
#include "feedback.c"

extern unsigned char __heap_base;

u32 EXPORT(heap)(void) { return (u32)(size_t)&__heap_base; }

/* Base-2 logarithm to some seven digits, the same on every machine. */
static double log_2(double value) {
    u64 bits;
    __builtin_memcpy(&bits, &value, 8);
    i32 exponent = (i32)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    __builtin_memcpy(&value, &bits, 8);
    if (value > 1.4142135623730951) value /= 2, exponent++;
    double const t = (value - 1) / (value + 1), t2 = t * t;
    return exponent + 2.885390081777927 * t * (1 + t2 * (1.0 / 3 + t2 * (0.2 + t2 * (1.0 / 7 + t2 / 9))));
}

/* Writes bits at `at`; without a place it only counts what they would take. */
struct Coder { u8* at; u32 low, high; double bits; };

static u32 code_bit(struct Coder* coder, u32 one, u32 value) {
    if (!coder->at) {
        coder->bits += 16 - log_2(value ? one : 65536.0 - one);
        return value;
    }
    u32 const middle = coder->low + (u32)((u64)(coder->high - coder->low) * one >> 16);
    if (value) coder->high = middle; else coder->low = middle + 1;
    while (!((coder->low ^ coder->high) >> 24)) {
        *coder->at++ = (u8)(coder->high >> 24);
        coder->low <<= 8;
        coder->high = coder->high << 8 | 255;
    }
    return value;
}

typedef double Histogram[TOKENS];
typedef int16_t Levels[TABLES_AT_MOST][TOKENS];

static struct Stream stream;
static Histogram seen[CONTEXTS], merged[TABLES_AT_MOST];

/* One code: token, context of the code, lane. */
typedef u16 Entry;
struct Written { Entry* entry; u32* escape; };

INLINE u32 token_of(i32 value, u32** escapes) {
    u32 const magnitude = (u32)(value < 0 ? -value : value);
    if (magnitude <= EXACT) return (u32)(value + EXACT);
    u32 const octave = 31 - (u32)__builtin_clz(magnitude);
    u32 const lower = magnitude & ((1u << (octave - 1)) - 1);
    *(*escapes)++ = octave << 16 | lower << 1 | (value < 0);
    return ESCAPE + 2 * (octave - 4) + (magnitude >> (octave - 1) & 1);
}

struct Column { u16 mean; u8 level; };

INLINE void enter_columns(struct Written* w, const int16_t* line, u32 const active, u32 from, u32 to, u32* mean,
                          struct Column* column, u32 rate, u32 const contexts) {
    u32 const stride = stream.stride;
    Entry* entry = w->entry;
    u32* escape = w->escape;
    for (u32 j = from; j < to; j++) {
        u32 sum = 0;
        for (u32 l = 0; l < active; l++) {
            i32 const value = line[(size_t)l * stride + j];
            u32 const token = token_of(value, &escape);
            u32 const context = contexts ? level_of(mean[l]) + column[j].level : 0;
            *entry++ = (Entry)(token | context << 6 | l << 12);
            if (contexts) {
                u32 const whole = (u32)(value < 0 ? -value : value), magnitude = whole > EXACT ? EXACT : whole;
                mean[l] = row_mean(mean[l], magnitude);
                sum += magnitude;
            }
        }
        if (contexts) {
            u32 const now = column_mean(column[j].mean, sum, stream.lane_bits, rate);
            column[j] = (struct Column){(u16)now, (u8)level_of(now)};
        }
    }
    w->entry = entry, w->escape = escape;
}

/* The codes of one chunk in the order in which they are read. */
static void enter_chunk(struct Written* w, const int16_t* codes, u32 number, struct Column* column, u32 contexts) {
    u32 const lanes = 1u << stream.lane_bits, first = number * stream.band;
    u32 const last = stream.lines - first > stream.band ? first + stream.band : stream.lines;
    u32 const short_line = stream.count - (stream.lines - 1) * stream.stride;
    u32 mean[LANES_AT_MOST];
    for (u32 j = 0; contexts && j < stream.stride; j++)
        column[j] = (struct Column){(u16)stream.mean, (u8)level_of(stream.mean)};
    for (u32 at = first, group = 0; at < last; at += lanes, group++) {
        u32 const active = last - at < lanes ? last - at : lanes;
        u32 const whole = at + active == stream.lines ? short_line : stream.stride;
        u32 const rate = column_rate(group, stream.lane_bits);
        const int16_t* const line = codes + (size_t)at * stream.stride;
        for (u32 l = 0; l < lanes; l++) mean[l] = stream.mean;
        if (active == 8 && contexts) enter_columns(w, line, 8, 0, whole, mean, column, rate, 1);
        else if (active == 8) enter_columns(w, line, 8, 0, whole, mean, column, rate, 0);
        else enter_columns(w, line, active, 0, whole, mean, column, rate, contexts);
        if (whole < stream.stride && active > 1)
            enter_columns(w, line, active - 1, whole, stream.stride, mean, column, rate, contexts);
    }
}

static double plogp(double count) { return count > 0 ? count * log_2(count) : 0; }

/* Bits of codes with this histogram in a table of their own, the table by a rough estimate. */
static double alone(const double* histogram) {
    double sum = 0, bits = 0, present = 0;
    for (u32 t = 0; t < TOKENS; t++) {
        sum += histogram[t];
        bits -= plogp(histogram[t]);
        present += histogram[t] > 0;
    }
    return bits + plogp(sum) + 6 + 4 * present;
}

/* Neighbouring contexts share a table where one of their own would not pay for itself. */
static void merge_contexts(void) {
    static double best[TABLES_AT_MOST + 1][CONTEXTS + 1];
    static u8 cut[TABLES_AT_MOST + 1][CONTEXTS + 1];
    for (u32 k = 0; k <= TABLES_AT_MOST; k++)
        for (u32 end = 0; end <= CONTEXTS; end++) best[k][end] = end ? 1e300 : 0;
    for (u32 end = 1; end <= CONTEXTS; end++) {
        Histogram sum;
        clear(sum, sizeof sum);
        for (u32 start = end; start-- > 0;) {
            double some = 0;
            for (u32 t = 0; t < TOKENS; t++) sum[t] += seen[start][t], some += seen[start][t];
            /* An empty context begins nothing. */
            if (start && some == 0) continue;
            double const bits = alone(sum);
            for (u32 k = 1; k <= TABLES_AT_MOST; k++) {
                double const all = best[k - 1][start] + bits;
                if (all < best[k][end]) best[k][end] = all, cut[k][end] = (u8)start;
            }
        }
    }
    u32 tables = 1;
    for (u32 k = 1; k <= TABLES_AT_MOST; k++)
        if (best[k][CONTEXTS] < best[tables][CONTEXTS]) tables = k;
    clear(merged, sizeof merged);
    for (u32 k = tables, end = CONTEXTS; k > 0; end = cut[k][end], k--)
        for (u32 i = cut[k][end]; i < end; i++) {
            stream.map[i] = (u8)(k - 1);
            for (u32 t = 0; t < TOKENS; t++) merged[k - 1][t] += seen[i][t];
        }
    stream.tables = tables;
}

static void make_levels(int16_t* levels, const double* histogram, u32 precision) {
    double const steps = 2 << precision, top = 12 * steps;
    double largest = 0;
    for (u32 t = 0; t < TOKENS; t++) largest = histogram[t] > largest ? histogram[t] : largest;
    for (u32 t = 0; t < TOKENS; t++) {
        double const at = histogram[t] > 0 ? top + steps * (log_2(histogram[t]) - log_2(largest)) + 0.5 : -1;
        levels[t] = (int16_t)(histogram[t] > 0 ? at > 0 ? at : 0 : -1);
    }
}

/* Tables for the merged histograms at the precision that comes out smallest; bits of the tables and all codes. */
static double make_tables(void) {
    double least = 1e300;
    u32 precise = 0;
    u32 const tables = stream.tables;
    for (u32 round = 0; round < 5; round++) {
        struct Coder coder = {0, 0, ~0u, 0};
        stream.precision = round < 4 ? round : precise;
        for (u32 k = 0; k < tables; k++) make_levels(stream.levels[k], merged[k], stream.precision);
        code_tables(&coder, &stream);
        for (u32 k = 0; k < tables; k++)
            for (u32 t = 0; t < TOKENS; t++)
                if (merged[k][t] > 0) coder.bits += merged[k][t] * (SLOT_BITS - log_2(stream.frequencies[k][t]));
        if (coder.bits < least) least = coder.bits, precise = round;
    }
    return least;
}

/* Static or with contexts, whichever is smaller. */
static void choose_tables(void) {
    u32 const contexts = stream.contexts;
    double with = 1e300;
    if (contexts) {
        merge_contexts();
        with = make_tables();
    }
    clear(merged, sizeof merged);
    for (u32 i = 0; i < CONTEXTS; i++)
        for (u32 t = 0; t < TOKENS; t++) merged[0][t] += seen[i][t];
    stream.contexts = 0, stream.tables = 1;
    if (make_tables() > with) {
        stream.contexts = contexts;
        merge_contexts();
        make_tables();
    }
}

/* One chunk behind `to`; `words` is the end of room for a word per code. */
static u8* write_chunk(u8* to, const Entry* first, const Entry* last, const u32* escape, const u32* escapes_end,
                       u8* words) {
    u32 x[LANES_AT_MOST];
    u8* const words_end = words;
    u32 const lanes = 1u << stream.lane_bits;
    for (u32 l = 0; l < LANES_AT_MOST; l++) x[l] = LOWEST;
    static u32 starts[TABLES_AT_MOST][TOKENS];
    for (u32 k = 0; k < stream.tables; k++)
        for (u32 t = 0, start = 0; t < TOKENS; start += stream.frequencies[k][t++]) starts[k][t] = start;
    while (last > first) {
        u32 const entry = *--last, token = entry & 63, lane = entry >> 12;
        u32 const table = stream.contexts ? stream.map[entry >> 6 & 63] : 0;
        u32 const frequency = stream.frequencies[table][token];
        u32 state = x[lane];
        if ((u64)state >= (u64)frequency << (32 - SLOT_BITS)) {
            words -= 2;
            words[0] = (u8)state, words[1] = (u8)(state >> 8);
            state >>= 16;
        }
        x[lane] = (state / frequency << SLOT_BITS) + state % frequency + starts[table][token];
    }
    for (u32 l = 0; l < lanes; l++, to += 4) __builtin_memcpy(to, &x[l], 4);
    __builtin_memcpy(to, words, (size_t)(words_end - words));
    to += words_end - words;
    /* What escapes leave to say, the first bit at the very end. */
    u32 bits = 0;
    for (const u32* e = escape; e < escapes_end; e++) bits += *e >> 16;
    u8* const end = to + (bits + 7) / 8;
    clear(to, (size_t)(end - to));
    bits = 0;
    for (const u32* e = escape; e < escapes_end; e++)
        for (u32 i = *e >> 16; i-- > 0; bits++) end[-1 - (i32)(bits >> 3)] |= (u8)((*e >> i & 1) << (7 - (bits & 7)));
    return end;
}

static void choose_ways(const u8* head, u8* ways, u8* scratch) {
    double least[2] = {1e300, 1e300};
    __builtin_memcpy(scratch, head, stream.head);
    for (u8 way = 0; way < 3; way++)
        for (u32 part = 0; part < 2; part++) {
            /* The other part costs the same every time. */
            u8 const tried[2] = {part ? 0 : way, part ? way : 0};
            struct Coder coder = {0, 0, ~0u, 0};
            code_head(&coder, &stream, scratch, tried);
            if (coder.bits < least[part]) least[part] = coder.bits, ways[part] = way;
        }
}

/* The payload at `to`; its length, 0 where the layout makes no sense. `entries` has room for 2 bytes per code,
 * `escapes` for 4, `body` for 6 and 64 per chunk, `column` for 4 per column of a line; before `words` are 2 per code. `codes` and
 * `head` come back as they are. */
u32 EXPORT(encode)(u8* to, const int16_t* codes, u32 rows, u32 columns, u8* head, u32 head_size, u32 lane_bits,
                   u32 flat, u32 contexts, u32 band, Entry* entries, u32* escapes, u8* body, u8* words, void* column,
                   u8* scratch) {
    static Entry* entry_ends[CHUNKS_AT_MOST];
    static u32* escape_ends[CHUNKS_AT_MOST];
    struct Coder coder = {0, 0, ~0u, 0};
    struct Written written = {entries, escapes};
    u8 ways[2] = {0, 0};
    clear(&stream, sizeof stream);
    stream.rows = rows, stream.columns = columns, stream.head = head_size;
    stream.lane_bits = lane_bits, stream.flat = flat, stream.contexts = contexts, stream.many = band != 0;
    stream.band = band;
    if (!code_layout(&coder, &stream)) return 0;
    if (contexts) {
        u64 sum = 0;
        for (u32 i = 0; i < stream.count; i++) {
            u32 const magnitude = (u32)(codes[i] < 0 ? -codes[i] : codes[i]);
            sum += magnitude > EXACT ? EXACT : magnitude;
        }
        if (stream.count) stream.mean = (u32)(((sum << 8) + stream.count / 2) / stream.count);
    }
    clear(seen, sizeof seen);
    static u32 counts[64 * 64];
    clear(counts, sizeof counts);
    for (u32 i = 0; i < stream.chunks; i++) {
        enter_chunk(&written, codes, i, column, contexts);
        entry_ends[i] = written.entry, escape_ends[i] = written.escape;
    }
    for (const Entry* entry = entries; entry < written.entry; entry++) counts[*entry & 4095]++;
    for (u32 i = 0; i < CONTEXTS; i++)
        for (u32 t = 0; t < TOKENS; t++) seen[i][t] = counts[i << 6 | t];
    u8* end = body;
    if (stream.count) choose_tables();
    for (u32 i = 0; i < stream.chunks; i++) {
        const Entry* const first = i ? entry_ends[i - 1] : entries;
        const u32* const escape = i ? escape_ends[i - 1] : escapes;
        u8* const next = write_chunk(end, first, entry_ends[i], escape, escape_ends[i], words);
        stream.lengths[i] = (u32)(next - end);
        end = next;
    }
    choose_ways(head, ways, scratch);
    coder = (struct Coder){scratch, 0, ~0u, 0};
    code_layout(&coder, &stream);
    if (stream.count) code_tables(&coder, &stream);
    code_head(&coder, &stream, head, ways);
    /* One byte says which half is meant, the zeros that follow need not be there. */
    *coder.at++ = (u8)((coder.low >> 24) + 1);
    u32 size = (u32)(coder.at - scratch);
    u8* out = to;
    for (u32 rest = size; rest || out == to; rest >>= 7) *out++ = (u8)((rest & 127) | (rest > 127 ? 128 : 0));
    __builtin_memcpy(out, scratch, size);
    out += size;
    __builtin_memcpy(out, body, (size_t)(end - body));
    return (u32)(out + (end - body) - to);
}
