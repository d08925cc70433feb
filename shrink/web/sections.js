import { Codec } from "./codec.js";
import { LoadError } from "./errors.js";
import { inflate } from "./inflate.js";
import { decode } from "./steps.js";

// The largest graph or attributes that are believed.
const BLOB_AT_MOST = 2 ** 28;

/** The values of one section of a file, in an array of their own; of a blob, its bytes. */
async function decodeSection(section, bytes, codec) {
  const { name, crc32, blob } = section;
  if (crc32 !== undefined && codec.crc32(bytes) !== crc32) {
    throw new LoadError("corrupt", "its bytes are not the ones that were written (CRC)", { tensor: name });
  }
  try {
    if (!blob) return await decode(bytes, section, codec);
  } catch (cause) {
    if (cause instanceof RangeError) {
      throw new LoadError("unsupported", "no memory for it", { tensor: name, cause });
    }
    throw cause;
  }
  const content = await inflate(bytes, BLOB_AT_MOST);
  if (!content) throw new LoadError("corrupt", "damaged, or larger than is believable", { tensor: name });
  return content;
}

/** A decoder that works on this thread; one section after the other, as they share the codec's memory. */
export async function openInline(module) {
  const codec = await Codec.create(module);
  let last = Promise.resolve();
  return {
    decode: (section, bytes) => (last = last.catch(() => {}).then(() => decodeSection(section, bytes, codec))),
    close: () => {},
  };
}
