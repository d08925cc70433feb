/* What JavaScript is too slow at: Zstandard, CRC-32, and the rearranging of bytes, on addresses in the exported memory.
 *
 * The decoder is Zstandard's own, from the sources inside the Python package zstandard, so that Python and the
 * browser run the same code. It needs no allocator: from `heap` on, the caller lays out the memory.
 * `python -m tests.web.build` makes codec.wasm of it.
 */
#include <wasm_simd128.h>

#include "zstd.c"

#define EXPORT(name) __attribute__((export_name(#name))) name

extern unsigned char __heap_base;

/* The first address that the caller may use. */
U32 EXPORT(heap)(void) { return (U32)(size_t)&__heap_base; }

/* The bytes that `unzstd` needs at `space`, an address divisible by 8. */
U32 EXPORT(workspace)(void) { return (U32)ZSTD_estimateDCtxSize(); }

/* 1 when the `length` bytes at `source` are one frame of exactly `size` bytes, which then lie at `target`. These
 * are ZSTD_decompress's own steps, without its code for more frames and for dictionaries: 0.9 kB less to download. */
int EXPORT(unzstd)(void* space, void* target, U32 size, const void* source, U32 length) {
    ZSTD_DCtx* const context = ZSTD_initStaticDCtx(space, ZSTD_estimateDCtxSize());
    size_t left = length;
    if (!context || length < 4 || MEM_readLE32(source) != ZSTD_MAGICNUMBER) return 0;
    ZSTD_decompressBegin(context);
    ZSTD_checkContinuity(context, target, size);
    return ZSTD_decompressFrame(context, target, size, &source, &left) == size && !left;
}

/* Zstandard mentions these; a static context never calls them. */
void* malloc(size_t size) { (void)size; return NULL; }
void* calloc(size_t count, size_t size) { (void)count; (void)size; return NULL; }
void free(void* pointer) { (void)pointer; }

/* CRC-32 as in zlib, sixteen bytes at a time: tables[k] is the effect of a byte k places before the last one
 * (M. Kounavis, F. Berry, "A Systematic Approach to Building High Performance Software-Based CRC Generators",
 * ISCC 2005). Begin with crc 0, go on with the last result. */
static U32 tables[16][256];

static void fill_tables(void) {
    for (U32 byte = 0; byte < 256; byte++) {
        U32 value = byte;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        tables[0][byte] = value;
    }
    for (int place = 1; place < 16; place++)
        for (U32 byte = 0; byte < 256; byte++) {
            U32 const before = tables[place - 1][byte];
            tables[place][byte] = before >> 8 ^ tables[0][before & 255];
        }
}

U32 EXPORT(crc32)(U32 crc, const BYTE* data, U32 length) {
    if (!tables[0][1]) fill_tables();
    crc = ~crc;
    for (; length >= 16; length -= 16, data += 16) {
        U32 const words[4] = {MEM_readLE32(data) ^ crc, MEM_readLE32(data + 4), MEM_readLE32(data + 8),
                              MEM_readLE32(data + 12)};
        crc = 0;
#pragma clang loop unroll(full)
        for (int i = 0; i < 16; i++) crc ^= tables[15 - i][words[i / 4] >> 8 * (i % 4) & 255];
    }
    for (; length; length--, data++) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
    return ~crc;
}

#define TILE 64u
/* Eight bytes of each of two vectors, from lane i on, in turns; the same for four items of two bytes. */
#define ZIP8(a, b, i)                                                                                    \
    wasm_i8x16_shuffle(a, b, i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, \
                       i + 21, i + 6, i + 22, i + 7, i + 23)
#define ZIP16(a, b, i) wasm_i16x8_shuffle(a, b, i, i + 8, i + 1, i + 9, i + 2, i + 10, i + 3, i + 11)

