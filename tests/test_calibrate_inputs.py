"""What a network is calibrated on: arrays and pictures of the user, distributions, synthetic pictures."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shrink import given as given_network
from shrink.calibrate import pictures
from shrink.calibrate.inputs import (
    Calibration,
    Entry,
    Input,
    calibration,
    default_distribution,
    inputs_of,
    parse_distribution,
    parse_range,
    vocabulary,
)
from shrink.calibrate.pictures import Size
from shrink.errors import BadInput, MissingDependency, OutputError, ShrinkError, UsageError

Array = NDArray[Any]

RGB = Input("x", "float32", (1, 3, 16, 24))
NOISE = Input("z", "float32", (1, 110))
LUMA = (0.299, 0.587, 0.114)


def of(found: Calibration, name: str = "x") -> Array:
    return np.concatenate([sample[name] for sample in found.samples])


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype("u1")


def saved(path: Path, values: Array, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def same(a: Calibration, b: Calibration) -> bool:
    return a.source == b.source and all(
        x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a.samples, b.samples, strict=True)
    )


# Arrays


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.arange(80.0).reshape(10, 2, 4)
    np.savez(tmp_path / "i.npz", x=x, n=np.arange(10))
    inputs = [Input("x", "float32", (1, 2, 4)), Input("n", "int64", (1,))]
    found = calibration(inputs, files=tmp_path / "i.npz", count=64)
    assert found.source == "i.npz"
    np.testing.assert_array_equal(of(found), x.astype("f4"))
    np.testing.assert_array_equal(of(found, "n"), np.arange(10))


def test_a_single_number_is_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.arange(3.0))
    options: list[dict[str, Any]] = [{"files": tmp_path / "i.npy"}, {"distribution": "constant:2"}, {}]
    for option in options:
        for sample in calibration([Input("x", "float32", ())], **option).samples:
            assert type(sample["x"]) is np.ndarray
            assert sample["x"].shape == ()


def test_samples_are_taken_evenly_from_more(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.arange(10.0).reshape(10, 1))
    found = calibration([Input("x", "float32", (1, 1))], files=tmp_path / "i.npy", count=4)
    assert found.source == "4 of 10 samples in i.npy"
    assert of(found).reshape(-1).tolist() == [0, 2, 5, 7]


# Pictures of a folder


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("last", [False, True])
def test_a_picture_of_the_very_size(tmp_path: Path, channels: int, last: bool) -> None:
    picture = pixels(16, 24, 4 if channels == 4 else 3)
    saved(tmp_path / "a.png", picture)
    shape = (1, 16, 24, channels) if last else (1, channels, 16, 24)
    found = calibration([Input("x", "float32", shape)], files=tmp_path, count=2)
    assert found.source == f"1 picture in {tmp_path.name}"
    expected = picture / 255.0
    if channels == 1:
        expected = (expected @ LUMA)[:, :, None]
    for sample in found.samples:
        got = sample["x"][0] if last else sample["x"][0].transpose(1, 2, 0)
        assert got.dtype == np.float32
        assert sample["x"].flags.c_contiguous
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "limits", "low", "high"),
    [
        ("float32", None, 0, 1),
        ("float32", (-1.0, 1.0), -1, 1),
        ("float16", (0.0, 255.0), 0, 255),
        ("float64", (-0.5, 2.0), -0.5, 2),
        ("uint8", None, 0, 255),
        ("int8", None, -128, 127),
        ("int32", (0.0, 2147483647.0), 0, 2147483647),
    ],
)
def test_black_and_white_are_the_ends_of_the_range(
    tmp_path: Path, dtype: str, limits: tuple[float, float] | None, low: float, high: float
) -> None:
    picture = np.zeros((16, 24, 3), "u1")
    picture[:, 12:] = 255
    saved(tmp_path / "a.png", picture)
    wanted = Input("x", dtype, RGB.shape)
    values = of(calibration([wanted], files=tmp_path, count=1, input_range=limits))
    assert values.dtype == dtype
    assert set(values[..., :12].reshape(-1).tolist()) == {low}
    assert set(values[..., 12:].reshape(-1).tolist()) == {high}


def test_crops_are_parts_of_larger_pictures(tmp_path: Path) -> None:
    whole = [pixels(40, 60, seed=n) for n in range(2)]
    saved(tmp_path / "a.png", whole[0])
    saved(tmp_path / "b.bmp", whole[1])
    found = calibration([RGB], files=tmp_path, count=6, seed=3)
    assert found.source == f"2 pictures in {tmp_path.name}"
    places = []
    for number, crop in enumerate(np.rint(of(found) * 255).astype("u1").transpose(0, 2, 3, 1)):
        windows = np.lib.stride_tricks.sliding_window_view(whole[number % 2], crop.shape).squeeze(2)
        at = np.argwhere((windows == crop).all(axis=(2, 3, 4)))
        assert len(at) == 1
        places.append((number % 2, *at[0].tolist()))
    assert len(set(places)) == 6
    assert same(found, calibration([RGB], files=tmp_path, count=6, seed=3))
    assert not same(found, calibration([RGB], files=tmp_path, count=6, seed=4))


def test_batches_have_different_crops(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", pixels(40, 60))
    found = calibration([Input("x", "float32", (3, 3, 16, 24))], files=tmp_path, count=2)
    assert [s["x"].shape for s in found.samples] == [(3, 3, 16, 24)] * 2
    assert len({row.tobytes() for row in of(found)}) == 6


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 10), (100, 5), (1, 1), (1, 5000)])
def test_small_pictures_are_enlarged_until_the_crop_fits(tmp_path: Path, height: int, width: int) -> None:
    smooth = np.linspace(0, 1, height)[:, None, None] + np.linspace(0, 0.5, width)[None, :, None]
    saved(tmp_path / "a.png", np.repeat(smooth / 1.5 * 255, 3, axis=2).astype("u1"))
    values = of(calibration([RGB], files=tmp_path, count=3))
    assert values.shape == (3, 3, 16, 24)
    assert 0 <= values.min() <= values.max() <= 1
    # As smooth as the original, and not cut out of a frame of black.
    assert np.abs(np.diff(values, axis=3)).max() < 0.3
    if min(height, width) > 1:
        assert values.max() > 0.05


def test_enlarging_keeps_the_proportions(tmp_path: Path) -> None:
    picture = np.zeros((8, 24, 3), "u1")
    picture[:, 8:16] = 255
    saved(tmp_path / "a.png", picture)
    # Twice as high, so twice as wide: the bar of 8 pixels becomes one of 16, cut somewhere.
    values = of(calibration([RGB], files=tmp_path, count=8))
    assert all(8 <= (row[0, 8] > 0.5).sum() <= 17 for row in values)
    assert max(int((row[0, 8] > 0.5).sum()) for row in values) >= 14


def test_pictures_are_taken_by_name_and_evenly_from_more(tmp_path: Path) -> None:
    for number, name in enumerate(["d.png", "b.PNG", "é.png", "a.gif", "c.webp", "図 1.png"]):
        saved(
            tmp_path / name, np.full((16, 24, 3), 40 * number, "u1"), **({"lossless": True} if "webp" in name else {})
        )
    found = calibration([RGB], files=tmp_path, count=6)
    assert np.rint(of(found)[:, 0, 0, 0] * 255).tolist() == [120, 40, 160, 0, 80, 200]
    found = calibration([RGB], files=tmp_path, count=3)
    assert found.source == f"3 of 6 pictures in {tmp_path.name}"
    assert np.rint(of(found)[:, 0, 0, 0] * 255).tolist() == [120, 160, 80]


def test_other_files_links_and_folders_are_left_alone(tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    outside = saved(tmp_path / "secret.png", np.full((16, 24, 3), 255, "u1"))
    (inner / "a.png").symlink_to(outside)
    (inner / "b.png").mkdir()
    (inner / "c.txt").write_text("no picture")
    (inner / "png").write_text("no picture")
    with pytest.raises(BadInput, match="no pictures"):
        calibration([RGB], files=inner)
    saved(inner / "d.png", np.zeros((16, 24, 3), "u1"))
    found = calibration([RGB], files=inner, count=2)
    assert found.source == "1 picture in in"
    assert not of(found).any()


def test_only_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((16, 24, 3), v, "u1")) for v in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert of(calibration([RGB], files=tmp_path, count=2)).min() == 1


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    picture = np.zeros((16, 24, 4), "u1")
    picture[:, :12, 3] = 255
    picture[:, 12:, 3] = 51
    saved(tmp_path / "a.png", picture)
    values = of(calibration([RGB], files=tmp_path, count=1))
    assert not values[..., :12].any()
    np.testing.assert_allclose(values[..., 12:], 0.8, atol=1e-6)
    alpha = of(calibration([Input("x", "float32", (1, 4, 16, 24))], files=tmp_path, count=1))[:, 3]
    np.testing.assert_allclose(alpha[..., 12:], 0.2, atol=1e-6)


def test_pictures_of_other_modes(tmp_path: Path) -> None:
    deep = (np.arange(16 * 24).reshape(16, 24) * 170).astype("u2")
    saved(tmp_path / "a.png", deep)
    np.testing.assert_allclose(of(calibration([RGB], files=tmp_path, count=1))[0, 1], deep / 65535, atol=1 / 255)
    (tmp_path / "a.png").unlink()
    picture = Image.fromarray(np.full((16, 24, 3), (255, 0, 0), "u1"))
    for number, mode in enumerate(["P", "CMYK", "1", "L", "LA"]):
        (tmp_path / "a.png").unlink(missing_ok=True)
        (tmp_path / "a.jpg").unlink(missing_ok=True)
        picture.convert(mode).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
        red, green, _ = of(calibration([RGB], files=tmp_path, count=1, seed=number))[0].mean(axis=(1, 2))
        expected = (1, 0) if mode in ("P", "CMYK") else (0.299, 0.299)
        assert (red, green) == pytest.approx(expected, abs=0.02)


def encoded(form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_cut_off_pictures_are_refused(tmp_path: Path, form: str, share: float) -> None:
    data = encoded(form)
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(data)
    calibration([RGB], files=tmp_path, count=1)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadInput, match="not a whole picture") as refused:
        calibration([RGB], files=tmp_path, count=1)
    assert f"a.{form.lower()}" in str(refused.value)


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (claiming(10_000, 10_000), "10000 × 10000 pixels, more than"),
        (claiming(50_000, 50_000), "far more than"),
        (claiming(2**31 - 1, 2**31 - 1), "far more than"),
        (claiming(0, 5), "not a whole picture"),
        (claiming(64, 64), "not a whole picture"),
        (b"", "not a whole picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a whole picture"),
        (b"P6 9 9 255 " + bytes(243), "not a whole picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a whole picture"),
    ],
)
def test_hostile_pictures_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "evil\u202e.png").write_bytes(data)
    with pytest.raises(BadInput, match=words) as refused:
        calibration([RGB], files=tmp_path, count=1)
    assert "evil\\u202e.png" in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "GIF"]), st.data())
def test_damaged_pictures_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, form: str, data: Any) -> None:
    held = bytearray(encoded(form))
    for _ in range(4):
        # Most of what can go wrong stands in front.
        at = data.draw(st.integers(0, min(len(held) - 1, 200)))
        held[at] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a.png").write_bytes(held)
    try:
        values = of(calibration([RGB], files=folder, count=1))
    except BadInput:
        return
    assert values.shape == RGB.shape
    assert 0 <= values.min() <= values.max() <= 1


def test_a_folder_without_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a.png", pixels(16, 24))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependency, match=re.escape("shrink[calibrate]")):
        calibration([RGB], files=tmp_path)


def test_other_inputs_beside_pictures_get_the_usual(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", pixels(16, 24))
    inputs = [Input("t", "int64", (1, 5)), RGB]
    found = calibration(inputs, files=tmp_path, count=3, tokens={"t": 7})
    assert found.source == f"tokens:7, 1 picture in {tmp_path.name}"
    assert of(found, "t").shape == (3, 5)


# Distributions


def test_noise_and_a_label_in_one_input() -> None:
    found = calibration([NOISE], distribution=" normal , onehot:10 ", count=400)
    assert found.source == "normal*100,onehot:10"
    values = of(found, "z")
    assert values.dtype == np.float32
    noise, label = values[:, :100], values[:, 100:]
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert set(label.reshape(-1).tolist()) == {0, 1}
    np.testing.assert_array_equal(label.sum(axis=1), 1)
    assert (label.sum(axis=0) > 15).all()


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("onehot:10,normal", [10, 100]),
        ("onehot:10,uniform*40,normal", [10, 40, 60]),
        ("constant:2*100,onehot:10", [100, 10]),
        ("onehot:55,onehot:55", [55, 55]),
        ("normal*110", [110]),
        ("onehot:110", [110]),
    ],
)
def test_entries_fill_axis_1_in_order(text: str, widths: list[int]) -> None:
    values = of(calibration([NOISE], distribution=text, count=4), "z")
    parts = np.split(values, np.cumsum(widths)[:-1], axis=1)
    for kind, part, width in zip(text.split(","), parts, widths, strict=True):
        assert part.shape == (4, width)
        if kind.startswith("onehot"):
            assert (np.sort(part, axis=1)[:, -2:] == (0, 1)).all()
        elif kind.startswith("constant"):
            assert (part == 2).all()
        else:
            assert len(np.unique(part)) == part.size


@pytest.mark.parametrize(
    ("text", "dtype", "low", "high", "whole"),
    [
        ("uniform", "float32", 0, 1, False),
        ("uniform:-1:1", "float32", -1, 1, False),
        ("uniform:-3e4:3e4", "float16", -3e4, 3e4, False),
        ("normal:5:0", "float64", 5, 5, True),
        ("integers:-3:4", "int8", -3, 4, True),
        ("integers:250:255", "uint8", 250, 255, True),
        ("integers:0:1", "bool", 0, 1, True),
        ("integers:0:9", "float32", 0, 9, True),
        ("tokens:6", "int64", 0, 5, True),
        ("constant:1", "int64", 1, 1, True),
        ("constant:-.5", "float32", -0.5, -0.5, False),
    ],
)
def test_values_have_the_range_that_was_asked_for(text: str, dtype: str, low: float, high: float, whole: bool) -> None:
    found = calibration([Input("x", dtype, (2, 300))], distribution=text, count=4)
    assert found.source == text.replace("-.5", "-0.5").replace("3e4", "30000.0")
    values = of(found)
    assert values.dtype == dtype
    numbers = values.astype(float)
    if whole:
        assert sorted(set(numbers.reshape(-1).tolist())) == list(range(int(low), int(high) + 1))
    else:
        assert low <= numbers.min() <= numbers.max() <= high
        assert numbers.max() - numbers.min() >= 0.95 * (high - low)


def test_normal_numbers_have_mean_and_deviation() -> None:
    values = of(calibration([Input("x", "float32", (1, 5000))], distribution="normal:3:0.5", count=4))
    assert values.mean() == pytest.approx(3, abs=0.02)
    assert values.std() == pytest.approx(0.5, abs=0.01)


def test_onehot_sequences_have_the_classes_last() -> None:
    values = of(calibration([Input("x", "float32", (1, 40, 57))], distribution="onehot:57", count=3))
    np.testing.assert_array_equal(values.sum(axis=2), 1)
    assert len(set(values.argmax(axis=2).reshape(-1).tolist())) > 30
    values = of(calibration([Input("x", "float32", (1, 5, 3, 2))], distribution="onehot:5", count=3))
    np.testing.assert_array_equal(values.sum(axis=1), 1)


def test_one_entry_for_each_input() -> None:
    inputs = [Input("a", "float32", (1, 9)), Input("b", "int64", (1, 7)), RGB]
    found = calibration(inputs, distribution="normal,tokens:1000,pictures", count=3)
    assert found.source == "normal, tokens:1000, synthetic pictures"
    assert [of(found, n).shape for n in "abx"] == [(3, 9), (3, 7), (3, 3, 16, 24)]
    assert of(found, "b").max() > 100
    np.testing.assert_array_equal(of(found), of(calibration([RGB], count=3, seed=2 << 32)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not written as"),
        ("normal,", "not written as"),
        ("gauss", "'gauss' is none of normal, uniform"),
        ("Normal", "not written as"),
        ("normal,gauss", "'gauss' in 'normal,gauss' is none of"),
        ("normal:1", "has 1 numbers, not 0 or 2"),
        ("uniform:1:2:3", "has 3 numbers"),
        ("tokens", "has 0 numbers, not 1"),
        ("pictures:1", "has 1 numbers, not 0"),
        ("normal:nan:1", "a number that is none"),
        ("normal:0:inf", "a number that is none"),
        ("normal:0:1e999", "a number that is none"),
        ("uniform:0x1:2", "a number that is none"),
        ("uniform:1_0:20", "a number that is none"),
        ("uniform:١:٢", "a number that is none"),
        ("normal:0:-1", "negative standard deviation"),
        ("uniform:1:0", "goes down"),
        ("integers:5:4", "goes down"),
        ("integers:0:1.5", "whole number belongs"),
        ("tokens:0", "has no values"),
        ("tokens:-4", "has no values"),
        ("onehot:99999999999", "has no values"),
        ("tokens:9999999999999999999999", "whole number belongs"),
        ("normal*0", "not written as"),
        ("normal*-1", "not written as"),
        ("normal*2*3", "not written as"),
        ("normal**2", "not written as"),
        ("onehot:10*10", "has its width already"),
        ("pictures*3", "has its width already"),
        ("normal\x00\u202e", "not written as"),
        ("normal,normal", "leaves the widths of 2 entries open"),
        ("normal*100,onehot:11", "111 together, axis 1 of the input z has 110"),
        ("normal*99,onehot:10", "109 together, axis 1"),
        ("normal*110,uniform", "110 and one more together"),
        ("onehot:10", "does not fit the input z, its shape is [1, 110]"),
        ("normal*9", "normal*9 does not fit the input z"),
        ("pictures", "z takes no pictures, its shape is [1, 110]"),
        ("pictures,normal", "pictures fill the input z alone"),
        ("constant:1e39", "too large for the input z of type float32"),
        ("normal:0:1e38", "too large"),
        ("uniform:-1e39:0", "too large"),
    ],
)
def test_distributions_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        calibration([NOISE], distribution=text)
    assert refused.value.hint or "large" in words
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("normal", "int64"),
        ("uniform", "int32"),
        ("uniform:0:1", "bool"),
        ("constant:0.5", "int64"),
        ("constant:2", "bool"),
        ("integers:0:256", "uint8"),
        ("integers:-1:1", "uint8"),
        ("tokens:129", "int8"),
        ("tokens:3", "bool"),
    ],
)
def test_distributions_that_do_not_fit_the_type_are_refused(text: str, dtype: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text} is not for the input x of type {dtype}")):
        calibration([Input("x", dtype, (1, 5))], distribution=text)


@pytest.mark.parametrize(
    ("inputs", "text", "words"),
    [
        ([RGB, NOISE], "normal", "1 entries, the network 2 inputs: x, z"),
        ([RGB, NOISE], "normal,normal,normal", "3 entries"),
        ([Input("x", "float32", (5,))], "normal,onehot:2", "no axis 1"),
        ([Input("x", "float32", ())], "onehot:2", "does not fit"),
        ([], "normal", "no inputs"),
    ],
)
def test_entries_that_do_not_fit_the_inputs_are_refused(inputs: list[Input], text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        calibration(inputs, distribution=text)


SMALL = st.floats(-1e3, 1e3)
WIDTHS = st.none() | st.integers(1, 10**9)
ENTRIES = st.one_of(
    st.builds(lambda m, s, w: Entry("normal", (m, abs(s)), w), SMALL, SMALL, WIDTHS),
    st.builds(lambda a, b, w: Entry("uniform", (min(a, b), max(a, b)), w), SMALL, SMALL, WIDTHS),
    st.builds(lambda a, n, w: Entry("integers", (a, a + n), w), st.integers(-99, 99), st.integers(0, 99), WIDTHS),
    st.builds(lambda n, w: Entry("tokens", (n,), w), st.integers(1, 10**9), WIDTHS),
    st.builds(lambda n: Entry("onehot", (n,), n), st.integers(1, 10**9)),
    st.builds(lambda n, w: Entry("constant", (n,), w), SMALL | st.integers(-(10**17), 10**17), WIDTHS),
    st.builds(lambda kind: Entry(kind), st.sampled_from(["normal", "uniform", "pictures"])),
)


@given(st.lists(ENTRIES, min_size=1, max_size=5))
def test_what_is_written_is_read(entries: list[Entry]) -> None:
    text = ", ".join(map(str, entries))
    found = parse_distribution(text)
    assert found == tuple(entries)
    assert [[type(n) for n in e.numbers] for e in found] == [[type(n) for n in e.numbers] for e in entries]


TEXTS = st.text() | st.lists(
    st.sampled_from(["normal", "uniform", "integers", "tokens", "onehot", "constant", "pictures"]).flatmap(
        lambda kind: st.text("0123456789:*-.e", max_size=7).map(lambda rest: kind + rest)
    ),
    min_size=1,
    max_size=3,
).map(",".join)


@given(
    TEXTS,
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "float16", "float64", "int64", "uint8", "bool"]),
            st.sampled_from([(1, 12), (2, 3, 4), (1,), (), (1, 3, 8, 9), (1, 8, 9, 1)]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_text_gives_samples_or_a_usage_error(text: str, kinds: list[tuple[str, tuple[int, ...]]]) -> None:
    inputs = [Input(f"x{n}", dtype, shape) for n, (dtype, shape) in enumerate(kinds)]
    found, refused = None, ""
    try:
        found = calibration(inputs, distribution=text, count=2)
    except UsageError as error:
        refused = str(error)
    if found is None:
        assert refused.isprintable()
        return
    assert len(found.samples) == 2
    for sample in found.samples:
        for wanted in inputs:
            assert sample[wanted.name].shape == wanted.shape
            assert sample[wanted.name].dtype == wanted.dtype
            assert np.isfinite(sample[wanted.name]).all()


# What is taken where nothing is said


@pytest.mark.parametrize(
    ("dtype", "shape", "tokens", "expected"),
    [
        ("float32", (1, 3, 8, 8), None, "pictures"),
        ("float16", (2, 1, 9, 30), None, "pictures"),
        ("uint8", (1, 20, 8, 4), None, "pictures"),
        ("float32", (1, 8, 8, 1), None, "pictures"),
        ("float32", (1, 3, 8, 7), None, "normal"),
        ("float32", (1, 2, 8, 8), None, "normal"),
        ("float32", (3, 8, 8), None, "normal"),
        ("float64", (1, 110), None, "normal"),
        ("float32", (), None, "normal"),
        ("int64", (1, 20), None, "integers:0:1"),
        ("bool", (1, 1, 8, 8), None, "integers:0:1"),
        ("int64", (1, 20), 5000, "tokens:5000"),
        ("int64", (1, 1, 8, 8), 5000, "tokens:5000"),
        ("uint8", (1, 20), 256, "tokens:256"),
        ("float32", (1, 20, 57), 57, "onehot:57"),
    ],
)
def test_defaults_by_shape_and_type(dtype: str, shape: tuple[int, ...], tokens: int | None, expected: str) -> None:
    wanted = Input("x", dtype, shape)
    given_by_name = None if tokens is None else {"x": tokens, "other": 3}
    assert [str(e) for e in default_distribution([wanted], given_by_name)] == [expected]
    found = calibration([wanted], count=2, tokens=given_by_name)
    assert found.source == expected.replace("pictures", "synthetic pictures")
    assert all(s["x"].shape == shape and s["x"].dtype == dtype for s in found.samples)


@pytest.mark.parametrize(
    ("shape", "ends_in", "expected"),
    [
        ((1, 5, 27), "Softmax", {"x": 27}),
        ((1, 5, 27), "LogSoftmax", {"x": 27}),
        ((1, 5, 27), "Sigmoid", {}),
        ((1, 5, 26), "Softmax", {}),
        ((1, 27), "Softmax", {}),
        # Ten readings of ten sensors, and ten classes.
        ((1, 10, 10), "Softmax", {}),
    ],
)
def test_sequences_as_wide_as_what_a_softmax_gives_are_one_hot(
    shape: tuple[int, ...], ends_in: str, expected: dict[str, int], tmp_path: Path
) -> None:
    make = onnx.helper
    width = 27 if shape[-1] > 20 else 10
    weights = np.ones((shape[-1], width), np.float32)
    nodes = [make.make_node("MatMul", ["x", "w"], ["h"]), make.make_node(ends_in, ["h"], ["y"])]
    ends = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [*shape[:-1], last])
        for name, last in (("x", shape[-1]), ("y", width))
    ]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weights, "w")])
    path = tmp_path / "model.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    network, _ = given_network.network(str(path), None, (",".join(map(str, shape)),))
    assert vocabulary(network) == expected
    entries = default_distribution(inputs_of(network), vocabulary(network))
    assert [str(entry) for entry in entries] == ["onehot:27" if expected else "normal"]


@pytest.mark.parametrize("tokens", [0, -5, 257])
def test_a_vocabulary_that_cannot_be_is_refused(tokens: int) -> None:
    with pytest.raises(UsageError, match=f"tokens:{tokens}"):
        calibration([Input("x", "uint8", (1, 5))], tokens={"x": tokens})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "0 inputs are not from 1"),
        ({"count": 10_001}, "10001 inputs"),
        ({"seed": -1}, "negative"),
        ({"inputs": [Input("x", "float32", (1, 3, 4096, 4096))]}, "take 12885 MB"),
        ({"input_range": (0.0, 1.0), "inputs": [NOISE]}, "a range belongs to pictures"),
        ({"input_range": (0.0, 1.0), "distribution": "normal"}, "a range belongs to pictures"),
        ({"input_range": (1.0, 1.0)}, "the range 1,1 is not for"),
        ({"input_range": (0.0, float("nan"))}, "is not for"),
        ({"input_range": (0.0, 1e39)}, "is not for the input x of type float32"),
        ({"input_range": (0.0, 256.0), "inputs": [Input("x", "uint8", (1, 3, 8, 8))]}, "of type uint8"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        calibration(**{"inputs": [RGB], **options})


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", pixels(16, 24))
    np.save(tmp_path / "i.npy", np.zeros(RGB.shape))
    cases: list[tuple[Sequence[Input], dict[str, Any], type[ShrinkError], str]] = [
        ([RGB], {"files": tmp_path, "distribution": "normal"}, UsageError, "not from both"),
        ([NOISE], {"files": tmp_path}, UsageError, "one input that takes pictures; this one takes z"),
        ([RGB, Input("y", "float32", RGB.shape)], {"files": tmp_path}, UsageError, "one input that takes pictures"),
        ([RGB], {"files": tmp_path / "i.npy", "input_range": (0.0, 1.0)}, UsageError, "taken as they are"),
        ([RGB], {"files": tmp_path / "a.png"}, BadInput, "not arrays"),
        ([NOISE], {"files": tmp_path / "i.npy"}, BadInput, "its shape is"),
        ([RGB], {"files": tmp_path / "missing"}, OutputError, "No such file"),
    ]
    for inputs, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            calibration(inputs, **options)


def test_ranges_as_text() -> None:
    assert parse_range("-1,1") == (-1, 1)
    assert parse_range(" 0 , 2.5e2 ") == (0, 250)
    for text in ("", "1", "1,", "0,1,2", "a,b", "0,inf", "nan,1", "1,0", "1,1", "0;1"):
        with pytest.raises(UsageError, match="range"):
            parse_range(text)


# Synthetic pictures


def test_same_seed_same_bytes() -> None:
    inputs = [RGB, NOISE]
    found = calibration(inputs, count=9, seed=5)
    assert same(found, calibration(inputs, count=9, seed=5))
    assert not same(found, calibration(inputs, count=9, seed=6))
    fewer = calibration(inputs, count=4, seed=5)
    np.testing.assert_array_equal(of(fewer), of(found)[:4])
    np.testing.assert_array_equal(of(fewer, "z"), of(found, "z")[:4])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 31), (64, 40), (128, 128)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_synthetic_pictures_are_pictures(height: int, width: int, channels: int) -> None:
    found = list(pictures.synthetic(16, Size(height, width, channels), 1))
    assert len({p.tobytes() for p in found}) == 16
    for picture in found:
        assert picture.shape == (height, width, channels)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() <= picture.max() <= 1
        if channels != 1:
            np.testing.assert_allclose(picture * 255, np.rint(picture * 255), atol=1e-4)


def test_grey_pictures_are_the_coloured_ones_without_colour() -> None:
    coloured = pictures.synthetic(4, Size(20, 20, 3), 1)
    for grey, colours in zip(pictures.synthetic(4, Size(20, 20, 1), 1), coloured, strict=True):
        np.testing.assert_allclose(grey[:, :, 0], colours @ np.array(LUMA, "f4"), atol=1e-5)


def slope(field: Array) -> float:
    """How log amplitude falls with log frequency, over rings of the spectrum from 4 periods to a third of the rate."""
    height, width = field.shape
    amplitude = np.abs(np.fft.fft2(field))
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    edges = np.geomspace(4 / min(height, width), 0.33, 12)
    rings = [amplitude[(f >= a) & (f < b)].mean() for a, b in pairwise(edges)]
    return float(np.polyfit(np.log((edges[1:] + edges[:-1]) / 2), np.log(rings), 1)[0])


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2, 1.6])
@pytest.mark.parametrize("shape", [(128, 128), (96, 200)])
def test_one_over_f_noise_falls_as_it_says(exponent: float, shape: tuple[int, int]) -> None:
    fields = [pictures.one_over_f(np.random.default_rng(n), exponent, *shape) for n in range(8)]
    assert np.mean([slope(f) for f in fields]) == pytest.approx(-exponent, abs=0.05)
    for field in fields:
        assert abs(float(field.mean())) < 1e-3
        assert float(field.std()) == pytest.approx(1, abs=1e-3)


def test_synthetic_pictures_have_spectra_as_photographs_have() -> None:
    found = [p[:, :, 0].astype(float) for p in pictures.synthetic(64, Size(128, 128, 1), 0)]
    steep = [slope((p - p.mean()) * np.outer(np.hanning(128), np.hanning(128))) for p in found]
    assert -1.7 < np.median(steep) < -0.8
    assert np.std(steep) > 0.1


def test_synthetic_pictures_have_edges_textures_and_flat_parts() -> None:
    found = np.stack(list(pictures.synthetic(64, Size(128, 128, 1), 0)))[:, :, :, 0]
    across = np.abs(np.diff(found, axis=2))
    assert 0.15 < (across < 1 / 255).mean() < 0.75  # flat
    assert ((across > 3 / 255) & (across < 50 / 255)).mean() > 0.15  # texture
    assert 0.01 < (across > 64 / 255).mean() < 0.1  # edges
    assert 0.005 < (found <= 0).mean() < 0.2
    assert 0.005 < (found >= 1).mean() < 0.4
    assert 0.3 < found.mean() < 0.7
    # Every quarter of the range is in use.
    assert (np.histogram(found, 4, (0, 1))[0] > 0.1 * found.size).all()


def test_colours_of_synthetic_pictures_go_together() -> None:
    found = np.stack(list(pictures.synthetic(64, Size(64, 64, 3), 0))).reshape(64, -1, 3)
    pairs = [np.corrcoef(p.T)[np.triu_indices(3, 1)] for p in found if p.std(axis=0).min() > 0.02]
    assert len(pairs) > 40
    assert 0.6 < float(np.median(pairs)) < 0.995
