"""Looking at a model and at the difference of two: numbers only, nothing is printed here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import blaming
from shrink.model import Entry, Model, Quantized, Role
from shrink.pipeline import Difference, difference, drop_state
from shrink.progress import Progress, silent

__all__ = ["Compared", "Facts", "compare", "inspect"]

_BINS = 256


@dataclass(frozen=True)
class Facts:
    """One tensor: `stored_bytes` in the file where the format tells, else of its values; range of finite values.

    `sparsity` is the share of zeros. `entropy_bits` is the order-0 entropy of the values in 256 equal bins from
    the smallest to the largest: what a perfect coder would need per weight at 8-bit precision.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    encoding: str
    stored_bytes: int
    smallest: float | None
    largest: float | None
    sparsity: float
    entropy_bits: float
    nonfinite: int


def inspect(model: Model, progress: Progress = silent) -> Iterator[Facts]:
    """Facts of every tensor, in file order, one in memory at a time."""
    total = sum(t.size_bytes for t in model.tensors)
    done = 0
    for tensor in model.tensors:
        progress(tensor.name, done, total)
        with blaming(model.source.path):
            facts = _facts(tensor)
        yield facts
        done += tensor.size_bytes
    progress("", total, total)


def _facts(tensor: Entry) -> Facts:
    values = tensor.array.reshape(-1)
    nonfinite = 0
    if values.dtype.kind == "f" and values.size and not math.isfinite(float(values.max()) - float(values.min())):
        finite = np.isfinite(values)
        nonfinite = values.size - int(np.count_nonzero(finite))
        values = values[finite]
    smallest, largest = (float(values.min()), float(values.max())) if values.size else (None, None)
    return Facts(
        tensor.name,
        tensor.shape,
        str(tensor.dtype),
        tensor.role,
        " ".join(step.name for step in tensor.steps) if isinstance(tensor, Quantized) else "",
        tensor.size_bytes,
        smallest,
        largest,
        1 - np.count_nonzero(values) / values.size if values.size else 0.0,
        _entropy_bits(values, smallest, largest),
        nonfinite,
    )


def _entropy_bits(values: NDArray[Any], smallest: float | None, largest: float | None) -> float:
    if smallest is None or largest is None or smallest == largest:
        return 0.0
    counts = np.zeros(_BINS, np.int64)
    span = largest - smallest
    if not math.isfinite(span) or span == 0.0:
        return 0.0
    for start in range(0, values.size, 1 << 18):
        share = (values[start : start + (1 << 18)].astype(np.float64) - smallest) / span
        counts += np.bincount(np.minimum((share * _BINS).astype(np.intp), _BINS - 1), minlength=_BINS)
    p = counts[counts > 0] / values.size
    return float(-(p * np.log2(p)).sum())


@dataclass(frozen=True)
class Compared:
    """One tensor of two models; `problem` says why it has no difference to show."""

    name: str
    shape: tuple[int, ...]
    difference: Difference | None
    problem: str = ""
    is_float: bool = True


def compare(original: Model, other: Model, progress: Progress = silent) -> list[Compared]:
    """Every weight of both models by name, worst SQNR first; tensors that cannot be compared come before all."""
    first, second = drop_state(original), drop_state(other)
    others = {t.name: t for t in second.tensors}
    total = sum(t.size_bytes for t in first.tensors)
    done = 0
    rows = []
    for tensor in first.tensors:
        progress(tensor.name, done, total)
        done += tensor.size_bytes
        match = others.pop(tensor.name, None)
        if match is None:
            rows.append(Compared(tensor.name, tensor.shape, None, "only in the original"))
        elif match.shape != tensor.shape:
            rows.append(Compared(tensor.name, tensor.shape, None, f"the other's shape is {match.shape}"))
        elif tensor.size:
            with blaming(original.source.path):
                values = tensor.array
            with blaming(other.source.path):
                found = difference(values, match.array)
            problem = "holds NaN, infinite or huge values" if math.isnan(found.rmse) else ""
            shown = None if problem else found
            rows.append(Compared(tensor.name, tensor.shape, shown, problem, tensor.dtype.kind == "f"))
    rows += [Compared(t.name, t.shape, None, "only in the other") for t in others.values()]
    progress("", total, total)
    return sorted(rows, key=lambda row: -math.inf if row.difference is None else row.difference.sqnr_db)
