"""Size, accuracy and latency in a real browser, model by model: what `shrink bench` measures, with its reports.

    python -m benchmarks latency [MODEL ...] [--modes LIST] [--backends wasm,webgpu] [--runs 30] [-o reports]

Models: cdcgan, vgg7, upconv7, unet; without one, all of them that are here. Writes MODEL.json and MODEL.html for each,
and index.html. Without a browser, the report says so and holds the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import subjects
from benchmarks.subjects import Subject
from shrink import given
from shrink.bench import BACKENDS, MODES, BrowserOptions, Inputs, Plan, document, measure, report, summary
from shrink.bench.index import index
from shrink.errors import ShrinkError
from shrink.files import atomic_file

ROOT = Path(__file__).parents[1]
# Installed by `python3 -m tests`; elsewhere the package is looked for as for every export.
_RUNTIME = ROOT / "tests" / "node_modules" / "onnxruntime-web"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--modes", default=",".join([*MODES, "prune+eightbit"]))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--network", help="10mbit, 4g or offline-cache  [default: not throttled]")
    parser.add_argument("--server", action="store_true", help="also the same network behind a server on this machine")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for subject in subjects.chosen(options.models):
        if subject.network is None:
            print(f"{subject.name}: not measured, its file holds weights and no network\n")
            continue
        with tempfile.TemporaryDirectory() as name:
            weights = subject.weights(Path(name))
            if not weights.exists():
                print(f"{subject.name}: not measured, {weights} is not here\n")
                continue
            try:
                found = _measured(subject, weights, Path(name), options)
            except ShrinkError as error:
                print(f"{subject.name}: not measured: {error}\n")
                continue
        _write(found, options.output / f"{subject.name}.json")
        _print(subject, found)
    index(options.output)
    return 0


def _measured(subject: Subject, weights: Path, folder: Path, options: Any) -> dict[str, Any]:
    data, inputs = folder / "inputs.npz", subject.inputs
    if inputs is None or subject.network is None:
        raise ValueError(f"{subject.name} has nothing to run")
    samples = inputs()
    np.savez(data, samples)
    shape = (1, *samples.shape[1:])
    network, _ = given.network(subject.network, weights, (",".join(map(str, shape)),))
    plan = Plan(
        dataclasses.replace(network, title=subject.name),
        subject.about,
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=_command(subject, options),
        modes=tuple(options.modes.split(",")),
        inputs=Inputs(data),
        browser=BrowserOptions(
            tuple(filter(None, options.backends.split(","))),
            options.network,
            options.runs,
            options.seconds,
            server=options.server,
        ),
        runtime=_RUNTIME if _RUNTIME.is_dir() else None,
    )
    found = measure(plan)
    for variant in found["variants"]:
        # Where it lies is nobody's business but this machine's.
        variant["file"] = variant["file"] and Path(variant["file"]).name
    return document.checked(found)


def _command(subject: Subject, options: Any) -> str:
    words = [f"python -m benchmarks latency {subject.name} --modes {options.modes} --backends {options.backends}"]
    words += [f"--runs {options.runs} --seconds {options.seconds:g}"]
    words += [f"--network {options.network}"] if options.network else []
    words += ["--server"] if options.server else []
    return " ".join(words)


def _write(found: dict[str, Any], path: Path) -> None:
    document.write(found, path)
    with atomic_file(path.with_suffix(".html")) as out:
        out.write(report.render(found).encode())


def _print(subject: Subject, found: dict[str, Any]) -> None:
    headers, rows = summary.table(found)
    align = ["left", *("right" for _ in headers[1:])]
    print(f"{subject.name}: {subject.about}; {os.cpu_count()} cores\n")
    print(tabulate(rows, headers, disable_numparse=True, colalign=align), end="\n\n")
    for entry in found["not_measured"]:
        print(f"not measured: {entry['what']}: {entry['why']}")
    print()
