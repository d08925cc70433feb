"""What rules of differentiation write on: new nodes behind a graph, in the form that its opset asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["Dim", "Facts", "Gradients", "NoRule", "Shape", "Step", "Tape"]

# A number, the name of a number that is only known when the graph runs, or nothing at all.
Dim = int | str | None
Shape = tuple[Dim, ...]
# Position of an input -> its gradient, or None where that is zero. Inputs without an entry have no rule.
Gradients = dict[int, str | None]

_FLOAT, _INT64, _DOUBLE = 1, 7, 11
_TO_THE_END = (1 << 63) - 1


class NoRule(Exception):
    """An operator, this form of it, or this form in this opset, cannot be differentiated here."""


@dataclass(frozen=True)
class Facts:
    """What is known of values without running the graph: element types (TensorProto.DataType), shapes, contents."""

    dtypes: dict[str, int]
    shapes: dict[str, Shape]
    constants: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Step:
    """A node to be differentiated, with the gradients of its outputs; `wanted` are positions of inputs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    cotangents: tuple[str | None, ...]
    wanted: frozenset[int]

    @property
    def x(self) -> str:
        return self.inputs[0]

    @property
    def y(self) -> str:
        return self.outputs[0]

    @property
    def g(self) -> str:
        """The gradient of the first output. Raises NoRule where only others have one."""
        if self.cotangents[0] is None:
            raise NoRule
        return self.cotangents[0]

    def input(self, position: int) -> str | None:
        return self.inputs[position] or None if position < len(self.inputs) else None


