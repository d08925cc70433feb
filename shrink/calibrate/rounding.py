"""Rounding a layer to a grid so that its outputs, and those of the network, change least.

An error E of the matrix costs tr(G E H Eᵀ) (see `sensitivity`). With H = LDLᵀ and G likewise, rounding the last weight
first and taking every error back with the weights that are still open makes it Σ dG_i dH_j r_ij², where r_ij is what
rounding itself adds: the feedback of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", ICLR 2023) for inputs, and the same for outputs (Tseng, Sun, Hou,
De Sa, "Model-Preserving Adaptive Rounding", 2025). Steps inversely proportional to √(dG_i dH_j) then make the error
smallest for the bits they take, whatever the base.

Where codes are to be entropy-coded, rounding also weighs the bits that a code takes (Sullivan, "Efficient Scalar
Quantization of Exponential and Laplacian Random Variables", 1996), and codes of more than two bits go through a trellis
(Marcellin and Fischer, "Trellis Coded Quantization of Memoryless and Gauss-Markov Sources", 1990), each of whose paths
takes its own errors back: 1 dB less error at the same bits, at best.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.layout import Layout
from shrink.coders.wasm import PRICES, WIDEST, Feedback
from shrink.errors import MissingDependency
from shrink.steps import half_octaves, trellised

__all__ = [
    "LARGEST_CODE",
    "NEAREST",
    "PRICED",
    "Coding",
    "Rounded",
    "damped",
    "rounded",
    "steadied",
    "targets",
    "without_means",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_ROWS = 256
# Columns that are rounded at once; what they do to earlier ones is a product of matrices.
_BLOCK = WIDEST
LARGEST_CODE = 32000
# So many more are there for what feedback adds to codes. Where codes are to be smaller, steps are made wider instead.
_SPARE_CODES = 700
_WIDENED, _WIDENED_AT_MOST = 1.01, 6
_EXPONENTS = 100
# Binary logarithms of the steps that rows may have.
_LEAST_LOG, _LARGEST_LOG = -126, 126
# A bit is worth 2 ln 2 of the mean squared error. That is 1/12 of a squared step; a trellis has smaller steps, by a
# share that makes its error the same.
_BIT = 2 * math.log(2) / 12
_TRELLIS_STEP = 0.5675
# Fewer bits than this are better spent on whole steps, as both kinds of states share the frequency of zero.
_TRELLIS_BITS = 2.2
# Codes of a trellis, which stand for up to twice as much in 16 bits; and the values up to which they are of use. Where
# rows have had to take wider steps for the range of 16 bits, whole steps make better use of it.
_LARGEST_TRELLIS_CODE, _LARGEST_TRELLIS_VALUE = 16383, 22000
# More inputs than this stay in the order in which they were factored.
_REORDERED_AT_MOST = 4096
# What the sums of products may be off by, as a share of their diagonal.
_FLOAT32_NOISE = 1e-5


@dataclass(frozen=True)
class Coding:
    """What becomes of codes: each bit counts `price` times its worth; with `trellis` they may be those of trellis.1."""

    price: float = 0.0
    trellis: bool = False


NEAREST = Coding()
"""Bits count nothing."""
PRICED = Coding(0.7, True)
"""For codes that are entropy-coded. The whole worth of a bit was too much for small networks, by trial."""


@dataclass(frozen=True)
class Rounded:
    """`codes` (groups, outputs, inputs), the exponents of stored rows and columns, in half octaves, and the scale.

    `row_steps` are the steps of stored rows: the scale by 2^(exponent / 2), wider where codes had to be small. With
    `trellis` the codes are those of trellis.1.
    """

    codes: I32
    scale: float
    row_exponents: NDArray[np.int8]
    column_exponents: NDArray[np.int8]
    values: F32
    row_steps: F32
    trellis: bool = False


def damped(moments: F64, share: float) -> F64:
    """(groups, n, n) with `share` of the mean of its diagonal added to the diagonal, or 1 where all of it is 0."""
    out: F64 = moments.copy()
    diagonal = np.einsum("gii->gi", out)
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(mean > 0, share * mean, 1.0)
    return out


def steadied(moments: F64, cross: F64, matrix: F32) -> tuple[F64, F64]:
    """Second moments and `cross`, see `targets`, with a little on the diagonal that pulls to the original weights.

    Products are made in float32: what is left of them when means are taken off is noise where inputs hardly vary.
    """
    little = _FLOAT32_NOISE * np.einsum("gii->gi", moments)
    steady = moments.copy()
    np.einsum("gii->gi", steady)[...] += little
    return steady, cross + little[:, None] * matrix


def without_means(moments: F64, left: F64, right: F64) -> None:
    """Take left rightᵀ off (groups, n, m), in place and a block of rows at a time: there is no room for it twice."""
    for group in range(len(moments)):
        for start in range(0, moments.shape[1], _ROWS):
            rows = slice(start, start + _ROWS)
            moments[group, rows] -= left[group, rows, None] * right[group]


def targets(matrix: F32, h: F64, cross: F64, ridge: float, extra: NDArray[np.bool_]) -> F64:
    """The matrix that gives most nearly the outputs that the original gives for the original inputs.

    `h` are the (damped) second moments of the inputs as they are, `cross` the mean of the original outputs times these
    inputs, `ridge` what was added to the diagonal of `h` as a share of its mean. All (groups, …). `extra` places are 0.
    """
    mean = np.einsum("gii->gi", h).mean(axis=1)[:, None, None]
    # What was added pulls towards the original weights, not towards 0.
    right = cross + ridge / (1 + ridge) * mean * matrix
    solved: F64 = np.zeros_like(right)
    for k in range(len(h)):
        if not extra[k].any():
            solved[k] = _solved(h[k].copy(), right[k])
            continue
        for rows, places in _patterns(extra[k]):
            at = np.ix_(rows, places)
            solved[k][at] = _solved(h[k][np.ix_(places, places)], right[k][at])
    return solved


def _solved(h: F64, right: F64) -> F64:
    """X of X h = right; `h` is used up."""
    solution: F64 = _lapack().cho_solve((_root(h), True), right.T, check_finite=False).T
    return solution


def rounded(
    weights: F64,
    extra: NDArray[np.bool_],
    h: F64,
    g: F64,
    base: float,
    layout: Layout,
    largest_code: int = LARGEST_CODE,
    coding: Coding = NEAREST,
) -> Rounded:
    """The weights (groups, outputs, inputs) on a grid.

    `h` (groups, inputs, inputs) and `g` (groups, outputs, outputs) are positive definite; `h` may be (groups, inputs)
    where only its diagonal is known. `base` is the step in units of the square root of the cost: each weight
    adds about base² / 12 to it. `extra` places stay 0. Codes are at most `largest_code`: where they would be larger,
    their rows get as wide a step as that takes, no power of √2 then. `coding` says what becomes of the codes; groups of
    one output each are rounded to the nearest whatever it says.
    """
    groups, outputs, inputs = weights.shape
    order = _stored_order(layout, weights.shape) if coding.trellis and not extra.any() else None
    rows = [_factors(one) for one in g]
    columns = [_factors(one, order) for one in h]
    if order is not None:
        grid = _grid(weights, columns, rows, _TRELLIS_STEP * base, layout)
        counts = _counts(weights / (2 * grid.steps))
        if 2 * len(counts) > _LARGEST_TRELLIS_VALUE or counts @ _bits(counts) < _TRELLIS_BITS * weights.size:
            order = None
            if inputs <= _REORDERED_AT_MOST:
                columns = [_factors(one) for one in h]
    if order is None:
        grid = _grid(weights, columns, rows, base, layout)
        counts = _counts((weights / grid.steps)[~extra])
    trellis = order is not None
    bit = _BIT / (_TRELLIS_STEP**2 if trellis else 1)
    prices = coding.price * bit * _bits(counts)[:PRICES] if coding.price else None
    partly = [h.ndim == 3 and bool(extra[k].any()) for k in range(groups)]

    def group(k: int, row_steps: F64, column_steps: F64) -> I32:
        if partly[k]:
            return _among(extra[k], weights[k], h[k], g[k], row_steps, column_steps, prices)
        return _group(weights[k], columns[k], rows[k], row_steps, column_steps, prices, trellis)

    def coded() -> I32:
        row_steps, column_steps = grid.row_steps.astype(np.float64), grid.column_steps
        if outputs == 1 and groups > 1 and not extra.any():
            codes = _many_rows(weights[:, 0], columns, row_steps, column_steps)[:, None]
        else:
            codes = np.stack([group(k, row_steps[k], column_steps) for k in range(groups)])
        codes[extra] = 0
        return codes

    spare = _SPARE_CODES
    if largest_code < LARGEST_CODE:
        spare = 0
        grid = grid.widened(np.maximum(1, grid.largest(weights / grid.steps) / largest_code))
    codes = coded()
    # Taking errors back makes some codes larger than their weights.
    for _ in range(_WIDENED_AT_MOST if largest_code < LARGEST_CODE else 0):
        over = grid.largest(codes) / largest_code
        if over.max() <= 1:
            break
        grid = grid.widened(np.where(over > 1, over * _WIDENED, 1))
        codes = coded()
    if trellis and np.abs(codes).max(initial=0) > _LARGEST_TRELLIS_CODE:
        return rounded(weights, extra, h, g, base, layout, largest_code, Coding(coding.price))
    np.clip(codes, -largest_code - spare, largest_code + spare, out=codes)
    whole = codes if order is None else _untrellised(codes, order)
    values = whole.astype(np.float32) * grid.column_steps.astype(np.float32) * grid.row_steps[..., None]
    stored = np.searchsorted(grid.kinds, layout.rows_from)
    stored_columns = (
        grid.column_exponent[layout.columns_from]
        if layout.columns_from is not None
        else np.zeros(codes.size // len(stored), np.int64)
    )
    exponents = grid.row_exponent[stored].astype(np.int8), stored_columns.astype(np.int8)
    return Rounded(codes, grid.scale, *exponents, values, grid.kind_steps[stored], trellis)


def _stored_order(layout: Layout, shape: tuple[int, ...]) -> NDArray[np.intp] | None:
    """The columns from the last stored to the first, for rounding the first one first; None where the rows of the
    matrix and those that are stored are not the same."""
    groups, outputs, inputs = shape
    if layout.columns_from is None or (groups > 1 and outputs == 1):
        return None
    same = np.array_equal(np.sort(layout.rows_from), np.arange(groups * outputs))
    same = same and np.array_equal(np.sort(layout.columns_from), np.arange(inputs))
    return layout.columns_from[::-1].astype(np.intp) if same else None


def _untrellised(codes: I32, order: NDArray[np.intp]) -> I32:
    """What codes stand for, both (groups, outputs, inputs)."""
    out = np.empty_like(codes)
    along = order[::-1]
    out[:, :, along] = trellised(codes[:, :, along].reshape(-1, len(order))).reshape(codes.shape)
    return out


def _counts(codes: F64) -> F64:
    """How many codes of each magnitude may be expected."""
    magnitudes = np.rint(np.minimum(np.abs(codes), LARGEST_CODE)).astype(np.intp)
    return np.bincount(magnitudes.reshape(-1), minlength=PRICES).astype(np.float64)


def _bits(counts: F64) -> F64:
    """The bits of a code of each magnitude, with its sign."""
    # A magnitude that was not expected may come all the same.
    shares = (counts + 1 / len(counts)) / (counts.sum() + 1)
    bits: F64 = (np.arange(len(counts)) > 0) - np.log2(shares)
    return bits


@dataclass(frozen=True)
class _Grid:
    """The steps of a layer: by kind of row, of which `row_kind` (groups, outputs) says the number, and by column."""

    scale: float
    kinds: NDArray[np.int64]
    row_kind: NDArray[np.intp]
    row_exponent: NDArray[np.int64]
    column_exponent: NDArray[np.int64]
    kind_steps: F32

    @property
    def row_steps(self) -> F32:
        return self.kind_steps[self.row_kind]

    @property
    def column_steps(self) -> F64:
        return half_octaves(self.column_exponent).astype(np.float32).astype(np.float64)

    @property
    def steps(self) -> F64:
        return self.row_steps.astype(np.float64)[..., None] * self.column_steps

    def largest(self, values: F64 | I32) -> F64:
        return _largest_of(values, self.row_kind, len(self.kinds))

    def widened(self, factors: F64) -> _Grid:
        """With the rows of each kind so many times as wide."""
        return dataclasses.replace(self, kind_steps=self.kind_steps * factors.astype(np.float32))


def _grid(weights: F64, columns: list[_Factors], rows: list[_Factors], base: float, layout: Layout) -> _Grid:
    log_columns = -np.mean([np.log2(np.maximum(f.gains, 1e-300)) for f in columns], axis=0)
    log_rows = -np.array([np.log2(np.maximum(f.gains, 1e-300)) for f in rows])
    # In half octaves, and a step is the root of what it costs: log2 of a gain is its exponent already.
    centre_rows = float(np.mean(log_rows))
    kinds = np.unique(layout.row_of)
    row_class = np.array([np.mean(log_rows[layout.row_of == kind]) for kind in kinds])
    row_exponent = _whole(row_class - centre_rows)
    if layout.columns_from is None:
        # One step for all columns: the mean of what they cost.
        log_columns = np.full(weights.shape[2], -np.log2(np.mean([f.gains.mean() for f in columns])))
    centre_columns = float(np.mean(log_columns))
    column_exponent = _whole(log_columns - centre_columns)
    scale = base * 2.0 ** ((centre_rows + centre_columns) / 2)
    column_steps = half_octaves(column_exponent).astype(np.float32).astype(np.float64)
    row_kind = np.searchsorted(kinds, layout.row_of)
    scale, row_exponent = _within(weights, scale, row_exponent, row_kind, column_steps)
    kind_steps = (scale * half_octaves(row_exponent)).astype(np.float32)
    return _Grid(scale, kinds, row_kind, row_exponent, column_exponent, kind_steps)


@dataclass(frozen=True)
class _Factors:
    """In this `order` the matrix is L diag(gains) Lᵀ, L unit lower triangular; the last is rounded first."""

    order: NDArray[np.intp]
    lower: NDArray[np.floating] | None
    ordered_gains: F64

    @property
    def gains(self) -> F64:
        out: F64 = np.empty_like(self.ordered_gains)
        out[self.order] = self.ordered_gains
        return out


def _factors(moments: F64, order: NDArray[np.intp] | None = None) -> _Factors:
    """By rising diagonal, where no order is given."""
    if moments.ndim == 1:
        order = np.arange(len(moments)) if order is None else order
        return _Factors(order, None, moments[order].astype(np.float64))
    if order is None:
        order = np.argsort(np.diag(moments), kind="stable")
    lower = _root(moments[np.ix_(order, order)])
    diagonal = np.diag(lower).copy()
    lower /= diagonal
    return _Factors(order, lower, diagonal.astype(np.float64) ** 2)


def _root(moments: F64) -> NDArray[np.floating]:
    """The lower triangular root, in the place of the matrix, as the widest take 1 GB; nothing is known of what is above
    its diagonal. It is that of a little more than the matrix where its own errors make it indefinite.
    """
    lapack = _lapack()
    diagonal = np.diag(moments).copy()
    more = _FLOAT32_NOISE
    # LAPACK takes columns for what NumPy has as rows. The other triangle stays as it is, also where this fails.
    turned = moments.T
    while True:
        try:
            root: NDArray[np.floating] = lapack.cho_factor(turned, lower=True, overwrite_a=True, check_finite=False)[0]
            return root
        except np.linalg.LinAlgError:
            if more > 1e6:
                raise
            for row in range(1, len(turned)):
                turned[row, :row] = turned[:row, row]
            np.fill_diagonal(turned, diagonal + more * np.abs(diagonal).max())
            more *= 10


def _lapack() -> Any:
    try:
        from scipy import linalg  # type: ignore[import-untyped]
    except ImportError:
        raise MissingDependency("scipy", "calibrate") from None
    return linalg


def _whole(exponents: F64) -> NDArray[np.int64]:
    return np.clip(np.rint(exponents), -_EXPONENTS, _EXPONENTS).astype(np.int64)


def _within(
    weights: F64, scale: float, exponents: NDArray[np.int64], kind: NDArray[np.intp], column_steps: F64
) -> tuple[float, NDArray[np.int64]]:
    """Larger steps where codes would leave their range, and all steps in that of float32."""
    of_kind = _largest_of(weights / column_steps, kind, len(exponents))
    scale, exponents = _as_float32(scale, exponents)
    with np.errstate(divide="ignore"):
        over = np.ceil(2 * np.log2(of_kind / (scale * half_octaves(exponents)) / LARGEST_CODE))
    wanted = exponents + np.maximum(0, np.where(np.isfinite(over), over, 0)).astype(np.int64)
    above = max(0, int(wanted.max(initial=0)) - _EXPONENTS)
    return _as_float32(scale * 2.0 ** (above / 2), np.maximum(wanted - above, -_EXPONENTS))


def _largest_of(values: F64 | I32, kind: NDArray[np.intp], kinds: int) -> F64:
    """The largest absolute value (groups, outputs, inputs) in the rows of each kind."""
    largest = np.max(np.abs(values), axis=2, initial=0)
    of_kind = np.zeros(kinds)
    np.maximum.at(of_kind, kind.reshape(-1), largest.reshape(-1))
    return of_kind


def _as_float32(scale: float, exponents: NDArray[np.int64]) -> tuple[float, NDArray[np.int64]]:
    """The nearest scale and exponents whose steps are neither 0 nor infinite."""
    # Three digits are near enough, and short to write.
    scale = float(f"{min(max(scale, 2.0**_LEAST_LOG), 2.0**_LARGEST_LOG):.3g}")
    log = math.log2(scale)
    return scale, np.clip(exponents, math.ceil(2 * (_LEAST_LOG - log)), math.floor(2 * (_LARGEST_LOG - log)))


def _group(
    weights: F64,
    columns: _Factors,
    rows: _Factors,
    row_steps: F64,
    column_steps: F64,
    prices: F64 | None,
    trellis: bool = False,
) -> I32:
    """The codes of one group (outputs, inputs)."""
    w = weights[np.ix_(rows.order, columns.order)]
    steps_r, steps_c = row_steps[rows.order], column_steps[columns.order]
    outputs, inputs = w.shape
    codes = np.zeros(w.shape, np.int32)
    feedback = Feedback(np.eye(outputs) if rows.lower is None else np.ascontiguousarray(rows.lower, np.float64))
    errors = np.zeros(w.shape, np.float64 if columns.lower is None else columns.lower.dtype)
    states = np.zeros(outputs, np.uint8) if trellis else None
    for start in range((inputs - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        end = min(inputs, start + _BLOCK)
        part = slice(start, end)
        own, later = np.eye(end - start), np.zeros((outputs, end - start))
        if columns.lower is not None:
            own = np.ascontiguousarray(columns.lower[part, part], np.float64)
            later = (errors[:, end:] @ columns.lower[end:, part]).astype(np.float64)
        block = np.ascontiguousarray(w[:, part])
        codes[:, part], errors[:, part] = feedback.block(
            block, later, own, steps_r, steps_c[part].copy(), prices, states
        )
    out = np.empty_like(codes)
    out[np.ix_(rows.order, columns.order)] = codes
    return out


def _patterns(extra: NDArray[np.bool_]) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows that have the same places to fill, and which columns these are."""
    kinds, kind = np.unique(extra, axis=0, return_inverse=True)
    pairs = [(np.flatnonzero(kind.reshape(-1) == number), np.flatnonzero(~row)) for number, row in enumerate(kinds)]
    return [(rows, places) for rows, places in pairs if len(places)]


