"""ONNX graphs for what onnx_chainer does not know: the LSTM operator, layer norm, GELU. Any batch size, opset 13."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["keras_lstm", "text_lstm", "transformer"]

Array = NDArray[Any]
Arrays = Mapping[str, Array]

_OPSET, _IR_VERSION = 13, 7
_HEADS = 4
# ONNX's input, output, forget and cell among Chainer's and Keras' gates: input, forget, cell, output.
_GATES = [0, 3, 1, 2]


def text_lstm(arrays: Arrays) -> ModelProto:
    """`TextLSTM` of networks.py, after the last character: `tokens`, int64 (n, t) -> `next`, (n, c), probabilities."""
    graph = _Graph()
    kernel, recurrent = (_stacked(arrays, "lstm/0/w", first) for first in (0, 4))
    bias = np.stack([_stacked(arrays, "lstm/0/b", first) for first in (0, 4)])
    x = graph.add("Gather", graph.weight("embed/W", arrays["embed/W"]), "tokens")
    state = _lstm(graph, x, kernel, recurrent, bias)
    logits = graph.add(
        "Gemm", state, graph.weight("head/W", arrays["head/W"]), graph.weight("head/b", arrays["head/b"]), transB=1
    )
    graph.add("Softmax", logits, to="next", axis=1)
    return graph.model(("tokens", "int64", ["n", "t"]), ("next", "float32", ["n", len(arrays["head/b"])]))


def keras_lstm(arrays: Arrays) -> ModelProto:
    """Keras 2's `lstm_text_generation`: `characters`, one-hot (n, t, c) -> `next`, (n, c), probabilities.

    `arrays` are those of its HDF5 file. Its gates are opened by Keras' hard sigmoid, 0.2 x + 0.5 from 0 to 1.
    """
    kernel, recurrent, bias = (arrays[f"lstm_1/lstm_1/{name}:0"] for name in ("kernel", "recurrent_kernel", "bias"))
    head, shift = arrays["dense_1/dense_1/kernel:0"], arrays["dense_1/dense_1/bias:0"]
    graph = _Graph()
    first = bias.reshape(4, -1)[_GATES].ravel()
    state = _lstm(
        graph,
        "characters",
        np.concatenate([kernel.T.reshape(4, -1, len(kernel))[i] for i in _GATES]),
        np.concatenate([recurrent.T.reshape(4, -1, len(recurrent))[i] for i in _GATES]),
        np.stack([first, np.zeros_like(first)]),
        activations=["HardSigmoid", "Tanh", "Tanh"],
        activation_alpha=[0.2],
        activation_beta=[0.5],
    )
    logits = graph.add("Gemm", state, graph.weight("dense/kernel", head), graph.weight("dense/bias", shift))
    graph.add("Softmax", logits, to="next", axis=1)
    c = len(shift)
    return graph.model(("characters", "float32", ["n", "t", c]), ("next", "float32", ["n", c]))


def transformer(arrays: Arrays) -> ModelProto:
    """`Transformer` of networks.py: `rows`, (n, 8, 8) -> `logits`, (n, 10). The layer norms are in single operators."""
    graph = _Graph()
    x = _linear(graph, "rows", "embed", arrays)
    x = graph.add("Add", x, graph.weight("position", arrays["position"]))
    layer = 0
    while f"layer{layer}/query/W" in arrays:
        x = _attending(graph, x, f"layer{layer}", arrays)
        layer += 1
    x = graph.add("ReduceMean", _layer_norm(graph, x, "norm", arrays), axes=[1], keepdims=0)
    classes = len(arrays["head/b"])
    head = graph.weight("head/W", arrays["head/W"]), graph.weight("head/b", arrays["head/b"])
    graph.add("Gemm", x, *head, to="logits", transB=1)
    tokens, pixels = len(arrays["position"]), arrays["embed/W"].shape[1]
    return graph.model(("rows", "float32", ["n", tokens, pixels]), ("logits", "float32", ["n", classes]))


class _Graph:
    """Nodes and weights as they are added."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: dict[str, Array] = {}

    def add(self, operator: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """The name of what the new node computes."""
        from onnx import helper

        output = to or f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=f"node_{output}", **attributes))
        return output

    def state_of(self, inputs: Sequence[str], **attributes: Any) -> str:
        """The last hidden state of an LSTM, the second of its outputs."""
        from onnx import helper

        output = f"LSTM_{len(self._nodes)}"
        self._nodes.append(helper.make_node("LSTM", list(inputs), ["", output], name=f"node_{output}", **attributes))
        return output

    def weight(self, name: str, values: Array) -> str:
        self._weights[name] = np.ascontiguousarray(values)
        return name

    def constant(self, name: str, values: object) -> str:
        return self.weight(name, np.asarray(values))

    def model(self, taken: tuple[str, str, list[Any]], made: tuple[str, str, list[Any]]) -> ModelProto:
        """The model, checked; input and output are name, type and shape."""
        import onnx
        from onnx import helper, numpy_helper

        inputs, outputs = (
            [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)]
            for name, dtype, shape in (taken, made)
        )
        weights = [numpy_helper.from_array(values, name) for name, values in self._weights.items()]
        graph = helper.make_graph(self._nodes, "network", inputs, outputs, weights)
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="shrink")
        onnx.checker.check_model(model, full_check=True)
        return model


