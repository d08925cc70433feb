"""The tables of a report: what stands in their cells, as text, with the number to sort by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shrink.bench import wording
from shrink.bench.document import CELLS, PLACES
from shrink.bench.verdicts import pairs
from shrink.errors import printable

__all__ = ["LAYERS_SHOWN", "Cell", "Row", "Table", "accuracy", "cold", "layers", "peers", "sizes", "visits", "warm"]

LAYERS_SHOWN = 120

Document = dict[str, Any]
_NOTHING = "–"
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """`sort` is what its column is sorted by, None for last; `note` stands small below the text."""

    text: str
    sort: float | str | None = None
    note: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Row:
    """The first cell is the row's heading. `message` stands in place of all cells that are not there."""

    cells: tuple[Cell, ...]
    message: str = ""


@dataclass(frozen=True)
class Table:
    """`numeric` says of each column whether it holds numbers."""

    name: str
    caption: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[Row, ...]


def _cell(value: float | None, words: Callable[[float], str], note: str = "") -> Cell:
    return Cell(_NOTHING, note=note) if value is None else Cell(words(value), value, note)


def _name(variant: dict[str, Any], note: str = "") -> Cell:
    shown = wording.name_of(variant["name"])
    return Cell(shown, shown.lower(), note)


def _ratio(mine: float | None, theirs: float | None) -> str:
    if not mine or not theirs or mine == theirs:
        return ""
    ratio = theirs / mine
    words = f"{wording.times(ratio)} × smaller" if ratio >= 1 else f"{wording.times(1 / ratio)} × larger"
    return words.replace(" ", _NO_BREAK)


def _table(name: str, caption: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Row]) -> Table:
    return Table(name, caption, tuple(c for c, _ in columns), tuple(n for _, n in columns), tuple(rows))


def sizes(document: Document) -> Table:
    columns = [
        ("Variant", False),
        ("Bits per weight", True),
        ("File", True),
        ("Weights, as stored", True),
        ("Weights, gzip -9", True),
        ("Weights, brotli 11", True),
        ("First visit, WebAssembly", True),
        ("First visit, WebGPU", True),
    ]
    original = document["variants"][0]["size"] or {}
    rows = []
    for variant in document["variants"]:
        found = variant["size"]
        if not found:
            rows.append(Row((_name(variant),), wording.why(document, "size", variant["name"])))
            continue
        wire = [
            _cell(found[key], wording.size, _ratio(found[key], original.get(key)))
            for key in ("file", "wire_raw", "wire_gzip", "wire_brotli")
        ]
        name = _name(variant, wording.name_of(variant["file"]) if variant["file"] else "")
        visits, before = found["first_visit"] or {}, original.get("first_visit") or {}
        visit = [
            _cell(visits.get(place), wording.size, _ratio(visits.get(place), before.get(place)))
            for place in ("wasm", "webgpu")
        ]
        rows.append(Row((name, _cell(found["bits_per_weight"], wording.bits), *wire, *visit)))
    return _table("size", "Size of every variant. 1 MB is 10⁶ bytes, 1 kB is 1000 bytes.", columns, rows)


def visits(document: Document) -> Table | None:
    """What a first visit is made of; None where that was not measured."""
    columns = [("Variant", False), ("Backend", False), ("First visit", True)]
    columns += [("Weights", True), ("Graph", True), ("Runtime", True), ("Page", True)]
    rows = []
    for place in ("wasm", "webgpu"):
        for variant in document["variants"]:
            found = variant["size"] or {}
            parts = (found.get("first_visit_parts") or {}).get(place)
            if parts:
                total = _cell((found["first_visit"] or {}).get(place), wording.size)
                where = Cell(wording.place_words(place), place)
                cells = (_cell(parts[key], wording.size) for key in ("weights", "graph", "runtime", "page"))
                rows.append(Row((_name(variant), where, total, *cells)))
    if not rows:
        return None
    caption = "What a first visit downloads, each part compressed as a host serves it."
    return _table("visits", caption, columns, rows)


