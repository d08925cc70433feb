"""How much work goes into what makes a file better: counted in multiplications, not in seconds, so that the same
network and the same inputs give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from shrink.calibrate.layers import Layer
from shrink.calibrate.running import Graph

__all__ = ["FEW_SAMPLES", "MULTIPLICATIONS", "PER_RUN", "affordable", "multiplications", "of_a_gradient", "probed"]

Array = NDArray[Any]

# For what inputs are made of, some two minutes on two cores. A run takes the time of so many at least.
MULTIPLICATIONS, PER_RUN = 3 * 10**12, 5 * 10**6
FEW_SAMPLES = 16
# For gradients, some 15 seconds on two cores: up to the most runs, and the least ones whatever they take. A gradient
# takes as much as three runs; a step of a recurrent layer is some 36 small operators.
_ON_GRADIENTS, _LEAST_RUNS, _MOST_RUNS = 15 * 10**10, 256, 3072
_PER_GRADIENT, _PER_STEP = 3, 10**6
# More combinations of one sample's outputs than this tell little that is new.
_PROBES_AT_MOST, _LEAST_PROBES = 16, 4
# Large outputs give as many gradients as they have places, so that few samples tell enough.
_LARGE_OUTPUT, _LARGE_SAMPLES, _LARGE_PROBES = 4096, 8, 1


def affordable(samples: int, each: int) -> int:
    """How many of these samples to take where one takes so many multiplications: all, a few, or none."""
    for count in (samples, min(samples, FEW_SAMPLES)):
        if count * each <= MULTIPLICATIONS:
            return count
    return 0


def probed(samples: int, outputs: int, each: Callable[[], int]) -> tuple[int, int]:
    """Of how many samples to take gradients, and of how many combinations of each one's outputs, where a sample has so
    many `outputs`. `each` says how many multiplications a gradient takes; it is asked where that matters."""
    if outputs > _LARGE_OUTPUT:
        return min(samples, _LARGE_SAMPLES), _LARGE_PROBES
    runs = min(max(_ON_GRADIENTS // max(1, each()), _LEAST_RUNS), _MOST_RUNS)
    probes = min(max(runs // samples, _LEAST_PROBES), _PROBES_AT_MOST)
    return min(samples, runs // probes), probes


def multiplications(graph: Graph, found: Sequence[Layer], sample: Mapping[str, Array]) -> int:
    """Those of all layers, for one sample."""
    counts = _positions(graph, found, sample)
    return sum(n * each.groups * each.outputs * each.inputs for each, n in zip(found, counts, strict=True))


def of_a_gradient(graph: Graph, found: Sequence[Layer], sample: Mapping[str, Array]) -> int:
    """Those of one gradient at the outputs of all layers, and of its products with itself."""
    total = PER_RUN
    for layer, count in zip(found, _positions(graph, found, sample), strict=True):
        total += count * layer.groups * layer.outputs * (_PER_GRADIENT * layer.inputs + layer.outputs)
        total += count * _PER_STEP if layer.kind == "recurrent" else 0
    return total


def _positions(graph: Graph, found: Sequence[Layer], sample: Mapping[str, Array]) -> list[int]:
    """How many each layer has in one sample, in all its uses."""
    types = {name: value.dtype for name, value in sample.items()}
    needs = list(dict.fromkeys(name for layer in found for name in layer.needs))
    values = {**graph.program(types, needs).run(sample), **sample}
    out = []
    for layer in found:
        total = 0
        for use in layer.uses:
            given = values.get(use.initial) if use.initial else None
            total += use.reads.rows(values[use.input], layer.groups, layer.inputs, given).count
        out.append(total)
    return out
