"""Numbers of a benchmark in words: units, backends, and why something was not measured."""

from __future__ import annotations

import math
import re
from typing import Any

from shrink.bench.document import CACHED, CELLS, PLACES
from shrink.errors import printable

__all__ = [
    "MINUS",
    "TOPICS",
    "backend_words",
    "bits",
    "decibels",
    "is_cached",
    "milliseconds",
    "name_of",
    "networks",
    "peak",
    "percent",
    "place_words",
    "plain",
    "size",
    "software_words",
    "times",
    "where_computed",
    "why",
]

MINUS = "\N{MINUS SIGN}"
_NAME_CHARACTERS = 200
_PLACES = {"native": "native", "wasm-1": "WebAssembly, 1 thread", "wasm": "WebAssembly", "webgpu": "WebGPU"}

TOPICS = {
    "size": {"size", "sizes"},
    "accuracy": {"accuracy", "outputs"},
    "latency": {"latency", "browser", "chromium"},
    "layers": {"layers", "layer"},
    "pictures": {"pictures", "picture"},
    "peers": {"peers", "encoders"},
    "server": {"server"},
}
_ALL_TOPICS = set().union(*TOPICS.values())
_FILLERS = {"the", "on", "of", "in", "and", "with"}


def name_of(value: object) -> str:
    """A name from the document, safe to show: one line, no direction marks."""
    return printable(value, at_most=_NAME_CHARACTERS)


def plain(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, in powers of ten only below 0.0001 and from 10 million."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 < magnitude < 7:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    rounded = round(value, digits - 1 - magnitude)
    magnitude = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def size(size_bytes: float) -> str:
    """Bytes in decimal units: 1 MB is 10^6 bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor * 0.9995:
            return f"{plain(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def milliseconds(ms: float) -> str:
    return f"{plain(ms / 1000)} s" if ms >= 999.5 else f"{plain(ms)} ms"


def decibels(db: float) -> str:
    return f"{db:.1f} dB".replace("-", MINUS)


def percent(share: float) -> str:
    """A share in percent; 100 % and 0 % are said only of what is exactly that."""
    value = round(share * 100, 1)
    if value in (0, 100) and share not in (0, 1):
        return "more than 99.9 %" if value else "less than 0.1 %"
    return f"{value:g} %".replace("-", MINUS)


def bits(value: float) -> str:
    return f"{value:.2f}"


def times(ratio: float) -> str:
    """How many times, as 1.05 or 4.2 or 12."""
    return f"{ratio:.2f}" if ratio < 1.995 else f"{ratio:.1f}" if ratio < 9.95 else plain(max(ratio, 10), 2)


def place_words(place: str) -> str:
    return _PLACES[place]


def backend_words(backend: str, cell: dict[str, Any] | None = None) -> str:
    """The backend by its name, with the number of threads where the cell knows it."""
    threads = (cell or {}).get("threads")
    if backend == "wasm":
        return (
            f"{_PLACES[backend]}, {threads} thread{'s' if threads != 1 else ''}"
            if threads
            else f"{_PLACES[backend]}, all threads"
        )
    return _PLACES[backend]


def where_computed(variant: dict[str, Any], place: str) -> str:
    """Where outputs were computed; WebAssembly by its threads, where one alone was measured beside all."""
    apart = place == "wasm" and (variant["accuracy"] or {}).get("wasm-1")
    return backend_words(place, (variant["latency"] or {}).get(place)) if apart else place_words(place)


def networks(document: dict[str, Any]) -> list[str]:
    """What the downloads were held to, as the cells of the document say; one, unless somebody joined documents."""
    found = {
        cell["cold"]["network"]
        for variant in document["variants"]
        for cell in (variant["latency"] or {}).values()
        if cell and cell["cold"] and cell["cold"]["network"]
    }
    return sorted(map(name_of, found))


def is_cached(document: dict[str, Any]) -> bool:
    """Whether the visits were second ones, with the weights in the browser's cache."""
    found = networks(document)
    return bool(found) and all(network.startswith(CACHED) for network in found)


def peak(document: dict[str, Any]) -> float | None:
    """What PSNR and SSIM are measured by; None where the outputs are no pictures, or the document is an old one."""
    outputs = (document["model"] or {}).get("outputs") or ()
    return next((output["peak"] for output in outputs if output["peak"]), None)


def software_words(document: dict[str, Any], backend: str) -> str | None:
    """What to say beside every number of WebGPU when no GPU had a part in it."""
    browser = document["browser"] or {}
    if backend != "webgpu" or not browser.get("software_adapter"):
        return None
    adapter = browser.get("adapter")
    return f"in software{f' ({name_of(adapter)})' if adapter else ''}: no GPU took part"


def why(document: dict[str, Any], topic: str, *names: str) -> str:
    """Why something is not there: the entry of `not_measured` that says most of it.

    `topic` is a key of TOPICS; `names` are the variant and the backends that it is about. An entry of another topic,
    variant or backend says nothing of it.
    """
    known = {variant["name"].lower() for variant in document["variants"]} | {*PLACES, *CELLS}
    asked = {name.lower() for name in names}
    best, reason = 0, None
    for entry in document["not_measured"]:
        what = entry["what"].lower()
        words = set(re.findall(r"[\w+.-]+", what))
        named = {name for name in known if name in words or (" " in name and name in what)}
        topics = words & _ALL_TOPICS
        only_names = not words - named - _FILLERS
        fits = topics & TOPICS[topic] if topics else named and only_names
        score = 2 * len(named) + len(topics & TOPICS[topic])
        if fits and named <= asked and score > best:
            best, reason = score, entry["why"]
    return f"not measured: {printable(reason, at_most=400)}" if reason else "not measured"
