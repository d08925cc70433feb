import { LoadError } from "./errors.js";
import { readHeader } from "./header.js";

// A section of unproven size gets memory as its bytes come.
const FIRST_BYTES = 1 << 20;

/** Cuts the bytes of one file, as they come, into its header and sections. */
export class Assembler {
  /** `whole`: keep all bytes for a hash; then `file` has them. */
  constructor({ crc32, whole }) {
    this.file = whole ? new Growing(Infinity) : null;
    this.reading = readHeader(crc32);
    this.current = new Growing(0);
    /** The parsed header, once it is here, and where its bytes end. */
    this.header = null;
    this.start = 0;
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

  /** Take bytes of the file; gives { header, text } once and then { section, bytes } for each that is complete. */
  async *push(rest) {
    this.file?.take(rest);
    while (this.current) {
      rest = this.current.take(rest);
      if (!this.current.full) return;
      const { bytes } = this.current;
      if (!this.header) {
        this.start += bytes.length;
        const { done, value } = await this.reading.next(bytes);
        if (!done) {
          this.current = new Growing(value);
          continue;
        }
        this.header = value.header;
        this.file?.grow(this.size);
        this.#advance();
        yield value;
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
    if (needed > this.bytes.length) this.grow(Math.min(this.size, Math.max(needed, 2 * this.bytes.length)));
    this.bytes.set(part, this.filled);
    this.filled = needed;
    return bytes.subarray(part.length);
  }

  grow(size) {
    if (size <= this.bytes.length) return;
    const larger = allocate(size);
    larger.set(this.bytes);
    release(this.bytes);
    this.bytes = larger;
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
