"""What goes in and what is shown: the user's own data and labels, seeded inputs, and pictures of outputs."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink.bench import Inputs, drawing, samples
from shrink.bench.png import png
from shrink.errors import BadInput, OutputError, UsageError

Array = NDArray[Any]

# The user's data

WANTED = [samples.Input("x", "float32", (1, 3, 2)), samples.Input("n", "int64", (1,))]


def npz(path: Path, **values: Any) -> Path:
    np.savez(path, **values)
    return path


def test_data_by_the_names_of_the_inputs(tmp_path: Path) -> None:
    x, n = np.arange(24.0).reshape(4, 3, 2), np.arange(4)
    np.save(tmp_path / "y.npy", np.array([3, 2, 1, 0]))
    asked = Inputs(npz(tmp_path / "a.npz", x=x, n=n), tmp_path / "y.npy")
    found = samples.samples(WANTED, asked)
    assert found.source == "a.npz"
    assert len(found.values) == 4
    for number, sample in enumerate(found.values):
        np.testing.assert_array_equal(sample["x"], x[number : number + 1].astype("f4"))
        assert sample["x"].dtype == np.float32
        np.testing.assert_array_equal(sample["n"], [number])
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, [[3], [2], [1], [0]])


@pytest.mark.parametrize("shape", [(5, 1, 3, 2), (5, 3, 2), (10, 3, 2)])
def test_the_first_axis_counts_samples(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.arange(math.prod(shape)).reshape(shape).astype("u1")
    batch = 2 if shape[0] == 10 else 1
    wanted = [samples.Input("x", "float32", (batch, 3, 2))]
    np.save(tmp_path / "a.npy", values)
    for path in (npz(tmp_path / "a.npz", anything=values), tmp_path / "a.npy"):
        found = samples.samples(wanted, Inputs(path))
        assert len(found.values) == 5
        np.testing.assert_array_equal(np.concatenate([s["x"].reshape(-1) for s in found.values]), values.reshape(-1))


def test_one_sample_of_the_very_shape(tmp_path: Path) -> None:
    found = samples.samples(WANTED[:1], Inputs(npz(tmp_path / "a.npz", x=np.ones((1, 3, 2)))))
    assert len(found.values) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x": np.ones((4, 3, 2))}, "no array for the input n"),
        ({"x": np.ones((4, 3, 2)), "n": np.ones(3)}, "different numbers of samples: x 4, n 3"),
        ({"x": np.ones((4, 2, 3)), "n": np.ones(4)}, "its shape is [4, 2, 3], the network takes [1, 3, 2]"),
        ({"x": np.ones((0, 3, 2)), "n": np.ones(0)}, "0 samples"),
        ({"x": np.full((4, 3, 2), np.nan), "n": np.ones(4)}, "NaN or infinity"),
        ({"x": np.full((4, 3, 2), 1e300), "n": np.ones(4)}, "NaN or infinity"),
        ({"x": np.ones((4, 3, 2)), "n": np.full(4, 0.5)}, "not all of type int64"),
        ({"x": np.full((4, 3, 2), "a"), "n": np.ones(4)}, "values of type"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        samples.samples(WANTED, Inputs(npz(tmp_path / "a.npz", **values)))
    assert words in str(refused.value)
    assert "a.npz" in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(4), "integers"),
        (np.zeros(3, "i4"), "3 labels, there are 4 inputs"),
        (np.array([0, 1, -1, 0]), "negative"),
        (np.array(3), "integers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: Array, words: str) -> None:
    np.save(tmp_path / "y.npy", labels)
    data = npz(tmp_path / "a.npz", x=np.ones((4, 3, 2)))
    with pytest.raises(BadInput, match=words):
        samples.samples(WANTED[:1], Inputs(data, tmp_path / "y.npy"))


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY", b"nonsense", b"\x93NUMPY\1\0\xff\xff{"])
def test_files_that_are_no_arrays_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(BadInput, match="not arrays"):
        samples.samples(WANTED, Inputs(tmp_path / "a.npz"))
    with pytest.raises(OutputError):
        samples.samples(WANTED, Inputs(tmp_path / "missing.npz"))


def test_pickles_are_not_run(tmp_path: Path) -> None:
    values = np.empty(4, object)
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(BadInput, match="not arrays"):
        samples.samples(WANTED[:1], Inputs(tmp_path / "a.npy"))
    np.savez(tmp_path / "a.npz", x=values)
    with pytest.raises(BadInput, match="not arrays"):
        samples.samples(WANTED[:1], Inputs(tmp_path / "a.npz"))


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="belong to --data"):
        samples.samples(WANTED, Inputs(labels=tmp_path / "y.npy"))
    with pytest.raises(UsageError, match="0 inputs"):
        samples.samples(WANTED, Inputs(count=0))


def test_seeded_inputs_are_those_of_the_page() -> None:
    from shrink.site import seeded_input

    found = samples.samples(WANTED, Inputs(count=2))
    for seed, sample in enumerate(found.values):
        np.testing.assert_array_equal(sample["x"], seeded_input(seed, 0, (1, 3, 2), "float32"))
        np.testing.assert_array_equal(sample["n"], seeded_input(seed, 1, (1,), "int64"))


# Pictures


def decoded(data: str) -> Array:
    from skimage.io import imread

    found: Array = imread(io.BytesIO(base64.b64decode(data)))
    return found


@given(st.sampled_from([(5, 7), (1, 1), (9, 4, 3), (1, 30, 3)]), st.integers(0, 9))
def test_png_files_are_read_by_others(shape: tuple[int, ...], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype("u1")
    np.testing.assert_array_equal(decoded(base64.b64encode(png(pixels)).decode()), pixels)


def test_pictures_show_the_worst_and_a_typical_input() -> None:
    before = [np.full((1, 1, 8, 9), 0.2 * n, "f4") for n in range(4)]
    after = [x + np.float32(d) for x, d in zip(before, (0.01, 0.0, 0.05, 0.02), strict=True)]
    found = drawing.drawn(before, after, [40.0, None, 26.0, 34.0], 10_000)
    assert found is not None
    assert (found["worst"]["input"], found["typical"]["input"]) == (2, 3)
    worst = found["worst"]
    assert set(decoded(worst["original"]).reshape(-1)) == {round(0.4 * 255)}
    assert set(decoded(worst["variant"]).reshape(-1)) == {round(0.45 * 255)}
    assert set(decoded(worst["difference_x10"]).reshape(-1)) == {round(0.5 * 255)}
    assert decoded(worst["original"]).shape == (8, 9)
    assert worst["note"] is None
    assert drawing.drawn(before, before, [None] * 4, 10_000) is None


@pytest.mark.parametrize(
    ("values", "grey"),
    [((-1.0, 1.0, 0.0), (0, 255, 128)), ((0.0, 255.0, 51.0), (0, 255, 51)), ((-3.0, 5.0, 1.0), (0, 255, 128))],
)
def test_black_and_white_are_the_ends_of_the_range(values: tuple[float, ...], grey: tuple[int, ...]) -> None:
    picture = np.repeat(np.array(values, "f4"), 64 // 3 + 1)[:63].reshape(1, 1, 9, 7)
    found = drawing.drawn([picture], [picture + np.float32(1e-3)], [50.0], 10_000)
    assert found is not None
    assert sorted(set(decoded(found["worst"]["original"]).reshape(-1).tolist())) == sorted(grey)


def test_large_pictures_are_cut_to_where_most_differs() -> None:
    rng = np.random.default_rng(0)
    before = rng.random((1, 3, 300, 500), "f4")
    after = before.copy()
    after[0, :, 200:210, 400:410] += 0.5
    found = drawing.drawn([before], [after], [30.0], 60_000)
    assert found is not None
    total = sum(len(found[which][what]) for which in found for what in ("original", "variant", "difference_x10"))
    assert 20_000 < total <= 60_000
    side = len(decoded(found["worst"]["original"]))
    assert found["worst"]["note"] == f"{side} × {side} of 500 × 300 pixels, where most differs"
    assert (decoded(found["worst"]["difference_x10"]).max(axis=2) == 255).sum() == 100


def test_alpha_is_left_out() -> None:
    picture = np.zeros((1, 4, 8, 8), "f4")
    found = drawing.drawn([picture], [picture + np.float32(0.1)], [20.0], 10_000)
    assert found is not None
    assert decoded(found["worst"]["variant"]).shape == (8, 8, 3)
