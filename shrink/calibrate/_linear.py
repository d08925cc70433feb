"""The ONNX operators that apply a weight as a linear map: which matrix it is, and which inputs it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shrink.calibrate._positions import Indices, Reads, States, Vectors, Window
from shrink.calibrate._views import Reshape, Spread, Step, Transpose
from shrink.errors import BadInput, printable

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["LINEAR", "RECURRENT", "BiasSlot", "Call", "Found", "Kind", "Rule"]

Kind = Literal["conv", "deconv", "dense", "recurrent", "embedding"]

RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""How many matrices of hidden rows are stacked in a weight."""

_INTS, _INT, _FLOAT, _STRING = 7, 2, 1, 3
# A kernel whose strides and dilations leave it this much emptier is no useful matrix.
_SPREAD_AT_MOST = 64


@dataclass(frozen=True)
class Call:
    """A node that uses a weight of this shape as its input number `slot`."""

    node: NodeProto
    slot: int
    shape: tuple[int, ...]

    def ints(self, name: str, count: int, default: int) -> tuple[int, ...]:
        found = self._attribute(name, _INTS)
        if found is None:
            return (default,) * count
        if len(found.ints) != count:
            raise self.bad(f"{name} has {len(found.ints)} numbers, not {count}")
        return tuple(found.ints)

    def positive(self, name: str, count: int) -> tuple[int, ...]:
        found = self.ints(name, count, 1)
        if any(not 0 < n < 1 << 31 for n in found):
            raise self.bad(f"{name} is {list(found)}")
        return found

    def whole(self, name: str, default: int) -> int:
        found = self._attribute(name, _INT)
        return default if found is None else int(found.i)

    def number(self, name: str, default: float) -> float:
        found = self._attribute(name, _FLOAT)
        return default if found is None else float(found.f)

    def text(self, name: str, default: str) -> str:
        found = self._attribute(name, _STRING)
        return default if found is None else bytes(found.s).decode("utf-8", "replace")

    def input(self, number: int) -> str:
        """The name of an input, "" where it is left out."""
        return self.node.input[number] if number < len(self.node.input) else ""

    def bad(self, what: str) -> BadInput:
        return BadInput(f"the {self.node.op_type} that uses it is not valid: {printable(what)}")

    def _attribute(self, name: str, kind: int) -> Any:
        for attribute in self.node.attribute:
            if attribute.name == name:
                if attribute.type != kind:
                    raise self.bad(f"{name} has another type than it must have")
                return attribute
        return None


@dataclass(frozen=True)
class BiasSlot:
    """Where a row's bias stands in the flat bias: start + group · per_group + row // rows_per_value."""

    start: int = 0
    per_group: int = 0
    rows_per_value: int = 1


@dataclass(frozen=True)
class Found:
    """A weight as a linear map. `steps` lead from its shape to (groups, outputs, inputs).

    `bias` is the number of the node's input that is added, of the shape `bias_shape` but for leading ones; 0 where no
    bias can be given. `added` says that an Add of such a bias behind the node does the same.
    """

    kind: Kind
    steps: tuple[Step, ...]
    matrix: tuple[int, int, int]
    reads: Reads
    input: str
    bias: int
    bias_shape: tuple[int, ...]
    bias_slot: BiasSlot
    added: bool = False
    initial: str = ""
    # How many axes follow that of the bias in the node's output.
    positions: int = 0


Rule = Callable[[Call], Found | None]


