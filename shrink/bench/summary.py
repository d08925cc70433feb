"""A document in one table, and the bounds that its numbers must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shrink.bench.plan import ORIGINAL
from shrink.errors import UsageError, printable

__all__ = ["METRICS", "Bound", "bound", "evaluated", "table"]

# A variant of a checked document.
_Variant = Mapping[str, Any]


def _of(variant: _Variant, *keys: str) -> Any:
    value: Any = variant
    for key in keys:
        value = None if value is None else value.get(key)
    return value


def _of_outputs(*keys: str) -> Callable[[_Variant], list[float]]:
    """The number wherever outputs were computed, natively and in each backend."""
    return lambda v: [n for a in (v["accuracy"] or {}).values() if a and (n := _of(a, *keys)) is not None]


def _decibel(key: str) -> Callable[[_Variant], list[float]]:
    """Infinite where nothing differs, as far as the figure makes sense for such outputs at all."""

    def values(variant: _Variant) -> list[float]:
        places = [a for a in (variant["accuracy"] or {}).values() if a and a["psnr_db"]]
        found = [math.inf if a["exact"] else a["psnr_db"][key] for a in places]
        return [value for value in found if value is not None]

    return values


def _of_cells(*keys: str, unit: float = 1.0) -> Callable[[_Variant], list[float]]:
    return lambda v: [n / unit for cell in (v["latency"] or {}).values() if (n := _of(cell, *keys)) is not None]


def _of_size(*keys: str, unit: float = 1.0) -> Callable[[_Variant], list[float]]:
    def values(variant: _Variant) -> list[float]:
        value = _of(variant, "size", *keys)
        found = list(value.values()) if isinstance(value, Mapping) else [value]
        return [n / unit for n in found if n is not None]

    return values


@dataclass(frozen=True)
class Metric:
    """Numbers of a variant, one for each place it was measured in. `more_is_better` says which of them is the worst."""

    values: Callable[[_Variant], list[float]]
    more_is_better: bool
    says: str


_MB = 1e6

METRICS: Mapping[str, Metric] = {
    "psnr": Metric(_decibel("worst"), True, "PSNR in dB of the worst input"),
    "psnr-mean": Metric(_decibel("mean"), True, "PSNR in dB, the mean over inputs"),
    "ssim": Metric(_of_outputs("ssim", "worst"), True, "structural similarity of the worst input"),
    "cosine": Metric(_of_outputs("cosine"), True, "cosine of the angle between outputs"),
    "top1-agreement": Metric(_of_outputs("top1_agreement"), True, "share of inputs with the same best class"),
    "top5-agreement": Metric(_of_outputs("top5_agreement"), True, "share with the best class among the best five"),
    "top1-accuracy": Metric(_of_outputs("top1_accuracy"), True, "share of inputs whose best class is the label"),
    "relative-error": Metric(_of_outputs("relative_error"), False, "RMS of the difference over that of the output"),
    "max-error": Metric(_of_outputs("max_error"), False, "largest difference of an output value"),
    "perplexity": Metric(_of_outputs("perplexity"), False, "perplexity of the labels"),
    "first-visit-mb": Metric(_of_size("first_visit", unit=_MB), False, "MB that a first visit downloads"),
    "weights-mb": Metric(_of_size("wire_raw", unit=_MB), False, "MB of weights that a visitor downloads"),
    "file-mb": Metric(_of_size("file", unit=_MB), False, "MB of the file"),
    "bits-per-weight": Metric(_of_size("bits_per_weight"), False, "bits per weight"),
    "first-picture-ms": Metric(_of_cells("cold", "first_picture"), False, "ms to the first picture, median"),
    "warm-ms": Metric(_of_cells("warm", "median"), False, "ms of a warm run, median"),
    "warm-ratio": Metric(_of_cells("warm", "ratio"), False, "time of a warm run, as a multiple of float32's"),
    "memory-mb": Metric(_of_cells("memory_peak", unit=_MB), False, "MB of memory that the page takes, at most"),
}
"""What can be bounded, by the names that users write."""

_OF_OUTPUTS = frozenset(METRICS) & {
    "psnr", "psnr-mean", "ssim", "cosine", "top1-agreement", "top5-agreement", "top1-accuracy", "relative-error",
    "max-error", "perplexity",
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """What every variant must keep: `metric` at least `limit`, or at most where `at_most`."""

    metric: str
    limit: float
    at_most: bool

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.at_most else '>='}{self.limit:g}"


def bound(text: str, *, at_most: bool) -> Bound:
    """`psnr=40` of --fail-under, or `first-visit-mb=2` of --fail-over, which gives `at_most`. Raises UsageError."""
    name, equals, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not equals or not math.isfinite(limit):
        raise UsageError(f"{printable(text)!r} is no bound", hint="write --fail-under psnr=40")
    if name not in METRICS:
        raise UsageError(f"there is no metric {printable(name)!r}", hint="known: " + ", ".join(METRICS))
    return Bound(name, limit, at_most)


def evaluated(document: Mapping[str, Any], bounds: Sequence[Bound], asked: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The `checks` of a checked document: each bound with each variant but the original, by its worst number.

    What was not measured keeps no bound: a gate must not open because the browser is missing, or because a variant
    that was `asked` for could not be made.
    """
    variants = [v for v in document["variants"] if v["name"] != ORIGINAL]
    found = [_checked(variant, each) for each in bounds for variant in variants]
    absent = [name for name in asked if name not in {v["name"] for v in variants}]
    lost = {"value": None, "met": False, "why": "it could not be made"}
    return found + [{"check": str(each), "variant": name, **lost} for each in bounds for name in absent]


