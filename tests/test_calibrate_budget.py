"""How much work goes into gradients: much for small networks, little for large ones."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from shrink import given
from shrink.calibrate import budget
from shrink.calibrate.layers import layers
from shrink.calibrate.running import Graph
from tests.zoo import NETWORKS


@pytest.mark.parametrize(
    ("samples", "outputs", "each", "expected"),
    [
        # Few samples: many combinations of each one's outputs.
        (48, 10, 1, (48, 16)),
        (384, 10, 1, (384, 8)),
        # Many: fewer, and not of all.
        (2000, 10, 1, (768, 4)),
        # A large network: as many as it takes at least.
        (64, 10, 10**12, (64, 4)),
        (384, 10, 10**12, (64, 4)),
        (1, 10, 10**12, (1, 16)),
        # Large outputs have gradients in many places.
        (48, 5000, 1, (8, 1)),
        (2, 5000, 10**12, (2, 1)),
    ],
)
def test_how_many_gradients(samples: int, outputs: int, each: int, expected: tuple[int, int]) -> None:
    assert budget.probed(samples, outputs, lambda: each) == expected


def test_multiplications_of_a_dense_network() -> None:
    (zoo,) = (network for network in NETWORKS if network.name == "dense")
    network, _ = given.network(str(zoo.path), None, (",".join(map(str, (1, *zoo.calibration.shape[1:]))),))
    found = layers(network.model)
    graph = Graph(network, found)
    (name,) = (value.name for value in graph.inputs)
    sample = {name: zoo.calibration[:1]}
    assert budget.multiplications(graph, found, sample) == sum(layer.outputs * layer.inputs for layer in found)
    squares = sum(layer.outputs**2 for layer in found)
    expected = budget.PER_RUN + 3 * budget.multiplications(graph, found, sample) + squares
    assert budget.of_a_gradient(graph, found, sample) == expected
