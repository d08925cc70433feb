"""What a norm says twice is moved into a layer: the network's outputs stay, and what does not fit is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402

from shrink.calibrate.folding import fold  # noqa: E402
from shrink.calibrate.layers import layers  # noqa: E402
from shrink.calibrate.running import Graph  # noqa: E402
from shrink.export import Network  # noqa: E402
from shrink.formats import onnx as onnx_format  # noqa: E402
from tests.gradients import made  # noqa: E402

Array = NDArray[Any]
node = helper.make_node


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


def norm(channels: int, seed: int = 1, name: str = "n") -> dict[str, Array]:
    """γ, β, μ and σ² of a batch norm."""
    gamma, beta, mean = (normal(channels, seed=seed + place) for place in range(3))
    variance = np.random.default_rng(seed).uniform(0.1, 3, channels).astype("f4")
    return {f"{name}/γ": gamma, f"{name}/β": beta, f"{name}/μ": mean, f"{name}/σ²": variance}


def batch_norm(x: str, y: str, name: str = "n", **attributes: Any) -> Any:
    parts = [f"{name}/{part}" for part in ("γ", "β", "μ", "σ²")]
    return node("BatchNormalization", [x, *parts], [y], **attributes)


@dataclass(frozen=True)
class Case:
    """`constant` are the tensors that become constants, `biases` those that become biases of layers, by the layer's."""

    name: str
    nodes: Sequence[Any]
    tensors: Mapping[str, Array]
    constant: Mapping[str, float]
    inputs: Mapping[str, Array] = field(default_factory=lambda: {"x": normal(2, 4, 6, 5)})
    biases: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[str] = ("y",)
    fixed: Sequence[str] = ()
    opset: int = 17

    def graph(self) -> tuple[Graph, list[Any]]:
        proto = made(self.nodes, dict(self.inputs), dict(self.tensors), self.outputs, self.opset)
        model = onnx_format.from_proto(proto, Path("model.onnx"))
        found = layers(model)
        network = Network("network", model, tuple(x.shape for x in self.inputs.values()))
        return Graph(network, found), found

    def outputs_of(self, graph: Graph) -> dict[str, Array]:
        types = {name: value.dtype for name, value in self.inputs.items()}
        return graph.program(types, graph.outputs).run(self.inputs)


ONE = 1 - np.float32(1e-5)
FOLDED = {"n/γ": 1.0, "n/μ": 0.0, "n/σ²": ONE}
W = normal(6, 4, 3, 3)
B = normal(6)
conv = node("Conv", ["x", "w"], ["c"])
flat = {"x": normal(3, 8)}
rows = {"x": normal(2, 5, 8)}
square = {"w": normal(8, 6), "b": normal(6)}
scale = {"γ": normal(8), "β": normal(8)}
steps = {"x": normal(5, 2, 8)}


def dense(x: str, y: str, w: str = "w", b: str = "b") -> list[Any]:
    return [node("MatMul", [x, w], [f"{y}_w"]), node("Add", [f"{y}_w", b], [y])]


def recurrent(operator: str, count: int, directions: int = 1, **attributes: Any) -> Case:
    shapes = {"w": (directions, 4 * count, 8), "r": (directions, 4 * count, 4), "b": (directions, 8 * count)}
    direction = "bidirectional" if directions == 2 else "forward"
    return Case(
        f"{operator} {directions} {attributes}",
        [node(operator, ["x", "w", "r", "b"], ["y"], hidden_size=4, direction=direction, **attributes)],
        {name: normal(*shape) for name, shape in shapes.items()},
        {},
        steps,
    )


