"""Rounding with feedback of errors against plain rounding, exhaustive search, and the formula written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink.calibrate.layers import Layer, layers
from shrink.calibrate.layout import Layout, layout
from shrink.calibrate.rounding import NEAREST, PRICED, Coding, Rounded, damped, rounded, steadied, targets
from shrink.steps import DTYPES, Step, decode, half_octaves
from tests.rans_streams import entropy
from tests.test_calibrated import ODD

F64 = NDArray[np.float64]
BLOCK = 64


def cost(errors: F64, h: F64, g: F64) -> float:
    """tr(G E H Eᵀ), summed over groups."""
    return float(np.einsum("goi,gij,gpj,gop->", errors, h, errors, g, optimize=True))


def moments(rng: np.random.Generator, groups: int, n: int, rank: int, share: float = 0.01) -> F64:
    """Damped second moments of so many random vectors, whose sizes span a decade."""
    x = rng.standard_normal((groups, n, rank)) * np.logspace(0, -1, rank)
    return damped(x @ x.swapaxes(1, 2) / rank, share)


def matrix_layout(outputs: int, inputs: int, groups: int = 1) -> Layout:
    """A step for each row and column."""
    rows, shape = np.arange(groups * outputs), (groups * outputs, inputs)
    return Layout(shape, (0,), rows.reshape(groups, outputs), rows, np.arange(inputs))


def one_step(outputs: int, inputs: int) -> Layout:
    return Layout((outputs, inputs), (0,), np.zeros((1, outputs), np.int64), np.zeros(outputs, np.int64), None)


def nowhere(weights: F64) -> NDArray[np.bool_]:
    return np.zeros(weights.shape, bool)


def steps_of(made: Rounded, shape: Sequence[int]) -> F64:
    """The steps of a `matrix_layout`, or of one scale, by place."""
    rows = (made.scale * half_octaves(made.row_exponents.astype(int))).astype("f4").astype(float)
    columns = half_octaves(made.column_exponents.astype(int)).astype("f4").astype(float)
    steps: F64 = rows.reshape(*shape[:2], 1) * columns
    return steps


def pivots(moments: F64) -> F64:
    """What is left of each diagonal value when those of larger ones are known: D of LDLᵀ."""
    order = np.argsort(np.diag(moments), kind="stable")
    out: F64 = np.empty(len(order))
    out[order] = np.diag(np.linalg.cholesky(moments[np.ix_(order, order)])) ** 2
    return out


sizes = st.integers(1, 7)


@given(st.integers(0, 1 << 30), sizes, sizes, st.integers(1, 3), st.sampled_from([3.0, 1e-1, 1e-3]), st.booleans())
def test_the_cost_is_bounded(seed: int, outputs: int, inputs: int, groups: int, base: float, one: bool) -> None:
    """At most a quarter of the squared step for each weight, times what the factors of H and G have on their diagonals;
    so never more than three times what plain rounding to the same grid costs on average."""
    rng = np.random.default_rng(seed)
    groups = 1 if one else groups
    w = rng.standard_normal((groups, outputs, inputs)) * 10.0 ** rng.integers(-3, 4)
    h = moments(rng, groups, inputs, int(rng.integers(1, 2 * inputs + 1)))
    g = moments(rng, groups, outputs, int(rng.integers(1, 2 * outputs + 1)))
    place = one_step(outputs, inputs) if one else matrix_layout(outputs, inputs, groups)
    made = rounded(w, nowhere(w), h, g, base * float(np.abs(w).max()), place)
    steps = steps_of(made, w.shape)
    error = made.values.astype(float) - w
    # Values are float32.
    slack = 1e-5 * cost(np.abs(w), np.abs(h), np.abs(g))
    bound = np.array([np.outer(pivots(a), pivots(b)) for a, b in zip(g, h, strict=True)])
    assert cost(error, h, g) <= float((steps**2 / 4 * bound).sum()) * (1 + 1e-4) + slack
    on_average = np.einsum("goo,gii,goi->", g, h, steps**2 / 12)
    assert cost(error, h, g) <= 3 * on_average * (1 + 1e-4) + slack
    assert made.values.dtype == np.float32
    assert np.isfinite(made.values).all()


def exhaustive(w: F64, h: F64, g: F64, steps: F64, reach: int) -> float:
    """The least that any codes so close to plain rounding cost, of one group."""
    moves = np.array(list(itertools.product(range(-reach, reach + 1), repeat=w.size))).reshape(-1, *w.shape[1:])
    errors = (np.rint(w / steps) + moves) * steps - w
    return float(np.einsum("noi,ij,npj,op->n", errors, h[0], errors, g[0], optimize=True).min())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (2, 1), (1, 3), (3, 1), (2, 2)])
def test_close_to_the_best_of_all_codes(outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(outputs * 10 + inputs)
    found, plain, best = 0.0, 0.0, 0.0
    for _ in range(40):
        w = rng.standard_normal((1, outputs, inputs)) * 5
        h, g = moments(rng, 1, inputs, inputs), moments(rng, 1, outputs, outputs)
        made = rounded(w, nowhere(w), h, g, 1.0, matrix_layout(outputs, inputs))
        steps = steps_of(made, w.shape)
        ours = cost(made.codes * steps - w, h, g)
        least = exhaustive(w, h, g, steps, reach={2: 20, 3: 6, 4: 3}[w.size])
        found, best = found + ours, best + least
        plain += cost(np.rint(w / steps) * steps - w, h, g)
    assert found <= 1.25 * best
    assert found < plain


def test_better_than_plain_rounding_where_inputs_are_alike() -> None:
    rng = np.random.default_rng(0)
    found, plain = 0.0, 0.0
    for _ in range(20):
        w = rng.standard_normal((1, 12, 30))
        h, g = moments(rng, 1, 30, 8), moments(rng, 1, 12, 4)
        made = rounded(w, nowhere(w), h, g, 0.3, matrix_layout(12, 30))
        steps = steps_of(made, w.shape)
        found += cost(made.codes * steps - w, h, g)
        plain += cost(np.rint(w / steps) * steps - w, h, g)
    assert found < plain / 10


def written_out(w: F64, h: F64, g: F64, steps: F64) -> NDArray[np.int64]:
    """Codes (outputs, inputs) by the formula: largest diagonal first, what is off is taken back where it is open."""
    orders = [np.argsort(np.diag(m), kind="stable") for m in (g, h)]
    unit = []
    for order, m in zip(orders, (g, h), strict=True):
        lower = np.linalg.cholesky(m[np.ix_(order, order)])
        unit.append(lower / np.diag(lower))
    w, steps = w[np.ix_(*orders)], steps[np.ix_(*orders)]
    errors, codes = np.zeros(w.shape), np.zeros(w.shape, np.int64)
    for i in reversed(range(w.shape[0])):
        for j in reversed(range(w.shape[1])):
            # What all errors so far are worth at this place: (LGᵀ E LH) without the place itself.
            worth = unit[0][i:, i] @ errors[i:] @ unit[1][:, j]
            codes[i, j] = round((w[i, j] - worth) / steps[i, j])
            errors[i, j] = codes[i, j] * steps[i, j] - w[i, j]
    out = np.empty_like(codes)
    out[np.ix_(*orders)] = codes
    return out


@pytest.mark.parametrize(
    ("groups", "outputs", "inputs"), [(1, 5, 150), (1, 9, BLOCK), (1, 3, BLOCK + 1), (3, 4, 10), (7, 1, 9), (1, 1, 1)]
)
def test_does_what_the_formula_says(groups: int, outputs: int, inputs: int) -> None:
    """Also over several blocks of columns, and for many groups of one output, which are rounded in other ways."""
    rng = np.random.default_rng(inputs)
    w = rng.standard_normal((groups, outputs, inputs))
    h, g = moments(rng, groups, inputs, inputs // 2 + 1), moments(rng, groups, outputs, outputs)
    made = rounded(w, nowhere(w), h, g, 0.1, matrix_layout(outputs, inputs, groups))
    steps = steps_of(made, w.shape)
    expected = np.stack([written_out(*parts) for parts in zip(w, h, g, steps, strict=True)])
    np.testing.assert_array_equal(made.codes, expected)
    np.testing.assert_allclose(made.values, made.codes * steps, rtol=1e-6)


@pytest.mark.parametrize("kind", ["zero H", "zero G", "both zero", "rank 1", "dead input", "equal inputs", "diagonal"])
def test_what_is_known_may_be_little(kind: str) -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((1, 6, 9))
    x = rng.standard_normal((9, 1 if kind == "rank 1" else 40))
    if kind == "dead input":
        x[4] = 0
    if kind == "equal inputs":
        x[5] = x[2]
    h, g = (x @ x.T / x.shape[1])[None], moments(rng, 1, 6, 6)
    if kind in ("zero H", "both zero"):
        h = np.zeros_like(h)
    if kind in ("zero G", "both zero"):
        g = np.zeros_like(g)
    h, g = damped(h, 0.01), damped(g, 0.1)
    made = rounded(
        w, nowhere(w), np.diagonal(h, axis1=1, axis2=2) if kind == "diagonal" else h, g, 0.01, matrix_layout(6, 9)
    )
    error = made.values - w
    assert cost(error, h, g) < 0.01**2 / 4 * w.size * 3
    # All are worth something to the outputs, by the damping: so none is lost.
    assert np.abs(error).max() < 0.5


@given(
    st.integers(0, 1 << 30),
    st.floats(-38, 38),
    st.floats(-38, 38),
    st.floats(-60, 60),
    st.floats(-60, 60),
    st.floats(-40, 40),
    st.sampled_from([NEAREST, PRICED]),
)
@settings(max_examples=300)
def test_any_magnitude(
    seed: int, low: float, high: float, inputs: float, outputs: float, base: float, coding: Coding
) -> None:
    """Weights, inputs, gradients and steps of any size: steps are above 0, values finite, codes in range."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((1, 5, 4)) / 4 * 10.0 ** np.linspace(low, high, 5)[:, None]).astype("f4").astype(float)
    h = moments(rng, 1, 4, 4) * 10.0**inputs
    g = moments(rng, 1, 5, 5) * 10.0**outputs
    with np.errstate(all="raise", under="ignore"):
        made = rounded(w, nowhere(w), h, g, 10.0**base, matrix_layout(5, 4), coding=coding)
    assert 0 < made.scale < math.inf
    assert np.float32(made.scale) == made.scale
    assert np.abs(made.codes).max() < (1 << 14 if made.trellis else 1 << 15)
    assert np.isfinite(made.values).all()
    assert (steps_of(made, w.shape) > 0).all()
    largest = np.abs(w).max(axis=2)
    assert (np.abs(made.values).max(axis=2) <= 1e4 * np.abs(w).max() + 1e-30).all()
    # A row whose step is small against it is not lost.
    fine = steps_of(made, w.shape).max(axis=2) < largest / 1000
    assert (np.abs(made.values).max(axis=2) > 0)[fine].all()


