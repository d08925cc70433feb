"""The document of a curve as one HTML file that needs nothing else: no network, no other file.

What it says in words comes from here too, for the terminal. Between two measured points of the calibrated curve sizes
are interpolated, their logarithm along the dB; beyond its ends nothing is said.
"""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from shrink.bench import wording
from shrink.bench.curve import CALIBRATED, ORIGINAL, as_bytes, checked
from shrink.bench.markup import AT_MOST_BYTES, inert, template, text
from shrink.bench.report import _PLOT_STYLE, _library
from shrink.bench.tables import Cell, Row, Table
from shrink.errors import BadInput, printable

__all__ = ["MADE_UP", "headline", "render", "share_at"]

Document = dict[str, Any]
Point = dict[str, Any]

MADE_UP = (
    "The inputs are made up. On real ones accuracy is often lower by some dB, and other steps may be the right "
    "ones: give your own with --calibrate, or say with --input-distribution what they are drawn from."
)
"""What to say of numbers that were measured on such samples."""

_TARGETS_DB = (50.0, 45.0, 40.0)
_TARGET_DB = 45.0
# What calibrated is compared with first, where it was measured.
_PEERS = ("int8", "eightbit", "int4")
_DATA_AT_MOST = 400_000
_LAYERS_DRAWN = 40
_LAYERS_SHOWN = 120
_ENTRIES_SHOWN = 200
_NOTHING = "–"
_NAMES = {"float32": "float32, the original"}


def render(document: Document) -> str:
    """The page of a document: the same document, the same page. Data that would make it too large is left out.

    Raises:
        BadInput: it is not a valid document, or holds more than one page can.
        MissingDependency: jinja2 is not installed.
    """
    document = checked(document)
    data = _data(document)
    with_data = len(data["base64"]) <= _DATA_AT_MOST
    page = _page(document, data if with_data else None)
    if with_data and len(page.encode()) > AT_MOST_BYTES:
        page = _page(document, None)
    if len(page.encode()) > AT_MOST_BYTES:
        raise BadInput(f"it holds more than a page of {wording.size(AT_MOST_BYTES)} can show")
    return page


def _page(document: Document, data: Document | None) -> str:
    shown = _points_with_layers(document)
    first = _nearest(shown)
    css = text("curve.css")
    context = {
        "document": document,
        "title": document["title"] or "Curve",
        "answer": headline(document),
        "about": _about(document),
        "warning": MADE_UP if document["calibration"]["made_up"] else None,
        "tiles": _tiles(document),
        "points": _points_table(document),
        "layers": [
            {
                "label": _label_of_layers(point),
                "table": _layers_table(number, point),
                "kept": _kept_table(number, point),
                "open": number == first,
            }
            for number, point in enumerate(shown)
        ],
        "facts": _facts(document),
        "not_measured": [(e["what"], e["why"]) for e in document["not_measured"][:_ENTRIES_SHOWN]],
        "data": data,
    }
    drawn = {
        "curve": [_drawn_point(document, point) for point in document["points"] if point["problem"] is None],
        "layers": [_drawn_layers(point) for point in shown],
        "first": first,
    }
    from markupsafe import Markup

    scripts = [_library("d3"), _library("plot"), text("curve.js")]
    context |= {"own_css": Markup(css), "charts_json": inert(drawn)}
    return template("curve.html", scripts, context, [_PLOT_STYLE, css])


# What it comes to


def headline(document: Document) -> str:
    """The result in a sentence."""
    target = _target(document)
    if target is None:
        return "Nothing calibrated was measured." if not _curve(document) else _only_measured(document)
    share = share_at(document, target)
    words = f"At {_round_db(target)}{_on(document)} calibrated needs {_percent(share or 0)} of float32"
    peer = _peer(document, target)
    if peer is None:
        return f"{words}."
    return f"{words}, {peer['label']} {_percent(peer['share'])} at {wording.decibels(peer['psnr_db'])}."


def _only_measured(document: Document) -> str:
    point = _nearest_point(_curve(document))
    return (
        f"Calibrated needs {_percent(point['share'])} of float32 at {wording.decibels(point['psnr_db'])}"
        f"{_on(document)}, the point nearest to 45 dB."
    )


