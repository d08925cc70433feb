// The manifest of an exported folder, and what is wrong with its scripts where one does not run. Imports nothing: what
// tells that files are missing must not need them.

const BASE = new URL("./", import.meta.url);
const VERSION = 1;
const SCRIPT = /^(text|application)\/(javascript|ecmascript)\b/i;

/** The manifest, checked. Throws an error that says what is wrong with it. */
export async function readManifest() {
  const { data } = await read("manifest.json");
  const text = new TextDecoder().decode(data);
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (cause) {
    const isPage = text.trimStart().startsWith("<");
    const what = isPage ? "the server gives a web page in its place" : "it is damaged or cut off: it is not JSON";
    throw failure("manifest.json", what, cause);
  }
  const fault = faultOf(manifest);
  if (fault) throw failure("manifest.json", fault);
  return manifest;
}

/** What is wrong with the first script of the folder that is missing, damaged or not served as one; else null. */
export async function damagedScript({ files }) {
  for (const [path, { bytes, integrity, parts }] of Object.entries(files)) {
    if (parts || !/\.(js|wasm)$/.test(path)) continue;
    try {
      const { data, type } = await read(path);
      if (data.length !== bytes) return failure(path, `${data.length} bytes came, ${bytes} belong there`);
      if (crypto.subtle && (await hashOf(data)) !== integrity) {
        return failure(path, "it is not the file that was exported");
      }
      if (path.endsWith(".js") && !SCRIPT.test(type)) {
        return failure(path, `the server gives it as ${type || "nothing it names"}, not as a script`);
      }
    } catch (error) {
      return error;
    }
  }
  return null;
}

function faultOf(manifest) {
  if (!isObject(manifest) || !("shrink" in manifest)) return "it is not what shrink wrote";
  if (manifest.shrink !== VERSION) return `its version is ${JSON.stringify(manifest.shrink)}, this page knows ${VERSION}`;
  const { title, adapter, files, runtime, model, weights, inputs, outputs, stages = [{ model, weights }] } = manifest;
  const texts = { title, adapter, ...(Array.isArray(stages) ? stages.at(-1) : { stages }) };
  const wrong =
    ["title", "adapter", "model", "weights"].find((key) => typeof texts[key] !== "string") ??
    (/^\w+\.js$/.test(adapter) ? null : "adapter") ??
    (isObject(files) && Object.values(files).every(isListed) ? null : "files") ??
    (isObject(runtime) ? null : "runtime") ??
    (Array.isArray(inputs) && inputs.every(isInput) ? null : "inputs") ??
    (Array.isArray(outputs) && outputs.every((output) => typeof output?.name === "string") ? null : "outputs");
  return wrong && `its part ${JSON.stringify(wrong)} is missing or damaged`;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const isListed = (file) => isCount(file?.bytes) && typeof file.integrity === "string";
const isInput = (input) => typeof input?.name === "string" && typeof input.dtype === "string" &&
  Array.isArray(input.shape) && input.shape.every(isCount);

async function read(path) {
  let response, data;
  try {
    response = await fetch(new URL(path, BASE), { cache: "no-cache" });
    data = new Uint8Array(await response.arrayBuffer());
  } catch (cause) {
    throw failure(path, "the server cannot be reached, or the connection broke", cause);
  }
  if (!response.ok) throw failure(path, `the server answers ${response.status}`);
  return { data, type: response.headers.get("Content-Type") ?? "" };
}

async function hashOf(data) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return `sha256-${btoa(String.fromCharCode(...hash))}`;
}

function failure(path, what, cause) {
  const error = new Error(`${path}: ${what}`, { cause });
  error.name = "LoadError";
  return error;
}
