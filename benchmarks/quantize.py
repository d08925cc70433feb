"""Speed and memory of `shrink quantize` on a 54-million-weight snapshot, beside WebDNN and TensorFlow.js.

    python -m benchmarks quantize [--rounds 5] [-o reports/quantize.json]

The snapshot has the shapes of the pix2pix U-Net (eight levels, 54.4 M weights, the largest tensor 8.4 M) and
normally distributed weights. Coding is timed on one core, all peers in every round; the commands as whole
processes, reading the same uncompressed npz. The physical limit of coding is a memory copy of the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks import peers
from benchmarks.measure import Timing, interleaved, machine, process
from shrink.errors import MissingDependency
from shrink.quantizers import modes

F32 = NDArray[np.float32]

_SNAPSHOT_COMMAND = """
import sys
import numpy as np
from benchmarks.quantize import unet_weights
np.savez(sys.argv[1], **unet_weights())
"""

_WEBDNN_COMMAND = """
import sys
import numpy as np
from benchmarks.peers import webdnn_encoder
encode, _ = webdnn_encoder()
with np.load(sys.argv[1]) as snapshot, open(sys.argv[2], "wb") as out:
    for name in snapshot.files:
        out.write(encode(snapshot[name]))
"""


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """pix2pix's generator for 256×256 pictures, as a Chainer snapshot names it."""
    down = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    up = [(512, 512), (1024, 512), (1024, 512), (1024, 512), (1024, 256), (512, 128), (256, 64), (128, 3)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(down)):
        shapes |= {f"enc{i}/c/W": (outputs, inputs, 4, 4), f"enc{i}/c/b": (outputs,)}
        if 0 < i < 7:
            shapes |= {f"enc{i}/bn/{n}": (outputs,) for n in ("gamma", "beta", "avg_mean", "avg_var")}
    for i, (inputs, outputs) in enumerate(up):
        shapes |= {f"dec{i}/c/W": (inputs, outputs, 4, 4), f"dec{i}/c/b": (outputs,)}
        if i < 7:
            shapes |= {f"dec{i}/bn/{n}": (outputs,) for n in ("gamma", "beta", "avg_mean", "avg_var")}
    return shapes