/* planes.1: `width` planes of `count` bytes become `count` items of `width` bytes. */
void EXPORT(planes)(BYTE* target, const BYTE* source, U32 width, U32 count) {
    const BYTE *const b = source + count, *const c = b + count, *const d = c + count;
    U32 done = 0;
    if (width == 2)
        for (; count - done >= 16; done += 16) {
            v128_t const low = wasm_v128_load(source + done), high = wasm_v128_load(b + done);
            wasm_v128_store(target + 2 * done, ZIP8(low, high, 0));
            wasm_v128_store(target + 2 * done + 16, ZIP8(low, high, 8));
        }
    if (width == 4)
        for (; count - done >= 16; done += 16) {
            v128_t const v0 = wasm_v128_load(source + done), v1 = wasm_v128_load(b + done);
            v128_t const v2 = wasm_v128_load(c + done), v3 = wasm_v128_load(d + done);
            v128_t const low0 = ZIP8(v0, v1, 0), low8 = ZIP8(v0, v1, 8);
            v128_t const high0 = ZIP8(v2, v3, 0), high8 = ZIP8(v2, v3, 8);
            wasm_v128_store(target + 4 * done, ZIP16(low0, high0, 0));
            wasm_v128_store(target + 4 * done + 16, ZIP16(low0, high0, 4));
            wasm_v128_store(target + 4 * done + 32, ZIP16(low8, high8, 0));
            wasm_v128_store(target + 4 * done + 48, ZIP16(low8, high8, 4));
        }
    /* The rest, and other widths, in tiles, so that both sides stay in the cache. */
    for (U32 top = 0; top < width; top += TILE)
        for (U32 left = done; left < count; left += TILE)
            for (U32 i = left; i < count && i < left + TILE; i++)
                for (U32 plane = top; plane < width && plane < top + TILE; plane++)
                    target[i * width + plane] = source[plane * count + i];
}

/* ranks[mask][i]: how many ones are below bit i, where that bit is one; else what a swizzle takes for zero. */
static BYTE ranks[256][8];

static void fill_ranks(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, rank = 0; i < 8; i++) ranks[mask][i] = mask >> i & 1 ? rank++ : 255;
}

/* As many items at a time as fill a vector (of one byte: eight). For each byte of the vector, `item` says which item
 * it belongs to and `place` where in there. */
#define SPREAD(shift, store, item, place)                                                                    \
    for (U32 const n = shift ? 16 >> shift : 8; count - done >= n; done += n) {                              \
        U32 const bits = mask[done >> 3] >> (done & 7) & ((1u << n) - 1);                                    \
        v128_t const rank = wasm_i8x16_swizzle(wasm_v128_load64_zero(ranks[bits]), item);                    \
        v128_t const index = wasm_i8x16_add(wasm_i8x16_shl(rank, shift), place);                             \
        store(target + (done << shift), wasm_i8x16_swizzle(wasm_v128_load(items), index));                   \
        items += __builtin_popcount(bits) << shift;                                                          \
    }
#define ITEM1 wasm_i8x16_const(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0)
#define ITEM2 wasm_i8x16_const(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
#define ITEM4 wasm_i8x16_const(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
#define STORE8(address, vector) wasm_v128_store64_lane(address, vector, 0)

/* sparse.1: the `length` bytes at `source` are a bit for each of `count` items, and those items of `width` bytes
 * that are not zero. 1 when they fit together: then all items lie at `target`. Behind the source there must be 16
 * more bytes of memory, as whole vectors are read. */
int EXPORT(sparse)(BYTE* target, const BYTE* source, U32 length, U32 width, U32 count) {
    const BYTE *const mask = source, *const end = source + length, *items = source + (count >> 3) + !!(count & 7);
    U32 present = 0, done = 0;
    if (items > end || (count & 7 && items[-1] >> (count & 7))) return 0;
    for (const BYTE* byte = mask; byte < items; byte++) present += __builtin_popcount(*byte);
    if ((U64)present * width != (U64)(end - items)) return 0;
    if (!ranks[0][0]) fill_ranks();
    if (width == 1) SPREAD(0, STORE8, ITEM1, wasm_i8x16_splat(0))
    if (width == 2) SPREAD(1, wasm_v128_store, ITEM2, wasm_i16x8_splat(0x0100))
    if (width == 4) SPREAD(2, wasm_v128_store, ITEM4, wasm_i32x4_splat(0x03020100))
    for (; done < count; done++)
        for (U32 i = 0, bit = mask[done >> 3] >> (done & 7) & 1; i < width; i++)
            target[done * width + i] = bit ? *items++ : 0;
    return 1;
}

/* affine.1: two signed codes of four bits in each of `length` bytes, the lower one first, become bytes. */
void EXPORT(nibbles)(BYTE* target, const BYTE* source, U32 length) {
    v128_t const eight = wasm_i8x16_splat(8), fifteen = wasm_i8x16_splat(15);
    for (; length >= 16; length -= 16, source += 16, target += 32) {
        v128_t const packed = wasm_v128_load(source);
        v128_t const low = wasm_i8x16_sub(wasm_v128_xor(wasm_v128_and(packed, fifteen), eight), eight);
        v128_t const high = wasm_i8x16_sub(wasm_v128_xor(wasm_u8x16_shr(packed, 4), eight), eight);
        wasm_v128_store(target, ZIP8(low, high, 0));
        wasm_v128_store(target + 16, ZIP8(low, high, 8));
    }
    for (; length; length--, source++) {
        *target++ = ((*source & 15) ^ 8) - 8;
        *target++ = ((*source >> 4) ^ 8) - 8;
    }
}
