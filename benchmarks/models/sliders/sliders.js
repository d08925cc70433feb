// Ten label sliders and a noise seed drive the same generator twice, as float32 and compressed.

import { paint } from "./eightbit/show.js";

const NOISE = 100;
const DIGITS = 10;
const NAMES = ["float32", "eightbit"];
const element = (id) => document.getElementById(id);

/** What the page showed last, for whoever looks at it from the console. */
export let last = null;

// Standard normal numbers from a seed: mulberry32 and the Box–Muller transform.
function noise(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  const values = new Float32Array(NOISE);
  for (let i = 0; i < NOISE; i += 1) {
    values[i] = Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  return values;
}

async function open(name) {
  const base = new URL(`./${name}/`, import.meta.url);
  const { fetchFile } = await import(new URL("shrink/fetch_file.js", base));
  const manifest = JSON.parse(new TextDecoder().decode(await fetchFile(new URL("manifest.json", base).href)));
  const adapter = await import(new URL(`shrink/runtimes/${manifest.adapter}`, base));
  return { name, manifest, network: await adapter.open(manifest, { base }) };
}

async function start() {
  try {
    // One after the other: the second finds the runtime compiled.
    const opened = [];
    for (const name of NAMES) opened.push(await open(name));
    const sliders = labels();
    for (const { name, manifest } of opened) caption(name, manifest.files[manifest.weights].bytes);
    const redraw = latestOnly(() => draw(opened, sliders));
    for (const slider of sliders) slider.addEventListener("input", redraw);
    element("seed").addEventListener("input", redraw);
    element("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      element("seed").value = (Number(element("seed").value) + 1) >>> 0;
      redraw();
    });
    await redraw();
  } catch (error) {
    fail(error);
  }
}

function labels() {
  const sliders = [];
  for (let digit = 0; digit < DIGITS; digit += 1) {
    const row = document.createElement("label");
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.001, value: digit === 3 ? 1 : 0 });
    const shown = document.createElement("output");
    const show = () => { shown.textContent = Number(slider.value).toFixed(3); };
    slider.addEventListener("input", show);
    show();
    row.append(String(digit), slider, shown);
    sliders.push(slider);
    element("labels").append(row);
  }
  return sliders;
}

function caption(name, bytes) {
  element(name).nextElementSibling.textContent = `${name}: ${(bytes / 1e3).toFixed(0)} kB of weights`;
}

// Sliders move faster than networks run: while one picture is made, only the newest wish waits.
function latestOnly(work) {
  let running = null;
  let again = false;
  return () => {
    if (running) {
      again = true;
      return running;
    }
    running = (async () => {
      try {
        do {
          again = false;
          await work();
        } while (again);
      } catch (error) {
        fail(error);
      } finally {
        running = null;
      }
    })();
    return running;
  };
}

async function draw(opened, sliders) {
  const input = new Float32Array(NOISE + DIGITS);
  input.set(noise(Number(element("seed").value)));
  input.set(sliders.map((slider) => Number(slider.value)), NOISE);
  const start = performance.now();
  const outputs = {};
  for (const { name, manifest, network } of opened) {
    const result = await network.run({ [manifest.inputs[0].name]: input });
    outputs[name] = result[manifest.outputs[0].name];
  }
  const ms = performance.now() - start;
  for (const name of NAMES) paint(element(name), outputs[name]);
  const largest = outputs.float32.data.reduce((most, value, i) => Math.max(most, Math.abs(value - outputs.eightbit.data[i])), 0);
  element("difference").textContent = `Largest difference of a pixel: ${(100 * largest).toFixed(1)} % of white. Both drawn in ${ms.toFixed(1)} ms.`;
  element("status").textContent = "Both run in this browser, on WebAssembly.";
  element("result").hidden = false;
  last = { input, outputs };
}

function fail(error) {
  element("result").hidden = true;
  element("status").textContent = "The networks could not be run.";
  element("error").textContent = `${error.message} (${error.name})`;
  element("error").hidden = false;
  last = null;
  console.error(error);
}

start();
