// Measures an exported network from within its own folder: what a visitor's page does, with a clock beside it.

const BASE = new URL("./", import.meta.url);
const CANVAS = document.querySelector("canvas");
const PIECE = 1 << 15;

const ready = performance.now();
const threads = Number(new URLSearchParams(location.search).get("threads"));
if (threads) Object.defineProperty(navigator, "hardwareConcurrency", { value: threads });

let manifest, network, show;
let feeds = [];

globalThis.bench = { adapter, visit, run, outputs, memory, request };

/** What this browser offers for WebGPU, null for nothing. */
async function adapter() {
  const found = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!found) return null;
  const { vendor, architecture, device, description, isFallbackAdapter } = found.info;
  return { vendor, architecture, device, description, fallback: Boolean(isFallbackAdapter ?? found.isFallbackAdapter) };
}

/**
 * Loads the network and runs it on the first of the samples, each [[input name, base64 of its numbers], …].
 *
 * The milliseconds follow one another: `download` from opening the page until the last byte that the network needs;
 * `decode` what is still to be decoded then; `compile` until the runtime has built the network; `first_run`. After
 * `first_picture`, counted from opening the page, the output is on the screen.
 */
async function visit(samples) {
  const bytes = samples.map((sample) => sample.map(([name, text]) => [name, bytesOf(text)]));
  const start = performance.now();
  manifest = await (await fetch("manifest.json", { cache: "no-cache" })).json();
  show = await import("./show.js");
  const runtime = await import(`./shrink/runtimes/${manifest.adapter}`);
  feeds = bytes.map((sample) => feedOf(runtime, new Map(sample)));
  const opened = performance.now();
  network = await runtime.open(manifest, { base: BASE });
  const built = performance.now();
  const results = await network.run(feeds[0]);
  const ran = performance.now();
  paint(results);
  await painted();
  const end = performance.now();

  // The adapter's clock starts when it is called, and has both of these stopped before it builds the network.
  const after = Object.entries(network.timings).filter(([name]) => name.includes("after")).map(([, ms]) => ms);
  const decoded = Math.min(built, opened + Math.max(0, ...after));
  const arrivals = performance.getEntriesByType("resource").map(({ responseEnd }) => responseEnd);
  const arrived = Math.max(opened, ...arrivals.filter((ms) => ms <= decoded));
  // Nobody waits between opening a page and its script.
  const idle = start - ready;
  return {
    backend: network.backend,
    threads: network.threads,
    note: network.note,
    steps: {
      download: arrived - idle,
      decode: decoded - arrived,
      compile: built - decoded,
      first_run: ran - built,
      first_picture: end - idle,
    },
  };
}

/** Milliseconds that the network takes for a sample, from typed arrays to typed arrays. */
async function run(number) {
  const start = performance.now();
  await network.run(feeds[number]);
  return performance.now() - start;
}

/** What the network makes of a sample: [[name, dims, base64 of float32], …]. */
async function outputs(number) {
  const results = await network.run(feeds[number]);
  return Object.entries(results).map(([name, { dims, data }]) => [name, dims, textOf(Float32Array.from(data, Number))]);
}

/** The bytes that the page holds now, as the browser counts them; null where it does not tell. */
async function memory() {
  return (await performance.measureUserAgentSpecificMemory?.())?.bytes ?? null;
}

/** Milliseconds from asking a server for what a network makes of `text`, base64 of its inputs, until it is painted. */
async function request(address, text) {
  const body = bytesOf(text);
  show ??= await import("./show.js");
  const start = performance.now();
  const response = await fetch(address, { method: "POST", body, cache: "no-store" });
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  const dims = JSON.parse(response.headers.get("X-Dims"));
  paint([{ dims, data: new Float32Array(await response.arrayBuffer()) }]);
  await painted();
  return performance.now() - start;
}

// Names come out of the model, and an ordinary object has names of its own.
function feedOf(runtime, bytes) {
  const feed = Object.create(null);
  for (const { name, dtype } of manifest.inputs) {
    feed[name] = new (runtime.arrayFor(dtype))(bytes.get(name).buffer);
  }
  return feed;
}

function paint(results) {
  const picture = Object.values(results).find(show.isImage);
  try {
    if (picture) show.paint(CANVAS, picture);
  } catch {
    // What is not finite is no picture; the numbers will tell.
  }
}

function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
}

function bytesOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function textOf({ buffer, byteOffset, byteLength }) {
  const bytes = new Uint8Array(buffer, byteOffset, byteLength);
  let letters = "";
  for (let i = 0; i < bytes.length; i += PIECE) letters += String.fromCharCode(...bytes.subarray(i, i + PIECE));
  return btoa(letters);
}
