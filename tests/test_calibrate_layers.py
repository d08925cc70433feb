"""Layers as matrices: ONNX Runtime computes what matrix @ inputs gives; second moments are those of brute force."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink.calibrate.covariance import Covariance
from shrink.calibrate.layers import Layer, exposed, layers
from shrink.errors import BadInput, UsageError
from shrink.formats import chainer_npz
from shrink.formats import onnx as onnx_format
from shrink.model import Model, Tensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Array = NDArray[Any]

HERE = Path("model.onnx")


def assert_close(a: Array, b: Array) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def made(
    nodes: list[Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tensors: dict[str, Array],
    *,
    opset: int = 17,
    integers: Sequence[str] = (),
) -> Any:
    """A model of these nodes; inputs and outputs may have any shape."""

    def info(name: str) -> Any:
        kind = TensorProto.INT64 if name in integers else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, None)

    values = [numpy_helper.from_array(v, n) for n, v in tensors.items()]
    graph = helper.make_graph(nodes, "network", [info(n) for n in inputs], [info(n) for n in outputs], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def read(proto: Any) -> Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return onnx_format.from_proto(copy, HERE)


def found(proto: Any) -> list[Layer]:
    """The layers, and for each what has to hold of all of them."""
    model = read(proto)
    result = layers(model)
    for layer in result:
        w = model[layer.tensor].array
        matrix = layer.matrix(w)
        assert matrix.shape == (layer.groups, layer.outputs, layer.inputs)
        assert matrix.flags.c_contiguous
        back = layer.weight(matrix)
        assert (back.dtype, back.shape, back.tobytes()) == (w.dtype, w.shape, w.tobytes())
        extra = layer.extra()
        assert not matrix[extra].any()
        assert (~extra).sum() == w.size
        # What is written where there is no weight does not come back.
        noisy = matrix.copy()
        noisy[extra] = 7
        assert layer.weight(noisy).tobytes() == w.tobytes()
        rows = layer.bias_rows()
        assert rows.shape == (layer.groups, layer.outputs)
    return result


def run(proto: Any, feeds: dict[str, Array], outputs: list[str] | None = None) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = outputs or [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def inputs_of(layer: Layer, values: dict[str, Array], use: int = 0) -> Array:
    """All rows of inputs, (groups, positions, inputs)."""
    this = layer.uses[use]
    rows = this.reads.rows(values[this.input], layer.groups, layer.inputs, values.get(this.initial))
    out = np.full((layer.groups, rows.count, layer.inputs), np.nan, np.float32)
    rows.write(np.arange(rows.count), out)
    return out


def results(layer: Layer, w: Array, values: dict[str, Array]) -> Array:
    """(groups, positions, outputs)."""
    product: Array = inputs_of(layer, values) @ layer.matrix(w).swapaxes(1, 2)
    return product


# --- every operator, against ONNX Runtime ------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    x: tuple[int, ...]
    w: tuple[int, ...]
    attributes: dict[str, Any]

    def check(self, *, bias: bool) -> None:
        w, b, x = random(*self.w), random(self.w[0], seed=1), random(*self.x)
        node = helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["y"], **self.attributes)
        proto = made([node], ["x"], ["y"], {"w": w, **({"b": b} if bias else {})})
        (layer,) = found(proto)
        assert (layer.kind, layer.tensor, layer.input, layer.output) == ("conv", "w", "x", "y")
        assert layer.bias == ("b" if bias else None)
        y = run(proto, {"x": x})["y"]
        rows = results(layer, w, {"x": x})
        if bias:
            rows = rows + b[layer.bias_rows()][:, None]
        spatial = y.shape[2:]
        pixels = rows.transpose(1, 0, 2).reshape(len(x), *spatial, -1)
        assert_close(np.moveaxis(pixels, -1, 1), y)


CONVS = [
    Conv((2, 3, 9, 8), (4, 3, 3, 3), {}),
    Conv((1, 3, 9, 8), (4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    Conv((1, 4, 11, 12), (6, 2, 3, 3), {"group": 2, "dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    Conv((2, 6, 7, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    Conv((1, 3, 5, 5), (6, 1, 1, 1), {"group": 3}),
    Conv((1, 5, 4, 4), (7, 5, 1, 1), {"strides": [2, 2]}),
    Conv((1, 2, 9, 10), (3, 2, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    Conv((1, 2, 9, 10), (3, 2, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    Conv((1, 2, 9, 9), (3, 2, 4, 4), {"auto_pad": "VALID", "kernel_shape": [4, 4]}),
    Conv((3, 2, 17), (5, 2, 4), {"strides": [3], "pads": [2, 1]}),
    Conv((1, 2, 5, 6, 7), (4, 1, 2, 3, 2), {"group": 2, "strides": [1, 2, 2], "pads": [1, 0, 0, 1, 1, 1]}),
]


@pytest.mark.parametrize("case", CONVS, ids=lambda c: f"{list(c.w)} {c.attributes}")
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(case: Conv, bias: bool) -> None:
    case.check(bias=bias)


@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))
    few = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    groups, kernel, strides, dilations = data.draw(st.integers(1, 3)), *(data.draw(few) for _ in range(3))
    per_group, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    sizes = [(k - 1) * d + 1 + data.draw(st.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    attributes = {"group": groups, "strides": strides, "dilations": dilations, "pads": pads}
    x, w = (2, groups * channels, *sizes), (groups * per_group, channels, *kernel)
    Conv(x, w, attributes).check(bias=data.draw(st.booleans()))


@dataclass(frozen=True)
class Deconv:
    x: tuple[int, ...]
    w: tuple[int, ...]
    attributes: dict[str, Any]

    def check(self, *, bias: bool) -> Layer:
        w, x = random(*self.w), random(*self.x)
        axes, groups = len(self.w) - 2, self.attributes.get("group", 1)
        strides = self.attributes.get("strides", [1] * axes)
        dilations = self.attributes.get("dilations", [1] * axes)
        channels = groups * self.w[1]
        b = random(channels, seed=1) if bias else np.zeros(channels, np.float32)
        node = helper.make_node("ConvTranspose", ["x", "w", *(["b"] if bias else [])], ["y"], **self.attributes)
        proto = made([node], ["x"], ["y"], {"w": w, **({"b": b} if bias else {})})
        (layer,) = found(proto)
        assert (layer.kind, layer.bias) == ("deconv", "b" if bias else None)
        y = run(proto, {"x": x})["y"]
        rows = results(layer, w, {"x": x})
        # The full output, block by block: (N, blocks…, groups, channels, phases…).
        taps = [[i * d // s for i in range(k)] for k, d, s in zip(self.w[2:], dilations, strides, strict=True)]
        phases = [sorted({i * d % s for i in range(k)}) for k, d, s in zip(self.w[2:], dilations, strides, strict=True)]
        blocks = [n + max(axis) for n, axis in zip(self.x[2:], taps, strict=True)]
        grid = rows.transpose(1, 0, 2).reshape(len(x), *blocks, channels, *map(len, phases))
        assert (layer.bias_rows() == np.arange(channels).repeat(math.prod(map(len, phases))).reshape(groups, -1)).all()
        full = np.zeros((len(x), channels, *(s * n + 64 for s, n in zip(strides, blocks, strict=True))), np.float32)
        for phase in np.ndindex(*map(len, phases)):
            at = [slice(phases[a][i], phases[a][i] + strides[a] * blocks[a], strides[a]) for a, i in enumerate(phase)]
            where = (slice(None), slice(None), *at)
            chosen = (..., *phase)
            full[where] = np.moveaxis(grid[chosen], -1, 1)
        begin = self.attributes.get("pads", [0] * 2 * axes)[:axes]
        crop = (slice(None), slice(None), *(slice(b, b + n) for b, n in zip(begin, y.shape[2:], strict=True)))
        assert_close(full[crop] + b.reshape(-1, *[1] * axes), y)
        return layer


DECONVS = [
    Deconv((2, 3, 5, 4), (3, 4, 3, 3), {}),
    Deconv((1, 3, 5, 4), (3, 2, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Deconv((1, 3, 5, 4), (3, 2, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    Deconv((1, 4, 5, 4), (4, 3, 2, 2), {"strides": [2, 2], "group": 2}),
    Deconv((1, 4, 3, 3), (4, 1, 5, 4), {"strides": [3, 2], "group": 4, "pads": [2, 0, 1, 3]}),
    Deconv((1, 2, 4, 4), (2, 3, 2, 2), {"strides": [4, 3]}),
    Deconv((1, 2, 4, 4), (2, 3, 3, 3), {"strides": [2, 2], "dilations": [2, 3]}),
    Deconv((1, 2, 4, 4), (2, 3, 3, 2), {"strides": [3, 1], "dilations": [2, 2], "output_padding": [2, 0]}),
    Deconv((2, 3, 6), (3, 2, 5), {"strides": [2], "pads": [2, 1]}),
    Deconv((1, 2, 3, 2, 3), (2, 1, 2, 3, 2), {"strides": [2, 2, 1], "group": 2}),
]


@pytest.mark.parametrize("case", DECONVS, ids=lambda c: f"{list(c.w)} {c.attributes}")
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_convolutions(case: Deconv, bias: bool) -> None:
    case.check(bias=bias)


@given(st.data())
def test_any_transposed_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))
    few = st.lists(st.integers(1, 4), min_size=axes, max_size=axes)
    groups, kernel, strides, sizes = data.draw(st.integers(1, 3)), *(data.draw(few) for _ in range(3))
    dilations = data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    channels, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    attributes = {"group": groups, "strides": strides, "dilations": dilations}
    x, w = (2, groups * channels, *sizes), (groups * channels, per_group, *kernel)
    layer = Deconv(x, w, attributes).check(bias=data.draw(st.booleans()))
    if set(dilations) == {1}:
        # No more than a kernel padded to a multiple of the stride.
        padded = math.prod(-(-k // s) * min(s, k) for k, s in zip(kernel, strides, strict=True))
        assert layer.outputs * layer.inputs == per_group * channels * padded


def test_a_stride_that_does_not_divide_the_kernel_leaves_zeros() -> None:
    layer = Deconv((1, 2, 4, 4), (2, 3, 3, 3), {"strides": [2, 2]}).check(bias=False)
    assert (layer.outputs, layer.inputs) == (3 * 4, 2 * 4)
    assert layer.extra().sum() == 2 * 3 * (16 - 9)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("bias", [None, "matched", "other"])
def test_gemm(trans_a: int, trans_b: int, alpha: float, left: bool, bias: str | None) -> None:
    m, k, n = 5, 4, 3
    a, b = random(*((k, m) if trans_a else (m, k))), random(*((n, k) if trans_b else (k, n)), seed=1)
    w, x = (a, b) if left else (b, a)
    shape = (m, 1) if left == (bias == "matched") else (n,)
    c = random(*shape, seed=2)
    node = helper.make_node(
        "Gemm",
        [*(["w", "x"] if left else ["x", "w"]), *(["c"] if bias else [])],
        ["y"],
        transA=trans_a,
        transB=trans_b,
        alpha=alpha,
    )
    proto = made([node], ["x"], ["y"], {"w": w, **({"c": c} if bias else {})})
    (layer,) = [layer for layer in found(proto) if layer.tensor == "w"]
    assert layer.bias == ("c" if bias == "matched" else None)
    rows = results(layer, w, {"x": x})[0]
    if layer.bias:
        rows = rows + c.reshape(-1)[layer.bias_rows()[0]]
    y = run(proto, {"x": x})["y"] - (c if bias == "other" else 0)
    assert_close(rows.T if left else rows, y)


def test_a_bias_that_gemm_scales_is_none_of_its_own() -> None:
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], beta=0.5)
    (layer,) = found(made([node], ["x"], ["y"], {"w": random(4, 3), "c": random(3)}))
    assert layer.bias is None


@pytest.mark.parametrize(
    ("x", "w", "left"),
    [
        ((5, 4), (4, 3), False),
        ((4,), (4, 3), False),
        ((2, 7, 5, 4), (4, 3), False),
        ((4, 5), (3, 4), True),
        ((4,), (3, 4), True),
        ((2, 4, 5), (3, 4), True),
        ((6, 5, 4), (6, 4, 3), False),
        ((2, 6, 5, 4), (6, 4, 3), False),
        ((5, 4), (6, 4, 3), False),
        ((2, 1, 5, 4), (2, 3, 4, 3), False),
        ((7, 2, 5, 4), (2, 1, 1, 4, 3), False),
        ((2, 4, 5), (2, 3, 4), True),
    ],
)
def test_matmul(x: tuple[int, ...], w: tuple[int, ...], left: bool) -> None:
    weight, value = random(*w), random(*x)
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"])
    proto = made([node], ["x"], ["y"], {"w": weight})
    (layer,) = found(proto)
    assert layer.groups == math.prod(w[:-2])
    y = run(proto, {"x": value})["y"]
    rows = results(layer, weight, {"x": value})
    # One position after the other, by brute force: the groups are the leading axes of the weight.
    if left and len(x) > 1:
        y = y.swapaxes(-1, -2)
    elif len(x) == 1:
        y = y[..., None, :]
    lead = [1] * (y.ndim - len(w)) + list(w[:-2])
    order = [a for a, n in enumerate(lead) if n > 1] + [a for a, n in enumerate(lead) if n == 1]
    y = y.transpose(*order, y.ndim - 2, y.ndim - 1).reshape(layer.groups, -1, layer.outputs)
    assert_close(rows, y)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (1,), (5, 3), (5, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_a_bias_added_behind_a_product(shape: tuple[int, ...], first: bool) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["b", "h"] if first else ["h", "b"], ["y"]),
    ]
    (layer,) = found(made(nodes, ["x"], ["y"], {"w": random(4, 3), "b": random(*shape)}))
    assert layer.bias == ("b" if shape[-1:] == (3,) and shape[0] != 5 else None)


@pytest.mark.parametrize(
    ("shape", "own"), [((4, 1, 1), True), ((1, 4, 1, 1), True), ((4,), False), ((1, 4, 5, 4), False)]
)
def test_a_bias_added_behind_a_convolution(shape: tuple[int, ...], own: bool) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    (layer,) = found(made(nodes, ["x"], ["y"], {"w": random(4, 2, 3, 3), "b": random(*shape)}))
    assert layer.bias == ("b" if own else None)


def test_a_bias_that_others_use_too_is_no_layers_own() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["i"]),
        helper.make_node("Mul", ["i", "b"], ["y"]),
    ]
    tensors = {"w": random(4, 3), "b": random(3)}
    assert found(made(nodes, ["x"], ["y"], tensors))[0].bias is None
    # Nor is one that is added to only one of the values that the product goes to.
    assert found(made(nodes[:2], ["x"], ["i", "h"], tensors))[0].bias is None
    assert found(made(nodes[:2], ["x"], ["i"], tensors))[0].bias == "b"


# --- recurrent layers --------------------------------------------------------------------------------------------

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def lstm(wx: Array, recurrent: Array, first: Array, cell: Array, *, backward: bool) -> tuple[Array, Array]:
    """One direction, by hand: (steps, N, 4 · hidden) of W x + b -> states before each step, and after it."""
    h, before, after = first, [np.zeros(0)] * len(wx), [np.zeros(0)] * len(wx)
    for t in reversed(range(len(wx))) if backward else range(len(wx)):
        before[t] = h
        i, o, f, c = np.split(wx[t] + h @ recurrent.T, 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(c)
        h = sigmoid(o) * np.tanh(cell)
        after[t] = h
    return np.stack(before), np.stack(after)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_lstm(direction: str, initial: bool, named: bool) -> None:
    steps, batch, features, hidden = 5, 2, 3, 4
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    directions = len(backward)
    w, r = random(directions, 4 * hidden, features), random(directions, 4 * hidden, hidden, seed=1)
    b, x = random(directions, 8 * hidden, seed=2), random(steps, batch, features, seed=3)
    h0, c0 = random(directions, batch, hidden, seed=4), np.zeros((directions, batch, hidden), np.float32)
    node = helper.make_node(
        "LSTM",
        ["x", "w", "r", "b", "", *(["h0"] if initial else [])],
        ["states" if named else "", "last"],
        direction=direction,
        hidden_size=hidden,
    )
    proto = made([node], ["x", *(["h0"] if initial else [])], ["last"], {"w": w, "r": r, "b": b})
    first, second = found(proto)
    assert [(one.tensor, one.kind, one.groups, one.bias) for one in (first, second)] == [
        ("w", "recurrent", directions, "b"),
        ("r", "recurrent", directions, "b"),
    ]
    assert first.needs == ("x",)
    assert second.needs == (second.input, *(["h0"] if initial else []))
    assert (second.input == "states") == named
    feeds = {"x": x, **({"h0": h0} if initial else {})}
    values = run(exposed(proto, [first, second]), feeds)
    np.testing.assert_array_equal(values["last"], run(proto, feeds)["last"])
    assert list(proto.graph.node[0].output) == ["states" if named else "", "last"]
    # W x + its bias + that of R, per direction, as the rows and the bias rows have it.
    wx = results(first, w, values)
    for one in (first, second):
        wx = wx + b.reshape(-1)[one.bias_rows()][:, None]
    seen = inputs_of(second, values)
    for d in range(directions):
        h = h0[d] if initial else np.zeros((batch, hidden), np.float32)
        before, after = lstm(wx[d].reshape(steps, batch, -1), r[d], h, c0[d], backward=backward[d])
        assert_close(values[second.input][:, d], after)
        assert_close(seen[d], before.reshape(-1, hidden))


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_recurrent_layers(kind: str) -> None:
    gates, hidden = GATES[kind], 4
    tensors = {"w": random(1, gates * hidden, 3), "r": random(1, gates * hidden, hidden)}
    proto = made([helper.make_node(kind, ["x", "w", "r"], ["y"], hidden_size=hidden)], ["x"], ["y"], tensors)
    first, second = found(proto)
    assert (first.outputs, first.inputs, second.outputs, second.inputs) == (gates * hidden, 3, gates * hidden, hidden)
    values = run(exposed(proto, [first, second]), {"x": random(6, 2, 3)})
    states = values["y"][:, 0]
    expected = np.concatenate([np.zeros((1, 2, hidden), np.float32), states[:-1]]).reshape(-1, hidden)
    np.testing.assert_array_equal(inputs_of(second, values)[0], expected)


def test_states_with_the_batch_first() -> None:
    """Not an LSTM of ONNX Runtime, which has no batch first: its states, laid out so, give the same rows."""
    tensors = {"w": random(2, 16, 3), "r": random(2, 16, 4)}
    steps_first, batch_first = (
        found(
            made(
                [
                    helper.make_node(
                        "LSTM",
                        ["x", "w", "r", "", "", "h"],
                        ["y"],
                        hidden_size=4,
                        layout=layout,
                        direction="bidirectional",
                    )
                ],
                ["x", "h"],
                ["y"],
                tensors,
            )
        )[1]
        for layout in (0, 1)
    )
    y, h = random(5, 2, 3, 4), random(2, 3, 4)
    a, b = Covariance(steps_first), Covariance(batch_first)
    a.add(y, initial=h)
    b.add(y.transpose(2, 0, 1, 3), initial=h.transpose(1, 0, 2))
    assert_close(a.matrix, b.matrix)
    assert a.matrix.any()


# --- embeddings, weights laid out anew, shared weights -----------------------------------------------------------


def test_embedding() -> None:
    table, x = random(7, 3, 2), np.array([[0, 3, 3], [-1, 6, 0]])
    proto = made([helper.make_node("Gather", ["table", "x"], ["y"])], ["x"], ["y"], {"table": table}, integers=["x"])
    (layer,) = found(proto)
    assert (layer.kind, layer.diagonal, layer.outputs, layer.inputs) == ("embedding", True, 6, 7)
    y = run(proto, {"x": x})["y"]
    np.testing.assert_array_equal(results(layer, table, {"x": x})[0], y.reshape(6, 6))
    covariance = Covariance(layer)
    covariance.add(x)
    np.testing.assert_allclose(covariance.matrix, np.array([[2, 0, 0, 2, 0, 0, 2]]) / 6)
    np.testing.assert_allclose(covariance.mean, covariance.matrix)
    for wrong in (np.array([7]), np.array([-8]), np.array([0.5])):
        with pytest.raises(BadInput, match="table"):
            Covariance(layer).add(wrong)


def test_weights_laid_out_anew() -> None:
    w = random(6, 4).astype(np.float16)
    nodes = [
        helper.make_node("Identity", ["w"], ["i"]),
        helper.make_node("Transpose", ["i"], ["t"]),
        helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["h"]),
        helper.make_node("Reshape", ["k", "dims"], ["k4"]),
        helper.make_node("Conv", ["z", "k4"], ["y"]),
    ]
    k, dims = random(5, 6), np.array([0, 2, -1, 1])
    proto = made(nodes, ["x", "z"], ["h", "y"], {"w": w, "k": k, "dims": dims})
    dense, conv = found(proto)
    x, z = random(3, 4), random(1, 2, 5, 4)
    values = run(proto, {"x": x, "z": z})
    np.testing.assert_allclose(results(dense, w.astype(np.float32), {"x": x})[0], values["h"], rtol=1e-3, atol=1e-3)
    assert (conv.shape, conv.inputs) == ((5, 6), 6)
    rows = results(conv, k, {"z": z})[0].reshape(3, 4, 5).transpose(2, 0, 1)[None]
    assert_close(rows, values["y"])


def test_shared_weights_sum_over_their_uses() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["y"], strides=[2, 2]),
    ]
    proto = made(nodes, ["x"], ["y"], {"w": random(3, 3, 3, 3)})
    (layer,) = found(proto)
    assert (layer.shared, layer.input, layer.output) == (True, "x", "a")
    assert [(use.input, use.output) for use in layer.uses] == [("x", "a"), ("b", "y")]
    x = random(1, 3, 6, 6)
    values = {"x": x, **run(exposed(proto, [layer]), {"x": x})}
    covariance = Covariance(layer)
    covariance.collect(values)
    rows = np.concatenate([inputs_of(layer, values, use) for use in (0, 1)], axis=1)[0]
    assert covariance.count == len(rows) == 36 + 4
    assert_close(covariance.matrix[0], rows.T @ rows / len(rows))


def test_a_table_that_is_also_the_last_layer_is_a_dense_layer() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["h"]),
        helper.make_node("Transpose", ["table"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    (layer,) = found(made(nodes, ["x"], ["y"], {"table": random(9, 4)}, integers=["x"]))
    assert (layer.kind, layer.shared, layer.input, len(layer.uses)) == ("dense", True, "h", 1)


@pytest.mark.parametrize(
    ("nodes", "shared"),
    [
        ([("MatMul", ["x", "w"], ["y"])], False),
        ([("MatMul", ["x", "w"], ["h"]), ("Add", ["h", "w"], ["y"])], True),
        ([("Identity", ["w"], ["v"]), ("MatMul", ["x", "v"], ["h"]), ("Add", ["h", "v"], ["y"])], True),
    ],
)
def test_whether_a_weight_is_used_otherwise(nodes: list[Any], shared: bool) -> None:
    (layer,) = found(made([helper.make_node(*n) for n in nodes], ["x"], ["y"], {"w": random(4, 4)}))
    assert layer.shared is shared


def test_a_weight_that_an_inner_graph_uses_is_shared() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["out"])],
        "inner",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["which"], ["i"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["h", "i"], ["y"]),
    ]
    assert [one.shared for one in found(made(nodes, ["x", "which"], ["y"], {"w": random(4, 4)}))] == [True]


@pytest.mark.parametrize(
    "nodes",
    [
        [("MatMul", ["w", "w"], ["y"])],
        [("MatMul", ["v", "w"], ["y"])],
        [("Add", ["x", "w"], ["y"])],
        [("Gather", ["w", "x"], ["y"], "", "", "", {"axis": 1})],
        [("Conv", ["w", "x"], ["y"])],
    ],
)
def test_what_is_no_layer(nodes: list[Any]) -> None:
    made_of = [helper.make_node(*n[:3], **(n[6] if len(n) > 3 else {})) for n in nodes]
    assert found(made(made_of, ["x"], ["y"], {"w": random(4, 4), "v": random(4, 4)})) == []


def test_layers_come_in_the_order_of_the_graph() -> None:
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{9 - i}"], [f"v{i + 1}"]) for i in range(10)]
    proto = made(nodes, ["v0"], ["v10"], {f"w{i}": random(3, 3) for i in range(10)})
    assert [layer.tensor for layer in found(proto)] == [f"w{9 - i}" for i in range(10)]


def test_values_that_are_inputs_or_constants_can_be_put_out_too() -> None:
    tensors = {"w": random(1, 16, 3), "r": random(1, 16, 4), "h0": random(1, 2, 4)}
    node = helper.make_node("LSTM", ["x", "w", "r", "", "", "h0"], ["", "", "cell"], hidden_size=4)
    proto = made([node], ["x"], ["cell"], tensors)
    both = found(proto)
    values = run(exposed(proto, both), {"x": random(5, 2, 3)})
    np.testing.assert_array_equal(values["x"], random(5, 2, 3))
    np.testing.assert_array_equal(values["h0"], tensors["h0"])
    for layer in both:
        covariance = Covariance(layer)
        covariance.collect(values)
        assert covariance.count == 10
    with pytest.raises(BadInput, match="r: the value"):
        Covariance(both[1]).collect({"x": values["x"]})
    with pytest.raises(BadInput, match="not the one"):
        exposed(made([helper.make_node("Relu", ["x"], ["y"])], ["x"], ["y"], {}), both)


# --- second moments ----------------------------------------------------------------------------------------------


def layer_of(node: Any, w: Array) -> Layer:
    (layer,) = found(made([node], ["x"], ["y"], {"w": w}))
    return layer


def conv(*shape: int, **attributes: Any) -> Layer:
    return layer_of(helper.make_node("Conv", ["x", "w"], ["y"], **attributes), random(*shape))


def dense(outputs: int, inputs: int) -> Layer:
    return layer_of(helper.make_node("MatMul", ["x", "w"], ["y"]), random(inputs, outputs))


def brute_force(layer: Layer, samples: Sequence[Array]) -> tuple[Array, Array]:
    rows = np.concatenate([inputs_of(layer, {"x": x}) for x in samples], axis=1).astype(np.float64)
    return rows.swapaxes(1, 2) @ rows / rows.shape[1], rows.mean(axis=1)


@given(st.data())
def test_second_moments_are_those_of_brute_force(data: st.DataObject) -> None:
    groups, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    w = random(groups, channels, *kernel)
    kind = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    if kind == "ConvTranspose":
        w = random(groups * channels, 2, *kernel)
    strides = data.draw(st.lists(st.integers(1, 3), min_size=len(kernel), max_size=len(kernel)))
    layer = layer_of(helper.make_node(kind, ["x", "w"], ["y"], group=groups, strides=strides), w)
    covariance, samples = Covariance(layer), []
    for number in range(data.draw(st.integers(1, 3))):
        sizes = data.draw(st.lists(st.integers(3, 7), min_size=len(kernel), max_size=len(kernel)))
        samples.append(random(data.draw(st.integers(1, 2)), groups * channels, *sizes, seed=number) + 0.5)
        covariance.add(samples[-1])
        # Asked for in between or at the end, it is the same.
        if data.draw(st.booleans()):
            assert_close(covariance.matrix, brute_force(layer, samples)[0])
    matrix, mean = brute_force(layer, samples)
    assert_close(covariance.matrix, matrix)
    assert_close(covariance.mean, mean)
    np.testing.assert_array_equal(covariance.matrix, covariance.matrix.swapaxes(1, 2))


@pytest.mark.parametrize(("inputs", "rows", "dtype"), [(2100, 1, "f8"), (2100, 30, "f8"), (4200, 3, "f4")])
def test_wide_layers(inputs: int, rows: int, dtype: str) -> None:
    """Of several blocks of columns; of sums in float32."""
    covariance = Covariance(dense(2, inputs))
    x = random(rows, inputs)
    covariance.add(x)
    assert covariance.matrix.dtype == dtype
    np.testing.assert_allclose(covariance.matrix[0], x.T @ x / rows, rtol=1e-3, atol=1e-5)
    covariance.add(x)
    np.testing.assert_allclose(covariance.matrix[0], x.T @ x / rows, rtol=1e-3, atol=1e-5)


def test_the_widest_layers_have_only_a_diagonal() -> None:
    covariance, x = Covariance(dense(1, 20_000)), random(70, 20_000)
    covariance.add(x)
    assert covariance.layer.diagonal
    assert_close(covariance.matrix, (x.astype(np.float64) ** 2).mean(axis=0)[None])
    assert not dense(1, 16_384).diagonal


def test_many_positions_are_sampled_evenly() -> None:
    layer = conv(1, 2, 3, 3, pads=[1, 1, 1, 1])
    rng = np.random.default_rng(0)
    # Brighter from left to right and from top to bottom: what is looked at unevenly shows.
    ramp = np.linspace(0, 1, 160, dtype=np.float32)
    x = (ramp[:, None] * ramp + 0.02 * rng.standard_normal((1, 2, 160, 160))).astype(np.float32)
    matrix, mean = brute_force(layer, [x])
    some = Covariance(layer, positions_at_most=4000, seed=1)
    some.add(x)
    assert some.count == 160 * 160
    np.testing.assert_allclose(some.matrix, matrix, rtol=0.03)
    np.testing.assert_allclose(some.mean, mean, rtol=0.01)
    again, other = (Covariance(layer, positions_at_most=4000, seed=seed) for seed in (1, 2))
    for covariance in (again, other):
        covariance.add(x)
    np.testing.assert_array_equal(some.matrix, again.matrix)
    assert (some.matrix != other.matrix).any()
    # A large sample counts as much as its positions, however few of them are looked at.
    small = x[:, :, :50, :50] + 3
    some.add(small)
    np.testing.assert_allclose(some.matrix, brute_force(layer, [x, small])[0], rtol=0.03)


def test_memory_does_not_grow_with_the_patches() -> None:
    layer = conv(1, 64, 3, 3)
    x = random(4, 64, 162, 162)
    assert 4 * 160 * 160 * 576 * 4 > 230e6
    covariance = Covariance(layer, positions_at_most=1 << 30)
    tracemalloc.start()
    try:
        covariance.add(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert covariance.count == 4 * 160 * 160
    assert peak < 130e6


def test_nothing_added_gives_zeros() -> None:
    covariance = Covariance(dense(2, 3))
    covariance.add(np.zeros((0, 3), np.float32))
    assert covariance.count == 0
    assert not covariance.matrix.any()
    assert not covariance.mean.any()
    assert covariance.matrix.shape == (1, 3, 3)
    with pytest.raises(ValueError, match="read-only"):
        covariance.matrix[0, 0, 0] = 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    x = random(4, 3)
    x[1, 1], x[2, 1] = value, -value
    with pytest.raises(BadInput, match=r"w: .*not finite"):
        Covariance(dense(2, 3)).add(x)


def test_values_whose_squares_are_not_finite_are_refused() -> None:
    covariance = Covariance(dense(2, 3))
    covariance.add(np.full((4, 3), 1e30, np.float32))
    with pytest.raises(BadInput, match=r"w: .*too large"):
        _ = covariance.matrix


# --- what is malformed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (conv(2, 3, 3, 3), (1, 4, 9, 9)),
        (conv(2, 3, 3, 3), (1, 3, 9)),
        (conv(2, 3, 3, 3), (1, 3, 9, 2)),
        (conv(2, 3, 3, 3), ()),
        (conv(2, 3, 3, 3, pads=[1 << 30] * 4), (1, 3, 9, 9)),
        (conv(2, 3, 3, 3, dilations=[1 << 29] * 2), (1, 3, 9, 9)),
        (conv(4, 1, 3, 3, group=2), (1, 4, 9, 9)),
        (dense(2, 3), (5, 4)),
        (dense(2, 3), ()),
        (dense(2, 3), (4,)),
        (layer_of(helper.make_node("MatMul", ["w", "x"], ["y"]), random(2, 3)), (4, 5)),
        (layer_of(helper.make_node("MatMul", ["x", "w"], ["y"]), random(2, 3, 4)), (3, 5, 3)),
        (layer_of(helper.make_node("ConvTranspose", ["x", "w"], ["y"]), random(2, 3, 4)), (1, 3, 5)),
        (
            layer_of(helper.make_node("ConvTranspose", ["x", "w"], ["y"], dilations=[1 << 29]), random(2, 3, 2)),
            (1, 2, 5),
        ),
    ],
)
def test_values_of_another_shape_are_refused(layer: Layer, x: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"tensor w: its inputs are \["):
        Covariance(layer).add(np.zeros(x, np.float32))


@pytest.mark.parametrize(("y", "h"), [((5, 1, 2, 3), None), ((5, 2, 2, 4), None), ((5, 1, 2, 4), (1, 1, 4))])
def test_states_of_another_shape_are_refused(y: tuple[int, ...], h: tuple[int, ...] | None) -> None:
    tensors = {"w": random(1, 16, 3), "r": random(1, 16, 4)}
    _, layer = found(made([helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)], ["x"], ["y"], tensors))
    with pytest.raises(BadInput, match=r"tensor r: its .*states are"):
        Covariance(layer).add(np.zeros(y, np.float32), initial=None if h is None else np.zeros(h, np.float32))


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "said"),
    [
        ("Conv", (4, 3), {}, "shape"),
        ("Conv", (4, 3, 3, 3), {"group": 3}, "groups"),
        ("Conv", (4, 3, 3, 3), {"group": 0}, "group is 0"),
        ("Conv", (4, 3, 3, 3), {"strides": [1]}, "strides"),
        ("Conv", (4, 3, 3, 3), {"strides": [0, 1]}, "strides"),
        ("Conv", (4, 3, 3, 3), {"strides": [1 << 40, 1]}, "strides"),
        ("Conv", (4, 3, 3, 3), {"dilations": [-1, 1]}, "dilations"),
        ("Conv", (4, 3, 3, 3), {"dilations": [1 << 30, 1]}, "dilations"),
        ("Conv", (4, 3, 3, 3), {"pads": [-1, 0, 0, 0]}, "pads"),
        ("Conv", (4, 3, 3, 3), {"pads": [1, 1]}, "pads"),
        ("Conv", (4, 3, 3, 3), {"pads": 1}, "another type"),
        ("Conv", (4, 3, 3, 3), {"auto_pad": "BOTH\nSIDES"}, "auto_pad is BOTH"),
        ("Conv", (4, 3, 3, 3), {"kernel_shape": [3, 5]}, "kernel_shape"),
        ("ConvTranspose", (4, 3, 3, 3), {"group": 3}, "groups"),
        ("ConvTranspose", (4, 3, 3, 3), {"strides": [2, 2, 2]}, "strides"),
        ("ConvTranspose", (4, 3), {}, "shape"),
        ("Gemm", (4, 3, 2), {}, "shape"),
        ("LSTM", (1, 7, 3), {}, "shape"),
        ("LSTM", (2, 8, 3), {}, "shape"),
        ("LSTM", (1, 8, 3), {"hidden_size": 3}, "hidden"),
        ("LSTM", (1, 8, 3), {"direction": "up"}, "direction is up"),
        ("Transpose", (4, 3), {"perm": [0, 0]}, "perm"),
    ],
)
def test_graphs_that_do_not_fit_their_weights(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], said: str
) -> None:
    inputs = ["w"] if op == "Transpose" else ["x", "w"]
    proto = made([helper.make_node(op, inputs, ["y"], **attributes)], ["x"], ["y"], {"w": random(*shape)})
    with pytest.raises(BadInput, match=rf"model\.onnx: tensor w: .*{said}") as caught:
        layers(read(proto))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dims", [[5, -1], [-1, -1], [0, 0, 2], [-2, 6], [1 << 40, 12]])
def test_reshapes_that_do_not_fit(dims: list[int]) -> None:
    nodes = [helper.make_node("Reshape", ["w", "dims"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    with pytest.raises(BadInput, match="tensor w: the Reshape"):
        layers(read(made(nodes, ["x"], ["y"], {"w": random(3, 4), "dims": np.array(dims)})))


def test_a_kernel_that_strides_tear_apart_is_no_layer() -> None:
    """Its matrix would be almost empty, and far larger than the weight."""
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[97], dilations=[10_007])
    assert found(made([node], ["x"], ["y"], {"w": random(1, 1, 5000)})) == []


def test_a_stride_far_larger_than_the_kernel_makes_no_large_matrix() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[1 << 30, 1 << 30])
    assert [(one.outputs, one.inputs) for one in found(made([node], ["x"], ["y"], {"w": random(2, 3, 2, 2)}))] == [
        (12, 2)
    ]


def test_nodes_without_names_for_their_values() -> None:
    for node in (helper.make_node("Conv", ["", "w"], ["y"]), helper.make_node("Conv", ["x", "w"], [])):
        with pytest.raises(BadInput, match=r"tensor w: .*no input or no output"):
            layers(read(made([node], ["x"], ["y"], {"w": random(4, 3, 3, 3)})))


def test_a_graph_that_goes_in_a_circle_ends() -> None:
    nodes = [
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Transpose", ["w"], ["b"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
    ]
    assert [one.tensor for one in layers(read(made(nodes, ["x"], ["y"], {"w": random(4, 4)})))] == ["w"]


def test_a_model_without_graph_or_with_other_tensors() -> None:
    model = read(made([helper.make_node("MatMul", ["x", "w"], ["y"])], ["x"], ["y"], {"w": random(4, 4)}))
    with pytest.raises(UsageError, match="graph"):
        layers(dataclasses.replace(model, graph=None))
    with pytest.raises(BadInput, match=r"tensor w: .*does not have it"):
        layers(dataclasses.replace(model, tensors=()))
    with pytest.raises(BadInput, match=r"tensor w: its shape is \[2, 8\]"):
        layers(dataclasses.replace(model, tensors=(Tensor.of("w", random(2, 8)),)))
    (layer,) = layers(model)
    with pytest.raises(BadInput, match="tensor w"):
        layer.matrix(random(2, 8))
    with pytest.raises(BadInput, match="tensor w"):
        layer.weight(random(4, 4))


def test_damaged_graphs() -> None:
    """Whatever bytes of a graph change, it is refused, or its weights come back bit for bit."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], strides=[1, 2], pads=[1, 1, 1, 1], group=2),
        helper.make_node("ConvTranspose", ["a", "d"], ["c"], strides=[2, 2], dilations=[1, 1], group=2),
        helper.make_node("Transpose", ["g"], ["gt"], perm=[1, 0]),
        helper.make_node("MatMul", ["c", "gt"], ["e"]),
        helper.make_node("Reshape", ["k", "dims"], ["k2"]),
        helper.make_node("Gemm", ["e", "k2"], ["h"], transB=1, alpha=0.5),
        helper.make_node("LSTM", ["h", "lw", "lr"], ["", "l"], hidden_size=2, direction="forward"),
        helper.make_node("Gather", ["t", "i"], ["y"], axis=0),
    ]
    shapes: dict[str, tuple[int, ...]] = {"w": (4, 2, 3, 3), "b": (4,), "d": (4, 2, 3, 3), "g": (5, 4), "k": (3, 4)}
    shapes |= {"lw": (1, 8, 3), "lr": (1, 8, 2), "t": (6, 2)}
    tensors = {**{name: random(*shape) for name, shape in shapes.items()}, "dims": np.array([4, 3])}
    model = read(made(nodes, ["x", "i"], ["y", "l"], tensors, integers=["i"]))
    assert len(layers(model)) == 7
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        graph = np.frombuffer(model.graph or b"", np.uint8).copy()
        graph[rng.integers(graph.size, size=rng.integers(1, 3))] = rng.integers(256)
        damaged = dataclasses.replace(model, graph=graph.tobytes())
        try:
            for layer in layers(damaged):
                w = damaged[layer.tensor].array
                assert layer.weight(layer.matrix(w)).tobytes() == w.tobytes()
        except BadInput:
            refused += 1
    assert 300 < refused < 1500