def test_aims_at_the_outputs_of_the_original_for_the_original_inputs() -> None:
    """The solution of the least-squares problem, with the pull towards the weights, as its rows say it."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((2, 3, 6)).astype("f4")
    before, now = rng.standard_normal((2, 2, 6, 50))
    now = before + now / 3
    h0, cross, ridge = now @ now.swapaxes(1, 2) / 50, w @ before @ now.swapaxes(1, 2) / 50, 0.03
    extra = np.zeros(w.shape, bool)
    extra[1, 2, 4:] = extra[1, 0, 0] = True
    w[extra] = 0
    found = targets(w, damped(h0, ridge), cross, ridge, extra)
    for k in range(2):
        pull = math.sqrt(ridge * np.trace(h0[k]) / 6)
        for o in range(3):
            places = ~extra[k, o]
            rows = np.concatenate([now[k].T / math.sqrt(50), pull * np.eye(6)])[:, places]
            wanted = np.concatenate([w[k, o] @ before[k] / math.sqrt(50), pull * w[k, o]])
            # The values `cross` stands for are those before `extra` was taken out.
            wanted[:50] = np.linalg.lstsq(now[k] / math.sqrt(50), cross[k, o], rcond=None)[0]
            np.testing.assert_allclose(found[k, o, places], np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-9)
            assert not found[k, o, ~places].any()


def test_inputs_that_did_not_change_leave_the_weights_as_they_are() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((1, 4, 8)).astype("f4")
    # One position: all but one direction is known by the damping alone.
    x = rng.standard_normal((1, 8, 1)).astype("f4")
    h, cross = steadied(x @ x.swapaxes(1, 2), w @ x @ x.swapaxes(1, 2), w)
    np.testing.assert_allclose(targets(w, damped(h, 0.8), cross, 0.8, nowhere(w)), w, rtol=1e-4, atol=1e-4)


def test_rounding_noise_where_the_mean_is_all_there_is() -> None:
    """Second moments in float32 minus those of the mean are noise, and indefinite: it can be rounded all the same."""
    rng = np.random.default_rng(7)
    for number in range(20):
        x = (rng.standard_normal((1, 60)) * 100).astype("f4")
        w = rng.standard_normal((1, 5, 60)).astype("f4")
        h, cross = steadied((x.T @ x)[None].astype(float), (w @ x.T @ x).astype(float), w)
        centred = h - np.einsum("pi,pj->ij", x.astype(float), x.astype(float))
        cross = cross - (w.astype(float) @ x.T.astype(float)) @ x
        assert np.linalg.eigvalsh(centred[0]).min() > 0, number
        known = damped(centred, 18)
        aim = targets(w, known, cross, 18, nowhere(w.astype(float)))
        assert np.abs(aim - w).max() < 0.05
        assert np.isfinite(rounded(aim, nowhere(aim), known, np.eye(5)[None], 0.1, matrix_layout(5, 60)).values).all()


@pytest.mark.parametrize("size", [2, 3, 65, 300])
def test_an_indefinite_matrix_is_taken_for_the_nearest_that_is_not(size: int) -> None:
    """What is off its diagonal stays as it was: equal inputs can still take each other's errors back."""
    h = np.ones((1, size, size)) + np.eye(size) * 1e-9
    h[0, 0, 1:] = h[0, 1:, 0] = 1 + 1e-4
    assert np.linalg.eigvalsh(h[0]).min() < 0
    w = np.random.default_rng(size).standard_normal((1, 1, size))
    made = rounded(w, nowhere(w), h, np.eye(1)[None], 0.1, one_step(1, size))
    # Were each rounded by itself, it would be the root of their number, over 12, times the step.
    assert abs(float((made.values - w).sum())) < 0.8 * made.row_steps.max()


