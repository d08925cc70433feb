"""Every quantizer of the folder keeps its contract."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import shrink
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.coders import pack
from shrink.errors import UsageError
from shrink.model import Quantized
from shrink.quantizers import Kept, Quantizer, by_mode, eightbit, modes

F32 = NDArray[np.float32]
MODES = sorted(modes())

shapes = st.one_of(
    st.sampled_from([(), (0,), (1,), (3, 0, 2), (1, 1, 1, 1)]), hnp.array_shapes(min_dims=1, max_dims=4, max_side=9)
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Weights as they come, and as they should not: denormals, huge values, constants, a lone outlier.
arrays = st.one_of(
    shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=finite)),
    shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.floats(-1, 1, width=32))),
    shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=finite, fill=st.just(np.float32(1e-42)))),
    st.tuples(shapes, finite).map(lambda p: np.full(p[0], p[1], np.float32)),
)


def trained_like(size: int, seed: int = 0, outlier: float = 1.0) -> F32:
    x: F32 = np.random.default_rng(seed).standard_t(4, size).astype(np.float32) * np.float32(0.02)
    if size:
        x[0] *= np.float32(outlier)
    return x


def encoded(quantizer: Quantizer, x: F32) -> Quantized:
    out = quantizer.quantize("w", x)
    assert isinstance(out, Quantized)
    return out


@pytest.mark.parametrize("mode", MODES)
@given(x=arrays)
def test_error_is_within_the_stated_bound(mode: str, x: F32) -> None:
    quantizer = modes()[mode]
    out = quantizer.quantize("w", x)
    if isinstance(out, Kept):
        assert mode == "float16"
        assert np.abs(x).max() > 65504
        return
    values = out.array
    assert values.shape == x.shape
    assert values.dtype == np.float32
    error = np.abs(values.astype(np.float64) - x)
    assert error.max(initial=0.0) <= quantizer.bound(x, out)


@pytest.mark.parametrize("mode", MODES)
@given(x=arrays, level=st.sampled_from([1, 3]))
def test_packing_changes_no_value_and_never_grows(mode: str, x: F32, level: int) -> None:
    out = modes()[mode].quantize("w", x)
    if isinstance(out, Quantized):
        packed = pack(out, level)
        assert packed.size_bytes <= out.size_bytes
        assert packed.array.tobytes() == out.array.tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_same_values_give_the_same_bytes(mode: str) -> None:
    x = trained_like(30_000).reshape(100, 300)
    once, again = (encoded(modes()[mode], x.copy()) for _ in range(2))
    assert once.payload == again.payload
    assert once.steps == again.steps


@pytest.mark.parametrize("mode", MODES)
def test_the_input_is_left_alone(mode: str) -> None:
    x = trained_like(3000).reshape(30, 100)
    before = x.copy()
    x.flags.writeable = False
    modes()[mode].quantize("w", x)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("mode", MODES)
def test_any_memory_layout_gives_the_same_values(mode: str) -> None:
    x = trained_like(3000).reshape(30, 100)
    strided = np.asfortranarray(x)
    assert encoded(modes()[mode], np.ascontiguousarray(strided)).payload == encoded(modes()[mode], x).payload


# ---- float16


def test_float16_keeps_a_tensor_it_would_overflow() -> None:
    out = modes()["float16"].quantize("w", np.array([1.0, -65600.0], np.float32))
    assert isinstance(out, Kept)
    assert "65504" in out.reason


def test_float16_rounds_to_nearest_even_on_all_cores() -> None:
    x = trained_like(3_000_001)
    assert np.array_equal(encoded(modes()["float16"], x).array, x.astype(np.float16).astype(np.float32))
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2049.0, 2051.0], np.float32)
    assert encoded(modes()["float16"], ties).array.tolist() == [1.0, 1 + 2**-9, 2048.0, 2052.0]


# ---- eightbit


def webdnn_encode(x: F32) -> tuple[NDArray[np.uint8], float]:
    """WebDNN 1.2.11's own rule: scale max |w|, nearest code, except around 0 and 1 where its limits differ."""
    magnitudes = EIGHTBIT_TABLE[:128]
    limits = ((magnitudes[1:] + magnitudes[:-1]) / 2).astype(np.float32)
    limits[0], limits[-1] = 1.5e-6, 0.995703
    scale = np.maximum(np.max(np.abs(x)), np.float32(1e-20))
    codes = np.searchsorted(limits, np.abs(x) / scale) + (x < 0) * 128
    return codes.astype(np.uint8), float(scale)


def decoded(codes: NDArray[np.uint8], scale: float) -> F32:
    return (EIGHTBIT_TABLE * scale).astype(np.float32)[codes]


def energy(x: NDArray[np.floating]) -> float:
    return float(np.square(x.astype(np.float64)).sum())


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e4, 1e12])
@pytest.mark.parametrize("size", [1000, 50_000, 2_500_000])
def test_eightbit_is_never_worse_than_webdnn(size: int, outlier: float) -> None:
    x = trained_like(size, outlier=outlier)
    codes, scale = webdnn_encode(x)
    ours = encoded(modes()["eightbit"], x)
    assert energy(ours.array - x) <= energy(decoded(codes, scale) - x) * 1.0001


def test_eightbit_needs_fewer_bytes_than_webdnn_on_trained_weights(shared_models: Path) -> None:
    import zlib

    import deflate

    for name in ("upconv7_scale_rgb", "vgg7_noise0_y"):
        ours = theirs = ours_error = theirs_error = 0.0
        for tensor in shrink.load(shared_models / "waifu2x" / f"{name}.npz").tensors:
            x = tensor.array.reshape(-1)
            codes, scale = webdnn_encode(x)
            theirs += 16 + len(zlib.compress(codes.tobytes(), 9))
            theirs_error += energy(decoded(codes, scale) - x)
            out = encoded(modes()["eightbit"], x)
            ours += 16 + len(deflate.zlib_compress(out.payload, 12))
            ours_error += energy(out.array - x)
        assert ours < theirs * 0.98
        assert ours_error < theirs_error * 0.995


