/**
 * The decode steps, as shrink/steps.py defines them: the same bytes give the very same bits. A byte step takes and
 * gives a Uint8Array, a value step a Uint8Array and a typed array. Every number may come from a hostile file and is
 * checked before anything is allocated.
 */
import { ARRAYS, countOf } from "./dtypes.js";
import { LoadError } from "./errors.js";
import { inflate } from "./inflate.js";
import { affine, cast, codebook, isSane } from "./values.js";

const WIDEST_ITEM = 1 << 24;
const TILE = 64;

const BYTE_STEPS = new Map([
  ["zstd.1", unzstd],
  ["deflate.1", undeflate],
  ["planes.1", planes],
  ["sparse.1", sparse],
]);
const VALUE_STEPS = new Map([
  ["cast.1", cast],
  ["codebook.1", codebook],
  ["affine.1", affine],
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
  const values = run(data, params, { dtype, shape });
  if (values.length !== count) throw params.bad(`gives ${values.length} values where ${count} belong`);
  // The caller gets an array that fills its buffer: buffers are handed on between threads and to runtimes.
  return values.byteLength === values.buffer.byteLength ? values : values.slice();
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

function planes(bytes, params) {
  const width = params.integer("width", 2, WIDEST_ITEM);
  const skip = params.integer("skip", 0, bytes.length);
  params.done();
  const count = (bytes.length - skip) / width;
  if (!Number.isInteger(count)) throw params.bad(`${bytes.length - skip} bytes are not whole items of ${width}`);
  const out = aligned(skip, count * width);
  out.set(bytes.subarray(0, skip));
  const source = bytes.subarray(skip);
  if (width === 2) {
    const items = new Uint16Array(out.buffer, out.byteOffset + skip, count);
    for (let i = 0; i < count; i++) items[i] = source[i] | (source[count + i] << 8);
  } else if (width === 4) {
    const items = new Uint32Array(out.buffer, out.byteOffset + skip, count);
    const [b, c, d] = [count, 2 * count, 3 * count];
    for (let i = 0; i < count; i++) {
      items[i] = source[i] | (source[b + i] << 8) | (source[c + i] << 16) | (source[d + i] << 24);
    }
  } else {
    transpose(source, out.subarray(skip), width, count);
  }
  return out;
}

/** rows × columns becomes columns × rows; in tiles, so that both sides stay in the cache. */
function transpose(source, target, rows, columns) {
  for (let top = 0; top < rows; top += TILE) {
    const bottom = Math.min(top + TILE, rows);
    for (let left = 0; left < columns; left += TILE) {
      const right = Math.min(left + TILE, columns);
      for (let column = left; column < right; column++) {
        for (let row = top; row < bottom; row++) target[column * rows + row] = source[row * columns + column];
      }
    }
  }
}

function sparse(bytes, params, most) {
  const width = params.integer("width", 1, 8);
  const count = params.integer("count", 0, most);
  const skip = params.integer("skip", 0, most);
  params.done();
  if (skip + count * width > most) throw params.bad("it gives more bytes than the tensor holds");
  const maskBytes = Math.ceil(count / 8);
  if (bytes.length < skip + maskBytes) throw params.bad("the mask is cut off");
  const mask = bytes.subarray(skip, skip + maskBytes);
  if (count % 8 && mask[maskBytes - 1] >> count % 8) throw params.bad("the mask marks items past the end");
  const present = ones(mask);
  const items = bytes.subarray(skip + maskBytes);
  if (items.length !== present * width) {
    throw params.bad(`the mask marks ${present} items of ${width} bytes, ${items.length} bytes are there`);
  }
  const out = aligned(skip, count * width);
  out.set(bytes.subarray(0, skip));
  const Items = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array, 8: BigUint64Array }[width];
  if (Items) {
    const whole = items.byteOffset % width ? items.slice() : items;
    const source = new Items(whole.buffer, whole.byteOffset, present);
    spread(mask, source, new Items(out.buffer, out.byteOffset + skip, count));
  } else {
    const wide = out.subarray(skip);
    for (let i = 0; i < width; i++) spread(mask, items, wide, width, i);
  }
  return out;
}

/** Put the items where the mask has ones; of items of several bytes, the one at `offset`. */
function spread(mask, items, out, width = 1, offset = 0) {
  let next = offset;
  // 32 items at once: going from one to the next is quicker than to ask for each, as no one can guess the answer.
  for (let byte = 0; byte < mask.length; byte += 4) {
    let bits = mask[byte];
    for (let i = Math.min(3, mask.length - 1 - byte); i > 0; i--) bits |= mask[byte + i] << (8 * i);
    while (bits) {
      const lowest = bits & -bits;
      out[(8 * byte + 31 - Math.clz32(lowest)) * width + offset] = items[next];
      next += width;
      bits ^= lowest;
    }
  }
}

function ones(mask) {
  let total = 0;
  for (let i = 0; i < mask.length; i++) {
    let bits = mask[i];
    bits -= (bits >> 1) & 0x55;
    bits = (bits & 0x33) + ((bits >> 2) & 0x33);
    total += (bits + (bits >> 4)) & 15;
  }
  return total;
}

/** Zeros, `skip` bytes and then `size` that begin where any item may. */
function aligned(skip, size) {
  const pad = -skip & 7;
  return new Uint8Array(new ArrayBuffer(pad + skip + size), pad);
}
