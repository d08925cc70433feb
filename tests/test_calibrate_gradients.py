"""Gradients of ONNX graphs against finite differences: every rule, networks, random graphs, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shrink.calibrate._gradient_rules import RULES
from shrink.calibrate.gradients import differentiated
from shrink.errors import BadInput
from tests.gradients import (
    CASES,
    EPSILON,
    F32,
    Array,
    Case,
    Values,
    compare,
    cotangents,
    even,
    ints,
    made,
    run,
    session,
    weight,
)

value = helper.make_tensor_value_info


@pytest.mark.parametrize(
    ("one", "opset"), [pytest.param(c, o, id=f"{i}-{c.label}-{o}") for i, c in enumerate(CASES) for o in c.opsets]
)
def test_rule(one: Case, opset: int) -> None:
    model, inputs = one.model(opset)
    compare(model, inputs, list(inputs))


@pytest.mark.parametrize("one", [pytest.param(c, id=f"{i}-{c.label}") for i, c in enumerate(CASES)])
def test_rule_without_known_sizes(one: Case) -> None:
    opset = max(one.opsets)
    model, inputs = one.model(opset, dynamic=True)
    if opset >= 10:
        _, without = differentiated(model, list(inputs))
        assert bool(without) == (not one.dynamic)
    else:
        without = differentiated(model, list(inputs))[1]
    compare(model, inputs, list(inputs), without)


def test_every_rule_is_tried() -> None:
    assert {c.kind for c in CASES} | {"Cast", "CastLike", "Ceil", "Floor", "Round", "Sign"} == set(RULES)


class Net:
    """A graph written operator by operator; every method returns the name of what it computes."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: Values = {}

    def op(self, kind: str, *operands: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"{kind.lower()}{len(self.nodes)}" + "abc"[i] * (outputs > 1) for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(operands), names, **attributes))
        return names[0]

    def constant(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def weight(self, *shape: int) -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(fan)).astype(F32))

    def scale(self, count: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, count).astype(F32))

    def conv(self, a: str, into: int, outof: int, size: int = 3, stride: int = 1) -> str:
        pads = [size // 2] * 4
        return self.op(
            "Conv", a, self.weight(outof, into, size, size), self.weight(outof), pads=pads, strides=[stride] * 2
        )

    def norm(self, a: str, channels: int) -> str:
        kinds = [self.scale(channels), self.weight(channels), self.weight(channels), self.scale(channels)]
        return self.op("BatchNormalization", a, *kinds)

    def dense(self, a: str, into: int, outof: int) -> str:
        return self.op("Add", self.op("MatMul", a, self.weight(into, outof)), self.weight(outof))

    def model(self, inputs: Values, outputs: Sequence[str], opset: int, *, dynamic: bool = False) -> onnx.ModelProto:
        return made(self.nodes, inputs, self.weights, outputs, opset, dynamic=dynamic)


def inner_values(model: onnx.ModelProto) -> list[str]:
    return [o for node in model.graph.node for o in node.output if node.op_type not in ("Shape", "Constant")]


def check_inside(model: onnx.ModelProto, inputs: Values, at: Sequence[str]) -> None:
    """Gradients at inner values too: what is added there moves the outputs as they say, in a random direction."""
    found = compare(model, inputs, [*inputs, *at])
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        for i, name in enumerate(node.output):
            if name in at:
                copy.output[i] = f"{name}/before"
                nodes.append(helper.make_node("Add", [f"{name}/before", f"{name}/moved"], [name]))
                moved.graph.input.append(value(f"{name}/moved", TensorProto.FLOAT, list(found[name].shape)))
    del moved.graph.node[:]
    moved.graph.node.extend(nodes)
    engine, names = session(moved), [o.name for o in moved.graph.output]
    still = {f"{n}/moved": np.zeros_like(found[n]) for n in at}
    cotangent = cotangents(model, {n: found[n] for n in names})
    rng = np.random.default_rng(5)
    for name in at:
        gradient = found[f"gradient:{name}"]
        assert gradient.shape == found[name].shape
        direction = rng.standard_normal(gradient.shape).astype(F32)
        ends = []
        for sign in (1, -1):
            feeds = {**inputs, **still, f"{name}/moved": F32(sign * EPSILON) * direction}
            given = dict(zip(names, engine.run(None, feeds), strict=True))
            ends.append(sum(float((given[n].astype(float) * c).sum()) for n, c in cotangent.items()))
        size = float(np.linalg.norm(gradient) * np.linalg.norm(direction)) / np.sqrt(max(1, gradient.size))
        slope = (ends[0] - ends[1]) / (2 * EPSILON)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2, abs=1e-2 * size + 1e-3), name


