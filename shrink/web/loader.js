/**
 * Loads the weights of a .safetensors file that shrink wrote, or of a plain one.
 *
 *     import { load } from "./loader.js";
 *     const weights = await load("gen.eightbit.safetensors", { onProgress, signal, cache: true });
 *     weights.get("l1/W");          // Float32Array
 *     weights.shapes.get("l1/W");   // [128, 100]
 *
 * GUIDE.md explains it, loader.d.ts lists all options.
 */
import { Assembler } from "./assembler.js";
import { openCache } from "./cache.js";
import { Codec, compileCodec } from "./codec.js";
import { openDecoder } from "./decoder.js";
import { Download } from "./download.js";
import { LoadError, throwIfAborted, unlessAborted } from "./errors.js";
import { parseAttributes } from "./header.js";

export { LoadError };

const MAX_BYTES = 2 ** 32;
const INTEGRITY = /^sha(256|384|512)-[A-Za-z0-9+/]+={0,2}$/;

/** Typed arrays by name, in file order. */
export class Weights extends Map {
  /** Name → dimensions, outermost first. */
  shapes = new Map();
  /** Name → dtype of the typed array, in safetensors spelling. */
  dtypes = new Map();
  /** What the model's own format must have back, text by text. */
  attributes = {};
  /** The ONNX graph, a serialized ModelProto without data, or null. */
  graph = null;
}

/** The weights in the file at `url`. Throws LoadError; nothing stays behind then. */
export async function load(url, options = {}) {
  const { signal, request, integrity, tries = 3, delay = 500 } = options;
  if (integrity !== undefined && !INTEGRITY.test(integrity)) throw new TypeError("integrity is not like sha256-…=");
  throwIfAborted(signal);
  const address = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href).href;
  const tools = openTools();
  // Whoever awaits them hears of a failure; this keeps the browser from calling it unhandled.
  tools.catch(() => {});
  try {
    const cache = options.cache ? await openCache(address) : null;
    const job = new Job({ ...options, cache, tools });
    return await job.run(new Download(address, { signal, request, tries, delay }));
  } finally {
    tools.then(({ decoder }) => decoder.close(), () => {});
  }
}

/** They start while the first bytes are on their way. */
async function openTools() {
  const module = await compileCodec();
  const [codec, decoder] = await Promise.all([Codec.create(module), openDecoder(module)]);
  return { codec, decoder };
}

class Job {
  constructor({ onProgress = () => {}, signal, integrity, maxBytes = MAX_BYTES, cache, tools }) {
    Object.assign(this, { onProgress, signal, integrity, maxBytes, cache, tools });
  }

  async run(download) {
    const known = this.integrity && (await this.#fromCache(this.integrity));
    if (known) return known;
    let store = this.cache;
    for (;;) {
      try {
        const { weights, hit } = await this.#read(download, store);
        const found = weights ?? (await this.#fromCache(hit));
        if (found) return found;
        // Damaged in the cache: this time without it.
        store = null;
      } catch (error) {
        // The file may have changed between two answers, without the server noticing.
        if (error.code !== "corrupt" || !download.spliced || !download.again()) throw error;
      }
    }
  }

  /** The weights of a file in the cache, null where it is not there; what is damaged is thrown away. */
  async #fromCache(hash) {
    const response = await this.cache?.find(hash);
    if (!response) return null;
    try {
      return (await this.#read(new Stored(response), null)).weights;
    } catch (error) {
      if (error.code !== "corrupt" && error.code !== "truncated") throw error;
      await this.cache.forget(hash);
      return null;
    }
  }

  /**
   * Decode the file that `source` gives, and store it where there is a `store`. Gives { weights }, or { hit }, the hash
   * under which the store has this very content, as the header shows.
   */
  async #read(source, store) {
    let attempt = null;
    try {
      for await (const piece of source.pieces(() => attempt?.assembler.size ?? Infinity)) {
        throwIfAborted(this.signal);
        if (piece.position === 0) {
          await attempt?.cancel();
          attempt = new Attempt(this, await unlessAborted(this.tools, this.signal), source);
        }
        const hit = await attempt.take(piece, store);
        if (hit) return { hit };
      }
      if (!attempt?.assembler.complete) throw new LoadError("truncated", "the file ends too early");
      return { weights: await attempt.finish() };
    } catch (error) {
      await attempt?.cancel();
      throw error;
    }
  }
}

/** One file from its first byte to its last. */
class Attempt {
  constructor(job, { codec, decoder }, source) {
    this.job = job;
    this.source = source;
    this.decoder = decoder;
    this.assembler = new Assembler({ crc32: (bytes) => codec.crc32(bytes), whole: Boolean(job.integrity) });
    this.before = [];
    this.decoding = [];
    this.total = 0;
    this.copy = null;
    this.cancelled = false;
  }

