"""How long runs are repeated, and what their times come to: the same in the browser and before the server."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from shrink.bench.document import RUNS_AT_MOST
from shrink.bench.plan import BrowserOptions

__all__ = ["WARM_UP", "distribution", "is_enough", "is_too_long", "share"]

WARM_UP = 2
"""Runs of a page that do not count."""

# A network that takes seconds would take hours for the runs of all its variants.
_SECONDS_AT_MOST = 300.0
_RUNS_AT_LEAST = 3


def distribution(samples: Sequence[float]) -> dict[str, Any]:
    """The times in ms, one or more, with their median and 95th percentile: what the document has of them."""
    return {
        "samples": list(samples),
        "median": round(statistics.median(samples), 3),
        "p95": round(float(np.percentile(samples, 95)), 3),
    }


def is_enough(runs: int, seconds: float, options: BrowserOptions) -> bool:
    """Whether as much is measured as was asked for, or as a document can hold."""
    return runs >= RUNS_AT_MOST or (runs >= options.runs and seconds >= options.seconds)


def is_too_long(runs: int, seconds: float, options: BrowserOptions) -> bool:
    """Whether the few runs that there are must do."""
    return runs >= _RUNS_AT_LEAST and seconds > max(_SECONDS_AT_MOST, options.seconds)


def share(runs: int, seconds: float, options: BrowserOptions) -> float:
    """How much of what was asked for is done, from 0 to 1."""
    return min(1.0, runs / max(options.runs, 1), seconds / options.seconds if options.seconds else 1.0)
