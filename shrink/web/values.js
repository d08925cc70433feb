/** The value steps: cast.1, fill.1, codebook.1, affine.1. */
import { ARRAYS, countOf, isHalf, storedWidth } from "./dtypes.js";
import { EIGHTBIT } from "./eightbit.js";
import { LoadError } from "./errors.js";

const TABLES = new Map([["eightbit", EIGHTBIT]]);
const TILE = 64;
const LARGEST_NUMBER = 1e300;

export function cast(bytes, params, { dtype, shape }) {
  const from = params.choice("from", [...ARRAYS.keys()]);
  params.done();
  const size = countOf(shape) * storedWidth(from);
  if (bytes.length !== size) throw params.bad(`${bytes.length} bytes are there where ${size} belong`);
  if (isHalf(from)) return convert(widen(view(bytes, Uint16Array), from), "F32", dtype, params);
  return convert(view(bytes, ARRAYS.get(from)), from, dtype, params);
}

/** The bytes as values, copied only where their address does not allow a view. */
function view(bytes, Values) {
  const fits = bytes.byteOffset % Values.BYTES_PER_ELEMENT === 0;
  const { buffer, byteOffset, byteLength } = fits ? bytes : bytes.slice();
  return new Values(buffer, byteOffset, byteLength / Values.BYTES_PER_ELEMENT);
}

export function convert(values, from, to, params) {
  if (from === to) return values;
  const To = ARRAYS.get(to);
  // From float to float, and from small whole numbers to float, JavaScript rounds as NumPy does.
  const floats = to === "F32" || to === "F64" || (isHalf(to) && from === "F32");
  if (floats && !from.endsWith("64")) return values instanceof To ? values : new To(values);
  if (to === "F32" && from === "F64") return new To(values);
  throw new LoadError("unsupported", `values of type ${from} cannot become ${to} here`, { tensor: params.tensor });
}

let halves;

/** float16 or bfloat16 to float32, exactly; NaNs keep their bits. */
function widen(source, from) {
  const out = new Uint32Array(source.length);
  if (from === "BF16") {
    for (let i = 0; i < out.length; i++) out[i] = source[i] << 16;
  } else {
    halves ??= Uint32Array.from({ length: 65536 }, (_, half) => bitsOfHalf(half));
    for (let i = 0; i < out.length; i++) out[i] = halves[source[i]];
  }
  return new Float32Array(out.buffer);
}

function bitsOfHalf(half) {
  const sign = (half & 0x8000) << 16;
  const exponent = (half >> 10) & 31;
  const mantissa = half & 1023;
  if (exponent === 31) return sign | 0x7f800000 | (mantissa << 13);
  if (exponent) return sign | ((exponent + 112) << 23) | (mantissa << 13);
  const value = new Float32Array([mantissa * 2 ** -24]);
  return sign | new Uint32Array(value.buffer)[0];
}

/** Whether a value is a number that arithmetic can be done with. */
export function isSane(value) {
  return typeof value === "number" && Math.abs(value) <= LARGEST_NUMBER;
}

export function fill(bytes, params, { dtype, shape }) {
  const value = Math.fround(params.number("value"));
  params.done();
  if (bytes.length) throw params.bad(`${bytes.length} bytes are there where none belong`);
  if (!(Math.abs(value) < Infinity)) throw params.bad("value is too large for float32");
  return convert(new Float32Array(countOf(shape)).fill(value), "F32", dtype, params);
}

export function codebook(bytes, params, { dtype }) {
  const scale = params.number("scale");
  const given = params.take("table");
  params.done();
  const named = typeof given === "string" && TABLES.get(given);
  const listed = Array.isArray(given) && given.length > 0 && given.length <= 256 && given.every(isSane);
  if (!named && !listed) throw params.bad("table is neither a known name nor a list of 1 to 256 finite numbers");
  const table = named || Float64Array.from(given);
  // Multiplied in double precision, rounded once. A table of 256 leaves the loop nothing to check.
  const scaled = new Float32Array(256);
  for (let code = 0; code < table.length; code++) scaled[code] = table[code] * scale;
  if (!(magnitude(scaled) < Infinity)) throw params.bad("the scale is too large for float32");
  const out = new Float32Array(bytes.length);
  let largest = 0;
  for (let i = 0; i < out.length; i++) out[i] = scaled[bytes[i]];
  if (table.length < 256) for (let i = 0; i < bytes.length; i++) largest = Math.max(largest, bytes[i]);
  if (largest >= table.length) throw params.bad(`code ${largest} is outside the table of ${table.length}`);
  return convert(out, "F32", dtype, params);
}

