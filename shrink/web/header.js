/**
 * The header of a safetensors file, and shrink's metadata in it, as shrink/container.py defines them. Everything is
 * checked here, once: later code believes names, shapes, sizes and places.
 */
import { ARRAYS, bytesOf, countOf } from "./dtypes.js";
import { LoadError } from "./errors.js";
import { inflate } from "./inflate.js";

const ATTRIBUTES = "shrink.attributes";
const GRAPH = "shrink.graph";
const PACKED = "shrink.packed";
const VERSION = 1;
const PACKED_VERSION = 2;

// The limits of the safetensors library and of shrink's own reader.
export const HEADER_AT_MOST = 100_000_000;
const PACKED_AT_MOST = 2 ** 20;
const NAME_AT_MOST = 1024;
const DIMENSIONS_AT_MOST = 32;
const STEPS_AT_MOST = 16;
const COUNT_BELOW = 2 ** 48;
// A tensor larger than this is believed only when enough bytes stand behind it.
const BELIEVED_BYTES = 2 ** 26;
const BELIEVED_RATIO = 4096;

// The name of a format.
const SOURCE = /^[a-z0-9-]{1,32}$/;
// Names that could harm whoever prints them or makes a path of them.
const FORBIDDEN = /[\x00-\x1f\x7f-\x9f\u2028\u2029]|\p{Surrogate}|^[/\\]|(^|[/\\])\.\.([/\\]|$)/u;

/**
 * The header of a file: yields how many bytes it must have next, and returns what the file holds and the text that says
 * it. What the file holds: its sections in file order, each with name, size (stored bytes), crc32 (or undefined) and
 * either `blob` or dtype, shape, steps and decodedBytes. `described`: whether shrink wrote the file.
 */
export async function* readHeader(crc32) {
  const length = new DataView((yield 8).buffer).getBigUint64(0, true);
  if (length < 2n || length > HEADER_AT_MOST) throw corrupt("this is not a safetensors file");
  const text = yield Number(length);
  const header = parseHeader(text, crc32);
  if (!header.packed) return { header, text };
  const left = header.size - 4;
  const size = new DataView((yield 4).buffer).getUint32(0, true);
  if (size > left || size > PACKED_AT_MOST) throw corrupt("the packed header is longer than is believable");
  const inner = await inflate(yield size, PACKED_AT_MOST);
  if (!inner) throw corrupt("the packed header is damaged, or longer than is believable");
  return { header: parsePacked(inner, left - size), text: inner };
}

function parseHeader(bytes, crc32) {
  const { __metadata__: metadata, ...specs } = parseJson(bytes, "the header");
  const meta = parseMetadata(metadata ?? {}, crc32);
  const header = arrange(Object.entries(specs), meta);
  if (meta.packed && Object.keys(specs).join() !== PACKED) throw corrupt(`a packed file holds ${PACKED} alone`);
  return header;
}

/** Tensors in the order of their data, which takes `room` bytes. */
function parsePacked(bytes, room) {
  const { source, state, tensors } = parseJson(bytes, "the packed header");
  const meta = checkMetadata({ source, state, tensors: {} });
  if (!Array.isArray(tensors) || !tensors.every(Array.isArray)) throw corrupt("the packed header lists no tensors");
  let end = 0;
  const specs = tensors.map(([crc32, size, shape, name, dtype, steps, ...more]) => {
    const valid = typeof name === "string" && isCount(size) && !more.length && !meta.tensors.has(name);
    if (!valid) throw corrupt("the packed header has a tensor that is no valid row, or twice");
    meta.tensors.set(name, { crc32, dtype, shape, steps });
    const stored = steps === undefined ? { dtype, shape } : { dtype: "U8", shape: [size] };
    return [name, { ...stored, data_offsets: [end, (end += size)] }];
  });
  if (end !== room) throw corrupt(`its tensors take ${end} bytes, but ${room} are there`);
  return arrange(specs, meta);
}

function arrange(specs, meta) {
  const sections = specs.map(([name, spec]) => parseSection(name, spec, meta));
  sections.sort((a, b) => a.start - b.start || a.size - b.size || (a.name < b.name ? -1 : 1));
  let end = 0;
  for (const { name, start, size } of sections) {
    if (start !== end) throw corrupt("its bytes do not begin where those before it end", name);
    end += size;
  }
  const names = new Set(sections.map((section) => section.name));
  for (const name of [...meta.tensors.keys(), ...meta.state]) {
    if (!names.has(name)) throw corrupt("the metadata describes it, but the file does not hold it", name);
  }
  return { sections, size: end, described: meta.described, packed: meta.packed };
}

const NOTHING = { described: false, tensors: new Map(), state: [] };

function parseMetadata(metadata, crc32) {
  if (!isObject(metadata)) throw corrupt("the metadata is not an object");
  const said = metadata.shrink;
  // One of the two without the other is a damaged key.
  if (said === undefined && metadata["shrink.crc32"] === undefined) return NOTHING;
  if (typeof said !== "string" || metadata["shrink.crc32"] !== hex(crc32(new TextEncoder().encode(said)))) {
    throw corrupt("the metadata is damaged");
  }
  const meta = json(said, "the metadata");
  if (meta.version === PACKED_VERSION) return { ...NOTHING, packed: true };
  if (meta.version === VERSION) return checkMetadata(meta);
  throw new LoadError("unsupported", `container version ${meta.version} is not known`);
}

