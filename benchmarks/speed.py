"""Speed and memory of `shrink quantize` on a 54-million-weight snapshot, beside WebDNN and TensorFlow.js.

    python -m benchmarks speed [--rounds 5] [-o reports/speed.json]

The snapshot has the shapes of the pix2pix U-Net (eight levels, 54.4 M weights, the largest tensor 8.4 M) and
normally distributed weights. Coding is timed on one core, all peers in every round; the commands as whole
processes, reading the same uncompressed npz. The physical limit of coding is a memory copy of the weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers, unet
from benchmarks.measure import Timing, interleaved, process
from benchmarks.tables import Table, published
from shrink.errors import MissingDependency
from shrink.quantizers import modes

F32 = NDArray[np.float32]

_SNAPSHOT_COMMAND = """
import sys
import numpy as np
from benchmarks import unet
np.savez(sys.argv[1], **unet.weights())
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/speed.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "unet.npz"
        # Made by a process of its own: the system counts the memory of whoever starts a process as the process's.
        process([sys.executable, "-c", _SNAPSHOT_COMMAND, str(snapshot)])
        snapshot_bytes = snapshot.stat().st_size
        commands = _commands(snapshot, options.rounds)
    weights = unet.weights()
    coding = _coding([x for x in weights.values() if x.ndim > 1], options.rounds)
    count = sum(x.size for x in weights.values())
    result = {
        "weights": count,
        "snapshot_bytes": snapshot_bytes,
        "rounds": options.rounds,
        "coding": coding,
        "commands": commands,
    }
    published(result, __doc__ or "", _tables(result), options.output)
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


def _tables(result: dict[str, Any]) -> list[Table]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    tables = []
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
        rows += [[name, why] for name, why in result["coding"]["not measured"].items() if cores == "one core"]
        headers = ["", "M weights/s", "× a memory copy's time", "× WebDNN's speed"]
        tables.append(Table(f"Coding on {cores}", headers, rows))
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
    rows += [[name, why] for name, why in result["commands"]["not measured"].items()]
    headers = ["", "seconds", "× WebDNN's speed", "peak MB", "output bytes", "of float32"]
    note = f"{result['weights']:,} weights, {result['snapshot_bytes']:,} bytes, median of {result['rounds']} rounds."
    return [*tables, Table("Whole commands", headers, rows, [note])]
