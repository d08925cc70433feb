/** Times decoding on one thread: everything is in memory before the clock starts. */
import { Assembler } from "./web/assembler.js";
import { Codec, compileCodec } from "./web/codec.js";
import { openInline } from "./web/sections.js";

async function bytesOf(url) {
  return new Uint8Array(await (await fetch(url)).arrayBuffer());
}

/** Milliseconds to decode every tensor of a file, checksums included; and the bytes it gave. */
async function timeFile(url) {
  const module = await compileCodec();
  const codec = await Codec.create(module);
  const assembler = new Assembler({ crc32: (bytes) => codec.crc32(bytes), whole: false });
  const parts = [];
  for await (const part of assembler.push(await bytesOf(url))) if (part.section) parts.push(part);
  const decoder = await openInline(module);
  let size = 0;
  const start = performance.now();
  for (const { section, bytes } of parts) size += (await decoder.decode(section, bytes)).byteLength;
  return [performance.now() - start, size];
}

/** The same for raw float32 values behind gzip, into one array. */
async function timeGzip(url) {
  const packed = await bytesOf(url);
  const start = performance.now();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const values = new Float32Array(await new Response(stream).arrayBuffer());
  return [performance.now() - start, values.byteLength];
}

globalThis.time = (url) => (url.endsWith(".gz") ? timeGzip(url) : timeFile(url));
