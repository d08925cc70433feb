import { LoadError } from "./errors.js";

const NAME = "shrink";
// What ends every key, before the hash.
const MARK = "shrink-content=";

/**
 * Files of one URL in the browser's Cache API, each under the hash of its content. Null where there is no such cache:
 * outside https and localhost, or where the visitor forbids it.
 */
export async function openCache(url) {
  try {
    return new FileCache(await caches.open(NAME), url);
  } catch {
    return null;
  }
}

class FileCache {
  constructor(cache, url) {
    this.cache = cache;
    this.url = url;
  }

  async find(hash) {
    return this.cache.match(this.#key(hash)).catch(() => undefined);
  }

  async forget(hash) {
    await this.cache.delete(this.#key(hash)).catch(() => {});
  }

  /** Where the bytes of a file go as they come. Only what is finished stays; no failure of the cache shows outside. */
  keep(hash) {
    let stream;
    let open = true;
    const close = () => (open = false);
    const body = new ReadableStream({ start: (controller) => (stream = controller), cancel: close });
    const stored = this.cache.put(this.#key(hash), new Response(body)).then(() => true, () => false).finally(close);
    return {
      push: (bytes) => open && stream.enqueue(bytes),
      finish: async () => {
        if (open) stream.close();
        if (await stored) await this.keepOnly([hash]);
      },
      cancel: async () => {
        if (open) stream.error(new Error("not complete"));
        await stored;
      },
    };
  }

  /** Keep what is here already, a part of the file. */
  async put(hash, bytes) {
    await this.cache.put(this.#key(hash), new Response(bytes)).catch(() => {});
  }

  /** Forget earlier contents of the same URL. */
  async keepOnly(hashes) {
    const own = new Set(hashes.map((hash) => this.#key(hash)));
    const [address] = this.#key("").split(MARK);
    try {
      for (const { url } of await this.cache.keys()) {
        if (url.startsWith(address + MARK) && !own.has(url)) await this.cache.delete(url);
      }
    } catch {
      // They stay until the browser needs the room.
    }
  }

  /** A URL that nobody serves: a cache takes no other keys. */
  #key(hash) {
    const url = new URL(this.url);
    url.searchParams.append("shrink-content", hash);
    url.hash = "";
    return url.href;
  }
}

/** A file out of the cache, in pieces like those of a Download. */
export class Stored {
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

/** The bytes have this hash, `sha256-…=`; browsers can tell on https and localhost only. */
export async function checkIntegrity(bytes, integrity) {
  if (!integrity || !globalThis.crypto?.subtle) return;
  const [algorithm, expected] = integrity.split(/-(.*)/s);
  const digest = await crypto.subtle.digest(algorithm.replace("sha", "SHA-"), bytes);
  if (base64(digest) !== expected) throw new LoadError("corrupt", `the file does not have the hash ${integrity}`);
}

export function base64(buffer) {
  return btoa(String.fromCharCode(...new Uint8Array(buffer)));
}
