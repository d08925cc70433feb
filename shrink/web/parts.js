/**
 * Files in parts: the list of parts in an index says which files, in order, give the bytes. It is as hostile as any
 * file, and checked here, once.
 */
import { allocate, release } from "./assembler.js";
import { Stored, checkIntegrity, openCache } from "./cache.js";
import { Download } from "./download.js";
import { LoadError, throwIfAborted, tooMuch, unlessAborted } from "./errors.js";
import { HEADER_AT_MOST, isCount, isObject, parseJson } from "./header.js";

const AT_ONCE = 4;
const VERSION = 1;
const INDEX_AT_MOST = 2 ** 26;
// An index over the limit is cut itself; so is the index of its parts, and so on.
const ROUNDS_AT_MOST = 8;
export const MAX_BYTES = 2 ** 32;
const SHA256 = /^sha256-[A-Za-z0-9+/]{43}=$/;
// What is no plain file name, or could harm whoever prints it.
const FORBIDDEN = /[\x00-\x1f\x7f-\x9f\u2028\u2029/\\]|\p{Surrogate}|^\.*$|^.{256}/u;

/** A file name that came with a file, checked: it stays in its folder. */
function plainName(name) {
  if (typeof name !== "string" || FORBIDDEN.test(name)) {
    throw new LoadError("corrupt", `${JSON.stringify(name)?.slice(0, 120)} is no plain file name`);
  }
  return name;
}

/** Where a file lies that is named beside another. */
export function beside(name, base) {
  return new URL(encodeURIComponent(name), base).href;
}

/** The parts that somebody lists, checked; they come to `bytes` in all, where that is said, and to `maxBytes` at most. */
export function checkParts(parts, { bytes, maxBytes = MAX_BYTES } = {}) {
  const isPart = ({ bytes, skip = 0, integrity }) =>
    isCount(bytes) && isCount(skip) && skip < bytes && typeof integrity === "string" && SHA256.test(integrity);
  if (!Array.isArray(parts) || !parts.length || !parts.every((part) => isObject(part) && isPart(part))) {
    throw new LoadError("corrupt", "the list of parts has something missing or of the wrong type");
  }
  const checked = parts.map(({ file, bytes, skip = 0, integrity }) => ({ file: plainName(file), bytes, skip, integrity }));
  const size = sizeOf(checked);
  if (bytes !== undefined && size !== bytes) throw new LoadError("corrupt", `the parts have ${size} bytes, not ${bytes}`);
  const stored = checked.reduce((sum, part) => sum + part.bytes, 0);
  if (stored > maxBytes + HEADER_AT_MOST) {
    throw new LoadError("unsupported", `the parts take ${stored} bytes, more than ${maxBytes}`);
  }
  return checked;
}

/** The bytes of the file that is in these parts. */
export function sizeOf(parts) {
  return parts.reduce((sum, { bytes, skip = 0 }) => sum + bytes - skip, 0);
}

/** The bytes of a file in parts, each checked before anyone sees it; loader.d.ts lists the options. */
export async function* fetchParts(list, options) {
  for await (const { bytes } of new PartsDownload(list, options).pieces()) yield bytes.slice();
}

/** The same in one piece. `bytes`, where it is given, is how many there must be. */
export async function joinParts(list, options) {
  const parts = checkParts(list, options);
  const data = allocate(sizeOf(parts));
  for await (const { position, bytes } of new PartsDownload(parts, options).pieces()) data.set(bytes, position);
  return data;
}

/** A file in parts, in pieces like those of a Download, whose bytes are valid until the next one is asked for. */
export class PartsDownload {
  constructor(list, { base, onProgress = () => {}, signal, cache, maxBytes, request, tries = 3, delay = 500 }) {
    this.parts = checkParts(list, { maxBytes });
    this.connection = new AbortController();
    const options = { signal: this.connection.signal, request, tries, delay, known: true };
    Object.assign(this, { base, onProgress, signal, cache, options, received: 0 });
  }

  /** End with an error: nobody needs what is still to come. */
  stop(error) {
    this.stopped = error;
    this.connection.abort();
  }

  async *pieces() {
    const { parts, signal, connection } = this;
    throwIfAborted(signal);
    const store = this.cache ? await openCache(this.base) : null;
    const abort = () => connection.abort(signal.reason);
    signal?.addEventListener("abort", abort);
    if (signal?.aborted) abort();
    // The first part to fail ends all at once, whichever is waited for.
    let fail;
    const failure = new Promise((_, reject) => (fail = reject));
    failure.catch(() => {});
    // The part that is used and those on their way: no more than these are in memory.
    const window = [];
    const begin = (part, at) => {
      const job = this.#part(part, store, rooms[at % AT_ONCE]);
      job.catch(fail);
      window.push(job);
    };
    const rooms = Array.from({ length: AT_ONCE }, () => new Room());
    try {
      parts.slice(0, AT_ONCE).forEach(begin);
      let position = 0;
      for (const [at, { skip }] of parts.entries()) {
        const { data, stored } = await Promise.race([window[0], failure]);
        const bytes = data.subarray(skip);
        yield { position, bytes };
        position += bytes.length;
        await stored;
        window.shift();
        const next = at + AT_ONCE;
        if (next < parts.length) begin(parts[next], next);
      }
      await store?.keepOnly(parts.map(({ integrity }) => integrity));
    } catch (error) {
      throw this.stopped ?? error;
    } finally {
      signal?.removeEventListener("abort", abort);
      connection.abort();
      await Promise.allSettled(window.map(async (job) => (await job).stored));
      for (const { bytes } of rooms) release(bytes);
    }
  }

