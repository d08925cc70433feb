// Runs a network in stages, one ONNX Runtime session each.

// One at a time leaves the connection idle; many at once delay the first.
const LOADED_AT_ONCE = 3;

/**
 * Opens `stages`, in running order. Each has the names of its `inputs` and `outputs`, and in `drop` those that no later
 * stage needs. `results` are the names of the network's own outputs. `load(stage, context)` gives what `create` makes a
 * session of; `begin()` gives the context of one round of loading.
 *
 * With `sequential`, each run loads a stage, runs it and drops it before the next is loaded: memory for one at a time.
 *
 * `run(tensors)` takes a tensor per input by name and gives the results, a Map. What stages hand to each other is
 * disposed of after its last use.
 */
export async function openChain(stages, { results, load, create, begin = () => {}, sequential = false }) {
  const own = new Set(results);
  let closed = false;
  const sessions = sequential ? [] : await openAll(stages, load, create, begin());

  async function run(tensors) {
    if (closed) throw new Error("the network is closed");
    const held = new Map(Object.entries(tensors));
    const given = new Map();
    const ours = new Set();
    const drop = (name) => {
      if (ours.delete(name)) held.get(name).dispose();
      held.delete(name);
    };
    const context = sequential ? begin() : undefined;
    try {
      for (const [number, stage] of stages.entries()) {
        const session = sequential ? await create(await load(stage, context)) : sessions[number];
        try {
          // Names come out of the model, and an ordinary object has names of its own.
          const feeds = Object.create(null);
          for (const name of stage.inputs) feeds[name] = held.get(name);
          const made = await session.run(feeds);
          for (const name of stage.outputs) {
            held.set(name, made[name]);
            if (own.has(name)) given.set(name, made[name]);
            else ours.add(name);
          }
        } finally {
          if (sequential) await session.release();
        }
        stage.drop.forEach(drop);
      }
    } finally {
      // After a failure there is more left than what the stages drop.
      [...ours].forEach(drop);
    }
    return new Map(results.map((name) => [name, given.get(name)]));
  }

  async function close() {
    closed = true;
    await Promise.all(sessions.splice(0).map((session) => session.release()));
  }

  return { run, close };
}

/** All sessions. Files are loaded side by side; sessions are built one by one, as not every backend can do otherwise. */
async function openAll(stages, load, create, context) {
  const sessions = new Array(stages.length);
  const left = stages.entries();
  let last = Promise.resolve();
  const work = async () => {
    for (const [number, stage] of left) {
      const files = await load(stage, context);
      last = last.then(async () => (sessions[number] = await create(files)));
      await last;
    }
  };
  const workers = await Promise.allSettled(Array.from({ length: LOADED_AT_ONCE }, work));
  const failed = workers.find(({ status }) => status === "rejected");
  if (failed) {
    await Promise.all(sessions.map((session) => session?.release()));
    throw failed.reason;
  }
  return sessions;
}
