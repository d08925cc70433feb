"""What a calibrated tensor is stored as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.layout import Layout
from shrink.coders import rans
from shrink.model import DTYPES, Entry, Quantized, Tensor
from shrink.quantizers import Quantizer, by_mode
from shrink.steps import Step

__all__ = ["int8", "on_grid", "small"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def on_grid(
    name: str,
    shape: tuple[int, ...],
    codes: NDArray[np.int32],
    scale: float,
    rows: NDArray[np.int8],
    columns: NDArray[np.int8],
    place: Layout,
    effort: int,
    *,
    trellis: bool = False,
) -> Quantized:
    """Codes as they are stored, with the exponents of their rows and columns, entropy-coded."""
    payload, params = rans.encode(rows.tobytes() + columns.tobytes(), codes.astype(np.int16), effort=effort)
    view = None if place.view == shape else list(place.view)
    grid = {"scale": scale, "view": view, "rows": list(place.rows), "width": 2 if trellis else params["width"]}
    machine = [Step("trellis.1", params)] if trellis else []
    return Quantized.of(name, DTYPES["F32"], shape, (Step("rans.1", params), *machine, Step("grid.1", grid)), payload)


def int8(name: str, shape: tuple[int, ...], codes: NDArray[np.int32], steps: F32, axes: Sequence[int]) -> Quantized:
    """Codes of 8 bits, those of the axis in front, and a step for each of its rows; or one for all without an axis."""
    payload = steps.astype("<f4").tobytes() + codes.astype(np.int8).tobytes()
    params = {"bits": 8, "axis": axes[0] if axes else None, "block": None, "scale": "F32", "zero": False}
    return Quantized.of(name, DTYPES["F32"], shape, (Step("affine.1", params),), payload)


def small(name: str, values: F32, cost_of_one: F64, at_most: float) -> Entry:
    """A small tensor in float16 where its rounding costs at most so much, else in float32."""
    half: Quantizer = by_mode("float16")
    made = half.quantize(name, values)
    if isinstance(made, Quantized):
        error = (made.array.astype(np.float64) - values).reshape(-1)
        if float(np.sum(cost_of_one * error**2)) <= at_most:
            return made
    return Tensor.of(name, values)
