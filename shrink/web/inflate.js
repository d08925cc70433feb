/**
 * The bytes in a zlib stream, null where it is damaged or holds more than `most`. The browser's own decoder checks
 * the stream's end and checksum, and refuses bytes after it.
 */
export async function inflate(bytes, most) {
  const { readable, writable } = new DecompressionStream("deflate");
  const writer = writable.getWriter();
  // Errors of the stream show at its readable side.
  writer.write(bytes).catch(() => {});
  writer.close().catch(() => {});
  const reader = readable.getReader();
  const parts = [];
  let size = 0;
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
  if (parts.length === 1) return parts[0];
  const out = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