def _stacked(arrays: Arrays, prefix: str, first: int) -> Array:
    """Chainer's arrays of the four gates from number `first` on, one below the other, in ONNX's order."""
    return np.concatenate([arrays[f"{prefix}{first + gate}"] for gate in _GATES])


def _lstm(graph: _Graph, x: str, kernel: Array, recurrent: Array, bias: Array, **attributes: Any) -> str:
    """The last state, (n, hidden), of an LSTM over `x`, (n, t, features). `bias` is (2, 4 · hidden)."""
    hidden = recurrent.shape[1]
    inputs = [
        graph.add("Transpose", x, perm=[1, 0, 2]),
        graph.weight("lstm/W", kernel[None]),
        graph.weight("lstm/R", recurrent[None]),
        graph.weight("lstm/B", bias.reshape(1, -1)),
    ]
    state = graph.state_of(inputs, hidden_size=hidden, **attributes)
    return graph.add("Squeeze", state, graph.constant("first", np.array([0], np.int64)))


def _linear(graph: _Graph, x: str, name: str, arrays: Arrays) -> str:
    product = graph.add("MatMul", x, graph.weight(f"{name}/W", arrays[f"{name}/W"].T))
    return graph.add("Add", product, graph.weight(f"{name}/b", arrays[f"{name}/b"]))


def _layer_norm(graph: _Graph, x: str, name: str, arrays: Arrays) -> str:
    two, small = graph.constant("two", np.float32(2)), graph.constant("epsilon", np.float32(1e-6))
    centred = graph.add("Sub", x, graph.add("ReduceMean", x, axes=[-1]))
    variance = graph.add("ReduceMean", graph.add("Pow", centred, two), axes=[-1])
    deviation = graph.add("Sqrt", graph.add("Add", variance, small))
    gamma, beta = (graph.weight(f"{name}/{part}", arrays[f"{name}/{part}"]) for part in ("gamma", "beta"))
    scaled = graph.add("Mul", graph.add("Div", centred, deviation), gamma)
    return graph.add("Add", scaled, beta)


def _attending(graph: _Graph, x: str, name: str, arrays: Arrays) -> str:
    width = len(arrays[f"{name}/out/b"])
    tokens = len(arrays["position"])
    split = graph.constant("split", np.array([-1, tokens, _HEADS, width // _HEADS], np.int64))
    join = graph.constant("join", np.array([-1, tokens, width], np.int64))
    h = _layer_norm(graph, x, f"{name}/norm1", arrays)

    def heads(part: str, order: list[int]) -> str:
        parts = graph.add("Reshape", _linear(graph, h, f"{name}/{part}", arrays), split)
        return graph.add("Transpose", parts, perm=order)

    scores = graph.add("MatMul", heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]))
    scaled = graph.add("Div", scores, graph.constant("root", np.float32((width // _HEADS) ** 0.5)))
    mixed = graph.add("MatMul", graph.add("Softmax", scaled, axis=-1), heads("value", [0, 2, 1, 3]))
    joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), join)
    x = graph.add("Add", x, _linear(graph, joined, f"{name}/out", arrays))
    h = _gelu(graph, _linear(graph, _layer_norm(graph, x, f"{name}/norm2", arrays), f"{name}/up", arrays))
    return graph.add("Add", x, _linear(graph, h, f"{name}/down", arrays))


def _gelu(graph: _Graph, x: str) -> str:
    erf = graph.add("Erf", graph.add("Div", x, graph.constant("root_of_two", np.float32(2**0.5))))
    raised = graph.add("Add", erf, graph.constant("one", np.float32(1)))
    return graph.add("Mul", graph.add("Mul", x, raised), graph.constant("half", np.float32(0.5)))
