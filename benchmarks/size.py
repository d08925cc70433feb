"""File size and weight error of every mode, beside what other tools make of the same weights.

    python -m benchmarks size [MODEL ...] [-o reports/size.json]

Without a model: the sample generator, the U-Net and those of ../shared/models. Bytes are those of the whole file that
shrink writes, header and kept tensors included. WebDNN's are those of its weight file, TensorFlow.js's those of its
weight shards (codes only), ONNX Runtime's those of the whole .onnx file, NNCodec's those of its stream. SQNR is over
all weights of two dimensions or more, against the values of the original; it is no picture quality. NNCodec's qp sets
one step for all weights, so the same qp is another SQNR for other networks. Calibrated is run without data, for so many
dB at the outputs, and rounds by what these lose: its SQNR is low, and says little (python -m benchmarks calibrated).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shrink
from benchmarks import nncodec, subjects
from benchmarks.calibrated import calibrator_of, entries_of, file_bytes
from benchmarks.subjects import Subject
from benchmarks.tables import Table, published
from shrink import given
from shrink.bench.curve import MODES
from shrink.bench.peers import peers, weights_sqnr_db
from shrink.bench.plan import Variant
from shrink.calibrate import search
from shrink.calibrate.calibrated import Result
from shrink.errors import BoundNotMet, ShrinkError
from shrink.export import Network
from shrink.formats import safetensors
from shrink.model import Entry, Model
from shrink.pipeline import drop_state
from shrink.progress import silent

TARGETS = (50.0, 45.0, 40.0)
"""For calibrated: PSNR in dB, of the outputs on synthetic inputs that it holds out."""

# The network that has these weights; the LSTM's file has no graph of its own.
_CALIBRATED = {"cdcgan": "cdcgan", "vgg7": "vgg7", "upconv7": "upconv7", "lstm": "keras-lstm"}
_NOT_CALIBRATED = "not measured: it takes minutes (python -m benchmarks calibrated unet)"

Weights = Mapping[str, NDArray[np.float32]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks size", description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/size.json"))
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for subject in subjects.chosen(options.models):
        with tempfile.TemporaryDirectory() as name:
            path = subject.weights(Path(name))
            if path.exists():
                found[subject.name] = _measured(subject, path)
            else:
                found[subject.name] = [{"mode": "all", "not_measured": f"not measured: {path.name} is not here"}]
    published({"models": found}, __doc__ or "", [_table(name, rows) for name, rows in found.items()], options.output)
    return 0


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    return Table(name, ["", "bytes", "gzip -9", "of float32", "SQNR dB"], [_row(row) for row in rows])


def _row(row: Mapping[str, Any]) -> list[str]:
    if "not_measured" in row:
        return [row["mode"], row["not_measured"]]
    return [
        row["mode"],
        f"{row['bytes']:,}",
        "" if row["gzip"] is None else f"{row['gzip']:,}",
        f"{row['share']:.1%}",
        "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}",
    ]


def _measured(subject: Subject, path: Path) -> list[dict[str, Any]]:
    model = drop_state(shrink.load(path))
    arrays = _weights(model)
    float_bytes = sum(4 * x.size for x in arrays.values())

    def row(mode: str, size: int, sqnr_db: float | None, packed: int | None = None) -> dict[str, Any]:
        # The smaller of the two is what goes over the wire.
        wire = size if packed is None else min(size, packed)
        return {"mode": mode, "bytes": size, "gzip": packed, "share": wire / float_bytes, "sqnr_db": sqnr_db}

    rows = [row("float32 (this file)", path.stat().st_size, None)]
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            out = Path(folder) / "out.safetensors"
            shrink.save(shrink.quantize(model, mode), out)
            decoded = {t.name: t.array for t in safetensors.read(out).tensors}
            rows.append(row(f"shrink {mode}", out.stat().st_size, weights_sqnr_db(arrays, decoded)))
    for label, found in _calibrated(subject):
        if found is None:
            rows.append({"mode": "shrink calibrated", "not_measured": label})
            continue
        original, entries = found
        changed = {entry.name: entry.array for entry in entries}
        rows.append(row(label, file_bytes(entries)[0], weights_sqnr_db(original, {**original, **changed})))
    for peer in _peers(subject, model, path):
        if peer["bytes"] is None:
            rows.append({"mode": peer["name"], "not_measured": peer["note"]})
        else:
            rows.append(row(peer["name"], peer["bytes"], peer["sqnr_db"], peer["gzip"]))
    try:
        for made in nncodec.encoded(arrays, nncodec.QPS):
            name = f"NNCodec {nncodec.VERSION}, qp {made.qp}"
            rows.append(row(name, made.size_bytes, weights_sqnr_db(arrays, made.decoded)))
    except ShrinkError as error:
        rows.append({"mode": f"NNCodec {nncodec.VERSION}", "not_measured": f"not measured: {error}"})
    return rows


def _weights(model: Model) -> Weights:
    return {t.name: t.array for t in model.tensors if t.dtype.kind == "f" and t.size}


def _calibrated(subject: Subject) -> Iterator[tuple[str, tuple[Weights, list[Entry]] | None]]:
    """The weights as they were, and the entries at each target by what to call them; None and the reason where there
    are none."""
    if subject.name not in _CALIBRATED:
        yield _NOT_CALIBRATED, None
        return
    with tempfile.TemporaryDirectory() as folder:
        trial = subjects.TRIALS[_CALIBRATED[subject.name]](Path(folder))
        original = _weights(drop_state(trial.network.model))
        label = next(iter(trial.calibrations))
        calibrator = calibrator_of(trial, label)
        for target in TARGETS:
            try:
                found, _ = search.smallest_with(calibrator.at, target)
            except BoundNotMet as error:
                yield f"not measured: {error.message}", None
                continue
            if isinstance(found, Result):
                yield f"shrink calibrated, {target:g} dB", (original, list(entries_of(trial, found)))


def _peers(subject: Subject, model: Model, path: Path) -> list[dict[str, Any]]:
    """What shrink bench shows beside its variants: ONNX Runtime's quantizer needs the network as well."""
    network = Network(subject.name, model, ())
    if subject.network is not None and subject.inputs is not None:
        shape = ",".join(map(str, (1, *subject.inputs().shape[1:])))
        network, _ = given.network(subject.network, path, (shape,))
    return peers(Variant("float32", None, path, network), silent)[0]
