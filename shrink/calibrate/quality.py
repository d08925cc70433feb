"""How far a network's outputs are from the original's, in the one measure that calibration works with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.metrics import cosine, peak_of

__all__ = ["Quality", "cost", "measured", "peaks_of"]

Array = NDArray[Any]
Values = Mapping[str, Array]


# Per cent of the pixels at either end that may lie beyond a picture's range, and how far the others may.
_TAIL, _OVERSHOOT = 1, 0.05


@dataclass(frozen=True)
class Quality:
    """PSNR in dB, infinite where nothing differs, −inf where outputs are not finite.

    `psnr_db` is that of the mean squared error of all samples, which is never above the mean of the samples' own;
    several outputs count alike, each in units of its own peak. `cosine` is the mean over samples of the first output.
    """

    psnr_db: float
    mean_psnr_db: float
    worst_psnr_db: float
    cosine: float


def peaks_of(outputs: Sequence[Values]) -> dict[str, float]:
    """The peak of each output of numbers, as for PSNR: 1 for pictures from 0 to 1, 2 for those from -1 to 1.

    That some pixels overshoot does not make a picture's range larger.
    """
    names = [name for name, value in outputs[0].items() if value.dtype.kind == "f"]
    return {name: _peak(np.concatenate([o[name].reshape(-1) for o in outputs])) for name in names}


def _peak(values: Array) -> float:
    if values.size and np.isfinite(values).all():
        low, high = np.percentile(values.astype(np.float64), [_TAIL, 100 - _TAIL])
        if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT and values.max() > 0.5:
            return 1.0
        if low >= -1 - _OVERSHOOT and high <= 1 + _OVERSHOOT and max(-values.min(), values.max()) > 0.5:
            return 2.0
    return peak_of(values)


def cost(original: Values, other: Values, peaks: Mapping[str, float]) -> float:
    """The mean squared error of a sample's outputs in units of their peaks; infinite where one is not finite."""
    found = []
    for name, peak in peaks.items():
        difference = original[name].astype(np.float64) - other[name].astype(np.float64)
        found.append(float(np.mean(np.square(difference / peak))) if difference.size else 0.0)
    mean = math.fsum(found) / max(1, len(found))
    return mean if math.isfinite(mean) else math.inf


def measured(original: Sequence[Values], other: Sequence[Values], peaks: Mapping[str, float]) -> Quality:
    """The quality of all samples together."""
    costs = [cost(a, b, peaks) for a, b in zip(original, other, strict=True)]
    each = [_psnr(c) for c in costs]
    first = next(iter(peaks), None)
    found = [cosine(a[first], b[first]) for a, b in zip(original, other, strict=True)] if first else []
    known = [c for c in found if c is not None]
    mean = (
        math.fsum(each) / len(each) if all(map(math.isfinite, each)) else min(each) if -math.inf in each else math.inf
    )
    return Quality(
        _psnr(math.fsum(costs) / len(costs)), mean, min(each), math.fsum(known) / len(known) if known else 1.0
    )


def _psnr(mean_squared: float) -> float:
    return (
        -10 * math.log10(mean_squared) if 0 < mean_squared < math.inf else math.copysign(math.inf, -mean_squared or 1)
    )
