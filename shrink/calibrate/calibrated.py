"""Quantizing a network by what its outputs lose: layer by layer, each on the inputs that the layers before it give.

A layer's weights go to a grid with a scale for each row and column, see `rounding`; they aim at the outputs that the
original network has there, so that a layer makes good what those before it have lost. What is left of the mean error
goes into the bias. The integers are entropy-coded, so a step may be as fine or coarse as it wants to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate import budget, sensitivity, vectors
from shrink.calibrate import entries as storing
from shrink.calibrate import layers as finding
from shrink.calibrate.covariance import Covariance
from shrink.calibrate.folding import fold
from shrink.calibrate.inputs import Calibration
from shrink.calibrate.layer_result import LayerResult
from shrink.calibrate.layers import Layer
from shrink.calibrate.layout import Layout, layout, one_axis
from shrink.calibrate.quality import Quality, cost, measured, peaks_of
from shrink.calibrate.resuming import Store
from shrink.calibrate.rounding import LARGEST_CODE, PRICED, Rounded, damped, rounded, steadied, targets, without_means
from shrink.calibrate.running import Graph
from shrink.calibrate.vectors import Note, is_vector, step_of
from shrink.errors import BadInput, UsageError
from shrink.export import Network
from shrink.model import Entry, Quantized, Tensor
from shrink.progress import Progress, silent

__all__ = ["Calibrator", "LayerResult", "Result", "parted"]

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Values = dict[str, Array]

# Added to the diagonal of what inputs and gradients tell, as shares of its mean. Gradients tell less surely.
_INPUT_RIDGE, _OUTPUT_RIDGE, _LOOKUP_RIDGE = 0.03, 0.1, 1.0
# Positions that the mean of a layer's inputs is taken to be 0 at, beside those that were seen.
_MEAN_PRIOR = 4
# Positions that are looked at: in all, and per input of the layer.
_LEAST_POSITIONS, _POSITIONS_PER_INPUT = 1 << 14, 10
# To one in so many samples no weight is fitted: it says what layers cost, and measures the result.
_CHECKED = 4
# The step at which each layer is rounded alone, to see what it costs, and the most that this is taken to change.
_WEIGHED_AT, _WEIGHED_AT_MOST = 2.0**-7, 32.0
_NO_COST = 1e-200
# How far preparing is, in per cent, when each of its parts begins.
_PREPARING = (0, 10, 30, 100)
# The values kept of all layers' inputs, once as they were and once as they are: fewer beside layers of more inputs than
# `_WIDE`, which take room of their own.
_HELD_BYTES, _HELD_BESIDE_WIDE, _WIDE = 600_000_000, 300_000_000, 4096
# Where there are so many weights for each number of vectors, their steps are not worth finding out.
_FEW_VECTORS = 64


@dataclass(frozen=True)
class Result:
    """One point of the curve: the entries that change, by name, and how the network does with them on inputs that
    no weight was fitted to."""

    step: float
    entries: Mapping[str, Entry]
    layers: tuple[LayerResult, ...]
    quality: Quality
    notes: Mapping[str, Note] = field(default_factory=dict)
    """What became of tensors that are neither a layer's weight nor its bias."""
    moved: Mapping[str, Array] = field(default_factory=dict)
    """What tensors were before they were rounded, where numbers had been moved into them or out of them."""

    def note(self, name: str) -> Note:
        """What became of a tensor that is no layer's weight."""
        return self.notes.get(name, Note("bias", "took over the mean error"))

    @property
    def size_bytes(self) -> int:
        """The bytes of all the entries' payloads."""
        return sum(entry.size_bytes for entry in self.entries.values())