def residual(opset: int) -> tuple[Net, Values, list[str]]:
    """Two residual blocks, one of them with squeeze and excitation, smooth activations, and a classifier."""
    net = Net()
    a = net.op("Tanh", net.norm(net.conv("x", 2, 4), 4))
    b = net.conv(net.op("Sigmoid", net.norm(net.conv(a, 4, 4), 4)), 4, 4)
    a = net.op("Add", a, b)
    squeezed = net.op("GlobalAveragePool", b)
    gate = net.conv(net.op("Tanh", net.conv(squeezed, 4, 2, size=1)), 2, 4, size=1)
    b = net.op("Mul", b, net.op("Sigmoid", gate))
    a = net.op("Softplus", net.op("Add", net.conv(a, 4, 4, size=1), b))
    a = net.op("AveragePool", a, kernel_shape=[2, 2], strides=[2, 2])
    flat = net.op("Flatten", a)
    y = net.op("Softmax", net.op("Gemm", flat, net.weight(5, 16), net.weight(5), transB=1))
    return net, {"x": even(2, 2, 4, 4)}, [y, a]


def unet(opset: int) -> tuple[Net, Values, list[str]]:
    net = Net(1)
    top = net.op("Tanh", net.conv("x", 1, 3))
    low = net.op("Tanh", net.conv(top, 3, 4, stride=2))
    deep = net.op("Sigmoid", net.conv(net.op("AveragePool", low, kernel_shape=[2, 2], strides=[2, 2]), 4, 4))
    up = net.op("ConvTranspose", deep, net.weight(4, 3, 4, 4), strides=[2, 2], pads=[1, 1, 1, 1])
    low = net.op("Tanh", net.conv(net.op("Concat", up, low, axis=1), 7, 3))
    if opset < 10:
        up = net.op("Upsample", low, net.constant(np.array([1, 1, 2, 2], F32)))
    else:
        up = net.op("Resize", low, *([""] if opset >= 11 else []), net.constant(np.array([1, 1, 2, 2], F32)))
    return net, {"x": even(1, 1, 8, 8)}, [net.conv(net.op("Concat", top, up, axis=1), 6, 2)]


def attention(opset: int) -> tuple[Net, Values, list[str]]:
    """A transformer block with two heads, shapes as exporters write them: taken from the input."""
    net = Net(2)
    q, k, v = (net.dense("x", 4, 4) for _ in range(3))
    heads = net.constant(np.array([0, 0, 2, 2], np.int64))
    q, v = (net.op("Transpose", net.op("Reshape", a, heads), perm=[0, 2, 1, 3]) for a in (q, v))
    k = net.op("Transpose", net.op("Reshape", k, heads), perm=[0, 2, 3, 1])
    scores = net.op("Softmax", net.op("Div", net.op("MatMul", q, k), net.constant(np.array(1.4, F32))), axis=3)
    mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    a = net.op("Add", "x", net.dense(net.op("Reshape", mixed, net.op("Shape", "x")), 4, 4))
    if opset >= 17:
        a = net.op("LayerNormalization", a, net.scale(4), net.weight(4))
    hidden = net.dense(a, 4, 6)
    half = net.constant(np.array(0.5, F32))
    gelu = net.op("Mul", net.op("Mul", hidden, half), net.op("Add", net.op("Erf", hidden), half))
    return net, {"x": even(2, 3, 4)}, [net.op("Add", a, net.dense(gelu, 6, 4))]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("network", "opset"),
    [
        (residual, 7),
        (residual, 11),
        (residual, 18),
        (unet, 9),
        (unet, 10),
        (unet, 13),
        (attention, 11),
        (attention, 17),
    ],
)
def test_networks(network: Callable[[int], tuple[Net, Values, list[str]]], opset: int, dynamic: bool) -> None:
    net, inputs, outputs = network(opset)
    model = net.model(inputs, outputs, opset, dynamic=dynamic)
    at = inner_values(model)
    if dynamic and opset < 13:
        # Sizes would have to be found when the graph runs, which older opsets cannot always do: what is left is right.
        _, without = differentiated(model, [*inputs, *at])
        compare(model, inputs, [*inputs, *at], without)
        return
    check_inside(model, inputs, at)


