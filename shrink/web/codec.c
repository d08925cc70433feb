/* What JavaScript is too slow at: Zstandard and CRC-32, on addresses in the exported memory.
 *
 * The decoder is Zstandard's own, from the sources inside the Python package zstandard, so that Python and the
 * browser run the same code. It needs no allocator: from `heap` on, the caller lays out the memory.
 * `python -m tests.web.build` makes codec.wasm of it.
 */
#include "zstd.c"

#define EXPORT(name) __attribute__((export_name(#name))) name

extern unsigned char __heap_base;

/* The first address that the caller may use. */
U32 EXPORT(heap)(void) { return (U32)(size_t)&__heap_base; }

/* The bytes that `unzstd` needs at `space`, an address divisible by 8. */
U32 EXPORT(workspace)(void) { return (U32)ZSTD_estimateDCtxSize(); }

/* 1 when the `length` bytes at `source` are a frame of exactly `size` bytes, which then lie at `target`. */
int EXPORT(unzstd)(void* space, void* target, U32 size, const void* source, U32 length) {
    ZSTD_DCtx* const context = ZSTD_initStaticDCtx(space, ZSTD_estimateDCtxSize());
    return context && ZSTD_decompressDCtx(context, target, size, source, length) == size;
}

/* Zstandard mentions these; a static context never calls them. */
void* malloc(size_t size) { (void)size; return NULL; }
void* calloc(size_t count, size_t size) { (void)count; (void)size; return NULL; }
void free(void* pointer) { (void)pointer; }

/* CRC-32 as in zlib, eight bytes at a time: tables[k] is the effect of a byte k places before the last one
 * (M. Kounavis, F. Berry, "A Systematic Approach to Building High Performance Software-Based CRC Generators",
 * ISCC 2005). Begin with crc 0, go on with the last result. */
static U32 tables[8][256];

static void fill_tables(void) {
    for (U32 byte = 0; byte < 256; byte++) {
        U32 value = byte;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        tables[0][byte] = value;
    }
    for (int place = 1; place < 8; place++)
        for (U32 byte = 0; byte < 256; byte++) {
            U32 const before = tables[place - 1][byte];
            tables[place][byte] = before >> 8 ^ tables[0][before & 255];
        }
}

U32 EXPORT(crc32)(U32 crc, const BYTE* data, U32 length) {
    if (!tables[0][1]) fill_tables();
    crc = ~crc;
    for (; length >= 8; length -= 8, data += 8) {
        U32 const a = MEM_readLE32(data) ^ crc, b = MEM_readLE32(data + 4);
        crc = tables[7][a & 255] ^ tables[6][a >> 8 & 255] ^ tables[5][a >> 16 & 255] ^ tables[4][a >> 24] ^
              tables[3][b & 255] ^ tables[2][b >> 8 & 255] ^ tables[1][b >> 16 & 255] ^ tables[0][b >> 24];
    }
    for (; length; length--, data++) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
    return ~crc;
}
