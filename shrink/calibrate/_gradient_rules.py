"""Rules of differentiation, by the name of the operator; those for numbers one by one stand here.

A rule writes the nodes that turn the gradient of a node's output into those of its inputs. From the operators' ONNX
documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from shrink.calibrate import _gradient_moves as moves
from shrink.calibrate import _gradient_sums as sums
from shrink.calibrate import _gradient_windows as windows
from shrink.calibrate._gradient_resize import resize
from shrink.calibrate._gradient_tape import Gradients, NoRule, Step, Tape

__all__ = ["RULES", "Rule"]

Rule = Callable[[Tape, Step], Gradients]

_SELU = (1.67326319217681884765625, 1.05070102214813232421875)


def _unary(slope: Callable[[Tape, Step], str]) -> Rule:
    """From the derivative of each output by its input."""

    def rule(tape: Tape, step: Step) -> Gradients:
        return {0: tape.mul(step.g, slope(tape, step))}

    return rule


def _same(tape: Tape, step: Step) -> Gradients:
    return {0: step.g}


def _nothing(tape: Tape, step: Step) -> Gradients:
    """Constant nearly everywhere."""
    return dict.fromkeys(step.wanted)


def _broadcast(tape: Tape, step: Step, *gradients: Callable[[], str]) -> Gradients:
    return {i: tape.summed_to(gradients[i](), step.inputs[i], step.y) for i in step.wanted}


def _add(tape: Tape, step: Step) -> Gradients:
    return {i: tape.summed_to(step.g, step.inputs[i], step.y) for i in step.wanted}


def _sub(tape: Tape, step: Step) -> Gradients:
    return _broadcast(tape, step, lambda: step.g, lambda: tape.op("Neg", step.g))


def _mul(tape: Tape, step: Step) -> Gradients:
    a, b = step.inputs
    return _broadcast(tape, step, lambda: tape.mul(step.g, b), lambda: tape.mul(step.g, a))


def _div(tape: Tape, step: Step) -> Gradients:
    b = step.inputs[1]

    def by_divisor() -> str:
        return tape.op("Neg", tape.div(tape.mul(step.g, step.y), b))

    return _broadcast(tape, step, lambda: tape.div(step.g, b), by_divisor)


def _mean(tape: Tape, step: Step) -> Gradients:
    g = tape.div(step.g, tape.number(len(step.inputs), step.y))
    return {i: tape.summed_to(g, step.inputs[i], step.y) for i in step.wanted}


def _pow(tape: Tape, step: Step) -> Gradients:
    base, exponent = step.inputs
    known = tape.content(exponent)
    if known is not None and known.size == 1:
        p = float(known.reshape(-1)[0])
        raised = base if p == 2 else tape.op("Pow", base, tape.number(p - 1, base))
        found = tape.scaled(tape.mul(step.g, raised), p, base)
    else:
        p_name = exponent
        if tape.dtype(exponent) != tape.dtype(base):
            p_name = tape.op("Cast", exponent, to=tape.dtype(base))
        raised = tape.op("Pow", base, tape.sub(p_name, tape.number(1, base)))
        found = tape.product(step.g, p_name, raised)
    return {0: tape.summed_to(found, base, step.y)}


def _extreme(sign: int) -> Rule:
    """Max and Min: among equal inputs the first gets it all."""

    def rule(tape: Tape, step: Step) -> Gradients:
        taken = ""
        found: Gradients = {}
        for i, value in enumerate(step.inputs):
            apart = tape.sub(step.y, value) if sign > 0 else tape.sub(value, step.y)
            here = tape.inverted(tape.above(apart, tape.number(0, value), value), value)
            if taken:
                here = tape.mul(here, tape.inverted(taken, value))
            taken = tape.add(taken, here) if taken else here
            if i in step.wanted:
                found[i] = tape.summed_to(tape.mul(step.g, here), value, step.y)
        return found

    return rule


def _where(tape: Tape, step: Step) -> Gradients:
    condition, yes, no = step.inputs
    found: Gradients = {}
    zero = tape.number(0, step.y)
    if 1 in step.wanted:
        found[1] = tape.summed_to(tape.op("Where", condition, step.g, zero), yes, step.y)
    if 2 in step.wanted:
        found[2] = tape.summed_to(tape.op("Where", condition, zero, step.g), no, step.y)
    return found


def _cast(tape: Tape, step: Step) -> Gradients:
    # From and to floating-point: what is cast to integers has no gradient that could come here.
    source, target = tape.facts.dtypes.get(step.x), tape.facts.dtypes.get(step.y)
    if source is None:
        raise NoRule
    # The second input of CastLike gives nothing but its type.
    return {0: step.g if source == target else tape.op("Cast", step.g, to=source), 1: None}


def _dropout(tape: Tape, step: Step) -> Gradients:
    training = step.input(2)
    if training is not None:
        known = tape.content(training)
        if known is None or known.any():
            raise NoRule
    return {0: step.g}


def _positive(tape: Tape, step: Step, bound: float = 0.0) -> str:
    return tape.above(step.x, tape.number(bound, step.x), step.x)


def _choice(tape: Tape, step: Step, below: str) -> str:
    """1 for inputs above 0, else `below`, which is finite everywhere."""
    mask = _positive(tape, step)
    return tape.add(mask, tape.mul(tape.inverted(mask, step.x), below))


def _leaky_relu(tape: Tape, step: Step) -> str:
    return _choice(tape, step, tape.number(step.attributes.get("alpha", 0.01), step.x))


def _prelu(tape: Tape, step: Step) -> Gradients:
    slope = step.inputs[1]
    found: Gradients = {}
    if 0 in step.wanted:
        found[0] = tape.mul(step.g, _choice(tape, step, slope))
    if 1 in step.wanted:
        negative = tape.mul(tape.inverted(_positive(tape, step), step.x), step.x)
        found[1] = tape.summed_to(tape.mul(step.g, negative), slope, step.y)
    return found


def _elu(tape: Tape, step: Step) -> str:
    return _choice(tape, step, tape.add(step.y, tape.number(step.attributes.get("alpha", 1.0), step.x)))


def _celu(tape: Tape, step: Step) -> str:
    alpha = tape.number(step.attributes.get("alpha", 1.0), step.x)
    return _choice(tape, step, tape.add(tape.div(step.y, alpha), tape.number(1, step.x)))


def _selu(tape: Tape, step: Step) -> str:
    alpha = step.attributes.get("alpha", _SELU[0])
    gamma = step.attributes.get("gamma", _SELU[1])
    mask = _positive(tape, step)
    below = tape.mul(tape.inverted(mask, step.x), tape.add(step.y, tape.number(alpha * gamma, step.x)))
    return tape.add(tape.scaled(mask, gamma, step.x), below)


def _sigmoid(tape: Tape, step: Step) -> str:
    return tape.mul(step.y, tape.inverted(step.y, step.x))


def _tanh(tape: Tape, step: Step) -> str:
    return tape.inverted(tape.mul(step.y, step.y), step.x)


def _softsign(tape: Tape, step: Step) -> str:
    below = tape.inverted(tape.op("Abs", step.y), step.x)
    return tape.mul(below, below)


def _between(tape: Tape, step: Step, low: float, high: float) -> str:
    below = tape.above(tape.number(high, step.x), step.x, step.x)
    return tape.mul(_positive(tape, step, low), below)


def _hard_sigmoid(tape: Tape, step: Step) -> str:
    alpha, beta = step.attributes.get("alpha", 0.2), step.attributes.get("beta", 0.5)
    if alpha <= 0:
        raise NoRule
    return tape.scaled(_between(tape, step, -beta / alpha, (1 - beta) / alpha), alpha, step.x)


def _hard_swish(tape: Tape, step: Step) -> str:
    middle = tape.add(tape.scaled(step.x, 1 / 3, step.x), tape.number(0.5, step.x))
    return tape.add(_positive(tape, step, 3.0), tape.mul(_between(tape, step, -3.0, 3.0), middle))


def _mish(tape: Tape, step: Step) -> str:
    t = tape.op("Tanh", tape.op("Softplus", step.x))
    inner = tape.product(step.x, tape.op("Sigmoid", step.x), tape.inverted(tape.mul(t, t), step.x))
    return tape.add(t, inner)


def _bell(tape: Tape, x: str, factor: float) -> str:
    """factor · exp(-x²)."""
    return tape.scaled(tape.op("Exp", tape.op("Neg", tape.mul(x, x))), factor, x)


def _gelu(tape: Tape, step: Step) -> str:
    x = step.x
    half = tape.number(0.5, x)
    if step.attributes.get("approximate", "none") == "tanh":
        c, cubic = math.sqrt(2 / math.pi), 0.044715
        square = tape.mul(x, x)
        bent = tape.add(tape.scaled(square, cubic, x), tape.number(1, x))
        t = tape.op("Tanh", tape.scaled(tape.mul(x, bent), c, x))
        slope = tape.add(tape.scaled(square, 3 * c * cubic, x), tape.number(c, x))
        inner = tape.product(x, tape.inverted(tape.mul(t, t), x), slope)
        return tape.mul(half, tape.add(tape.add(t, tape.number(1, x)), inner))
    scaled = tape.scaled(x, math.sqrt(0.5), x)
    share = tape.mul(half, tape.add(tape.op("Erf", scaled), tape.number(1, x)))
    density = tape.op("Exp", tape.op("Neg", tape.mul(scaled, scaled)))
    return tape.add(share, tape.scaled(tape.mul(x, density), 1 / math.sqrt(2 * math.pi), x))


def _abs(tape: Tape, step: Step) -> str:
    below = tape.above(tape.number(0, step.x), step.x, step.x)
    return tape.sub(_positive(tape, step), below)


def _clip(tape: Tape, step: Step) -> str:
    return tape.inverted(tape.above(tape.op("Abs", tape.sub(step.x, step.y)), tape.number(0, step.x), step.x), step.x)


RULES: dict[str, Rule] = {
    "Abs": _unary(_abs),
    "Add": _add,
    "BatchNormalization": sums.batch_normalization,
    "AveragePool": windows.average_pool,
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _nothing,
    "Celu": _unary(_celu),
    "Clip": _unary(_clip),
    "Concat": moves.concat,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "Cos": _unary(lambda t, s: t.op("Neg", t.op("Sin", s.x))),
    "DepthToSpace": moves.depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _unary(_elu),
    "Erf": _unary(lambda t, s: _bell(t, s.x, 2 / math.sqrt(math.pi))),
    "Exp": _unary(lambda t, s: s.y),
    "Expand": moves.expand,
    "Flatten": moves.reshape,
    "Floor": _nothing,
    "Gather": moves.selection,
    "GatherElements": moves.selection,
    "GatherND": moves.selection,
    "Gelu": _unary(_gelu),
    "Gemm": sums.gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "GlobalMaxPool": sums.reduce_extreme,
    "HardSigmoid": _unary(_hard_sigmoid),
    "HardSwish": _unary(_hard_swish),
    "Identity": _same,
    "InstanceNormalization": sums.instance_normalization,
    "LayerNormalization": sums.layer_normalization,
    "LeakyRelu": _unary(_leaky_relu),
    "Log": lambda t, s: {0: t.div(s.g, s.x)},
    "LogSoftmax": sums.log_softmax,
    "MatMul": sums.matmul,
    "Max": _extreme(1),
    "MaxPool": windows.max_pool,
    "Mean": _mean,
    "Min": _extreme(-1),
    "Mish": _unary(_mish),
    "Mul": _mul,
    "Neg": lambda t, s: {0: t.op("Neg", s.g)},
    "PRelu": _prelu,
    "Pad": moves.pad,
    "Pow": _pow,
    "Reciprocal": _unary(lambda t, s: t.op("Neg", t.mul(s.y, s.y))),
    "ReduceL2": sums.reduce_l2,
    "ReduceLogSumExp": sums.reduce_log_sum_exp,
    "ReduceMax": sums.reduce_extreme,
    "ReduceMean": sums.reduce_mean,
    "ReduceMin": sums.reduce_extreme,
    "ReduceSum": sums.reduce_sum,
    "ReduceSumSquare": sums.reduce_sum_square,
    "Relu": _unary(_positive),
    "Reshape": moves.reshape,
    "Resize": resize,
    "Round": _nothing,
    "Selu": _unary(_selu),
    "Sigmoid": _unary(_sigmoid),
    "Sign": _nothing,
    "Sin": _unary(lambda t, s: t.op("Cos", s.x)),
    "Slice": moves.slice_,
    "Softmax": sums.softmax,
    "Softplus": _unary(lambda t, s: t.op("Sigmoid", s.x)),
    "Softsign": _unary(_softsign),
    "SpaceToDepth": moves.space_to_depth,
    "Split": moves.split,
    "Sqrt": lambda t, s: {0: t.div(t.scaled(s.g, 0.5, s.x), s.y)},
    "Squeeze": moves.reshape,
    "Sub": _sub,
    "Sum": _add,
    "Tanh": _unary(_tanh),
    "ThresholdedRelu": _unary(lambda t, s: _positive(t, s, s.attributes.get("alpha", 1.0))),
    "Tile": moves.selection,
    "Transpose": moves.transpose,
    "Unsqueeze": moves.reshape,
    "Upsample": resize,
    "Where": _where,
}
