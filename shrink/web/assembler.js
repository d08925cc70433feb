import { LoadError } from "./errors.js";
import { headerLength, parseHeader } from "./header.js";

// A section of unproven size gets memory as its bytes come.
const FIRST_BYTES = 1 << 20;

/** Cuts the bytes of one file, as they come, into its header and sections. */
export class Assembler {
  /** `whole`: keep all bytes for a hash; then `file` has them. */
  constructor({ crc32, whole }) {
    this.crc32 = crc32;
    this.whole = whole;
    this.current = new Growing(8);
    /** The parsed header, and where its bytes end, once they are here. */
    this.header = null;
    this.next = 0;
    /** Decoded bytes that the stored bytes so far stand for. */
    this.loaded = 0;
  }

  /** The length of the file, once it is known. */
  get size() {
    return this.header ? this.start + this.header.size : Infinity;
  }

  get complete() {
    return this.current === null;
  }

  /** Take bytes of the file; gives { header } once and then { section, bytes } for each that is complete. */
  *push(piece) {
    if (this.file) this.#copy(piece);
    let rest = piece.bytes;
    for (;;) {
      rest = this.current ? this.current.take(rest) : rest;
      if (!this.current) break;
      if (!this.current.full) return;
      const { bytes } = this.current;
      if (this.start === undefined) {
        this.start = 8 + headerLength(bytes);
        this.prefix = bytes;
        this.current = new Growing(this.start - 8);
      } else if (!this.header) {
        this.header = parseHeader(bytes, this.crc32);
        if (this.whole) this.#beginCopy(bytes, piece, rest);
        this.#advance();
        yield { header: this.header, bytes };
      } else {
        const section = this.header.sections[this.next++];
        this.loaded += section.decodedBytes ?? 0;
        this.#advance();
        yield { section, bytes };
      }
    }
    if (rest.length) throw new LoadError("corrupt", "there are bytes after the end");
  }

  /** Decoded bytes of what has come, in the section under way by its share. */
  get progress() {
    const section = this.header?.sections[this.next];
    if (!section) return { loaded: this.loaded, name: "" };
    const share = section.size ? this.current.filled / section.size : 0;
    return { loaded: this.loaded + Math.floor((section.decodedBytes ?? 0) * share), name: section.name };
  }

  #advance() {
    const section = this.header.sections[this.next];
    this.current = section ? new Growing(section.size) : null;
  }

  #beginCopy(header, { position, bytes }, rest) {
    this.file = allocate(this.size);
    this.file.set(this.prefix);
    this.file.set(header, 8);
    const used = bytes.length - rest.length;
    this.#copy({ position: position + used, bytes: rest });
  }

  #copy({ position, bytes }) {
    const room = this.file.length - position;
    if (room > 0) this.file.set(bytes.subarray(0, room), position);
  }
}

/** Bytes of a promised size, in memory that grows with what has really come. */
class Growing {
  constructor(size) {
    this.size = size;
    this.filled = 0;
    this.bytes = new Uint8Array(Math.min(size, FIRST_BYTES));
  }

  get full() {
    return this.filled === this.size;
  }

  /** Take what belongs here, give back the rest. */
  take(bytes) {
    const part = bytes.subarray(0, this.size - this.filled);
    const needed = this.filled + part.length;
    if (needed > this.bytes.length) {
      const larger = allocate(Math.min(this.size, Math.max(needed, 2 * this.bytes.length)));
      larger.set(this.bytes);
      release(this.bytes);
      this.bytes = larger;
    }
    this.bytes.set(part, this.filled);
    this.filled = needed;
    return bytes.subarray(part.length);
  }
}

/** Zeroed bytes, or a LoadError where there is no room. */
export function allocate(size) {
  try {
    return new Uint8Array(size);
  } catch (cause) {
    throw new LoadError("unsupported", `no memory for ${size} bytes`, { cause });
  }
}

/** Give back memory that nobody looks at any more. Left to itself, the browser would tidy up when it pleases. */
export function release({ buffer }) {
  if (buffer.byteLength) buffer.transfer?.(0);
}
