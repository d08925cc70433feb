"""Recurrent nodes written out compute what ONNX Runtime's own do; the gradients of their gates are those they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shrink import given
from shrink.calibrate import sensitivity
from shrink.calibrate._linear import RECURRENT
from shrink.calibrate._unrolled import unrolled
from shrink.calibrate.gradients import differentiated
from shrink.calibrate.layers import Layer, layers
from shrink.calibrate.running import Graph
from shrink.export import Network

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tests.gradients import differences  # noqa: E402

Array = NDArray[Any]
Values = dict[str, Array]

STEPS, BATCH, WIDTH, HIDDEN = 5, 3, 4, 6
OPSETS = (7, 11, 13, 17)


def normal(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 2).astype(np.float32)


def recurrent(
    kind: str,
    *,
    opset: int = 17,
    direction: str = "forward",
    initial: bool = False,
    bias: bool = True,
    peepholes: bool = False,
    outputs: Sequence[str] = ("y", "y_h", "y_c"),
    lengths: Array | None = None,
    sizes: Sequence[int | str] = (STEPS, BATCH, WIDTH),
    batch: int = BATCH,
    attributes: Mapping[str, Any] | None = None,
) -> tuple[Any, Values]:
    """A model of one node whose inputs and weights are random, and what goes in."""
    count, gates = 2 if direction == "bidirectional" else 1, RECURRENT[kind]
    weights: Values = {
        "w": normal(count, gates * HIDDEN, WIDTH),
        "r": normal(count, gates * HIDDEN, HIDDEN),
        "b": normal(count, 2 * gates * HIDDEN) if bias else np.zeros(0, np.float32),
        "lengths": np.zeros(0, np.int32) if lengths is None else lengths,
        "h": normal(count, batch, HIDDEN) if initial else np.zeros(0, np.float32),
        "c": normal(count, batch, HIDDEN, seed=1) if initial and kind == "LSTM" else np.zeros(0, np.float32),
        "p": normal(count, 3 * HIDDEN) if peepholes else np.zeros(0, np.float32),
    }
    weights = {name: array for name, array in weights.items() if array.size}
    names = [name if name in weights else "" for name in ("w", "r", "b", "lengths", "h", "c", "p")]
    while not names[-1]:
        names.pop()
    made = [name for name in outputs if kind == "LSTM" or name != "y_c"]
    node = helper.make_node(kind, ["x", *names], made, direction=direction, hidden_size=HIDDEN, **attributes or {})
    graph = helper.make_graph(
        [node],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(sizes))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made if name],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model, {"x": normal(STEPS, BATCH, WIDTH, seed=2)}


def run(model: Any, feeds: Values) -> Values:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in model.graph.output], session.run(None, feeds), strict=True))


def check_same(model: Any, feeds: Values) -> Any:
    """Both models give the same, and the other one has no recurrent node and no weight of its own."""
    made, gates = unrolled(model)
    assert set(gates) == {0}
    assert not {node.op_type for node in made.graph.node} & set(RECURRENT)
    assert made.graph.initializer == model.graph.initializer
    found = run(made, feeds)
    for name, array in run(model, feeds).items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    return made


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("kind", "after"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
@pytest.mark.parametrize(("initial", "bias"), [(False, True), (True, True), (True, False), (False, False)])
def test_unrolled_gives_the_same(opset: int, direction: str, kind: str, after: int, initial: bool, bias: bool) -> None:
    attributes = {"linear_before_reset": after} if after else {}
    check_same(*recurrent(kind, opset=opset, direction=direction, initial=initial, bias=bias, attributes=attributes))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "activations", "alpha", "beta"),
    [
        ("LSTM", ["HardSigmoid", "Tanh", "Tanh"], [0.3], [0.4]),
        ("LSTM", ["HardSigmoid", "Relu", "Softsign"], [], []),
        ("LSTM", ["Sigmoid", "Elu", "LeakyRelu"], [0.7, 0.2], []),
        ("LSTM", ["HardSigmoid", "Affine", "Elu"], [0.3, 0.8, 0.5], [0.6, 0.1]),
        ("GRU", ["HardSigmoid", "Softplus"], [0.15], [0.45]),
        ("GRU", ["sigmoid", "relu"], [], []),
        ("RNN", ["Relu"], [], []),
        ("RNN", ["LeakyRelu"], [0.3], []),
        ("RNN", ["Affine"], [0.6], [0.2]),
    ],
)
def test_activations(kind: str, activations: list[str], alpha: list[float], beta: list[float], direction: str) -> None:
    count = 2 if direction == "bidirectional" else 1
    attributes: dict[str, Any] = {"activations": activations * count}
    if alpha:
        attributes["activation_alpha"] = alpha * count
    if beta:
        attributes["activation_beta"] = beta * count
    check_same(*recurrent(kind, direction=direction, attributes=attributes))


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"input_forget": 1}])
def test_peepholes_and_coupled_gates(initial: bool, attributes: dict[str, int]) -> None:
    check_same(*recurrent("LSTM", direction="bidirectional", peepholes=True, initial=initial, attributes=attributes))
    check_same(*recurrent("LSTM", initial=initial, attributes=attributes))


@pytest.mark.parametrize("outputs", [("y",), ("", "y_h"), ("", "", "y_c"), ("y", "", "y_c")])
def test_outputs_that_are_left_out(outputs: Sequence[str]) -> None:
    check_same(*recurrent("LSTM", outputs=outputs))


def test_lengths_that_are_all_the_whole_sequence() -> None:
    check_same(*recurrent("LSTM", lengths=np.full(BATCH, STEPS, np.int32)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
def test_batches_first(kind: str, direction: str) -> None:
    """ONNX Runtime does not run these: the same as with steps first, laid out anew."""
    plain, feeds = recurrent(kind, direction=direction, initial=True)
    other, _ = recurrent(kind, direction=direction, initial=True, attributes={"layout": 1}, sizes=(BATCH, STEPS, WIDTH))
    for tensor in other.graph.initializer:
        if tensor.name in ("h", "c"):
            moved = numpy_helper.to_array(tensor).swapaxes(0, 1)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(moved), tensor.name))
    made, gates = unrolled(other)
    assert set(gates) == {0}
    found = run(made, {"x": np.ascontiguousarray(feeds["x"].swapaxes(0, 1))})
    for name, array in run(plain, feeds).items():
        expected = array.transpose(2, 0, 1, 3) if name == "y" else array.swapaxes(0, 1)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "one",
    [
        recurrent("LSTM", attributes={"clip": 1.0}),
        recurrent("LSTM", lengths=np.array([STEPS, 2, 1], np.int32)),
        recurrent("LSTM", sizes=("steps", BATCH, WIDTH)),
        recurrent("GRU", sizes=(STEPS, "batch", WIDTH)),
        recurrent("RNN", sizes=(513, BATCH, WIDTH)),
        recurrent("RNN", direction="bidirectional", sizes=(257, BATCH, WIDTH)),
        recurrent("RNN", sizes=(0, BATCH, WIDTH)),
        recurrent("RNN", attributes={"activations": ["ThresholdedRelu"], "activation_alpha": [1.0]}),
        recurrent("LSTM", attributes={"activations": ["Sigmoid", "Tanh"]}),
        recurrent("LSTM", direction="sideways"),
        recurrent("GRU", sizes=(STEPS, BATCH)),
        recurrent("LSTM", opset=6),
    ],
    ids=lambda one: "",
)
def test_left_alone(one: tuple[Any, Values]) -> None:
    model, _ = one
    made, gates = unrolled(model)
    assert not gates
    assert made.graph.node == model.graph.node


def test_only_the_last_nodes_where_all_are_too_many() -> None:
    """Six of 100 steps, one behind the other."""
    model, _ = recurrent("RNN", sizes=(100, 1, HIDDEN), outputs=("y",))
    (node,) = model.graph.node
    del model.graph.node[:], model.graph.output[:]
    square = numpy_helper.from_array(normal(1, HIDDEN, HIDDEN), "w")
    model.graph.initializer[0].CopyFrom(square)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
    before = "x"
    for number in range(6):
        node.input[0], node.output[0] = before, f"y{number}"
        model.graph.node.append(node)
        before = f"x{number}"
        model.graph.node.append(helper.make_node("Squeeze", [f"y{number}", "one"], [before]))
    model.graph.output.append(helper.make_tensor_value_info(before, TensorProto.FLOAT, None))
    made, gates = unrolled(model)
    assert sorted(gates) == [2, 4, 6, 8, 10]
    feeds = {"x": normal(100, 1, HIDDEN)}
    np.testing.assert_allclose(run(made, feeds)[before], run(model, feeds)[before], rtol=0, atol=1e-5)


def network_of(model: Any, folder: Path, shape: Sequence[int]) -> Network:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    network, _ = given.network(str(path), None, (",".join(map(str, shape)),))
    return network


def moments(network: Network, found: Sequence[Layer], samples: Sequence[Values], probes: int = 1) -> dict[str, Array]:
    graph = Graph(network, found)
    peaks = dict.fromkeys(graph.outputs, 1.0)
    return sensitivity.by_gradients(graph, found, samples, peaks, probes=probes, seed=0, on_sample=lambda number: None)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("kind", "after"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
def test_gradients_of_gates(kind: str, after: int, direction: str) -> None:
    """With the inputs at each step they are the gradients by W, and by those of R where the states' product is named,
    as finite differences of ONNX Runtime's own operator tell them."""
    attributes = {"linear_before_reset": after} if after else {}
    model, feeds = recurrent(kind, direction=direction, attributes=attributes, outputs=("y", "y_h"))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made, gates = unrolled(model)
    names = [*gates[0].before, *gates[0].product]
    outputs = run(model, feeds)
    cotangent = {name: normal(*array.shape, seed=3) for name, array in outputs.items()}
    result, without = differentiated(made, names)
    assert not without
    found = run(result, {**feeds, **{f"cotangent:{name}": array for name, array in cotangent.items()}})
    # As inputs, weights can be moved.
    del model.graph.initializer[:]
    for name, array in weights.items():
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape))
    by_w, by_r = (differences(model, {**feeds, **weights}, name, cotangent) for name in "wr")
    x, y = feeds["x"].reshape(-1, WIDTH), outputs["y"]
    for at, name in enumerate(gates[0].before):
        np.testing.assert_allclose(found[f"gradient:{name}"].T @ x, by_w[at], rtol=1e-2, atol=5e-3)
    for at, name in enumerate(gates[0].product):
        backward = direction == "reverse" or at == 1
        before = np.concatenate([y[1:, at], 0 * y[:1, at]] if backward else [0 * y[:1, at], y[:-1, at]])
        product = found[f"gradient:{name}"].T @ before.reshape(-1, HIDDEN)
        np.testing.assert_allclose(product, by_r[at, -HIDDEN:], rtol=1e-2, atol=5e-3)
    assert bool(gates[0].product) == bool(after)


