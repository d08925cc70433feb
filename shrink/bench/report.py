"""The document of a benchmark as one HTML file that needs nothing else: no network, no other file.

The page's own script draws the charts, with Observable Plot, from the numbers that stand in the tables; without
scripts the tables remain. Its content security policy lets nothing in but what is in the file.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shrink.bench import tables, wording
from shrink.bench.charts import charts
from shrink.bench.document import CELLS, as_bytes, checked
from shrink.bench.markup import AT_MOST_BYTES, inert, template, text
from shrink.bench.pictures import Pictures, pictures
from shrink.bench.verdicts import (
    RULES,
    Tone,
    Verdict,
    best,
    first_visit,
    quality,
    quality_name,
    speeds,
    verdicts,
    weights_on_the_wire,
)
from shrink.errors import BadInput, printable

__all__ = ["AT_MOST_BYTES", "render", "summary"]

_DATA_AT_MOST = 400_000
_ENTRIES_SHOWN = 200

Document = dict[str, Any]

# Observable Plot puts this into every chart; a policy knows a style by its hash.
_PLOT_STYLE = """:where(.plot-d6a7b5) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot-d6a7b5 text),
:where(.plot-d6a7b5 tspan) {
  white-space: pre;
}"""

_BADGES: dict[Tone, str] = {
    "original": "original",
    "ship": "ship it",
    "look": "look first",
    "no": "do not ship",
    "unknown": "no verdict",
}
_SECTIONS = (
    ("verdict", "Verdict"),
    ("overview", "Overview"),
    ("first", "First visit"),
    ("size", "Size"),
    ("accuracy", "Accuracy"),
    ("latency", "Latency"),
    ("pictures", "Pictures"),
    ("layers", "Layers"),
    ("how", "How"),
    ("missing", "Not measured"),
    ("data", "Data"),
)


def render(document: Document) -> str:
    """The page of a document: the same document, the same page.

    Pictures and data that would make the file larger than AT_MOST_BYTES are left out, and the page says so.

    Raises:
        BadInput: it is not a valid document, or holds more than one page can.
        MissingDependency: jinja2 is not installed.
    """
    document = checked(document)
    page = _page(document, Pictures((), (), ()), None)
    room = AT_MOST_BYTES - len(page.encode())
    if room < 0:
        raise BadInput(f"it holds more than a page of {wording.size(AT_MOST_BYTES)} can show")
    data = _data(document)
    if len(data.base64) > min(_DATA_AT_MOST, room - 1000):
        return _page(document, pictures(document, room), None)
    return _page(document, pictures(document, room - len(data.base64) - 1000), data)


@dataclass(frozen=True)
class Data:
    """The document as it stands in the page, to be saved as `file`."""

    file: str
    base64: str
    size: str
    without_pictures: bool


def _data(document: Document) -> Data:
    bare = {**document, "variants": [{**variant, "pictures": None} for variant in document["variants"]]}
    content = as_bytes(bare)
    name = re.sub(r"[^a-z0-9]+", "-", document["title"].lower()).strip("-")[:60] or "report"
    pictured = any(variant["pictures"] for variant in document["variants"])
    return Data(f"{name}.json", base64.b64encode(content).decode(), wording.size(len(content)), pictured)


def _page(document: Document, shown: Pictures, data: Data | None) -> str:
    picture = "picture" if _is_picture(document) else "result"
    verdict = best(document)
    software = wording.software_words(document, "webgpu")
    drawn = charts(document)
    networks = wording.networks(document)
    server = document["server"]
    names = (*CELLS, *(variant["name"] for variant in document["variants"]))
    context = {
        "document": document,
        "title": document["title"] or "Benchmark",
        "created": _moment(document["created"]),
        "subtitle": _subtitle(document),
        "sections": _SECTIONS,
        "answer": _answer(document, verdict),
        "answer_tone": verdict.tone if verdict else _fallback_tone(document),
        "tiles": _tiles(document, verdict),
        "verdicts": verdicts(document),
        "badges": _BADGES,
        "checks": [{"met": check["met"], "words": _check(check)} for check in document["checks"] or ()],
        "picture": picture,
        "software": software,
        "visit": "second" if wording.is_cached(document) else "first",
        "network_words": f" (network: {', '.join(networks)})" if networks else "",
        "charts": drawn,
        "overview_missing": f"Accuracy: {wording.why(document, 'accuracy', *names)}.",
        "latency_missing": f"First visits: {_no_first_visit(document)}.",
        "layers_missing": f"Layers: {wording.why(document, 'layers', *names)}.",
        "peers_missing": wording.why(document, "peers"),
        "server_missing": wording.why(document, "server"),
        "server": _server(server, picture) if server else None,
        "tables": {
            "size": tables.sizes(document),
            "visits": tables.visits(document),
            "peers": tables.peers(document),
            "accuracy": tables.accuracy(document),
            "cold": tables.cold(document, picture),
            "warm": tables.warm(document),
            "layers": tables.layers(document),
        },
        "wrong": _wrong(document),
        "originals": shown.originals,
        "pictures": shown.groups,
        "pictures_missing": shown.missing,
        "facts": _facts(document),
        "rules": RULES,
        "not_measured": _not_measured(document),
        "data": data,
    }
    scripts = [_library("d3"), _library("plot"), text("report.js")]
    return template("report.html", scripts, {**context, "charts_json": inert(drawn)}, [_PLOT_STYLE])


def summary(document: Document) -> dict[str, str]:
    """The answer of a (checked) document in a few words, for a list of several."""
    verdict = best(document)
    parts = [_subtitle(document), _moment(document["created"]), "partial" if document["partial"] else ""]
    return {
        "title": wording.name_of(document["title"] or "Benchmark"),
        "about": " · ".join(part for part in parts if part),
        "answer": _answer(document, verdict),
        "numbers": f"{verdict.numbers[:1].upper()}{verdict.numbers[1:]}." if verdict else "",
        "tone": verdict.tone if verdict else _fallback_tone(document),
    }


# Words


def _is_picture(document: Document) -> bool:
    outputs = (document["model"] or {}).get("outputs") or ()
    return any(output["kind"] == "image" for output in outputs) or any(v["pictures"] for v in document["variants"])


def _moment(created: str) -> str:
    """As people write it, where it is a time at all."""
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    zone = "UTC" if not moment.utcoffset() else moment.strftime("%z")
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}"


def _subtitle(document: Document) -> str:
    model = document["model"]
    if not model:
        return ""
    words = f"{model['weights']:,} weights"
    return f"{wording.name_of(model['file'])}, {words}" if model["file"] else words


def _answer(document: Document, verdict: Verdict | None) -> str:
    if verdict:
        return f"Ship {verdict.name}."
    tones = [found.tone for found in verdicts(document)[1:]]
    if "look" in tones:
        return "No variant can be shipped unseen."
    if "no" in tones:
        return "Ship none of these variants."
    return "No verdict yet." if tones else "Only the original was measured."


def _fallback_tone(document: Document) -> str:
    tones = [found.tone for found in verdicts(document)[1:]]
    return next((tone for tone in ("look", "no") if tone in tones), "unknown")


def _tiles(document: Document, verdict: Verdict | None) -> list[tuple[str, str]]:
    """The few numbers that count, of the variant to ship: (number, what it is)."""
    if not verdict:
        return []
    original = document["variants"][0]
    number = next(n for n, found in enumerate(verdicts(document)) if found == verdict)
    variant = document["variants"][number]
    tiles = []
    for label, of in (("smaller weights", weights_on_the_wire), ("smaller first visit", first_visit)):
        mine, before = of(variant), of(original)
        if mine and before:
            tiles.append(
                (
                    f"{wording.times(before / mine)} ×",
                    f"{label}: {wording.size(mine)} instead of {wording.size(before)}",
                )
            )
    found = quality(document, variant)
    if found:
        pictures = "PSNR" in quality_name(document) and math.isfinite(found.merit)
        tiles.append((found.figure, "PSNR of the worst picture" if pictures else found.text))
    tiles += [(f"{wording.times(s.ratio)} ×", f"the time of a run: {s.words}") for s in speeds(document, variant)[:1]]
    return tiles


def _check(check: dict[str, Any]) -> str:
    words = f"{wording.name_of(check['variant'])}: {wording.name_of(check['check'])}"
    if check["value"] is not None:
        words += f", measured {wording.plain(check['value'])}"
    return f"{words} ({printable(check['why'], at_most=400)})" if check["why"] else words


def _no_first_visit(document: Document) -> str:
    """Why there is none: what keeps one backend from it is the reason only where there is no other."""
    measured = any(variant["latency"] for variant in document["variants"])
    return wording.why(document, "latency", *(() if measured else CELLS))


def _server(server: dict[str, Any], picture: str) -> str:
    samples, median, p95 = server["samples"], server["median"], server["p95"]
    words = f"from request to {picture}"
    if median is not None:
        words += f" {wording.milliseconds(median)} (median of {len(samples)} requests"
        words += f", 95th percentile {wording.milliseconds(p95)})" if p95 is not None else ")"
    return f"{words}. {printable(server['note'], at_most=400)}." if server["note"] else f"{words}."


def _wrong(document: Document) -> list[str]:
    """A sentence for every backend whose outputs are not what they must be."""
    found = []
    for variant in document["variants"]:
        for place, accuracy in (variant["accuracy"] or {}).items():
            if accuracy and accuracy["wrong"]:
                by = accuracy["wrong_by"]
                amount = f", off by {wording.percent(by)} of the largest output" if by is not None else ""
                found.append(
                    f"{wording.where_computed(variant, place)} does not compute {wording.name_of(variant['name'])} as "
                    f"native arithmetic does with the same weights{amount}."
                )
    return found


def _facts(document: Document) -> list[tuple[str, str]]:
    machine, browser = document["machine"] or {}, document["browser"]
    model, inputs = document["model"], document["inputs"]
    facts = []
    if machine.get("processor"):
        cores = f", {machine['cores']} cores" if machine["cores"] else ""
        facts.append(("Processor", f"{wording.name_of(machine['processor'])}{cores}"))
    labels = {
        "system": "System",
        "python": "Python",
        "numpy": "NumPy",
        "onnxruntime": "ONNX Runtime",
        "shrink": "shrink",
    }
    facts += [(label, wording.name_of(machine[key])) for key, label in labels.items() if machine.get(key)]
    if browser:
        facts.append(("Browser", wording.name_of(browser["name"] or "not said")))
        software = wording.software_words(document, "webgpu")
        if software:
            facts.append(("WebGPU adapter", software))
        elif browser["adapter"]:
            facts.append(("WebGPU adapter", wording.name_of(browser["adapter"])))
    else:
        facts.append(("Browser", wording.why(document, "latency", *CELLS)))
    if model:
        facts += [(f"Input {wording.name_of(i['name'])}", f"{i['dtype']} {_shape(i)}") for i in _few(model["inputs"])]
        facts += [(f"Output {wording.name_of(o['name'])}", f"{o['kind']} {_shape(o)}") for o in _few(model["outputs"])]
    if inputs:
        source = "seeded random numbers" if inputs["source"] == "seeded" else wording.name_of(inputs["source"])
        labelled = ", with labels" if inputs["labels"] else ""
        facts.append(("Samples", f"{inputs['count']}, {source}{labelled}"))
    return facts


def _few(entries: Sequence[dict[str, Any]] | None) -> Sequence[dict[str, Any]]:
    return (entries or [])[:10]


def _shape(tensor: dict[str, Any]) -> str:
    return " × ".join(map(str, tensor["shape"]))


def _not_measured(document: Document) -> list[tuple[str, str]]:
    entries = list(dict.fromkeys((entry["what"], entry["why"]) for entry in document["not_measured"]))
    more = len(entries) - _ENTRIES_SHOWN
    return entries[:_ENTRIES_SHOWN] + ([("And more", f"{more} entries, in the JSON data")] if more > 0 else [])


# The page


def _library(name: str) -> str:
    """A library with its licence, whose text must go where its code goes."""
    script = {"d3": "d3.min.js", "plot": "plot.umd.min.js"}[name]
    return f"/*!\n{text(f'vendor/{name}.LICENSE')}*/\n{text(f'vendor/{script}')}"
