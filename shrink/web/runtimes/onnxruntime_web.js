// Runs a network that `shrink export --to onnxruntime-web` wrote on stock ONNX Runtime Web.
//
// The graph is model.onnx; its weights are decoded by our loader and handed over as external data. Nothing but files
// of the exported folder is fetched.

import { release } from "../assembler.js";
import { openChain } from "../chain.js";
import { LoadError } from "../errors.js";
import { fromHalves, roundedToHalf, toHalves } from "../float16.js";
import { SiteDownloads } from "../site_downloads.js";

// More threads than this no longer help networks of a size that pages have.
const THREADS_AT_MOST = 8;

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array,
  int16: Int16Array, uint32: Uint32Array, int32: Int32Array, uint64: BigUint64Array, int64: BigInt64Array,
  bool: Uint8Array,
  // Not every browser has arrays for these: their numbers come and go as float32, which holds them exactly.
  float16: Float32Array,
};

/**
 * Opens the network of a manifest. `base` is the URL of the folder; `onProgress({ loaded, total })` counts the bytes
 * that the visitor downloads; `signal` aborts.
 *
 * The network has `backend` ("wasm" or "webgpu"), `threads`, `note` (why it is not the backend that was asked for),
 * `timings` in milliseconds and `sizes` in bytes, by what they are of, and `run(feeds)`: typed arrays by input name
 * in, { name: { dims, type, data } } out. Numbers for and from float16 are float32 ones; they are rounded to it.
 */
export async function open(manifest, options = {}) {
  const { runtime, sequential = false } = manifest;
  const stages = stagesOf(manifest);
  const paths = [runtime.wasm, ...stages.flatMap(({ model, weights }) => [model, weights])];
  const downloads = new SiteDownloads(manifest, paths, options);
  const timings = {};
  const ready = prepare(manifest, downloads, timings);
  const load = async ({ model, weights, external }) => {
    const [graph, values] = await Promise.all([downloads.file(model), downloads.weights(weights)]);
    timings["Weights downloaded and decoded after"] = downloads.elapsed();
    return { graph, externalData: externalData(external, values) };
  };
  const create = async ({ graph, externalData }) => {
    const { ort, providers } = await ready;
    const start = performance.now();
    const session = await ort.InferenceSession.create(graph, { executionProviders: providers, externalData });
    timings["Network built in"] = (timings["Network built in"] ?? 0) + performance.now() - start;
    // ONNX Runtime has its own copy.
    for (const { data } of externalData) release(data);
    return session;
  };
  const results = manifest.outputs.map(({ name }) => name);
  const opening = openChain(stages, { results, load, create, sequential });
  const [{ ort, providers, threads, note }, chain] = await downloads.all([ready, opening]);

  return {
    backend: providers[0],
    threads,
    note,
    timings,
    sizes: sizesOf(manifest, stages),
    async run(feeds) {
      // Names come out of the model, and an ordinary object has names of its own.
      const tensors = Object.create(null);
      for (const { name, dtype, shape } of manifest.inputs) {
        tensors[name] = new ort.Tensor(dtype, dtype === "float16" ? toHalves(feeds[name]) : feeds[name], shape);
      }
      const outputs = Object.create(null);
      for (const [name, { dims, type, data }] of await chain.run(tensors)) {
        outputs[name] = { dims: [...dims], type, data: type === "float16" ? fromHalves(bitsOf(data)) : data };
      }
      return outputs;
    },
    close: chain.close,
  };
}

/** The stages of the network; one that is not cut is a single stage. */
function stagesOf({ stages, model, weights, external, inputs, outputs }) {
  const names = (list) => list.map(({ name }) => name);
  return stages ?? [{ model, weights, external, inputs: names(inputs), outputs: names(outputs), drop: [] }];
}

/** ONNX Runtime, set up for this browser. */
async function prepare(manifest, downloads, timings) {
  const { runtime } = manifest;
  const [ort, wasm] = await Promise.all([
    downloads.script(runtime.api, (url) => import(url)),
    downloads.file(runtime.wasm).then(inflated),
  ]);
  timings["Runtime downloaded after"] = downloads.elapsed();
  const threads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, THREADS_AT_MOST) : 1;
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.wasm.wasmPaths = { mjs: downloads.url(runtime.module) };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return { ort, threads, ...(await executionProviders(manifest)) };
}

/** The typed array that an input of this type takes. */
export function arrayFor(dtype) {
  if (!ARRAYS[dtype]) throw new TypeError(`inputs of type ${dtype} are not supported`);
  return ARRAYS[dtype];
}

/** The numbers that an input of this type gets of these. */
export function rounded(values, dtype) {
  return dtype === "float16" ? roundedToHalf(values) : values;
}

function sizesOf({ files, runtime, float32_bytes }, stages) {
  const sum = (paths) => paths.reduce((bytes, path) => bytes + files[path].bytes, 0);
  return {
    "Weights": sum(stages.map(({ weights }) => weights)),
    "… as float32": float32_bytes,
    "Graph": sum(stages.map(({ model }) => model)),
    [`${runtime.name} ${runtime.version}`]: sum([runtime.api, runtime.module, runtime.wasm]),
  };
}

function externalData(external, weights) {
  return Object.entries(external).map(([name, { location, bytes, dtype }]) => {
    const values = asInGraph(weights.get(name), dtype);
    if (values?.byteLength !== bytes) {
      throw new LoadError("corrupt", "the weights do not fit the network", { tensor: name });
    }
    return { path: location, data: new Uint8Array(values.buffer, values.byteOffset, bytes) };
  });
}

// The loader widens float16 to float32, and what was coded decodes to that.
function asInGraph(values, dtype) {
  if (!(values instanceof Float32Array)) return values;
  if (dtype === "float16") return toHalves(values);
  return dtype === "float64" ? Float64Array.from(values) : values;
}

// ONNX Runtime takes the bits of float16 everywhere, and gives a Float16Array where there is one.
function bitsOf({ buffer, byteOffset, length }) {
  return new Uint16Array(buffer, byteOffset, length);
}

// Some hosts unpack a .gz file themselves, on the way.
async function inflated(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (error) {
    throw new LoadError("corrupt", "the runtime is damaged", { cause: error });
  }
}

async function executionProviders({ backend, float16 }) {
  if (backend !== "webgpu") return { providers: ["wasm"], note: "" };
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const missing = !adapter ? "no WebGPU" : float16 && !adapter.features.has("shader-f16") ? "no float16 on WebGPU" : "";
  if (!missing) return { providers: ["webgpu", "wasm"], note: "" };
  return { providers: ["wasm"], note: `This browser offers ${missing} here, so the network runs on WebAssembly.` };
}
