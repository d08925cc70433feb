import { fetchFile } from "./fetch_file.js";
import { joinParts, load, LoadError } from "./loader.js";

/**
 * Fetches the files of one exported folder side by side, with one progress for all of them; one that fails ends the
 * others. `paths` are those that `onProgress({ loaded, total })` counts, in bytes that the visitor downloads.
 */
export class SiteDownloads {
  constructor(manifest, paths, { base, onProgress = () => {}, signal }) {
    for (const path of paths) {
      if (!Object.hasOwn(manifest.files, path)) throw new LoadError("corrupt", `manifest.json: it does not list ${path}`);
    }
    this.manifest = manifest;
    this.base = base;
    this.onProgress = onProgress;
    this.loaded = new Map(paths.map((path) => [path, 0]));
    this.total = paths.reduce((sum, path) => sum + manifest.files[path].bytes, 0);
    this.outer = signal;
    this.stop = new AbortController();
    this.start = performance.now();
  }

  url(path) {
    return new URL(path, this.base).href;
  }

  /** The bytes of a file, checked, and put together where it is split. */
  file(path) {
    const { parts, ...expected } = this.manifest.files[path];
    const options = { ...expected, onProgress: (bytes) => this.#tell(path, bytes), signal: this.stop.signal };
    if (!parts) return fetchFile(this.url(path), options);
    return joinParts(parts, { ...options, base: this.url(path), cache: true });
  }

  /** What `run` makes of the URL of a script; where that fails, what is wrong with the script. */
  async script(path, run) {
    try {
      return await run(this.url(path));
    } catch (cause) {
      await fetchFile(this.url(path), { ...this.manifest.files[path], signal: this.stop.signal });
      throw new LoadError("network", `${path}: the server does not give it as a script`, { cause });
    }
  }

  /** The weights in a container of ours, decoded. */
  async weights(path) {
    const { bytes, integrity, parts } = this.manifest.files[path];
    // The loader counts decoded bytes.
    const onProgress = ({ loaded, total }) => this.#tell(path, bytes * Math.min(1, loaded / Math.max(total, 1)));
    try {
      return await load(this.url(path), { onProgress, signal: this.stop.signal, integrity, parts, cache: true });
    } catch (error) {
      if (error instanceof LoadError) error.message = `${path}: ${error.message}`;
      throw error;
    }
  }

  /** What all the promises give, or the first failure. */
  async all(promises) {
    const abort = () => this.stop.abort(this.outer.reason);
    if (this.outer?.aborted) abort();
    this.outer?.addEventListener("abort", abort);
    try {
      return await Promise.all(promises);
    } catch (error) {
      this.stop.abort(error);
      throw error;
    } finally {
      this.outer?.removeEventListener("abort", abort);
    }
  }

  /** Milliseconds since the downloads began. */
  elapsed() {
    return performance.now() - this.start;
  }

  #tell(path, bytes) {
    this.loaded.set(path, Math.min(bytes, this.manifest.files[path].bytes));
    this.onProgress({ loaded: [...this.loaded.values()].reduce((a, b) => a + b, 0), total: this.total });
  }
}
