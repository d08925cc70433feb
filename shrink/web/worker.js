/** Decodes tensors off the page's own thread: first comes the compiled codec, then one section per message. */
import { release } from "./assembler.js";
import { openInline } from "./sections.js";

let decoder;

addEventListener("message", async ({ data: { module, id, section, bytes } }) => {
  if (module) {
    decoder = openInline(module);
    decoder.then(() => postMessage({ ready: true }), () => postMessage({ ready: false }));
    return;
  }
  try {
    const values = await (await decoder).decode(section, bytes);
    postMessage({ id, values }, [values.buffer]);
    release(bytes);
  } catch ({ code, message }) {
    postMessage({ id, error: { code, message } });
  }
});
