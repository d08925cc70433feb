"""Calibrated quantization beside other tools: bytes at equal accuracy, on inputs that calibration has not seen.

    python -m benchmarks calibrated [MODEL ...] [-o reports/calibrated.json]

Without a model: the sample generator, the two waifu2x networks, the networks of the zoo and the Keras LSTM; the U-Net
only where it is named. Every encoding is decoded again, and the network run with it. PSNR is that of its outputs
against the float32 network's: the mean over inputs, and the worst. Its peak is 1 for pictures from 0 to 1, else the
range of the outputs. The Keras LSTM is bound by the mean cosine of its outputs instead.

Bytes are in per cent of the values as float32. Those of shrink are of the whole .safetensors file, header and kept
tensors included, but for the graph of an ONNX file, which other tools leave out as well; payload is the same file
without its header. WebDNN's are those of its weight file, TensorFlow.js's those of its weight shards under brotli 11,
NNCodec's those of its stream, ONNX Runtime's those of the whole .onnx file under gzip -9 where that is smaller. ONNX
Runtime's file is run as it is, so it rounds activations too.

Calibrated is run as shrink quantize runs it, with --min-psnr 45, without data (synthetic pictures, normal numbers) and
on samples; then with eight more steps around that. NNCodec 2.1.3 is run with dependent quantization, at qps from -48 to
-8, with and without its own search for the qp of each tensor, where the table does not say less; its data-driven
optimization, which wants a PyTorch network and data, is not run. What keeps a bound is read from the points of a tool
that nothing smaller or better beats, linear in the logarithm of the size between two of them; nothing is read beyond
the outermost.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shrink
from benchmarks import nncodec, subjects
from benchmarks.bounds import COSINE, Curve, Point, at, decibels, tables
from benchmarks.peers import tensorflowjs_uint8, webdnn_decode, webdnn_encoder
from benchmarks.subjects import Trial
from benchmarks.tables import published
from shrink import container
from shrink.bench.curve import MODES
from shrink.bench.size import gzip
from shrink.calibrate import quality, search
from shrink.calibrate.calibrated import Calibrator, Result
from shrink.calibrate.quantizing import chosen_of, merged
from shrink.calibrate.running import Graph
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import BoundNotMet, MissingDependency, ShrinkError
from shrink.formats import onnx as onnx_format
from shrink.model import Entry
from shrink.pipeline import drop_state
from shrink.quantizers import Kept

Array = NDArray[Any]

PSNR_BOUNDS, COSINE_BOUNDS = (50.0, 45.0, 40.0), (0.9999, 0.999, 0.99)
_ASKED_DB = 45.0
# Where the eight steps are wanted to come out: more on either side than the bounds, as what is reached differs.
_AROUND_DB = (55.0, 52.0, 49.5, 47.0, 44.5, 42.0, 39.5, 36.5)
_AROUND_COSINE_DB = (56.0, 50.0, 44.0, 38.0, 32.0, 26.0, 20.0, 14.0)
_LEVEL = 3
_NNCODEC = f"NNCodec {nncodec.VERSION}"
# NNCodec keeps all that it decodes on disk until it is read.
_SWEPT_AT_MOST = 10_000_000

ELSEWHERE = {
    "vgg7": (0.186, 0.142, 0.121),
    "upconv7": (0.251, 0.212, 0.191),
    "keras-lstm": (0.309, 0.253, 0.197),
}
"""The best of 40 settings of NNCodec 2, its data-driven optimization among them, on other inputs: not measured here."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibrated", description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/calibrated.json"))
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for name in subjects.trials(options.models):
        with tempfile.TemporaryDirectory() as folder:
            try:
                trial = subjects.TRIALS[name](Path(folder))
            except FileNotFoundError as missing:
                found[name] = {"not_measured": f"not measured: {Path(str(missing)).name} is not here"}
                continue
            found[name] = measured(trial, ELSEWHERE.get(name))
            print(f"{name}: {_times(found[name])}", flush=True)
    published({"models": found}, __doc__ or "", tables(found), options.output)
    return 0


def _times(result: Mapping[str, Any]) -> str:
    runs = [f"{run['seconds']:.1f} s {run['calibration']}" for run in result["runs"]]
    return f"--min-psnr {_ASKED_DB:g} took {', '.join(runs)}"


# Measuring