CASES = [
    Case("conv", [conv, batch_norm("c", "y")], {"w": W, **norm(6)}, FOLDED, biases={"w": "n/β"}),
    Case(
        "conv with a bias",
        [node("Conv", ["x", "w", "b"], ["c"]), batch_norm("c", "y")],
        {"w": W, "b": B, **norm(6)},
        {**FOLDED, "b": 0.0},
        biases={"w": "n/β"},
    ),
    Case(
        "conv, bias behind it",
        [conv, node("Add", ["c", "b"], ["d"]), batch_norm("d", "y", epsilon=0.01)],
        {"w": W, "b": B.reshape(6, 1, 1), **norm(6)},
        {"n/γ": 1.0, "n/μ": 0.0, "n/σ²": 1 - np.float32(0.01), "b": 0.0},
        biases={"w": "n/β"},
    ),
    Case(
        "depthwise",
        [node("Conv", ["x", "w"], ["c"], group=4), batch_norm("c", "y")],
        {"w": normal(8, 1, 3, 3), **norm(8)},
        FOLDED,
        biases={"w": "n/β"},
    ),
    Case(
        "deconv in groups",
        [node("ConvTranspose", ["x", "w"], ["c"], group=2, strides=[2, 2]), batch_norm("c", "y")],
        {"w": normal(4, 3, 3, 3), **norm(6)},
        FOLDED,
        biases={"w": "n/β"},
    ),
    Case(
        "gemm",
        [node("Gemm", ["x", "w", "b"], ["c"], transB=1, alpha=0.5), batch_norm("c", "y")],
        {"w": normal(6, 8), "b": B, **norm(6)},
        {**FOLDED, "b": 0.0},
        flat,
        biases={"w": "n/β"},
    ),
    Case(
        "two in a row",
        [conv, batch_norm("c", "d"), batch_norm("d", "y", "m")],
        {"w": W, **norm(6), **norm(6, 7, "m")},
        {**FOLDED, "m/μ": 0.0, "m/σ²": ONE},
        biases={"w": "n/β"},
    ),
    Case(
        "nothing before it",
        [node("Relu", ["x"], ["c"]), batch_norm("c", "y")],
        norm(4),
        {"n/μ": 0.0, "n/σ²": ONE},
    ),
    Case(
        "a dead channel",
        [conv, batch_norm("c", "y")],
        {"w": W, **norm(6), "n/γ": (B * np.array([0, 1, 1, 1, 0, 1])).astype("f4")},
        FOLDED,
        biases={"w": "n/β"},
    ),
    Case(
        "layer norm, two layers behind it",
        [node("LayerNormalization", ["x", "γ", "β"], ["n"], axis=-1), *dense("n", "y"), *dense("n", "z", "v", "c")],
        {**square, "v": normal(8, 3), "c": normal(3), **scale},
        {"γ": 1.0, "β": 0.0},
        rows,
        outputs=("y", "z"),
    ),
    Case(
        "scale and shift before a Gemm",
        [node("Mul", ["γ", "x"], ["a"]), node("Add", ["β", "a"], ["n"]), node("Gemm", ["n", "w", "b"], ["y"])],
        {**square, **scale},
        {"γ": 1.0, "β": 0.0},
        flat,
    ),
    recurrent("LSTM", 4),
    recurrent("LSTM", 4, 2),
    recurrent("RNN", 1),
    recurrent("GRU", 3),
    recurrent("GRU", 3, 2, linear_before_reset=1),
]
LEFT = [
    Case("a tensor that is to stay", [conv, batch_norm("c", "y")], {"w": W, **norm(6)}, {}, fixed=["n/μ"]),
    Case(
        "one whose weight is to stay",
        [conv, batch_norm("c", "y")],
        {"w": W, **norm(6)},
        {"n/μ": 0.0, "n/σ²": ONE},
        fixed=["w"],
    ),
    Case(
        "used as well without the norm",
        [conv, batch_norm("c", "y"), node("Relu", ["c"], ["z"])],
        {"w": W, **norm(6)},
        {"n/μ": 0.0, "n/σ²": ONE},
        outputs=("y", "z"),
    ),
    Case(
        "put out without the norm",
        [conv, batch_norm("c", "y")],
        {"w": W, **norm(6)},
        {"n/μ": 0.0, "n/σ²": ONE},
        outputs=("y", "c"),
    ),
    Case(
        "a weight that two nodes use",
        [conv, batch_norm("c", "d"), node("Conv", ["x", "w"], ["e"]), node("Add", ["d", "e"], ["y"])],
        {"w": W, **norm(6)},
        {"n/μ": 0.0, "n/σ²": ONE},
    ),
    Case(
        "a norm that two nodes use",
        [conv, batch_norm("c", "y"), batch_norm("c", "z")],
        {"w": W, **norm(6)},
        {},
        outputs=("y", "z"),
    ),
    Case("γ is not finite", [conv, batch_norm("c", "y")], {"w": W, **norm(6), "n/γ": B + np.float32("inf")}, {}),
    Case(
        "the weight on the left, whose outputs are not channels",
        [node("Gemm", ["w", "x"], ["c"]), batch_norm("c", "y")],
        {"w": normal(6, 3), **norm(8)},
        {"n/μ": 0.0, "n/σ²": ONE},
        flat,
    ),
    Case(
        "stacked vectors, whose second axis is time",
        [node("MatMul", ["x", "w"], ["c"]), batch_norm("c", "y")],
        {"w": normal(8, 5), **norm(5)},
        {"n/μ": 0.0, "n/σ²": ONE},
        rows,
    ),
    Case(
        "numbers for every place and not for channels",
        [node("Conv", ["x", "w"], ["c"]), batch_norm("c", "y", spatial=0)],
        {"w": W, **{name: np.abs(normal(6, 4, 3, seed=place)) for place, name in enumerate(norm(6))}},
        {},
        opset=8,
    ),
    Case(
        "a tensor that is put out as well",
        [conv, batch_norm("c", "y")],
        {"w": W, **norm(6)},
        {},
        outputs=("y", "n/γ"),
    ),
    Case(
        "a layer norm that something else sees",
        [node("LayerNormalization", ["x", "γ", "β"], ["n"]), *dense("n", "y"), node("Relu", ["n"], ["z"])],
        {**square, **scale},
        {},
        rows,
        outputs=("y", "z"),
    ),
    Case(
        "a layer norm before a layer without bias",
        [node("LayerNormalization", ["x", "γ", "β"], ["n"]), node("MatMul", ["n", "w"], ["y"])],
        {"w": square["w"], **scale},
        {},
        rows,
    ),
    Case(
        "a layer norm before a convolution, whose edges see no β",
        [node("LayerNormalization", ["x", "γ", "β"], ["n"]), node("Conv", ["n", "w", "b"], ["y"], pads=[1, 1, 1, 1])],
        {"w": W, "b": B, "γ": normal(5), "β": normal(5)},
        {},
    ),
    Case(
        "a layer norm over two axes",
        [node("LayerNormalization", ["x", "γ", "β"], ["n"], axis=-2), *dense("n", "y")],
        {**square, "γ": normal(5, 8), "β": normal(5, 8)},
        {},
        rows,
    ),
]


