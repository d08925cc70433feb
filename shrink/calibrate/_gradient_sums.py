"""Rules for operators that sum: products of matrices, reductions, normalisations."""

from __future__ import annotations

from collections.abc import Sequence

from shrink.calibrate._gradient_tape import Gradients, NoRule, Step, Tape

__all__ = [
    "batch_normalization", "gemm", "instance_normalization", "layer_normalization", "log_softmax", "matmul",
    "reduce_extreme", "reduce_l2", "reduce_log_sum_exp", "reduce_mean", "reduce_sum", "reduce_sum_square", "softmax",
]  # fmt: skip


def gemm(tape: Tape, step: Step) -> Gradients:
    a, b = step.inputs[:2]
    flip_a, flip_b = int(step.attributes.get("transA", 0)), int(step.attributes.get("transB", 0))
    alpha, beta = float(step.attributes.get("alpha", 1.0)), float(step.attributes.get("beta", 1.0))

    def product(left: str, right: str, flip_left: int, flip_right: int) -> str:
        # Up to opset 10 there must be a third input.
        third = [] if tape.opset >= 11 else [tape.number(0, a)]
        return tape.op("Gemm", left, right, *third, alpha=alpha, beta=0.0, transA=flip_left, transB=flip_right)

    found: Gradients = {}
    if 0 in step.wanted:
        found[0] = product(b, step.g, flip_b, 1) if flip_a else product(step.g, b, 0, 1 - flip_b)
    if 1 in step.wanted:
        found[1] = product(step.g, a, 1, flip_a) if flip_b else product(a, step.g, 1 - flip_a, 0)
    if 2 in step.wanted:
        found[2] = tape.summed_to(tape.scaled(step.g, beta, a), step.inputs[2], step.y)
    return found


def matmul(tape: Tape, step: Step) -> Gradients:
    a, b = step.inputs
    found: Gradients = {}
    if 0 in step.wanted and len(tape.facts.shapes.get(b, ())) == 2:
        found[0] = tape.op("MatMul", step.g, tape.transposed(b, 2))
        if step.wanted == {0}:
            return found
    rank_a, rank_b = tape.rank(a), tape.rank(b)
    if rank_a < 2 or rank_b < 2:
        return _with_vector(tape, step, rank_a, rank_b)
    if 0 in step.wanted and 0 not in found:
        found[0] = _summed_over_batches(tape, tape.op("MatMul", step.g, tape.transposed(b, rank_b)), a, b)
    if 1 in step.wanted:
        if rank_b == 2 and rank_a > 2:
            rows, g = _rows(tape, a, b, 0), _rows(tape, step.g, b, 1)
            found[1] = tape.op("MatMul", tape.transposed(rows, 2), g)
        else:
            found[1] = _summed_over_batches(tape, tape.op("MatMul", tape.transposed(a, rank_a), step.g), b, a)
    return found


def _rows(tape: Tape, value: str, like: str, axis: int) -> str:
    """As a matrix, whose rows are as long as `like` is along an axis."""
    size = tape.shape(like)[axis]
    if isinstance(size, int):
        return tape.reshape(value, [-1, size])
    length = tape.op("Gather", tape.op("Shape", like), tape.ints([axis]), axis=0)
    return tape.op("Reshape", value, tape.op("Concat", tape.ints([-1]), length, axis=0))


def _with_vector(tape: Tape, step: Step, rank_a: int, rank_b: int) -> Gradients:
    """One side is a vector: as a matrix of one row, or one column."""
    a, b = step.inputs
    g = step.g
    if rank_a == 1 and rank_b == 1:
        return {i: tape.mul(g, (b, a)[i]) for i in step.wanted}
    if rank_a == 1 and rank_b == 2:
        column = tape.unsqueezed(a, [1])
        by_b = tape.op("MatMul", column, tape.unsqueezed(g, [0])) if 1 in step.wanted else ""
        by_a = tape.op("MatMul", b, g) if 0 in step.wanted else ""
    elif rank_b == 1:
        column = tape.unsqueezed(g, [rank_a - 1])
        by_a = tape.mul(column, b) if 0 in step.wanted else ""
        by_b = ""
        if 1 in step.wanted:
            by_b = tape.summed(tape.mul(a, column), list(range(rank_a - 1)), keepdims=False)
    else:
        raise NoRule
    return {i: (by_a, by_b)[i] for i in step.wanted}


def _summed_over_batches(tape: Tape, g: str, value: str, other: str) -> str:
    """`g` over the batches of the product, summed over those that `value` does not have."""
    have, there = tape.shape(value)[:-2], tape.shape(other)[:-2]
    lead = max(0, len(there) - len(have))
    axes = []
    for axis in range(len(have)):
        across = axis + lead - (max(len(have), len(there)) - len(there))
        against = there[across] if across >= 0 else 1
        here = have[axis]
        if here == 1:
            if against != 1:
                axes.append(axis + lead)
        elif not isinstance(here, int) and against != 1 and (here is None or here != against):
            return tape.summed_when_run(g, value)
    g = tape.summed(g, axes)
    return tape.summed(g, list(range(lead)), keepdims=False) if lead else g


def _axes(tape: Tape, step: Step, since: int) -> list[int] | None:
    """The axes of a reduction, or None for all; `since`: the opset from which on they are an input."""
    if tape.opset < since:
        axes = list(step.attributes.get("axes", []))
    else:
        axes = tape.integers(step.inputs[1]) if step.input(1) else []
        if not axes and step.attributes.get("noop_with_empty_axes", 0):
            return []
    return axes or None


