/**
 * The decode steps, as shrink/steps.py defines them: the same bytes give the very same bits. A byte step takes and
 * gives a Uint8Array, a value step a Uint8Array and a typed array. Every number may come from a hostile file and is
 * checked before anything is allocated.
 */
import { ARRAYS, countOf } from "./dtypes.js";
import { LoadError } from "./errors.js";
import { inflate } from "./inflate.js";
import { affine, cast, codebook, fill, isSane } from "./values.js";

const WIDEST_ITEM = 1 << 24;

const BYTE_STEPS = new Map([
  ["zstd.1", unzstd],
  ["deflate.1", undeflate],
  ["planes.1", planes],
  ["sparse.1", sparse],
  ["rans.1", later("rans")],
  ["trellis.1", later("trellis")],
]);
const VALUE_STEPS = new Map([
  ["cast.1", cast],
  ["fill.1", fill],
  ["codebook.1", codebook],
  ["affine.1", affine],
  ["grid.1", later("grid")],
]);

/** The values of `tensor` (name, dtype, shape, steps) that the bytes stand for, in an array of their own. */
export async function decode(bytes, tensor, codec) {
  const { name, dtype, shape, steps } = tensor;
  const count = countOf(shape);
  // Scales and zero points travel before the codes, so a step may give somewhat more bytes than the values take.
  const most = 4 * count * ARRAYS.get(dtype).BYTES_PER_ELEMENT + 65536;
  let data = bytes;
  for (const [step, given] of steps.slice(0, -1)) {
    const run = BYTE_STEPS.get(step);
    if (!run) throw new LoadError("unsupported", `the decode step ${step} is not known`, { tensor: name });
    data = await run(data, new Params(step, given, name), most, codec);
  }
  const [step, given] = steps.at(-1);
  const run = VALUE_STEPS.get(step);
  if (!run) throw new LoadError("unsupported", `the decode step ${step} gives no values`, { tensor: name });
  const params = new Params(step, given, name);
  const values = await run(data, params, { dtype, shape, codec });
  if (values.length !== count) throw params.bad(`gives ${values.length} values where ${count} belong`);
  // The caller gets an array that fills its buffer: buffers are handed on between threads and to runtimes.
  return values.byteLength === values.buffer.byteLength ? values : values.slice();
}

/** A step of rans.js, which only files that have it make the page load. */
function later(name) {
  return async (...step) => {
    const steps = await import("./rans.js").catch((cause) => {
      throw new LoadError("network", "rans.js could not be loaded", { cause });
    });
    return steps[name](...step);
  };
}

/** The parameters of one step, each taken once and checked; what is left over is refused by `done`. */
class Params {
  constructor(step, given, tensor) {
    this.step = step;
    this.left = new Map(Object.entries(given));
    this.tensor = tensor;
  }

  bad(what) {
    return new LoadError("corrupt", `${this.step}: ${what}`, { tensor: this.tensor });
  }

  take(key) {
    const value = this.left.get(key);
    this.left.delete(key);
    return value;
  }

  integer(key, low, high) {
    const value = this.take(key);
    if (!Number.isInteger(value) || value < low || value > high) {
      throw this.bad(`${key} is not a whole number from ${low} to ${high}`);
    }
    return value;
  }

  optionalInteger(key, low, high) {
    return (this.left.get(key) ?? null) === null ? (this.left.delete(key), null) : this.integer(key, low, high);
  }

  choice(key, choices) {
    const value = this.take(key);
    if (!choices.includes(value)) throw this.bad(`${key} is not one of ${choices.join(", ")}`);
    return value;
  }

  number(key) {
    const value = this.take(key);
    if (!isSane(value)) throw this.bad(`${key} is not a finite number`);
    return value;
  }

  done() {
    for (const key of this.left.keys()) throw this.bad(`unknown parameter ${JSON.stringify(key)}`);
  }
}

function unzstd(bytes, params, most, codec) {
  const size = params.integer("size", 0, most);
  params.done();
  if (size === 0) return new Uint8Array(0);
  const out = codec.unzstd(bytes, size);
  if (!out) throw params.bad(`the frame does not hold the promised ${size} bytes`);
  return out;
}

async function undeflate(bytes, params, most, codec) {
  const size = params.integer("size", 0, most);
  params.done();
  const out = await inflate(codec.owns(bytes) ? bytes.slice() : bytes, size);
  if (out?.length !== size) throw params.bad(`the stream does not hold the promised ${size} bytes`);
  return out;
}

function planes(bytes, params, most, codec) {
  const width = params.integer("width", 2, WIDEST_ITEM);
  const skip = params.integer("skip", 0, bytes.length);
  params.done();
  const count = (bytes.length - skip) / width;
  if (!Number.isInteger(count)) throw params.bad(`${bytes.length - skip} bytes are not whole items of ${width}`);
  return codec.planes(bytes, width, count, skip);
}

function sparse(bytes, params, most, codec) {
  const width = params.integer("width", 1, 8);
  const count = params.integer("count", 0, most);
  const skip = params.integer("skip", 0, most);
  params.done();
  if (skip + count * width > most) throw params.bad("it gives more bytes than the tensor holds");
  if (bytes.length < skip + count / 8) throw params.bad("the mask is cut off");
  const out = codec.sparse(bytes, width, count, skip);
  if (!out) throw params.bad("the mask does not mark as many items as there are");
  return out;
}
