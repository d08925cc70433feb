"""Decode speed in Chromium: float32 bytes produced per second in each mode, beside gzip of the raw values.

    python -m benchmarks decode [MODEL ...] [--rounds 7] [-o reports/decode.json]

Everything is in memory before the clock starts, and one thread decodes, checksums included; gzip goes through the
browser's own DecompressionStream into one array. All files are timed in every round. Of the U-Net, whose weights are
normally distributed, the first 45 MB are taken: its encoder up to the sixth level.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import shrink
from benchmarks import subjects
from benchmarks.tables import Table, published
from shrink import container
from shrink.coders import rans
from shrink.model import Model, Quantized, Source, Tensor
from shrink.pipeline import drop_state
from shrink.steps import TRELLIS, Step
from tests.browser import chromium, serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
WEB = HERE.parent / "shrink" / "web"
MODES = ("float16", "eightbit", "int8", "int4", "prune", "prune,eightbit", "prune,int8")
GZIP = "raw float32 as gzip"
_PACKING: dict[str, int | None] = {"packed": 3, "not packed": None}
# Codes of about two bits, rounded here; how they come from a bound has no say in how fast they decode. Contexts are
# taken where they make a tensor smaller, which those of normally distributed weights do not.
GRIDS = {"grid, not packed": None, "grid, static tables": 0, "grid, contexts": 1}
TRELLISES = {"trellis, static tables": 0, "trellis, contexts": 1}
_GRID_STEP = 0.7
_LABELS = (*(f"{mode}, {how}" for mode in MODES for how in _PACKING), *GRIDS, *TRELLISES)
_BYTES_AT_MOST = 45_000_000
PAGE = '<!DOCTYPE html><title>decode</title><script type="module" src="decode.js"></script>'


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/decode.json"))
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    version = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "index.html").write_text(PAGE)
        shutil.copy(HERE / "decode.js", folder)
        shutil.copytree(WEB, folder / "web")
        for subject in subjects.chosen(options.models):
            weights = subject.weights(folder)
            if not weights.exists():
                found[subject.name] = {"not_measured": f"not measured: {weights.name} is not here"}
                continue
            model = _model(weights)
            files = _files(model, folder)
            try:
                with chromium() as browser, serve(folder) as url:
                    page = browser.new_page()
                    page.goto(url)
                    page.wait_for_function("typeof time === 'function'")
                    seconds = _rounds(page, files, options.rounds)
                    version = browser.version
                found[subject.name] = _result(model, files, seconds)
            except pytest.skip.Exception as missing:
                found[subject.name] = {"not_measured": f"not measured: {missing}"}
    result = {"chromium": version, "rounds": options.rounds, "models": found}
    published(result, __doc__ or "", _tables(result), options.output)
    return 0


def _model(path: Path) -> Model:
    """Its float tensors, at most as many of them as come to `_BYTES_AT_MOST`, in order."""
    taken, size = [], 0
    for tensor in drop_state(shrink.load(path)).tensors:
        size += tensor.size_bytes
        if tensor.dtype.kind == "f" and size <= _BYTES_AT_MOST:
            taken.append(Tensor.of(tensor.name, np.ascontiguousarray(tensor.array, np.float32)))
    return Model(tuple(taken), Source("benchmark", path, 0))


def _files(model: Model, folder: Path) -> dict[str, Path]:
    files = {GZIP: folder / "raw.gz"}
    with gzip.open(files[GZIP], "wb", compresslevel=6) as raw:
        for tensor in model.tensors:
            raw.write(tensor.array.tobytes())
    for mode in MODES:
        small = shrink.quantize(model, mode)
        for how, level in _PACKING.items():
            label = f"{mode}, {how}"
            files[label] = folder / f"{len(files)}.safetensors"
            shrink.save(small, files[label], level=level)
    for label, effort in {**GRIDS, **TRELLISES}.items():
        files[label] = folder / f"{len(files)}.safetensors"
        entries = [
            _gridded(tensor, effort, trellis=label in TRELLISES)
            for tensor in model.tensors
            if isinstance(tensor, Tensor)
        ]
        container.write(entries, files[label], source="benchmark", attributes={}, graph=None, level=None)
    return files


def _gridded(tensor: Tensor, effort: int | None, *, trellis: bool) -> Quantized:
    """The first axis as rows, each with a step in proportion to what its values spread."""
    array = tensor.array
    values = array.reshape(len(array) if array.shape else 1, -1).astype(np.float64)
    steps = _GRID_STEP * values.std(axis=1) + 1e-9
    scale = float(steps.mean())
    exponents = np.clip(np.round(2 * np.log2(steps / scale)), -127, 127)
    in_steps = values / (scale * 2 ** (exponents / 2))[:, None]
    codes = np.clip(_walked(in_steps) if trellis else np.round(in_steps), -127, 127).astype(np.int16)
    head = exponents.astype(np.int8).tobytes() + bytes(values.shape[1])
    rows = [0] if array.shape else []
    grid = {"scale": scale / 2 if trellis else scale, "view": None, "rows": rows, "width": 2 if trellis else 1}
    payload = head + codes.astype(np.int8).tobytes()
    chain: tuple[Step, ...] = (Step("grid.1", grid),)
    if effort is not None:
        payload, params = rans.encode(head, codes, effort=effort)
        params["width"] = 1
        chain = (*(Step(name, params) for name in ("rans.1", "trellis.1")[: 1 + trellis]), *chain)
    return Quantized.of(tensor.name, array.dtype, array.shape, chain, payload)


def _walked(in_steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Codes of a trellis of half a step: each the nearest that its state has, without regard to what comes after."""
    codes = np.zeros(in_steps.shape)
    state = np.zeros(len(codes), np.uint8)
    for column, value in enumerate(2 * in_steps.T):
        odd = np.where(abs(value) < 0.5, 0, np.copysign(np.round((abs(value) + 1) / 2), value))
        codes[:, column] = np.clip(np.where(state & 1, odd, np.round(value / 2)), -127, 127)
        state = TRELLIS[state, codes[:, column].astype(np.int8) & 1]
    return codes


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


def _tables(result: dict[str, Any]) -> list[Table]:
    headers = ["", "file bytes", "of float32", "float32 MB/s", "× gzip's speed"]
    tables = []
    for name, found in result["models"].items():
        if "not_measured" in found:
            tables.append(Table(name, headers, [[label, found["not_measured"]] for label in (GZIP, *_LABELS)]))
            continue
        rows = [
            [
                label,
                f"{row['file_bytes']:,}",
                f"{row['file_bytes'] / found['float32_bytes']:.1%}",
                f"{row['float32_bytes_per_second'] / 1e6:,.0f}",
                f"{row['times_gzip_speed']:.2f}",
            ]
            for label, row in found["decode"].items()
        ]
        note = (
            f"{found['float32_bytes']:,} bytes of float32, median of {result['rounds']} rounds, one thread, "
            f"Chromium {result['chromium']}."
        )
        tables.append(Table(name, headers, rows, [note]))
    return tables
