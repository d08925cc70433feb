// Stock WebDNN on a folder whose files `shrink split` cut into parts. On the page, before WebDNN.load is called:
//
//     <script src="model/split.js"></script>
//
// split.json, beside this script, lists the files that are cut. Where a page asks for one of them, by XMLHttpRequest as
// WebDNN does or by fetch, the parts are fetched, checked and joined. A part that is missing, broken or of another
// deployment makes the request fail, with its name in the console; wrong weights never come out.
(() => {
  "use strict";

  const folder = new URL(".", document.currentScript.src);
  const NAME = /^(weight_\w+\.bin|graph_\w+\.json)$/;
  const AT_ONCE = 4;
  const ROUNDS_AT_MOST = 8;
  const nativeFetch = globalThis.fetch.bind(globalThis);
  const { open, send, abort } = XMLHttpRequest.prototype;

  /** The name of the file in this folder that an address means, without its query; null for any other. */
  function nameOf(address) {
    const { origin, pathname } = new URL(address, document.baseURI);
    const name = pathname.slice(folder.pathname.length);
    return origin === folder.origin && pathname.startsWith(folder.pathname) && NAME.test(name) ? name : null;
  }

  let index;

  /** The files that are cut, by name. A failure is not kept: the next request tries again. */
  function files() {
    index ??= readIndex().catch((error) => {
      index = undefined;
      throw error;
    });
    return index;
  }

  async function readIndex() {
    let text = await (await answer("split.json", { cache: "no-cache" })).text();
    for (let round = 0; round < ROUNDS_AT_MOST; round++) {
      const { shrink } = parsed(text);
      if (shrink?.version !== 1) throw new Error("split.json: its version is not known, or it is no such index");
      if (!shrink.index) return new Map(Object.entries(shrink.files));
      const chunks = [];
      for await (const chunk of inOrder(shrink.index.parts)) chunks.push(chunk);
      text = await new Blob(chunks).text();
    }
    throw new Error("split.json: an index of an index without end");
  }

  function parsed(text) {
    try {
      return JSON.parse(text) ?? {};
    } catch {
      throw new Error("split.json: it is not JSON");
    }
  }

  async function answer(file, options) {
    const response = await nativeFetch(new URL(encodeURIComponent(file), folder), options).catch((error) => {
      throw new Error(`${file}: the server cannot be reached`, { cause: error });
    });
    if (!response.ok) throw new Error(`${file}: the server answers ${response.status}`);
    return response;
  }

  /** One part, checked. What a cache holds may be damaged, so the second try goes past it. */
  async function part(said, signal) {
    try {
      return await fetched(said, { signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      return fetched(said, { signal, cache: "reload" });
    }
  }

  async function fetched({ file, bytes, integrity }, options) {
    const response = await answer(file, options);
    const data = await response.arrayBuffer().catch((error) => {
      throw new Error(`${file}: the connection broke`, { cause: error });
    });
    if (data.byteLength !== bytes) throw new Error(`${file}: ${data.byteLength} bytes came, ${bytes} belong there`);
    // Only pages on https and localhost can compute hashes.
    if (globalThis.crypto?.subtle && (await hashOf(data)) !== integrity) {
      throw new Error(`${file}: it is not the part that was written (SHA-256)`);
    }
    return data;
  }

  async function hashOf(data) {
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    return `sha256-${btoa(String.fromCharCode(...hash))}`;
  }

  /** The parts one after the other; a few more are on their way. */
  async function* inOrder(parts, signal) {
    const stop = new AbortController();
    const cancel = () => stop.abort(signal.reason);
    signal?.addEventListener("abort", cancel);
    if (signal?.aborted) cancel();
    const coming = [];
    const add = (said) => {
      const promise = part(said, stop.signal);
      promise.catch(() => {}); // heard of when its turn comes
      coming.push(promise);
    };
    try {
      parts.slice(0, AT_ONCE).forEach(add);
      for (let next = AT_ONCE; coming.length > 0; next++) {
        const data = await coming.shift();
        if (next < parts.length) add(parts[next]);
        yield data;
      }
    } finally {
      stop.abort();
      signal?.removeEventListener("abort", cancel);
    }
  }

  function blame(error) {
    console.error(`split.js: ${error.message}`);
  }

  // fetch: the answer is a stream, so that no more than a few parts are in memory.

  globalThis.fetch = async function fetch(input, init) {
    const request = input instanceof Request ? input : undefined;
    const name = (init?.method ?? request?.method ?? "GET") === "GET" ? nameOf(request?.url ?? input) : null;
    const file = name && (await files()).get(name);
    return file ? streamed(file, init?.signal ?? request?.signal) : nativeFetch(input, init);
  };

  async function streamed({ bytes, parts }, signal) {
    const source = inOrder(parts, signal);
    let next = await source.next();
    const body = new ReadableStream({
      async pull(controller) {
        if (next.done) return controller.close();
        controller.enqueue(new Uint8Array(next.value));
        next = await source.next().catch((error) => {
          if (!signal?.aborted) blame(error); // who reads the stream is told that it broke, not why
          throw error;
        });
      },
      cancel: () => source.return(),
    }, { highWaterMark: 0 });
    return new Response(body, { headers: { "Content-Length": bytes, "Content-Type": "application/octet-stream" } });
  }

  // XMLHttpRequest: the parts become one Blob, which the browser keeps outside of the page's memory.

  const ANSWER = ["readyState", "status", "statusText", "response", "responseText", "responseURL"];
  const asked = new WeakMap();

  XMLHttpRequest.prototype.open = function (method, address, isAsync = true) {
    for (const key of ANSWER) delete this[key];
    asked.get(this)?.stop.abort();
    asked.delete(this);
    const name = isAsync && /^get$/i.test(method) ? nameOf(address) : null;
    if (name) asked.set(this, { name, stop: new AbortController() });
    return open.apply(this, arguments);
  };

  XMLHttpRequest.prototype.send = function (...body) {
    const request = asked.get(this);
    if (!request) return send.apply(this, body);
    joined(this, request).catch((error) => {
      if (!request.stop.signal.aborted) fail(this, error);
    });
  };

  XMLHttpRequest.prototype.abort = function () {
    asked.get(this)?.stop.abort();
    return abort.call(this);
  };

  async function joined(xhr, { name, stop }) {
    const file = (await files()).get(name);
    if (stop.signal.aborted) return;
    if (!file) return send.call(xhr);
    const blobs = [];
    let loaded = 0;
    for await (const data of inOrder(file.parts, stop.signal)) {
      blobs.push(new Blob([data]));
      loaded += data.byteLength;
      tell(xhr, "progress", { loaded, total: file.bytes });
    }
    const response = await converted(new Blob(blobs), xhr.responseType);
    if (stop.signal.aborted) return;
    const responseURL = new URL(name, folder).href;
    put(xhr, { readyState: 4, status: 200, statusText: "OK", response, responseText: response, responseURL });
    xhr.dispatchEvent(new Event("readystatechange"));
    for (const type of ["load", "loadend"]) tell(xhr, type, { loaded, total: file.bytes });
  }

  function converted(blob, type) {
    if (type === "blob") return blob;
    if (type === "arraybuffer") return blob.arrayBuffer();
    return type === "json" ? blob.text().then(JSON.parse) : blob.text();
  }

  function fail(xhr, error) {
    blame(error);
    put(xhr, { readyState: 4 });
    xhr.dispatchEvent(new Event("readystatechange"));
    // WebDNN shows the message of what it gets.
    for (const type of ["error", "loadend"]) tell(xhr, type, { message: error.message });
  }

  function put(xhr, values) {
    for (const key in values) Object.defineProperty(xhr, key, { value: values[key], configurable: true });
  }

  function tell(xhr, type, { message, loaded = 0, total = 0 }) {
    const event = new ProgressEvent(type, { lengthComputable: total > 0, loaded, total });
    if (message) Object.defineProperty(event, "message", { value: message });
    xhr.dispatchEvent(event);
  }
})();
