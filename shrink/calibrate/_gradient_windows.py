"""Rules for operators with windows over spatial axes: convolutions, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shrink.calibrate._gradient_tape import Gradients, NoRule, Step, Tape

__all__ = ["average_pool", "conv", "conv_transpose", "global_average_pool", "max_pool"]

# Lower than any activation, and finite, so that 0 times it is 0.
_LOWEST, _LOWEST_FLOAT16, _FLOAT16 = -3e38, -60000.0, 10


@dataclass(frozen=True)
class _Windows:
    """How windows lie along each spatial axis: input [pad begin + size + pad end], every `strides` numbers one."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def extents(self) -> list[int]:
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def count(self, sizes: Sequence[int]) -> list[int]:
        """How many fit, along each axis."""
        padded = [b + n + e for b, n, e in zip(self.begins, sizes, self.ends, strict=True)]
        return [(p - x) // s + 1 for p, x, s in zip(padded, self.extents, self.strides, strict=True)]


def _sizes(tape: Tape, value: str) -> list[int | None]:
    """The spatial sizes, as far as they are known, of a value of known rank."""
    return [d if isinstance(d, int) else None for d in tape.shape(value)[2:]]


def _windows(tape: Tape, step: Step, kernel: Sequence[int]) -> _Windows:
    rank = len(kernel)
    strides = tuple(step.attributes.get("strides", [1] * rank))
    dilations = tuple(step.attributes.get("dilations", [1] * rank))
    pads = list(step.attributes.get("pads", [0] * 2 * rank))
    if not rank or len(strides) != rank or len(dilations) != rank or len(pads) != 2 * rank:
        raise NoRule
    if min(strides) < 1 or min(dilations) < 1 or min(kernel) < 1 or min(pads) < 0:
        raise NoRule
    how = step.attributes.get("auto_pad", "NOTSET")
    begins, ends = tuple(pads[:rank]), tuple(pads[rank:])
    if how == "VALID":
        begins = ends = (0,) * rank
    windows = _Windows(tuple(kernel), strides, dilations, begins, ends)
    if how not in ("SAME_UPPER", "SAME_LOWER"):
        return windows
    totals = []
    sizes = _sizes(tape, step.x) if any(s != 1 for s in strides) else [None] * rank
    for size, stride, extent in zip(sizes, strides, windows.extents, strict=True):
        if size is None and stride != 1:
            raise NoRule
        rest = 0 if size is None else (-(-size // stride) - 1) * stride - size + 1
        totals.append(max(0, extent - 1 + rest))
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    begins, ends = (less, more) if how == "SAME_UPPER" else (more, less)
    return _Windows(tuple(kernel), strides, dilations, begins, ends)


def _spread(
    tape: Tape, g: str, weight: str, windows: _Windows, like: str, sizes: Sequence[int | None], group: int = 1
) -> str:
    """The transpose of a convolution: from windows back to the input `like`, with spatial `sizes`."""
    rank = len(windows.kernel)
    layout = {
        "strides": windows.strides, "dilations": windows.dilations, "group": group, "kernel_shape": windows.kernel,
    }  # fmt: skip
    pads = [*windows.begins, *windows.ends]
    known = [n for n in sizes if n is not None]
    if all(s == 1 for s in windows.strides):
        return tape.op("ConvTranspose", g, weight, pads=pads, **layout)
    if len(known) == rank:
        counts = windows.count(known)
        covered = [(n - 1) * s + x for n, s, x in zip(counts, windows.strides, windows.extents, strict=True)]
        padded = [b + n + e for b, n, e in zip(windows.begins, known, windows.ends, strict=True)]
        extra = [p - c for p, c in zip(padded, covered, strict=True)]
        return tape.op("ConvTranspose", g, weight, pads=pads, output_padding=extra if any(extra) else None, **layout)
    extra = [s - 1 for s in windows.strides]
    whole = tape.op("ConvTranspose", g, weight, output_padding=extra if any(extra) else None, **layout)
    return _cropped(tape, whole, windows, like)


def _cropped(tape: Tape, whole: str, windows: _Windows, like: str) -> str:
    """The part of a padded value that is no padding; what is beyond its end never was in a window, so pad first."""
    tape.since(10)
    rank = len(windows.kernel)
    spatial, starts = _spatial(tape, like, rank), tape.ints(list(windows.begins))
    return tape.op("Slice", whole, starts, tape.add(spatial, starts), tape.ints(list(range(2, 2 + rank))))


def _kernel(tape: Tape, step: Step) -> tuple[int, ...]:
    found = tape.facts.shapes.get(step.inputs[1])
    dims = tuple(step.attributes.get("kernel_shape", ())) or (found[2:] if found else ())
    kernel = tuple(d for d in dims if isinstance(d, int))
    if len(kernel) != len(dims):
        raise NoRule
    return kernel


def conv(tape: Tape, step: Step) -> Gradients:
    windows = _windows(tape, step, _kernel(tape, step))
    shape = tape.facts.shapes.get(step.x)
    sizes = _sizes(tape, step.x) if shape else [None] * len(windows.kernel)
    group = int(step.attributes.get("group", 1))
    backwards = _as_convolution(tape, step, windows, group)
    if backwards is not None:
        return {0: backwards}
    return {0: _spread(tape, step.g, step.inputs[1], windows, step.x, sizes, group)}


def _as_convolution(tape: Tape, step: Step, windows: _Windows, group: int) -> str | None:
    """With strides of 1, the way back is a convolution with the mirrored kernels, for which runtimes are quicker."""
    shape = tape.facts.shapes.get(step.inputs[1], ())
    dims = [d for d in shape if isinstance(d, int)]
    limits = [x - 1 for x in windows.extents]
    pads = [limit - p for limit, p in zip(limits * 2, (*windows.begins, *windows.ends), strict=True)]
    if any(s != 1 for s in windows.strides) or len(dims) != len(shape) or min(pads) < 0 or dims[0] % group:
        return None
    outputs, inputs, *kernel = dims
    weight = step.inputs[1]
    for axis, size in enumerate(kernel, 2):
        if size > 1:
            weight = tape.op("Gather", weight, tape.ints(list(range(size))[::-1]), axis=axis)
    spatial = range(len(kernel))
    if group > 1:
        weight = tape.reshape(weight, [group, outputs // group, inputs, *kernel])
        weight = tape.op("Transpose", weight, perm=[0, 2, 1, *(3 + i for i in spatial)])
        weight = tape.reshape(weight, [group * inputs, outputs // group, *kernel])
    else:
        weight = tape.op("Transpose", weight, perm=[1, 0, *(2 + i for i in spatial)])
    return tape.op("Conv", step.g, weight, kernel_shape=kernel, dilations=windows.dilations, pads=pads, group=group)


def conv_transpose(tape: Tape, step: Step) -> Gradients:
    kernel = _kernel(tape, step)
    rank = len(kernel)
    strides = tuple(step.attributes.get("strides", [1] * rank))
    dilations = tuple(step.attributes.get("dilations", [1] * rank))
    extra = tuple(step.attributes.get("output_padding", [0] * rank))
    how = step.attributes.get("auto_pad", "NOTSET")
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        # The convolution back would have one window more.
        raise NoRule
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if "output_shape" in step.attributes:
        target = list(step.attributes["output_shape"])[-rank:]
        sizes = _sizes(tape, step.x)
        totals = []
        for n, s, e, x, t in zip(sizes, strides, extra, extents, target, strict=True):
            if n is None:
                raise NoRule
            totals.append(s * (n - 1) + e + x - t)
    elif how in ("SAME_UPPER", "SAME_LOWER"):
        totals = [x - s + e for s, e, x in zip(strides, extra, extents, strict=True)]
    else:
        pads = [0] * 2 * rank if how == "VALID" else list(step.attributes.get("pads", [0] * 2 * rank))
        return _gathered(tape, step, _Windows(kernel, strides, dilations, tuple(pads[:rank]), tuple(pads[rank:])))
    if min(totals) < 0:
        raise NoRule
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    begins, ends = (less, more) if how == "SAME_UPPER" else (more, less)
    return _gathered(tape, step, _Windows(kernel, strides, dilations, begins, ends))


def _gathered(tape: Tape, step: Step, windows: _Windows) -> Gradients:
    found = tape.op(
        "Conv", step.g, step.inputs[1], kernel_shape=windows.kernel, strides=windows.strides,
        dilations=windows.dilations, group=int(step.attributes.get("group", 1)), pads=[*windows.begins, *windows.ends],
    )  # fmt: skip
    return {0: found}


def _pool(tape: Tape, step: Step) -> tuple[_Windows, list[int | None]]:
    """Windows, with padding up to the last one that ONNX Runtime looks at, and the sizes of the input."""
    windows = _windows(tape, step, tuple(step.attributes["kernel_shape"]))
    sizes, counts = _sizes(tape, step.x), _sizes(tape, step.y)
    if not step.attributes.get("ceil_mode", 0):
        return windows, sizes
    ends = []
    for axis, (n, m) in enumerate(zip(sizes, counts, strict=True)):
        if n is None or m is None:
            raise NoRule
        last = (m - 1) * windows.strides[axis] + windows.extents[axis] - windows.begins[axis] - n
        ends.append(max(windows.ends[axis], last))
    found = _Windows(windows.kernel, windows.strides, windows.dilations, windows.begins, tuple(ends))
    if found.count([n for n in sizes if n is not None]) != counts:
        raise NoRule
    return found, sizes


def _by_channel(tape: Tape, value: str, like: str) -> str:
    """(N, C, …) as (N·C, 1, …): every channel is pooled alone."""
    dims = tape.shape(like)[2:]
    if all(isinstance(d, int) for d in dims):
        return tape.reshape(value, [-1, 1, *(d for d in dims if isinstance(d, int))])
    return tape.op("Reshape", value, tape.op("Concat", tape.ints([-1, 1]), _spatial(tape, like, len(dims)), axis=0))


def _spatial(tape: Tape, value: str, rank: int) -> str:
    """Its spatial sizes, when the graph runs."""
    return tape.op("Gather", tape.op("Shape", value), tape.ints(list(range(2, 2 + rank))), axis=0)


def max_pool(tape: Tape, step: Step) -> Gradients:
    """Every window's gradient goes to the first of its maxima.

    Windows become channels by a convolution with one kernel for each of their positions, which copies numbers as they
    are; its transpose adds up what each input gets from all windows.
    """
    windows, sizes = _pool(tape, step)
    x = _by_channel(tape, step.x, step.x)
    rank, area = len(windows.kernel), math.prod(windows.kernel)
    lowest = _LOWEST_FLOAT16 if tape.dtype(step.x) == _FLOAT16 else _LOWEST
    x = tape.padded(x, [0, 0, *windows.begins, 0, 0, *windows.ends], step.x, lowest)
    kernels = tape.floats(np.eye(area).reshape(area, 1, *windows.kernel), step.x)
    layout = {"strides": windows.strides, "dilations": windows.dilations, "kernel_shape": windows.kernel}
    candidates = tape.op("Conv", x, kernels, **layout)
    first = tape.op("ArgMax", candidates, axis=1, keepdims=1)
    places = tape.ints(np.arange(area).reshape(1, area, *[1] * rank).tolist())
    chosen = tape.op("Cast", tape.op("Equal", first, places), to=tape.dtype(step.x))
    g = tape.mul(_by_channel(tape, step.g, step.y), chosen)
    return {0: tape.reshaped(_spread(tape, g, kernels, windows, step.x, sizes), step.x)}


def average_pool(tape: Tape, step: Step) -> Gradients:
    windows, sizes = _pool(tape, step)
    g = _by_channel(tape, step.g, step.y)
    ones = tape.floats(np.ones((1, 1, *windows.kernel)), step.x)
    padding = any((*windows.begins, *windows.ends))
    if not padding or (step.attributes.get("count_include_pad", 0) and not step.attributes.get("ceil_mode", 0)):
        g = tape.div(g, tape.number(math.prod(windows.kernel), step.x))
    elif step.attributes.get("count_include_pad", 0):
        raise NoRule
    else:
        x = _by_channel(tape, step.x, step.x)
        layout = {"strides": windows.strides, "dilations": windows.dilations, "kernel_shape": windows.kernel}
        pads = [*windows.begins, *windows.ends]
        there = tape.add(tape.mul(x, tape.number(0, step.x)), tape.number(1, step.x))
        g = tape.div(g, tape.op("Conv", there, ones, pads=pads, **layout))
    return {0: tape.reshaped(_spread(tape, g, ones, windows, step.x, sizes), step.x)}


def global_average_pool(tape: Tape, step: Step) -> Gradients:
    return {0: tape.expanded(tape.div(step.g, tape.size_ratio(step.x, step.y)), step.x)}
