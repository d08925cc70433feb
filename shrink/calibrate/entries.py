"""What a calibrated tensor is stored as."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.layout import Layout
from shrink.calibrate.rounding import LARGEST_CODE
from shrink.coders import rans
from shrink.model import DTYPES, Entry, Quantized, Tensor
from shrink.quantizers import Quantizer, by_mode
from shrink.steps import Step

__all__ = ["LARGEST_INT8", "int8", "on_grid", "small"]

F32 = NDArray[np.float32]

LARGEST_INT8 = 127
"""The largest code of 8 bits that has a negative one."""

# A larger tensor without bytes is not believed.
_FILLED_AT_MOST = 1 << 26
# How much smaller the description of a tensor becomes.
_DEFLATED = 6


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


def small(name: str, values: F32, step: float, effort: int) -> Entry:
    """A tensor with one step for all its values, in whichever form takes least: codes, entropy-coded or not, or
    float16, where that is as near; else it is kept."""
    if 0 < values.nbytes <= _FILLED_AT_MOST and np.isfinite(values.flat[0]) and (values == values.flat[0]).all():
        return Quantized.of(name, DTYPES["F32"], values.shape, (Step("fill.1", {"value": float(values.flat[0])}),), b"")
    found: list[Entry] = [Tensor.of(name, values)]
    half: Quantizer = by_mode("float16")
    made = half.quantize(name, values)
    if isinstance(made, Quantized) and np.abs(made.array.astype(np.float64) - values).max(initial=0) <= step / 2:
        found.append(made)
    largest = float(np.abs(values).max(initial=0)) / step
    if largest <= LARGEST_INT8:
        scale = np.float32(step)
        codes = np.rint(values / scale).clip(-LARGEST_INT8, LARGEST_INT8).astype(np.int32)
        found.append(int8(name, values.shape, codes, np.array([scale]), ()))
    if largest <= LARGEST_CODE:
        found.append(_alone(name, values, step, effort))
    return min(found, key=_whole_size)


def _whole_size(entry: Entry) -> int:
    """With what describes it, deflated beside others of the kind."""
    if isinstance(entry, Tensor):
        return entry.size_bytes
    said = json.dumps([[step.name, dict(step.params)] for step in entry.steps])
    return entry.size_bytes + len(said) // _DEFLATED


def _alone(name: str, values: F32, step: float, effort: int) -> Quantized:
    """Codes with one step for all of them, entropy-coded."""
    codes = np.rint(values / step).astype(np.int32).reshape(values.shape[0], -1)
    rows, columns = (np.zeros(n, np.int8) for n in codes.shape)
    place = Layout(values.shape, (0,), rows.astype(np.int64)[None], rows.astype(np.int64), None)
    return on_grid(name, values.shape, codes, step, rows, columns, place, effort)