def _among(
    extra: NDArray[np.bool_], weights: F64, h: F64, g: F64, row_steps: F64, column_steps: F64, prices: F64 | None
) -> I32:
    """The codes of one group where not all places can take errors: rows with the same places at once.

    The others then aim to make good what those have lost.
    """
    codes, errors = np.zeros(weights.shape, np.int32), np.zeros(weights.shape)
    done = np.zeros(0, np.intp)
    for rows, places in _patterns(extra):
        at, own_h, own_g = np.ix_(rows, places), h[np.ix_(places, places)], g[np.ix_(rows, rows)]
        aim = weights[at]
        if len(done):
            pull = g[np.ix_(rows, done)] @ errors[done] @ h[:, places]
            aim = aim - np.linalg.solve(own_g, np.linalg.solve(own_h, pull.T).T)
        steps = row_steps[rows], column_steps[places]
        codes[at] = _group(aim, _factors(own_h), _factors(own_g), *steps, prices)
        errors[at] = codes[at] * steps[0][:, None] * steps[1] - weights[at]
        done = np.concatenate([done, rows])
    return codes


def _many_rows(weights: F64, columns: list[_Factors], row_steps: F64, column_steps: F64) -> I32:
    """The same for groups of a single output each, (groups, inputs), all at once."""
    inputs = weights.shape[1]
    order = np.stack([f.order for f in columns])
    lower = np.stack([np.eye(inputs) if f.lower is None else f.lower for f in columns])
    w = np.take_along_axis(weights, order, axis=1)
    steps = row_steps * column_steps[order]
    errors, codes = np.zeros(w.shape), np.zeros(w.shape, np.int32)
    for j in range(inputs - 1, -1, -1):
        later = np.einsum("gl,gl->g", errors[:, j + 1 :], lower[:, j + 1 :, j])
        codes[:, j] = np.rint((w[:, j] - later) / steps[:, j])
        errors[:, j] = codes[:, j] * steps[:, j] - w[:, j]
    out = np.empty_like(codes)
    np.put_along_axis(out, order, codes, axis=1)
    return out
