const NAME = "shrink";

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
        if (await stored) await this.#forgetOthers(hash).catch(() => {});
      },
      cancel: async () => {
        if (open) stream.error(new Error("not complete"));
        await stored;
      },
    };
  }

  /** Earlier contents of the same URL. */
  async #forgetOthers(hash) {
    const own = this.#key(hash);
    for (const { url } of await this.cache.keys()) {
      const [address, other] = url.split(MARK);
      if (other && address === own.split(MARK)[0] && url !== own) await this.cache.delete(url);
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

const MARK = "shrink-content=";
