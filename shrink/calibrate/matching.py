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

from shrink.calibrate import budget
from shrink.calibrate.budget import PER_RUN, affordable, multiplications
from shrink.calibrate.folding import epsilon_of
from shrink.calibrate.gradients import differentiated
from shrink.calibrate.inputs import Calibration
from shrink.calibrate.layers import is_standard, layers
from shrink.calibrate.running import Graph, Program
from shrink.errors import BadInput
from shrink.export import Network
from shrink.progress import Progress, silent

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["matched"]

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Values = dict[str, Array]

_STEPS, _LEAST_STEPS = 100, 20
# Adam's steps are such a share of the range of values at first, and fall to 0 along half a cosine.
_RATE = 0.2
_MOMENTUM, _SQUARES = 0.9, 0.99
# Each value that goes into a norm takes the time of some multiplications, as it is read and written by more than
# layers. A step is two runs forwards, and another one forwards and backwards, which takes three times as long.
_PER_VALUE, _RUNS = 30, 5
_TINY = 1e-12
# Samples that differ from each other less than so by the share of what they did are not taken.
_VARIED = 0.5


@dataclass(frozen=True)
class _Norm:
    """A batch norm: the value that goes into it, and the mean and variance that it takes this to have."""

    value: str
    mean: F64
    variance: F64
    epsilon: float

    def sums(self, x: Array) -> F64:
        """Of a sample's feature (n, channels, …): how many, the sum, and that of squares about the mean, by channel."""
        off = np.moveaxis(x, 1, 0).reshape(self.mean.size, -1) - self.mean[:, None]
        return np.stack([np.full(self.mean.size, off.shape[1]), off.sum(axis=1), np.square(off).sum(axis=1)])

    def distance(self, sums: F64) -> tuple[float, F64, F64]:
        """How far all samples together are from what is expected, and what its gradient at a feature x of theirs is:
        the first of the other two, plus the second times x less the mean that is expected. Both are by channel."""
        count, total, squares = sums
        off = total / count
        # As the norm does: a channel that hardly varied in training is not to count for all others.
        variance, found = self.variance + self.epsilon, np.maximum(squares / count - off**2, 0) + self.epsilon
        ratio = found / variance
        loss = float(np.mean(ratio + off**2 / variance - 1 - np.log(ratio))) / 2
        # Not by the count of samples: Adam takes gradients of any size, but float32 does not.
        share = 1 / self.mean.size
        slope = share * (1 / variance - 1 / found)
        return loss, share * off / variance - slope * off, slope

    def pull(self, x: Array, constant: F64, slope: F64) -> F32:
        wide = (-1, *[1] * (x.ndim - 2))
        off = x - self.mean.reshape(wide)
        gradient: F32 = ((constant.reshape(wide) + slope.reshape(wide) * off) / x[:, 0].size).astype(np.float32)
        return gradient


@dataclass(frozen=True)
class _Way:
    """From inputs to what goes into norms, and gradients back."""

    inputs: Sequence[str]
    norms: Sequence[_Norm]
    forwards: Program
    backwards: Program

    def features(self, feed: Mapping[str, Array]) -> Mapping[str, Array]:
        return {**feed, **self.forwards.run(feed)}

    def distances(self, feeds: Sequence[Mapping[str, Array]]) -> tuple[float, list[tuple[F64, F64]]]:
        """The mean over norms, and the gradient of each. Features are not kept: they take far more than inputs."""
        sums = [np.zeros((3, norm.mean.size)) for norm in self.norms]
        for feed in feeds:
            features = self.features(feed)
            for total, norm in zip(sums, self.norms, strict=True):
                total += norm.sums(features[norm.value])
        found = [norm.distance(total) for norm, total in zip(self.norms, sums, strict=True)]
        return math.fsum(loss for loss, _, _ in found) / len(found), [(at, slope) for _, at, slope in found]

    def gradients(self, feed: Mapping[str, Array], pulls: Sequence[tuple[F64, F64]]) -> list[Array]:
        features = self.features(feed)
        given = {
            f"cotangent:{norm.value}": norm.pull(features[norm.value], *pull)
            for norm, pull in zip(self.norms, pulls, strict=True)
        }
        found = self.backwards.run({**feed, **given})
        return [found[f"gradient:{name}"] for name in self.inputs]


