// float16, which JavaScript has arrays for only in newer browsers, as its bits in a Uint16Array.

/** The nearest float16 numbers, of two as near the even one, as NumPy rounds: too large is infinite, NaN stays NaN. */
export function toHalves(values) {
  const floats = values instanceof Float32Array ? values : Float32Array.from(values);
  const bits = new Uint32Array(floats.buffer, floats.byteOffset, floats.length);
  const out = new Uint16Array(values.length);
  for (let i = 0; i < out.length; i += 1) out[i] = halfOf(bits[i]);
  return out;
}

/** The same numbers as float32, exactly. */
export function fromHalves(halves) {
  return Float32Array.from(halves, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 31;
    const mantissa = half & 1023;
    if (exponent === 31) return mantissa ? NaN : sign * Infinity;
    return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
  });
}

/** The float32 numbers that float16 can hold next to these. */
export const roundedToHalf = (values) => fromHalves(toHalves(values));

function halfOf(bits) {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7c00 | Math.max((magnitude >> 13) & 0x3ff, 1);
  // 65520, from where on the nearest is infinity.
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  // 2 ** -14, below which float16 has fewer bits: the last one is worth 2 ** -24.
  if (magnitude < 0x38800000) {
    const shift = 126 - (magnitude >>> 23);
    return shift > 24 ? sign : sign | shifted((magnitude & 0x7fffff) | 0x800000, shift);
  }
  return sign | shifted(magnitude - 0x38000000, 13);
}

// Shifted to the right, rounded to nearest, of two as near to even. What carries over goes into the exponent.
function shifted(number, shift) {
  const down = number >>> shift;
  const rest = number & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  return down + (rest > half || (rest === half && down & 1) ? 1 : 0);
}
