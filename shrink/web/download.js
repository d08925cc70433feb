import { LoadError, throwIfAborted, unlessAborted } from "./errors.js";

// Answers after which it is worth to ask again: timeout, too early, too many requests, and the server's own errors.
const PASSING = (status) => status === 408 || status === 425 || status === 429 || status >= 500;

/**
 * One file over HTTP, in spite of broken connections. After a break it is asked for the rest, where the server has
 * a strong ETag and so can tell that the file is still the same; otherwise the file comes from its start again.
 */
export class Download {
  /**
   * `tries` requests in all; before the second the wait is `delay` milliseconds, twice as long before each later one.
   * `known`: the file has a hash, which will tell when the rest is another file's, so that no ETag is needed.
   */
  constructor(url, { signal, request, tries, delay, known = false }) {
    this.url = url;
    this.signal = signal;
    this.request = request;
    this.left = tries;
    this.delay = delay;
    this.known = known;
    /** Whether the bytes came in several answers. */
    this.spliced = false;
    this.stopped = null;
    this.connection = null;
  }

  /** End with an error: nobody needs what is still to come. */
  stop(error) {
    this.stopped = error;
    this.connection?.abort();
  }

  /**
   * Bytes with their position in the file; position 0 begins the file anew. `size()`: its length, once known; without
   * it the file ends where the answer does.
   */
  async *pieces(size) {
    let received = 0;
    let tag = null;
    let resumes = false;
    this.stopped = null;
    for (let failed = null; ; ) {
      if (failed) await this.#retry(failed);
      const connection = (this.connection = new AbortController());
      const abort = () => connection.abort();
      this.signal?.addEventListener("abort", abort);
      try {
        throwIfAborted(this.signal);
        if (this.stopped) throw this.stopped;
        const response = await this.#ask(received, tag, connection.signal);
        if (response.status === 206 && !continues(response, received, tag)) {
          resumes = false;
          throw new LoadError("network", "the server sent another part than the one asked for");
        }
        if (response.status !== 206) received = 0;
        this.spliced = received > 0;
        // Of a compressed transfer no position is known.
        const plain = !response.headers.get("Content-Encoding");
        tag = plain ? strongTag(response) : null;
        resumes = plain && (this.known || tag !== null);
        for (const reader = response.body.getReader(); ; ) {
          const { done, value } = await reader.read().catch((cause) => {
            throw new LoadError("network", `the connection broke after ${received} bytes`, { cause });
          });
          if (done) break;
          yield { position: received, bytes: value };
          received += value.length;
        }
        if (!size || received >= size()) return;
        failed = new LoadError("truncated", `the file ends after ${received} bytes`);
      } catch (error) {
        throwIfAborted(this.signal);
        if (this.stopped) throw this.stopped;
        // The connection may break after the last byte, as where the server promised more than the file has.
        if (received >= size?.()) return;
        if (!isPassing(error)) throw error;
        failed = error;
      } finally {
        this.signal?.removeEventListener("abort", abort);
        connection.abort();
      }
      if (!resumes) received = 0;
    }
  }

  /** Whether the file may be asked for once more; uses up a try. */
  again() {
    this.spliced = false;
    this.left -= 1;
    return this.left > 0;
  }

  async #retry(error) {
    this.left -= 1;
    if (this.left <= 0) throw error;
    let timer;
    try {
      await unlessAborted(new Promise((resolve) => (timer = setTimeout(resolve, this.delay))), this.signal);
    } finally {
      clearTimeout(timer);
    }
    this.delay *= 2;
  }

  async #ask(received, tag, signal) {
    const headers = new Headers(this.request?.headers);
    if (received) {
      headers.set("Range", `bytes=${received}-`);
      if (tag) headers.set("If-Range", tag);
    }
    let response;
    try {
      response = await fetch(this.url, { ...this.request, headers, signal });
    } catch (cause) {
      throw new LoadError("network", "the server could not be reached", { cause });
    }
    const { status, statusText } = response;
    if (status === 416 && received) throw new LoadError("truncated", `the file ends after ${received} bytes`, { status });
    if (!response.ok) throw new LoadError("http", `the server answered ${status} ${statusText}`.trim(), { status });
    if (response.headers.get("Content-Type")?.startsWith("text/html")) {
      throw new LoadError("http", "the server sent a web page, not weights", { status });
    }
    return response;
  }
}

function isPassing(error) {
  return error.code === "network" || (error.code === "http" && PASSING(error.status));
}

/** The ETag, when it stands for these very bytes. */
function strongTag(response) {
  const tag = response.headers.get("ETag");
  return tag?.startsWith('"') ? tag : null;
}

function continues({ headers, type }, received, tag) {
  const range = headers.get("Content-Range");
  // Another origin need not show it; without a tag, a hash will tell.
  const follows = range === null ? type === "cors" && tag === null : range.startsWith(`bytes ${received}-`);
  return follows && (tag === null || (headers.get("ETag") ?? tag) === tag);
}
