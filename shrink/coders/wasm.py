"""Rounding with feedback of the errors, by encoder.wasm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shrink.wasm import Instance

__all__ = ["ENCODER", "PRICES", "WIDEST", "Feedback"]

F64 = NDArray[np.float64]

# As in feedback.c: the magnitudes that have a price of their own, and the columns that a trellis takes at once.
PRICES, WIDEST = 64, 64

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
        self,
        w: F64,
        later: F64,
        lh: F64,
        row_steps: F64,
        column_steps: F64,
        prices: F64 | None = None,
        states: NDArray[np.uint8] | None = None,
    ) -> tuple[NDArray[np.int32], F64]:
        """Codes and errors (values − w), both (m, n), of a block of columns; feedback.c has the formula.

        `later` (m, n) is what the errors of the columns behind the block are worth in it, `lh` (n, n) is unit lower
        triangular, the step of a weight is that of its row times that of its column. All are finite, steps positive.
        `prices` (PRICES) are what codes cost by their magnitude, in squared steps; 0 where there are none. With
        `states` (m), which are changed to those that the block ends in, codes are those of trellis.1, its last column
        first, and n is at most WIDEST.
        """
        m, n = w.shape
        if states is not None and n > WIDEST:
            raise ValueError(f"{n} columns, where a trellis takes {WIDEST} at once")
        wide = -(-n // 4) * 4
        sizes = [*(8 * m * n, 8 * m * n, 8 * n * n, 8 * m, 8 * n), 8 * PRICES, m]
        sizes += [4 * m * n, 8 * m * n, 8 * m * wide, 8 * 4 * wide]
        places = self._instance.lay_out(*sizes, start=self._free)
        view = self._instance.view
        given = (w, later, lh, row_steps, column_steps, np.zeros(PRICES) if prices is None else prices)
        for place, values in zip(places, given, strict=False):
            view(place, values.shape, "<f8")[:] = values
        *inputs, state, codes, errors, known, sums = places[:-1]
        if states is not None:
            view(state, (m,), "u1")[:] = states
        view(known, (m * wide,), "<f8")[:] = 0
        weights, behind, factors, *steps = inputs
        self._instance.call(
            *("feedback", m, n, weights, behind, self._strips, factors, *steps),
            *(state if states is not None else 0, codes, errors, known, sums),
        )
        if states is not None:
            states[:] = view(state, (m,), "u1")
        return view(codes, (m, n), "<i4").copy(), view(errors, (m, n), "<f8").copy()