def _checked(variant: _Variant, bound: Bound) -> dict[str, Any]:
    values = METRICS[bound.metric].values(variant)
    problem = next((a["problem"] for a in (variant["accuracy"] or {}).values() if a and a["problem"]), None)
    check = {"check": str(bound), "variant": variant["name"], "value": None, "met": False, "why": None}
    if problem and bound.metric in _OF_OUTPUTS:
        return check | {"why": problem}
    if not values:
        return check | {"why": "not measured"}
    worst = max(values) if bound.at_most else min(values)
    met = worst <= bound.limit if bound.at_most else worst >= bound.limit
    if math.isinf(worst):
        return check | {"met": met, "why": "nothing differs"}
    return check | {"value": worst, "met": met}


def table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what the terminal shows of a checked document: a row for each variant."""
    columns = [column for column in _COLUMNS if any(column[1](v) for v in document["variants"])]
    headers = ["variant", *(title for title, _ in columns)]
    rows = [[printable(v["name"]), *(cell(v) for _, cell in columns)] for v in document["variants"]]
    return headers, rows


def _worst(metric: str, form: str) -> Callable[[_Variant], str]:
    def cell(variant: _Variant) -> str:
        values = METRICS[metric].values(variant)
        if not values:
            return ""
        worst = min(values) if METRICS[metric].more_is_better else max(values)
        return "exact" if math.isinf(worst) else format(worst, form)

    return cell


def _cell(place: str, *keys: str) -> Callable[[_Variant], str]:
    def cell(variant: _Variant) -> str:
        measured = _of(variant, "latency", place)
        if _of(measured, "problem"):
            return "failed"
        value = _of(measured, *keys)
        return "" if value is None else f"{value:,.1f}"

    return cell


def _first_visit(variant: _Variant) -> str:
    """On the first backend: what WebAssembly takes says more than the largest."""
    found = [n for n in (_of(variant, "size", "first_visit") or {}).values() if n is not None]
    return f"{found[0] / _MB:,.3f}" if found else ""


def _wrong(variant: _Variant) -> str:
    return ", ".join(place for place, a in (variant["accuracy"] or {}).items() if _of(a, "wrong"))


_COLUMNS: Sequence[tuple[str, Callable[[_Variant], str]]] = (
    ("file MB", _worst("file-mb", ",.3f")),
    ("first visit MB", _first_visit),
    ("bits/weight", _worst("bits-per-weight", ".2f")),
    ("worst PSNR dB", _worst("psnr", ".1f")),
    ("worst SSIM", _worst("ssim", ".4f")),
    ("top-1 same", _worst("top1-agreement", ".1%")),
    ("top-1 right", _worst("top1-accuracy", ".1%")),
    ("perplexity", _worst("perplexity", ".3f")),
    ("rel. error", _worst("relative-error", ".2e")),
    ("first picture ms", _cell("wasm", "cold", "first_picture")),
    ("wasm-1 ms", _cell("wasm-1", "warm", "median")),
    ("wasm ms", _cell("wasm", "warm", "median")),
    ("webgpu ms", _cell("webgpu", "warm", "median")),
    ("wrong", _wrong),
)