def test_aims_with_an_indefinite_matrix_stay_by_the_weights() -> None:
    rng = np.random.default_rng(12)
    x = rng.standard_normal((40, 10))
    h = (x @ x.T / 10)[None]
    h -= 2e-6 * np.trace(h[0]) / 40 * np.eye(40)
    assert np.linalg.eigvalsh(h[0]).min() < 0
    w = rng.standard_normal((1, 6, 40)).astype("f4")
    found = targets(w, h, w @ h, 0.0, nowhere(w))
    np.testing.assert_allclose(found @ x, w @ x, atol=0.02)


def found_layers(folder: Path) -> list[tuple[str, Layer]]:
    return [(odd.name, layer) for odd in ODD for layer in layers(odd.network(folder).model)]


def as_stored(codes: NDArray[np.int32], made: Rounded, place: Layout, layer: Layer) -> Any:
    """What codes of the matrix come back as, once they have been stored."""
    stored = place.stored(layer.weight(codes.astype("f8")).astype("i4")).astype("<i2")
    head = made.row_exponents.tobytes() + made.column_exponents.tobytes()
    rows, columns = stored.shape
    machine = Step("trellis.1", {"rows": rows, "columns": columns, "head": len(head), "width": 2})
    grid = Step("grid.1", {"scale": made.scale, "view": list(place.view), "rows": list(place.rows), "width": 2})
    steps = [machine, grid] if made.trellis else [grid]
    return layer.matrix(decode(head + stored.tobytes(), steps, layer.shape, DTYPES["F32"], ""))