_SMOOTH = ("Tanh", "Sigmoid", "Softplus", "Sin", "Neg", "Erf", "Identity", "Softsign")
_STEPS = ("Add", "Mul", "Sub", "conv", "norm", "pool", "slice", "matmul", "softmax", "turn", "mean", "join", "reshape")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(_SMOOTH + _STEPS), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=9
    ),
    st.sampled_from((9, 11, 13, 18)),
    st.booleans(),
)
def test_random_graphs(steps: list[tuple[str, int, int]], opset: int, dynamic: bool) -> None:
    net = Net(3)
    pool = ["x"]
    for kind, first, second in steps:
        a, b = pool[first % len(pool)], pool[second % len(pool)]
        pool.append(_random_step(net, kind, a, b, opset))
    inputs = {"x": even(1, 4, 4, 4)}
    outputs = [net.op("Tanh", pool[-1]), net.op("Identity", pool[len(pool) // 2])]
    model = net.model(inputs, outputs, opset, dynamic=dynamic and opset >= 13)
    check_inside(model, inputs, inner_values(model))


def _random_step(net: Net, kind: str, a: str, b: str, opset: int) -> str:
    """A value of the shape 1, 4, 4, 4 from two of them; none grows much."""
    if kind == "conv":
        return net.conv(a, 4, 4)
    if kind == "norm":
        return net.norm(a, 4)
    if kind == "pool":
        small = net.op("AveragePool", a, kernel_shape=[2, 2], strides=[2, 2])
        return net.op("ConvTranspose", small, net.weight(4, 4, 2, 2), strides=[2, 2])
    if kind == "slice":
        if opset < 10:
            left, right = (net.op("Slice", v, axes=[2], starts=[i], ends=[i + 2]) for i, v in ((0, a), (1, b)))
        else:
            left, right = (net.op("Slice", v, *_ends(net, i)) for i, v in ((0, a), (1, b)))
        return net.op("Concat", left, right, axis=2)
    if kind == "matmul":
        return net.op("Tanh", net.op("MatMul", a, b))
    if kind == "softmax":
        return net.op("Softmax", a, axis=3)
    if kind == "turn":
        return net.op("Transpose", a, perm=[0, 1, 3, 2])
    if kind == "mean":
        if opset < 18:
            return net.op("Mul", a, net.op("ReduceMean", b, axes=[1]))
        return net.op("Mul", a, net.op("ReduceMean", b, net.constant(np.array([1], np.int64))))
    if kind == "join":
        return net.conv(net.op("Concat", a, b, axis=1), 8, 4, size=1)
    if kind == "reshape":
        flat = net.op("Reshape", a, net.constant(np.array([2, -1], np.int64)))
        return net.op("Reshape", flat, net.op("Shape", b))
    return net.op(kind, a, b) if kind in ("Add", "Mul", "Sub") else net.op(kind, a)


def _ends(net: Net, start: int) -> list[str]:
    return [net.constant(np.array([n], np.int64)) for n in (start, start + 2, 2)]


def graph_of(
    nodes: Sequence[onnx.NodeProto], inputs: Values, outputs: Sequence[str], opset: int = 17
) -> onnx.ModelProto:
    return made(nodes, inputs, {}, outputs, opset)


node = helper.make_node
A = {"x": even(2, 3)}


def test_values_behind_unknown_operators_are_left_out_wholly() -> None:
    """A gradient over the known path alone would be wrong."""
    nodes = [
        node("Tanh", ["x"], ["a"]),
        node("CumSum", ["a", "axis"], ["b"]),
        node("Sigmoid", ["a"], ["c"]),
        node("Mul", ["b", "c"], ["d"]),
        node("Exp", ["d"], ["y"]),
    ]
    model = made(nodes, A, {"axis": np.array(1, np.int64)}, ["y"], 17)
    found = compare(model, A, ["x", "a", "b", "c", "d"], frozenset("xa"))
    np.testing.assert_allclose(found["gradient:b"], found["gradient:d"] * found["c"], rtol=1e-5)
    np.testing.assert_allclose(found["gradient:c"], found["gradient:d"] * found["b"], rtol=1e-5)


def test_unknown_operators_before_and_beside_do_no_harm() -> None:
    nodes = [
        node("CumSum", ["x", "axis"], ["a"]),
        node("Tanh", ["a"], ["b"]),
        node("CumSum", ["b", "axis"], ["unused"]),
        node("ArgMax", ["b"], ["places"], axis=1),
        node("Cast", ["places"], ["factor"], to=TensorProto.FLOAT),
        node("Shape", ["b"], ["shape"]),
        node("Reshape", ["b", "shape"], ["c"]),
        node("Mul", ["c", "factor"], ["y"]),
    ]
    model = made(nodes, A, {"axis": np.array(1, np.int64)}, ["y", "places"], 17)
    result, without = differentiated(model, ["b", "places", "unused"])
    assert without == {"places"}
    outputs = run(model, A)
    found = run(result, {**A, "cotangent:y": np.ones((2, 3), F32), "cotangent:places": outputs["places"]})
    np.testing.assert_array_equal(found["gradient:b"], np.broadcast_to(outputs["places"], (2, 3)))
    np.testing.assert_array_equal(found["gradient:unused"], np.zeros((2, 3)))


def test_outputs_keep_their_order_and_appear_once() -> None:
    model = graph_of([node("Tanh", ["x"], ["a"]), node("Exp", ["a"], ["y"])], A, ["y", "a"])
    result, _ = differentiated(model, ["a", "x", "a"])
    assert [o.name for o in result.graph.output] == ["y", "a", "gradient:a", "x", "gradient:x"]
    assert [i.name for i in result.graph.input] == ["x", "cotangent:y", "cotangent:a"]
    compare(model, A, ["a", "x"])


def test_quantized_activations_have_no_gradient() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["a"]),
        node("DequantizeLinear", ["a", "scale", "zero"], ["b"]),
        node("Add", ["b", "x"], ["y"]),
    ]
    model = made(nodes, A, {"scale": np.array(0.1, F32), "zero": np.array(3, np.uint8)}, ["y"], 17)
    compare(model, A, ["x", "b"], frozenset("x"))


def test_inner_graphs_leave_out_what_they_use() -> None:
    branch = helper.make_graph([node("Tanh", ["a"], ["t"])], "then", [], [value("t", TensorProto.FLOAT, [2, 3])])
    other = helper.make_graph([node("Exp", ["x"], ["e"])], "else", [], [value("e", TensorProto.FLOAT, [2, 3])])
    nodes = [
        node("Sin", ["x"], ["a"]),
        node("If", ["yes"], ["b"], then_branch=branch, else_branch=other),
        node("Cos", ["b"], ["c"]),
        node("Cos", ["a"], ["d"]),
        node("Add", ["c", "d"], ["y"]),
    ]
    model = made(nodes, A, {"yes": np.array(True)}, ["y"], 17)
    compare(model, A, ["x", "a", "b", "c", "d"], frozenset("xa"))


def test_recurrent_layers_have_no_rule() -> None:
    sequence = {"x": even(3, 1, 2)}
    weights = {"w": weight(1, 16, 2), "r": weight(1, 16, 4)}
    nodes = [
        node("LSTM", ["x", "w", "r"], ["h", "last"], hidden_size=4),
        node("Squeeze", ["h", "one"], ["a"]),
        node("Tanh", ["a"], ["y"]),
    ]
    model = made(nodes, sequence, {**weights, "one": ints(1)}, ["y"], 17)
    compare(model, sequence, ["x", "h", "a"], frozenset("x"))


@pytest.mark.parametrize(
    "tied",
    [
        node("Max", ["x", "x"], ["y"]),
        node("Min", ["x", "x", "x"], ["y"]),
        node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[1, 2]),
        node("GlobalMaxPool", ["x"], ["y"]),
        node("ReduceMax", ["x"], ["y"], axes=[1]),
    ],
    ids=lambda n: n.op_type,
)
def test_gradients_at_ties_are_neither_lost_nor_doubled(tied: onnx.NodeProto) -> None:
    same = {"x": np.ones((1, 2, 3, 4), F32)}
    model = graph_of([tied], same, ["y"], 13)
    cotangent = cotangents(model, run(model, same))["y"]
    found = run(differentiated(model, ["x"])[0], {**same, "cotangent:y": cotangent})
    assert found["gradient:x"].sum() == pytest.approx(cotangent.sum(), rel=1e-4)


