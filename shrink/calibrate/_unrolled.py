"""Recurrent nodes of an ONNX graph written out step by step, so that gradients can be taken inside them.

What the inputs give to the gates is one product for all steps; then each step adds what its state gives. A gate's
gradient by that sum is its gradient by either part, so that one value holds what is asked for of all steps. The
formulas are those of the operators' ONNX documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shrink.calibrate._gradient_facts import known_facts
from shrink.calibrate._gradient_tape import Facts, NoRule, Tape
from shrink.calibrate._linear import RECURRENT

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Gates", "unrolled"]

# Those of all nodes and directions together: a step and its gradients are some 36 nodes, and the time that ONNX Runtime
# takes to load them grows with their square, to half a minute.
_STEPS_AT_MOST = 512
_LEAST_OPSET = 7

Activation = Callable[[str], str]


@dataclass(frozen=True)
class Gates:
    """Values of the new graph whose gradients are those of a recurrent node's gates before their activations.

    `before` has one name for each direction, of a value (steps · N, gates · hidden); rows are of steps in the order of
    the sequence. `product` is empty but for a GRU with linear_before_reset: there it names what the states give to
    the last gate before the reset gate takes its share, (steps · N, hidden).
    """

    before: tuple[str, ...]
    product: tuple[str, ...] = ()


def unrolled(proto: ModelProto) -> tuple[ModelProto, Mapping[int, Gates]]:
    """The model with its LSTM, GRU and RNN nodes written out in plain operators, and their gates by the node's number.

    All else stays as it is, weights too: the new nodes read the tensors that the old ones did. Left alone are nodes
    whose sizes are not known from those of the graph's inputs, with sequences of different lengths, with `clip`, or
    with activations of other kinds than ONNX Runtime's usual ones; and the first ones where all take more than 512
    steps, of both directions.
    """
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < _LEAST_OPSET or not any(_is_recurrent(node) for node in proto.graph.node):
        return proto, {}
    tape = _Writer(known_facts(proto), opset, _names(proto))
    gates: dict[int, Gates] = {}
    # The last nodes first: no gradient comes to those before one that is left alone.
    left, few = _STEPS_AT_MOST, set()
    for number in range(len(proto.graph.node) - 1, -1, -1):
        node = proto.graph.node[number]
        if _is_recurrent(node):
            count = _step_count(tape.facts, node)
            if count <= left:
                few.add(number)
                left -= count
    for number, node in enumerate(proto.graph.node):
        known = len(tape.nodes)
        if number in few:
            try:
                gates[number] = _Node(tape, node).written()
                continue
            except (ArithmeticError, AttributeError, LookupError, NoRule, TypeError, ValueError):
                # Of a malformed node, too, ONNX Runtime says what is wrong with it.
                del tape.nodes[known:]
        tape.nodes.append(node)
    if not gates:
        return proto, {}
    made = type(proto)()
    made.CopyFrom(proto)
    del made.graph.node[:]
    made.graph.node.extend((*tape.constants, *tape.nodes))
    return made, gates


def _is_recurrent(node: NodeProto) -> bool:
    return node.op_type in RECURRENT and node.domain in ("", "ai.onnx")


def _step_count(facts: Facts, node: NodeProto) -> int:
    """The steps of all directions; more than there may be where they are not known."""
    dims = facts.shapes.get(node.input[0], ()) if node.input else ()
    first = any(a.name == "layout" and a.i == 1 for a in node.attribute)
    steps = dims[1 if first else 0] if len(dims) == 3 else None
    if not isinstance(steps, int) or not 0 < steps <= _STEPS_AT_MOST:
        return _STEPS_AT_MOST + 1
    return steps * (2 if any(a.name == "direction" and a.s.lower() == b"bidirectional" for a in node.attribute) else 1)


def _names(proto: ModelProto) -> set[str]:
    graph = proto.graph
    names = {item.name for part in (graph.input, graph.initializer, graph.value_info) for item in part}
    names.update(name for node in graph.node for name in (*node.input, *node.output))
    return names | {item.values.name for item in graph.sparse_initializer}


class _Writer(Tape):
    """A tape whose values are named after what they are for."""

    def fresh(self, kind: str) -> str:
        while True:
            self._count += 1
            name = f"unrolled/{kind}_{self._count}"
            if name not in self._taken:
                return name

    def named(self, value: str, name: str) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def each(self, value: str, count: int) -> list[str]:
        """The parts of a value along its first axis, without that axis."""
        return [self.squeezed(part, [0]) for part in self.divided(value, [1] * count, 0)]


@dataclass(frozen=True)
class _Direction:
    """What one direction works with, "" where something is not there.

    `x` are the products of the inputs with their weights and all biases, one for each step, (N, gates · hidden).
    `products` are, where the reset gate comes after the product, what each step begins this with, (N, hidden).
    """

    x: list[str]
    r: str
    h: str
    c: str
    peepholes: list[str]
    products: list[str]
    activations: list[Activation]


class _Node:
    """One recurrent node, as it is written out."""

    def __init__(self, tape: _Writer, node: NodeProto):
        from onnx import helper

        self._tape, self._node = tape, node
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._attributes: dict[str, Any] = {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}
        direction = str(self._attributes.get("direction", "forward")).lower()
        self._backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        self._batch_first = self._attributes.get("layout", 0) == 1
        self._gates = RECURRENT[node.op_type]
        x, r = tape.static(node.input[0]), tape.static(node.input[2])
        if x is None or r is None or len(x) != 3 or len(r) != 3 or 0 in x or self._attributes.get("clip"):
            raise NoRule
        batch, steps = x[:2] if self._batch_first else x[1::-1]
        self._steps, self._batch, self._width, self._hidden = int(steps), int(batch), int(x[2]), int(r[2])
        if r[:2] != (len(self._backward), self._gates * self._hidden):
            raise NoRule
        lengths = tape.content(self._input(4))
        if self._input(4) and (lengths is None or (lengths != self._steps).any()):
            raise NoRule

    def written(self) -> Gates:
        tape, sizes = self._tape, [self._batch] * self._steps
        before, product, states, ends, cells = [], [], [], [], []
        for at, backward in enumerate(self._backward):
            x, products = self._of_inputs(at)
            before.append(x)
            product += products[:1]
            direction = _Direction(
                tape.divided(x, sizes, 0),
                self._part(2, at),
                self._first(5, at),
                self._first(6, at) if self._node.op_type == "LSTM" else "",
                self._peepholes(at),
                tape.divided(products[0], sizes, 0) if products else [],
                self._activations(at),
            )
            found, last = self._run(direction, backward)
            ends.append(found[0] if backward else found[-1])
            cells.append(last)
            together = tape.op("Concat", *found, axis=0)
            states.append(tape.reshape(together, [self._steps, 1, self._batch, self._hidden]))
        self._put_out(states, ends, cells)
        return Gates(tuple(before), tuple(product))

    def _input(self, number: int) -> str:
        return self._node.input[number] if number < len(self._node.input) else ""

    def _part(self, number: int, direction: int) -> str:
        """What an input holds for one direction, "" where it is left out."""
        name = self._input(number)
        return self._tape.each(name, len(self._backward))[direction] if name else ""

    def _first(self, number: int, direction: int) -> str:
        """The initial states of one direction, (N, hidden)."""
        name = self._input(number)
        if name and self._batch_first:
            name = self._tape.op("Transpose", name, perm=[1, 0, 2])
        return self._tape.each(name, len(self._backward))[direction] if name else ""

    def _peepholes(self, direction: int) -> list[str]:
        name = self._part(7, direction) if self._node.op_type == "LSTM" else ""
        return self._tape.divided(name, [self._hidden] * 3, 0) if name else []

    def _of_inputs(self, direction: int) -> tuple[str, list[str]]:
        """What the inputs and the biases give to the gates, and, in a list, to the product of the states alone."""
        tape, hidden, width = self._tape, self._hidden, self._gates * self._hidden
        x = self._input(0)
        if self._batch_first:
            x = tape.op("Transpose", x, perm=[1, 0, 2])
        x = tape.reshape(x, [self._steps * self._batch, self._width])
        apart = self._node.op_type == "GRU" and self._attributes.get("linear_before_reset", 0) != 0
        bias = self._part(3, direction)
        own = tape.number(0, self._input(0))
        if bias:
            by_input, by_state = tape.divided(bias, [width, width], 0)
            if apart:
                shared, own = tape.divided(by_state, [2 * hidden, hidden], 0)
                gates, last = tape.divided(by_input, [2 * hidden, hidden], 0)
                bias = tape.op("Concat", tape.add(gates, shared), last, axis=0)
            else:
                bias = tape.add(by_input, by_state)
        total = tape.op("Gemm", x, self._part(1, direction), bias or own, transB=1)
        if not apart:
            return total, []
        # A value of its own for each step, to have a gradient for each.
        row = tape.reshape(own, [1, hidden] if bias else [1, 1])
        repeats = [self._steps * self._batch, 1 if bias else hidden]
        return total, [tape.op("Tile", row, tape.ints(repeats))]

    def _run(self, direction: _Direction, backward: bool) -> tuple[list[str], str]:
        """The states after each step, in the order of the sequence, and the last cell."""
        order: Sequence[int] = range(self._steps)
        h, c, found = direction.h, direction.c, [""] * self._steps
        # Whatever is the same in all steps is written once.
        r = [direction.r]
        if self._node.op_type == "GRU":
            r = self._tape.divided(direction.r, [2 * self._hidden, self._hidden], 0)
        for step in reversed(order) if backward else order:
            if self._node.op_type == "LSTM":
                h, c = self._lstm(direction, r[0], step, h, c)
            elif self._node.op_type == "GRU":
                h = self._gru(direction, r, step, h)
            else:
                h = direction.activations[0](self._with_state(direction.x[step], h, r[0]))
            found[step] = h
        return found, c

    def _with_state(self, x: str, h: str, r: str) -> str:
        """Before the first step there is no state, which is one of zeros."""
        return self._tape.op("Gemm", h, r, x, transB=1) if h else x

    def _lstm(self, direction: _Direction, r: str, step: int, h: str, c: str) -> tuple[str, str]:
        tape = self._tape
        opened, bounded, shown = direction.activations
        i, o, f, new = tape.divided(self._with_state(direction.x[step], h, r), [self._hidden] * 4, 1)
        watched = direction.peepholes
        if watched and c:
            i, f = tape.add(i, tape.mul(watched[0], c)), tape.add(f, tape.mul(watched[2], c))
        i = opened(i)
        after = tape.mul(i, bounded(new))
        if c:
            coupled = self._attributes.get("input_forget", 0) != 0
            f = tape.inverted(i, self._input(0)) if coupled else opened(f)
            after = tape.add(tape.mul(f, c), after)
        if watched:
            o = tape.add(o, tape.mul(watched[1], after))
        return tape.mul(opened(o), shown(after)), after

    def _gru(self, direction: _Direction, r: list[str], step: int, h: str) -> str:
        tape, hidden = self._tape, self._hidden
        opened, bounded = direction.activations
        both, new = tape.divided(direction.x[step], [2 * hidden, hidden], 1)
        update, reset = tape.divided(opened(self._with_state(both, h, r[0])), [hidden, hidden], 1)
        if direction.products:
            new = tape.add(new, tape.mul(reset, self._with_state(direction.products[step], h, r[1])))
        elif h:
            new = tape.op("Gemm", tape.mul(reset, h), r[1], new, transB=1)
        after = tape.mul(tape.inverted(update, self._input(0)), bounded(new))
        return tape.add(after, tape.mul(update, h)) if h else after

    def _activations(self, direction: int) -> list[Activation]:
        default = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
        usual = default[self._node.op_type]
        count = len(self._backward)
        given = [name.decode() for name in self._attributes.get("activations", ())] or usual * count
        if len(given) != len(usual) * count:
            raise NoRule
        # Numbers are taken in turn by those functions that have any.
        alphas = iter(self._attributes.get("activation_alpha", []))
        betas = iter(self._attributes.get("activation_beta", []))
        made = [_activation(self._tape, name.lower(), alphas, betas, self._input(0)) for name in given]
        return made[direction * len(usual) :][: len(usual)]

    def _put_out(self, states: list[str], ends: list[str], cells: list[str]) -> None:
        tape = self._tape
        names = [*self._node.output, "", "", ""]
        if names[0]:
            value = tape.op("Concat", *states, axis=1)
            tape.named(tape.op("Transpose", value, perm=[2, 0, 1, 3]) if self._batch_first else value, names[0])
        for name, each in zip(names[1:3], (ends, cells), strict=True):
            if name:
                axis = 1 if self._batch_first else 0
                tape.named(tape.op("Concat", *(tape.unsqueezed(end, [axis]) for end in each), axis=axis), name)


def _activation(tape: Tape, kind: str, alphas: Iterator[float], betas: Iterator[float], like: str) -> Activation:
    """As ONNX Runtime has it. Raises NoRule where it is none that is known here."""
    plain = {"relu": "Relu", "sigmoid": "Sigmoid", "softplus": "Softplus", "softsign": "Softsign", "tanh": "Tanh"}
    if kind in plain:
        return lambda x: tape.op(plain[kind], x)
    if kind in ("elu", "leakyrelu"):
        alpha = next(alphas, 1.0 if kind == "elu" else 0.01)
        return lambda x: tape.op("Elu" if kind == "elu" else "LeakyRelu", x, alpha=alpha)
    if kind == "hardsigmoid":
        steep, middle = next(alphas, 0.2), next(betas, 0.5)
        return lambda x: tape.op("HardSigmoid", x, alpha=steep, beta=middle)
    if kind == "affine":
        factor, shift = next(alphas, 1.0), next(betas, 0.0)
        return lambda x: tape.add(tape.scaled(x, factor, like), tape.number(shift, like))
    raise NoRule
