"""Finding the step that meets a bound: the smallest file that keeps a PSNR, or the best one that fits a size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shrink.calibrate.quality import Quality
from shrink.errors import BoundNotMet

__all__ = ["Measured", "best_within", "smallest_with"]

_PASSES = 8
# Steps outside of these make nothing better, or nothing smaller.
_FINEST, _COARSEST = 1e-8, 2.0
_CLOSE_DB, _CLOSE_SIZE = 0.3, 0.985
# Nothing sees a difference beyond this: a file need not be larger for it.
_ENOUGH_DB = 100.0


class Measured(Protocol):
    """What a step gave."""

    @property
    def step(self) -> float: ...
    @property
    def quality(self) -> Quality: ...


@dataclass
class _Bracket:
    """The coarsest step known to do, and the finest known not to (for a size: the other way round)."""

    good: float | None = None
    bad: float | None = None

    def between(self, wanted: float) -> float:
        """The step that is wanted, or where that is not between the two, one that is."""
        if self.good is None or self.bad is None:
            return wanted
        low, high = sorted((self.good, self.bad))
        margin = (high / low) ** 0.1
        return wanted if low * margin < wanted < high / margin else math.sqrt(low * high)

    @property
    def closed(self) -> bool:
        if self.good is None or self.bad is None:
            return False
        return max(self.good, self.bad) / min(self.good, self.bad) < 1.01


class _Slope:
    """By how much a value falls while the step grows by the factor `base`: as usual, until two steps have told."""

    def __init__(self, base: int, usual: float):
        self._base, self._usual = base, usual
        self._last: tuple[float, float] | None = None
        self._found = usual

    def after(self, step: float, value: float) -> float:
        """What is known after this value. It is never far from what is usual: a value may be off."""
        if not math.isfinite(value):
            return self._found
        here = (math.log(step, self._base), value)
        if self._last is not None and abs(here[0] - self._last[0]) > math.log(1.02, self._base):
            found = (self._last[1] - value) / (here[0] - self._last[0])
            self._found = max(self._usual / 2, min(1.5 * self._usual, found))
        self._last = here
        return self._found


def smallest_with(at: Callable[[float], Measured], min_psnr: float) -> tuple[Measured, int]:
    """The coarsest step found that keeps `min_psnr` dB, and how many were tried.

    PSNR falls by about 20 dB while the step grows tenfold, which tells where to look; the result is within
    0.3 dB of the bound, or is the best of eight.

    Raises:
        BoundNotMet: no step keeps it.
    """
    step = _limited(1.5 * 10 ** (-min_psnr / 20))
    bracket, best, closest = _Bracket(), None, -math.inf
    slope = _Slope(10, 20.0)
    for number in range(1, _PASSES + 1):
        found = at(step)
        psnr = found.quality.psnr_db
        closest = max(closest, psnr)
        if psnr >= min_psnr:
            if best is None or step > best.step:
                best, bracket.good = found, step
            if psnr - min_psnr <= _CLOSE_DB or step >= _COARSEST:
                return best, number
        elif bracket.bad is None or step < bracket.bad:
            bracket.bad = step
        if bracket.closed or (best is None and step <= _FINEST):
            break
        # What is over the bound is given up but for a little; far from it only part of the way is trusted.
        over = psnr - min_psnr - _CLOSE_DB / 2 if math.isfinite(psnr) else math.copysign(20.0, psnr)
        tenfold = slope.after(step, psnr)
        step = _limited(bracket.between(step * 10 ** (max(-2 * tenfold, min(2 * tenfold, over)) / tenfold)))
    if best is None:
        raise BoundNotMet(
            f"no step keeps {min_psnr:g} dB: the closest came to {closest:.2f} dB",
            hint="ask for less, or calibrate on more inputs",
        )
    return best, number


def best_within(
    at: Callable[[float], Measured], size_of: Callable[[Measured], int], max_bytes: int, weights: int
) -> tuple[Measured, int]:
    """The result with the best PSNR found whose `size_of` is at most `max_bytes`, and how many were tried.

    A step twice as fine costs at most a bit for each of the `weights`.

    Raises:
        BoundNotMet: the coarsest step does not fit either.
    """
    bits = 8 * max_bytes / max(1, weights)
    step = _limited(0.05 * 2.0**-bits)
    bracket, best, smallest = _Bracket(), None, math.inf
    slope = _Slope(2, 1.0)
    for number in range(1, _PASSES + 1):
        found = at(step)
        size = size_of(found)
        smallest = min(smallest, size)
        if size <= max_bytes:
            if best is None or found.quality.psnr_db > best.quality.psnr_db:
                best = found
            if bracket.good is None or step < bracket.good:
                bracket.good = step
            if size >= _CLOSE_SIZE * max_bytes or found.quality.psnr_db >= _ENOUGH_DB or step <= _FINEST:
                return best, number
        elif bracket.bad is None or step > bracket.bad:
            bracket.bad = step
        if bracket.closed or (best is None and step >= _COARSEST):
            break
        room = (max_bytes * (1 + _CLOSE_SIZE) / 2 - size) * 8 / max(1, weights)
        if room < 0 and best is None:
            # At few bits a step saves less than it should: go further.
            room = min(2 * room, -0.5)
        bit = slope.after(step, 8 * size / max(1, weights))
        step = _limited(bracket.between(step * 2.0 ** -max(-4.0, min(4.0, room / bit))))
    if best is None:
        raise BoundNotMet(
            f"the smallest that calibration makes of it is {smallest:,} bytes, over {max_bytes:,}",
            hint="ask for more",
        )
    return best, number


def _limited(step: float) -> float:
    return min(max(step, _FINEST), _COARSEST)
