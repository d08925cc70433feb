// Runs a network that `shrink split --cut` wrote, on the page's own ONNX Runtime Web.

import { openChain } from "./chain.js";
import { LoadError } from "./errors.js";
import { fetchFile } from "./fetch_file.js";
import { beside, checkParts, joinParts } from "./parts.js";

const VERSION = 1;
// An index that is too large for one file lies in several, which may have an index again.
const INDEX_ROUNDS = 8;
const INDEX_AT_MOST = 2 ** 26;

/**
 * Opens the stages that a `.stages.json` lists. `ort` is ONNX Runtime Web, as the page has imported it.
 *
 *     import { openStages } from "./shrink/stages.js";
 *     const network = await openStages(ort, "model.stages.json");
 *     const results = await network.run({ x: new ort.Tensor("float32", data, [1, 3, 256, 256]) });
 *     await network.close();
 *
 * With `sequential`, each run loads a stage, runs it and drops it before the next one is loaded: memory for one stage
 * at a time, and the browser's cache in place of a download from the second run on. `sessionOptions` go to every
 * session. `onProgress({ loaded, total })` counts bytes; with `sequential`, those of each run. `signal` aborts.
 *
 * Every file is checked against its length and, on https and localhost, its hash. Throws LoadError.
 *
 * Feeds and results are tensors by name. What stages hand to each other is disposed of after its last use.
 */
export async function openStages(ort, url, { sequential = false, sessionOptions = {}, onProgress, signal } = {}) {
  const index = await fetchIndex(new URL(url, globalThis.location?.href).href, signal);
  const load = (stage, progress) => fetchStage(index.base, stage, progress, signal);
  const create = ({ model, externalData }) =>
    ort.InferenceSession.create(model, externalData.length ? { ...sessionOptions, externalData } : sessionOptions);
  const total = index.stages.reduce((sum, stage) => sum + bytesOf(stage), 0);
  const counted = () => counter(total, onProgress);
  const chain = await openChain(index.stages, { results: index.results, load, create, begin: counted, sequential });
  return {
    inputs: index.inputs,
    outputs: index.outputs,
    async run(feeds) {
      for (const { name } of index.inputs) {
        if (!Object.hasOwn(feeds, name)) throw new TypeError(`the network needs an input ${JSON.stringify(name)}`);
      }
      const results = await chain.run(feeds);
      return Object.fromEntries(index.outputs.map(({ name }) => [name, results.get(name)]));
    },
    close: chain.close,
  };
}

async function fetchStage(base, stage, progress, signal) {
  const model = await fetchPart(base, stage, progress, signal);
  const externalData = [];
  for (const part of stage.data ?? []) {
    externalData.push({ path: part.file, data: await fetchPart(base, part, progress, signal) });
  }
  return { model, externalData };
}

/** A function for each file that takes the bytes loaded of it, for progress over all of them. */
function counter(total, onProgress = () => {}) {
  const loaded = new Map();
  let sum = 0;
  return (file) => (bytes) => {
    sum += bytes - (loaded.get(file) ?? 0);
    loaded.set(file, bytes);
    onProgress({ loaded: sum, total });
  };
}

const bytesOf = ({ bytes, data = [] }) => data.reduce((sum, part) => sum + part.bytes, bytes);

function fetchPart(base, { file, bytes, integrity }, progress, signal) {
  return fetchFile(beside(file, base), { bytes, integrity, onProgress: progress(file), signal });
}

async function fetchIndex(url, signal) {
  let content = parsed(await fetchFile(url, { signal }));
  for (let round = 0; content?.shrink?.index && round < INDEX_ROUNDS; round++) {
    const { parts, bytes } = content.shrink.index;
    content = parsed(await joinParts(parts, { bytes, maxBytes: INDEX_AT_MOST, base: url, signal }));
  }
  if (content?.version > VERSION) throw new LoadError("unsupported", "the stages were written by a newer shrink");
  const { version, inputs, outputs, stages } = content ?? {};
  const named = (list) => Array.isArray(list) && list.every((item) => typeof item?.name === "string");
  if (version !== VERSION || !named(inputs) || !named(outputs) || !Array.isArray(stages) || !stages.every(isStage)) {
    throw corrupt();
  }
  return { base: url, inputs, outputs, stages, results: outputs.map(({ name }) => name) };
}

function parsed(data) {
  try {
    return JSON.parse(new TextDecoder().decode(data));
  } catch (error) {
    throw corrupt(error);
  }
}

const corrupt = (cause) => new LoadError("corrupt", "this is no list of stages that shrink wrote", { cause });

function isStage(stage) {
  const names = [stage?.inputs, stage?.outputs, stage?.drop];
  const data = stage?.data ?? [];
  return names.every(isNames) && Array.isArray(data) && checkParts([stage, ...data]).length > 0;
}

const isNames = (names) => Array.isArray(names) && names.every((name) => typeof name === "string");
