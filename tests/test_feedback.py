"""Rounding with feedback in encoder.wasm: its formula code by code, and the trellis against every path there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink.coders.wasm import PRICES, WIDEST, Feedback
from shrink.steps import trellised
from tests.rans_streams import entropy

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def triangular(rng: np.random.Generator, size: int) -> F64:
    lower: F64 = np.tril(rng.normal(0, 0.3 / np.sqrt(size), (size, size)))
    np.fill_diagonal(lower, 1)
    return lower


def prices_of(rng: np.random.Generator, worth: float) -> F64:
    """Rising with the magnitude, as those of rarer codes do."""
    prices: F64 = worth * np.cumsum(rng.uniform(0, 1, PRICES))
    return prices


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (4, 4), (9, 2), (16, 27), (33, 12), (5, 70)])
@pytest.mark.parametrize("worth", [0.0, 0.1, 0.6])
def test_feedback(m: int, n: int, worth: float) -> None:
    """As its formula says, code by code."""
    rng = np.random.default_rng(m * n)
    lg, lh, prices = triangular(rng, m), triangular(rng, n), prices_of(rng, worth)
    w, later = rng.normal(size=(m, n)), rng.normal(0, 0.1, (m, n))
    row_steps, column_steps = rng.uniform(0.2, 0.5, m), rng.uniform(0.5, 1, n)
    codes, errors = np.zeros((m, n)), np.zeros((m, n))
    behind = later.copy()
    for j in reversed(range(n)):
        for i in reversed(range(m)):
            behind[i, j] += errors[i, j + 1 :] @ lh[j + 1 :, j]
            above = lg[i + 1 :, i] @ (errors[i + 1 :, j] + behind[i + 1 :, j])
            step = row_steps[i] * column_steps[j]
            steps = (w[i, j] - behind[i, j] - above) / step
            around = np.floor(abs(steps)) + np.array([1, 0])
            best = around[np.argmin((abs(steps) - around) ** 2 + prices[around.astype(int)])]
            codes[i, j] = np.copysign(best, steps)
            errors[i, j] = codes[i, j] * step - w[i, j]
    kept = later.copy()
    got_codes, got_errors = Feedback(lg).block(w, later, lh, row_steps, column_steps, prices)
    assert np.array_equal(got_codes, codes)
    assert np.allclose(got_errors, errors, rtol=0, atol=1e-12)
    assert np.array_equal(later, kept)


def test_blocks_of_one_layer_are_independent_calls() -> None:
    rng = np.random.default_rng(14)
    layer = Feedback(triangular(rng, 20))
    blocks = [(rng.normal(size=(20, n)), np.zeros((20, n)), triangular(rng, n)) for n in (64, 3, 64, 7)]
    first = [layer.block(w, later, lh, np.full(20, 0.1), np.ones(len(lh))) for w, later, lh in blocks]
    again = [layer.block(w, later, lh, np.full(20, 0.1), np.ones(len(lh))) for w, later, lh in reversed(blocks)]
    for (codes, errors), (same_codes, same_errors) in zip(first, reversed(again), strict=True):
        assert np.array_equal(codes, same_codes)
        assert np.array_equal(errors, same_errors)


def test_no_feedback_and_no_prices_is_plain_rounding() -> None:
    rng = np.random.default_rng(15)
    w = rng.normal(size=(10, 6))
    codes, errors = Feedback(np.eye(10)).block(w, np.zeros((10, 6)), np.eye(6), np.full(10, 0.1), np.ones(6))
    assert np.array_equal(codes, np.copysign(np.floor(abs(w / 0.1) + 0.5), w))
    assert abs(errors).max() <= 0.05 + 1e-12


# --- the trellis -------------------------------------------------------------------------------------------------


def through(
    w: F64, lh: F64, prices: F64 | None = None, states: NDArray[np.uint8] | None = None, step: float = 1.0
) -> tuple[I32, F64, NDArray[np.uint8]]:
    m, n = w.shape
    states = np.zeros(m, np.uint8) if states is None else states.copy()
    plain = np.eye(m), np.full(m, step), np.ones(n)
    codes, errors = Feedback(plain[0]).block(w, np.zeros((m, n)), lh, *plain[1:], prices, states)
    return codes, errors, states


def meant(codes: I32) -> F64:
    """What codes stand for whose last column was rounded first."""
    values: F64 = trellised(codes[:, ::-1])[:, ::-1].astype(float)
    return values


def cost(errors: F64, lh: F64) -> F64:
    """Of each row: with H = LLᵀ it is the squared length of E L."""
    found: F64 = np.sum((errors @ lh) ** 2, axis=1)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("worth", [0.0, 0.3])
def test_without_feedback_no_path_is_better(n: int, worth: float) -> None:
    rng = np.random.default_rng(n)
    w, prices = rng.normal(0, 2, (30, n)), prices_of(rng, worth)
    codes, errors, _ = through(w, np.eye(n), prices)
    assert np.allclose(errors, meant(codes) - w, rtol=0, atol=1e-12)
    every = np.array(list(itertools.product(range(-4, 5), repeat=n)), np.int32)
    values = meant(every)
    for row, code in zip(w, codes, strict=True):
        ours = cost((meant(code[None]) - row), np.eye(n))[0] + prices[abs(code)].sum()
        best = (cost(values - row, np.eye(n)) + prices[abs(every)].sum(axis=1)).min()
        assert ours == pytest.approx(best, rel=1e-12)


def test_with_feedback_it_is_close_to_the_best_path() -> None:
    rng = np.random.default_rng(5)
    every = np.array(list(itertools.product(range(-3, 4), repeat=5)), np.int32)
    values = meant(every)
    ours = best = 0.0
    for _ in range(60):
        lh, w = triangular(rng, 5), rng.normal(0, 1.5, (1, 5))
        codes, errors, _ = through(w, lh)
        assert np.allclose(errors, meant(codes) - w, rtol=0, atol=1e-12)
        ours += cost(errors, lh)[0]
        best += cost(values - w, lh).min()
    assert best <= ours * (1 + 1e-12)
    assert ours < 1.1 * best


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, WIDEST))
def test_the_errors_are_those_of_the_codes(seed: int, m: int, n: int) -> None:
    """With feedback both ways and large and small weights; the state is the one that the codes lead to."""
    rng = np.random.default_rng(seed)
    lg, lh = triangular(rng, m), triangular(rng, n)
    w = rng.normal(size=(m, n)) * 10.0 ** rng.integers(-3, 4, (m, 1))
    row_steps, column_steps = rng.uniform(0.2, 0.5, m), rng.uniform(0.5, 1, n)
    states = np.zeros(m, np.uint8)
    later = rng.normal(size=(m, n))
    codes, errors = Feedback(lg).block(w, later, lh, row_steps, column_steps, prices_of(rng, 0.1), states)
    values = meant(codes) * row_steps[:, None] * column_steps
    assert np.allclose(errors, values - w, rtol=1e-12, atol=1e-12)
    # A code of 1 in an even state means 2, in an odd one 1.
    after = trellised(np.concatenate([codes[:, ::-1], np.ones((m, 1), np.int32)], axis=1))[:, -1]
    assert np.array_equal(after == 1, states & 1)


def test_a_row_goes_on_where_the_block_before_ended() -> None:
    rng = np.random.default_rng(6)
    w = rng.normal(0, 3, (7, 40))
    states = np.zeros(7, np.uint8)
    parts: list[tuple[I32, F64]] = []
    for part in (slice(30, 40), slice(7, 30), slice(0, 7)):
        codes, errors, states = through(w[:, part], np.eye(w[:, part].shape[1]), states=states)
        parts.insert(0, (codes, errors))
    codes, errors = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    assert np.allclose(errors, meant(codes) - w, rtol=0, atol=1e-12)


def test_it_is_worth_almost_a_decibel() -> None:
    """Against plain rounding whose codes have as many bits: 1 dB is what eight states can give."""
    w = np.random.default_rng(7).normal(0, 8, (400, 64))
    codes, errors, _ = through(w, np.eye(64))
    plain = np.rint(w / 2).astype(np.int32)
    gain = 10 * np.log10(np.mean((2 * plain - w) ** 2) / np.mean(errors**2))
    # A bit is worth 6 dB.
    more = 20 * np.log10(2) * (entropy(codes) - entropy(plain))
    assert 0.7 < gain - more < 1.1


def test_prices_save_bits() -> None:
    w = np.random.default_rng(8).laplace(0, 1, (100, 64))
    bits = np.log2(1 + np.arange(PRICES))
    codes, errors, _ = through(w, np.eye(64), step=0.6)
    cheap, more, _ = through(w, np.eye(64), 0.3 * bits, step=0.6)
    assert entropy(cheap) < entropy(codes) - 0.05
    saved = 0.3 * np.mean(bits[abs(codes)] - bits[abs(cheap)]) * 0.6**2
    assert 0 < np.mean(more**2) - np.mean(errors**2) < saved


@pytest.mark.parametrize("states", [None, np.zeros(2, np.uint8)])
def test_weights_far_beyond_the_steps_overflow_nothing(states: NDArray[np.uint8] | None) -> None:
    w = np.array([[1e300, -1e300, 1.0], [-1e12, 3.0, 0.0]])
    codes, errors = Feedback(np.eye(2)).block(
        w, np.zeros((2, 3)), np.eye(3), np.full(2, 1e-3), np.ones(3), None, states
    )
    assert abs(codes).max() <= 10**9 + 1
    assert np.isfinite(errors).all()


def test_more_columns_than_a_trellis_takes_at_once_are_refused() -> None:
    n = WIDEST + 1
    with pytest.raises(ValueError, match="65 columns"):
        through(np.zeros((1, n)), np.eye(n))
