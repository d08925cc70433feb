// Outputs as pictures and tables.

const ROWS_AT_MOST = 10;
// A runtime's sigmoid and tanh may leave their range by a rounding error.
const SLACK = 1e-6;

/** Whether an output of these dims can be drawn: 1×C×H×W with 1, 3 or 4 channels. */
export function isImage({ dims, data }) {
  const [batch, channels, height, width] = dims;
  return dims.length === 4 && batch === 1 && [1, 3, 4].includes(channels) && height > 1 && width > 1 &&
    (data instanceof Float32Array || data instanceof Uint8Array);
}

/** Draws an image output and returns, in words, which values are black and white. */
export function paint(canvas, { dims, data }) {
  const [, channels, height, width] = dims;
  const [low, high, words] = range(data);
  const plane = height * width;
  const pixels = new Uint8ClampedArray(4 * plane);
  const level = (value) => (255 * (value - low)) / (high - low);
  for (let i = 0; i < plane; i += 1) {
    for (let c = 0; c < 3; c += 1) pixels[4 * i + c] = level(data[(channels === 1 ? 0 : c) * plane + i]);
    pixels[4 * i + 3] = channels === 4 ? level(data[3 * plane + i]) : 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return words;
}

// Sigmoid and tanh outputs have ranges of their own; of any other only the values say which.
function range(data) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of data) {
    if (!Number.isFinite(value)) throw new RangeError("the network gave values that are not finite numbers");
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (data instanceof Uint8Array) return [0, 255, "0 to 255"];
  if (low >= -SLACK && high <= 1 + SLACK) return [0, 1, "0 to 1"];
  if (low >= -1 - SLACK && high <= 1 + SLACK) return [-1, 1, "−1 to 1"];
  return [low, high > low ? high : low + 1, `${short(low)} to ${short(high)}`];
}

/** An output's name and shape. */
export function describe({ name, dims, type }) {
  return `${name}: ${dims.length ? dims.join(" × ") : "one value"}, ${type}`;
}

/** A table of an output's values: the largest of a long row of classes, else the first. */
export function tableOf(output) {
  const { data } = output;
  const indices = Array.from({ length: Math.min(data.length, 1 << 16) }, (_, index) => index);
  const isVector = output.dims.filter((n) => n !== 1).length === 1 && data.length > ROWS_AT_MOST;
  if (isVector) indices.sort((a, b) => Number(data[b]) - Number(data[a]) || a - b);
  const table = document.createElement("table");
  const caption = table.createCaption();
  const shown = indices.slice(0, ROWS_AT_MOST);
  const which = isVector ? "largest" : "first";
  caption.textContent = describe(output) + (data.length > shown.length ? ` (the ${shown.length} ${which})` : "");
  for (const index of shown) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = String(index);
    row.append(head);
    row.insertCell().textContent = short(data[index]);
  }
  return table;
}

const short = (value) => (typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(6) : String(value));
