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
  /**
   * Bytes of all decoded tensors together; of a file in parts as its index states them, where float16 counts 2 bytes
   * each. With `parts` but no `decodedBytes`: bytes of the file. Of shards that others made: what their index calls the
   * total size, or else the number of tensors.
   */
  total: number;
  /** The tensor that is coming; "" after the last one. */
  name: string;
}

/** One part of a file, as an index or a manifest lists it. */
export interface Part {
  /** A plain file name, beside the index. */
  file: string;
  /** The length of the part, skipped bytes included. */
  bytes: number;
  /** Bytes at its start that are not the file's: the part's own header. Default: 0. */
  skip?: number;
  /** "sha256-…" of the part. */
  integrity: string;
}

export interface LoadOptions {
  /**
   * Called as bytes come. `loaded` goes back when the broken download of a whole file has to begin again; of a file in
   * parts it never does.
   */
  onProgress?: (progress: Progress) => void;
  /** Aborts with a LoadError of code "aborted". */
  signal?: AbortSignal;
  /** Keep the file, or each of its parts, in the Cache API, under a hash of its content. Default: false. */
  cache?: boolean;
  /**
   * "sha256-…", as in <script integrity>: the hash of the whole file; of an index, that of the index, which has those of
   * its parts. With `parts` those count. Checked on https and localhost.
   */
  integrity?: string;
  /** The parts of the file, where the page knows them: then `url` itself is not asked for, only what lies beside it. */
  parts?: readonly Part[];
  /** With `parts`: the length of the file, which they must have together. */
  bytes?: number;
  /** With `parts`: the bytes of all decoded tensors, float16 as such; the file must have them, progress counts them. */
  decodedBytes?: number;
  /** Requests in all, for each file, where the network or the server fails. Default: 3. */
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
 * The weights in the safetensors file at `url`, which is relative to the page; or in the shards that an index lists,
 * where `url` ends in ".json".
 *
 * @throws {LoadError} nothing is left behind: no worker, no connection, no part of a file in the cache
 */
export function load(url: string | URL, options?: LoadOptions): Promise<Weights>;

export interface PartsOptions extends Pick<LoadOptions, "signal" | "cache" | "tries" | "delay" | "request"> {
  /** The address of the file, absolute: its parts lie beside it, and the cache keeps them under it. */
  base: string | URL;
  /** Called as bytes come, with how many of all parts are here. */
  onProgress?: (bytes: number) => void;
  /** More bytes than this, and what a header takes, are refused. Default: 2 ** 32. */
  maxBytes?: number;
}

/**
 * Any file in parts, part by part and in order, each checked before it is given. Four parts come at once, and none is
 * asked for before there is room.
 *
 * @throws {LoadError} its message names the part; nothing is left behind but whole parts in the cache
 */
export function fetchParts(parts: readonly Part[], options: PartsOptions): AsyncGenerator<Uint8Array, void, void>;

/** The same in one piece, of `bytes` bytes where that is given. */
export function joinParts(parts: readonly Part[], options: PartsOptions & { bytes?: number }): Promise<Uint8Array>;