def test_stored_values_are_those_of_the_matrix(tmp_path: Path) -> None:
    """For layers of all kinds: exponents and codes as they are stored decode to exactly the values rounded to; what
    has no place in the tensor is 0; and rounding costs less than rounding plainly to the same steps."""
    kinds = set()
    for number, (name, layer) in enumerate(found_layers(tmp_path)):
        kinds.add(layer.kind)
        rng = np.random.default_rng(number)
        shape = (layer.groups, layer.outputs, layer.inputs)
        place, extra = layout(layer), layer.extra()
        plain = found = 0.0
        for _ in range(4):
            w = rng.standard_normal(shape)
            w[extra] = 0
            h = moments(rng, layer.groups, layer.inputs, layer.inputs // 2 + 1)
            g = moments(rng, layer.groups, layer.outputs, layer.outputs // 2 + 1)
            known: Any = np.diagonal(h, axis1=1, axis2=2) if layer.diagonal else h
            made = rounded(w, extra, known, g, 0.05, place)
            assert not made.codes[extra].any()

            def decoded(
                codes: NDArray[np.int32], made: Rounded = made, place: Layout = place, layer: Layer = layer
            ) -> Any:
                return as_stored(codes, made, place, layer)

            np.testing.assert_array_equal(decoded(made.codes), np.where(extra, 0, made.values), err_msg=name)
            steps = np.where(extra, 1, decoded(np.ones(shape, "i4"))).astype(float)
            nearest = np.where(extra, 0, np.rint(w / steps) * steps)
            found += cost(made.values - w, h, g)
            plain += cost(nearest - w, h, g)
        if not layer.diagonal and layer.outputs * layer.inputs > 8:
            assert found < 0.7 * plain, name
    assert kinds == {"dense", "conv", "deconv", "recurrent", "embedding"}


def test_stored_values_are_those_of_the_trellis(tmp_path: Path) -> None:
    """Likewise where codes are to be entropy-coded; the trellis runs along rows as they are stored."""
    kinds = set()
    for number, (name, layer) in enumerate(found_layers(tmp_path)):
        rng = np.random.default_rng(number)
        place, extra = layout(layer), layer.extra()
        w = rng.standard_normal((layer.groups, layer.outputs, layer.inputs))
        w[extra] = 0
        h = moments(rng, layer.groups, layer.inputs, layer.inputs // 2 + 1)
        g = moments(rng, layer.groups, layer.outputs, layer.outputs // 2 + 1)
        known: Any = np.diagonal(h, axis1=1, axis2=2) if layer.diagonal else h
        for base in (0.5, 0.05, 2e-3):
            made = rounded(w, extra, known, g, base, place, coding=PRICED)
            if made.trellis:
                kinds.add(layer.kind)
            expected = np.where(extra, 0, made.values)
            np.testing.assert_array_equal(as_stored(made.codes, made, place, layer), expected, err_msg=name)
    assert kinds == {"dense", "conv", "deconv", "recurrent", "embedding"}


@pytest.mark.parametrize(("base", "least"), [(0.1, 0.03), (0.4, 0.03), (2.0, 0.03)])
def test_bits_that_count_are_saved(base: float, least: float) -> None:
    """Of curves of bits by cost, that of priced codes lies lower, from five bits down to one."""
    rng = np.random.default_rng(8)
    w = rng.laplace(0, 1, (1, 40, 100))
    h, g = moments(rng, 1, 100, 60), moments(rng, 1, 40, 30)

    def bits_by_cost(coding: Coding) -> list[tuple[float, float]]:
        found = []
        for share in (0.6, 0.8, 1.0, 1.25, 1.6):
            made = rounded(w, nowhere(w), h, g, base * share, matrix_layout(40, 100), coding=coding)
            found.append((math.log2(cost(made.values - w, h, g)), entropy(made.codes)))
        return sorted(found)

    nearest, priced = (np.array(bits_by_cost(coding)).T for coding in (NEAREST, PRICED))
    at = priced[0].mean()
    assert np.interp(at, *nearest) - np.interp(at, *priced) > least


def test_few_bits_go_without_a_trellis() -> None:
    rng = np.random.default_rng(9)
    w = rng.standard_normal((1, 20, 30))
    h, g = moments(rng, 1, 30, 30), moments(rng, 1, 20, 20)

    def made(base: float) -> Rounded:
        return rounded(w, nowhere(w), h, g, base, matrix_layout(20, 30), coding=PRICED)

    assert made(0.05).trellis
    assert not made(2.0).trellis
    assert not rounded(w, nowhere(w), h, g, 0.05, one_step(20, 30), coding=PRICED).trellis


@pytest.mark.parametrize("base", [1e-3, 3e-4, 1e-4, 1e-6])
def test_fine_steps_use_the_whole_range_of_codes(base: float) -> None:
    """Where rows have to take wider steps for it, codes of a trellis would be no help."""
    rng = np.random.default_rng(10)
    w = rng.standard_normal((1, 10, 64))
    w[0, :, 0] *= 300
    h, g = moments(rng, 1, 64, 64), moments(rng, 1, 10, 10)
    nearest, priced = (
        rounded(w, nowhere(w), h, g, base, matrix_layout(10, 64), coding=coding) for coding in (NEAREST, PRICED)
    )
    assert cost(priced.values - w, h, g) < 1.5 * cost(nearest.values - w, h, g)
    assert np.abs(priced.codes).max() < 1 << (14 if priced.trellis else 15)


def test_codes_too_large_for_a_trellis_are_rounded_without() -> None:
    """Where most codes are small but feedback makes one too large for what a trellis can store."""
    x = np.array([[1.0, 1.0, 0.5], [0.0, 1e-5, 0.0], [0.3, 0.2, 1.0]])
    h, w = (x.T @ x)[None], np.array([[[1.0, 15000.0, 3.0]]])
    made = rounded(w, nowhere(w), h, np.eye(1)[None], 1e-3, matrix_layout(1, 3), coding=PRICED)
    assert np.abs(made.codes).max() < 1 << (14 if made.trellis else 15)
    assert np.isfinite(made.values).all()


def test_one_large_code_does_not_ask_for_a_trellis() -> None:
    w = np.zeros((1, 8, 12))
    w[0, 3, 4] = 1000.0
    made = rounded(w, nowhere(w), np.eye(12)[None], np.eye(8)[None], 1.0, matrix_layout(8, 12), coding=PRICED)
    assert not made.trellis
