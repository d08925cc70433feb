"""What an error in a layer's outputs costs at the outputs of the network.

The measure is the same everywhere: the mean squared error of the network's outputs, each in units of its peak, and the
mean over the outputs where there are several. For a layer it is tr(G E H Eᵀ), where E is the error of its matrix, H are
the second moments of its inputs and G, here, those of the gradients at its outputs, summed over positions (the
Kronecker-factored curvature of Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", ICML 2015). The gradients are of random ±1 combinations of the outputs, so that their mean is that of J Jᵀ.
Those of a recurrent layer are by its gates before their activations, and are summed over its steps as well. Where a
gradient cannot be had (operators without a rule, too many steps) noise on the weights tells one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._linear import RECURRENT
from shrink.calibrate._positions import States, Vectors
from shrink.calibrate._unrolled import Gates, unrolled
from shrink.calibrate._views import Spread
from shrink.calibrate.gradients import differentiated
from shrink.calibrate.layers import Layer, Use, graphs_of, is_standard, used_in
from shrink.calibrate.running import Graph
from shrink.errors import BadInput

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["by_gradients", "by_noise", "output_rows", "smooth"]

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Values = Mapping[str, Array]

# The noise that is put on weights, in parts of their root mean square.
_NOISE = 1 / 64


def by_gradients(
    graph: Graph,
    layers: Sequence[Layer],
    samples: Sequence[Values],
    peaks: Mapping[str, float],
    *,
    probes: int,
    seed: int,
    on_sample: Callable[[int], None],
) -> dict[str, F64]:
    """G by the layer's tensor, (groups, outputs, outputs), for the layers that have gradients.

    `on_sample` hears the number of each sample before it is looked at.

    Raises:
        BadInput: the network does not run.
    """
    plain, gates = unrolled(graph.proto)
    values = {layer.tensor: [_values(layer, use, gates.get(use.node)) for use in layer.uses] for layer in layers}
    wanted = [layer for layer in layers if all(values[layer.tensor])]
    at = _flat(values, wanted)
    if not at:
        return {}
    try:
        other, without = differentiated(plain, at)
    except BadInput:
        return {}
    wanted = [layer for layer in wanted if without.isdisjoint(_flat(values, [layer]))]
    names = [f"gradient:{name}" for name in _flat(values, wanted)]
    found = {layer.tensor: np.zeros((layer.groups, layer.outputs, layer.outputs)) for layer in wanted}
    if not names:
        return found
    types = {name: value.dtype for name, value in samples[0].items()}
    outputs = graph.program(types, graph.outputs)
    program = graph.whole(other, names)
    rng = np.random.default_rng([seed, 1])
    nodes = graph.proto.graph.node
    for number, sample in enumerate(samples):
        on_sample(number)
        shapes = {name: (value.shape, value.dtype) for name, value in outputs.run(sample).items()}
        for _ in range(probes):
            feeds = dict(sample)
            for name, (shape, dtype) in shapes.items():
                signs = rng.integers(0, 2, shape) * 2.0 - 1.0
                if name in peaks:
                    scale = peaks[name] * np.sqrt(max(1, signs.size) * len(peaks))
                    feeds[f"cotangent:{name}"] = (signs / scale).astype(dtype)
                else:
                    feeds[f"cotangent:{name}"] = np.zeros(shape, dtype)
            gradients = program.run(feeds)
            for layer in wanted:
                for use, here in zip(layer.uses, values[layer.tensor], strict=True):
                    found_here = [gradients[f"gradient:{name}"] for name in here]
                    if layer.kind == "recurrent":
                        rows = _gate_rows(layer, found_here)
                    else:
                        rows = output_rows(layer, use, nodes[use.node], found_here[0])
                    found[layer.tensor] += rows @ rows.swapaxes(1, 2) / (probes * len(samples))
    return {name: g for name, g in found.items() if np.isfinite(g).all()}


def _values(layer: Layer, use: Use, gates: Gates | None) -> tuple[str, ...]:
    """The values whose gradients are those of the layer's outputs; nothing where they are not known."""
    if layer.kind != "recurrent":
        return (use.output,)
    if gates is None:
        return ()
    return (*gates.before, *gates.product) if isinstance(use.reads, States) else gates.before


def _flat(values: Mapping[str, Sequence[tuple[str, ...]]], layers: Sequence[Layer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for names in values[layer.tensor] for name in names))


def _gate_rows(layer: Layer, values: Sequence[Array]) -> F32:
    """Gradients by the gates of each direction, then by the products of the states that stand for their last gate."""
    rows = np.stack(values[: layer.groups]).astype(np.float32).swapaxes(1, 2)
    for row, product in zip(rows, values[layer.groups :], strict=False):
        row[-product.shape[1] :] = product.T
    return np.ascontiguousarray(rows)


