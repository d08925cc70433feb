/** The typed arrays of safetensors' dtypes; F16 and BF16 become Float32Array, BOOL becomes Uint8Array. */
export type Values =
  | Float32Array
  | Float64Array
  | Int8Array
  | Int16Array
  | Int32Array
  | BigInt64Array
  | Uint8Array
  | Uint16Array
  | Uint32Array
  | BigUint64Array;

export type Dtype = "BOOL" | "U8" | "I8" | "U16" | "I16" | "U32" | "I32" | "F32" | "U64" | "I64" | "F64";

/** Typed arrays by name, in file order. Each fills its buffer. */
export class Weights extends Map<string, Values> {
  /** Name → dimensions, outermost first; [] for a single value. */
  readonly shapes: Map<string, number[]>;
  /** Name → dtype of the typed array. */
  readonly dtypes: Map<string, Dtype>;
  /** What the model's own format must have back, text by text: of a WebDNN folder, its graphs. */
  readonly attributes: Record<string, string>;
  /** The ONNX graph, a serialized ModelProto without data, or null. */
  readonly graph: Uint8Array | null;
}

export interface Progress {
  /** Decoded bytes that what has come so far stands for; the last event has `loaded === total`. */
  loaded: number;
  /** Bytes of all decoded tensors together. */
  total: number;
  /** The tensor that is coming; "" after the last one. */
  name: string;
}

export interface LoadOptions {
  /** Called as bytes come. `loaded` goes back when a broken download has to begin again. */
  onProgress?: (progress: Progress) => void;
  /** Aborts with a LoadError of code "aborted". */
  signal?: AbortSignal;
  /** Keep the file in the Cache API, under a hash of its content. Default: false. */
  cache?: boolean;
  /** "sha256-…", as in <script integrity>: the hash of the whole file. Checked on https and localhost. */
  integrity?: string;
  /** Requests in all, where the network or the server fails. Default: 3. */
  tries?: number;
  /** Milliseconds before the second request, twice as many before each later one. Default: 500. */
  delay?: number;
  /** More decoded bytes than this are refused. Default: 2 ** 32. */
  maxBytes?: number;
  /** What `fetch` gets beside the URL: credentials, headers, mode … */
  request?: Omit<RequestInit, "signal" | "method" | "body">;
}

/** Why loading failed; see GUIDE.md. */
export type LoadErrorCode = "http" | "network" | "truncated" | "corrupt" | "unsupported" | "aborted";

export class LoadError extends Error {
  readonly name: "LoadError";
  readonly code: LoadErrorCode;
  /** The HTTP status, where there is one. */
  readonly status?: number;
}

/**
 * The weights in the safetensors file at `url`, which is relative to the page.
 *
 * @throws {LoadError} nothing is left behind: no worker, no connection, no part of a file in the cache
 */
export function load(url: string | URL, options?: LoadOptions): Promise<Weights>;