class Evaluation:
    """What becomes of the outputs for a trial's inputs when weights are others."""

    def __init__(self, trial: Trial):
        self._graph = Graph(trial.evaluated, ())
        self._original = dict(self._graph.weights)
        (given,) = self._graph.inputs
        self._samples = [{given.name: row[np.newaxis]} for row in trial.inputs]
        self._outputs = self._run()
        peaks = quality.peaks_of(self._outputs)
        self._peaks = peaks if trial.peak is None else dict.fromkeys(peaks, trial.peak)

    def of(self, arrays: Mapping[str, Array]) -> quality.Quality:
        """With these weights, by name, and the original ones for all others."""
        for name, values in self._original.items():
            self._graph.put(name, arrays.get(name, values))
        return quality.measured(self._outputs, self._run(), self._peaks)

    def of_outputs(self, values: Array) -> quality.Quality:
        """Of these as the network's first output, a sample a row."""
        others = [{**o, self._graph.outputs[0]: v[None]} for o, v in zip(self._outputs, values, strict=True)]
        return quality.measured(self._outputs, others, self._peaks)

    def of_file(self, path: Path) -> quality.Quality:
        """With another ONNX file, of the same inputs and outputs."""
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ShrinkError(f"ONNX Runtime does not run its own file: {_first_line(error)}") from None
        others = [
            dict(zip(self._graph.outputs, session.run(self._graph.outputs, x), strict=True)) for x in self._samples
        ]
        return quality.measured(self._outputs, others, self._peaks)

    def _run(self) -> list[dict[str, Array]]:
        types = {name: value.dtype for name, value in self._samples[0].items()}
        program = self._graph.program(types, self._graph.outputs)
        return [program.run(sample) for sample in self._samples]


class _Measuring:
    """The points of one trial."""

    def __init__(self, trial: Trial):
        self._evaluation = Evaluation(trial)
        self.model = drop_state(trial.network.model)
        floats = [tensor for tensor in self.model.tensors if tensor.dtype.kind == "f" and tensor.size]
        self.weights = {tensor.name: np.asarray(tensor.array, np.float32) for tensor in floats}
        self.float_bytes = 4 * sum(x.size for x in self.weights.values())

    def ours(self, label: str, entries: Iterable[Entry], **more: Any) -> Point:
        made = tuple(entries)
        size, payload = file_bytes(made)
        found = self._evaluation.of({entry.name: entry.array for entry in made})
        return self._point(label, size, found, payload=payload / self.float_bytes, **more)

    def theirs(self, label: str, size: int, arrays: Mapping[str, Array], **more: Any) -> Point:
        return self._point(label, size, self._evaluation.of(arrays), **more)

    def unchanged(self, values: Array) -> dict[str, float | None]:
        found = self._evaluation.of_outputs(values)
        return {"mean_psnr_db": _finite(found.mean_psnr_db), "worst_psnr_db": _finite(found.worst_psnr_db)}

    def of_file(self, label: str, size: int, path: Path) -> Point:
        return self._point(label, size, self._evaluation.of_file(path))

    def _point(self, label: str, size: int, found: quality.Quality, payload: float | None = None, **more: Any) -> Point:
        return {
            "label": label,
            "bytes": size,
            "share": size / self.float_bytes,
            "payload": payload,
            **more,
            "mean_psnr_db": _finite(found.mean_psnr_db),
            "worst_psnr_db": _finite(found.worst_psnr_db),
            "cosine": found.cosine,
        }


