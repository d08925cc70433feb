"""Tensors of one number per channel: biases, and what norms multiply by and add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate import entries as storing
from shrink.model import DTYPES, Entry, Quantized
from shrink.quantizers import by_mode

__all__ = ["Note", "is_vector", "step_of", "stored"]

F32 = NDArray[np.float32]

# From this step on float16 is exact beside it.
_HALVES_FROM = 5e-4
# The most that is taken off a weight that seems to have no effect.
_COARSEST = 7


@dataclass(frozen=True)
class Note:
    """What became of a tensor that is no layer's weight, and why."""

    mode: str
    why: str


def is_vector(entry: Entry) -> bool:
    return entry.size > 1 and sum(n > 1 for n in entry.shape) < 2 and entry.dtype == DTYPES["F32"]


def step_of(x: F32, base: float, cost: float) -> float:
    """The step of values each of which costs so much; the largest is at least `_COARSEST` of them."""
    coarsest = (float(np.abs(x).max(initial=0)) or 1.0) / _COARSEST
    step = min(base / math.sqrt(cost), coarsest) if cost > 0 else coarsest
    return max(step, float(np.finfo(np.float32).tiny))


def stored(
    entry: Entry, x: F32, *, step: float, base: float, cost: float | None, moved: str | None, effort: int
) -> tuple[Entry, Note] | None:
    """What is stored for the values `x` of a tensor; None where they stay as they are.

    `moved` says where the numbers of one that is constant now went; `cost` is what one of its values costs. Without a
    cost it is in float16 where `step`, that of the whole network, is far coarser than that.
    """
    if moved is not None:
        return storing.small(entry.name, x, 0.0, effort), Note("constant", moved)
    if cost is not None:
        made = storing.small(entry.name, x, step_of(x, base, cost), effort)
        return made, Note("vector", "one number per channel: a step by its sensitivity")
    if step < _HALVES_FROM or not is_vector(entry):
        return None
    half = by_mode("float16").quantize(entry.name, np.ascontiguousarray(x, np.float32).reshape(entry.shape))
    # Below 2^-14 float16 loses its precision: a small variance would not survive.
    if isinstance(half, Quantized) and np.all(np.abs(half.array - x) <= np.abs(x) * 2.0**-10):
        return half, Note("float16", "one number per channel (a bias or batch-norm value)")
    return None
