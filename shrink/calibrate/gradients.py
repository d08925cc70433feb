"""Reverse-mode differentiation of an ONNX graph, as another ONNX graph.

The graph is walked backwards. Every operator on the way from a value of interest to an output gets the nodes that its
rule writes (see `_gradient_rules`), of the model's own opset, so that any ONNX runtime that runs the model runs those
too. Values of the weights are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shrink.calibrate._gradient_facts import known_facts
from shrink.calibrate._gradient_rules import RULES
from shrink.calibrate._gradient_tape import Facts, NoRule, Step, Tape
from shrink.errors import BadInput, MissingDependency

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

__all__ = ["differentiated"]

# TensorProto.DataType: float, float16, double, bfloat16.
_FLOATS = frozenset((1, 10, 11, 16))
_LEAST_OPSET = 7
# Their outputs are integers, which still stand for activations: what is before them has a gradient that we do not know.
_QUANTIZING = ("DynamicQuantizeLinear", "QuantizeLinear")


def differentiated(proto: ModelProto, at: Sequence[str]) -> tuple[ModelProto, frozenset[str]]:
    """Another model that also computes vector-Jacobian products.

    It has the same inputs and initializers, and for each output `y` one more input `cotangent:<y>` of the same type
    and shape; those of outputs that are not floating-point are not used. Its outputs are those of the model, then
    for every value in `at`: the value itself, where it is no output yet, and `gradient:<value>`, which is the sum
    over all outputs of (∂y/∂value)ᵀ · cotangent_y, in the value's shape.

    Values that get no gradient are returned as well: from these, a path to an output crosses an operator without a
    rule, or they are not floating-point. Paths over integers (shapes, indices) count as constant. At kinks (Relu at
    0, equal inputs of Max) the gradient is one of the subgradients.

    Raises:
        BadInput: the graph has no such value, its opset is below 7, or it has values named like the new ones.
        MissingDependency: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "onnx") from None
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < _LEAST_OPSET:
        raise BadInput(f"its opset is {opset}; operators are differentiated from opset {_LEAST_OPSET} on")
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    values = list(dict.fromkeys(at))
    names = set(_all_names(graph))
    given = _defined(graph)
    for value in values:
        if value not in given:
            raise BadInput("the graph has no such value", tensor=value)
    new = [f"cotangent:{o.name}" for o in graph.output] + [f"gradient:{v}" for v in values]
    for name in new:
        if name in names:
            raise BadInput("the graph has a value of this name already", tensor=name)

    facts = known_facts(proto)
    tape = Tape(facts, opset, names | set(new))
    gradients, blocked = _backward(graph, values, facts, tape)
    without = {v for v in values if v in blocked or not _is_float(facts, v)}

    outputs = list(graph.output)
    for output in outputs:
        info = graph.input.add()
        info.CopyFrom(output)
        info.name = f"cotangent:{output.name}"
    named = {o.name for o in outputs}
    infos = {i.name: i for i in (*graph.value_info, *graph.input)}
    for value in values:
        if value not in named:
            graph.output.append(_info(value, facts, infos.get(value)))
        if value in without:
            continue
        found = gradients[value] if value in gradients else tape.zeros(value)
        tape.nodes.append(onnx.helper.make_node("Identity", [found], [f"gradient:{value}"]))
        info = _info(value, facts, infos.get(value))
        info.name = f"gradient:{value}"
        graph.output.append(info)
    graph.node.extend(tape.constants)
    graph.node.extend(tape.nodes)
    return result, frozenset(without)


def _backward(
    graph: GraphProto, values: Sequence[str], facts: Facts, tape: Tape
) -> tuple[dict[str, str], frozenset[str]]:
    """The gradient of every value that has one, and the values whose gradient is not known."""
    active = _active(graph, values, facts)
    reaching = _reaching(graph)
    parts: dict[str, list[str]] = {}
    blocked: set[str] = set()
    for output in graph.output:
        if output.name in active:
            parts.setdefault(output.name, []).append(f"cotangent:{output.name}")
    totals: dict[str, str] = {}

    def total(value: str) -> str | None:
        if value in blocked or value not in parts:
            return None
        if value not in totals:
            first, *others = parts[value]
            for other in others:
                first = tape.add(first, other)
            totals[value] = first
        return totals[value]

    for node in reversed(graph.node):
        wanted = frozenset(i for i, name in enumerate(node.input) if name in active)
        captured = [name for name in _captured(node) if name in active]
        if not wanted and not captured:
            continue
        if any(o in blocked for o in node.output) or (
            node.op_type in _QUANTIZING and reaching.intersection(node.output)
        ):
            blocked.update(node.input[i] for i in wanted)
            blocked.update(captured)
            continue
        cotangents = tuple(total(o) for o in node.output)
        if not any(cotangents):
            continue
        blocked.update(captured)
        known = len(tape.nodes)
        try:
            found = _differentiate(tape, node, cotangents, wanted)
        except NoRule:
            del tape.nodes[known:]
            found = {}
        for position in wanted:
            name = node.input[position]
            if position not in found:
                blocked.add(name)
                continue
            gradient = found[position]
            if gradient is not None:
                parts.setdefault(name, []).append(gradient)
    known_of = {value: gradient for value in values if (gradient := total(value)) is not None}
    return known_of, frozenset(blocked)


def _differentiate(
    tape: Tape, node: NodeProto, cotangents: tuple[str | None, ...], wanted: frozenset[int]
) -> dict[int, str | None]:
    from onnx import helper

    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        raise NoRule
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    texts = {k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in attributes.items()}
    try:
        return rule(tape, Step(node.op_type, tuple(node.input), tuple(node.output), texts, cotangents, wanted))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # A malformed node, which no runtime takes: what that one says about it is what counts.
        raise NoRule from None


def _is_float(facts: Facts, value: str) -> bool:
    return facts.dtypes.get(value, 1) in _FLOATS


def _active(graph: GraphProto, values: Sequence[str], facts: Facts) -> set[str]:
    """The values that depend on one of `values` through floating-point numbers, those included."""
    active = {v for v in values if _is_float(facts, v)}
    for node in graph.node:
        if any(name in active for name in (*node.input, *_captured(node))):
            active.update(o for o in node.output if o and _is_float(facts, o))
    return active


def _reaching(graph: GraphProto) -> set[str]:
    """The values on which an output depends, in whatever way."""
    reaching = {o.name for o in graph.output}
    for node in reversed(graph.node):
        if any(o in reaching for o in node.output):
            reaching.update((*node.input, *_captured(node)))
    return reaching


def _captured(node: NodeProto) -> set[str]:
    """Names that inner graphs of a node (If, Loop) use; some are their own, which does no harm."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names.update(o.name for o in graph.output)
            for inner in graph.node:
                names.update(inner.input)
                names |= _captured(inner)
    return names


def _defined(graph: GraphProto) -> set[str]:
    names = {o for node in graph.node for o in node.output if o}
    return names | {i.name for i in graph.input} | {t.name for t in graph.initializer}


def _all_names(graph: GraphProto) -> Iterator[str]:
    yield from _defined(graph)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_names(inner)


def _info(value: str, facts: Facts, known: ValueInfoProto | None) -> ValueInfoProto:
    from onnx import ValueInfoProto, helper

    if known is not None and known.type.WhichOneof("value"):
        info = ValueInfoProto()
        info.CopyFrom(known)
        return info
    shape = facts.shapes.get(value)
    return helper.make_tensor_value_info(value, facts.dtypes.get(value, 1), None if shape is None else list(shape))