def measured(trial: Trial, elsewhere: Sequence[float] | None = None) -> dict[str, Any]:
    """All points of a trial, and what they say about the bounds."""
    measuring = _Measuring(trial)
    curves: list[Curve] = []
    runs: list[dict[str, Any]] = []
    for label, calibration in trial.calibrations.items():
        points, run = _calibrated(trial, label, measuring)
        curves.append(Curve(f"calibrated, {label}", points, swept=True))
        runs.append({"calibration": label, "source": calibration.source, **run})
    for mode in MODES:
        name = f"shrink {mode}"
        curves.append(Curve(name, [measuring.ours(name, shrink.quantize(measuring.model, mode).tensors)], swept=False))
    missing: list[tuple[str, str]] = []
    for name, points_of in _PEERS.items():
        try:
            curves.append(Curve(name, points_of(name, trial, measuring), swept=name == _NNCODEC))
        except ShrinkError as error:
            missing.append((name, f"not measured: {error.message}"))
    key, bounds = (COSINE, COSINE_BOUNDS) if trial.by_cosine else ("mean_psnr_db", PSNR_BOUNDS)
    return {
        "about": trial.about,
        "float32_bytes": measuring.float_bytes,
        "bound_on": key,
        "bounds": list(bounds),
        "runs": runs,
        "curves": [
            {
                "name": curve.name,
                "swept": curve.swept,
                "points": list(curve.points),
                "shares": [at(curve, key, bound, "share") for bound in bounds],
                "payloads": [at(curve, key, bound, "payload") for bound in bounds],
            }
            for curve in curves
        ],
        "not_measured": missing,
        "unchanged": None if trial.unchanged is None else measuring.unchanged(trial.unchanged),
        "elsewhere": None if elsewhere is None else list(elsewhere),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def file_bytes(entries: Sequence[Entry]) -> tuple[int, int]:
    """The bytes of a .safetensors file with these, and those of what it holds without its header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.safetensors")
        held = container.write(entries, path, source="benchmark", attributes={}, graph=None, level=_LEVEL)
        return path.stat().st_size, sum(held.values())


def calibrator_of(trial: Trial, label: str) -> Calibrator:
    """As `shrink quantize` makes it: for the tensors that int8 takes, too."""
    decisions = chosen_of(drop_state(trial.network.model))
    chosen = [name for name, decision in decisions.items() if not isinstance(decision, Kept)]
    return Calibrator(trial.network, trial.calibrations[label], chosen)


def entries_of(trial: Trial, result: Result) -> Iterator[Entry]:
    """What is written: tensors that did not change are kept."""
    return merged(drop_state(trial.network.model), result.entries)


def _calibrated(trial: Trial, label: str, measuring: _Measuring) -> tuple[list[Point], dict[str, Any]]:
    """The points of one calibration, and how the run with --min-psnr went."""
    points: list[Point] = []

    def kept(result: Result) -> Point:
        name = f"calibrated, {label}, step {result.step:.3g}"
        held_out = _finite(result.quality.psnr_db)
        made = measuring.ours(name, entries_of(trial, result), step=result.step, held_out_psnr_db=held_out)
        points.append(made)
        return made

    start = time.perf_counter()
    calibrator = calibrator_of(trial, label)
    try:
        found, passes = search.smallest_with(calibrator.at, _ASKED_DB)
        problem = None
    except BoundNotMet as error:
        found, passes, problem = calibrator.at(10 ** (-_ASKED_DB / 20)), 0, error.message
    seconds = time.perf_counter() - start
    if not isinstance(found, Result):
        raise TypeError(type(found))
    first = kept(found)
    run = {"seconds": seconds, "passes": passes, "problem": problem, "asked_db": _ASKED_DB, "point": first}
    # PSNR falls by 20 dB where the step is ten times as coarse, and so does 1 - cosine.
    reached = decibels(first["cosine"]) if trial.by_cosine else first["mean_psnr_db"] or 100.0
    for wanted in _AROUND_COSINE_DB if trial.by_cosine else _AROUND_DB:
        kept(calibrator.at(min(2.0, found.step * 10 ** ((reached - wanted) / 20))))
    return points, run


# Other tools


def _webdnn(name: str, trial: Trial, measuring: _Measuring) -> list[Point]:
    encode, weights = webdnn_encoder()[0], measuring.weights
    # All zeros have no scale, and its encoder divides by it.
    data = {name: encode(x) for name, x in weights.items() if np.any(x)}
    decoded = {name: webdnn_decode(d, EIGHTBIT_TABLE).reshape(weights[name].shape) for name, d in data.items()}
    return [measuring.theirs(name, sum(map(len, data.values())), decoded)]


def _tensorflowjs(name: str, trial: Trial, measuring: _Measuring) -> list[Point]:
    try:
        import brotli
    except ImportError:
        raise MissingDependency("brotli", "bench") from None
    made = {name: tensorflowjs_uint8(x) for name, x in measuring.weights.items()}
    decoded = {name: (codes * scale + low).astype(np.float32) for name, (codes, scale, low) in made.items()}
    packed = brotli.compress(b"".join(codes.tobytes() for codes, _, _ in made.values()), quality=11)
    return [measuring.theirs(name, len(packed), decoded)]


def _onnxruntime(name: str, trial: Trial, measuring: _Measuring) -> list[Point]:
    from onnxruntime.quantization import (  # type: ignore[import-untyped,unused-ignore]
        QuantType,
        quantize_dynamic,
    )

    model = trial.evaluated.model
    # It advises on the root logger to prepare the model first, which changes nothing about its weights.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, small = Path(folder, "whole.onnx"), Path(folder, "small.onnx")
            onnx_format.write(model, model.tensors, whole, None)
            try:
                quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
            except Exception as error:
                raise ShrinkError(f"its quantizer fails: {_first_line(error)}") from None
            return [measuring.of_file(name, min(small.stat().st_size, gzip(small)), small)]
    finally:
        logging.disable(before)


def _nncodec(name: str, trial: Trial, measuring: _Measuring) -> list[Point]:
    qps = nncodec.SWEEP if measuring.float_bytes <= _SWEPT_AT_MOST else nncodec.SWEEP[::4]
    return [
        measuring.theirs(
            f"NNCodec, qp {made.qp}{', searched' if made.searched else ''}",
            made.size_bytes,
            made.decoded,
            qp=made.qp,
            searched=made.searched,
        )
        for made in nncodec.encoded(measuring.weights, qps, searched=(False, True))
    ]


_PEERS: Mapping[str, Callable[[str, Trial, _Measuring], list[Point]]] = {
    "WebDNN eightbit": _webdnn,
    "TensorFlow.js uint8 + brotli": _tensorflowjs,
    "ONNX Runtime dynamic int8": _onnxruntime,
    _NNCODEC: _nncodec,
}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
