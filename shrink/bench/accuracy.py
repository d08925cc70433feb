"""What a variant's outputs lose against the float32 original, and which layer it is that loses it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink import metrics
from shrink.bench.native import Native
from shrink.bench.plan import Values, Variant
from shrink.errors import ShrinkError, printable
from shrink.model import Entry
from shrink.pipeline import difference, stored_as
from shrink.progress import Progress

__all__ = [
    "SECONDS_AT_MOST",
    "TOLERANCE",
    "Layers",
    "Outputs",
    "Reference",
    "compared",
    "judged",
    "layers",
    "peak",
    "unusable",
]

Array = NDArray[Any]
Outputs = Sequence[Mapping[str, Array]]
"""The outputs of the network, by name, for every sample."""

TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""A backend is wrong where an output is further from native arithmetic on the same weights than this share of the
largest output. Other orders of summing give about 1e-6 in float32; a network deepens that, but not a thousand times."""


def peak(original: Outputs) -> float | None:
    """What PSNR and SSIM are measured by, see `metrics.peak_of`; None where the first output is no picture.

    None too where it is so large that there is neither of the two.
    """
    first = _first(original)
    if metrics.kind_of(first[0].shape) != "image":
        return None
    found = metrics.peak_of(np.concatenate([values.reshape(-1) for values in first]))
    return found if found < _LARGEST_PEAK else None


