"""float16: half the bytes, rounded to nearest even (IEEE 754 binary16)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrink.model import DTYPES, Quantized
from shrink.quantizers import Kept
from shrink.steps import Step

_LARGEST = 65504.0
_PIECE = 1 << 20


@dataclass(frozen=True)
class Float16:
    """Error of a value: at most 2⁻¹¹ of it, or 2⁻²⁵ below 2⁻¹⁴ where float16 loses precision."""

    stores = "float16"

    def quantize(self, name: str, x: NDArray[np.float32]) -> Quantized | Kept:
        if x.size:
            largest = max(float(x.max()), -float(x.min()))
            if largest > _LARGEST:
                return Kept(f"holds {largest:.6g}, beyond float16's {_LARGEST:.0f}")
        half = _to_half(np.ascontiguousarray(x).reshape(-1))
        return Quantized.of(name, DTYPES["F32"], x.shape, (Step("cast.1", {"from": "F16"}),), half.tobytes())

    def bound(self, x: NDArray[np.float32], quantized: Quantized) -> float:
        largest = float(np.abs(x).max()) if x.size else 0.0
        return max(largest * 2.0**-11, 2.0**-25)


def _to_half(flat: NDArray[np.float32]) -> NDArray[np.float16]:
    """The conversion is bound by the processor, not by memory, and NumPy lets go of the interpreter: use all cores."""
    half = np.empty(flat.size, "<f2")
    pieces = [slice(start, start + _PIECE) for start in range(0, flat.size, _PIECE)]

    def convert(piece: slice) -> None:
        half[piece] = flat[piece]

    if len(pieces) > 1:
        with ThreadPoolExecutor() as pool:
            list(pool.map(convert, pieces))
    else:
        half[:] = flat
    return half


MODES = {"float16": Float16()}
