import { LoadError } from "./errors.js";

const PAGE = 65536;
const CHUNK = 1 << 20;
const VECTOR = 16;

let compiled;

/** codec.wasm, fetched and compiled once per page. */
export function compileCodec() {
  compiled ??= compile("codec.wasm", new URL("./codec.wasm", import.meta.url)).catch((error) => {
    compiled = undefined;
    throw error;
  });
  return compiled;
}

/** A file of ours, fetched and compiled. Bundlers find it by its address, written out where it is asked for. */
export async function compile(name, url) {
  let response, bytes;
  try {
    response = await fetch(url);
    bytes = await response.arrayBuffer();
  } catch (cause) {
    throw new LoadError("network", `${name} could not be fetched`, { cause });
  }
  if (!response.ok) {
    throw new LoadError("http", `${name}: the server answered ${response.status}`, { status: response.status });
  }
  try {
    return await WebAssembly.compile(bytes);
  } catch (cause) {
    throw new LoadError("unsupported", `${name} does not compile here`, { cause });
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

  /** The `size` bytes in a Zstandard frame, null where it is damaged. A view, as below: valid until the next call. */
  unzstd(bytes, size) {
    const { source, target, length } = this.#place(bytes, size);
    return this.exports.unzstd(this.space, target, size, source, length) ? this.#view(target, size) : null;
  }

  /** The first `skip` bytes, then `width` planes turned into `count` items. */
  planes(bytes, width, count, skip) {
    const { source, target, length } = this.#place(bytes, bytes.length, skip);
    this.exports.planes(target + skip, source + skip, width, count);
    return this.#view(target, length);
  }

  /** The first `skip` bytes, then `count` items, of which a mask and those not zero are there; null if they misfit. */
  sparse(bytes, width, count, skip) {
    const size = skip + count * width;
    const { source, target, length } = this.#place(bytes, size, skip);
    const fit = this.exports.sparse(target + skip, source + skip, length - skip, width, count);
    return fit ? this.#view(target, size) : null;
  }

  /** Two signed codes of four bits per byte, the lower one first, as an Int8Array. */
  nibbles(bytes) {
    const { source, target, length } = this.#place(bytes, 2 * bytes.length);
    this.exports.nibbles(target, source, length);
    return new Int8Array(this.exports.memory.buffer, target, 2 * length);
  }

  /** Whether the bytes lie in this codec's memory, where the next call may overwrite them. */
  owns(bytes) {
    return bytes.buffer === this.exports.memory.buffer;
  }

  #view(address, size) {
    return new Uint8Array(this.exports.memory.buffer, address, size);
  }

  /**
   * Where the bytes lie, copied in unless they are there, and where `size` bytes may go, of which the first `skip` are
   * copied from the bytes and the one after them is aligned.
   */
  #place(bytes, size, skip = 0) {
    const { length } = bytes;
    const owned = this.owns(bytes);
    const source = owned ? bytes.byteOffset : this.free;
    const pad = -skip & 15;
    const before = owned && this.free + pad + size <= source;
    const target = (before ? this.free : align(source + length)) + pad;
    // After the memory has grown, there is nothing left in views of what it was.
    const memory = this.#room(Math.max(source + length, target + size) - this.free);
    if (!owned) memory.set(bytes, source);
    if (skip) memory.copyWithin(target, source, source + skip);
    return { source, target, length };
  }

  /** The memory, grown until `size` bytes are free, and a vector that may be read behind them. */
  #room(size) {
    const { memory } = this.exports;
    const missing = this.free + size + VECTOR - memory.buffer.byteLength;
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
  return Math.ceil(address / VECTOR) * VECTOR;
}