class Calibrator:
    """A network and what is known about it from samples. Each call of `at` quantizes it once.

    `chosen` are the tensors to quantize, `fixed` those that nothing may change, be they biases. `store` remembers
    finished layers. `effort` is the coder's. `keep_quantized`: weights of 8 bits with one scale per output channel,
    which an ONNX file holds, instead of entropy-coded. `weighed`: each layer is rounded alone first, to see what it
    costs.

    Raises:
        UsageError: the model has no graph.
        BadInput: graph and weights do not fit together, ONNX Runtime does not run it, or its outputs are not finite.
        MissingDependency: onnx, onnxruntime or wasmtime is not installed.
    """

    def __init__(
        self,
        network: Network,
        calibration: Calibration,
        chosen: Sequence[str],
        *,
        seed: int = 0,
        effort: int = 1,
        progress: Progress = silent,
        store: Store | None = None,
        keep_quantized: bool = False,
        weighed: bool = True,
        fixed: frozenset[str] = frozenset(),
    ):
        self.network, self.source = network, calibration.source
        self._seed, self._effort, self._progress = seed, effort, progress
        self._keep, self._fixed, self._chosen = keep_quantized, fixed, frozenset(chosen)
        self._store = store or Store(None, "")
        wanted = set(chosen)
        found = [layer for layer in finding.layers(network.model) if layer.tensor in wanted]
        self._graph = Graph(network, found)
        self._layers = [layer for layer in found if not layer.shared or len(layer.uses) > 1]
        placed = {layer.tensor for layer in self._layers}
        self._others = [e for e in network.model.tensors if e.name in wanted - placed and self._graph.has(e.name)]
        self._places = {layer.tensor: (one_axis if keep_quantized else layout)(layer) for layer in self._layers}
        self._given = dict(self._graph.weights)
        biases = {layer.bias for layer in self._layers}
        for name, value in self._given.items():
            if name in wanted | biases and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise BadInput("it holds values that are not finite", file=self._graph.file, tensor=name)
        self._types = {name: value.dtype for name, value in calibration.samples[0].items()}
        samples = [dict(sample) for sample in calibration.samples]
        self._checks, self._fits = parted(samples, seed)
        self.outputs = self._run(self._checks)
        self.peaks = peaks_of(self.outputs)
        for output in self.outputs:
            if not self._is_finite(output):
                raise BadInput("its outputs on the calibration inputs are not finite", file=self._graph.file)
        if not self.peaks:
            raise UsageError("the network puts out no numbers to measure", file=self._graph.file)
        added = [dict(sample) for sample in calibration.added]
        run = zip(added, self._run(added), strict=True)
        # Made-up pictures may be more than the network can take.
        sound = [(x, y) for x, y in run if self._is_finite(y)]
        self._added, self._added_outputs = [x for x, _ in sound], [y for _, y in sound]
        self._fits = _mixed(self._fits, self._added)
        self._moved: dict[str, str] = {}
        # The weights of a Chainer network may be used in other ways than the graph has them.
        if network.chain is None:
            self._layers, self._moved = fold(self._graph, self._layers, fixed)
        self._original = dict(self._graph.weights)
        self._changed = {name: x for name, x in self._original.items() if x is not self._given[name]}
        self._corrected = {layer.bias for layer in self._layers if self._corrects(layer)}
        self._reference = self._references()
        self.weights = sum(math.prod(layer.shape) for layer in self._layers) + sum(e.size for e in self._others)
        """The number of weights that are quantized."""
        self._vectors = self._small_ones()
        self.weights += sum(self._original[name].size for name in self._vectors)
        self._g = self._gradients()
        weights = self._store.weights() if weighed else {}
        for layer in self._layers if weighed else ():
            if layer.tensor not in weights:
                weights[layer.tensor] = self._weight(layer)
                self._store.keep_weights(weights)
            self._g[layer.tensor] = self._g[layer.tensor] * weights[layer.tensor]
        for name in self._vectors:
            if name not in weights:
                weights[name] = self._noise_cost(name, None, 1)
                self._store.keep_weights(weights)
        self._costs = {name: weights[name] for name in self._vectors}
        beside = {id(sample) for sample in self._added}
        self.fitted = sum(id(sample) not in beside for sample in self._fits)
        """The samples, but for those added to them, that weights are fitted to: as many as there is room for."""
        self.fitted_added = len(self._fits) - self.fitted
        """Those added."""
        self.held_out = len(self._checks) if len(samples) > 1 else 0
        """The samples that no weight is fitted to: they tell how fine each layer's steps are to be, and measure."""

    def at(self, step: float) -> Result:
        """The network with steps such that the output's error would be `step`, as a share of the peak (its root mean
        square), if all errors were as independent as they are taken to be. Half of it and less is usual."""
        self._put(self._original)
        base = step * math.sqrt(12 / max(1, self.weights))
        entries: dict[str, Entry] = {}
        results: list[LayerResult] = []
        done = 0
        for entry in self._others:
            self._progress(entry.name, done, self.weights)
            result, made = self._alone(entry, base)
            entries |= made
            results.append(result)
            done += entry.size
        small, notes = self._small(step, base)
        entries |= small
        known = [dict(sample) for sample in self._fits]
        for layer in self._layers:
            self._progress(layer.tensor, done, self.weights)
            self._advance(known, layer.needs)
            key = f"{step!r} {layer.tensor}"
            stored = self._store.layer(key)
            if stored is None:
                stored = self._layer(layer, base, known)
                self._store.keep(key, stored)
            for name, entry in stored[1].items():
                self._graph.put(name, entry.array)
            results.append(stored[0])
            entries |= stored[1]
            done += math.prod(layer.shape)
        self._progress("", self.weights, self.weights)
        return Result(step, entries, tuple(results), self.quality_now(), notes, self._changed)

    def quality_of(self, arrays: Mapping[str, Array]) -> Quality:
        """How the network does with other values for these weights, and the original ones for all others."""
        self._put(arrays)
        return self.quality_now()

    def quality_now(self) -> Quality:
        return measured(self.outputs, self._run(self._checks), self.peaks)

    def quality_elsewhere(self, result: Result) -> Quality | None:
        """How the network does on what was added to the samples, which may be of other kinds than these.

        It is calibrated on them: on others it does rather worse. None where there are none.
        """
        if not self._added:
            return None
        self._put({name: entry.array for name, entry in result.entries.items()})
        return measured(self._added_outputs, self._run(self._added), self.peaks)

    def _put(self, arrays: Mapping[str, Array]) -> None:
        """These values for these weights, and the original ones for all others."""
        for name, values in self._given.items():
            self._graph.put(name, arrays.get(name, values))

    # ---- what is known before anything is quantized

    def _is_finite(self, output: Values) -> bool:
        return all(np.isfinite(output[name]).all() for name in self.peaks)

    def _run(self, samples: Sequence[Values]) -> list[Values]:
        program = self._graph.program(self._types, self._graph.outputs)
        return [program.run(sample) for sample in samples]

    def _references(self) -> list[Values]:
        """What goes into each layer of the original network, for as many samples as there is room for."""
        needs = list(dict.fromkeys(name for layer in self._layers for name in layer.needs))
        program = self._graph.program(self._types, needs)
        out: list[Values] = []
        is_wide = any(layer.inputs > _WIDE and not layer.diagonal for layer in self._layers)
        most = _HELD_BESIDE_WIDE if is_wide else _HELD_BYTES
        for number, sample in enumerate(self._fits):
            self._prepared("inputs of layers", 0, number / len(self._fits))
            out.append({**program.run(sample), **{name: sample[name] for name in needs if name in sample}})
            held = sum(value.nbytes for value in out[0].values())
            if (len(out) + 1) * held > most:
                break
        self._fits = self._fits[: len(out)]
        return out

    def _gradients(self) -> dict[str, F64]:
        """What errors at each layer's outputs cost, from gradients; noise tells where there are none."""
        stored = self._store.gradients()
        shapes = {layer.tensor: (layer.groups, layer.outputs, layer.outputs) for layer in self._layers}
        if stored is not None and {name: g.shape for name, g in stored.items()} == shapes:
            return stored
        outputs = sum(value.size for value in self.outputs[0].values())
        count, probes = budget.probed(
            len(self._fits), outputs, lambda: budget.of_a_gradient(self._graph, self._layers, self._fits[0])
        )
        samples = self._fits[:count]

        def on_sample(number: int) -> None:
            self._prepared("gradients", 1, number / len(samples))

        found = sensitivity.by_gradients(
            self._graph, self._layers, samples, self.peaks, probes=probes, seed=self._seed, on_sample=on_sample
        )
        for layer in self._layers:
            if layer.tensor not in found:
                found[layer.tensor] = self._by_noise(layer)
        self._store.keep_gradients(found)
        return found

    def _weight(self, layer: Layer) -> float:
        """How much more the layer costs than its gradients say: by what the network loses when it alone is rounded."""
        self._prepared(f"weighing {layer.tensor}", 2, self._layers.index(layer) / len(self._layers))
        known = [{**sample, **before} for sample, before in zip(self._fits, self._reference, strict=True)]
        _, made = self._layer(layer, _WEIGHED_AT * math.sqrt(12 / self.weights), known)
        for name, entry in made.items():
            self._graph.put(name, entry.array)
        found = self._typical_cost()
        for name in made:
            self._graph.put(name, self._original[name])
        expected = _WEIGHED_AT**2 * math.prod(layer.shape) / self.weights
        # Less is not believed: what a layer gets wrong alone, those after it would have made good, or have to.
        return min(max(found / expected, 1.0), _WEIGHED_AT_MOST) if math.isfinite(found) else _WEIGHED_AT_MOST

    def _prepared(self, name: str, part: int, share: float) -> None:
        """Of all that comes before the first pass, weighing takes longest."""
        begin, end = _PREPARING[part : part + 2]
        self._progress(name, int(begin + (end - begin) * share), _PREPARING[-1])

    def _typical_cost(self) -> float:
        """The geometric mean over samples: one whose outputs tip over, as those of a recurrent network may, says little
        about the others."""
        found = [cost(a, b, self.peaks) for a, b in zip(self.outputs, self._run(self._checks), strict=True)]
        return math.exp(math.fsum(math.log(max(each, _NO_COST)) for each in found) / len(found))

    def _by_noise(self, layer: Layer) -> F64:
        moments = Covariance(layer, positions_at_most=self._positions(layer), seed=self._seed)
        for values in self._reference:
            moments.collect(values)
        matrix = moments.matrix
        trace = float((matrix if layer.diagonal else np.einsum("gii->gi", matrix)).sum())
        one = self._noise_cost(layer.tensor, trace or 1.0, layer.outputs)
        return np.broadcast_to(np.eye(layer.outputs) * one, (layer.groups, layer.outputs, layer.outputs))

    def _noise_cost(self, tensor: str, moments: float | None, outputs: int) -> float:
        original = self._original[tensor]

        def error(weights: Array) -> float:
            self._graph.put(tensor, weights)
            found = self._typical_cost()
            self._graph.put(tensor, original)
            return found

        found = sensitivity.by_noise(original, error, self._seed, moments=moments, outputs=outputs)
        return found if math.isfinite(found) else 1.0

    def _positions(self, layer: Layer) -> int:
        wanted = max(_LEAST_POSITIONS, _POSITIONS_PER_INPUT * layer.inputs)
        return -(-wanted // max(1, len(self._fits)))

    # ---- one layer

    def _advance(self, known: list[Values], needs: Sequence[str]) -> None:
        """Find out what goes into the next layer, from what went into the ones before it."""
        missing = [name for name in needs if name not in known[0]]
        if not missing:
            return
        types = {name: value.dtype for name, value in known[0].items()}
        program = self._graph.program(types, missing)
        for values in known:
            values.update(program.run(values))

    def _layer(self, layer: Layer, base: float, known: Sequence[Values]) -> tuple[LayerResult, dict[str, Entry]]:
        w = self._original[layer.tensor].astype(np.float32)
        matrix = layer.matrix(w)
        moments = Covariance(layer, positions_at_most=self._positions(layer), seed=self._seed, weights=matrix)
        for values, before in zip(known, self._reference, strict=True):
            moments.collect(values, before)
        bias = layer.bias if self._corrects(layer) else None
        g = damped(self._g[layer.tensor], _OUTPUT_RIDGE)
        extra = layer.extra()
        aim: F64 = matrix.astype(np.float64)
        h: F64
        if layer.diagonal:
            h = moments.matrix + _LOOKUP_RIDGE * moments.matrix.mean()
        else:
            second, cross = steadied(moments.matrix, moments.cross, matrix)
            moments.forget()
            if bias is not None:
                # The bias takes the mean; what is left is the spread around it. Few positions tell the mean badly.
                share = moments.count / (moments.count + _MEAN_PRIOR)
                without_means(second, moments.mean, share * moments.mean)
                without_means(cross, moments.target_mean, share * moments.mean)
            ridge = _ridge(layer.inputs, moments.count)
            is_known = bool(second.any())
            h = damped(second, ridge)
            del second
            if is_known:
                aim = targets(matrix, h, cross, ridge, extra)
        place = self._places[layer.tensor]
        how = {"largest_code": storing.LARGEST_INT8} if self._keep else {"coding": PRICED}
        made = rounded(aim, extra, h, g, base, place, **how)
        entry = self._encoded(layer, made, place)
        entries: dict[str, Entry] = {layer.tensor: entry}
        if bias is not None:
            shift = moments.target_mean - np.einsum("goi,gi->go", made.values, moments.mean)
            entries |= self._bias(bias, layer, shift, g, base)
        count = math.prod(layer.shape)
        trace = float((h.sum(axis=-1) if h.ndim == 2 else np.einsum("gii->g", h)) @ np.einsum("goo->g", g))
        steps = float(np.mean(np.log2(made.row_steps))) + float(np.mean(made.column_exponents)) / 2
        return (
            LayerResult(
                layer.tensor,
                layer.kind,
                layer.shape,
                entry.size_bytes,
                8 * entry.size_bytes / max(1, count),
                trace,
                2.0**steps,
            ),
            entries,
        )

    def _encoded(self, layer: Layer, made: Rounded, place: Layout) -> Quantized:
        codes = place.stored(layer.weight(made.codes.astype(np.float64)).astype(np.int32))
        if self._keep:
            return storing.int8(layer.tensor, layer.shape, codes, made.row_steps, place.rows)
        steps = made.scale, made.row_exponents, made.column_exponents
        return storing.on_grid(layer.tensor, layer.shape, codes, *steps, place, self._effort, trellis=made.trellis)

    def _small_ones(self) -> list[str]:
        """The tensors of one number per channel that get steps of their own, where they are enough to matter."""
        if self._keep:
            return []
        others = self._corrected.union(self._moved, self._fixed)
        smooth = sensitivity.smooth(self._graph) - others - self._chosen
        found = [e for e in self.network.model.tensors if e.name in smooth and is_vector(e)]
        found = [e for e in found if np.isfinite(self._original[e.name]).all()]
        enough = sum(entry.size for entry in found) * _FEW_VECTORS > self.weights
        return [entry.name for entry in found] if enough else []

    def _small(self, step: float, base: float) -> tuple[dict[str, Entry], dict[str, Note]]:
        """The other tensors of the graph, but for biases that layers correct, and what became of them."""
        entries: dict[str, Entry] = {}
        notes: dict[str, Note] = {}
        for entry in self.network.model.tensors:
            name = entry.name
            if name in self._fixed | self._chosen | self._corrected or not self._graph.has(name):
                continue
            x, moved = self._original[name], self._moved.get(name)
            # What is to stay quantized where it runs has no other form for these than float32.
            at = 0.0 if self._keep else step
            each = self._costs.get(name)
            found = vectors.stored(entry, x, step=at, base=base, cost=each, moved=moved, effort=self._effort)
            if found is None and x is not self._given[name]:
                found = Tensor.of(name, x), Note("float32", "another tensor's numbers were moved into it")
            if found is not None:
                entries[name], notes[name] = found
                self._graph.put(name, entries[name].array)
        return entries, notes

    def _corrects(self, layer: Layer) -> bool:
        """Whether the layer has a bias that may take what is left of the mean error."""
        free = layer.bias is not None and layer.bias not in self._fixed
        return free and not layer.diagonal and layer.kind != "recurrent"

    def _bias(self, name: str, layer: Layer, shift: F64, g: F64, base: float) -> dict[str, Entry]:
        """The bias with the mean error taken out, and a step of its own."""
        before = self._original[name]
        flat = before.astype(np.float64).reshape(-1).copy()
        places = layer.bias_rows()
        total, count = np.zeros(flat.size), np.zeros(flat.size)
        np.add.at(total, places, shift)
        np.add.at(count, places, 1)
        flat += total / np.maximum(count, 1)
        wanted = flat.astype(np.float32).reshape(before.shape)
        if self._keep:
            return {name: Tensor.of(name, wanted)}
        step = step_of(wanted, base, float(np.einsum("goo->", g)) / max(1, flat.size))
        return {name: storing.small(name, wanted, step, self._effort)}

    def _alone(self, entry: Entry, base: float) -> tuple[LayerResult, dict[str, Entry]]:
        """A weight that is in no layer: by its sensitivity alone."""
        x = self._original[entry.name].astype(np.float32)
        per_weight = self._noise_cost(entry.name, None, 1)
        step = max(
            step_of(x, base, per_weight),
            float(np.abs(x).max()) / (storing.LARGEST_INT8 if self._keep else LARGEST_CODE),
        )
        if self._keep:
            codes = np.rint(x / np.float32(step)).astype(np.int32).reshape(x.shape[0], -1)
            made: Entry = storing.int8(entry.name, x.shape, codes, np.array([step], np.float32), ())
        else:
            made = storing.small(entry.name, x, step, self._effort)
        self._graph.put(entry.name, made.array)
        bits = 8 * made.size_bytes / max(1, entry.size)
        note = "by sensitivity alone: the graph does not use it as a linear layer"
        cost_of_all = per_weight * entry.size
        result = LayerResult(entry.name, "other", entry.shape, made.size_bytes, bits, cost_of_all, step, note)
        return result, {entry.name: made}


def parted(samples: list[Values], seed: int) -> tuple[list[Values], list[Values]]:
    """Those that measure the result, chosen by the seed, and those to calibrate on; one sample has to be both."""
    if len(samples) == 1:
        return samples, samples
    # Not every fourth: kinds of samples may come in turns.
    order = np.random.default_rng([seed, 3]).permutation(len(samples))
    checked = set(order[: -(-len(samples) // _CHECKED)].tolist())
    return [s for n, s in enumerate(samples) if n in checked], [s for n, s in enumerate(samples) if n not in checked]


def _mixed(samples: list[Values], added: list[Values]) -> list[Values]:
    """The second spread evenly among the first, so that any beginning of the list has its share of both."""
    places = [(number + 0.5) / len(samples) for number in range(len(samples))]
    places += [(number + 0.5) / len(added) for number in range(len(added))]
    both = [*samples, *added]
    return [both[number] for number in sorted(range(len(both)), key=places.__getitem__)]


def _ridge(inputs: int, positions: int) -> float:
    """More where few positions tell about many inputs: what they do not show is not free."""
    return _INPUT_RIDGE * max(1.0, _POSITIONS_PER_INPUT * inputs / max(1, positions))