def squares(model: Any, tensor: str, feeds: Values) -> Array:
    """By each value of a weight: the mean square of the outputs' derivatives."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (slot,) = (t for t in copy.graph.initializer if t.name == tensor)
    weight = numpy_helper.to_array(slot)
    copy.graph.initializer.remove(slot)
    copy.graph.input.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, weight.shape))
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    found = np.zeros(weight.size)
    for number in range(weight.size):
        ends = []
        for move in (1e-2, -1e-2):
            moved = weight.reshape(-1).copy()
            moved[number] += move
            ends.append(session.run(None, {**feeds, tensor: moved.reshape(weight.shape)})[0].astype(np.float64))
        found[number] = np.mean(np.square((ends[0] - ends[1]) / 2e-2))
    return found.reshape(weight.shape)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_moments_of_inputs(kind: str, direction: str, tmp_path: Path) -> None:
    """Where the inputs of different steps have nothing in common, G's diagonal is what each row's errors cost; so it
    is for a layer before the recurrent one."""
    sizes = (WIDTH, 1, WIDTH)
    model, _ = recurrent(kind, direction=direction, sizes=sizes, outputs=("y",))
    feeds = {"x": np.eye(WIDTH, dtype=np.float32)[[2, 0, 3, 1]].reshape(sizes)}
    check_moments(model, feeds, ("w",), tmp_path)
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])
    node.input[0] = "before"
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node("MatMul", ["x", "first"], ["before"]), node])
    model.graph.initializer.append(numpy_helper.from_array(normal(WIDTH, WIDTH), "first"))
    check_moments(model, feeds, ("first",), tmp_path)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("kind", "after"), [("LSTM", 0), ("GRU", 1), ("RNN", 0)])
def test_moments_of_states(kind: str, after: int, direction: str, tmp_path: Path) -> None:
    attributes = {"linear_before_reset": after} if after else {}
    options: dict[str, Any] = {"direction": direction, "attributes": attributes, "outputs": ("y",), "initial": True}
    model, _ = recurrent(kind, sizes=(1, 1, WIDTH), batch=1, **options)
    # A state of length 1.
    (slot,) = (t for t in model.graph.initializer if t.name == "h")
    state = numpy_helper.to_array(slot)
    slot.CopyFrom(numpy_helper.from_array(state / np.linalg.norm(state, axis=2, keepdims=True), "h"))
    check_moments(model, {"x": normal(1, 1, WIDTH)}, ("r",), tmp_path)


def check_moments(model: Any, feeds: Values, tensors: Sequence[str], folder: Path) -> None:
    network = network_of(model, folder, feeds["x"].shape)
    found = [layer for layer in layers(network.model) if layer.tensor in tensors]
    assert len(found) == len(tensors)
    moment = moments(network, found, [feeds], probes=600)
    for layer in found:
        expected = layer.matrix(squares(model, layer.tensor, feeds).astype(np.float32)).sum(axis=2)
        diagonal = np.einsum("goo->go", moment[layer.tensor])
        assert diagonal.shape == (layer.groups, layer.outputs)
        np.testing.assert_allclose(diagonal, expected, rtol=0.25, atol=0.02 * expected.max())


def test_what_has_no_gradients_is_left_out(tmp_path: Path) -> None:
    """Nor has what is before it, but what is behind it has."""
    model, feeds = recurrent("LSTM", outputs=("y",), attributes={"clip": 0.9})
    (node,) = model.graph.node
    node.input[0] = "before"
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["before"]),
        node,
        helper.make_node("MatMul", ["y", "l"], ["z"]),
    ]
    copies = [onnx.NodeProto.FromString(one.SerializeToString()) for one in nodes]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(copies)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    for name, array in (("first", normal(WIDTH, WIDTH)), ("l", normal(HIDDEN, WIDTH))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    network = network_of(model, tmp_path, feeds["x"].shape)
    found = layers(network.model)
    assert {layer.tensor for layer in found} == {"first", "w", "r", "l"}
    assert set(moments(network, found, [feeds])) == {"l"}
