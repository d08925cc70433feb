/**
 * Loads the weights of a .safetensors file that shrink wrote, or of a plain one; or of the parts that an index lists.
 * GUIDE.md explains it, loader.d.ts lists all options.
 */
import { Assembler } from "./assembler.js";
import { Stored, base64, checkIntegrity, openCache } from "./cache.js";
import { Codec, compileCodec } from "./codec.js";
import { openDecoder } from "./decoder.js";
import { bytesOf } from "./dtypes.js";
import { Download } from "./download.js";
import { LoadError, throwIfAborted, tooMuch, unlessAborted } from "./errors.js";
import { parseAttributes } from "./header.js";
import { MAX_BYTES, PartsDownload, beside, checkParts, fetchIndex, fetchParts } from "./parts.js";
import { joinParts, readIndex, sizeOf } from "./parts.js";

export { LoadError, fetchParts, joinParts };

// Stored bytes that may wait for the decoder before more are taken from the network.
const WAITING_AT_MOST = 2 ** 25;
const INTEGRITY = /^sha(256|384|512)-[A-Za-z0-9+/]+={0,2}$/;
// After these the index may be older than what it lists.
const OUTDATED = ["corrupt", "truncated", "http"];

/** Typed arrays by name, in file order; loader.d.ts says what else. */
export class Weights extends Map {
  shapes = new Map();
  dtypes = new Map();
  attributes = {};
  graph = null;
}

/** The weights in the file at `url`. Throws LoadError; nothing stays behind then. */
export async function load(url, options = {}) {
  const { signal, integrity, parts, decodedBytes } = options;
  if (integrity !== undefined && !INTEGRITY.test(integrity)) throw new TypeError("integrity is not like sha256-…=");
  throwIfAborted(signal);
  const address = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href).href;
  const tools = openTools();
  // Whoever awaits them hears of a failure; this keeps the browser from calling it unhandled.
  tools.catch(() => {});
  try {
    if (parts) return await new Job(options, tools).join(checkParts(parts, options), address, decodedBytes);
    if (new URL(address).pathname.endsWith(".json")) return await loadIndexed(address, options, tools);
    return await loadFile(address, options, tools);
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

async function loadFile(address, options, tools) {
  const { signal, request, cache, tries = 3, delay = 500 } = options;
  const store = cache ? await openCache(address) : null;
  return new Job(options, tools, store).run(new Download(address, { signal, request, tries, delay }));
}

/** The weights that an index stands for. Where something does not fit, a redeploy may have come in between: once more. */
async function loadIndexed(address, options, tools) {
  const job = new Job(options, tools);
  const follow = async (text) => {
    const index = await named(address, readIndex(text, address, { ...options, maxBytes: job.maxBytes }));
    return index.parts ? job.join(index.parts, address, index.decodedBytes) : loadShards(index, address, job);
  };
  const text = await named(address, fetchIndex(address, options));
  try {
    return await follow(text);
  } catch (error) {
    if (!OUTDATED.includes(error.code)) throw error;
    const newer = await fetchIndex(address, options).catch(() => text);
    throwIfAborted(options.signal);
    if (newer.length === text.length && newer.every((byte, at) => byte === text[at])) throw error;
    return follow(newer);
  }
}

/** The weights of shards that others made: one whole file after the other, in the index's order. */
async function loadShards({ map, total }, address, { options, tools, maxBytes, onProgress }) {
  const files = [...new Set(map.values())];
  const shards = new Map();
  let [room, most] = [maxBytes, 0];
  for (const file of files) {
    const told = ({ loaded, total: size, name }) => {
      const share = (shards.size + loaded / Math.max(size, 1)) / files.length;
      most = Math.max(most, Math.min(Math.floor(total * share), total - 1));
      onProgress({ loaded: most, total, name });
    };
    const own = { ...options, integrity: undefined, maxBytes: room, onProgress: told };
    const url = beside(file, address);
    const shard = await named(url, loadFile(url, own, tools));
    shards.set(file, shard);
    for (const [name, { byteLength }] of shard) {
      if (map.get(name) !== file) throw disagrees(file, name);
      room -= byteLength;
    }
  }
  const weights = new Weights();
  for (const [name, file] of map) {
    if (!shards.get(file).has(name)) throw disagrees(file, name);
    const shard = shards.get(file);
    weights.set(name, shard.get(name));
    weights.shapes.set(name, shard.shapes.get(name));
    weights.dtypes.set(name, shard.dtypes.get(name));
  }
  for (const { attributes, graph } of shards.values()) {
    Object.assign(weights.attributes, attributes);
    weights.graph ??= graph;
  }
  onProgress({ loaded: total, total, name: "" });
  return weights;
}

function disagrees(file, tensor) {
  return new LoadError("corrupt", `the index and ${file} disagree about it`, { tensor });
}

/** What the promise gives; an error of it names the file at this address. */
async function named(address, promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.code !== "aborted") error.message = `${nameOf(address)}: ${error.message}`;
    throw error;
  }
}

