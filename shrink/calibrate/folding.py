"""The same function in fewer numbers: what a layer and the norm beside it say twice is moved into one place.

A batch norm in use, γ (x − μ) / √(σ² + ε) + β, is a factor and a number to add for each channel. Both go to the layer
before it where there is one: its rows take the factor, β becomes its bias, and γ, μ and σ² become constants. Elsewhere
γ takes the factor and β the rest. The γ and β of a layer norm go to the dense layers behind it, if there is nothing
else: their columns take the factor, their biases what β makes of them. A recurrent layer adds two biases, of which one
can have the sum.

All of it is what the graph computes, batch norm with its running statistics; with those of a batch, as in training, the
moved numbers mean something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._linear import RECURRENT
from shrink.calibrate._positions import Vectors
from shrink.calibrate.layers import Layer, graphs_of, is_standard, used_in
from shrink.calibrate.running import Graph

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["epsilon_of", "fold"]

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_EPSILON = 1e-5


def fold(graph: Graph, layers: Sequence[Layer], fixed: frozenset[str]) -> tuple[list[Layer], dict[str, str]]:
    """Give the graph other weights that say the same; those of `fixed` stay, and so does what depends on them.

    Returns the layers, some of which have another bias, and by name the tensors that became constants, with a note of
    where their numbers went.
    """
    folding = _Folding(graph, layers, fixed)
    for node in folding.nodes:
        rule = _RULES.get(node.op_type)
        if rule is not None and is_standard(node):
            rule(node, folding)
    return folding.layers, folding.notes


def _is(node: NodeProto, operator: str) -> bool:
    return node.op_type == operator and is_standard(node)


class _Folding:
    """The graph's nodes, the layers as they are by now, and notes of constants."""

    def __init__(self, graph: Graph, layers: Sequence[Layer], fixed: frozenset[str]):
        self.nodes = list(graph.proto.graph.node)
        self.layers = list(layers)
        self.notes: dict[str, str] = {}
        self._graph, self._fixed = graph, fixed
        self._uses = Counter(graph.put_out)
        self._maker = {name: node for node in self.nodes for name in node.output if name}
        self._taker: dict[str, NodeProto] = {}
        for node in self.nodes:
            self._uses.update(name for name in node.input if name)
            self._taker.update(dict.fromkeys(node.input, node))
            for inner in graphs_of(node):
                self._uses.update(used_in(inner))

    def uses(self, value: str) -> int:
        return self._uses[value]

    def taker(self, value: str) -> NodeProto | None:
        """The only node that uses a value."""
        return self._taker.get(value) if self.uses(value) == 1 else None

    def maker(self, value: str) -> NodeProto | None:
        return self._maker.get(value)

    def own(self, value: str) -> str | None:
        """The tensor under this name in the graph, where only one node uses it and it may change."""
        tensor = self._graph.tensor_of(value)
        return tensor if tensor is not None and self.uses(value) == 1 and self.free(tensor) else None

    def free(self, tensor: str) -> bool:
        x = self._graph.weights[tensor]
        return tensor not in self._fixed and x.dtype == np.float32 and bool(np.isfinite(x).all())

    def alone(self, layer: Layer) -> bool:
        """Whether the layer's weight is for one node only, and may change, as its bias may."""
        changes = self.free(layer.tensor) and (layer.bias is None or self.free(layer.bias))
        return changes and not layer.shared and len(layer.uses) == 1

    def now(self, tensor: str) -> F32:
        return self._graph.weights[tensor]

    def flat(self, tensor: str) -> F64:
        return self.now(tensor).astype(np.float64).reshape(-1)

    def change(self, changes: Mapping[str, Array], constants: Mapping[str, float], note: str) -> bool:
        """Put all of these in, or nothing where float32 cannot hold them."""
        with np.errstate(over="ignore"):
            made = {name: x.astype(np.float32) for name, x in changes.items()}
        if not all(np.isfinite(x).all() for x in made.values()):
            return False
        for name, x in made.items():
            self._graph.put(name, x)
        for name, constant in constants.items():
            self._graph.put(name, np.full_like(self.now(name), constant))
            self.notes[name] = note
        return True


def epsilon_of(norm: NodeProto) -> float:
    """What a batch norm adds to variances, a number of float32."""
    return float(np.float32(next((a.f for a in norm.attribute if a.name == "epsilon"), _EPSILON)))