def matched(network: Network, calibration: Calibration, progress: Progress = silent) -> Calibration:
    """Other samples where these were made up, as `calibration.free` says: in the range of the old ones, but matched.

    They stay as they are where the network has no batch norms, where gradients do not reach the inputs, where it would
    take too long, and where nothing like real inputs comes of it; of many samples there may be fewer then.

    Raises:
        UsageError: the network has no graph.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    inputs = [name for name, x in calibration.samples[0].items() if name in calibration.free and x.dtype == np.float32]
    if not inputs:
        return calibration
    try:
        # What is wrong with a network is for calibration to say, which needs less of it.
        with np.errstate(all="ignore"):
            return _matched(network, calibration, inputs, progress)
    except BadInput:
        return calibration


def _matched(network: Network, calibration: Calibration, inputs: Sequence[str], progress: Progress) -> Calibration:
    samples, found = calibration.samples, layers(network.model)
    graph = Graph(network, found)
    known = _norms(graph)
    if not known:
        return calibration
    types = {name: value.dtype for name, value in samples[0].items()}
    forwards = graph.program(types, [norm.value for norm in known])
    first = {**samples[0], **forwards.run(samples[0])}
    values = sum(first[norm.value].size for norm in known)
    each = _RUNS * (PER_RUN + _PER_VALUE * values + multiplications(graph, found, samples[0]))
    count = affordable(len(samples), _LEAST_STEPS * each)
    if not count:
        return calibration
    steps = min(_STEPS, budget.MULTIPLICATIONS // (count * each))
    norms = [norm for norm in known if first[norm.value].ndim >= 2 and first[norm.value].dtype == np.float32]
    norms = [norm for norm in norms if first[norm.value].shape[1] == norm.mean.size and first[norm.value].size]
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
        if node.op_type != "BatchNormalization" or not is_standard(node) or len(node.input) != 5:
            continue
        tensors = [graph.tensor_of(name) for name in node.input[3:]]
        mean, variance = (None if name is None else graph.weights[name].astype(np.float64) for name in tensors)
        if mean is None or variance is None or mean.shape != variance.shape or mean.ndim != 1:
            continue
        epsilon = epsilon_of(node)
        if np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all() and epsilon > 0:
            out[node.input[0]] = _Norm(node.input[0], mean, variance, epsilon)
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


def _descended(
    samples: Sequence[Mapping[str, Array]], way: _Way, steps: int, progress: Progress
) -> dict[str, Array] | None:
    """The inputs of all samples, (samples, …) each, after so many steps; None where they come to nothing."""
    x = {name: np.stack([sample[name] for sample in samples]) for name in way.inputs}
    limits = {name: (float(value.min()), float(value.max())) for name, value in x.items()}
    mean = {name: np.zeros_like(value) for name, value in x.items()}
    square = {name: np.zeros_like(value) for name, value in x.items()}
    begun, varied = math.inf, {name: _varied(value) for name, value in x.items()}
    for step in range(steps + 1):
        progress("matching inputs to batch norms", step, steps)
        feeds = [{**sample, **{name: x[name][n] for name in way.inputs}} for n, sample in enumerate(samples)]
        loss, pulls = way.distances(feeds)
        begun = loss if step == 0 else begun
        if step == steps:
            # Samples that have become all the same say nothing about others.
            alike = any(_varied(value) < _VARIED * varied[name] for name, value in x.items())
            return None if alike or not loss < begun else x
        rate = _RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        gradients = [way.gradients(feed, pulls) for feed in feeds]
        for name, found in zip(way.inputs, zip(*gradients, strict=True), strict=True):
            gradient = np.stack(found)
            low, high = limits[name]
            mean[name] += (1 - _MOMENTUM) * (gradient - mean[name])
            square[name] += (1 - _SQUARES) * (gradient**2 - square[name])
            ahead = mean[name] / (1 - _MOMENTUM ** (step + 1))
            size = np.sqrt(square[name] / (1 - _SQUARES ** (step + 1))) + _TINY
            x[name] = np.clip(x[name] - rate * (high - low) * ahead / size, low, high).astype(np.float32)
            if not (np.isfinite(x[name]).all() and np.isfinite(size).all()):
                return None
    return None


def _varied(x: Array) -> float:
    """By how much samples differ: the mean of the standard deviations of all places."""
    return float(x.std(axis=0, dtype=np.float64).mean())
