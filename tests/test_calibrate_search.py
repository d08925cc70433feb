"""The search for a bound, on curves that are smooth, steep, flat, noisy, or end somewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.calibrate.quality import Quality
from shrink.calibrate.search import best_within, smallest_with
from shrink.errors import BoundNotMet

PASSES = 8


@dataclass(frozen=True)
class Point:
    step: float
    quality: Quality
    size: int


@dataclass
class Curve:
    """PSNR falls by `slope` dB while the step grows tenfold, and a weight by `bits` while it doubles."""

    seed: int = 0
    slope: float = 20.0
    bits: float = 1.0
    noise: float = 0.0
    at_best: float = math.inf
    weights: int = 100_000
    seen: list[Point] = field(default_factory=list)

    def __call__(self, step: float) -> Point:
        at = random.Random(self.seed).uniform(-12, 12)
        # The same step gives the same.
        off = random.Random(f"{self.seed} {step!r}").uniform(-self.noise, self.noise)
        psnr = min(self.at_best, at - self.slope * math.log10(step) + off)
        rate = self.bits * math.log2(1 / step) - 2 + at / 6
        each = rate if rate > 30 else math.log2(1 + 4**rate) / 2
        self.seen.append(Point(step, Quality(psnr, psnr, psnr, 1.0), int(500 + self.weights / 8 * each)))
        return self.seen[-1]


def size_of(found: object) -> int:
    assert isinstance(found, Point)
    return found.size


curves = st.builds(
    Curve,
    st.integers(0, 1000),
    st.floats(12, 28),
    st.floats(0.7, 1.1),
    st.sampled_from([0.0, 0.3, 3.0]),
    weights=st.integers(1000, 10**8),
)


@given(curves, st.floats(20, 90))
def test_the_bound_on_psnr_is_kept(curve: Curve, wanted: float) -> None:
    found, passes = smallest_with(curve, wanted)
    assert found in curve.seen
    assert found.quality.psnr_db >= wanted
    assert passes == len(curve.seen) <= PASSES
    # Nothing that it has seen would have been better.
    assert found.step == max(point.step for point in curve.seen if point.quality.psnr_db >= wanted)


@given(curves, st.floats(-4, -1))
def test_the_bound_on_size_is_kept(curve: Curve, step: float) -> None:
    most = curve(10**step).size
    curve.seen.clear()
    found, passes = best_within(curve, size_of, most, curve.weights)
    assert size_of(found) <= most
    assert passes == len(curve.seen) <= PASSES
    assert found.quality.psnr_db == max(p.quality.psnr_db for p in curve.seen if p.size <= most)


@pytest.mark.parametrize(("slope", "most"), [(20.0, 2), (14.0, 3), (26.0, 4)])
def test_few_passes_come_close_on_a_smooth_curve(slope: float, most: int) -> None:
    for seed in range(50):
        wanted = random.Random(seed).uniform(25, 70)
        found, passes = smallest_with(Curve(seed, slope), wanted)
        assert passes <= most
        assert found.quality.psnr_db <= wanted + 0.31


@pytest.mark.parametrize("bits", [1.0, 0.8])
def test_few_passes_fill_a_size(bits: float) -> None:
    counts = []
    for seed in range(50):
        most = Curve(seed, bits=bits)(10 ** random.Random(seed).uniform(-4, -1.5)).size
        found, passes = best_within(Curve(seed, bits=bits), size_of, most, 100_000)
        counts.append(passes)
        assert 0.97 * most <= size_of(found) <= most
    assert sum(counts) / len(counts) < 4


def test_noise_costs_little() -> None:
    """At ±1 dB of noise: what is given away is less than that on average."""
    over = []
    for seed in range(100):
        wanted = random.Random(seed).uniform(25, 70)
        over.append(smallest_with(Curve(seed, noise=1.0), wanted)[0].quality.psnr_db - wanted)
    assert min(over) >= 0
    assert sum(over) / len(over) < 0.7


@pytest.mark.parametrize("wanted", [45.0, 90.0, 150.0])
def test_says_how_close_it_came(wanted: float) -> None:
    curve = Curve(at_best=41.234)
    with pytest.raises(BoundNotMet, match=f"no step keeps {wanted:g} dB: the closest came to 41.23 dB") as caught:
        smallest_with(curve, wanted)
    assert caught.value.exit_code == 4
    assert len(curve.seen) <= PASSES


def test_says_how_small_it_got() -> None:
    curve = Curve()
    with pytest.raises(
        BoundNotMet, match=r"the smallest that calibration makes of it is [\d,]+ bytes, over 400"
    ) as caught:
        best_within(curve, size_of, 400, curve.weights)
    assert caught.value.exit_code == 4
    assert len(curve.seen) <= PASSES
    assert f"{min(point.size for point in curve.seen):,} bytes" in str(caught.value)
    assert curve.seen[-1].step == 2.0


def constant(psnr: float, size: int = 1000) -> Callable[[float], Point]:
    return lambda step: Point(step, Quality(psnr, psnr, psnr, 1.0), size)


def test_what_nothing_changes_takes_the_coarsest_step() -> None:
    found, passes = smallest_with(constant(math.inf), 45)
    assert found.step == 2.0
    assert passes <= PASSES


def test_more_than_enough_is_enough() -> None:
    """A network that is exact at every step, or small at every step, ends at once."""
    assert best_within(constant(math.inf), size_of, 2000, 1000)[1] == 1
    assert best_within(constant(120), size_of, 2000, 1000)[1] == 1


@pytest.mark.parametrize("psnr", [-math.inf, 10.0])
def test_what_nothing_helps_is_given_up(psnr: float) -> None:
    with pytest.raises(BoundNotMet, match="the closest came to"):
        smallest_with(constant(psnr), 45)


def test_outputs_that_are_not_finite_lead_to_finer_steps() -> None:
    def at(step: float) -> Point:
        psnr = -20 * math.log10(step) if step < 1e-3 else -math.inf
        return Point(step, Quality(psnr, psnr, psnr, 1.0), 1000)

    found, _ = smallest_with(at, 45)
    assert 45 < found.quality.psnr_db < math.inf


def test_empty_and_impossible_sizes() -> None:
    with pytest.raises(BoundNotMet):
        best_within(Curve(), size_of, 0, 0)
    with pytest.raises(BoundNotMet):
        best_within(constant(50), size_of, 0, 10)
