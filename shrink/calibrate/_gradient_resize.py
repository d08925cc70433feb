"""The rule for Resize and Upsample, along one axis after the other."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._gradient_tape import Gradients, NoRule, Step, Tape

__all__ = ["resize"]

F64 = NDArray[np.float64]

# An interpolation matrix of more numbers is not worth it.
_MATRIX_AT_MOST = 1 << 24
_ROUNDINGS = ("ceil", "floor", "round_prefer_ceil", "round_prefer_floor")


def resize(tape: Tape, step: Step) -> Gradients:
    """Nearest by whole factors is summed over windows; anything else with known sizes by the transposed matrix."""
    rank = tape.rank(step.x)
    scales = _scales(tape, step, rank)
    factors = _whole_factors(tape, step, scales)
    if factors is not None and rank in (3, 4, 5) and factors[:2] == [1, 1]:
        if all(f == 1 for f in factors):
            return {0: step.g}
        pooled = tape.op("AveragePool", step.g, kernel_shape=factors[2:], strides=factors[2:])
        return {0: tape.scaled(pooled, math.prod(factors), step.x)}
    before, after = tape.shape(step.x), tape.shape(step.y)
    g = step.g
    for axis in range(rank):
        n, m = before[axis], after[axis]
        if scales[axis] == 1 or (n == m and n is not None and scales[axis] is None):
            continue
        if not isinstance(n, int) or not isinstance(m, int) or not 0 < n * m <= _MATRIX_AT_MOST:
            raise NoRule
        matrix = tape.floats(_matrix(step, tape.opset, n, m, scales[axis] or m / n), step.x)
        perm = list(range(rank))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        turned = g if axis == rank - 1 else tape.op("Transpose", g, perm=perm)
        summed = tape.op("MatMul", turned, matrix)
        g = summed if axis == rank - 1 else tape.op("Transpose", summed, perm=perm)
    return {0: g}


def _scales(tape: Tape, step: Step, rank: int) -> list[float | None]:
    """As given; None where sizes are given instead."""
    if step.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoRule
    if "scales" in step.attributes:
        given: list[float] | None = [float(s) for s in step.attributes["scales"]]
    else:
        name = step.input(1 if step.kind == "Upsample" or tape.opset < 11 else 2)
        found = tape.content(name)
        if found is None and name and tape.facts.shapes.get(name) != (0,):
            raise NoRule
        given = [float(s) for s in found.reshape(-1)] if found is not None and found.size else None
    if given is None:
        return [None] * rank
    axes = [int(a) for a in step.attributes.get("axes", range(rank))]
    if len(axes) != len(given):
        raise NoRule
    scales: list[float | None] = [1.0] * rank
    for axis, scale in zip(axes, given, strict=True):
        scales[axis] = scale
    return scales


def _layout(step: Step, opset: int) -> tuple[str, str, str]:
    """Mode, how positions of the output are those of the input, and rounding."""
    mode = step.attributes.get("mode", "nearest")
    if step.kind == "Upsample" or opset < 11:
        return mode, "asymmetric", "floor"
    positions = step.attributes.get("coordinate_transformation_mode", "half_pixel")
    return mode, positions, step.attributes.get("nearest_mode", "round_prefer_floor")


def _whole_factors(tape: Tape, step: Step, scales: list[float | None]) -> list[int] | None:
    """How often each number is repeated along each axis, where that is all."""
    mode, positions, rounding = _layout(step, tape.opset)
    if mode != "nearest":
        return None
    factors = []
    for scale, n, m in zip(scales, tape.shape(step.x), tape.shape(step.y), strict=True):
        if scale is None and (not isinstance(n, int) or not isinstance(m, int) or not n):
            if n != m or n is None:
                return None
            scale = 1.0
        factor = m / n if scale is None and isinstance(n, int) and isinstance(m, int) else scale
        if factor is None or factor < 1 or factor != int(factor):
            return None
        factors.append(int(factor))
    centred = positions in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer")
    cornered = positions == "asymmetric" and rounding == "floor"
    return factors if centred or cornered or all(f == 1 for f in factors) else None


def _matrix(step: Step, opset: int, n: int, m: int, scale: float) -> F64:
    """(m, n): output = matrix @ input, as the operator's documentation has it."""
    mode, positions, rounding = _layout(step, opset)
    if step.attributes.get("antialias", 0) or step.attributes.get("exclude_outside", 0):
        raise NoRule
    at = np.arange(m, dtype=np.float64)
    if positions == "align_corners":
        at = at * ((n - 1) / (m - 1)) if m > 1 else at * 0
    elif positions == "asymmetric":
        at = at / scale
    elif positions == "half_pixel" or (positions == "pytorch_half_pixel" and m > 1):
        at = (at + 0.5) / scale - 0.5
    elif positions == "pytorch_half_pixel":
        at = at * 0
    else:
        raise NoRule
    found = np.zeros((m, n))
    rows = np.arange(m)
    if mode == "nearest":
        np.add.at(found, (rows, np.clip(_rounded(at, rounding), 0, n - 1)), 1.0)
    elif mode == "linear":
        at = np.clip(at, 0, n - 1)
        low = np.floor(at).astype(np.int64)
        np.add.at(found, (rows, low), 1 - (at - low))
        np.add.at(found, (rows, np.minimum(low + 1, n - 1)), at - low)
    elif mode == "cubic":
        low = np.floor(at).astype(np.int64)
        a = float(step.attributes.get("cubic_coeff_a", -0.75))
        for offset in (-1, 0, 1, 2):
            d = np.abs(at - (low + offset))
            near = ((a + 2) * d - (a + 3)) * d * d + 1
            far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            np.add.at(found, (rows, np.clip(low + offset, 0, n - 1)), np.where(d <= 1, near, far))
    else:
        raise NoRule
    return found


def _rounded(at: F64, rounding: str) -> NDArray[np.int64]:
    if rounding not in _ROUNDINGS:
        raise NoRule
    if rounding == "floor":
        return np.floor(at).astype(np.int64)
    if rounding == "ceil":
        return np.ceil(at).astype(np.int64)
    if rounding == "round_prefer_ceil":
        return np.floor(at + 0.5).astype(np.int64)
    return np.ceil(at - 0.5).astype(np.int64)