# --- real networks -----------------------------------------------------------------------------------------------

MODELS = Path(__file__).parents[1] / "benchmarks" / "models"


def exported(spec: str, weights: Path, shape: tuple[int, ...]) -> Model:
    from shrink.networks import chainer

    read = chainer_npz.read(weights)
    return chainer.to_onnx(chainer.load(spec, read), [shape], read)[0]


@pytest.mark.skipif(importlib.util.find_spec("chainer") is None, reason="Chainer is not installed")
@pytest.mark.parametrize("name", ["VGG7", "UpConv7", "Generator"])
def test_real_networks(name: str, request: pytest.FixtureRequest) -> None:
    """Every weight is a layer with its bias, and what the layers compute is what the network computes."""
    if name == "Generator":
        model = exported(f"{MODELS / 'networks.py'}:Generator", MODELS / "cdcgan.npz", (1, 110))
    else:
        file = {"VGG7": "vgg7_noise0_y.npz", "UpConv7": "upconv7_scale_rgb.npz"}[name]
        folder = request.getfixturevalue("shared_models") / "waifu2x"
        model = exported(f"{MODELS / 'waifu2x.py'}:{name}", folder / file, (1, 1 if name == "VGG7" else 3, 32, 32))
    made_of = layers(model)
    assert {layer.tensor for layer in made_of} == {t.name for t in model.tensors if len(t.shape) >= 2}
    biases = {layer.tensor: layer.bias for layer in made_of}
    assert biases == {w: None if w == "conv7/W" and name == "UpConv7" else w.replace("/W", "/b") for w in biases}
    for layer in made_of:
        w = model[layer.tensor].array
        assert layer.weight(layer.matrix(w)).tobytes() == w.tobytes()