def peers(document: Document) -> Table | None:
    """Encoders of others beside ours, on the same weights; None where none was measured."""
    if not document["peers"]:
        return None
    original = document["variants"][0]["size"] or {}
    base = _served(original.get("wire_raw"), original.get("wire_gzip"))
    rows = []
    for number, variant in enumerate(document["variants"]):
        mine = variant["size"] or {}
        note = "shrink" if number else "the original"
        rows.append(
            _encoder(variant["name"], mine.get("wire_raw"), mine.get("wire_gzip"), variant["sqnr_db"], note, base)
        )
    for peer in document["peers"]:
        note = printable(peer["note"] or "", at_most=400)
        if peer["bytes"] is None and peer["sqnr_db"] is None:
            rows.append(Row((_name(peer),), note or wording.why(document, "peers")))
        else:
            rows.append(_encoder(peer["name"], peer["bytes"], peer["gzip"], peer["sqnr_db"], note, base))
    columns = [
        ("Encoder", False),
        ("Weights, as stored", True),
        ("Weights, gzip -9", True),
        ("Times smaller", True),
        ("SQNR of the weights", True),
        ("Note", False),
    ]
    caption = (
        "The same weights by the encoders of others. Those of shrink are stored packed, the original too; times "
        "smaller compares the smaller of stored and gzip."
    )
    return _table("peers", caption, columns, rows)


def _encoder(name: str, raw: int | None, gzip: int | None, sqnr_db: float | None, note: str, base: int | None) -> Row:
    served = _served(raw, gzip)
    ratio = base / served if base and served else None
    numbers = (_cell(raw, wording.size), _cell(gzip, wording.size), _cell(ratio, wording.times))
    return Row((_name({"name": name}), *numbers, _cell(sqnr_db, wording.decibels), Cell(note, note)))


def _served(raw: int | None, gzip: int | None) -> int | None:
    return min((n for n in (raw, gzip) if n is not None), default=None)


# Accuracy

_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("psnr_db", "PSNR", wording.decibels),
    ("ssim", "SSIM", lambda value: f"{value:.4f}".replace("-", wording.MINUS)),
)
_NUMBERS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("top1_accuracy", "Top-1 accuracy", wording.percent),
    ("top1_agreement", "Same best class", wording.percent),
    ("top5_agreement", "Best class in the best 5", wording.percent),
    ("perplexity", "Perplexity", wording.plain),
    ("relative_error", "Relative error", lambda value: wording.plain(value, 2)),
    ("max_error", "Largest error", lambda value: wording.plain(value, 2)),
    ("cosine", "Cosine", lambda value: f"{value:.6f}".replace("-", wording.MINUS)),
)


def accuracy(document: Document) -> Table:
    """Every variant, native and on every backend; the figures that none of them has are left out."""
    found = [a for v in document["variants"] for a in (v["accuracy"] or {}).values() if a]
    figures = [entry for entry in _FIGURES if any(_has_figure(a, entry[0]) for a in found)]
    numbers = [entry for entry in _NUMBERS if any(a[entry[0]] is not None for a in found)]
    columns = [("Variant", False), ("Computed", False), ("Right?", False)]
    for _, label, _ in figures:
        columns += [(f"{label}, mean", True), (f"{label}, worst", True)]
    columns += [(label, True) for _, label, _ in numbers]
    columns += [("Worst input", True)]
    rows = []
    for variant in document["variants"]:
        places = variant["accuracy"]
        if not places:
            rows.append(Row((_name(variant),), wording.why(document, "accuracy", variant["name"])))
            continue
        for place in PLACES:
            if place not in places:
                continue
            start = (_name(variant), _at(document, place, wording.where_computed(variant, place)))
            record = places[place]
            if not record:
                rows.append(Row(start, _problem_of(document, variant, place)))
                continue
            cells = [cell for key, _, words in figures for cell in _figure(record, key, words)]
            cells += [_cell(record[key], words) for key, _, words in numbers]
            cells.append(_cell(record["worst_input"], lambda value: f"{value:.0f}"))
            rows.append(Row((*start, _right(record, place), *cells)))
    caption = "Outputs against those of float32 in native arithmetic, on the same inputs."
    caption += _peak(document) + _tolerance(found)
    return _table("accuracy", caption, columns, rows)


def _has_figure(record: dict[str, Any], key: str) -> bool:
    return record[key] is not None and (record["exact"] or record[key]["worst"] is not None)