  /** One part: { data, stored }, the latter a promise that ends when the cache has it or has refused. */
  async #part({ file, bytes: size, integrity }, store, room) {
    let came = 0;
    const count = (end) => {
      this.received += end - came;
      came = end;
      this.onProgress(this.received);
    };
    const read = async (source) => {
      for await (const { position, bytes } of source.pieces(() => size)) {
        const end = position + bytes.length;
        if (end > size) throw new LoadError("corrupt", `there are more bytes than the ${size} that are listed`);
        room.reserve(size).set(bytes, position);
        count(end);
      }
      const data = room.reserve(size);
      await unlessAborted(checkIntegrity(data, integrity), this.options.signal);
      return data;
    };
    try {
      const found = await store?.find(integrity);
      if (found) {
        try {
          return { data: await read(new Stored(found)) };
        } catch {
          throwIfAborted(this.options.signal);
          await store.forget(integrity);
        }
      }
      const source = new Download(beside(file, this.base), this.options);
      const data = await read(source).catch((error) => {
        // What was put together of two answers, or lay in some cache on the way, may be another deployment's.
        if (error.code !== "corrupt" || !source.again()) throw error;
        source.request = { ...source.request, cache: "reload" };
        return read(source);
      });
      return { data, stored: store?.put(integrity, data) };
    } catch (error) {
      if (error.code !== "aborted") error.message = `${file}: ${error.message}`;
      throw error;
    }
  }
}

/** Memory of one part after the other: left to itself, what is done with stays until the browser tidies up. */
class Room {
  bytes = new Uint8Array(0);

  reserve(size) {
    if (this.bytes.length < size) this.bytes = allocate(size);
    return this.bytes.subarray(0, size);
  }
}

/** The text of the index at `url`, as bytes, always asked of the server. */
export async function fetchIndex(url, { integrity, signal, request, tries = 3, delay = 500 }) {
  const pieces = [];
  let size = 0;
  const download = new Download(url, { signal, tries, delay, request: { ...request, cache: "no-cache" } });
  for await (const { position, bytes } of download.pieces()) {
    if (position === 0) size = pieces.length = 0;
    pieces.push(bytes);
    size += bytes.length;
    if (size > INDEX_AT_MOST) throw new LoadError("corrupt", "the index is larger than is believable");
  }
  const text = new Uint8Array(await new Blob(pieces).arrayBuffer());
  await checkIntegrity(text, integrity);
  return text;
}

/** What an index says: { parts, decodedBytes } of a file that shrink split, { map, total } of one that others did. */
export async function readIndex(text, url, { maxBytes, signal, request, tries, delay }) {
  for (let round = 0; round <= ROUNDS_AT_MOST; round += 1) {
    const index = parseJson(text, "the index");
    if (index.shrink === undefined) return foreign(index);
    if (!isObject(index.shrink)) throw wrong();
    const { version, index: outer, file, bytes, decoded_bytes: decodedBytes, parts } = index.shrink;
    if (version !== VERSION) throw new LoadError("unsupported", `index version ${version} is not known`);
    if (outer === undefined) {
      plainName(file);
      if (!isCount(bytes) || !isCount(decodedBytes)) throw wrong();
      if (decodedBytes > maxBytes) throw tooMuch(decodedBytes, maxBytes);
      return { parts: checkParts(parts, { bytes, maxBytes }), decodedBytes };
    }
    if (!isObject(outer) || !isCount(outer.bytes) || outer.bytes > INDEX_AT_MOST) throw wrong();
    text = await joinParts(outer.parts, { bytes: outer.bytes, base: url, signal, request, tries, delay });
  }
  throw new LoadError("corrupt", "the index is cut again and again");
}

/** Hugging Face's index: the shard of each tensor, without lengths or hashes. */
function foreign({ metadata, weight_map: said }) {
  if (!isObject(said)) throw wrong();
  const map = new Map(Object.entries(said).map(([tensor, file]) => [tensor, plainName(file)]));
  if (!map.size) throw wrong();
  // Without a size, progress counts tensors.
  const total = isObject(metadata) && isCount(metadata.total_size) ? metadata.total_size : map.size;
  return { map, total };
}

function wrong() {
  return new LoadError("corrupt", "the index has something missing or of the wrong type");
}