def unet_weights(seed: int = 0) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in unet_shapes().items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quantize", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/quantize.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "unet.npz"
        # Made by a process of its own: the system counts the memory of whoever starts a process as the process's.
        process([sys.executable, "-c", _SNAPSHOT_COMMAND, str(snapshot)])
        snapshot_bytes = snapshot.stat().st_size
        commands = _commands(snapshot, options.rounds)
    weights = unet_weights()
    coding = _coding([x for x in weights.values() if x.ndim > 1], options.rounds)
    count = sum(x.size for x in weights.values())
    result = {
        "machine": machine(),
        "weights": count,
        "snapshot_bytes": snapshot_bytes,
        "rounds": options.rounds,
        "coding": coding,
        "commands": commands,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    return 0


def _coding(weights: list[F32], rounds: int) -> dict[str, Any]:
    """Weights to codes, in memory, every tensor of two dimensions or more."""
    cores = os.sched_getaffinity(0)
    quantizers = modes()

    def each(function: Any) -> Any:
        def work() -> None:
            for x in weights:
                function(x)

        return work

    work = {
        "memory copy": each(np.copy),
        "shrink eightbit": each(lambda x: quantizers["eightbit"].quantize("w", x)),
        "shrink int8": each(lambda x: quantizers["int8"].quantize("w", x)),
        "shrink float16": each(lambda x: quantizers["float16"].quantize("w", x)),
        "TensorFlow.js uint8": each(peers.tensorflowjs_uint8),
        "TensorFlow.js float16": each(peers.tensorflowjs_float16),
    }
    missing = {}
    try:
        work["WebDNN eightbit"] = each(peers.webdnn_encoder()[1])
    except MissingDependency as error:
        missing["WebDNN eightbit"] = f"not measured: {error}"
    os.sched_setaffinity(0, {min(cores)})
    try:
        one_core = interleaved(work, rounds)
    finally:
        os.sched_setaffinity(0, cores)
    all_cores = interleaved({k: work[k] for k in ("memory copy", "shrink float16")}, rounds)
    count = sum(x.size for x in weights)
    return {
        "one core": _rows(one_core, count),
        f"{len(cores)} cores": _rows(all_cores, count),
        "not measured": missing,
    }


def _rows(timings: dict[str, Timing], count: int) -> dict[str, Any]:
    copy, webdnn = timings["memory copy"], timings.get("WebDNN eightbit")
    return {
        name: {
            "seconds": timing.seconds,
            "million_weights_per_second": count / timing.median / 1e6,
            "times_a_memory_copy": timing.ratio(copy),
            "times_webdnn_speed": webdnn.ratio(timing) if webdnn else None,
        }
        for name, timing in timings.items()
    }


def _commands(snapshot: Path, rounds: int) -> dict[str, Any]:
    """Whole processes in turn: reading the snapshot, coding, packing, writing."""
    outputs = {
        "shrink quantize --mode eightbit": "eightbit.safetensors",
        "shrink quantize --mode float16": "float16.safetensors",
        "shrink quantize --mode int8": "int8.safetensors",
        "WebDNN encoder": "webdnn.bin",
    }
    runs: dict[str, list[Any]] = {name: [] for name in outputs}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, file in outputs.items():
            out = snapshot.with_name(file)
            out.unlink(missing_ok=True)
            if name == "WebDNN encoder":
                command = [sys.executable, "-c", _WEBDNN_COMMAND, str(snapshot), str(out)]
            else:
                mode = name.rsplit(" ", 1)[1]
                command = [sys.executable, "-m", "shrink", "quantize", str(snapshot), "--mode", mode, "-o", str(out)]
            try:
                runs[name].append(process(command))
            except RuntimeError as error:
                failed[name] = f"not measured: {error}"
    result: dict[str, Any] = {"not measured": failed}
    webdnn = Timing(tuple(r.seconds for r in runs["WebDNN encoder"]))
    for name, done in runs.items():
        if name in failed:
            continue
        timing = Timing(tuple(r.seconds for r in done))
        result[name] = {
            "seconds": timing.seconds,
            "median_seconds": timing.median,
            "times_webdnn_speed": webdnn.ratio(timing) if webdnn.seconds else None,
            "peak_bytes": max(r.peak_bytes for r in done),
            "output_bytes": snapshot.with_name(outputs[name]).stat().st_size,
        }
    return result


def _print(result: dict[str, Any]) -> None:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    print(f"{result['weights']:,} weights, {result['snapshot_bytes']:,} bytes, median of {result['rounds']} rounds\n")
    for cores in (key for key in result["coding"] if key != "not measured"):
        rows = [
            [
                name,
                f"{r['million_weights_per_second']:.0f}",
                ratio(r["times_a_memory_copy"]),
                ratio(r["times_webdnn_speed"]),
            ]
            for name, r in result["coding"][cores].items()
        ]
        headers = [f"coding on {cores}", "M weights/s", "× a memory copy's time", "× WebDNN's speed"]
        print(tabulate(rows, headers, disable_numparse=True), end="\n\n")
    rows = [
        [
            name,
            f"{r['median_seconds']:.2f}",
            ratio(r["times_webdnn_speed"]),
            f"{r['peak_bytes'] / 1e6:.0f}",
            f"{r['output_bytes']:,}",
            f"{r['output_bytes'] / result['snapshot_bytes']:.1%}",
        ]
        for name, r in result["commands"].items()
        if name != "not measured"
    ]
    headers = ["whole command", "seconds", "× WebDNN's speed", "peak MB", "output bytes", "of float32"]
    print(tabulate(rows, headers, disable_numparse=True))
    for group in (result["coding"], result["commands"]):
        for name, why in group["not measured"].items():
            print(f"{name}: {why}")