export function affine(bytes, params, { dtype, shape, codec }) {
  const bits = params.choice("bits", [4, 8]);
  const axis = params.optionalInteger("axis", 0, shape.length - 1);
  const block = params.optionalInteger("block", 1, 2 ** 30);
  const scaleType = params.choice("scale", ["F32", "BF16"]);
  const hasZero = params.choice("zero", [true, false]);
  params.done();
  const rows = axis === null ? 1 : shape[axis];
  const perRow = rows && countOf(shape) / rows;
  const blocks = block ? Math.ceil(perRow / block) : 1;
  const count = rows * perRow;
  const scaleBytes = rows * blocks * (scaleType === "F32" ? 4 : 2);
  const zeroBytes = hasZero ? rows * blocks : 0;
  const codeBytes = bits === 8 ? count : Math.ceil(count / 2);
  const size = scaleBytes + zeroBytes + codeBytes;
  if (bytes.length !== size) throw params.bad(`${bytes.length} bytes are there where ${size} belong`);
  // Copies: what lies in the codec's memory may have moved when the codes are unpacked.
  const stored = bytes.slice(0, scaleBytes);
  const scales = scaleType === "F32" ? view(stored, Float32Array) : widen(view(stored, Uint16Array), "BF16");
  const largest = magnitude(scales);
  if (!(largest < Infinity)) throw params.bad("a scale is not finite");
  const zeros = hasZero ? view(bytes.slice(scaleBytes, scaleBytes + zeroBytes), Int8Array) : null;
  const packed = bytes.subarray(scaleBytes + zeroBytes);
  if (bits === 4 && count % 2 && packed[packed.length - 1] >> 4) throw params.bad("there are codes past the end");
  const codes = bits === 8 ? view(packed, Int8Array) : codec.nibbles(packed);
  const values = dequantize(codes, scales, zeros, rows, perRow, block ?? perRow);
  // No difference of two codes is above 255, so that with ordinary scales nothing can overflow.
  if (largest > 1e36 && !(magnitude(values) < Infinity)) {
    throw params.bad("a scale is too large for float32");
  }
  return convert(axis ? moved(values, shape, axis) : values, "F32", dtype, params);
}

/** The largest absolute value; NaN where there is one. */
function magnitude(values) {
  let largest = 0;
  for (let i = 0; i < values.length; i++) largest = Math.max(largest, Math.abs(values[i]));
  return largest;
}

/** (code − zero) · scale: the difference is exact, the product rounded once, when it is stored. */
function dequantize(codes, scales, zeros, rows, perRow, block) {
  const out = new Float32Array(rows * perRow);
  let group = 0;
  for (let row = 0; row < rows; row++) {
    const rowEnd = (row + 1) * perRow;
    for (let start = row * perRow; start < rowEnd; start += block) {
      const end = Math.min(start + block, rowEnd);
      const scale = scales[group];
      const zero = zeros ? zeros[group] : 0;
      for (let i = start; i < end; i++) out[i] = (codes[i] - zero) * scale;
      group++;
    }
  }
  return out;
}

/** Values whose `axis` was moved to the front, in the order of `shape`; in tiles, as both sides jump. */
function moved(values, shape, axis) {
  const rows = shape[axis];
  const outer = countOf(shape.slice(0, axis));
  const inner = countOf(shape.slice(axis + 1));
  const out = new Float32Array(values.length);
  for (let left = 0; left < outer; left += TILE) {
    const right = Math.min(left + TILE, outer);
    for (let top = 0; top < rows; top += TILE) {
      const bottom = Math.min(top + TILE, rows);
      for (let o = left; o < right; o++) {
        for (let row = top; row < bottom; row++) {
          const to = (o * rows + row) * inner;
          const from = (row * outer + o) * inner;
          for (let i = 0; i < inner; i++) out[to + i] = values[from + i];
        }
      }
    }
  }
  return out;
}
