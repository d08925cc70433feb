"""What the charts of a report are drawn from: numbers and ready words, so that the page's script only draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from shrink.bench import wording
from shrink.bench.document import CELLS
from shrink.bench.verdicts import dominated, first_visit, quality, quality_name, weights_on_the_wire
from shrink.errors import printable

__all__ = ["charts"]

LAYERS_DRAWN = 24
_STEPS = ("download", "decode", "compile", "first_run")
_OTHER = "other"

Document = dict[str, Any]


def charts(document: Document) -> dict[str, Any]:
    """JSON of all charts; one that has nothing to show is null."""
    return {
        "variants": [wording.name_of(variant["name"]) for variant in document["variants"]],
        "overview": _overview(document),
        "visits": _visits(document),
        "layers": _layers(document),
    }


def _overview(document: Document) -> dict[str, Any] | None:
    """Size, accuracy and latency of each variant: {x: label -> bytes}, {r: label -> ms}, y and the words of the tip."""
    points: list[dict[str, Any]] = []
    for number, variant in enumerate(document["variants"]):
        found = quality(document, variant)
        if not found or math.isnan(found.merit):
            continue
        visit, weights = first_visit(variant), weights_on_the_wire(variant)
        runs = {
            wording.backend_words(backend, cell): cell["warm"]["median"]
            for backend, cell in _cells(variant)
            if cell and cell["warm"] and cell["warm"]["median"] is not None
        }
        points.append(
            {
                "variant": number,
                "x": {"First visit": visit, "Weights on the wire": weights},
                "y": found.merit if math.isfinite(found.merit) else None,
                "exact": found.merit == math.inf,
                "run": runs,
                "front": not dominated(document, variant),
                "words": _point_words(document, variant, found.text),
            }
        )
    points = [p for p in points if (p["exact"] or p["y"] is not None) and any(p["x"].values())]
    return {"y": quality_name(document), "points": points} if points else None


def _point_words(document: Document, variant: dict[str, Any], accuracy: str) -> str:
    lines = [wording.name_of(variant["name"])]
    visit, weights = first_visit(variant), weights_on_the_wire(variant)
    lines += [f"First visit: {wording.size(visit)}"] if visit else []
    lines += [f"Weights on the wire: {wording.size(weights)}"] if weights else []
    lines.append(accuracy[0].upper() + accuracy[1:])
    for backend, cell in _cells(variant):
        if cell and cell["warm"] and cell["warm"]["median"] is not None:
            software = ", in software" if wording.software_words(document, backend) else ""
            run = wording.milliseconds(cell["warm"]["median"])
            lines.append(f"{wording.backend_words(backend, cell)}{software}: {run}")
    return "\n".join(lines)


def _cells(variant: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for backend in CELLS:
        if backend in (variant["latency"] or {}):
            yield backend, variant["latency"][backend]


def _visits(document: Document) -> dict[str, Any] | None:
    """The parts of a first visit, per variant and backend."""
    bars, totals, problems = [], [], []
    for backend in CELLS:
        for number, variant in enumerate(document["variants"]):
            cell = (variant["latency"] or {}).get(backend)
            if not cell:
                continue
            where = {"variant": number, "backend": _backend_heading(document, backend, cell)}
            cold = cell["cold"]
            if not cold or cold["first_picture"] is None:
                problems.append({**where, "words": printable(cell["problem"] or "not measured", at_most=80)})
                continue
            steps = {key: cold[key] or 0 for key in _STEPS}
            # The medians of the steps need not add up to the median of the whole.
            steps[_OTHER] = max(0, cold["first_picture"] - sum(steps.values()))
            whole = max(cold["first_picture"], sum(steps.values()))
            totals.append({**where, "ms": whole, "words": wording.milliseconds(whole)})
            for step, ms in steps.items():
                bars.append({**where, "step": step, "ms": ms, "words": wording.milliseconds(ms)})
    return {"bars": bars, "totals": totals, "problems": problems} if bars else None


def _backend_heading(document: Document, backend: str, cell: dict[str, Any]) -> str:
    software = " (in software)" if wording.software_words(document, backend) else ""
    return wording.backend_words(backend, cell) + software


def _layers(document: Document) -> dict[str, Any] | None:
    """The SQNR of the output with one layer compressed, or that of the weights where no output was measured."""
    found = [
        (number, layer) for number, variant in enumerate(document["variants"]) for layer in variant["layers"] or ()
    ]
    key = "output_sqnr_db" if any(layer["output_sqnr_db"] is not None for _, layer in found) else "sqnr_db"
    known = sorted(
        ((number, layer) for number, layer in found if layer[key] is not None), key=lambda entry: entry[1][key]
    )
    names = list(dict.fromkeys(layer["name"] for _, layer in known))
    if not names:
        return None
    drawn = {name: place for place, name in enumerate(names[:LAYERS_DRAWN])}
    dots = [
        {
            "layer": drawn[layer["name"]],
            "variant": number,
            "db": layer[key],
            "words": "\n".join(
                [
                    wording.name_of(layer["name"]),
                    f"{wording.name_of(document['variants'][number]['name'])}: {wording.decibels(layer[key])}",
                    *(
                        [f"SQNR of its weights: {wording.decibels(layer['sqnr_db'])}"]
                        if layer["sqnr_db"] is not None
                        else []
                    ),
                    *([wording.size(layer["bytes"])] if layer["bytes"] is not None else []),
                ]
            ),
        }
        for number, layer in known
        if layer["name"] in drawn
    ]
    output = key == "output_sqnr_db"
    return {
        "x": "SQNR of the output with only this layer compressed (dB)" if output else "SQNR of the weights (dB)",
        "names": [wording.name_of(name) for name in drawn],
        "dots": dots,
        "more": len(names) - len(drawn),
    }