def _conv(call: Call) -> Found | None:
    if call.slot != 1:
        return None
    axes, groups = _kernel(call)
    channels, kernel = call.shape[0], call.shape[2:]
    if channels % groups:
        raise call.bad(f"its {channels} channels are not those of {groups} groups")
    matrix = (groups, channels // groups, math.prod(call.shape[1:]))
    dilations = call.positive("dilations", axes)
    taps = tuple(tuple(i * dilation for i in range(n)) for n, dilation in zip(kernel, dilations, strict=True))
    return Found(
        "conv",
        (Reshape(call.shape, matrix),),
        matrix,
        Window(_limited(call, taps), call.positive("strides", axes), _pads(call, axes)),
        call.input(0),
        bias=2,
        bias_shape=(channels,),
        bias_slot=BiasSlot(per_group=channels // groups),
        added=not call.input(2),
        positions=axes,
    )


def _deconv(call: Call) -> Found | None:
    if call.slot != 1:
        return None
    axes, groups = _kernel(call)
    channels, per_group, kernel = call.shape[0], call.shape[1], call.shape[2:]
    if channels % groups:
        raise call.bad(f"its {channels} channels are not those of {groups} groups")
    strides, dilations = call.positive("strides", axes), call.positive("dilations", axes)
    reached = [[i * d for i in range(n)] for n, d in zip(kernel, dilations, strict=True)]
    phases = [_numbered([at % s for at in axis]) for axis, s in zip(reached, strides, strict=True)]
    taps = [_numbered([at // s for at in axis]) for axis, s in zip(reached, strides, strict=True)]
    spread = Spread(tuple(n for n, _ in phases), tuple(n for n, _ in taps))
    phase_count, tap_count = math.prod(spread.phases), math.prod(spread.taps)
    if phase_count * tap_count > _SPREAD_AT_MOST * math.prod(kernel):
        return None
    # A tap reaches back from a block, so the first one is the last in the window.
    backs = _limited(call, tuple(back for _, back in taps))
    window = Window(
        tuple(tuple(max(back) - n for n in back) for back in backs),
        (1,) * axes,
        tuple((max(back), max(back)) for back in backs),
    )
    matrix = (groups, per_group * phase_count, channels // groups * tap_count)
    split = (groups, channels // groups, per_group, phase_count, tap_count)
    steps = (
        spread,
        Reshape((channels, per_group, *spread.phases, *spread.taps), split),
        Transpose((0, 2, 3, 1, 4)),
        Reshape((groups, per_group, phase_count, channels // groups, tap_count), matrix),
    )
    return Found(
        "deconv",
        steps,
        matrix,
        window,
        call.input(0),
        bias=2,
        bias_shape=(groups * per_group,),
        bias_slot=BiasSlot(per_group=per_group, rows_per_value=phase_count),
        added=not call.input(2),
        positions=axes,
    )


def _kernel(call: Call) -> tuple[int, int]:
    """The axes over which a kernel moves, and the groups."""
    axes = len(call.shape) - 2
    if axes < 1:
        raise call.bad(f"its weight has the shape {list(call.shape)}")
    if any(a.name == "kernel_shape" for a in call.node.attribute):
        shape = call.ints("kernel_shape", axes, 1)
        if shape != call.shape[2:]:
            raise call.bad(f"kernel_shape is {list(shape)}, its weight's is {list(call.shape[2:])}")
    groups = call.whole("group", 1)
    if groups < 1:
        raise call.bad(f"group is {groups}")
    return axes, groups


def _limited(call: Call, taps: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    if max(map(max, taps)) >= 1 << 31:
        raise call.bad("dilations reach further than any picture")
    return taps


def _pads(call: Call, axes: int) -> tuple[tuple[int, int], ...] | Literal["SAME_UPPER", "SAME_LOWER"]:
    rule = call.text("auto_pad", "NOTSET")
    if rule == "SAME_UPPER":
        return "SAME_UPPER"
    if rule == "SAME_LOWER":
        return "SAME_LOWER"
    if rule not in ("NOTSET", "VALID", ""):
        raise call.bad(f"auto_pad is {rule}")
    pads = (0,) * (2 * axes) if rule == "VALID" else call.ints("pads", 2 * axes, 0)
    if any(not 0 <= n < 1 << 31 for n in pads):
        raise call.bad(f"pads is {list(pads)}")
    return tuple(zip(pads[:axes], pads[axes:], strict=True))


def _numbered(values: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The place of each value among the different ones, and these in order."""
    different = tuple(sorted(set(values)))
    place = {value: number for number, value in enumerate(different)}
    return tuple(place[value] for value in values), different


def _gemm(call: Call) -> Found | None:
    if call.slot > 1:
        return None
    if len(call.shape) != 2:
        raise call.bad(f"its weight has the shape {list(call.shape)}")
    flipped = [call.whole("transA", 0) != 0, call.whole("transB", 0) != 0]
    left = call.slot == 0
    # A matrix on the left has its outputs in rows, one on the right in columns.
    steps: tuple[Step, ...] = (Transpose((1, 0)),) if flipped[call.slot] == left else ()
    outputs, inputs = call.shape[::-1] if steps else call.shape
    column = flipped[0] if not left else not flipped[1]
    return Found(
        "dense",
        (*steps, Reshape((outputs, inputs), (1, outputs, inputs))),
        (1, outputs, inputs),
        Vectors(column, scale=call.number("alpha", 1.0)),
        call.input(1 if left else 0),
        bias=2 if call.number("beta", 1.0) == 1 else 0,
        bias_shape=(outputs, 1) if left else (outputs,),
        bias_slot=BiasSlot(),
        added=not call.input(2),
    )


def _matmul(call: Call) -> Found | None:
    if call.slot > 1 or len(call.shape) < 2:
        return None
    left, lead = call.slot == 0, call.shape[:-2]
    last = len(lead)
    steps: tuple[Step, ...] = () if left else (Transpose((*range(last), last + 1, last)),)
    outputs, inputs = call.shape[-2:] if left else call.shape[:-3:-1]
    matrix = (math.prod(lead), outputs, inputs)
    return Found(
        "dense",
        (*steps, Reshape((*lead, outputs, inputs), matrix)),
        matrix,
        Vectors(left, lead),
        call.input(1 if left else 0),
        bias=0,
        bias_shape=(outputs, 1) if left else (outputs,),
        bias_slot=BiasSlot(),
        added=True,
    )


def _recurrent(gates: int) -> Rule:
    def rule(call: Call) -> Found | None:
        if call.slot not in (1, 2):
            return None
        direction = call.text("direction", "forward").lower()
        backward = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
        if backward is None:
            raise call.bad(f"direction is {direction}")
        shape, recurs = call.shape, call.slot == 2
        if len(shape) != 3 or shape[0] != len(backward) or shape[1] % gates:
            raise call.bad(f"its weight has the shape {list(shape)}")
        hidden = shape[1] // gates
        if (recurs and shape[2] != hidden) or call.whole("hidden_size", hidden) != hidden:
            raise call.bad(f"its weight has the shape {list(shape)}, which is not for {hidden} hidden values")
        states = States(backward, call.whole("layout", 0) == 1)
        return Found(
            "recurrent",
            (),
            (shape[0], shape[1], shape[2]),
            states if recurs else Vectors(),
            # The name of the states is given where the graph is known: it may have none.
            "" if recurs else call.input(0),
            bias=3,
            bias_shape=(shape[0], 2 * shape[1]),
            bias_slot=BiasSlot(start=shape[1] if recurs else 0, per_group=2 * shape[1]),
            initial=call.input(5) if recurs else "",
        )

    return rule


def _gather(call: Call) -> Found | None:
    if call.slot != 0 or len(call.shape) < 2 or call.whole("axis", 0) not in (0, -len(call.shape)):
        return None
    rows, width = call.shape[0], math.prod(call.shape[1:])
    steps = (Reshape(call.shape, (rows, width)), Transpose((1, 0)), Reshape((width, rows), (1, width, rows)))
    return Found(
        "embedding",
        steps,
        (1, width, rows),
        Indices(),
        call.input(1),
        bias=0,
        bias_shape=(),
        bias_slot=BiasSlot(),
    )


LINEAR: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _deconv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    **{name: _recurrent(gates) for name, gates in RECURRENT.items()},
    "Gather": _gather,
}