@pytest.mark.parametrize("kind", ["Floor", "Ceil", "Round", "Sign"])
def test_steps_count_as_constant(kind: str) -> None:
    compare(graph_of([node(kind, ["x"], ["a"]), node("Mul", ["a", "x"], ["y"])], A, ["y"]), A, ["x", "a"])


@pytest.mark.parametrize("target", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_casts_between_floats(target: int) -> None:
    nodes = [node("Cast", ["x"], ["a"], to=target), node("Mul", ["a", "a"], ["b"]), node("CastLike", ["b", "x"], ["y"])]
    model = graph_of(nodes, A, ["y"])
    result, without = differentiated(model, ["x", "a"])
    assert not without
    found = run(result, {**A, "cotangent:y": np.ones((2, 3), F32)})
    np.testing.assert_allclose(found["gradient:x"], 2 * A["x"], rtol=1e-2)
    assert found["gradient:a"].dtype == found["a"].dtype != F32


def test_weights_need_no_values() -> None:
    """As of a model whose weights lie in other files."""
    net, inputs, outputs = unet(13)
    model = net.model(inputs, outputs, 13)
    at = inner_values(model)
    expected, _ = differentiated(model, at)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if len(tensor.dims) != 1:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    result, without = differentiated(bare, at)
    assert not without
    assert list(result.graph.node) == list(expected.graph.node)
    assert list(result.graph.initializer) == list(bare.graph.initializer)


def test_gradient_by_a_bias() -> None:
    net = Net()
    net.dense("x", 3, 4)
    model = net.model(A, ["add1"], 13)
    result, without = differentiated(model, ["w1", "w0"])
    assert not without
    found = run(result, {**A, "cotangent:add1": np.ones((2, 4), F32)})
    np.testing.assert_array_equal(found["gradient:w1"], np.full(4, 2, F32))
    np.testing.assert_allclose(found["gradient:w0"], np.tile(A["x"].sum(0)[:, None], (1, 4)), rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "at", "opset", "said"),
    [
        (["x"], ["nothing"], 13, "no such value"),
        (["x"], ["x"], 6, "opset"),
        (["cotangent:y"], ["y"], 13, "already"),
        (["gradient:y"], ["y"], 13, "already"),
    ],
)
def test_requests_that_cannot_be_met(inputs: list[str], at: list[str], opset: int, said: str) -> None:
    infos = [value(name, TensorProto.FLOAT, [2]) for name in inputs]
    graph = helper.make_graph([node("Tanh", inputs, ["y"])], "graph", infos, [value("y", TensorProto.FLOAT, [2])])
    with pytest.raises(BadInput, match=said):
        differentiated(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), at)