def unusable(original: Outputs, labels: Array) -> str | None:
    """Why the labels say nothing of these outputs: there must be one for each row of scores, and one of the classes."""
    first = _first(original)
    shape = first[0].shape
    if metrics.kind_of(shape) not in ("classes", "sequence"):
        return f"the output {printable(next(iter(original[0])))} is no table of classes"
    rows = sum(values.size // shape[-1] for values in first)
    if labels.size != rows:
        return f"there are {labels.size} labels for {rows} rows of classes"
    if labels.max(initial=0) >= shape[-1]:
        return f"there is a label {labels.max()}, and the network has {shape[-1]} classes, from 0 on"
    return None


def _first(outputs: Outputs) -> list[Array]:
    """The first output of every sample: by it the network is judged."""
    name = next(iter(outputs[0]))
    return [np.asarray(sample[name]) for sample in outputs]


def compared(original: Outputs, other: Outputs, labels: Array | None = None, by: float | None = None) -> dict[str, Any]:
    """The figures of a variant's outputs, against the original's on the same samples: a document's `accuracy`.

    What the outputs are is told by the first of them; the largest error is that of all. `labels` has a row of class
    numbers for every sample. `by` is the peak of pictures, None for that of these.
    """
    out: dict[str, Any] = dict.fromkeys(_FIGURES)
    out |= {"exact": False}
    if problem := _mismatch(original, other):
        return out | {"problem": problem}
    names = list(original[0])
    flat = [(_flat(original, name), _flat(other, name)) for name in names]
    out["exact"] = all(np.array_equal(a, b) for a, b in flat)
    out["max_error"] = _worst(max, [metrics.max_error(a, b) for a, b in flat])
    out["relative_error"] = _worst(max, [metrics.relative_error(a, b) for a, b in flat])
    out["cosine"] = _worst(min, [metrics.cosine(a, b) for a, b in flat])
    if not all(np.all(np.isfinite(b)) for _, b in flat):
        out["problem"] = "the outputs hold NaN or infinity"
    first = names[0]
    before, after = [s[first] for s in original], [s[first] for s in other]
    kind = metrics.kind_of(before[0].shape)
    # Smaller is worse.
    quality = [_negated(metrics.relative_error(a, b)) for a, b in zip(before, after, strict=True)]
    if kind == "image":
        by = by or peak(original) or 1.0
        psnr = [metrics.psnr(a, b, by) for a, b in zip(before, after, strict=True)]
        out["psnr_db"] = _figure(psnr)
        out["ssim"] = _figure([_ssim(a, b, by) for a, b in zip(before, after, strict=True)])
        quality = psnr
    elif kind in ("classes", "sequence"):
        usable = labels is not None and unusable(original, labels) is None
        out |= _of_classes(np.stack(before), np.stack(after), labels if usable else None)
    for key in ("psnr_db", "ssim"):
        if out["problem"] and out[key]:
            # A sample without a figure is here the worst of all, and no mean can hold it.
            out[key] |= {"mean": None, "worst": None}
    out["worst_input"] = None if out["exact"] else _lowest(quality)
    return out


# Of what is larger the square is not finite.
_LARGEST_PEAK = 1e150

_FIGURES = (
    "exact",
    "problem",
    "psnr_db",
    "ssim",
    "max_error",
    "relative_error",
    "cosine",
    "top1_agreement",
    "top5_agreement",
    "top1_accuracy",
    "perplexity",
    "worst_input",
)


def judged(accuracy: dict[str, Any], native: Outputs, backend: Outputs, *, half: bool) -> dict[str, Any]:
    """The figures of a backend, with whether it is wrong: not what native arithmetic makes of the same weights.

    `half`: the network computes in float16.
    """
    tolerance = TOLERANCE["float16" if half else "float32"]
    by: float | None = 0.0
    if _mismatch(native, backend):
        by = None
    else:
        for name in native[0]:
            a, b = _flat(native, name), _flat(backend, name)
            error, scale = metrics.max_error(a, b), float(np.max(np.abs(a), initial=0.0))
            if error is None:
                by = 0.0 if np.array_equal(a, b, equal_nan=True) and by == 0.0 else None
            elif by is not None:
                by = max(by, error / scale if scale else error)
            if by is None:
                break
    return accuracy | {"wrong": by is None or by > tolerance, "wrong_by": by, "tolerance": tolerance}


def _mismatch(original: Outputs, other: Outputs) -> str | None:
    if len(original) != len(other):
        return f"it gave outputs for {len(other)} of {len(original)} inputs"
    for a, b in zip(original, other, strict=True):
        for name, values in a.items():
            if name not in b:
                return "it does not give every output of the original"
            if b[name].shape != values.shape:
                return f"an output has the shape {list(b[name].shape)}, the original's has {list(values.shape)}"
    return None


def _flat(outputs: Outputs, name: str) -> Array:
    return np.concatenate([np.asarray(sample[name]).reshape(-1) for sample in outputs])


def _of_classes(before: Array, after: Array, labels: Array | None) -> dict[str, Any]:
    out: dict[str, Any] = {
        "top1_agreement": metrics.top_agreement(before, after, 1),
        "top5_agreement": metrics.top_agreement(before, after, 5),
    }
    if labels is not None:
        out["top1_accuracy"] = metrics.accuracy(after, labels)
        out["perplexity"] = metrics.perplexity(_distributions(after), labels)
    return out


def _distributions(scores: Array) -> Array:
    """The scores, where every row is a distribution already; else their softmax."""
    values = scores.astype(np.float64)
    if np.all(values >= 0) and np.allclose(values.sum(axis=-1), 1, atol=1e-3):
        return values
    shifted = values - values.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    out: Array = powers / powers.sum(axis=-1, keepdims=True)
    return out


def _ssim(a: Array, b: Array, peak: float) -> float | None:
    """The mean over the pictures of a batch."""
    values = [metrics.ssim(x, y, peak) for x, y in zip(a, b, strict=True)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figure(samples: list[float | None]) -> dict[str, Any]:
    known = [value for value in samples if value is not None]
    return {
        "mean": sum(known) / len(known) if known else None,
        "worst": min(known) if known else None,
        "samples": samples,
    }


def _worst(of: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    """None where one is: what cannot be said of one output cannot be said of all."""
    known = [value for value in values if value is not None]
    return of(known) if known and len(known) == len(values) else None


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _lowest(quality: list[float | None]) -> int | None:
    known = [(value, number) for number, value in enumerate(quality) if value is not None]
    return min(known)[1] if known else None


class Reference:
    """The original on this machine: its outputs, and those that other weights would give."""

    def __init__(self, first: Variant, samples: Sequence[Values], progress: Progress):
        self.first = first
        self._weights = {entry.name: entry for entry in first.network.model.tensors}
        self._graph = first.network.model.graph
        self._samples = samples
        # Decoding every weight once more takes longer than remembering which were not the same.
        self._last: tuple[Variant | None, frozenset[str]] = (None, frozenset())
        self._native = Native.of(first.network)
        self.seconds_per_run = math.inf
        self.outputs: Outputs = self._run({}, "float32", progress)

    def of(self, variant: Variant, progress: Progress) -> Outputs:
        """What the variant's decoded weights give, natively, for every sample."""
        changed = self.changed(variant)
        if changed is None or not all(map(self._native.exchangeable, changed)):
            native = Native(variant.network, exchange=False)
            return self._each(native.run, variant.name, progress)
        weights = {e.name: self._values(e) for e in variant.network.model.tensors if e.name in changed}
        return self._run(weights, variant.name, progress)

    def changed(self, variant: Variant) -> frozenset[str] | None:
        """Which of the variant's weights are not the original's; None where it has a graph of its own."""
        if variant.network.model.graph != self._graph:
            return None
        last, names = self._last
        if last is not variant:
            names = frozenset(
                entry.name
                for entry in variant.network.model.tensors
                if not np.array_equal(self._values(entry), self.weight(entry.name))
            )
            self._last = variant, names
        return names

    def with_only(self, entry: Entry, count: int) -> Outputs:
        """The outputs for the first `count` samples, with this weight in place of the original's."""
        weights = {entry.name: self._values(entry)}
        return [self._native.run(sample, weights) for sample in self._samples[:count]]

    def _values(self, entry: Entry) -> Array:
        """The decoded values, of the type that the graph has."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(entry.array.astype(self._weights[entry.name].dtype, copy=False))

    def run(self, sample: Values) -> dict[str, Array]:
        """The original's outputs for any sample."""
        return self._native.run(sample)

    def exchangeable(self, name: str) -> bool:
        return self._native.exchangeable(name)

    def weight(self, name: str) -> Array:
        return self._weights[name].array

    def _run(self, weights: Mapping[str, Array], name: str, progress: Progress) -> Outputs:
        start = time.perf_counter()
        out = self._each(lambda sample: self._native.run(sample, weights), name, progress)
        self.seconds_per_run = (time.perf_counter() - start) / len(self._samples)
        return out

    def _each(self, run: Callable[[Values], dict[str, Array]], name: str, progress: Progress) -> Outputs:
        out = []
        for number, sample in enumerate(self._samples):
            progress(f"{name}: outputs", number, len(self._samples))
            out.append(run(sample))
        return out


@dataclass(frozen=True)
class Layers:
    """Rows for the document, those that hurt the output most first; `why` says why outputs were not measured."""

    rows: list[dict[str, Any]]
    why: str = ""


_SAMPLES_PER_LAYER = 3
SECONDS_AT_MOST = 60.0
"""What the layers of one variant may take without being asked for."""


def layers(
    reference: Reference, variant: Variant, progress: Progress, *, seconds: float = SECONDS_AT_MOST
) -> Layers | None:
    """What each weight loses by itself, and the output with only that weight changed; None for a graph of its own.

    Where that would take longer than `seconds`, fewer samples are taken, and in the end none.
    """
    changed = reference.changed(variant)
    if changed is None:
        return None
    cost = reference.seconds_per_run * max(1, len(changed))
    count = min(
        _SAMPLES_PER_LAYER,
        len(reference.outputs),
        int(min(seconds / cost, _SAMPLES_PER_LAYER)) if cost > 0 else _SAMPLES_PER_LAYER,
    )
    why = "" if count else f"{len(changed)} layers would take about {math.ceil(cost / 60)} min"
    rows = []
    total = len(variant.network.model.tensors)
    for number, entry in enumerate(variant.network.model.tensors):
        if entry.dtype.kind != "f":
            continue
        progress(f"{variant.name}: {entry.name}", number, total)
        row: dict[str, Any] = {
            "name": entry.name,
            "shape": list(entry.shape),
            "mode": "kept",
            "sqnr_db": None,
            "output_sqnr_db": None,
            "bytes": entry.size_bytes,
        }
        if entry.name in changed:
            mode = stored_as(entry)
            row["mode"] = "pruned" if mode == "float32" else mode
            row["sqnr_db"] = _finite(difference(reference.weight(entry.name), entry.array).sqnr_db)
            if count and reference.exchangeable(entry.name):
                row["output_sqnr_db"] = _of_outputs(reference, entry, count)
        rows.append(row)
    if not why and any(row["mode"] != "kept" and not reference.exchangeable(row["name"]) for row in rows):
        why = "ONNX Runtime takes some of its weights as constants only"
    rows.sort(key=_worst_first)
    return Layers(rows, why)


def _worst_first(row: Mapping[str, Any]) -> tuple[float, float, str]:
    output, weights = (math.inf if row[key] is None else row[key] for key in ("output_sqnr_db", "sqnr_db"))
    return output, weights, row["name"]


def _of_outputs(reference: Reference, entry: Entry, count: int) -> float | None:
    """SQNR in dB of the first output, over `count` samples; None where nothing differs, or it does not run."""
    try:
        found = reference.with_only(entry, count)
    except ShrinkError:
        return None
    name = next(iter(found[0]))
    a, b = _flat(reference.outputs[:count], name), _flat(found, name)
    return _finite(difference(a, b).sqnr_db)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
