"""Variants of a network beside its float32 original: size, accuracy, and latency in a real browser.

`measure` makes one JSON document of a plan; `shrink.bench.document` says what stands in it, and reads it back;
`shrink.bench.report` makes a page of it. The document is all that passes between measuring and showing.
"""

from __future__ import annotations

from shrink.bench.measuring import measure
from shrink.bench.plan import (
    BACKENDS,
    MODES,
    NETWORKS,
    ORIGINAL,
    BrowserOptions,
    Cell,
    Inputs,
    OnDocument,
    Plan,
    Sites,
    Values,
    Variant,
)

__all__ = [
    "BACKENDS",
    "MODES",
    "NETWORKS",
    "ORIGINAL",
    "BrowserOptions",
    "Cell",
    "Inputs",
    "OnDocument",
    "Plan",
    "Sites",
    "Values",
    "Variant",
    "measure",
]
