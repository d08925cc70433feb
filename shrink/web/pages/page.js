// The page of an exported network: loads it, feeds it numbers drawn from a seed, and shows what comes out.

const RUNS = 5;
const BASE = new URL("./", import.meta.url);
const element = (id) => document.getElementById(id);

let show = null;

/** What the page showed last: the feeds and the outputs, for whoever looks at the page from the console. */
export let last = null;

/**
 * The input number `number` for a seed: the mulberry32 generator, as in shrink.site.seeded_input.
 * Floats are uniform in [-1, 1), exact in float32; integers and truth values are 0 or 1.
 */
export function seededInput(seed, number, count, values) {
  const isFloat = values instanceof Float32Array || values instanceof Float64Array;
  const isBig = values instanceof BigInt64Array || values instanceof BigUint64Array;
  let state = (seed + 0x9e3779b9 * number) >>> 0;
  for (let i = 0; i < count; i += 1) {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    const bits = (t ^ (t >>> 14)) >>> 0;
    const value = isFloat ? (bits >>> 8) / 2 ** 23 - 1 : bits >>> 31;
    values[i] = isBig ? BigInt(value) : value;
  }
  return values;
}

async function start() {
  const started = performance.now();
  element("status").textContent = "Loading the network …";
  let files, manifest;
  try {
    files = await part("files.js");
    manifest = await files.readManifest();
    show = await part("show.js");
    document.title = manifest.title;
    element("title").textContent = manifest.title;
    const adapter = await import(`./shrink/runtimes/${manifest.adapter}`);
    const network = await adapter.open(manifest, { base: BASE, onProgress: showProgress });
    element("status").textContent = "Running for the first time …";
    // Stages that come one after another come now.
    element("loading").hidden = !manifest.sequential;
    const first = await run(manifest, adapter, network);
    element("loading").hidden = true;
    const timings = { ...network.timings, "First run": first };
    const total = performance.now() - started;
    const more = [];
    for (let i = 0; i < RUNS; i += 1) more.push(await run(manifest, adapter, network));
    timings[`Median of ${RUNS} more runs`] = more.sort((a, b) => a - b)[RUNS >> 1];
    timings["From opening the page to the result"] = total;
    rows("timings", timings, duration);
    rows("sizes", network.sizes, megabytes);
    element("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      again(manifest, adapter, network);
    });
    element("status").textContent = ready(network);
  } catch (error) {
    // A script that does not run is told by what it was for, not by what is wrong with it.
    fail((error.name !== "LoadError" && manifest && (await files.damagedScript(manifest))) || error);
  }
}

/** A module of the page itself. Imported here and not above, so that one that is missing can be named. */
async function part(name) {
  try {
    return await import(`./${name}`);
  } catch (cause) {
    throw new Error(`${name}: it is missing or damaged`, { cause });
  }
}

async function again(manifest, adapter, network) {
  const button = element("run");
  button.disabled = true;
  try {
    const ms = await run(manifest, adapter, network);
    element("status").textContent = `${ready(network)} Run in ${duration(ms)}.`;
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
}

// Runs once on the seed that stands in the field, shows the outputs, and returns the milliseconds of the run.
async function run(manifest, adapter, network) {
  const seed = Number(element("seed").value) >>> 0;
  // Names come out of the model, and an ordinary object has names of its own.
  const feeds = Object.create(null);
  manifest.inputs.forEach(({ name, dtype, shape }, number) => {
    const count = shape.reduce((a, b) => a * b, 1);
    feeds[name] = adapter.rounded(seededInput(seed, number, count, new (adapter.arrayFor(dtype))(count)), dtype);
  });
  const start = performance.now();
  const outputs = await network.run(feeds);
  const ms = performance.now() - start;
  showOutputs(manifest.outputs.map(({ name }) => ({ name, ...outputs[name] })));
  last = { seed, feeds, outputs };
  return ms;
}

function ready(network) {
  const where = network.backend === "webgpu" ? "WebGPU" : `WebAssembly, ${plural(network.threads, "thread")}`;
  return `Runs in this browser on ${where}. ${network.note}`.trim();
}

function showProgress({ loaded, total }) {
  element("progress").max = total;
  element("progress").value = loaded;
  element("loaded").textContent = `${megabytes(loaded)} of ${megabytes(total)}`;
}

function showOutputs(outputs) {
  const { describe, isImage, paint, tableOf } = show;
  const shown = outputs.map((output) => {
    const box = document.createElement(isImage(output) ? "figure" : "div");
    box.className = "output";
    if (isImage(output)) {
      const canvas = document.createElement("canvas");
      const range = paint(canvas, output);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Output ${output.name} as a picture`);
      const caption = document.createElement("figcaption");
      caption.textContent = `${describe(output)}, ${range}`;
      box.append(canvas, caption);
    } else {
      box.append(tableOf(output));
    }
    return box;
  });
  element("outputs").replaceChildren(...shown);
  element("result").hidden = false;
}

function rows(id, figures, inWords) {
  element(id).replaceChildren(...Object.entries(figures).map(([name, value]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const cell = document.createElement("td");
    cell.textContent = inWords(value);
    row.append(head, cell);
    return row;
  }));
}

// An error is said in words, and whatever picture there was goes: it is not the result.
function fail(error) {
  element("result").hidden = true;
  element("outputs").replaceChildren();
  element("loading").hidden = true;
  element("status").textContent = "The network could not be run.";
  element("error").textContent = `${error.message} (${error.name})`;
  element("error").hidden = false;
  last = null;
  console.error(error);
}

function duration(ms) {
  if (ms < 10) return `${ms.toFixed(2)} ms`;
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

const megabytes = (bytes) => (bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(2)} MB`);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

start();
