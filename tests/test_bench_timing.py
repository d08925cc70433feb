"""How long is measured, and what the times come to."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.bench import timing
from shrink.bench.document import RUNS_AT_MOST
from shrink.bench.plan import BrowserOptions


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_the_distribution_is_that_of_the_samples(samples: list[float]) -> None:
    found = timing.distribution(samples)
    assert found["samples"] == samples
    assert found["median"] == pytest.approx(statistics.median(samples), abs=1e-3)
    assert found["p95"] == pytest.approx(np.quantile(samples, 0.95), abs=1e-3)


@pytest.mark.parametrize(
    ("runs", "seconds", "enough", "too_long"),
    [
        (29, 10.0, False, False),
        (30, 9.0, False, False),
        (30, 10.0, True, False),
        (2, 301.0, False, False),
        (3, 301.0, False, True),
        (3, 300.0, False, False),
        # More no document can hold.
        (RUNS_AT_MOST - 1, 1.0, False, False),
        (RUNS_AT_MOST, 1.0, True, False),
    ],
)
def test_when_it_ends(runs: int, seconds: float, enough: bool, too_long: bool) -> None:
    options = BrowserOptions(runs=30, seconds=10.0)
    assert timing.is_enough(runs, seconds, options) is enough
    assert timing.is_too_long(runs, seconds, options) is too_long


@given(st.integers(0, 200), st.floats(0, 500), st.integers(0, 100), st.floats(0, 400))
def test_the_share_is_one_when_it_is_enough(runs: int, seconds: float, asked: int, least: float) -> None:
    options = BrowserOptions(runs=asked, seconds=least)
    share = timing.share(runs, seconds, options)
    assert 0 <= share <= 1
    assert not timing.is_enough(runs, seconds, options) or share == 1 or asked == 0
