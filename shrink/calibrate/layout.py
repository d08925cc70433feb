"""How the matrix of a layer is stored: which axes of the tensor are rows with a scale each, and which are columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.layers import Layer

__all__ = ["Layout", "layout", "one_axis"]

I64 = NDArray[np.int64]

_AXES_AT_MOST = 6


@dataclass(frozen=True)
class Layout:
    """The tensor, reshaped to `view`, has the axes `rows`, in this order, as rows of the stored matrix, the others as
    columns. `row_of` (groups, outputs) and `column_of` (inputs) say which scale a row or column of the layer's matrix
    has, by number.
    `rows_from` and `columns_from` say for each stored row and column which of these numbers it has.
    """

    view: tuple[int, ...]
    rows: tuple[int, ...]
    row_of: I64
    rows_from: I64
    columns_from: I64 | None

    def stored(self, x: NDArray[np.int32]) -> NDArray[np.int32]:
        """A tensor of codes as the stored matrix."""
        order = [*self.rows, *(axis for axis in range(len(self.view)) if axis not in self.rows)]
        laid: NDArray[np.int32] = x.reshape(self.view).transpose(order).reshape(len(self.rows_from), -1)
        return laid


def layout(layer: Layer) -> Layout:
    """The layout with most scales that fits the layer; at worst one scale for all."""
    shape = (layer.groups, layer.outputs, layer.inputs)
    row = np.arange(layer.groups * layer.outputs).reshape(shape[:2])
    column = np.arange(layer.inputs)
    columns = _labels(layer, np.broadcast_to(column, shape))
    for rows in (row, layer.bias_rows()):
        labels = _labels(layer, np.broadcast_to(rows[:, :, None], shape))
        different = len(np.unique(rows))
        for view, axes in _candidates(layer):
            lines = math.prod(view[axis] for axis in axes)
            if lines != different:
                continue
            order = [*axes, *(axis for axis in range(len(view)) if axis not in axes)]
            of_rows = labels.reshape(view).transpose(order).reshape(lines, -1)
            of_columns = columns.reshape(view).transpose(order).reshape(lines, -1)
            if (of_rows == of_rows[:, :1]).all() and (of_columns == of_columns[:1]).all():
                return Layout(view, axes, rows, of_rows[:, 0], of_columns[0])
    one = np.zeros(shape[:2], np.int64)
    return Layout(layer.shape, (0,), one, np.zeros(layer.shape[0], np.int64), None)


def one_axis(layer: Layer) -> Layout:
    """The layout whose rows are the tensor's one axis with most scales that the matrix's rows can have, which is that
    of the output channels; no axis, and one scale for all, where it has none. Columns have no scales.
    """
    there = ~layer.extra()
    numbers, axis = np.zeros(there.shape[:2], np.int64), None
    for candidate, line in enumerate(np.indices(layer.shape, np.float64, sparse=True)):
        if line.size <= (1 if axis is None else layer.shape[axis]):
            continue
        places = layer.matrix(np.broadcast_to(line, layer.shape))
        # Rows with nothing but extra places may have any scale.
        found = places.max(axis=2, where=there, initial=0)
        if (places == found[:, :, None])[there].all():
            numbers, axis = found.astype(np.int64), candidate
    if axis is None:
        return Layout(layer.shape, (), numbers, np.zeros(1, np.int64), None)
    return Layout(layer.shape, (axis,), numbers, np.arange(layer.shape[axis]), None)


def _labels(layer: Layer, numbers: I64) -> I64:
    """Numbers of matrix places as those of tensor places."""
    matrix = np.ascontiguousarray(numbers, np.float64)
    return layer.weight(matrix).astype(np.int64)  # type: ignore[arg-type]


def _candidates(layer: Layer) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    views = [layer.shape]
    if layer.kind == "deconv":
        channels, *rest = layer.shape
        kernel = rest[1:]
        # Phases and taps are parts of the kernel's axes, where its strides divide them.
        for strides in itertools.product(*(_divisors(n) for n in kernel)):
            split = [n for size, s in zip(kernel, strides, strict=True) for n in (size // s, s)]
            views.append((layer.groups, channels // layer.groups, rest[0], *split))
    for view in views:
        axes = range(len(view))
        if len(view) <= _AXES_AT_MOST or layer.kind == "deconv":
            for count in range(len(view) + 1):
                yield from ((view, rows) for rows in itertools.combinations(axes, count))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
