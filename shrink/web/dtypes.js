/**
 * The typed array that holds each dtype of a safetensors file. JavaScript has no half-precision arrays everywhere:
 * F16 and BF16 are widened to F32, which is exact.
 */
export const ARRAYS = new Map([
  ["BOOL", Uint8Array],
  ["U8", Uint8Array],
  ["I8", Int8Array],
  ["U16", Uint16Array],
  ["I16", Int16Array],
  ["F16", Float32Array],
  ["BF16", Float32Array],
  ["U32", Uint32Array],
  ["I32", Int32Array],
  ["F32", Float32Array],
  ["U64", BigUint64Array],
  ["I64", BigInt64Array],
  ["F64", Float64Array],
]);

/** Bytes per value in a file. */
export function storedWidth(dtype) {
  return isHalf(dtype) ? 2 : ARRAYS.get(dtype).BYTES_PER_ELEMENT;
}

export function isHalf(dtype) {
  return dtype === "F16" || dtype === "BF16";
}

/** Bytes of a tensor in a file that is not encoded. */
export function bytesOf(dtype, shape) {
  return countOf(shape) * storedWidth(dtype);
}

/** The number of values in a shape; 0 wins over whatever else is in it. */
export function countOf(shape) {
  return shape.includes(0) ? 0 : shape.reduce((product, n) => product * n, 1);
}