def _figure(record: dict[str, Any], key: str, words: Callable[[float], str]) -> tuple[Cell, Cell]:
    figure = record[key] or {}
    if record["exact"] and figure.get("worst") is None and figure:
        return Cell("identical", float("inf")), Cell("identical", float("inf"))
    return _cell(figure.get("mean"), words), _cell(figure.get("worst"), words)


def _right(record: dict[str, Any], place: str) -> Cell:
    if record["problem"]:
        return Cell(printable(record["problem"], at_most=400), "a problem", bad=True)
    if place == "native":
        return Cell("reference", "reference")
    if record["wrong"] is None:
        return Cell(_NOTHING)
    if not record["wrong"]:
        return Cell("right", "right")
    by = record["wrong_by"]
    note = f"off by {wording.percent(by)} of the largest output" if by is not None else ""
    return Cell("Wrong", "wrong", note, bad=True)


def _peak(document: Document) -> str:
    peak = wording.peak(document)
    return "" if peak is None else f" PSNR and SSIM are by a peak of {peak:.4g}."


def _tolerance(found: Sequence[dict[str, Any]]) -> str:
    known = {record["tolerance"] for record in found if record["tolerance"] is not None}
    if not known:
        return ""
    allowed = wording.percent(max(known))
    return (
        f" A backend is right where it is at most {allowed} of the largest output off what native arithmetic makes of "
        "the same weights."
    )


def _where(document: Document, backend: str, cell: dict[str, Any]) -> Cell:
    return _at(document, backend, wording.backend_words(backend, cell) if cell else wording.place_words(backend))


def _at(document: Document, place: str, shown: str) -> Cell:
    return Cell(shown, shown.lower(), "in software, no GPU" if wording.software_words(document, place) else "")


def _problem_of(document: Document, variant: dict[str, Any], place: str) -> str:
    """What happened there, or why nothing was measured."""
    # Where WebAssembly is not told apart by its threads, either may say it.
    for cell in sorted(CELLS, key=lambda cell: cell != place):
        found = (variant["latency"] or {}).get(cell)
        if place in (cell, cell.partition("-")[0]) and found and found["problem"]:
            return f"not measured: {printable(found['problem'], at_most=400)}"
    return wording.why(document, "accuracy", variant["name"], place)


# Latency


def _latency_rows(document: Document) -> Iterator[tuple[dict[str, Any], str, dict[str, Any] | None]]:
    """Variant, backend and cell, grouped by backend so that what is compared stands together."""
    for backend in CELLS:
        for variant in document["variants"]:
            if backend in (variant["latency"] or {}):
                yield variant, backend, variant["latency"][backend]


def _no_latency(document: Document) -> list[Row]:
    return [
        Row((_name(variant),), wording.why(document, "latency", variant["name"], *CELLS))
        for variant in document["variants"]
        if not variant["latency"]
    ]


def cold(document: Document, picture: str) -> Table:
    """`picture` is what the first visit ends with: "picture" or "result"."""
    steps = (("download", "Download"), ("decode", "Decode"), ("compile", "Compile"), ("first_run", "First run"))
    rows = []
    for variant, backend, cell in _latency_rows(document):
        start = (_name(variant), _where(document, backend, cell or {}))
        found = (cell or {}).get("cold")
        if not cell or not found:
            rows.append(Row(start, _missing_cell(document, variant, backend, cell)))
            continue
        pictures = [s["first_picture"] for s in found["samples"] if s["first_picture"] is not None]
        spread = f"{wording.milliseconds(min(pictures))} to {wording.milliseconds(max(pictures))}" if pictures else ""
        count = len(found["samples"])
        cells = (_cell(found[key], wording.milliseconds) for key, _ in steps)
        total = _cell(found["first_picture"], wording.milliseconds, spread)
        rows.append(Row((*start, total, *cells, Cell(str(count), count))))
    columns = [("Variant", False), ("Backend", False), (f"First {picture}", True)]
    columns += [(label, True) for _, label in steps] + [("Runs", True)]
    networks = wording.networks(document)
    network = f" Network: {', '.join(networks)}." if networks else ""
    if wording.is_cached(document):
        visit = "A second visit: each time by a visitor who was here once and has the weights in the browser's cache"
    else:
        visit = "A first visit: a fresh browser each time"
    caption = f"{visit}, medians, with the smallest and the largest.{network}"
    return _table("cold", caption, columns, rows + _no_latency(document))


