"""Steps that lay the values of a weight out anew, and back again, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reshape", "Spread", "Step", "Transpose", "forward", "joined"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Reshape:
    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, x: Array) -> Array:
        return x.reshape(self.after)

    def undo(self, x: Array) -> Array:
        return x.reshape(self.before)


@dataclass(frozen=True)
class Transpose:
    order: tuple[int, ...]

    def apply(self, x: Array) -> Array:
        moved: Array = x.transpose(self.order)
        return moved

    def undo(self, x: Array) -> Array:
        moved: Array = x.transpose([self.order.index(axis) for axis in range(x.ndim)])
        return moved


@dataclass(frozen=True)
class Spread:
    """The kernel axes of a transposed convolution, those after the first two, as (phases …, taps …).

    Per axis and kernel index: which phase and which tap it is. Where a phase has no weight for a tap there is a 0,
    which goes again on the way back.
    """

    phase: tuple[tuple[int, ...], ...]
    tap: tuple[tuple[int, ...], ...]

    @property
    def phases(self) -> tuple[int, ...]:
        return tuple(max(numbers) + 1 for numbers in self.phase)

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(max(numbers) + 1 for numbers in self.tap)

    def apply(self, x: Array) -> Array:
        spread = np.zeros((*x.shape[:2], *self.phases, *self.taps), x.dtype)
        spread[self._places()] = x
        return spread

    def undo(self, x: Array) -> Array:
        kernel: Array = x[self._places()]
        return kernel

    def _places(self) -> tuple[Any, ...]:
        return (slice(None), slice(None), *np.ix_(*self.phase), *np.ix_(*self.tap))


Step = Reshape | Transpose | Spread


def joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same with neighbouring transpositions as one, so that equal views compare equal; idle steps are left out."""
    kept: list[Step] = []
    for step in steps:
        last = kept[-1] if kept else None
        if isinstance(step, Transpose) and isinstance(last, Transpose):
            step = Transpose(tuple(last.order[axis] for axis in step.order))
            kept.pop()
        if isinstance(step, Transpose) and step.order == tuple(range(len(step.order))):
            continue
        if not isinstance(step, Reshape) or step.before != step.after:
            kept.append(step)
    return tuple(kept)


def forward(steps: Sequence[Step], x: Array) -> Array:
    for step in steps:
        x = step.apply(x)
    return x
