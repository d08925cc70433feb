/** The steps rans.1, trellis.1 and grid.1 on rans.wasm. Few files have them: steps.js imports this when one does. */
import { countOf } from "./dtypes.js";
import { compile } from "./codec.js";
import { LoadError } from "./errors.js";
import { convert } from "./values.js";

const PAGE = 65536;
const VECTOR = 16;
const BAND = 1 << 15;
const AXES_AT_MOST = 16;
const LARGEST_DIMENSION = 2 ** 31 - 1;
const instances = new WeakMap();
let compiled;

/** The instance that belongs to a codec, as its sections, too, are decoded one after the other. */
async function instanceFor(codec) {
  let instance = instances.get(codec);
  if (!instance) {
    compiled ??= compile("rans.wasm", new URL("./rans.wasm", import.meta.url)).catch((error) => {
      compiled = undefined;
      throw error;
    });
    instance = new Rans((await WebAssembly.instantiate(await compiled)).exports);
    instances.set(codec, instance);
  }
  return instance;
}

export async function rans(bytes, params, most, codec) {
  const layout = layoutOf(params, most);
  const [rows, columns, head, width] = layout;
  const size = head + rows * columns * width;
  if (size > most) throw params.bad("it gives more bytes than the tensor holds");
  const instance = await instanceFor(codec);
  return instance.decode(bytes, size, layout, params);
}

export async function trellis(bytes, params, most, codec) {
  const [rows, columns, head, width] = layoutOf(params, most);
  const size = head + 2 * rows * columns;
  if (size > most) throw params.bad("it gives more bytes than the tensor holds");
  const given = head + rows * columns * width;
  if (bytes.length !== given) throw params.bad(`${bytes.length} bytes are there where ${given} belong`);
  const instance = await instanceFor(codec);
  const values = instance.trellis(bytes, size, head, [width, rows, columns]);
  if (!values) throw params.bad("a code is too large");
  return values;
}

function layoutOf(params, most) {
  const [rows, columns, head] = ["rows", "columns", "head"].map((key) => params.integer(key, 0, most));
  const width = params.integer("width", 1, 2);
  params.done();
  return [rows, columns, head, width];
}

export async function grid(bytes, params, { dtype, shape, codec }) {
  const scale = params.number("scale");
  const width = params.choice("width", [1, 2]);
  const view = dimensions(params, shape);
  const axes = axesOf(params, view.length);
  params.done();
  if (!(scale > 0)) throw params.bad("scale is not above 0");
  const others = view.map((_, axis) => axis).filter((axis) => !axes.includes(axis));
  const rows = countOf(axes.map((axis) => view[axis]));
  const columns = countOf(others.map((axis) => view[axis]));
  const size = rows + columns + rows * columns * width;
  if (bytes.length !== size) throw params.bad(`${bytes.length} bytes are there where ${size} belong`);
  const strides = view.map((_, axis) => countOf(view.slice(axis + 1)));
  const instance = await instanceFor(codec);
  const values = instance.grid(bytes, {
    scale,
    width,
    rows,
    columns,
    rowAt: placesOf(view, strides, axes),
    // Nothing to look up where a row's values lie one after the other.
    columnAt: others.every((axis) => axis >= axes.length) ? null : placesOf(view, strides, others),
    straight: axes.every((axis, i) => axis === i),
  });
  if (!values) throw params.bad("the scale is too large for float32");
  return convert(values, "F32", dtype, params);
}

/** Other dimensions for as many values, those of the tensor where there are none. */
function dimensions(params, shape) {
  const view = params.take("view") ?? shape;
  const whole = Array.isArray(view) && view.every((n) => Number.isInteger(n) && n >= 0 && n <= LARGEST_DIMENSION);
  if (!whole || view.length > AXES_AT_MOST || countOf(view) !== countOf(shape)) {
    throw params.bad(`view is not at most ${AXES_AT_MOST} dimensions of as many values`);
  }
  return view;
}

function axesOf(params, count) {
  const axes = params.take("rows");
  if (!Array.isArray(axes) || !axes.every((axis) => Number.isInteger(axis) && axis >= 0 && axis < count)) {
    throw params.bad(`rows are not axes of the ${count}`);
  }
  if (new Set(axes).size !== axes.length) throw params.bad("rows has an axis twice");
  return axes;
}

