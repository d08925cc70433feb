// Runs a network that `shrink export --to webdnn` wrote on stock WebDNN.
//
// Stock WebDNN takes an error page for weights and tells no progress, so every file is fetched and checked here, and
// WebDNN is given addresses of what came. Weights in our container are decoded on the way.

import { SiteDownloads } from "../site_downloads.js";

const FILES = ["graph_webassembly.json", "kernels_webassembly.js", "kernels_webassembly.wasm"];

/**
 * Opens the network of a manifest. `base` is the URL of the folder; `onProgress({ loaded, total })` counts the bytes
 * that the visitor downloads; `signal` aborts.
 *
 * The network has `backend`, `threads`, `note`, `timings` in milliseconds and `sizes` in bytes, by what they are of,
 * and `run(feeds)`: typed arrays by input name in, { name: { dims, type, data } } out.
 */
export async function open(manifest, options = {}) {
  const { model, weights, runtime } = manifest;
  const paths = FILES.map((name) => `${model}/${name}`);
  const downloads = new SiteDownloads(manifest, [...paths, weights], options);
  const timings = {};
  const parts = await downloads.all([
    ...paths.map(async (path) => [await downloads.file(path)]),
    rawWeights(downloads, weights).then((raw) => {
      timings["Weights downloaded and decoded after"] = downloads.elapsed();
      return raw;
    }),
    downloads.script(runtime.api, addScript),
  ]);
  const addresses = new Map();
  try {
    [...FILES, "weight_webassembly.bin"].forEach((name, index) => {
      const type = name.endsWith(".wasm") ? "application/wasm" : "application/octet-stream";
      addresses.set(name, URL.createObjectURL(new Blob(parts[index], { type })));
    });
    const start = performance.now();
    const runner = await globalThis.WebDNN.load(downloads.url(model), {
      backendOrder: ["webassembly"],
      cacheStrategy: "networkOnly",
      saveCache: false,
      transformUrlDelegate: (address) => addresses.get(address.split("/").pop()) ?? address,
    });
    timings["Network built in"] = performance.now() - start;
    return networkOf(runner, manifest, timings);
  } finally {
    for (const address of addresses.values()) URL.revokeObjectURL(address);
  }
}

/** The typed array that an input of this type takes: WebDNN has float32 only. */
export function arrayFor(dtype) {
  if (dtype !== "float32") throw new TypeError(`inputs of type ${dtype} are not supported`);
  return Float32Array;
}

/** The numbers that an input gets of these. */
export const rounded = (values) => values;

function networkOf(runner, manifest, timings) {
  const { files, runtime, weights, model, float32_bytes } = manifest;
  const kernels = ["js", "wasm"].reduce((sum, end) => sum + files[`${model}/kernels_webassembly.${end}`].bytes, 0);
  return {
    backend: "wasm",
    threads: 1,
    note: "",
    timings,
    sizes: {
      "Weights": files[weights].bytes,
      "… as float32": float32_bytes,
      "Kernels": kernels,
      [`${runtime.name} ${runtime.version}`]: files[runtime.api].bytes,
    },
    async run(feeds) {
      const views = runner.getInputViews();
      manifest.inputs.forEach(({ name }, index) => views[index].set(feeds[name]));
      await runner.run();
      const values = runner.getOutputViews().map((view) => Float32Array.from(view.toActual()));
      return Object.fromEntries(
        manifest.outputs.map(({ name, shape }, index) => [name, { dims: shape, type: "float32", data: values[index] }]),
      );
    },
    close: async () => {},
  };
}

// WebDNN's own file as it is; of a container, the decoded tensors in file order, end to end, are the raw file that the
// graph asks for.
async function rawWeights(downloads, path) {
  return path.endsWith(".bin") ? [await downloads.file(path)] : [...(await downloads.weights(path)).values()];
}

function addScript(url) {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
}
