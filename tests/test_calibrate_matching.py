"""Made-up inputs are changed until batch norms get what they expect; what is the user's own stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402

from shrink import given  # noqa: E402
from shrink.calibrate import budget, inputs, matching  # noqa: E402
from shrink.calibrate.calibrated import Calibrator  # noqa: E402
from shrink.calibrate.inputs import Calibration  # noqa: E402
from shrink.calibrate.quantizing import chosen_of  # noqa: E402
from shrink.calibrate.running import Graph  # noqa: E402
from shrink.export import Network  # noqa: E402
from shrink.formats import onnx as onnx_format  # noqa: E402
from shrink.metrics import peak_of  # noqa: E402
from shrink.quantizers import Kept  # noqa: E402
from tests.gradients import made  # noqa: E402
from tests.zoo import NETWORKS, ZooNetwork  # noqa: E402

Array = NDArray[Any]
node = helper.make_node
ZOO = {zoo.name: zoo for zoo in NETWORKS}


def network_of(zoo: ZooNetwork) -> Network:
    return given.network(str(zoo.path), None, (",".join(map(str, (1, *zoo.calibration.shape[1:]))),))[0]


def made_up(network: Network, count: int = 24, **more: Any) -> Calibration:
    return inputs.calibration(inputs.inputs_of(network), count=count, **more)


def far(network: Network, calibration: Calibration) -> float:
    """How far what goes into the norms is from what they expect, in its own words."""
    graph = Graph(network, ())
    total, count = 0.0, 0
    for norm in (node for node in graph.proto.graph.node if node.op_type == "BatchNormalization"):
        mean, variance = (graph.weights[str(graph.tensor_of(name))].astype("f8") for name in norm.input[3:])
        types = {name: value.dtype for name, value in calibration.samples[0].items()}
        program = graph.program(types, [norm.input[0]])
        seen = np.concatenate([program.run(sample)[norm.input[0]] for sample in calibration.samples]).astype("f8")
        seen = np.moveaxis(seen, 1, 0).reshape(mean.size, -1)
        m, v = seen.mean(axis=1), seen.var(axis=1) + 1e-12
        total += float(np.mean(v / variance + (m - mean) ** 2 / variance - 1 - np.log(v / variance))) / 2
        count += 1
    return total / count


def small(*nodes: Any, **tensors: Array) -> Network:
    x = np.zeros((1, 3, 8, 8), "f4")
    proto = made(nodes, {"x": x}, tensors, ["y"], 17)
    return Network("small", onnx_format.from_proto(proto, Path("model.onnx")), (x.shape,))


def parts(variance: float = 0.05) -> dict[str, Array]:
    one = np.ones(3, "f4")
    return {"g": one, "b": 0 * one, "m": np.array([0.2, 0.5, 0.7], "f4"), "v": variance * one}


norm = node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"])


@pytest.mark.parametrize("name", ["residual", "excitation"])
def test_norms_get_what_they_expect(name: str) -> None:
    network = network_of(ZOO[name])
    before = made_up(network)
    after = matching.matched(network, before)
    assert far(network, after) < far(network, before) / 20
    assert after.source == f"synthetic pictures, matched to {6 if name == 'residual' else 8} batch norms"
    (key,) = before.samples[0]
    old, new = (np.stack([sample[key] for sample in found.samples]) for found in (before, after))
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert old.min() <= new.min() < new.max() <= old.max()
    again = matching.matched(network, before)
    assert all((a[key] == b[key]).all() for a, b in zip(after.samples, again.samples, strict=True))


def test_the_network_then_does_better_on_real_inputs() -> None:
    """At the same size; and what is measured on such inputs is no longer far from the truth."""
    zoo = ZOO["residual"]
    network = network_of(zoo)
    chosen = [n for n, decision in chosen_of(network.model).items() if not isinstance(decision, Kept)]
    graph = Graph(network, ())
    (key,) = (given.name for given in graph.inputs)
    real = [{key: row[None]} for row in zoo.evaluation[:64]]

    def outputs() -> Array:
        program = graph.program({key: np.dtype("f4")}, graph.outputs)
        return np.stack([program.run(sample)[graph.outputs[0]] for sample in real])

    original, values = outputs(), dict(graph.weights)
    found = []
    for calibration in (made_up(network, 64), matching.matched(network, made_up(network, 64))):
        calibrator = Calibrator(network, calibration, chosen)
        sizes, reached, said = [], [], []
        for step in (0.02, 0.01, 0.005, 0.0025):
            result = calibrator.at(step)
            for name, x in values.items():
                graph.put(name, result.entries[name].array if name in result.entries else x)
            sizes.append(result.size_bytes)
            reached.append(10 * np.log10(peak_of(original) ** 2 / np.mean((original.astype("f8") - outputs()) ** 2)))
            said.append(result.quality.psnr_db)
        found.append((np.interp(4000, sizes, reached), np.mean(np.subtract(said, reached))))
    (before, off_before), (after, off_after) = found
    assert after > before + 3
    assert abs(off_after) < 5 < off_before


def test_what_is_not_free_stays(tmp_path: Path) -> None:
    network = network_of(ZOO["residual"])
    assert made_up(network).free == {"input"}
    np.savez(tmp_path / "own.npz", ZOO["residual"].calibration)
    for own in (made_up(network, files=tmp_path / "own.npz"), made_up(network, distribution="uniform:0:1")):
        assert own.free == frozenset()
        assert matching.matched(network, own) is own
    tokens = network_of(ZOO["lstm"])
    assert made_up(tokens, tokens=inputs.vocabulary(tokens)).free == frozenset()


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (small(node("Relu", ["x"], ["y"])), "no norm"),
        (small(norm, **parts(0.0)), "a channel that never varies"),
        (small(norm, **parts(float("nan"))), "statistics that are not finite"),
        (small(node("Erf", ["x"], ["e"]), node("ArgMax", ["e"], ["i"], axis=3),
               node("Cast", ["i"], ["c"], to=1), node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
               **parts()), "no gradient"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)  # fmt: skip
def test_what_cannot_be_matched_stays(network: Network, why: str) -> None:
    before = made_up(network, 4)
    assert before.free == {"x"}
    assert matching.matched(network, before) is before


def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples where these take too long, and none where even those do."""
    network = small(norm, **parts())
    before = made_up(network, 40)
    each = matching._RUNS * (budget.PER_RUN + matching._PER_VALUE * 3 * 8 * 8)
    monkeypatch.setattr(budget, "MULTIPLICATIONS", 40 * matching._LEAST_STEPS * each)
    assert len(matching.matched(network, before).samples) == 40
    monkeypatch.setattr(budget, "MULTIPLICATIONS", 40 * matching._LEAST_STEPS * each - 1)
    assert len(matching.matched(network, before).samples) == budget.FEW_SAMPLES
    monkeypatch.setattr(budget, "MULTIPLICATIONS", budget.FEW_SAMPLES * matching._LEAST_STEPS * each - 1)
    assert matching.matched(network, before) is before


