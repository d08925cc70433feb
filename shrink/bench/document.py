"""The document of a benchmark: one JSON file between measuring and showing.

Times are in ms, sizes in bytes, of SQNR and PSNR dB. What was not measured is null, with the reason in
`not_measured`. The schema is at the end of this file; `checked` fills in what is optional with null, so that whoever
shows a document finds every key.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from shrink.bench.schema import Check, Wrong, choice, count, flag, list_of, mapping, number, or_null, record, text
from shrink.errors import BadInput
from shrink.files import atomic_file, read_all

__all__ = [
    "CACHED",
    "CELLS",
    "NAME_CHARACTERS",
    "PLACES",
    "RUNS_AT_MOST",
    "VARIANT_CHARACTERS",
    "VERSION",
    "WHAT_CHARACTERS",
    "WHY_CHARACTERS",
    "as_bytes",
    "checked",
    "cut",
    "read",
    "write",
]

VERSION = 1

CELLS = ("wasm-1", "wasm", "webgpu")
"""Where latency is measured."""

PLACES = ("native", *CELLS)
"""Where outputs are computed, each against native float32."""

CACHED = "offline-cache"
"""How the network of a cell begins whose visits are second ones, from the browser's cache."""

NAME_CHARACTERS, VARIANT_CHARACTERS, WHAT_CHARACTERS, WHY_CHARACTERS = 1024, 200, 300, 4096
"""The most that a name in the network, one of a variant, and an entry of `not_measured` have."""

RUNS_AT_MOST = 100_000
"""Of one variant on one backend, and samples of one figure."""

_AT_MOST_BYTES = 1 << 26
_PNG = b"\x89PNG\r\n\x1a\n"


