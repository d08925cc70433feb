"""Made-up inputs that a network takes for real ones: those whose features have the statistics of its batch norms.

A batch norm knows mean and variance of what went into it in training. Inputs are changed, all together, until what goes
into every norm has these: the mean over norms and channels of ½ (s² / σ² + (m − μ)² / σ² − 1 − ln (s² / σ²)), how far
normal distributions of mean m and variance s² are from those of μ and σ² (Cai et al., "ZeroQ: A Novel Zero Shot
Quantization Framework", CVPR 2020), is made small by Adam. What the network was trained on need not be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.gradients import differentiated
from shrink.calibrate.inputs import Calibration
from shrink.calibrate.layers import Layer, layers
from shrink.calibrate.running import Graph, Program
from shrink.errors import BadInput
from shrink.export import Network
from shrink.progress import Progress, silent

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["matched"]

Array = NDArray[Any]
F64 = NDArray[np.float64]
Values = dict[str, Array]

_STEPS, _LEAST_STEPS = 100, 20
# Adam's steps are such a share of the range of values at first, and fall to 0 along half a cosine.
_RATE = 0.2
_MOMENTUM, _SQUARES = 0.9, 0.99
# Multiplications that may be spent, some two minutes on two cores; a run takes the time of so many at least. A step is
# one run forwards, and another one forwards and backwards, which takes three times as long.
_MULTIPLICATIONS, _PER_RUN, _RUNS = 3 * 10**12, 5 * 10**6, 4
_FEW_SAMPLES = 16
_TINY = 1e-12


@dataclass(frozen=True)
class _Norm:
    """A batch norm: the value that goes into it, and the mean and variance that this had in training."""

    value: str
    mean: F64
    variance: F64


@dataclass(frozen=True)
class _Way:
    """From inputs to what goes into norms, and gradients back."""

    inputs: Sequence[str]
    norms: Sequence[_Norm]
    forwards: Program
    backwards: Program


def matched(network: Network, calibration: Calibration, progress: Progress = silent) -> Calibration:
    """Other samples where these were made up, as `calibration.free` says: in the range of the old ones, but matched.

    They stay as they are where the network has no batch norms, where gradients do not reach the inputs, or where it
    would take too long; of many samples there may be fewer then.

    Raises:
        UsageError: the network has no graph.
        BadInput: graph and weights do not fit together, or it does not run.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    samples = calibration.samples
    inputs = [name for name, value in samples[0].items() if name in calibration.free and value.dtype == np.float32]
    if not inputs:
        return calibration
    graph = Graph(network, ())
    found = _norms(graph)
    if not found:
        return calibration
    each = _RUNS * (_PER_RUN + _multiplications(graph, layers(network.model), samples[0]))
    count = len(samples)
    if _LEAST_STEPS * count * each > _MULTIPLICATIONS:
        count = min(count, _FEW_SAMPLES)
    steps = min(_STEPS, _MULTIPLICATIONS // (count * each))
    if steps < _LEAST_STEPS:
        return calibration
    types = {name: value.dtype for name, value in samples[0].items()}
    forwards = graph.program(types, [norm.value for norm in found])
    first = {**samples[0], **forwards.run(samples[0])}
    norms = [norm for norm in found if first[norm.value].ndim >= 2 and first[norm.value].dtype == np.float32]
    norms = [norm for norm in norms if first[norm.value].shape[1] == norm.mean.size]
    backwards = _backwards(graph, {norm.value: first[norm.value] for norm in norms}, inputs)
    if backwards is None:
        return calibration
    way = _Way(inputs, norms, forwards, backwards)
    changed = _descended(samples[:count], way, steps, progress)
    if changed is None:
        return calibration
    said = f"matched to {len(norms)} batch norm{'s' if len(norms) > 1 else ''}"
    made = tuple({**samples[n], **{name: x[n] for name, x in changed.items()}} for n in range(count))
    return replace(calibration, samples=made, source=f"{calibration.source}, {said}")


def _norms(graph: Graph) -> list[_Norm]:
    out: dict[str, _Norm] = {}
    for node in graph.proto.graph.node:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or len(node.input) != 5:
            continue
        tensors = [graph.tensor_of(name) for name in node.input[3:]]
        mean, variance = (None if name is None else graph.weights[name].astype(np.float64) for name in tensors)
        if mean is None or variance is None or mean.shape != variance.shape or mean.ndim != 1:
            continue
        # Channels that never vary say nothing.
        if np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all():
            out[node.input[0]] = _Norm(node.input[0], mean, variance)
    return list(out.values())


def _backwards(graph: Graph, into: Values, inputs: Sequence[str]) -> Program | None:
    """What finds the gradients at the inputs for those at these values; None where an operator on the way has none."""
    import onnx

    if not into:
        return None
    proto: ModelProto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    del proto.graph.output[:]
    for name, value in into.items():
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(value.shape)))
    try:
        other, without = differentiated(proto, inputs)
    except BadInput:
        return None
    return None if without else graph.whole(other, [f"gradient:{name}" for name in inputs])


