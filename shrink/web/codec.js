import { LoadError } from "./errors.js";

const PAGE = 65536;
const CHUNK = 1 << 20;

let compiled;

/** codec.wasm, fetched and compiled once per page. */
export function compileCodec() {
  compiled ??= fetchCodec().catch((error) => {
    compiled = undefined;
    throw error;
  });
  return compiled;
}

async function fetchCodec() {
  let response, bytes;
  try {
    response = await fetch(new URL("./codec.wasm", import.meta.url));
    bytes = await response.arrayBuffer();
  } catch (cause) {
    throw new LoadError("network", "codec.wasm could not be fetched", { cause });
  }
  if (!response.ok) {
    throw new LoadError("http", `codec.wasm: the server answered ${response.status}`, { status: response.status });
  }
  try {
    return await WebAssembly.compile(bytes);
  } catch (cause) {
    throw new LoadError("unsupported", "codec.wasm does not compile here", { cause });
  }
}

/** One instance of codec.wasm. Its memory: its own, the decoder's workspace, then what a call needs. */
export class Codec {
  static async create(module) {
    return new Codec((await WebAssembly.instantiate(module)).exports);
  }

  constructor(exports) {
    this.exports = exports;
    this.space = align(exports.heap());
    this.free = align(this.space + exports.workspace());
  }

  /** CRC-32 of the bytes, as zlib computes it. */
  crc32(bytes) {
    let crc = 0;
    for (let start = 0; start < bytes.length; start += CHUNK) {
      const part = bytes.subarray(start, start + CHUNK);
      this.#room(part.length).set(part, this.free);
      crc = this.exports.crc32(crc, this.free, part.length);
    }
    return crc >>> 0;
  }

  /** The `size` bytes in a Zstandard frame, null where it is damaged. A view, valid until the next call. */
  unzstd(bytes, size) {
    const source = this.owns(bytes) ? bytes.slice() : bytes;
    const target = this.free + align(source.length);
    this.#room(target - this.free + size).set(source, this.free);
    const { memory, unzstd } = this.exports;
    return unzstd(this.space, target, size, this.free, source.length)
      ? new Uint8Array(memory.buffer, target, size)
      : null;
  }

  /** Whether the bytes lie in this codec's memory, where the next call may overwrite them. */
  owns(bytes) {
    return bytes.buffer === this.exports.memory.buffer;
  }

  /** The memory, grown until `size` bytes are free. */
  #room(size) {
    const { memory } = this.exports;
    const missing = this.free + size - memory.buffer.byteLength;
    if (missing > 0) {
      try {
        memory.grow(Math.ceil(missing / PAGE));
      } catch (cause) {
        throw new LoadError("unsupported", `no memory for ${size} bytes`, { cause });
      }
    }
    return new Uint8Array(memory.buffer);
  }
}

function align(address) {
  return Math.ceil(address / 16) * 16;
}