def read(path: Path) -> dict[str, Any]:
    """A document that was written before, checked: it may come from anywhere.

    Raises:
        BadInput: it is none, or something in it is not what it must be.
        OutputError: it is missing or cannot be read.
    """
    try:
        value = json.loads(read_all(path, at_most=_AT_MOST_BYTES), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadInput("it is not JSON", file=path, hint="give the .json that `shrink bench` wrote") from None
    try:
        return checked(value)
    except BadInput as error:
        error.file = path
        raise


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def checked(value: object) -> dict[str, Any]:
    """The document with every key that there is, and no other; what is optional and not there is null.

    Raises:
        BadInput: it is none, or something in it is not what it must be.
    """
    if not isinstance(value, dict) or "shrink_bench" not in value:
        raise BadInput("it is not the document of a benchmark", hint="give the .json that `shrink bench` wrote")
    version = value["shrink_bench"]
    if type(version) is not int or version != VERSION:
        raise BadInput(f"it is a document of another version than {VERSION}", hint="measure again")
    try:
        document: dict[str, Any] = _DOCUMENT(value, "")
    except Wrong as error:
        raise BadInput(f"not a valid document: {error}") from None
    if not document["variants"]:
        raise BadInput("not a valid document: it has no variants")
    names = [variant["name"] for variant in document["variants"]]
    if len(set(names)) < len(names):
        raise BadInput("not a valid document: two variants have the same name")
    return document


def as_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def cut(name: str, at_most: int = NAME_CHARACTERS) -> str:
    """A name as long as a document can hold: one of an ONNX graph may have any length."""
    return name if len(name) <= at_most else name[: at_most - 1] + "…"


def write(document: dict[str, Any], path: Path) -> None:
    """Write the document, whole or not at all. Raises OutputError."""
    with atomic_file(path) as out:
        out.write(as_bytes(document))


def _png(value: object, place: str) -> str:
    """The base64 of a PNG file, without line breaks."""
    data = text(1 << 22)(value, place)
    try:
        start = base64.b64decode(data, validate=True)[: len(_PNG)]
    except (binascii.Error, ValueError):
        start = b""
    if start != _PNG:
        raise Wrong(place, "is not a PNG picture in base64")
    return str(data)


_name = text(NAME_CHARACTERS)
_ms = number(0)
_bytes = count
_share = number(0, 1)
_samples = list_of(_ms, RUNS_AT_MOST)
_shape = list_of(count, 32)


def _per(places: tuple[str, ...], inner: Check) -> Check:
    return mapping(or_null(inner), places)


# A figure of every sample is null where nothing differs, or where it cannot be said.
_FIGURE = record({"samples": list_of(or_null(number()), RUNS_AT_MOST)}, {"mean": number(), "worst": number()})

_ACCURACY = record(
    {},
    {
        "exact": flag,  # nothing differs from the original, so that PSNR and SQNR are infinite
        "problem": text(4096),  # why there are no numbers, or some are missing: the outputs hold NaN …
        "psnr_db": _FIGURE,
        "ssim": _FIGURE,
        "max_error": number(0),
        "relative_error": number(0),
        "cosine": number(-1, 1),
        "top1_agreement": _share,
        "top5_agreement": _share,
        "top1_accuracy": _share,
        "perplexity": number(0),
        "worst_input": count,
        # Of a backend alone: its outputs are not what native arithmetic makes of the same weights.
        "wrong": flag,
        "wrong_by": number(0),  # the largest |difference|, as a share of the largest |output|
        "tolerance": number(0),
    },
)

_SIZE = record(
    {"file": _bytes},
    {
        "wire_raw": _bytes,
        "wire_gzip": _bytes,
        "wire_brotli": _bytes,
        "graph": _bytes,
        "bits_per_weight": number(0),
        "runtime": _per(("wasm", "webgpu"), record({"raw": _bytes}, {"gzip": _bytes, "brotli": _bytes})),
        "first_visit_how": text(),
        "page": record({"raw": _bytes}, {"gzip": _bytes, "brotli": _bytes}),
        "first_visit": mapping(or_null(_bytes), ("wasm", "webgpu")),
        "first_visit_parts": _per(
            ("wasm", "webgpu"), record({"weights": _bytes, "graph": _bytes, "runtime": _bytes, "page": _bytes})
        ),
    },
)

_STEPS = {"download": _ms, "decode": _ms, "compile": _ms, "first_run": _ms, "first_picture": _ms}

_LATENCY = record(
    {},
    {
        "threads": count,
        "note": text(4096),
        "problem": text(4096),
        "memory_peak": _bytes,
        "memory_how": text(),
        "cold": record({"samples": list_of(record({}, _STEPS), 1000)}, {"network": text(), **_STEPS}),
        "warm": record({"samples": _samples}, {"median": _ms, "p95": _ms, "ratio": number(0)}),
    },
)

_PICTURES = record(
    {"input": count, "original": _png, "variant": _png, "difference_x10": _png},
    {"note": text()},  # which part of a larger picture this is
)

_LAYER = record(
    {"name": _name, "shape": _shape},
    {"mode": text(), "sqnr_db": number(), "output_sqnr_db": number(), "bytes": _bytes},
)

_VARIANT = record(
    {"name": text(VARIANT_CHARACTERS)},
    {
        "mode": text(),
        "file": text(4096),
        "size": _SIZE,
        "sqnr_db": number(),  # of all weights of two dimensions or more, as for the peers
        "accuracy": _per(PLACES, _ACCURACY),
        "pictures": _per(("worst", "typical"), _PICTURES),
        "layers": list_of(_LAYER, 100_000),
        "latency": _per(CELLS, _LATENCY),
    },
)

_DOCUMENT = record(
    {
        "shrink_bench": count,
        "title": text(),
        "created": text(64),
        "partial": flag,
        "variants": list_of(_VARIANT, 64),
        "not_measured": list_of(record({"what": text(WHAT_CHARACTERS), "why": text(WHY_CHARACTERS)}), 1000),
    },
    {
        "command": text(100_000),
        "machine": record(
            {},
            {
                "processor": text(),
                "cores": count,
                "system": text(),
                "python": text(),
                "numpy": text(),
                "onnxruntime": text(),
                "shrink": text(),
            },
        ),
        "browser": record({}, {"name": text(), "adapter": text(), "software_adapter": flag}),
        "model": record(
            {"weights": count},
            {
                "file": text(4096),
                "inputs": list_of(record({"name": _name, "dtype": text(), "shape": _shape}), 10_000),
                "outputs": list_of(
                    record(
                        {"name": _name, "shape": _shape, "kind": choice("image", "classes", "sequence", "other")},
                        {"peak": number(0)},  # of PSNR and SSIM, for pictures
                    ),
                    10_000,
                ),
            },
        ),
        "inputs": record({"source": text(4096), "count": count}, {"labels": flag}),
        "peers": list_of(
            record({"name": text()}, {"bytes": _bytes, "gzip": _bytes, "sqnr_db": number(), "note": text(4096)}),
            1000,
        ),
        "server": record({"samples": _samples}, {"median": _ms, "p95": _ms, "note": text(4096)}),
        "checks": list_of(
            record({"check": text(), "variant": text(200), "met": flag}, {"value": number(), "why": text(4096)}), 10_000
        ),
    },
)