@pytest.mark.parametrize(
    "wrong",
    [
        node("Concat", ["x", "x"], ["y"]),
        node("Concat", ["x", "x"], ["y"], axis=7),
        node("Conv", ["x"], ["y"]),
        node("Conv", ["x", "x"], ["y"], strides=[0, 0], kernel_shape=[3, 3]),
        node("Conv", ["x", "x"], ["y"], pads=[1], kernel_shape=[3, 3]),
        node("Conv", ["x", "x"], ["y"], kernel_shape=b"three"),
        node("MaxPool", ["x"], ["y"]),
        node("Transpose", ["x"], ["y"], perm="turned"),
        node("Mul", ["x"], ["y"]),
        node("Gemm", ["x"], ["y"]),
        node("Relu", [], ["y"]),
        node("Resize", ["x"], ["y"], mode="magic"),
        node("Softmax", ["x"], ["y"], axis="all"),
        node("DepthToSpace", ["x"], ["y"], blocksize=0, mode="CRD"),
        node("Split", ["x"], ["", ""]),
        node("Tanh", ["x"], []),
    ],
    ids=str,
)
def test_malformed_nodes_raise_nothing_else(wrong: onnx.NodeProto) -> None:
    for rank in (0, 1, 4):
        infos = [value(n, TensorProto.FLOAT, [2] * rank) for n in ("x", "y")]
        graph = helper.make_graph([wrong], "graph", infos[:1], infos[1:])
        for opset in (7, 13, 18):
            differentiated(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), ["x"])
