"""Rounding with feedback of the errors, by encoder.wasm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shrink.wasm import Instance

__all__ = ["ENCODER", "Feedback", "feedback"]

F64 = NDArray[np.float64]

ENCODER = Path(__file__).parent / "encoder.wasm"


class Feedback:
    """Rounding with feedback of the errors, for the blocks of columns of one layer.

    `lg` (m, m) is unit lower triangular and says what an error in a row is worth in the rows before it.

    Raises:
        MissingDependency: wasmtime is not installed.
    """

    def __init__(self, lg: F64):
        self._m = len(lg)
        self._instance = Instance(ENCODER)
        strips_bytes = 8 * -(-self._m // 4) * 4 * self._m
        self._strips, self._free, _ = self._instance.lay_out(strips_bytes, 8 * lg.size)
        # The matrix as it was given is not needed again: the first block lies over it.
        self._instance.view(self._free, lg.shape, "<f8")[:] = lg
        self._instance.call("strips", self._strips, self._free, self._m)

    def block(
        self, w: F64, later: F64, lh: F64, row_steps: F64, column_steps: F64, deadzone: float
    ) -> tuple[NDArray[np.int32], F64]:
        """Codes and errors (codes · steps − w), both (m, n), of a block of columns; encoder.c has the formula.

        `later` (m, n) is what the errors of the columns behind the block are worth in it, `lh` (n, n) is unit lower
        triangular, the step of a weight is that of its row times that of its column. All are finite, steps positive.
        """
        m, n = w.shape
        wide = -(-n // 4) * 4
        sizes = [8 * m * n, 8 * m * n, 8 * n * n, 8 * m, 8 * n, 4 * m * n, 8 * m * n, 8 * m * wide, 8 * 4 * wide]
        places = self._instance.lay_out(*sizes, start=self._free)
        view = self._instance.view
        for place, values in zip(places, (w, later, lh, row_steps, column_steps), strict=False):
            view(place, values.shape, "<f8")[:] = values
        *inputs, codes, errors, known, sums = places[:-1]
        view(known, (m * wide,), "<f8")[:] = 0
        weights, behind, factors, rows, columns = inputs
        self._instance.call(
            *("feedback", m, n, weights, behind, self._strips, factors, rows, columns, float(deadzone)),
            *(codes, errors, known, sums),
        )
        return view(codes, (m, n), "<i4").copy(), view(errors, (m, n), "<f8").copy()


def feedback(
    w: F64, later: F64, lg: F64, lh: F64, row_steps: F64, column_steps: F64, deadzone: float
) -> tuple[NDArray[np.int32], F64]:
    """`Feedback(lg).block(…)`, for a layer that is one block."""
    return Feedback(lg).block(w, later, lh, row_steps, column_steps, deadzone)
