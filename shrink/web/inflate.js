// A browser inflates all that it is given at once, to up to a thousand times as much.
const AT_ONCE = 2 ** 14;

/**
 * The bytes in a zlib stream, null where it is damaged or holds more than `most`. The browser's own decoder checks
 * the stream's end and checksum, and refuses bytes after it.
 */
export async function inflate(bytes, most) {
  let [at, size] = [0, 0];
  const pull = (stream) => (at < bytes.length ? stream.enqueue(bytes.subarray(at, (at += AT_ONCE))) : stream.close());
  const reader = new ReadableStream({ pull }).pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      size += value.length;
      if (size > most) {
        reader.cancel().catch(() => {});
        return null;
      }
      parts.push(value);
    }
  } catch {
    return null;
  }
  const out = new Uint8Array(size);
  for (const part of parts.reverse()) out.set(part, (size -= part.length));
  return out;
}
