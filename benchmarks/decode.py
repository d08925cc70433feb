"""Decode speed in Chromium: float32 bytes produced per second in each mode, beside gzip of the raw values.

    python -m benchmarks decode [--rounds 7] [-o reports/decode.json]

Everything is in memory before the clock starts, and one thread decodes, checksums included; gzip goes through the
browser's own DecompressionStream into one array. The weights, normally distributed, have the shapes of the encoder
of the pix2pix U-Net up to its sixth level (11 M). All files are timed in every round.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tabulate import tabulate

import shrink
from benchmarks.measure import machine
from benchmarks.quantize import unet_shapes
from shrink.model import Model, Source, Tensor
from tests.browser import chromium, serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
WEB = HERE.parent / "shrink" / "web"
MODES = ("float16", "eightbit", "int8", "int4", "prune", "prune,eightbit", "prune,int8")
GZIP = "raw float32 as gzip"
PAGE = '<!DOCTYPE html><title>decode</title><script type="module" src="decode.js"></script>'


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/decode.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model()
        files = _files(model, folder)
        (folder / "index.html").write_text(PAGE)
        shutil.copy(HERE / "decode.js", folder)
        shutil.copytree(WEB, folder / "web")
        try:
            with chromium() as browser, serve(folder) as url:
                page = browser.new_page()
                page.goto(url)
                page.wait_for_function("typeof time === 'function'")
                seconds = _rounds(page, files, options.rounds)
                version = browser.version
        except pytest.skip.Exception as missing:
            print(f"not measured: {missing}")
            return 0
        result = _result(model, files, seconds)
    result = {"machine": machine(), "chromium": version, "rounds": options.rounds, **result}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    return 0


def _model() -> Model:
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in unet_shapes().items() if name[:4] in {f"enc{i}" for i in range(6)}}
    tensors = (
        Tensor.of(name, rng.standard_normal(shape, np.float32) * np.float32(0.02)) for name, shape in shapes.items()
    )
    return Model(tuple(tensors), Source("benchmark", Path("unet"), 0))


def _files(model: Model, folder: Path) -> dict[str, Path]:
    files = {GZIP: folder / "raw.gz"}
    with gzip.open(files[GZIP], "wb", compresslevel=6) as raw:
        for tensor in model.tensors:
            raw.write(tensor.array.tobytes())
    for mode in MODES:
        small = shrink.quantize(model, mode)
        for level, how in ((3, "packed"), (None, "not packed")):
            label = f"{mode}, {how}"
            files[label] = folder / f"{len(files)}.safetensors"
            shrink.save(small, files[label], level=level)
    return files


def _rounds(page: Page, files: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """A B C A B C; a first round, in which the browser compiles what it runs, is not counted."""
    expected = None
    seconds: dict[str, list[float]] = {label: [] for label in files}
    for number in range(rounds + 1):
        for label, path in files.items():
            milliseconds, size = page.evaluate("url => time(url)", path.name)
            expected = expected or size
            if size != expected:
                raise RuntimeError(f"{label}: {size} bytes where {expected} belong")
            if number:
                seconds[label].append(milliseconds / 1000)
    return seconds


def _result(model: Model, files: dict[str, Path], seconds: dict[str, list[float]]) -> dict[str, Any]:
    size = sum(t.size_bytes for t in model.tensors)
    rows = {}
    for label, path in files.items():
        rows[label] = {
            "file_bytes": path.stat().st_size,
            "seconds": seconds[label],
            "float32_bytes_per_second": size / statistics.median(seconds[label]),
            "times_gzip_speed": statistics.median(a / b for a, b in zip(seconds[GZIP], seconds[label], strict=True)),
        }
    return {"float32_bytes": size, "decode": rows}


def _print(result: dict[str, Any]) -> None:
    print(f"{result['float32_bytes']:,} bytes of float32, median of {result['rounds']} rounds, one thread, ", end="")
    print(f"Chromium {result['chromium']}\n")
    rows = [
        [
            label,
            f"{row['file_bytes']:,}",
            f"{row['file_bytes'] / result['float32_bytes']:.1%}",
            f"{row['float32_bytes_per_second'] / 1e6:,.0f}",
            f"{row['times_gzip_speed']:.2f}",
        ]
        for label, row in result["decode"].items()
    ]
    headers = ["", "file bytes", "of float32", "float32 MB/s", "× gzip's speed"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right", "right")))
