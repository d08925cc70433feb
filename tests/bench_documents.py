"""Documents of benchmarks for tests: the sample, and made-up ones with known numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from shrink.bench.document import checked, read

SAMPLE = Path(__file__).parent / "samples_bench" / "document.json"

Document = dict[str, Any]


def sample() -> Document:
    return copy.deepcopy(read(SAMPLE))


def bare(*variants: Document, **more: Any) -> Document:
    """A document with nothing but these variants, the first of them the original."""
    start = {"shrink_bench": 1, "title": "Bare", "created": "2026-01-02T03:04:05Z", "partial": False}
    return checked({**start, "variants": [variant("float32"), *variants], "not_measured": [], **more})


def variant(name: str, **parts: Any) -> Document:
    return {"name": name, "mode": None, "file": None, **parts}


def size(wire: int, visit: int | None = None) -> Document:
    visits = None if visit is None else {"wasm": visit}
    return {"file": wire + 1000, "wire_raw": wire, "wire_gzip": wire + 10, "first_visit": visits}


def pictures_accuracy(mean: float, worst: float, **more: Any) -> Document:
    return {"psnr_db": {"mean": mean, "worst": worst, "samples": [worst, 2 * mean - worst]}, "exact": False, **more}


def exact() -> Document:
    figure = {"mean": None, "worst": None, "samples": [None, None]}
    return {"psnr_db": figure, "exact": True, "relative_error": 0.0, "max_error": 0.0}


def warm(median: float, ratio: float, **more: Any) -> Document:
    samples = [median * f for f in (0.9, 1.0, 1.0, 1.0, 1.2)]
    return {"warm": {"samples": samples, "median": median, "p95": median * 1.2, "ratio": ratio}, **more}
