"""The metrics of outputs: against scikit-image, on cases worked out by hand, and by their properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from shrink import metrics

F32 = NDArray[np.float32]


def picture(seed: int, channels: int, height: int, width: int) -> F32:
    """Soft shapes from 0 to 1, as pictures have them, and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + seed) * np.cos(y / (5 + c)) for c in range(channels)]
    noise = rng.normal(0, 0.05, (channels, height, width))
    return np.clip(np.stack(waves) / 2 + 0.5 + noise, 0, 1).astype("f4")


def spoiled(x: F32, seed: int, noise: float) -> F32:
    return (x + np.random.default_rng(seed).normal(0, noise, x.shape)).astype("f4")


# Against scikit-image


@pytest.mark.parametrize("peak", [1.0, 2.0, 255.0])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 16, 40), (4, 33, 11)])
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.6])
def test_psnr_and_ssim_are_those_of_scikit_image(
    peak: float, channels: int, height: int, width: int, noise: float
) -> None:
    x = picture(1, channels, height, width) * np.float32(peak)
    y = spoiled(x, 2, noise * peak)
    ours = metrics.psnr(x, y, peak)
    theirs = peak_signal_noise_ratio(x.astype("f8"), y.astype("f8"), data_range=peak)
    assert ours == pytest.approx(theirs, rel=1e-9)
    # The settings of the paper, which scikit-image names so.
    as_in_the_paper: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = structural_similarity(x.astype("f8"), y.astype("f8"), data_range=peak, channel_axis=0, **as_in_the_paper)
    assert metrics.ssim(x, y, peak) == pytest.approx(theirs, abs=1e-7)


# By hand


def test_psnr_by_hand() -> None:
    zeros, tenths = np.zeros((1, 4, 4), "f4"), np.full((1, 4, 4), 0.1, "f4")
    assert metrics.psnr(zeros, tenths, 1.0) == pytest.approx(20, abs=1e-6)
    assert metrics.psnr(zeros, tenths, 2.0) == pytest.approx(20 + 20 * math.log10(2), abs=1e-6)
    assert metrics.psnr(zeros, zeros, 1.0) is None


def test_relative_error_max_error_and_cosine_by_hand() -> None:
    a, b = np.array([3.0, 4.0]), np.array([3.0, 3.0])
    assert metrics.relative_error(a, b) == pytest.approx(0.2)
    assert metrics.max_error(a, b) == 1
    assert metrics.cosine(a, b) == pytest.approx(21 / (5 * math.sqrt(18)))
    assert metrics.cosine(a, -a) == pytest.approx(-1)
    assert metrics.cosine(np.array([1.0, 0]), np.array([0, 2.0])) == 0
    assert metrics.relative_error(np.zeros(2), b) is None
    assert metrics.cosine(np.zeros(2), b) is None


def test_top_agreement_by_hand() -> None:
    scores = np.array([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.0, 0.1, 0.9]])
    other = np.array([[0.8, 0.7, 0.0], [0.5, 0.2, 0.3], [0.9, 0.8, 0.1]])
    assert metrics.top_agreement(scores, other, 1) == pytest.approx(1 / 3)
    assert metrics.top_agreement(scores, other, 2) == pytest.approx(2 / 3)
    # Among all of them the best always is.
    assert metrics.top_agreement(scores, other, 3) is None
    # Of equal scores the earlier one is the better, on both sides.
    assert metrics.top_agreement(np.array([[1.0, 1.0]]), np.array([[1.0, 1.0]]), 1) == 1
    assert metrics.top_agreement(np.array([[1.0, 1.0]]), np.array([[1.0, 2.0]]), 1) == 0
    # Steps of a sequence are rows.
    assert metrics.top_agreement(scores[np.newaxis], other[np.newaxis], 1) == pytest.approx(1 / 3)


