"""How far one network's outputs are from another's, by what the outputs are: pictures, classes, sequences, or numbers.

Every function takes the outputs of the float32 original and of a variant for the same inputs, as float arrays of the
same shape, and is pure. Where a figure makes no sense it is None, which JSON knows, and never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Kind",
    "accuracy",
    "cosine",
    "kind_of",
    "max_error",
    "peak_of",
    "perplexity",
    "psnr",
    "relative_error",
    "ssim",
    "top_agreement",
]

Array = NDArray[Any]
F64 = NDArray[np.float64]
Kind = Literal["image", "classes", "sequence", "other"]

# Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004.
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_SMALLEST_PICTURE = 8
# What is squared must stay finite.
_HUGE = 1e150


def kind_of(shape: Sequence[int]) -> Kind:
    """What an output of this shape, batch first, most likely is.

    [N, 1 or 3 or 4, H, W] is a picture, [N, classes] a table of scores, [N, steps, classes] a sequence of them.
    """
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) >= _SMALLEST_PICTURE:
        return "image"
    if len(shape) == 2 and shape[1] >= 2:
        return "classes"
    if len(shape) == 3 and shape[2] >= 2:
        return "sequence"
    return "other"


def peak_of(original: Array) -> float:
    """The range that pictures can have, for PSNR and SSIM: 1 for values in [0, 1], 2 for [-1, 1], 255 for bytes.

    For anything else it is the range that they do have, or 1 where that is nothing.
    """
    low, high = float(np.min(original, initial=0.0)), float(np.max(original, initial=0.0))
    if low >= 0 and high <= 1:
        return 1.0
    if low >= -1 and high <= 1:
        return 2.0
    # A depth or a dose of up to 10 is no byte, and would seem 28 dB better than it is.
    if low >= 0 and 127 < high <= 255:
        return 255.0
    return (high - low) if math.isfinite(high - low) and high > low else 1.0


def psnr(original: Array, other: Array, peak: float) -> float | None:
    """Peak signal to noise ratio in dB; None where nothing differs, or where a value is not finite."""
    difference = _difference(original, other)
    if difference is None:
        return None
    mse = float(np.mean(difference**2)) if difference.size else 0.0
    return 10 * math.log10(peak**2 / mse) if mse > 0 else None


def ssim(original: Array, other: Array, peak: float) -> float | None:
    """Structural similarity of two pictures [channels, H, W], Gaussian window of 11 × 11; the mean over channels.

    None for pictures smaller than the window, or where a value is not finite.
    """
    if min(original.shape[1:]) <= 2 * _SSIM_RADIUS or _difference(original, other) is None:
        return None
    x, y = original.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * peak) ** 2, (_SSIM_K2 * peak) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(np.mean(above / below))


def _blurred(x: F64) -> F64:
    """The Gaussian means of all windows that lie inside the picture."""
    at = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    window = np.exp(-(at**2) / (2 * _SSIM_SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, window.size, axis=axis) @ window
    return x


def max_error(original: Array, other: Array) -> float | None:
    """The largest |difference|; None where a value is not finite."""
    difference = _difference(original, other)
    return None if difference is None else float(np.max(np.abs(difference), initial=0.0))


def relative_error(original: Array, other: Array) -> float | None:
    """Root mean square of the difference over that of the original; None where that is 0 or not finite."""
    difference = _difference(original, other)
    signal = (
        float(np.sqrt(np.mean(original.astype(np.float64) ** 2))) if difference is not None and original.size else 0
    )
    if difference is None or not signal:
        return None
    return float(np.sqrt(np.mean(difference**2))) / signal


def cosine(original: Array, other: Array) -> float | None:
    """Cosine of the angle between the two as vectors; None where one is 0 or not finite."""
    if _difference(original, other) is None:
        return None
    a, b = original.astype(np.float64).reshape(-1), other.astype(np.float64).reshape(-1)
    length = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return min(1.0, max(-1.0, float(a @ b) / length)) if length else None


def top_agreement(original: Array, other: Array, k: int) -> float | None:
    """The share of rows (all but the last axis) whose best class in `original` is among the `k` best of `other`.

    Of equal scores the earlier class is the better. None where there are not more than `k` classes, or no rows.
    """
    scores, theirs = _rows(original), _rows(other)
    if scores.shape[1] <= k or not len(scores):
        return None
    best = scores.argmax(axis=1)
    return float(np.mean((np.argsort(-theirs, axis=1, kind="stable")[:, :k] == best[:, None]).any(axis=1)))


def accuracy(scores: Array, labels: Array) -> float | None:
    """The share of rows whose best class is the label."""
    rows = _rows(scores)
    return float(np.mean(rows.argmax(axis=1) == labels.reshape(-1))) if len(rows) else None


def perplexity(probabilities: Array, labels: Array) -> float | None:
    """exp of the mean negative log probability of the labels; rows must be distributions. None where one is 0."""
    rows = _rows(probabilities).astype(np.float64)
    given = rows[np.arange(len(rows)), labels.reshape(-1)]
    return float(np.exp(-np.mean(np.log(given)))) if len(rows) and np.all(given > 0) else None


def _rows(scores: Array) -> Array:
    return scores.reshape(-1, scores.shape[-1])


def _difference(original: Array, other: Array) -> F64 | None:
    a, b = original.astype(np.float64), other.astype(np.float64)
    if not (np.all(np.abs(a) < _HUGE) and np.all(np.abs(b) < _HUGE)):
        return None
    difference: F64 = a - b
    return difference
