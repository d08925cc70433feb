"""Where the inputs of a linear map stand in the value that goes in: at every position, one row of numbers per group.

A position is an output pixel of a convolution, an output block of a transposed one, a vector of a dense layer, a time
step of a recurrent one. Rows are made when they are asked for, some positions at a time: all patches of a picture
would be many times as large as the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput

__all__ = ["Indices", "Reads", "Rows", "States", "Vectors", "Window"]

Array = NDArray[Any]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

# A picture with its padding: more is a mistake in the graph, not a picture.
_AT_MOST_PADDED = 1 << 28


@dataclass(frozen=True)
class Rows:
    """`count` positions in `samples` samples; `write(positions, out)` fills out, of (groups, positions, inputs)."""

    count: int
    samples: int
    write: Callable[[I64, F32], None]


class Reads(Protocol):
    def rows(self, x: Array, groups: int, inputs: int, initial: Array | None) -> Rows:
        """The rows of one value. Raises BadInput where its shape does not fit."""
        ...


@dataclass(frozen=True)
class Window:
    """Patches under a kernel that moves over a picture (N, C, *axes), zeros beyond its edges.

    Per axis: the distances of the kernel's taps from its first pixel, how far it moves, and the padding (begin, end),
    or the ONNX name of the rule that gives it. A row is (channels of the group, taps), in C order.
    """

    taps: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | Literal["SAME_UPPER", "SAME_LOWER"]

    def rows(self, x: Array, groups: int, inputs: int, initial: Array | None) -> Rows:
        taps = math.prod(map(len, self.taps))
        channels = groups * inputs // taps
        if x.ndim != 2 + len(self.taps) or x.shape[1] != channels:
            wanted = ["N", str(channels), *["…"] * len(self.taps)]
            raise BadInput(f"its inputs are {list(x.shape)}, not [{', '.join(wanted)}]")
        pads = self._padding(x.shape[2:])
        sizes = [before + n + after for n, (before, after) in zip(x.shape[2:], pads, strict=True)]
        counts = [(n - max(at) - 1) // stride + 1 for n, at, stride in zip(sizes, self.taps, self.strides, strict=True)]
        if min(counts) < 1:
            raise BadInput(f"its inputs are {list(x.shape)}, smaller than its kernel")
        if x.shape[0] * channels * math.prod(sizes) > _AT_MOST_PADDED:
            raise BadInput(f"its inputs are {list(x.shape)}, too large with their padding")
        # Channels last, so that a pixel is one piece of memory.
        padded = np.zeros((x.shape[0], *sizes, channels), np.float32)
        spans = [slice(before, before + n) for n, (before, _) in zip(x.shape[2:], pads, strict=True)]
        inside = (slice(None), *spans)
        padded[inside] = np.moveaxis(x, 1, -1)
        pixels = padded.reshape(-1, channels)
        pitches = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        tap_at = np.zeros(1, np.int64)
        for at, pitch in zip(self.taps, pitches, strict=True):
            tap_at = (tap_at[:, None] + np.array(at, np.int64) * pitch).reshape(-1)
        moves = [math.prod(sizes), *(stride * pitch for stride, pitch in zip(self.strides, pitches, strict=True))]

        def write(positions: I64, out: F32) -> None:
            first = np.zeros(len(positions), np.int64)
            for index, move in zip(np.unravel_index(positions, (x.shape[0], *counts)), moves, strict=True):
                first += index * move
            patches = pixels.take(first[:, None] + tap_at, axis=0)
            patches = patches.reshape(len(positions), taps, groups, channels // groups)
            out.reshape(*out.shape[:2], channels // groups, taps)[...] = patches.transpose(2, 0, 3, 1)

        return Rows(x.shape[0] * math.prod(counts), x.shape[0], write)

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        if not isinstance(self.pads, str):
            return list(self.pads)
        pads = []
        for n, taps, stride in zip(sizes, self.taps, self.strides, strict=True):
            both = max(0, (-(-n // stride) - 1) * stride + max(taps) + 1 - n)
            small, large = both // 2, both - both // 2
            pads.append((small, large) if self.pads == "SAME_UPPER" else (large, small))
        return pads


@dataclass(frozen=True)
class Vectors:
    """Vectors along the last axis, or the one before it (`column`), times `scale`.

    `lead` are the leading axes of a weight that is a stack of matrices: those above 1 are its groups.
    """

    column: bool = False
    lead: tuple[int, ...] = ()
    scale: float = 1.0

    def rows(self, x: Array, groups: int, inputs: int, initial: Array | None) -> Rows:
        if x.ndim == 1:
            x = x[None]
        elif x.ndim and self.column:
            x = x.swapaxes(-1, -2)
        if not x.ndim or x.shape[-1] != inputs:
            axis = "last but one" if self.column else "last"
            raise BadInput(f"its inputs are {list(x.shape)}, of which the {axis} axis should be {inputs}")
        try:
            lead = np.broadcast_shapes(x.shape[:-2], self.lead)
        except ValueError:
            raise BadInput(f"its inputs are {list(x.shape)}, which do not fit its shape") from None
        own = [1] * (len(lead) - len(self.lead)) + list(self.lead)
        order = sorted(range(len(lead)), key=lambda axis: own[axis] == 1)
        x = np.broadcast_to(x, (*lead, *x.shape[-2:])).transpose(*order, len(lead), len(lead) + 1)
        stacked = math.prod(self.lead)
        # Both directions of a recurrent layer see the same vectors.
        vectors = x.reshape(stacked, -1, inputs) if x.size else np.zeros((stacked, 0, inputs), np.float32)

        def write(positions: I64, out: F32) -> None:
            out[...] = vectors[:, positions]
            if self.scale != 1:
                out *= np.float32(self.scale)

        return Rows(vectors.shape[1], 1, write)


@dataclass(frozen=True)
class States:
    """What a recurrent layer remembers at each step: its state before it, out of all its states, Y.

    Y is (steps, directions, N, hidden), or (N, steps, directions, hidden) where `batch_first`; the initial states are
    (directions, N, hidden) or (N, directions, hidden), zeros where there are none. Each direction is a group;
    `backward` says which of them begin at the last step. That some sequences may be shorter is not minded.
    """

    backward: tuple[bool, ...]
    batch_first: bool

    def rows(self, x: Array, groups: int, inputs: int, initial: Array | None) -> Rows:
        if x.ndim != 4 or x.shape[2 if self.batch_first else 1] != groups or x.shape[3] != inputs:
            raise BadInput(f"its states are {list(x.shape)}, not those of {groups} directions of {inputs} values")
        after = x.transpose(2, 1, 0, 3) if self.batch_first else x.transpose(1, 0, 2, 3)
        first = np.zeros((groups, after.shape[2], inputs), np.float32)
        if initial is not None:
            given = initial.swapaxes(0, 1) if self.batch_first and initial.ndim == 3 else initial
            if given.shape != first.shape:
                raise BadInput(f"its initial states are {list(initial.shape)}, its states {list(x.shape)}")
            first = given.astype(np.float32)
        before = np.zeros(after.shape, np.float32)
        if after.shape[1]:
            for direction, backward in enumerate(self.backward):
                if backward:
                    before[direction, :-1], before[direction, -1] = after[direction, 1:], first[direction]
                else:
                    before[direction, 1:], before[direction, 0] = after[direction, :-1], first[direction]
        states = before.reshape(groups, math.prod(before.shape[1:3]), inputs)

        def write(positions: I64, out: F32) -> None:
            out[...] = states[:, positions]

        return Rows(states.shape[1], 1, write)


@dataclass(frozen=True)
class Indices:
    """Rows of a table, by number: each input is a 1 and otherwise zeros. From the end where they are negative."""

    def rows(self, x: Array, groups: int, inputs: int, initial: Array | None) -> Rows:
        numbers = self.numbers(x, inputs)

        def write(positions: I64, out: F32) -> None:
            out[...] = 0
            out[:, np.arange(len(positions)), numbers[positions]] = 1

        return Rows(numbers.size, 1, write)

    @staticmethod
    def numbers(x: Array, inputs: int) -> I64:
        """The numbers from 0 to inputs − 1, flat. Raises BadInput where one is not."""
        flat = x.reshape(-1)
        if flat.dtype.kind not in "iu" and not np.array_equal(flat, np.trunc(flat)):
            raise BadInput("its inputs are not whole numbers")
        if flat.size and not (-inputs <= flat.min() and flat.max() < inputs):
            raise BadInput(f"its inputs are not numbers of its {inputs} rows")
        whole = flat.astype(np.int64)
        return np.where(whole < 0, whole + inputs, whole)
