import { LoadError } from "./errors.js";

/**
 * The bytes of a whole file, which must have this length and this hash, `sha256-…=`, where they are given. The hash is
 * checked where the browser can, on https and localhost. `onProgress(loaded)` hears of the bytes as they come.
 *
 * Throws LoadError. For weights there is `load`.
 */
export async function fetchFile(url, { bytes, integrity, onProgress = () => {}, signal } = {}) {
  const name = decodeURI(new URL(url).pathname.split("/").pop());
  const failed = (code, what, more) => new LoadError(code, `${name}: ${what}`, more);
  try {
    const response = await fetch(url, { signal, cache: "no-cache" });
    if (!response.ok) throw failed("http", `the server answers ${response.status}`, { status: response.status });
    const data = await read(response, onProgress);
    // A host that unpacks a .gz file on the way gives other bytes than those that are listed.
    const asStored = !url.endsWith(".gz") || response.headers.get("Content-Encoding") === null;
    if (asStored && bytes !== undefined && data.length !== bytes) {
      const code = data.length < bytes ? "truncated" : "corrupt";
      throw failed(code, `${data.length} bytes came, ${bytes} belong there`);
    }
    if (asStored && integrity !== undefined && crypto.subtle && (await hashOf(data)) !== integrity) {
      throw failed("corrupt", "it is not the file that was exported");
    }
    return data;
  } catch (error) {
    if (error instanceof LoadError) throw error;
    if (signal?.aborted) throw failed("aborted", "loading was aborted", { cause: signal.reason });
    throw failed("network", "the server cannot be reached, or the connection broke", { cause: error });
  }
}

async function read(response, onProgress) {
  const parts = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    loaded += part.value.length;
    onProgress(loaded);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function hashOf(data) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return `sha256-${btoa(String.fromCharCode(...hash))}`;
}