def _multiplications(graph: Graph, found: Sequence[Layer], sample: Mapping[str, Array]) -> int:
    """Those of all layers, for one sample."""
    types = {name: value.dtype for name, value in sample.items()}
    needs = list(dict.fromkeys(name for layer in found for name in layer.needs))
    values = {**graph.program(types, needs).run(sample), **sample}
    total = 0
    for layer in found:
        for use in layer.uses:
            given = values.get(use.initial) if use.initial else None
            count = use.reads.rows(values[use.input], layer.groups, layer.inputs, given).count
            total += count * layer.groups * layer.outputs * layer.inputs
    return total


def _descended(
    samples: Sequence[Mapping[str, Array]], way: _Way, steps: int, progress: Progress
) -> dict[str, Array] | None:
    """The inputs of all samples, (samples, …) each, after so many steps; None where they get worse or are lost."""
    x = {name: np.stack([sample[name] for sample in samples]) for name in way.inputs}
    limits = {name: (float(value.min()), float(value.max())) for name, value in x.items()}
    mean = {name: np.zeros_like(value) for name, value in x.items()}
    square = {name: np.zeros_like(value) for name, value in x.items()}
    begun = math.inf
    for step in range(steps + 1):
        progress("matching inputs to batch norms", step, steps)
        feeds = [{**sample, **{name: x[name][n] for name in way.inputs}} for n, sample in enumerate(samples)]
        features = [{**feed, **way.forwards.run(feed)} for feed in feeds]
        loss, pulls = _pulls(features, way.norms)
        begun = loss if step == 0 else begun
        if step == steps:
            return x if loss < begun else None
        rate = _RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        gradients = [way.backwards.run({**feed, **pull}) for feed, pull in zip(feeds, pulls, strict=True)]
        for name in way.inputs:
            gradient = np.stack([found[f"gradient:{name}"] for found in gradients])
            if not np.isfinite(gradient).all():
                return None
            low, high = limits[name]
            mean[name] += (1 - _MOMENTUM) * (gradient - mean[name])
            square[name] += (1 - _SQUARES) * (gradient**2 - square[name])
            ahead = mean[name] / (1 - _MOMENTUM ** (step + 1))
            size = np.sqrt(square[name] / (1 - _SQUARES ** (step + 1))) + _TINY
            x[name] = np.clip(x[name] - rate * (high - low) * ahead / size, low, high).astype(np.float32)
    return None


def _pulls(features: Sequence[Values], norms: Sequence[_Norm]) -> tuple[float, list[Values]]:
    """How far features are from what the norms expect, and for each sample its gradients at what goes into them."""
    total = 0.0
    pulls: list[Values] = [{} for _ in features]
    for norm in norms:
        own = [sample[norm.value].astype(np.float64) for sample in features]
        rest = tuple(axis for axis in range(own[0].ndim) if axis != 1)
        wide = (-1, *[1] * (own[0].ndim - 2))
        mean = np.mean([x.mean(axis=rest) for x in own], axis=0)
        spread = np.mean([np.square(x - mean.reshape(wide)).mean(axis=rest) for x in own], axis=0) + _TINY
        off = np.square(mean - norm.mean) / norm.variance
        ratio = spread / norm.variance
        total += float(np.mean(ratio + off - 1 - np.log(ratio))) / 2
        # Not by the count of samples: Adam takes gradients of any size, but float32 does not.
        share = 1 / (mean.size * own[0][:, 0].size)
        constant = (share * (mean - norm.mean) / norm.variance).reshape(wide)
        slope = (share * (1 / norm.variance - 1 / spread)).reshape(wide)
        for pull, x in zip(pulls, own, strict=True):
            pull[f"cotangent:{norm.value}"] = (constant + slope * (x - mean.reshape(wide))).astype(np.float32)
    return total / max(1, len(norms)), pulls