/** Where the indices along some axes lie in the tensor, the last axis fastest. */
function placesOf(view, strides, axes) {
  let places = Uint32Array.of(0);
  for (const axis of axes) {
    const next = new Uint32Array(places.length * view[axis]);
    for (let i = 0; i < next.length; i++) {
      next[i] = places[Math.floor(i / view[axis])] + (i % view[axis]) * strides[axis];
    }
    places = next;
  }
  return places;
}

/** One instance of rans.wasm. What it gives is a view of its memory, valid until the next call. */
class Rans {
  constructor(exports) {
    this.exports = exports;
    // Escapes are read as whole words, of which some bytes may lie before the source.
    this.free = align(exports.heap()) + VECTOR;
  }

  decode(bytes, size, layout, params) {
    const [source, target, space] = this.#place(bytes, [size, 0]);
    const chunks = this.exports.begin(target, source, bytes.length, ...layout);
    if (chunks < 0) throw params.bad("the header is damaged");
    this.#room(space + this.exports.workspace());
    for (let chunk = 0; chunk < chunks; ) {
      if (this.exports.pair(chunk, space)) chunk += 2;
      else if (this.exports.chunk(chunk, space)) chunk++;
      else throw params.bad(`chunk ${chunk} is damaged`);
    }
    return new Uint8Array(this.exports.memory.buffer, target, size);
  }

  /** The head's bytes and two for each code, null when a code is too large. */
  trellis(bytes, size, head, layout) {
    const [source, target] = this.#place(bytes, [size]);
    const { buffer } = this.exports.memory;
    new Uint8Array(buffer).copyWithin(target, source, source + head);
    const fit = this.exports.trellis(target + head, source + head, ...layout);
    return fit ? new Uint8Array(buffer, target, size) : null;
  }

  /**
   * The values where the places say, null when some are not finite. Those of a matrix in order are made in bands that
   * stay in the processor's cache on their way out.
   */
  grid(bytes, { scale, width, rows, columns, rowAt, columnAt, straight }) {
    const band = straight ? Math.min(rows, Math.ceil(BAND / (columns + 1))) : rows;
    const sizes = [4 * rows, 4 * columns, 4 * band, columnAt ? 4 * columns : 0, 4 * band * columns];
    const [source, row, column, rowPlaces, columnPlaces, target] = this.#place(bytes, sizes);
    const { buffer } = this.exports.memory;
    this.exports.factors(row, source, rows, scale);
    this.exports.factors(column, source + rows, columns, 1);
    new Uint32Array(buffer, rowPlaces, band).set(rowAt.subarray(0, band));
    if (columnAt) new Uint32Array(buffer, columnPlaces, columns).set(columnAt);
    const codes = source + rows + columns;
    const order = [rowPlaces, columnAt ? columnPlaces : 0];
    const out = straight ? new Float32Array(rows * columns) : new Float32Array(buffer, target, rows * columns);
    for (let top = 0; top < rows; top += band) {
      const size = [Math.min(band, rows - top), columns];
      const from = codes + top * columns * width;
      if (!this.exports.grid(target, from, width, ...size, row + 4 * top, column, ...order)) return null;
      if (straight) out.set(new Float32Array(buffer, target, size[0] * columns), top * columns);
    }
    return out;
  }

  /** Where the bytes lie, copied in unless they are there, and aligned places for so many bytes behind them. */
  #place(bytes, sizes) {
    const owned = bytes.buffer === this.exports.memory.buffer;
    const source = owned ? bytes.byteOffset : this.free;
    const places = [source];
    let end = source + bytes.length + VECTOR;
    for (const size of sizes) {
      places.push((end = align(end)));
      end += size;
    }
    const memory = this.#room(end);
    if (!owned) memory.set(bytes, source);
    return places;
  }

  /** The memory, grown until it reaches to `end` and a vector further. */
  #room(end) {
    const { memory } = this.exports;
    const missing = end + VECTOR - memory.buffer.byteLength;
    if (missing > 0) {
      try {
        memory.grow(Math.ceil(missing / PAGE));
      } catch (cause) {
        throw new LoadError("unsupported", `no memory for ${end} bytes`, { cause });
      }
    }
    return new Uint8Array(memory.buffer);
  }
}

function align(address) {
  return Math.ceil(address / VECTOR) * VECTOR;
}