class Tape:
    """Nodes written so far, and what is known of the graph before them.

    Values that methods take are names; those that they return are names of what new nodes compute.
    """

    def __init__(self, facts: Facts, opset: int, taken: set[str]):
        self.facts = facts
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: list[NodeProto] = []
        self._taken = taken
        self._known: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        self._count = 0

    # What is known.

    def shape(self, value: str) -> Shape:
        found = self.facts.shapes.get(value)
        if found is None:
            raise NoRule
        return found

    def rank(self, value: str) -> int:
        return len(self.shape(value))

    def static(self, value: str) -> tuple[int, ...] | None:
        """The shape, where every dim is a number."""
        dims = [d for d in self.facts.shapes.get(value, (None,)) if isinstance(d, int)]
        return tuple(dims) if value in self.facts.shapes and len(dims) == self.rank(value) else None

    def content(self, value: str | None) -> NDArray[Any] | None:
        return self.facts.constants.get(value) if value else None

    def integers(self, value: str | None) -> list[int]:
        """The content of a small constant. Raises NoRule where it is not known."""
        found = self.content(value)
        if found is None:
            raise NoRule
        return [int(n) for n in found.reshape(-1)]

    def dtype(self, value: str) -> int:
        return self.facts.dtypes.get(value, _FLOAT)

    def since(self, opset: int) -> None:
        if self.opset < opset:
            raise NoRule

    # Nodes.

    def fresh(self, kind: str) -> str:
        while True:
            self._count += 1
            name = f"gradient/{kind}_{self._count}"
            if name not in self._taken:
                return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        from onnx import helper

        names = [self.fresh(kind) for _ in range(outputs)]
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(kind, list(inputs), names, **given))
        return names

    def _constant(self, values: NDArray[Any], dtype: int) -> str:
        from onnx import helper

        key = (dtype, values.shape, values.tobytes())
        if key not in self._known:
            name = self.fresh("Constant")
            # Up to opset 8 constants are floating-point.
            cast = dtype == _INT64 and self.opset < 9
            made = self.fresh("Constant") if cast else name
            tensor = helper.make_tensor(made, _DOUBLE if cast else dtype, values.shape, values.reshape(-1).tolist())
            self.constants.append(helper.make_node("Constant", [], [made], value=tensor))
            if cast:
                self.constants.append(helper.make_node("Cast", [made], [name], to=dtype))
            self._known[key] = name
        return self._known[key]

    def ints(self, values: Sequence[int] | int) -> str:
        return self._constant(np.asarray(values, np.int64), _INT64)

    def number(self, value: float, like: str) -> str:
        """A scalar of the element type of `like`."""
        return self.floats(np.asarray(value), like)

    def floats(self, values: NDArray[Any], like: str) -> str:
        return self._constant(np.asarray(values, np.float64), self.dtype(like))

    def add(self, a: str, b: str) -> str:
        return self.op("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        return self.op("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.op("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        return self.op("Div", a, b)

    def scaled(self, a: str, factor: float, like: str) -> str:
        return a if factor == 1 else self.mul(a, self.number(factor, like))

    def above(self, a: str, b: str, like: str) -> str:
        """1 where a > b, 0 elsewhere, of the element type of `like`."""
        return self.op("Cast", self.op("Greater", a, b), to=self.dtype(like))

    def inverted(self, mask: str, like: str) -> str:
        return self.sub(self.number(1, like), mask)

    def product(self, *factors: str) -> str:
        total = factors[0]
        for factor in factors[1:]:
            total = self.mul(total, factor)
        return total

    # Shapes.

    def shape_of(self, value: str) -> str:
        dims = self.static(value)
        return self.op("Shape", value) if dims is None else self.ints(dims)

    def reshaped(self, g: str, like: str) -> str:
        return self.op("Reshape", g, self.shape_of(like))

    def reshape(self, g: str, dims: Sequence[int]) -> str:
        return self.op("Reshape", g, self.ints(list(dims)))

    def expanded(self, g: str, like: str) -> str:
        """`g`, which can be broadcast to the shape of `like`, in that shape."""
        if self.opset < 8:
            return self.add(g, self.zeros(like))
        return self.op("Expand", g, self.shape_of(like))

    def zeros(self, like: str) -> str:
        from onnx import helper

        if self.opset < 9:
            return self.mul(like, self.number(0, like))
        value = helper.make_tensor("value", self.dtype(like), [1], [0.0])
        return self.op("ConstantOfShape", self.shape_of(like), value=value)

    def unsqueezed(self, a: str, axes: Sequence[int]) -> str:
        """Axes count in the result, from 0."""
        if not axes:
            return a
        if self.opset < 13:
            return self.op("Unsqueeze", a, axes=list(axes))
        return self.op("Unsqueeze", a, self.ints(list(axes)))

    def squeezed(self, a: str, axes: Sequence[int]) -> str:
        if self.opset < 13:
            return self.op("Squeeze", a, axes=list(axes))
        return self.op("Squeeze", a, self.ints(list(axes)))

    def summed(self, a: str, axes: Sequence[int], *, keepdims: bool = True) -> str:
        if not axes:
            return a
        if self.opset < 13:
            return self.op("ReduceSum", a, axes=list(axes), keepdims=int(keepdims))
        return self.op("ReduceSum", a, self.ints(list(axes)), keepdims=int(keepdims))

    def mean(self, a: str, axes: Sequence[int]) -> str:
        if self.opset < 18:
            return self.op("ReduceMean", a, axes=list(axes), keepdims=1)
        return self.op("ReduceMean", a, self.ints(list(axes)), keepdims=1)

    def transposed(self, a: str, rank: int) -> str:
        """With its last two axes exchanged."""
        if rank < 2:
            raise NoRule
        return self.op("Transpose", a, perm=[*range(rank - 2), rank - 1, rank - 2])

    def part(self, a: str, axis: int, start: int, end: int | None) -> str:
        end = _TO_THE_END if end is None else end
        if self.opset < 10:
            return self.op("Slice", a, starts=[start], ends=[end], axes=[axis])
        return self.op("Slice", a, self.ints([start]), self.ints([end]), self.ints([axis]))

    def padded(self, a: str, pads: Sequence[int], like: str, value: float = 0.0) -> str:
        """All begins, then all ends."""
        if not any(pads):
            return a
        if self.opset < 11:
            return self.op("Pad", a, pads=list(pads), mode="constant", value=value)
        return self.op("Pad", a, self.ints(list(pads)), self.number(value, like), mode="constant")

    def divided(self, a: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Cut along an axis into parts of these sizes."""
        if len(sizes) == 1:
            return [a]
        if self.opset < 13:
            return self.ops("Split", len(sizes), a, axis=axis, split=list(sizes))
        return self.ops("Split", len(sizes), a, self.ints(list(sizes)), axis=axis)

    def size_ratio(self, many: str, few: str) -> str:
        """How many elements of `many` there are for one of `few`, as a scalar of their type."""
        a, b = self.static(many), self.static(few)
        if a is not None and b is not None and np.prod(b):
            return self.number(float(np.prod(a) / np.prod(b)), many)
        counts = [self.op("Cast", self.op("Size", value), to=self.dtype(many)) for value in (many, few)]
        return self.div(*counts)

    def summed_to(self, g: str, value: str, output: str) -> str:
        """`g`, of the shape of `output`, summed over the axes along which `value` was broadcast to that shape."""
        have, want = self.facts.shapes.get(output), self.facts.shapes.get(value)
        if have is None or want is None:
            return self.summed_when_run(g, value)
        lead = len(have) - len(want)
        axes = list(range(lead))
        for axis, (there, here) in enumerate(zip(have[lead:], want, strict=True), lead):
            if here == 1:
                if there != 1:
                    axes.append(axis)
            elif not isinstance(here, int) and (here is None or here != there):
                return self.summed_when_run(g, value)
        if not lead:
            return self.summed(g, axes)
        summed = self.summed(g, [a for a in axes if a >= lead])
        return self.summed(summed, list(range(lead)), keepdims=False)

    def summed_when_run(self, g: str, value: str) -> str:
        """As `summed_to`, over axes that are only found when the graph runs: those along which `value` has 1."""
        from onnx import helper

        self.since(13)
        ranks = [self.op("Shape", self.op("Shape", v)) for v in (g, value)]
        one = helper.make_tensor("value", _INT64, [1], [1])
        lead = self.op("ConstantOfShape", self.sub(*ranks), value=one)
        dims = self.op("Concat", lead, self.op("Shape", value), axis=0)
        axes = self.reshape(self.op("NonZero", self.op("Equal", dims, self.ints(1))), [-1])
        summed = self.op("ReduceSum", g, axes, keepdims=1, noop_with_empty_axes=1)
        return self.reshaped(summed, value)
