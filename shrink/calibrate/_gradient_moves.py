"""Rules for operators that move numbers without changing them."""

from __future__ import annotations

import numpy as np

from shrink.calibrate._gradient_tape import Gradients, NoRule, Step, Tape

__all__ = [
    "concat", "depth_to_space", "expand", "pad", "reshape", "selection", "slice_", "space_to_depth", "split",
    "transpose",
]  # fmt: skip

# Index tensors of the ONNX runtimes at hand: int64.
_INT64 = 7


def reshape(tape: Tape, step: Step) -> Gradients:
    return {0: tape.reshaped(step.g, step.x)}


def expand(tape: Tape, step: Step) -> Gradients:
    return {0: tape.summed_to(step.g, step.x, step.y)}


def transpose(tape: Tape, step: Step) -> Gradients:
    perm = step.attributes.get("perm")
    if perm is None:
        return {0: tape.op("Transpose", step.g)}
    return {0: tape.op("Transpose", step.g, perm=[int(p) for p in np.argsort(perm)])}


def concat(tape: Tape, step: Step) -> Gradients:
    axis = int(step.attributes["axis"])
    sizes: list[int] = []
    for value in step.inputs:
        size = tape.shape(value)[axis] if value in tape.facts.shapes else None
        if isinstance(size, int):
            sizes.append(size)
    if len(sizes) == len(step.inputs):
        parts = tape.divided(step.g, sizes, axis % tape.rank(step.x))
    else:
        tape.since(13)
        each = [_size_along(tape, value, axis) for value in step.inputs]
        parts = tape.ops("Split", len(each), step.g, tape.op("Concat", *each, axis=0), axis=axis)
    return {i: parts[i] for i in step.wanted}


def _size_along(tape: Tape, value: str, axis: int) -> str:
    return tape.op("Gather", tape.op("Shape", value), tape.ints([axis]), axis=0)


def split(tape: Tape, step: Step) -> Gradients:
    parts = [g or tape.zeros(y) for g, y in zip(step.cotangents, step.outputs, strict=True)]
    return {0: tape.op("Concat", *parts, axis=int(step.attributes.get("axis", 0)))}


def slice_(tape: Tape, step: Step) -> Gradients:
    pads = _pads_of_slice(tape, step)
    if pads is None:
        return selection(tape, step)
    return {0: tape.padded(step.g, pads, step.x)}


def _pads_of_slice(tape: Tape, step: Step) -> list[int] | None:
    """What a slice cuts off at the begins and the ends of all axes, where that is known and all it does."""
    try:
        if tape.opset < 10:
            starts, ends = list(step.attributes["starts"]), list(step.attributes["ends"])
            axes, steps = step.attributes.get("axes"), [1] * len(starts)
        else:
            starts, ends = tape.integers(step.inputs[1]), tape.integers(step.inputs[2])
            axes = tape.integers(step.inputs[3]) if step.input(3) else None
            steps = tape.integers(step.inputs[4]) if step.input(4) else [1] * len(starts)
        shape = tape.shape(step.x)
    except NoRule:
        return None
    rank = len(shape)
    begins, behind = [0] * rank, [0] * rank
    for axis, start, end, stride in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        size = shape[axis]
        if stride != 1:
            return None
        if isinstance(size, int):
            start, end, _ = slice(start, end).indices(size)
            begins[axis], behind[axis] = (start, size - end) if end >= start else (start, size - start)
        elif start == 0 and end < 0:
            # Taking off a few at the end: right where there are as many.
            behind[axis] = -end
        elif start >= 0 and end >= (1 << 31) - 1:
            begins[axis] = start
        else:
            return None
    return [*begins, *behind]


def selection(tape: Tape, step: Step) -> Gradients:
    """For any operator that copies elements: applied to the elements' numbers, it says where each came from."""
    if 0 not in step.wanted or len(step.wanted) > 1:
        raise NoRule
    once = step.kind in ("Slice", "Transpose") or _picks_once(tape, step)
    tape.since(11 if once else 16)
    count = tape.op("Size", step.x)
    numbers = tape.reshaped(tape.op("Range", tape.ints(0), count, tape.ints(1)), step.x)
    rest = list(step.inputs[1:])
    if step.kind == "Pad":
        rest = [*rest[:1], "", *rest[2:]]
    chosen = tape.op(step.kind, numbers, *rest, **step.attributes)
    flat = tape.op("ConstantOfShape", tape.op("Shape", tape.reshape(numbers, [-1])), value=_zero(tape, step.x))
    places, values = tape.reshape(chosen, [-1]), tape.reshape(step.g, [-1])
    found = tape.op("ScatterElements", flat, places, values, axis=0, reduction=None if once else "add")
    return {0: tape.reshaped(found, step.x)}