def test_what_gets_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(ZOO["residual"])
    monkeypatch.setattr(matching, "_RATE", -0.2)
    before = made_up(network, 4)
    assert matching.matched(network, before) is before


def test_samples_that_become_all_the_same_are_not_taken() -> None:
    """The norm expects channels that do not vary."""
    network = small(norm, **parts(1e-9))
    before = made_up(network, 8)
    assert matching.matched(network, before) is before


def test_a_dead_channel_is_no_hindrance() -> None:
    """Its variance is no number of float32 that one may divide by; the other channels are matched all the same."""
    alive = np.array([0, 1, 1], "f4")
    tensors = parts()
    tensors["m"] *= alive
    tensors["v"][0] = 5.6e-45
    nodes = [
        node("Mul", ["x", "alive"], ["z"]),
        node("BatchNormalization", ["z", "g", "b", "m", "v"], ["y"]),
    ]
    network = small(*nodes, alive=alive.reshape(3, 1, 1), **tensors)
    before = made_up(network, 24)
    after = matching.matched(network, before)
    seen = np.concatenate([sample["x"] for sample in after.samples])
    np.testing.assert_allclose(seen.mean(axis=(0, 2, 3))[1:], tensors["m"][1:], atol=0.01)
    np.testing.assert_allclose(seen.var(axis=(0, 2, 3))[1:], tensors["v"][1:], atol=0.01)


def test_a_network_that_puts_out_its_last_state_only() -> None:
    """All its states have no name until calibration gives them one."""
    tensors = {"w": np.ones((1, 16, 8), "f4"), "r": np.ones((1, 16, 4), "f4"), "s": np.array([3, 8, 8])}
    nodes = [
        node("BatchNormalization", ["x", "g", "b", "m", "v"], ["n"]),
        node("Reshape", ["n", "s"], ["t"]),
        node("LSTM", ["t", "w", "r"], ["", "y"], hidden_size=4),
    ]
    network = small(*nodes, **parts(), **tensors)
    assert matching.matched(network, made_up(network, 8)).source.endswith("matched to 1 batch norm")


def test_only_free_inputs_change() -> None:
    """Of two inputs that are alike."""
    proto = made(
        [node("Add", ["x", "z"], ["s"]), node("BatchNormalization", ["s", "g", "b", "m", "v"], ["y"])],
        {"x": np.zeros((1, 3, 8, 8), "f4"), "z": np.zeros((1, 3, 8, 8), "f4")}, parts(0.2), ["y"], 17,
    )  # fmt: skip
    network = Network("two", onnx_format.from_proto(proto, Path("model.onnx")), ((1, 3, 8, 8),) * 2)
    before = replace(made_up(network, 8), free=frozenset({"z"}))
    after = matching.matched(network, before)
    assert after is not before
    for old, new in zip(before.samples, after.samples, strict=True):
        assert (old["x"] == new["x"]).all()
        assert (old["z"] != new["z"]).any()
