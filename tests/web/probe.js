/** What the tests ask the page to do; results are plain values, so that Python can read them. */
import { LoadError, fetchParts, joinParts, load } from "/web/loader.js";

const controllers = new Map();
const pending = new Map();
const heard = new Set();

/** Load a file: its tensors with their SHA-256, or the error; and the progress on the way. */
async function attempt(url, { abortable, abortAt, aborted, ...options } = {}) {
  const progress = [];
  const controller = new AbortController();
  if (abortable) controllers.set(url, controller);
  if (aborted) controller.abort("enough");
  const onProgress = (event) => {
    heard.add(url);
    progress.push(event);
    if (abortAt !== undefined && event.loaded >= abortAt) controller.abort("enough");
  };
  try {
    const weights = await load(url, { delay: 1, signal: controller.signal, onProgress, ...options });
    const tensors = [];
    for (const [name, values] of weights) {
      tensors.push({
        name,
        array: values.constructor.name,
        shape: weights.shapes.get(name),
        dtype: weights.dtypes.get(name),
        bytes: values.byteLength,
        sha256: await sha256(values),
        whole: values.byteLength === values.buffer.byteLength,
      });
    }
    const graph = weights.graph && (await sha256(weights.graph));
    return { tensors, graph, attributes: weights.attributes, progress };
  } catch (error) {
    return { progress, ...told(error) };
  }
}

function told(error) {
  if (!(error instanceof LoadError)) return { bug: `${error}\n${error.stack}` };
  const { code, message, status, cause } = error;
  return { error: { code, message, status, cause: String(cause ?? "") } };
}

/** Any file in parts, in one piece: its hash, or the error. */
async function join(url, parts, options) {
  const progress = [];
  const onProgress = (bytes) => progress.push(bytes);
  try {
    const bytes = await joinParts(parts, { base: new URL(url, location).href, delay: 1, onProgress, ...options });
    return { bytes: bytes.length, sha256: await sha256(bytes), progress };
  } catch (error) {
    return { progress, ...told(error) };
  }
}

let iterator, taken;

/** Part by part, when Python asks for one. */
function openParts(url, parts) {
  iterator = fetchParts(parts, { base: new URL(url, location).href });
  taken = [];
}

async function nextPart() {
  const { done, value } = await iterator.next();
  if (value) taken.push(value);
  return !done;
}

/** What was given stays as it was, also while later parts come. */
function takenParts() {
  return Promise.all(taken.map(sha256));
}

async function sha256(values) {
  const digest = await crypto.subtle.digest("SHA-256", values);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The keys of the loader's cache. */
async function cached() {
  return (await (await caches.open("shrink")).keys()).map(({ url }) => url);
}

/** Change a byte in the middle of everything that is cached. */
async function damageCache() {
  const cache = await caches.open("shrink");
  for (const key of await cache.keys()) {
    const bytes = new Uint8Array(await (await cache.match(key)).arrayBuffer());
    bytes[bytes.length >> 1] ^= 1;
    await cache.put(key, new Response(bytes));
  }
}

Object.assign(globalThis, {
  attempt,
  cached,
  damageCache,
  join,
  openParts,
  nextPart,
  takenParts,
  closeParts: async () => void (await iterator.return()),
  /** The same in two halves: something happens outside in between. */
  begin: (url, options) => void pending.set(url, attempt(url, { ...options, abortable: true })),
  abort: (url) => controllers.get(url).abort("enough"),
  /** Whether a load has heard of its file. */
  asked: (url) => heard.has(url),
  end: (url) => pending.get(url),
});
document.documentElement.dataset.ready = "yes";