def _zero(tape: Tape, like: str) -> object:
    from onnx import helper

    return helper.make_tensor("value", tape.dtype(like), [1], [0.0])


def _picks_once(tape: Tape, step: Step) -> bool:
    """Whether a Gather takes nothing twice."""
    indices = tape.content(step.input(1)) if step.kind == "Gather" else None
    if indices is None:
        return False
    if indices.size == 1:
        return True
    return bool((indices >= 0).all()) and len(np.unique(indices)) == indices.size


def pad(tape: Tape, step: Step) -> Gradients:
    mode = step.attributes.get("mode", "constant")
    if mode != "constant":
        if tape.opset >= 16:
            return selection(tape, step)
        if mode == "reflect":
            return {0: _unreflected(tape, step)}
        raise NoRule
    if tape.opset < 11:
        return {0: _cut(tape, step.g, list(step.attributes["pads"]))}
    try:
        pads = tape.integers(step.inputs[1])
        if min(pads) >= 0 and not step.input(3):
            return {0: _cut(tape, step.g, pads)}
    except NoRule:
        pass
    # Padding by less than nothing cuts; numbers are only known when the graph runs.
    axes = step.input(3)
    rest = [tape.number(0, step.x), axes] if axes else [tape.number(0, step.x)]
    return {0: tape.op("Pad", step.g, tape.op("Neg", step.inputs[1]), *rest, mode="constant")}


def _cut(tape: Tape, g: str, pads: list[int]) -> str:
    rank = len(pads) // 2
    if min(pads) < 0:
        raise NoRule
    for axis, (begin, end) in enumerate(zip(pads[:rank], pads[rank:], strict=True)):
        if begin or end:
            g = tape.part(g, axis, begin, -end if end else None)
    return g


def _unreflected(tape: Tape, step: Step) -> str:
    """Along each axis, what was mirrored at the borders is mirrored back and added."""
    tape.since(10)
    pads = list(step.attributes["pads"]) if tape.opset < 11 else tape.integers(step.inputs[1])
    shape = tape.static(step.x)
    if shape is None or min(pads) < 0:
        raise NoRule
    g, rank = step.g, len(shape)
    for axis, size in enumerate(shape):
        begin, end = pads[axis], pads[axis + rank]
        if not begin and not end:
            continue
        total = tape.part(g, axis, begin, begin + size)
        # Where the mirror images of both strips lie in the input.
        for start, stop, at in ((0, begin, 1), (begin + size, begin + size + end, size - 1 - end)):
            if start == stop:
                continue
            strip = tape.part(g, axis, start, stop)
            last, before = tape.ints([-1]), tape.ints([-(1 << 62)])
            mirrored = tape.op("Slice", strip, last, before, tape.ints([axis]), tape.ints([-1]))
            around = [0] * 2 * rank
            around[axis], around[axis + rank] = at, size - at - (stop - start)
            total = tape.add(total, tape.padded(mirrored, around, step.x))
        g = total
    return g


def depth_to_space(tape: Tape, step: Step) -> Gradients:
    block = int(step.attributes["blocksize"])
    g = tape.op("SpaceToDepth", step.g, blocksize=block)
    if step.attributes.get("mode", "DCR") == "DCR":
        return {0: g}
    # Channels came apart as (channel, row, column), and have come together as (row, column, channel).
    channels = tape.shape(step.x)[1]
    if not isinstance(channels, int):
        raise NoRule
    area = block * block
    apart = tape.reshape(g, [0, area, channels // area, -1])
    return {0: tape.reshaped(tape.op("Transpose", apart, perm=[0, 2, 1, 3]), step.x)}


def space_to_depth(tape: Tape, step: Step) -> Gradients:
    return {0: tape.op("DepthToSpace", step.g, blocksize=int(step.attributes["blocksize"]))}