  /** Take the next bytes; the hash of the content where `store` has it already. */
  async take(piece, store) {
    const { job, assembler } = this;
    // What comes before the hash is known waits for the copy in the cache to begin.
    if (store && !assembler.header) this.before.push(piece.bytes);
    else this.copy?.push(piece.bytes);
    for (const { header, section, bytes } of assembler.push(piece)) {
      if (header) {
        this.total = header.sections.reduce((sum, { decodedBytes = 0 }) => sum + decodedBytes, 0);
        if (this.total > job.maxBytes) {
          throw new LoadError("unsupported", `the weights take ${this.total} bytes, more than ${job.maxBytes}`);
        }
        const hash = store && (job.integrity ?? (await contentHash(header, bytes)));
        if (hash && (await store.find(hash))) return hash;
        if (hash) this.copy = store.keep(hash);
        for (const early of this.before.splice(0)) this.copy?.push(early);
      } else {
        this.#decode(section, bytes);
      }
    }
    if (assembler.header) this.#tell();
    return null;
  }

  #decode(section, bytes) {
    const decoded = this.decoder.decode(section, bytes).then((values) => [section, values]);
    // What is found wrong with an earlier attempt is no matter of this one.
    decoded.catch((error) => this.cancelled || this.source.stop(error));
    this.decoding.push(decoded);
  }

  #tell() {
    const { loaded, name } = this.assembler.progress;
    // The last byte counts when everything is decoded and checked.
    this.job.onProgress({ loaded: Math.max(0, Math.min(loaded, this.total - 1)), total: this.total, name });
  }

  async finish() {
    const { job, assembler, total } = this;
    const weights = new Weights();
    const decoded = await unlessAborted(Promise.all(this.decoding), job.signal);
    await checkIntegrity(assembler.file, job.integrity);
    for (const [{ name, blob, dtype, shape }, values] of decoded) {
      if (!blob) {
        weights.set(name, values);
        weights.shapes.set(name, shape);
        weights.dtypes.set(name, dtype === "F16" || dtype === "BF16" ? "F32" : dtype);
      } else if (name === "shrink.graph") {
        weights.graph = values;
      } else {
        weights.attributes = parseAttributes(values);
      }
    }
    await this.copy?.finish();
    job.onProgress({ loaded: total, total, name: "" });
    return weights;
  }

  async cancel() {
    this.cancelled = true;
    await this.copy?.cancel();
  }
}

/** A hash that changes when any tensor does, as the header has the CRC of each; null for foreign files. */
async function contentHash({ described, sections }, header) {
  if (!described || !sections.every(({ crc32 }) => crc32 !== undefined)) return null;
  return `header-${base64(await crypto.subtle.digest("SHA-256", header))}`;
}

async function checkIntegrity(file, integrity) {
  if (!integrity || !globalThis.crypto?.subtle) return;
  const [algorithm, expected] = integrity.split(/-(.*)/s);
  const digest = await crypto.subtle.digest(algorithm.replace("sha", "SHA-"), file);
  if (base64(digest) !== expected) throw new LoadError("corrupt", `the file does not have the hash ${integrity}`);
}

function base64(buffer) {
  return btoa(String.fromCharCode(...new Uint8Array(buffer)));
}

/** A file out of the cache, in pieces like those of a Download. */
class Stored {
  constructor(response) {
    this.response = response;
    this.stopped = null;
  }

  stop(error) {
    this.stopped = error;
  }

  async *pieces() {
    let position = 0;
    for (const reader = this.response.body.getReader(); ; ) {
      const { done, value } = await reader.read().catch((cause) => {
        throw new LoadError("corrupt", "the cached file cannot be read", { cause });
      });
      if (this.stopped) throw this.stopped;
      if (done) return;
      yield { position, bytes: value };
      position += value.length;
    }
  }
}