def _kept(tape: Tape, step: Step, axes: list[int] | None, *values: str) -> list[str]:
    """Values of the shape of the output, with the reduced axes back as 1."""
    if step.attributes.get("keepdims", 1) or axes == []:
        return list(values)
    if axes is None:
        return [tape.reshape(value, [1] * tape.rank(step.x)) for value in values]
    if min(axes) < 0:
        rank = tape.rank(step.x)
        axes = [a % rank for a in axes]
    return [tape.unsqueezed(value, sorted(axes)) for value in values]


def reduce_sum(tape: Tape, step: Step) -> Gradients:
    (g,) = _kept(tape, step, _axes(tape, step, 13), step.g)
    return {0: tape.expanded(g, step.x)}


def reduce_mean(tape: Tape, step: Step) -> Gradients:
    (g,) = _kept(tape, step, _axes(tape, step, 18), step.g)
    return {0: tape.expanded(tape.div(g, tape.size_ratio(step.x, step.y)), step.x)}


def reduce_sum_square(tape: Tape, step: Step) -> Gradients:
    (g,) = _kept(tape, step, _axes(tape, step, 18), step.g)
    return {0: tape.mul(tape.scaled(g, 2, step.x), step.x)}


def reduce_l2(tape: Tape, step: Step) -> Gradients:
    g, y = _kept(tape, step, _axes(tape, step, 18), step.g, step.y)
    return {0: tape.mul(tape.div(g, y), step.x)}


def reduce_log_sum_exp(tape: Tape, step: Step) -> Gradients:
    g, y = _kept(tape, step, _axes(tape, step, 18), step.g, step.y)
    return {0: tape.mul(g, tape.op("Exp", tape.sub(step.x, y)))}


def reduce_extreme(tape: Tape, step: Step) -> Gradients:
    """Equal extremes share it."""
    if step.kind == "GlobalMaxPool":
        axes: list[int] | None = list(range(2, tape.rank(step.x)))
        g, y = step.g, step.y
    else:
        axes = _axes(tape, step, 18)
        g, y = _kept(tape, step, axes, step.g, step.y)
    if axes is None:
        axes = list(range(tape.rank(step.x)))
    apart = tape.op("Abs", tape.sub(step.x, y))
    here = tape.inverted(tape.above(apart, tape.number(0, step.x), step.x), step.x)
    return {0: tape.mul(tape.div(g, tape.summed(here, axes)), here)}


def _softmax_axes(tape: Tape, step: Step) -> list[int]:
    """The axes that one softmax runs over: one, or up to opset 12 all from there on."""
    if tape.opset >= 13:
        return [int(step.attributes.get("axis", -1))]
    axis = int(step.attributes.get("axis", 1))
    if axis == -1:
        return [-1]
    rank = tape.rank(step.x)
    return list(range(axis % rank if axis < 0 else axis, rank))


def softmax(tape: Tape, step: Step) -> Gradients:
    weighted = tape.mul(step.g, step.y)
    share = tape.summed(weighted, _softmax_axes(tape, step))
    return {0: tape.sub(weighted, tape.mul(step.y, share))}


def log_softmax(tape: Tape, step: Step) -> Gradients:
    share = tape.summed(step.g, _softmax_axes(tape, step))
    return {0: tape.sub(step.g, tape.mul(tape.op("Exp", step.y), share))}


def batch_normalization(tape: Tape, step: Step) -> Gradients:
    if step.attributes.get("training_mode", 0) or not step.attributes.get("spatial", 1):
        raise NoRule
    scale, variance = step.inputs[1], step.inputs[4]
    epsilon = tape.number(step.attributes.get("epsilon", 1e-5), variance)
    slope = tape.div(scale, tape.op("Sqrt", tape.add(variance, epsilon)))
    slope = tape.unsqueezed(slope, list(range(1, tape.rank(step.x) - 1)))
    return {0: tape.mul(step.g, slope)}


def _normalised(tape: Tape, step: Step, g: str, axes: Sequence[int], epsilon: float) -> str:
    """Through (x - mean) / sqrt(variance + epsilon) over these axes."""
    centred = tape.sub(step.x, tape.mean(step.x, axes))
    variance = tape.mean(tape.mul(centred, centred), axes)
    deviation = tape.op("Sqrt", tape.add(variance, tape.number(epsilon, step.x)))
    normal = tape.div(centred, deviation)
    along = tape.mul(normal, tape.mean(tape.mul(g, normal), axes))
    return tape.div(tape.sub(tape.sub(g, tape.mean(g, axes)), along), deviation)


def instance_normalization(tape: Tape, step: Step) -> Gradients:
    rank = tape.rank(step.x)
    scale = tape.unsqueezed(step.inputs[1], list(range(1, rank - 1)))
    epsilon = float(step.attributes.get("epsilon", 1e-5))
    return {0: _normalised(tape, step, tape.mul(step.g, scale), list(range(2, rank)), epsilon)}


def layer_normalization(tape: Tape, step: Step) -> Gradients:
    if any(step.cotangents[1:]):
        raise NoRule
    axis = int(step.attributes.get("axis", -1))
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, tape.rank(step.x)))
    epsilon = float(step.attributes.get("epsilon", 1e-5))
    return {0: _normalised(tape, step, tape.mul(step.g, step.inputs[1]), axes, epsilon)}
