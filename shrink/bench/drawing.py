"""What the eye sees of a variant: pictures of the original's output, of its own, and ten times the difference."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench.png import png
from shrink.metrics import peak_of

__all__ = ["AMPLIFIED", "BUDGET_BYTES", "drawn"]

AMPLIFIED = 10
# What the pictures of all variants together may take in the document and in the report, as base64.
BUDGET_BYTES = 900_000

Array = NDArray[Any]
_SIDES = (384, 256, 192, 128, 96, 64, 32)


def drawn(
    original: Sequence[Array], other: Sequence[Array], psnr: Sequence[float | None], budget_bytes: int
) -> dict[str, Any] | None:
    """The worst sample and the median one, of image outputs [N, channels, H, W]; of a batch the first picture.

    Large ones are cut to the window with the largest error, so far that base64 of all takes at most `budget_bytes`,
    or to 32 × 32 pixels. None where nothing differs.
    """
    ranked = sorted((value, number) for number, value in enumerate(psnr) if value is not None)
    if not ranked:
        return None
    chosen = {"worst": ranked[0][1]}
    if len(ranked) > 1:
        chosen["typical"] = ranked[len(ranked) // 2][1]
    peak = peak_of(np.concatenate([a.reshape(-1) for a in original]))
    low = min(float(a.min()) for a in original)
    out: dict[str, Any] = {}
    for side in _SIDES:
        out = {
            name: _of_one(number, original[number][0], other[number][0], _range(low, peak), side)
            for name, number in chosen.items()
        }
        if sum(len(text) for entry in out.values() for text in entry.values() if isinstance(text, str)) <= budget_bytes:
            break
    return out


def _range(low: float, peak: float) -> tuple[float, float]:
    """Black and the distance to white: pictures go from 0 on, or from -1 to 1; others from where the original does."""
    if low >= 0:
        return 0.0, peak
    return (-1.0, peak) if peak == 2 and low >= -1 else (low, peak)


def _of_one(number: int, original: Array, other: Array, span: tuple[float, float], side: int) -> dict[str, Any]:
    height, width = original.shape[1:]
    difference = np.nan_to_num(np.abs(other.astype(np.float64) - original))
    top, left = _busiest(difference.sum(axis=0), min(side, height), min(side, width))
    window = (slice(None), slice(top, top + side), slice(left, left + side))
    shown = f"{min(side, width)} × {min(side, height)} of {width} × {height} pixels, where most differs"
    return {
        "input": number,
        "note": shown if side < max(height, width) else None,
        "original": _base64(original[window], *span),
        "variant": _base64(other[window], *span),
        "difference_x10": _base64(difference[window] * AMPLIFIED, 0.0, span[1]),
    }


def _busiest(error: NDArray[np.float64], height: int, width: int) -> tuple[int, int]:
    """Top and left of the window of this size with the largest sum."""
    sums = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    windows = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return int(top), int(left)


def _base64(values: Array, low: float, peak: float) -> str:
    """The PNG of [channels, H, W], grey or RGB; alpha is left out."""
    scaled = np.nan_to_num((values.astype(np.float64) - low) * (255 / peak))
    pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    shown = pixels[0] if len(pixels) < 3 else np.ascontiguousarray(pixels[:3].transpose(1, 2, 0))
    return base64.b64encode(png(shown)).decode("ascii")
