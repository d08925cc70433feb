"""float16: half the bytes, rounded to nearest even (IEEE 754 binary16)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrink.model import DTYPES, Quantized
from shrink.quantizers import Kept
from shrink.steps import Step

_INFINITY = 0x7C00
_LEAST_PIECE = 1 << 19


@dataclass(frozen=True)
class Float16:
    """Error of a value: at most 2⁻¹¹ of it, or 2⁻²⁵ below 2⁻¹⁴ where float16 loses precision."""

    stores = "float16"

    def quantize(self, name: str, x: NDArray[np.float32]) -> Quantized | Kept:
        half = _to_half(x.reshape(-1))
        if half is None:
            return Kept(f"holds {float(np.abs(x).max()):.6g}, beyond float16's 65504")
        return Quantized.of(name, DTYPES["F32"], x.shape, (Step("cast.1", {"from": "F16"}),), half.tobytes())

    def bound(self, x: NDArray[np.float32], quantized: Quantized) -> float:
        largest = float(np.abs(x).max()) if x.size else 0.0
        return max(largest * 2.0**-11, 2.0**-25)


def _to_half(flat: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """Rounded to nearest even; None where a value became infinite.

    The processor is the limit here, not memory, and NumPy lets go of the interpreter meanwhile: use all cores.
    """
    half = np.empty(flat.size, "<f2")
    workers = min(_cores(), flat.size // _LEAST_PIECE + 1)
    edges = [flat.size * i // workers for i in range(workers + 1)]

    def fits(piece: slice) -> bool:
        with np.errstate(over="ignore"):
            half[piece] = flat[piece]
        return bool((half[piece].view(np.uint16) & 0x7FFF).max(initial=0) < _INFINITY)

    if workers == 1:
        return half if fits(slice(None)) else None
    with ThreadPoolExecutor(workers) as pool:
        return half if all(pool.map(fits, map(slice, edges[:-1], edges[1:]))) else None


def _cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MODES = {"float16": Float16()}