function checkMetadata({ source, state, tensors }) {
  const valid =
    typeof source === "string" &&
    SOURCE.test(source) &&
    Array.isArray(state) &&
    state.every((name) => typeof name === "string") &&
    isObject(tensors) &&
    Object.values(tensors).every(isObject);
  if (!valid) throw corrupt("the metadata has parts missing or of the wrong type");
  return { described: true, tensors: new Map(Object.entries(tensors)), state };
}

function parseSection(name, spec, meta) {
  checkName(name);
  const [start, end] = isObject(spec) && Array.isArray(spec.data_offsets) ? spec.data_offsets : [];
  const size = end - start;
  if (!isCount(start) || !isCount(end) || size < 0) throw corrupt("it has no valid place in the file", name);
  if (!isShape(spec.shape)) throw corrupt("it has no valid shape", name);
  if (!ARRAYS.has(spec.dtype)) {
    throw new LoadError("unsupported", `values of type ${JSON.stringify(spec.dtype)?.slice(0, 20)}`, { tensor: name });
  }
  if (bytesOf(spec.dtype, spec.shape) !== size) throw corrupt("its shape and size do not fit", name);
  const said = meta.tensors.get(name) ?? {};
  const section = { name, start, size, crc32: said.crc32 ?? undefined };
  if (meta.described && (name === ATTRIBUTES || name === GRAPH)) return { ...section, blob: true };
  if (said.steps === undefined) {
    const { dtype, shape } = spec;
    return { ...section, dtype, shape, steps: [["cast.1", { from: dtype }]], decodedBytes: decodedBytes(dtype, shape) };
  }
  if (spec.dtype !== "U8") throw corrupt("it is encoded, but not stored as U8", name);
  return { ...section, ...parseEncoded(name, said, size) };
}

function parseEncoded(name, { dtype, shape, steps }, size) {
  if (!ARRAYS.has(dtype) || dtype === "BF16") throw corrupt("its description names no known dtype", name);
  if (!isShape(shape)) throw corrupt("its description has no valid shape", name);
  const isStep = (step) =>
    Array.isArray(step) && step.length === 2 && typeof step[0] === "string" && isObject(step[1]);
  if (!Array.isArray(steps) || !steps.length || steps.length > STEPS_AT_MOST || !steps.every(isStep)) {
    throw corrupt("its description has no list of steps", name);
  }
  const decoded = decodedBytes(dtype, shape);
  if (decoded > BELIEVED_BYTES && decoded > BELIEVED_RATIO * size) {
    throw corrupt(`${size} bytes claim to hold ${decoded}`, name);
  }
  return { dtype, shape, steps, decodedBytes: decoded };
}

function decodedBytes(dtype, shape) {
  return countOf(shape) * ARRAYS.get(dtype).BYTES_PER_ELEMENT;
}

function checkName(name) {
  if (!name || [...name].length > NAME_AT_MOST || FORBIDDEN.test(name)) {
    throw corrupt("a name is empty, too long, holds control characters or climbs out of its folder", name);
  }
}

/** As in Python, where the other dimensions matter even beside a 0. */
function isShape(shape) {
  const fits = Array.isArray(shape) && shape.length <= DIMENSIONS_AT_MOST && shape.every(isCount);
  return fits && countOf(shape.map((n) => n || 1)) < COUNT_BELOW;
}

export function isCount(value) {
  return Number.isInteger(value) && value >= 0 && value < COUNT_BELOW;
}

export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The attributes of the source's format: names and texts. */
export function parseAttributes(bytes) {
  const attributes = parseJson(bytes, "the list of attributes");
  if (!Object.values(attributes).every((value) => typeof value === "string")) {
    throw corrupt("attributes are not all text");
  }
  return attributes;
}

/** A JSON object that says nothing twice. */
export function parseJson(bytes, what) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw corrupt(`${what} is not UTF-8`);
  }
  return json(text, what);
}

function json(string, what) {
  let value;
  try {
    value = JSON.parse(string);
  } catch {
    throw corrupt(`${what} is not valid JSON`);
  }
  if (!isObject(value)) throw corrupt(`${what} is not a JSON object`);
  // Of two equal keys JSON.parse keeps one: then the text has more keys than the value.
  let counted;
  try {
    counted = countKeys(value);
  } catch {
    throw corrupt(`${what} is nested too deeply`);
  }
  if (keysIn(string) !== counted) throw corrupt(`${what} says something twice`);
  return value;
}

/** How many strings of a JSON text a colon follows. A regular expression overflows at one of some million characters. */
function keysIn(string) {
  let keys = 0;
  for (let at = string.indexOf('"'); at >= 0; at = string.indexOf('"', at)) {
    for (at += 1; string[at] !== '"'; at += 1) if (string[at] === "\\") at += 1;
    do at += 1; while (" \t\r\n".includes(string[at] ?? "."));
    if (string[at] === ":") keys += 1;
  }
  return keys;
}

function countKeys(value) {
  if (typeof value !== "object" || value === null) return 0;
  const parts = Object.values(value);
  return parts.reduce((sum, part) => sum + countKeys(part), Array.isArray(value) ? 0 : parts.length);
}

function hex(crc) {
  return crc.toString(16).padStart(8, "0");
}

function corrupt(what, tensor) {
  return new LoadError("corrupt", what, { tensor });
}
