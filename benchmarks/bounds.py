"""Curves of size against accuracy: what a tool takes at a bound, and the tables of that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import Table

__all__ = ["COSINE", "Curve", "Point", "at", "decibels", "interpolated", "tables"]

COSINE = "cosine"
"""The one accuracy that is not in dB."""

Point = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """All points of one tool. `swept` ones have a knob and can be read between their points."""

    name: str
    points: Sequence[Point]
    swept: bool


def decibels(cosine: float) -> float:
    """How far a cosine is from 1: .99 is 20 dB, .9999 is 40. It falls as PSNR does where errors grow."""
    return -10 * math.log10(max(1 - cosine, 1e-10))


def at(curve: Curve, key: str, bound: float, value: str) -> float | None:
    """The share at a bound: None where no point keeps it, where the coarsest still does, or where values are missing.

    A tool without a knob has the one point that it has.
    """
    points = [(float(p[key]), float(p[value])) for p in curve.points if p[key] is not None and p[value] is not None]
    if not curve.swept:
        return next((share for reached, share in points if reached >= bound), None)
    return interpolated(points, bound, decibels if key == COSINE else float)


def interpolated(
    points: Iterable[tuple[float, float]], bound: float, scale: Callable[[float], float] = float
) -> float | None:
    """The share at a bound, of points (accuracy, share); None outside of them.

    Points that another beats in both are left out; between two of the others it is linear in the logarithm of the
    share over `scale` of the accuracy.
    """
    front: list[tuple[float, float]] = []
    for reached, share in sorted(points, key=lambda p: (p[1], -p[0])):
        if not front or reached > front[-1][0]:
            front.append((reached, share))
    for (low, small), (high, large) in itertools.pairwise(front):
        if low <= bound <= high:
            part = (scale(bound) - scale(low)) / (scale(high) - scale(low))
            return float(math.exp((1 - part) * math.log(small) + part * math.log(large)))
    return None


# Tables


def tables(found: Mapping[str, Any]) -> list[Table]:
    return [_summary(found), *(_bounds(name, result) for name, result in found.items() if "curves" in result)] + [
        _points(name, result) for name, result in found.items() if "curves" in result
    ]


def _summary(found: Mapping[str, Any]) -> Table:
    """Bytes at the middle bound: calibrated, and the best of the others."""
    headers = ["", "bound", "without data", "on samples", "best of other tools", "which", "samples / best"]
    rows: list[list[str]] = []
    for name, result in found.items():
        if "curves" not in result:
            rows.append([name, result["not_measured"]])
            continue
        # The first are those without data, the last those on the best samples that there are.
        calibrated = [curve["shares"][1] for curve in result["curves"] if curve["name"].startswith("calibrated")]
        ours = [calibrated[0], calibrated[-1]]
        others = [
            (curve["shares"][1], curve["name"])
            for curve in result["curves"]
            if not curve["name"].startswith(("calibrated", "shrink")) and curve["shares"][1] is not None
        ]
        best, which = min(others, default=(None, "none keeps it"))
        ratio = f"{ours[1] / best:.2f}" if best and ours[1] else "–"
        rows.append([name, _bound(result, 1), *map(_percent, (*ours, best)), which, ratio])
    notes = ["Bytes in per cent of float32. Samples are those of the table of each network below."]
    notes += [f"{name}: {_unchanged_note(result)}" for name, result in found.items() if result.get("unchanged")]
    return Table("All networks, at the middle bound", headers, rows, notes)


def _bound(result: Mapping[str, Any], number: int) -> str:
    bound = result["bounds"][number]
    return f"cosine ≥ {bound:g}" if result["bound_on"] == "cosine" else f"≥ {bound:g} dB"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _bounds(name: str, result: Mapping[str, Any]) -> Table:
    """Bytes at each bound, of the tools that have a knob."""
    numbers = range(len(result["bounds"]))
    headers = ["", *(_bound(result, n) for n in numbers), *(f"payload {_bound(result, n)}" for n in numbers)]
    rows = [
        [curve["name"], *map(_percent, curve["shares"]), *map(_percent, curve["payloads"])]
        for curve in result["curves"]
        if curve["swept"]
    ]
    rows += [[peer, why] for peer, why in result["not_measured"] if peer.startswith("NNCodec")]
    notes = [f"On {result['about']}. {result['float32_bytes']:,} bytes as float32."]
    if result["unchanged"]:
        notes.append(_unchanged_note(result))
    if result["elsewhere"]:
        quoted = " / ".join(map(_percent, result["elsewhere"]))
        notes.append(
            "Measured elsewhere, on other inputs, and not here: NNCodec 2, best of 40 settings, its data-driven "
            f"optimization among them: {quoted}."
        )
    for curve in result["curves"]:
        qps = [point["qp"] for point in curve["points"] if "qp" in point]
        if qps:
            notes.append(f"{curve['name']} was run at {len(qps)} settings, qp {min(qps)} to {max(qps)}.")
    notes += [_run_note(run) for run in result["runs"]]
    return Table(f"{name}: bytes at equal accuracy", headers, rows, notes)


def _unchanged_note(result: Mapping[str, Any]) -> str:
    unchanged = result["unchanged"]
    return (
        f"Without any network, the input itself as output has {_number(unchanged['mean_psnr_db'])} dB in the mean and "
        f"{_number(unchanged['worst_psnr_db'])} dB at worst: a bound near or below that says little about weights."
    )


def _run_note(run: Mapping[str, Any]) -> str:
    point = run["point"]
    if run["problem"]:
        return f"--min-psnr {run['asked_db']:g}, {run['calibration']}: {run['problem']}."
    return (
        f"--min-psnr {run['asked_db']:g}, {run['calibration']} ({run['source']}): {point['share']:.1%}, "
        f"{_number(point['held_out_psnr_db'])} dB over held-out samples; here {_number(point['mean_psnr_db'])} dB in "
        f"the mean, {_number(point['worst_psnr_db'])} dB at worst; {run['passes']} passes."
    )


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _points(name: str, result: Mapping[str, Any]) -> Table:
    headers = ["", "bytes", "of float32", "payload", "mean dB", "worst dB", "cosine"]
    rows = [
        [
            point["label"],
            f"{point['bytes']:,}",
            f"{point['share']:.2%}",
            "" if point["payload"] is None else f"{point['payload']:.2%}",
            _number(point["mean_psnr_db"]),
            _number(point["worst_psnr_db"]),
            f"{point['cosine']:.6f}",
        ]
        for curve in result["curves"]
        for point in _shown(curve["points"])
    ]
    rows += [[peer, why] for peer, why in result["not_measured"]]
    return Table(f"{name}: every point", headers, rows)


def _shown(points: Sequence[Point]) -> Sequence[Point]:
    """Of a sweep every fourth qp, as many as anybody reads; all of them are in the JSON."""
    return [p for p in points if "qp" not in p or (p["qp"] % 4 == 0 and not p["searched"])]