@pytest.mark.parametrize("seed", range(4))
def test_eightbit_leaves_coded_values_as_they_are(seed: int) -> None:
    x = decoded(*webdnn_encode(trained_like(20_000, seed)))
    assert np.array_equal(encoded(modes()["eightbit"], x).array, x)


@pytest.mark.parametrize("linear", [True, False])
def test_eightbit_cells_find_the_nearest_code(linear: bool) -> None:
    """The quick path over 16-bit cells, against the rule itself in float64."""
    x = trained_like(100_000, outlier=1 if linear else 1e5)
    largest = float(np.abs(x).max())
    cells = eightbit._Cells.of(x, largest)
    assert cells.linear is linear
    values = decoded(cells.codes(eightbit._code_of_cell(cells.centers, eightbit.MAGNITUDES, largest)), largest)
    nearest = np.abs(EIGHTBIT_TABLE * largest - x[:, None].astype(np.float64)).min(axis=1)
    cell = largest / 32000 if linear else np.abs(x) * 2.0**-11
    assert (np.abs(values - x.astype(np.float64)) <= nearest + cell).all()


def test_eightbit_codes_in_use_are_no_further_apart_than_the_bound_says() -> None:
    for used in eightbit._USED:
        assert used[0] == 0
        assert used[-1] == 1
        assert np.isin(used, eightbit.MAGNITUDES).all()
        # A cell of the index is 2⁻¹⁵ of the largest weight, which is at most 1 / 0.35 scales.
        assert np.diff(used).max() / 2 + 2.0**-15 / 0.35 <= eightbit._LARGEST_ERROR


# ---- int8 and int4


@pytest.mark.parametrize(("mode", "bits", "block"), [("int8", 8, 0), ("int4", 4, 32)])
@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=40), elements=st.floats(-1, 1, width=32))
)
def test_affine_is_never_worse_than_plain_symmetric_rounding(mode: str, bits: int, block: int, x: F32) -> None:
    top = 2 ** (bits - 1) - 1
    out = encoded(modes()[mode], x).array.reshape(len(x), -1)
    rows = x.reshape(len(x), -1).astype(np.float64)
    width = block or rows.shape[1]
    for start in range(0, rows.shape[1], width):
        part = rows[:, start : start + width]
        scale = np.maximum(np.abs(part).max(axis=1, keepdims=True) / top, 1e-38)
        plain = np.rint(part / scale) * scale
        ours = np.square(out[:, start : start + width] - part).sum(axis=1)
        # bfloat16 rounds int4's scales by up to 2⁻⁹, which plain rounding with an exact scale does not suffer.
        rounding = np.square(part).sum(axis=1) * (2.0**-16 if bits == 4 else 2.0**-40)
        assert (ours <= np.square(plain - part).sum(axis=1) * (1.1 if bits == 4 else 1.001) + rounding + 1e-70).all()


def test_affine_uses_a_zero_point_where_weights_are_one_sided() -> None:
    x = np.random.default_rng(0).uniform(1.0, 1.1, (8, 64)).astype(np.float32)
    assert encoded(modes()["int8"], x).steps[0].params["zero"] is True
    symmetric = np.abs(x).max() / 127 / np.sqrt(12)
    assert np.sqrt(energy(encoded(modes()["int8"], x).array - x) / x.size) < symmetric


def test_affine_keeps_the_zeros_of_a_pruned_tensor() -> None:
    x = trained_like(6400).reshape(64, 100) + np.float32(0.01)
    x[np.abs(x) < np.quantile(np.abs(x), 0.7)] = 0
    for mode in ("int8", "int4"):
        assert (encoded(modes()[mode], x).array[x == 0] == 0).all()


def test_keras_kernels_have_their_channels_last() -> None:
    x = trained_like(640).reshape(64, 10) * np.logspace(-3, 3, 10, dtype=np.float32)
    assert encoded(modes()["int8"], x).steps[0].params["axis"] == 0
    out = modes()["int8"].quantize("dense/kernel:0", x)
    assert isinstance(out, Quantized)
    assert out.steps[0].params["axis"] == 1
    assert energy((out.array - x) / np.abs(x).max(axis=0)) < energy(
        (encoded(modes()["int8"], x).array - x) / np.abs(x).max(axis=0)
    )


# ---- prune


@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(max_side=20), elements=st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0])),
    sparsity=st.floats(0, 1),
)
def test_prune_removes_exactly_the_asked_share_and_only_the_smallest(x: F32, sparsity: float) -> None:
    out = encoded(by_mode("prune", sparsity=sparsity), x).array
    gone = out != x
    assert np.count_nonzero(out == 0) >= round(sparsity * x.size)
    assert np.count_nonzero(gone) <= round(sparsity * x.size)
    if gone.any() and (~gone).any():
        assert np.abs(x[gone]).max() <= np.abs(x[~gone & (x != 0)]).min(initial=np.inf)


@pytest.mark.parametrize(
    ("mode", "parameters", "words"),
    [
        ("prune", {"sparsity": 1.5}, "sparsity"),
        ("prune", {"sparsity": "half"}, "sparsity"),
        ("prune", {"scope": "layer"}, "scope"),
        ("prune", {"colour": 1}, "colour"),
        ("int8", {"block": -1}, "block"),
        ("int8", {"bits": 5}, "bits"),
        ("fp3", {}, "fp3"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(mode: str, parameters: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        by_mode(mode, **parameters)