function nameOf(address) {
  const name = new URL(address).pathname.split("/").pop();
  try {
    return decodeURIComponent(name);
  } catch {
    return name;
  }
}

/** Gives the weights of one file, whole or in parts. */
class Job {
  constructor(options, tools, cache = null) {
    const { onProgress = () => {}, signal, integrity, maxBytes = MAX_BYTES } = options;
    Object.assign(this, { options, onProgress, signal, integrity, maxBytes, cache, tools });
    /** The tensor that is coming. */
    this.name = "";
    /** The largest share of the parts that has come, and what progress calls all of them; not of a single file. */
    this.share = 0;
    this.stated = undefined;
  }

  /** The weights of the file in these checked parts beside `base`, of which somebody may have said its decoded size. */
  async join(parts, base, decodedBytes) {
    const stored = parts.reduce((sum, { bytes }) => sum + bytes, 0);
    const total = (this.stated = decodedBytes ?? sizeOf(parts));
    // Each part has its hash, and the cache knows it by that.
    this.integrity = undefined;
    this.decodedBytes = decodedBytes;
    const onProgress = (bytes) => {
      this.share = Math.max(this.share, bytes / stored);
      this.tell(Math.floor(this.share * total), total, this.name);
    };
    const { weights } = await this.#read(new PartsDownload(parts, { ...this.options, base, onProgress }), null);
    return weights;
  }

  /** The last byte counts when everything is decoded and checked. */
  tell(loaded, total, name) {
    this.onProgress({ loaded: Math.max(0, Math.min(loaded, total - 1)), total, name });
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
        await attempt.room();
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
    this.undecoded = [];
    this.waiting = 0;
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
    for await (const { header, text, section, bytes } of assembler.push(piece.bytes)) {
      if (header) {
        this.total = header.sections.reduce((sum, { decodedBytes = 0 }) => sum + decodedBytes, 0);
        if (this.total > job.maxBytes) throw tooMuch(this.total, job.maxBytes);
        // What an index states: there float16 counts as such.
        const sum = header.sections.reduce((sum, { blob, dtype, shape }) => sum + (blob ? 0 : bytesOf(dtype, shape)), 0);
        if (sum !== (job.decodedBytes ?? sum)) {
          throw new LoadError("corrupt", `the weights have ${sum} bytes, not the ${job.decodedBytes} stated`);
        }
        const hash = store && (job.integrity ?? (await contentHash(header, text)));
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
    const size = bytes.length;
    const decoded = this.decoder.decode(section, bytes).then((values) => [section, values]);
    // What is found wrong with an earlier attempt is no matter of this one.
    decoded.catch((error) => this.cancelled || this.source.stop(error));
    this.decoding.push(decoded);
    this.waiting += size;
    const done = () => (this.waiting -= size);
    this.undecoded.push(decoded.then(done, done));
  }

  /** Wait until the decoder has caught up, where the network is faster. */
  async room() {
    while (this.waiting > WAITING_AT_MOST) await unlessAborted(this.undecoded.shift(), this.job.signal);
  }

  #tell() {
    const { loaded, name } = this.assembler.progress;
    this.job.name = name;
    // Of a file in parts all that comes is told, not what is next in turn.
    if (this.job.stated === undefined) this.job.tell(loaded, this.total, name);
  }

  async finish() {
    const { job, assembler } = this;
    const total = job.stated ?? this.total;
    const weights = new Weights();
    const decoded = await unlessAborted(Promise.all(this.decoding), job.signal);
    await checkIntegrity(assembler.file?.bytes.subarray(0, assembler.size), job.integrity);
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
