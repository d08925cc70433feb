import { LoadError } from "./errors.js";
import { openInline } from "./sections.js";

/** Something with decode(section, bytes) and close(): in a worker, or on this thread where there can be none. */
export async function openDecoder(module) {
  return (await openWorker(module)) ?? openInline(module);
}

async function openWorker(module) {
  let worker;
  try {
    worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  } catch {
    return null;
  }
  const ready = new Promise((resolve) => {
    worker.onmessage = ({ data }) => resolve(data.ready === true);
    // A content security policy, or a browser without module workers.
    worker.onerror = (event) => {
      event.preventDefault();
      resolve(false);
    };
  });
  worker.postMessage({ module });
  if (!(await ready)) {
    worker.terminate();
    return null;
  }
  return talkTo(worker);
}

function talkTo(worker) {
  const waiting = new Map();
  let next = 0;
  worker.onmessage = ({ data: { id, values, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (values) resolve(values);
    else reject(new LoadError(error.code ?? "unsupported", error.message));
  };
  worker.onerror = (event) => {
    event.preventDefault();
    for (const { reject } of waiting.values()) reject(new LoadError("unsupported", `the worker broke: ${event.message}`));
    waiting.clear();
  };
  return {
    decode: (section, bytes) =>
      new Promise((resolve, reject) => {
        const id = next++;
        waiting.set(id, { resolve, reject });
        worker.postMessage({ id, section, bytes }, [bytes.buffer]);
      }),
    close: () => worker.terminate(),
  };
}