@pytest.mark.parametrize("case", [*CASES, *LEFT], ids=lambda case: case.name)
def test_the_outputs_stay_and_constants_are_constant(case: Case) -> None:
    graph, found = case.graph()
    before, outputs = dict(graph.weights), case.outputs_of(graph)
    after, notes = fold(graph, found, frozenset(case.fixed))
    assert set(notes) == set(case.constant)
    for name, constant in case.constant.items():
        assert (graph.weights[name] == np.float32(constant)).all()
        assert (graph.weights[name].shape, graph.weights[name].dtype) == (before[name].shape, before[name].dtype)
        assert notes[name].startswith("moved into ")
    assert {layer.tensor: layer.bias for layer in after} == {
        layer.tensor: case.biases.get(layer.tensor, layer.bias) for layer in found
    }
    for name, values in case.outputs_of(graph).items():
        np.testing.assert_allclose(values, outputs[name], rtol=1e-4, atol=2e-5)
    if not case.constant and case not in CASES:
        assert all(graph.weights[name] is values for name, values in before.items())


@pytest.mark.parametrize("operator", ["LSTM", "RNN", "GRU"])
@pytest.mark.parametrize("after", [0, 1])
def test_one_of_two_biases_is_left(operator: str, after: int) -> None:
    count = {"LSTM": 4, "RNN": 1, "GRU": 3}[operator]
    attributes = {"linear_before_reset": after} if operator == "GRU" else {}
    case = recurrent(operator, count, **attributes)
    graph, found = case.graph()
    fold(graph, found, frozenset())
    second = graph.weights["b"][:, 4 * count :]
    kept = 4 if operator == "GRU" and after else 0
    assert not second[:, : second.shape[1] - kept].any()
    assert (second[:, second.shape[1] - kept :] == case.tensors["b"][:, 8 * count - kept :]).all()


def test_what_float32_cannot_hold_is_left() -> None:
    parts = {**norm(6), "n/γ": np.full(6, 3e38, "f4"), "n/σ²": np.full(6, 1e-3, "f4")}
    case = Case("", [conv, batch_norm("c", "y")], {"w": W, **parts}, {})
    graph, found = case.graph()
    before = dict(graph.weights)
    assert fold(graph, found, frozenset()) == (found, {})
    assert all(graph.weights[name] is values for name, values in before.items())