def _missing_cell(document: Document, variant: dict[str, Any], backend: str, cell: dict[str, Any] | None) -> str:
    if cell and cell["problem"]:
        return f"not measured: {printable(cell['problem'], at_most=400)}"
    return wording.why(document, "latency", variant["name"], backend)


def warm(document: Document) -> Table:
    rows = []
    for variant, backend, cell in _latency_rows(document):
        start = (_name(variant), _where(document, backend, cell or {}))
        found = (cell or {}).get("warm")
        if not cell or not found:
            rows.append(Row(start, _missing_cell(document, variant, backend, cell)))
            continue
        samples = found["samples"]
        memory = _cell(cell["memory_peak"], wording.size)
        problem = f"afterwards: {printable(cell['problem'], at_most=400)}" if cell["problem"] else ""
        note = "; ".join(part for part in (printable(cell["note"] or "", at_most=400), problem) if part)
        median = _cell(found["median"], wording.milliseconds, note)
        middle = _spread(samples, wording.milliseconds)
        ratio = _cell(
            found["ratio"],
            wording.times,
            _spread(pairs(document, variant, backend), wording.times).text.replace(_NOTHING, ""),
        )
        p95 = _cell(found["p95"], wording.milliseconds)
        rows.append(Row((*start, median, middle, p95, ratio, Cell(str(len(samples)), len(samples)), memory)))
    columns = [
        ("Variant", False),
        ("Backend", False),
        ("Median", True),
        ("Middle half", True),
        ("95th percentile", True),
        ("Times float32", True),
        ("Runs", True),
        ("Peak memory", True),
    ]
    caption = (
        "One run after the first. The variants take turns, so that a noisy machine spoils all alike; times float32 is "
        f"the median over pairs of the same round, below 1 is faster.{_memory(document)}"
    )
    return _table("warm", caption, columns, rows + _no_latency(document))


def _memory(document: Document) -> str:
    how = {
        wording.name_of(cell["memory_how"])
        for _, _, cell in _latency_rows(document)
        if cell and cell["memory_how"] and cell["memory_peak"] is not None
    }
    return f" Peak memory by {', '.join(sorted(how))}." if how else ""


def _spread(samples: Sequence[float], words: Callable[[float], str]) -> Cell:
    """From the first to the third quartile."""
    if len(samples) < 2:
        return Cell(_NOTHING)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Cell(f"{words(low)} to {words(high)}", high - low)


# Layers


def layers(document: Document) -> Table | None:
    """The layers of all variants, the one that hurts most first; None where none was measured."""
    found = [(variant, layer) for variant in document["variants"] for layer in variant["layers"] or ()]
    if not found:
        return None
    found.sort(key=lambda entry: _harm(entry[1]))
    rows = []
    for variant, layer in found[:LAYERS_SHOWN]:
        name, mode = wording.name_of(layer["name"]), wording.name_of(layer["mode"] or "")
        shape = " × ".join(map(str, layer["shape"]))
        shown = wording.name_of(variant["name"])
        cells = (
            Cell(name, name.lower(), shape),
            Cell(shown, shown.lower()),
            Cell(mode or _NOTHING, mode),
            _cell(layer["bytes"], wording.size),
            _cell(layer["sqnr_db"], wording.decibels),
            _cell(layer["output_sqnr_db"], wording.decibels),
        )
        rows.append(Row(cells))
    columns = [
        ("Layer", False),
        ("Variant", False),
        ("Stored as", False),
        ("Bytes", True),
        ("SQNR of its weights", True),
        ("SQNR of the output", True),
    ]
    more = len(found) - LAYERS_SHOWN
    caption = "What each layer costs, worst first: the output's SQNR with only that layer compressed."
    if more > 0:
        caption += f" The {LAYERS_SHOWN} worst; {more:,} more stand in the JSON data."
    return _table("layers", caption, columns, rows)


def _harm(layer: dict[str, Any]) -> tuple[float, float]:
    """Smaller is worse: the output's SQNR where it is known, then that of the weights."""
    output, weights = layer["output_sqnr_db"], layer["sqnr_db"]
    return (
        output if output is not None else float("inf"),
        weights if weights is not None else float("inf"),
    )