def _on(document: Document) -> str:
    return " on made-up inputs" if document["calibration"]["made_up"] else ""


def _target(document: Document) -> float | None:
    """45 dB, or the multiple of 5 dB nearest to it that the curve reaches."""
    curve = _curve(document)
    if not curve:
        return None
    low, high = curve[0]["psnr_db"], curve[-1]["psnr_db"]
    steps = range(math.ceil(low / 5), math.floor(high / 5) + 1)
    return 5.0 * min(steps, key=lambda n: abs(5 * n - _TARGET_DB)) if steps else None


def _peer(document: Document, target: float) -> Point | None:
    """What to name beside calibrated: int8, or the mode that comes nearest to the target."""
    modes = [p for p in document["points"] if p["mode"] not in (ORIGINAL, CALIBRATED) and p["psnr_db"] is not None]
    named = {point["mode"]: point for point in modes}
    found = next((named[name] for name in _PEERS if name in named), None)
    return found or min(modes, key=lambda point: abs(point["psnr_db"] - target), default=None)


def _curve(document: Document) -> list[Point]:
    """The calibrated points from low to high PSNR, without those that another one beats in size and PSNR."""
    points = [p for p in document["points"] if p["mode"] == CALIBRATED and p["psnr_db"] is not None]
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p["size_bytes"], -p["psnr_db"])):
        if not best or point["psnr_db"] > best[-1]["psnr_db"]:
            best.append(point)
    return best


def share_at(document: Document, psnr_db: float) -> float | None:
    """What share of float32 calibrated needs for this PSNR, interpolated; None where that lies beyond its ends."""
    curve = _curve(document)
    for below, above in itertools.pairwise(curve):
        low, high = below["psnr_db"], above["psnr_db"]
        if low <= psnr_db <= high:
            at = (psnr_db - low) / (high - low)
            return float(below["share"] ** (1 - at) * above["share"] ** at)
    return None


def _percent(share: float) -> str:
    """`6.1 %`, `25.3 %`, and small shares with two digits, for it is their ratios that count."""
    if share == 1:
        return "100 %"
    return f"{wording.plain(100 * share, 2)} %" if share < 0.01 else f"{100 * share:.1f} %"


def _round_db(db: float) -> str:
    return f"{db:.0f} dB".replace("-", wording.MINUS)


def _tiles(document: Document) -> list[tuple[str, str]]:
    """Numbers for the head of the page, each with what it is."""
    tiles = []
    for target in _TARGETS_DB:
        share = share_at(document, target)
        if share is not None:
            tiles.append((_percent(share), f"of float32 at {_round_db(target)}"))
    peer = _peer(document, _TARGET_DB)
    mine = share_at(document, peer["psnr_db"]) if peer else None
    if peer and mine:
        ratio = peer["share"] / mine
        words = "smaller" if ratio >= 1 else "larger"
        label = f"{words} than {peer['label']} at its {wording.decibels(peer['psnr_db'])}"
        tiles.append((f"{wording.times(max(ratio, 1 / ratio))} ×", label))
    return tiles


