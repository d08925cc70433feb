/** What `load` throws. GUIDE.md says what each `code` means: http, network, truncated, corrupt, unsupported, aborted. */
export class LoadError extends Error {
  constructor(code, message, { tensor, status, cause } = {}) {
    super(tensor === undefined ? message : `tensor ${JSON.stringify(tensor.slice(0, 120))}: ${message}`, { cause });
    this.name = "LoadError";
    this.code = code;
    this.status = status;
  }
}

export function tooMuch(bytes, most) {
  return new LoadError("unsupported", `the weights take ${bytes} bytes, more than ${most}`);
}

/** A promise that ends as `promise` does, or as soon as `signal` fires. */
export async function unlessAborted(promise, signal) {
  if (!signal) return promise;
  throwIfAborted(signal);
  let stop;
  const aborted = new Promise((_, reject) => {
    stop = () => reject(abortion(signal));
    signal.addEventListener("abort", stop);
  });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener("abort", stop);
  }
}

export function throwIfAborted(signal) {
  if (signal?.aborted) throw abortion(signal);
}

function abortion(signal) {
  return new LoadError("aborted", "loading was aborted", { cause: signal.reason });
}