def _batch_norm(node: NodeProto, folding: _Folding) -> None:
    own = [folding.own(name) for name in node.input[1:5]]
    names = [name for name in own if name is not None]
    in_training = any(a.name == "training_mode" and a.i for a in node.attribute)
    if len(names) < 4 or in_training or any(node.output[1:]):
        return
    gamma, beta, mean, variance = names
    g, b, m, v = map(folding.flat, names)
    epsilon = epsilon_of(node)
    # A runtime adds ε to what is stored here: that is to be 1.
    one = np.float32(1) - np.float32(epsilon)
    plain = g.shape == b.shape == m.shape == v.shape and all(folding.now(name).ndim == 1 for name in names)
    if not (plain and (v + epsilon > 0).all() and one > 0):
        return
    factor = g / np.sqrt(v + epsilon)
    shift = b - factor * m
    constants = {mean: 0.0, variance: float(one)}
    layer = _before(node, folding)
    if layer is None:
        folding.change({gamma: factor, beta: shift}, constants, f"moved into {gamma} and {beta}")
        return
    constants[gamma] = 1.0
    if layer.bias is not None:
        shift = shift + factor * folding.flat(layer.bias)
        constants[layer.bias] = 0.0
    matrix = layer.matrix(folding.now(layer.tensor)) * factor[layer.bias_rows()][..., None]
    changes: dict[str, Array] = {layer.tensor: layer.weight(matrix), beta: shift}  # type: ignore[arg-type]
    if folding.change(changes, constants, f"moved into {layer.tensor} and {beta}"):
        folding.layers[folding.layers.index(layer)] = replace(layer, bias=beta)


def _before(norm: NodeProto, folding: _Folding) -> Layer | None:
    """The layer whose outputs, with its bias, are all that goes into the norm, and go nowhere else."""
    for layer in folding.layers:
        node = folding.nodes[layer.uses[0].node]
        # Of a product of stacked matrices, axis 1 need not be that of its outputs.
        by_channel = layer.kind in ("conv", "deconv") or node.op_type == "Gemm"
        if not by_channel or node.input[0] != layer.input or not folding.alone(layer):
            continue
        taker = folding.taker(layer.output)
        own_bias = len(node.input) > 2 and node.input[2] != ""
        if taker is norm and own_bias == (layer.bias is not None):
            return layer
        added = taker is not None and _is(taker, "Add") and layer.bias is not None and not own_bias
        if added and taker is not None and folding.taker(taker.output[0]) is norm:
            return layer
    return None


def _layer_norm(node: NodeProto, folding: _Folding) -> None:
    last = next((a.i for a in node.attribute if a.name == "axis"), -1) == -1
    if last and len(node.input) == 3 and not any(node.output[1:]):
        _into_dense(node.output[0], folding.own(node.input[1]), folding.own(node.input[2]), folding)


def _added(node: NodeProto, folding: _Folding) -> None:
    """An Add behind a Mul, as a layer norm in single operators ends."""
    for value, shift in (node.input, node.input[::-1]):
        times = folding.maker(value)
        if times is None or not _is(times, "Mul") or folding.taker(value) is not node:
            continue
        factors = [tensor for tensor in map(folding.own, times.input) if tensor is not None]
        if len(factors) == 1:
            _into_dense(node.output[0], factors[0], folding.own(shift), folding)


def _into_dense(value: str, gamma: str | None, beta: str | None, folding: _Folding) -> None:
    """γ · x + β that only dense layers see: to their columns and biases."""
    if gamma is None or beta is None:
        return
    layers = [layer for layer in folding.layers if layer.input == value]
    g, b = folding.flat(gamma), folding.flat(beta)
    shapes = {folding.now(gamma).shape[-1:], folding.now(beta).shape[-1:]}
    if not layers or len(layers) != folding.uses(value) or shapes != {(g.size,)} or g.size != b.size:
        return
    changes: dict[str, Array] = {}
    for layer in layers:
        node, reads = folding.nodes[layer.uses[0].node], layer.uses[0].reads
        plain = isinstance(reads, Vectors) and not reads.column and reads.scale == 1 and layer.groups == 1
        fits = plain and layer.kind == "dense" and layer.inputs == g.size and node.input[0] == value
        if not fits or layer.bias is None or not folding.alone(layer):
            return
        matrix = layer.matrix(folding.now(layer.tensor))
        bias = folding.flat(layer.bias)
        bias[layer.bias_rows()] += matrix @ b
        changes |= {
            layer.tensor: layer.weight((matrix * g).astype(np.float32)),
            layer.bias: bias.reshape(folding.now(layer.bias).shape),
        }
    said = ", ".join(layer.tensor for layer in layers)
    folding.change(changes, {gamma: 1.0, beta: 0.0}, f"moved into {said}, and biases")


def _recurrent(node: NodeProto, folding: _Folding) -> None:
    """Both biases of a gate are added to the same sum, but for the last gate of a GRU that is reset behind it."""
    bias = folding.own(node.input[3]) if len(node.input) > 3 else None
    gates = RECURRENT[node.op_type]
    x = folding.now(bias) if bias else np.zeros((0, 0), np.float32)
    if bias is None or x.ndim != 2 or x.shape[1] % (2 * gates):
        return
    hidden = x.shape[1] // (2 * gates)
    after = node.op_type == "GRU" and any(a.name == "linear_before_reset" and a.i for a in node.attribute)
    count = hidden * (gates - after)
    second = slice(gates * hidden, gates * hidden + count)
    made = x.astype(np.float64)
    made[:, :count] += x[:, second]
    made[:, second] = 0
    folding.change({bias: made}, {}, "")


_RULES = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Add": _added,
    **dict.fromkeys(RECURRENT, _recurrent),
}
