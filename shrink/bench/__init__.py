"""Variants of a network beside its float32 original: size, accuracy, and latency in a real browser.

`measure` makes one JSON document of a plan; `shrink.bench.document` says what stands in it, and reads it back;
`shrink.bench.report` makes a page of it. The document is all that passes between measuring and showing.
"""

from __future__ import annotations

from typing import Any

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
from shrink.progress import Progress, silent

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


def measure(plan: Plan, on_document: OnDocument = lambda document: None, progress: Progress = silent) -> dict[str, Any]:
    """The document of a plan: see `shrink.bench.measuring.measure`."""
    # What that needs takes longer to load than most commands take to run.
    from shrink.bench import measuring

    return measuring.measure(plan, on_document, progress)
