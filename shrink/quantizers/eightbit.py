"""eightbit: one byte per weight by WebDNN's code table, one scale per tensor.

The table (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016) has 128 magnitudes from
0 to 1, dense near 0. WebDNN sets the scale to max |w| and rounds to the nearest code. Two things are chosen
better here, and stock WebDNN still reads the result:

- the scale, for least squared error: most tensors gain by a smaller one that clips a few outliers;
- the codes in use. Near 0 the table is far finer than at its top, where nearly all of the error is made. Codes
  that lie closer together than `spacing` cost bytes and buy next to nothing, so they are left out, as long as
  the error stays below that of WebDNN's scale.

Both choices need only a histogram of the weights, so the search costs milliseconds whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.codebooks import EIGHTBIT_TABLE
from shrink.model import DTYPES, Quantized
from shrink.steps import Step

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAGNITUDES: F64 = EIGHTBIT_TABLE[:128]

# Scales tried first, as a share of max |w|; 1 is WebDNN's own and must be among them.
_SCALES: F64 = np.concatenate([np.geomspace(0.35, 0.96, 14), [0.985, 1.0, 1.02, 1.05]])
# Least distances of codes in use, as a share of the scale.
_SPACINGS: F64 = np.concatenate([[0.0], np.geomspace(0.0004, 0.0105, 31)])
# Then around the best of those: neighbouring spacings, and scales this much smaller or larger.
_NEAR_SCALES: F64 = np.linspace(0.955, 1.045, 24)
_COARSE, _NEAR = 4, 3
# With the largest spacing two neighbouring codes in use are at most 0.0215 apart.
_LARGEST_ERROR = 0.0108

_CELLS = 32768
_TILE = 1 << 18


@dataclass(frozen=True)
class Eightbit:
    """Error of a value w: at most 0.0108 · scale where |w| ≤ scale, |w| − scale beyond."""

    stores = "eightbit"

    def quantize(self, name: str, x: F32) -> Quantized:
        flat = x.reshape(-1)
        largest = max(float(flat.max()), -float(flat.min())) if flat.size else 0.0
        codes, scale = encode(flat, largest)
        step = Step("codebook.1", {"table": "eightbit", "scale": scale})
        return Quantized.of(name, DTYPES["F32"], x.shape, (step,), codes.tobytes())

    def bound(self, x: F32, quantized: Quantized) -> float:
        scale = float(quantized.steps[-1].params["scale"])
        largest = float(np.abs(x).max()) if x.size else 0.0
        # 2⁻¹⁴⁹, the least float32, covers rounding among denormals.
        return max(_LARGEST_ERROR * scale, largest - scale) * (1 + 2.0**-20) + 2.0**-149


def encode(flat: F32, largest: float) -> tuple[NDArray[np.uint8], float]:
    """Codes and scale for finite values of which the largest magnitude is `largest`."""
    if largest == 0.0:
        return np.zeros(flat.size, np.uint8), 0.0
    coded = _coded_already(flat, largest)
    if coded is not None:
        return coded, largest
    cells = _Cells.of(flat, largest)
    scale, used = _choose(cells, largest)
    return cells.codes(_code_of_cell(cells.centers, used, scale)), scale


@dataclass(frozen=True)
class _Cells:
    """A 16-bit index for every weight: one bit of sign and one of 32768 cells of magnitude.

    Linear cells, of which the top one holds the largest weight; where nearly all weights would fall in the
    lowest few because of outliers, the 16 bits are those of a float16 instead, which are finer near 0.
    """

    index: NDArray[np.uint16]
    linear: bool
    centers: F64
    counts: F64

    @classmethod
    def of(cls, flat: F32, largest: float) -> _Cells:
        few = np.abs(flat[:: flat.size // 4096 + 1])
        few = np.sort(few[few > 0])
        linear = not few.size or float(few[few.size // 2]) * 512 > largest
        # A little below 2¹⁵, so that no rounding leaves int16; exactly 2¹⁵, which float16 can hold.
        factor = (_CELLS - 8) / largest if linear else 32768.0 / largest
        # Beyond float32 it means denormal weights: slow arithmetic is fine for those.
        factor_as = np.float32(factor) if factor < 1e38 else np.float64(factor)
        index = np.empty(flat.size, np.uint16)
        counts = np.zeros(2 * _CELLS, np.int64)
        for tile in _tiles(flat.size):
            part = (flat[tile] * factor_as).astype(np.int16 if linear else np.float16).view(np.uint16)
            index[tile] = part
            counts += np.bincount(part, minlength=2 * _CELLS)
        both_signs = counts[:_CELLS] + _mirrored(counts[_CELLS:], linear)
        return cls(index, linear, _centers(linear) / factor, both_signs.astype(np.float64))

    def codes(self, code_of_cell: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A code for every weight, from a code for every cell."""
        negative = np.where(code_of_cell > 0, code_of_cell | 128, 0).astype(np.uint8)
        table = np.concatenate([code_of_cell, _mirrored(negative, self.linear)])
        out = np.empty(self.index.size, np.uint8)
        for tile in _tiles(out.size):
            table.take(self.index[tile], out=out[tile], mode="clip")
        return out


def _tiles(size: int) -> Iterator[slice]:
    """Pieces of weights that fit a cache."""
    return (slice(start, min(start + _TILE, size)) for start in range(0, size, _TILE))