def test_accuracy_and_perplexity_by_hand() -> None:
    rows = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    assert metrics.accuracy(rows, np.array([0, 1])) == 1
    assert metrics.accuracy(rows, np.array([2, 1])) == 0.5
    assert metrics.perplexity(rows, np.array([1, 0])) == pytest.approx(math.sqrt(4 * 8))
    assert metrics.perplexity(np.full((7, 10), 0.1), np.arange(7)) == pytest.approx(10)
    assert metrics.perplexity(np.array([[1.0, 0.0]]), np.array([1])) is None


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 3, 32, 32), "image"),
        ((4, 1, 28, 28), "image"),
        ((1, 4, 8, 8), "image"),
        ((1, 3, 7, 32), "other"),
        ((1, 64, 8, 8), "other"),
        ((1, 1000), "classes"),
        ((1, 1), "other"),
        ((1, 20, 60), "sequence"),
        ((1, 20, 1), "other"),
        ((5,), "other"),
        ((), "other"),
    ],
)
def test_what_an_output_is(shape: tuple[int, ...], kind: str) -> None:
    assert metrics.kind_of(shape) == kind


@pytest.mark.parametrize(
    ("values", "peak"),
    [
        ([0.0, 0.7], 1),
        ([0.2, 1.0], 1),
        ([-0.9, 0.4], 2),
        ([0.0, 254.0], 255),
        ([0.0, 1.2], 1.2),
        ([-3.0, 5.0], 8),
        ([0.0, 300.0], 300),
        ([], 1),
        ([math.nan], 1),
        ([math.inf], 1),
    ],
)
def test_the_range_of_pictures(values: list[float], peak: float) -> None:
    assert metrics.peak_of(np.array(values)) == pytest.approx(peak)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_gives_no_number(bad: float) -> None:
    good = np.ones((1, 16, 16))
    spoilt = good.copy()
    spoilt[0, 3, 3] = bad
    for a, b in ((good, spoilt), (spoilt, good), (spoilt, spoilt)):
        assert metrics.psnr(a, b, 1.0) is None
        assert metrics.ssim(a, b, 1.0) is None
        assert metrics.max_error(a, b) is None
        assert metrics.relative_error(a, b) is None
        assert metrics.cosine(a, b) is None


def test_pictures_smaller_than_the_window_have_no_ssim() -> None:
    assert metrics.ssim(np.zeros((1, 10, 40)), np.ones((1, 10, 40)), 1.0) is None
    assert metrics.ssim(np.zeros((1, 11, 11)), np.zeros((1, 11, 11)), 1.0) == 1


# By their properties

values = st.floats(-1e3, 1e3, width=32)
pairs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(arrays("f4", n, elements=values), arrays("f4", n, elements=values))
)


@given(pairs)
def test_nothing_differs_from_itself(pair: tuple[F32, F32]) -> None:
    a, _ = pair
    assert metrics.max_error(a, a) == 0
    assert metrics.psnr(a, a, 1.0) is None
    assert metrics.relative_error(a, a) == (0 if a.any() else None)
    assert metrics.cosine(a, a) in (None, pytest.approx(1))


@given(pairs)
def test_errors_do_not_depend_on_the_order_of_values(pair: tuple[F32, F32]) -> None:
    a, b = pair
    assert metrics.max_error(a, b) == metrics.max_error(b[::-1], a[::-1]) == np.abs(a.astype("f8") - b).max()
    forth, back = metrics.psnr(a, b, 1.0), metrics.psnr(a[::-1], b[::-1], 1.0)
    assert forth == (None if back is None else pytest.approx(back))


@given(pairs, st.sampled_from([0.25, 2.0, 1024.0]))
def test_ratios_do_not_depend_on_the_unit(pair: tuple[F32, F32], factor: float) -> None:
    a, b = (x.astype("f8") for x in pair)
    assert metrics.relative_error(a, b) == metrics.relative_error(a * factor, b * factor)
    plain, scaled = metrics.cosine(a, b), metrics.cosine(a * factor, b)
    assert plain == (None if scaled is None else pytest.approx(scaled, abs=1e-12))
    assert plain is None or -1 <= plain <= 1


@given(
    st.tuples(st.integers(1, 6), st.integers(2, 9)).flatmap(
        lambda shape: st.tuples(arrays("f4", shape, elements=values), arrays("f4", shape, elements=values))
    )
)
def test_more_guesses_agree_more(pair: tuple[F32, F32]) -> None:
    a, b = pair
    shares = [metrics.top_agreement(a, b, k) for k in range(1, a.shape[1])]
    known = [share for share in shares if share is not None]
    assert len(known) == a.shape[1] - 1
    assert known == sorted(known)
    assert all(0 <= share <= 1 for share in known)
    assert metrics.top_agreement(a, a, 1) == 1