def output_rows(layer: Layer, use: Use, node: NodeProto, value: Array) -> F32:
    """A value at the layer's output as (groups, outputs, positions).

    Raises:
        BadInput: it does not have the shape that the layer gives.
    """
    try:
        rows = _output_rows(layer, use, node, value.astype(np.float32))
    except ValueError:
        raise BadInput(f"its outputs are {list(value.shape)}", tensor=layer.tensor) from None
    return np.ascontiguousarray(rows)


def _output_rows(layer: Layer, use: Use, node: NodeProto, value: F32) -> F32:
    groups, outputs = layer.groups, layer.outputs
    if layer.kind == "conv":
        pixels: F32 = np.moveaxis(value, 1, 0).reshape(groups, outputs, -1)
        return pixels
    if layer.kind == "embedding":
        vectors: F32 = value.reshape(-1, outputs).T[None]
        return vectors
    if layer.kind == "dense":
        left = len(node.input) > 1 and node.input[1] == use.input
        reads = use.reads
        rows = Vectors(left, reads.lead if isinstance(reads, Vectors) else ()).rows(value, groups, outputs, None)
        out = np.empty((groups, rows.count, outputs), np.float32)
        rows.write(np.arange(rows.count), out)
        laid: F32 = out.swapaxes(1, 2)
        return laid
    return _blocks(layer, node, value)


def _blocks(layer: Layer, node: NodeProto, value: F32) -> F32:
    """The output of a transposed convolution, cut into blocks of a pixel for each phase."""
    spread = next(step for step in layer.steps if isinstance(step, Spread))
    axes = len(spread.phases)
    attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    strides = attributes.get("strides") or [1] * axes
    begins = (attributes.get("pads") or [0] * axes)[:axes]
    after = [-(n + begin) % s for n, begin, s in zip(value.shape[2:], begins, strides, strict=True)]
    padded = np.pad(value, [(0, 0), (0, 0), *zip(begins, after, strict=True)])
    split = [n for size, s in zip(padded.shape[2:], strides, strict=True) for n in (size // s, s)]
    blocks = padded.reshape(*padded.shape[:2], *split)
    kept = [slice(None)] * 2 + [part for phases in spread.phases for part in (slice(None), slice(phases))]
    blocks = blocks[tuple(kept)]
    phases = [3 + 2 * axis for axis in range(axes)]
    order = [1, *phases, 0, *(2 + 2 * axis for axis in range(axes))]
    laid: F32 = blocks.transpose(order).reshape(layer.groups, layer.outputs, -1)
    return laid


# Operators and which of their inputs are added or multiplied by: a small error there is a small one of the outputs.
_SMOOTH: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul"), (0, 1)),
    **dict.fromkeys((f"{name}Normalization" for name in ("Batch", "Instance", "Layer", "Group")), (1, 2)),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (2,)),
    **dict.fromkeys(RECURRENT, (3,)),
    "PRelu": (1,),
}


def smooth(graph: Graph) -> set[str]:
    """The tensors that the graph only adds or multiplies by: not a variance, nor a number of which a root is taken."""
    found: set[str] = set()
    others: set[str | None] = {graph.tensor_of(name) for name in graph.put_out}
    for node in graph.proto.graph.node:
        places = _SMOOTH.get(node.op_type, ()) if is_standard(node) else ()
        for place, name in enumerate(node.input):
            tensor = graph.tensor_of(name)
            if tensor is not None and place in places:
                found.add(tensor)
            else:
                others.add(tensor)
        for inner in graphs_of(node):
            others.update(map(graph.tensor_of, used_in(inner)))
    return found - others


def by_noise(
    weights: Array, error: Callable[[Array], float], seed: int, *, moments: float | None = None, outputs: int = 1
) -> float:
    """What an error costs: the network's error for independent noise on the weights, over the noise's variance.

    With `moments`, the trace of H, it is the one number that stands for G: `outputs` times it, times the trace of H,
    times the variance, is the error that was found. `error(weights)` measures the network with other weights.
    """
    rms = float(np.sqrt(np.mean(np.square(weights, dtype=np.float64)))) if weights.size else 0.0
    deviation = _NOISE * rms or _NOISE
    noise = np.random.default_rng([seed, 2]).standard_normal(weights.shape)
    with np.errstate(over="ignore"):
        noisy = (weights + deviation * noise).astype(np.float32)
    found = error(noisy) / deviation**2
    return found / (outputs * moments) if moments else found