def _centers(linear: bool) -> F64:
    """The magnitude in the middle of every cell, before scaling. Linear cells truncate, float16 rounds."""
    if linear:
        return np.concatenate([[0.0], np.arange(1, _CELLS) + 0.5])
    # Bit patterns from 0x7c00 up are infinity and NaN: never met, sorted last.
    numbers = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    return np.concatenate([numbers, np.full(_CELLS - 0x7C00, np.inf)])


def _mirrored(upper: NDArray[Any], linear: bool) -> NDArray[Any]:
    """The half for negative values between the order of indices and that of magnitudes, either way.

    Sign and magnitude (float16) count up from zero; two's complement counts down to it, and −32768 never occurs.
    """
    return np.roll(upper[::-1], 1) if linear else upper


def _code_of_cell(centers: F64, used: F64, scale: float) -> NDArray[np.uint8]:
    """The nearest code among the magnitudes in use, for every cell."""
    thresholds = (used[1:] + used[:-1]) * (scale / 2)
    codes = np.searchsorted(MAGNITUDES, used).astype(np.uint8)
    return codes[np.searchsorted(thresholds, centers)]


def _coded_already(flat: F32, scale: float) -> NDArray[np.uint8] | None:
    """Codes of values that WebDNN's own coding gave back, so that coding them again changes nothing; else None."""
    limits = (MAGNITUDES[1:] + MAGNITUDES[:-1]) * (scale / 2)
    decoded = (EIGHTBIT_TABLE * scale).astype(np.float32)
    codes = np.empty(0, np.uint8)
    # Nearly every other tensor is told by its first weights.
    for part in (flat[:256], flat):
        codes = np.searchsorted(limits, np.abs(part)).astype(np.uint8)
        codes |= ((part < 0) & (codes > 0)).astype(np.uint8) << 7
        if not np.array_equal(decoded[codes], part):
            return None
    return codes


def _thinned(spacing: float) -> F64:
    """The table's magnitudes without those closer than `spacing` to the last one kept; 0 and 1 always stay."""
    kept = [0.0]
    for magnitude in MAGNITUDES[1:]:
        if magnitude - kept[-1] >= spacing:
            kept.append(float(magnitude))
    if kept[-1] != 1.0:
        kept.append(1.0)
    return np.array(kept)


_USED = tuple(_thinned(float(spacing)) for spacing in _SPACINGS)


def _choose(cells: _Cells, largest: float) -> tuple[float, F64]:
    """Scale and magnitudes in use: the fewest bits at an error below WebDNN's."""
    known = cells.counts > 0
    centers, counts = cells.centers[known], cells.counts[known]
    sums = np.zeros((3, counts.size + 1))
    np.cumsum([counts, counts * centers, counts * centers**2], axis=1, out=sums[:, 1:])

    def tried(spacings: Iterable[int], shares: F64) -> list[tuple[float, float, float, int]]:
        """(bits, error, scale, spacing) for all combinations."""
        scales = _float32(shares * largest)
        found: list[tuple[float, float, float, int]] = []
        for which in spacings:
            errors, bits = _error_and_bits(centers, sums, _USED[which], scales)
            found += zip(bits.tolist(), errors.tolist(), scales.tolist(), [which] * scales.size, strict=True)
        return found

    full = tried([0], np.append(_SCALES, _NEAR_SCALES))
    webdnn = next(error for _, error, scale, _ in full if scale == largest)
    # A quarter of what the best scale saves in error is kept; the rest buys bytes.
    allowed = 0.75 * webdnn + 0.25 * min(error for _, error, _, _ in full)
    coarse = min(t for t in full + tried(range(_COARSE, len(_USED), _COARSE), _SCALES) if t[1] <= allowed)
    nearby = range(max(coarse[3] - _NEAR, 0), min(coarse[3] + _NEAR + 1, len(_USED)))
    fine = tried(nearby, _NEAR_SCALES * (coarse[2] / largest))
    _, _, scale, which = min(t for t in [coarse, *fine] if t[1] <= allowed)
    return scale, _USED[which]


def _float32(scales: F64) -> F64:
    """Scales as a WebDNN weight file stores them, without those that float32 cannot hold."""
    scales = scales[scales <= float(np.finfo(np.float32).max)].astype(np.float32).astype(np.float64)
    return scales[scales > 0]


def _error_and_bits(centers: F64, sums: F64, used: F64, scales: F64) -> tuple[F64, F64]:
    """Mean squared error and order-0 entropy in bits per weight, for each scale."""
    thresholds = (used[1:] + used[:-1]) / 2 * scales[:, None]
    inner = np.searchsorted(centers, thresholds)
    edges = np.concatenate([np.zeros((scales.size, 1), int), inner, np.full((scales.size, 1), centers.size)], axis=1)
    count, first, second = np.diff(sums[:, edges], axis=2)
    total = sums[0, -1]
    value = used * scales[:, None]
    error = (second - 2 * value * first + value**2 * count).sum(axis=1) / total
    share = np.where(count > 0, count / total, 1.0)
    # Every code in use but 0 comes with either sign.
    bits = (count / total * (-np.log2(share) + (used > 0))).sum(axis=1)
    return error, bits


MODES = {"eightbit": Eightbit()}