def _about(document: Document) -> str:
    """What was measured on what, in a sentence or two."""
    asked = document["calibration"]
    held, samples = asked["held_out"], asked["samples"]
    source = printable(asked["source"], at_most=400)
    if not asked["unseen"]:
        return (
            f"Calibrated on a single sample ({source}) and measured on that same one: give more samples for numbers "
            "that say how it does on others."
        )
    return (
        f"Calibrated on {samples - held} samples and measured on {_count(held, 'other')}, to which no weight was "
        f"fitted. All come from: {source}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


# Tables


def _points_table(document: Document) -> Table:
    columns = (
        ("Mode", False),
        ("Step", True),
        ("File", True),
        ("Of float32", True),
        ("PSNR, all samples", True),
        ("PSNR, mean", True),
        ("PSNR, worst", True),
        ("Cosine", True),
        ("Calibrated at the same PSNR", True),
    )
    rows = []
    for point in document["points"]:
        name = _NAMES.get(point["mode"], wording.name_of(point["mode"]))
        start = (
            Cell(name),
            Cell("" if point["step"] is None else f"{point['step']:g}"),
            Cell(wording.size(point["size_bytes"]), point["size_bytes"]),
            Cell(_percent(point["share"]), point["share"]),
        )
        if point["problem"]:
            rows.append(Row(start, printable(point["problem"], at_most=400)))
            continue
        figures = [_figure(point, key) for key in ("psnr_db", "mean_psnr_db", "worst_psnr_db")]
        cosine = point["cosine"]
        alike = Cell(_NOTHING) if cosine is None else Cell(f"{cosine:.6f}".replace("-", wording.MINUS), cosine)
        rows.append(Row((*start, *figures, alike, _same_accuracy(document, point))))
    caption = (
        "File is the whole .safetensors file, graph and unquantized tensors included. 1 MB is 10⁶ bytes, 1 kB is 1000 "
        "bytes. Step is what --step of shrink quantize takes."
    )
    return Table("points", caption, tuple(c for c, _ in columns), tuple(n for _, n in columns), tuple(rows))


def _figure(point: Point, key: str) -> Cell:
    if point[key] is None:
        return Cell("identical", "inf")
    return Cell(wording.decibels(point[key]), point[key])


def _same_accuracy(document: Document, point: Point) -> Cell:
    """How large calibrated is where it is as accurate as this mode."""
    if point["mode"] in (ORIGINAL, CALIBRATED) or point["psnr_db"] is None:
        return Cell("")
    curve, db = _curve(document), point["psnr_db"]
    if not curve:
        return Cell(_NOTHING)
    if db > curve[-1]["psnr_db"]:
        return Cell("finer than measured")
    share, note = share_at(document, db), ""
    if share is None:
        # Below the coarsest point: that one is more accurate, and its size is what counts.
        share, note = curve[0]["share"], f"and {wording.decibels(curve[0]['psnr_db'])}"
    ratio = point["share"] / share
    words = f"{wording.times(max(ratio, 1 / ratio))} × {'smaller' if ratio >= 1 else 'larger'}"
    return Cell(_percent(share), share, f"{words} {note}".strip().replace(" ", "\N{NO-BREAK SPACE}"))


def _layers_table(number: int, point: Point) -> Table:
    columns = (
        ("Tensor", False),
        ("Shape", False),
        ("Kind", False),
        ("Bits per weight", True),
        ("Bytes", True),
        ("Sensitivity", True),
        ("Step", True),
        ("Note", False),
    )
    rows = [
        Row(
            (
                Cell(wording.name_of(layer["tensor"])),
                Cell(_shape(layer["shape"])),
                Cell(wording.name_of(layer["kind"])),
                Cell(wording.bits(layer["bits_per_weight"]), layer["bits_per_weight"]),
                Cell(f"{layer['size_bytes']:,}", layer["size_bytes"]),
                _number(layer["sensitivity"]),
                _number(layer["step"]),
                Cell(printable(layer["note"] or "", at_most=400)),
            )
        )
        for layer in point["layers"][:_LAYERS_SHOWN]
    ]
    more = len(point["layers"]) - len(rows)
    caption = f"Every quantized tensor at {_label_of_layers(point)}."
    caption += f" The JSON data has {more} more." if more > 0 else ""
    return Table(f"layers-{number}", caption, tuple(c for c, _ in columns), tuple(n for _, n in columns), tuple(rows))


def _kept_table(number: int, point: Point) -> Table | None:
    kept = point["kept"] or ()
    if not kept:
        return None
    rows = [
        Row(
            (
                Cell(wording.name_of(entry["tensor"])),
                Cell(_shape(entry["shape"])),
                Cell(f"{entry['size_bytes']:,}", entry["size_bytes"]),
                Cell(printable(entry["reason"], at_most=400)),
            )
        )
        for entry in kept[:_LAYERS_SHOWN]
    ]
    more = len(kept) - len(rows)
    caption = f"All other tensors at {_label_of_layers(point)}, and what became of them."
    caption += f" The JSON data has {more} more." if more > 0 else ""
    columns = ("Tensor", "Shape", "Bytes", "Reason")
    return Table(f"kept-{number}", caption, columns, (False, False, True, False), tuple(rows))


def _number(value: float | None) -> Cell:
    return Cell(_NOTHING) if value is None else Cell(wording.plain(value), value)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "a single number"


# Charts


def _points_with_layers(document: Document) -> list[Point]:
    return [point for point in document["points"] if point["layers"]]


def _nearest(points: Sequence[Point]) -> int:
    """The number of the point that is shown first."""
    distance = [abs((point["psnr_db"] if point["psnr_db"] is not None else math.inf) - _TARGET_DB) for point in points]
    return distance.index(min(distance)) if distance else 0


def _nearest_point(points: Sequence[Point]) -> Point:
    return points[_nearest(points)]


def _label_of_layers(point: Point) -> str:
    """`49.3 dB, 6.3 % of float32 (step 0.00562)`."""
    db = wording.decibels(point["psnr_db"]) if point["psnr_db"] is not None else "no difference"
    return f"{db}, {_percent(point['share'])} of float32 (step {point['step'] or 0:g})"


def _drawn_point(document: Document, point: Point) -> Document:
    name = wording.name_of(point["label"])
    lines = [name, f"{wording.size(point['size_bytes'])}, {_percent(point['share'])} of float32"]
    if point["psnr_db"] is None:
        lines.append("Outputs identical")
    else:
        worst = point["worst_psnr_db"]
        lines.append(f"PSNR: {wording.decibels(point['psnr_db'])}")
        lines += [f"Worst sample: {wording.decibels(worst)}"] if worst is not None else []
    if point["cosine"] is not None and point["psnr_db"] is not None:
        lines.append(f"Cosine: {point['cosine']:.6f}".replace("-", wording.MINUS))
    return {
        "name": name,
        "size": point["size_bytes"],
        "db": point["psnr_db"],
        "calibrated": point["mode"] == CALIBRATED,
        "words": "\n".join(lines),
    }


def _drawn_layers(point: Point) -> Document:
    """Bars of one point: those tensors that take the most bytes, in the order of the network."""
    layers = point["layers"]
    largest = sorted(range(len(layers)), key=lambda n: -layers[n]["size_bytes"])[:_LAYERS_DRAWN]
    bars = [
        {
            "name": wording.name_of(layers[n]["tensor"]),
            "bits": layers[n]["bits_per_weight"],
            "sensitivity": layers[n]["sensitivity"] or None,
            "words": "\n".join(
                [
                    wording.name_of(layers[n]["tensor"]),
                    f"{wording.bits(layers[n]['bits_per_weight'])} bits per weight, "
                    f"{wording.size(layers[n]['size_bytes'])}",
                    *(
                        [f"Sensitivity: {wording.plain(layers[n]['sensitivity'])}"]
                        if layers[n]["sensitivity"] is not None
                        else []
                    ),
                ]
            ),
        }
        for n in sorted(largest)
    ]
    return {"label": _label_of_layers(point), "bars": bars, "more": len(layers) - len(bars)}


# How it was measured


def _facts(document: Document) -> list[tuple[str, str]]:
    asked, model = document["calibration"], document["model"]
    held = asked["held_out"]
    facts = [
        ("Network", f"{wording.name_of(model['file'])}, {model['weights']:,} weights"),
        ("Samples", f"{asked['samples']}: {printable(asked['source'], at_most=400)}"),
        ("Held out", f"{held} of them, to measure on" if asked["unseen"] else "none: there is only one sample"),
        ("Seed", f"{asked['seed']}"),
        ("Effort", f"{asked['effort']}"),
    ]
    facts += [
        (
            f"Output {wording.name_of(output['name'])}",
            f"{_shape(output['shape'])}, peak {wording.plain(output['peak'])} for PSNR",
        )
        for output in model["outputs"][:10]
    ]
    return facts


def _data(document: Document) -> Document:
    content = as_bytes(document)
    name = re.sub(r"[^a-z0-9]+", "-", document["title"].lower()).strip("-")[:60] or "curve"
    return {
        "file": f"{name}.curve.json",
        "base64": base64.b64encode(content).decode(),
        "size": wording.size(len(content)),
    }
