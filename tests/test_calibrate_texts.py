"""Texts by a network itself: likelier than random ones; what is no text, or the user's own, stays as it is."""

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
from shrink.calibrate import budget, inputs, texts  # noqa: E402
from shrink.calibrate.inputs import Calibration  # noqa: E402
from shrink.calibrate.running import Graph  # noqa: E402
from shrink.export import Network  # noqa: E402
from shrink.formats import onnx as onnx_format  # noqa: E402
from tests.gradients import made  # noqa: E402
from tests.zoo import NETWORKS, keras_lstm  # noqa: E402

Array = NDArray[Any]
node = helper.make_node
LSTM = next(zoo for zoo in NETWORKS if zoo.name == "lstm")


def network_of(path: Path, calibration: Array) -> Network:
    return given.network(str(path), None, (",".join(map(str, (1, *calibration.shape[1:]))),))[0]


@pytest.fixture(scope="module")
def lstm() -> Network:
    return network_of(LSTM.path, LSTM.calibration)


def made_up(network: Network, count: int = 12, **more: Any) -> Calibration:
    tokens = inputs.vocabulary(network)
    return inputs.calibration(inputs.inputs_of(network), count=count, tokens=tokens, **more)


def surprise(network: Network, calibration: Calibration) -> float:
    """What the network thinks of the last token of each sample, in nats, after the tokens before it."""
    graph = Graph(network, ())
    (name,) = calibration.samples[0]
    program = graph.program({name: calibration.samples[0][name].dtype}, graph.outputs)
    found = []
    for sample in calibration.samples:
        window = sample[name]
        last = window[0, -1] if window.dtype.kind == "i" else window[0, -1].argmax()
        before = np.concatenate([window[:, :1], window[:, :-1]], axis=1)
        found.append(-np.log(program.run({name: before})[graph.outputs[0]][0, last] + 1e-9))
    return float(np.mean(found))


def test_the_network_finds_its_own_texts_likely(lstm: Network) -> None:
    before = made_up(lstm, 40)
    after = texts.written(lstm, before, 0)
    assert surprise(lstm, after) < surprise(lstm, before) - 2
    assert after.source == "tokens:40, continued by the network itself"
    for old, new in zip(before.samples, after.samples, strict=True):
        assert (new["tokens"].shape, new["tokens"].dtype) == (old["tokens"].shape, old["tokens"].dtype)
        assert 0 <= new["tokens"].min() <= new["tokens"].max() < 40
    again, other = (texts.written(lstm, before, seed) for seed in (0, 1))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(after.samples, again.samples, strict=True))
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(after.samples, other.samples, strict=True))


def test_letters_with_a_one_in_their_place(shared_models: Path, tmp_path: Path) -> None:
    zoo = keras_lstm(shared_models, tmp_path)
    network = network_of(zoo.path, zoo.calibration)
    before = made_up(network, 8)
    after = texts.written(network, before, 0)
    assert surprise(network, after) < surprise(network, before) - 1
    for sample in after.samples:
        (window,) = sample.values()
        assert window.dtype == np.float32
        assert (window.sum(axis=2) == 1).all()
        assert set(np.unique(window)) == {0, 1}


def model(*nodes: Any, **tensors: Array) -> Network:
    x = np.zeros((1, 6), np.int64)
    proto = made(nodes, {"i": x}, tensors, ["y"], 17)
    return Network("small", onnx_format.from_proto(proto, Path("model.onnx")), (x.shape,))


TABLE = np.random.default_rng(0).standard_normal((30, 8)).astype("f4")
LOOK_UP = node("Gather", ["t", "i"], ["e"])


def test_numbers_that_a_softmax_would_make_shares_of() -> None:
    """For every token of the text, as language models put them out: the last one counts."""
    table = np.eye(30, 8, dtype="f4")
    # Token n is followed by n + 1, of the first eight.
    weights = np.zeros((8, 30), "f4")
    weights[np.arange(8), (np.arange(8) + 1) % 8] = 100
    network = model(LOOK_UP, node("MatMul", ["e", "w"], ["y"]), t=table, w=weights)
    before = made_up(network, 4)
    start = tuple({"i": np.full((1, 6), 3, np.int64)} for _ in before.samples)
    after = texts.written(network, replace(before, samples=start), 0)
    assert all(((sample["i"][0, 1:] - sample["i"][0, :-1]) % 8 == 1).all() for sample in after.samples)


@pytest.mark.parametrize(
    "network",
    [
        model(LOOK_UP, node("MatMul", ["e", "w"], ["m"]), node("ReduceMean", ["m"], ["y"], axes=[1], keepdims=0),
              t=TABLE, w=TABLE[:8, :5]),
        model(LOOK_UP, node("MatMul", ["e", "w"], ["l"]), node("Log", ["l"], ["y"]), t=TABLE, w=0 * TABLE.T),
        model(LOOK_UP, node("ReduceMean", ["e"], ["y"]), t=TABLE),
    ],
    ids=["classes", "not finite", "one number"],
)  # fmt: skip
def test_what_guesses_no_tokens_gets_random_ones(network: Network) -> None:
    before = made_up(network, 4)
    assert before.texts == {"i"}
    assert texts.written(network, before, 0) is before


def test_what_somebody_asked_for_stays(lstm: Network, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", tokens=LSTM.calibration)
    for own in (made_up(lstm, files=tmp_path / "own.npz"), made_up(lstm, distribution="tokens:40")):
        assert own.texts == frozenset()
        assert texts.written(lstm, own, 0) is own


def test_it_takes_no_longer_than_it_may(lstm: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made_up(lstm, 40)
    each = 48 * budget.PER_RUN
    monkeypatch.setattr(texts, "multiplications", lambda *given: 0)
    monkeypatch.setattr(budget, "MULTIPLICATIONS", 40 * each)
    assert len(texts.written(lstm, before, 0).samples) == 40
    monkeypatch.setattr(budget, "MULTIPLICATIONS", 40 * each - 1)
    assert len(texts.written(lstm, before, 0).samples) == budget.FEW_SAMPLES
    monkeypatch.setattr(budget, "MULTIPLICATIONS", budget.FEW_SAMPLES * each - 1)
    assert texts.written(lstm, before, 0) is before


def test_texts_beside_those_of_the_user(lstm: Network, tmp_path: Path) -> None:
    """Four for each, which go on from it; the user's own stay what the result is measured on."""
    np.savez(tmp_path / "own.npz", tokens=LSTM.calibration[:6])
    own = made_up(lstm, files=tmp_path / "own.npz")
    both = texts.beside(lstm, own, 0)
    assert (both.samples, both.source, both.added_are) == (own.samples, "own.npz", "texts of its own")
    assert len(both.added) == 24
    assert len({sample["tokens"].tobytes() for sample in both.added}) == 24
    assert surprise(lstm, replace(own, samples=both.added)) < surprise(lstm, made_up(lstm, 24)) - 2
    assert texts.beside(lstm, both, 0) is both


def test_there_are_not_more_texts_than_are_of_use(lstm: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_AT_MOST", 20)
    own = made_up(lstm, 12)
    assert len(texts.beside(lstm, own, 0).added) == 8
    assert texts.beside(lstm, made_up(lstm, 20), 0).added == ()


def test_vectors_that_are_no_letters_are_not_continued() -> None:
    """They have the width of the softmax by chance."""
    w = np.random.default_rng(0).standard_normal((24, 24)).astype("f4")
    x = np.full((1, 5, 24), 0.5, "f4")
    nodes = (node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["y"], axis=-1))
    proto = made(nodes, {"x": x}, {"w": w}, ["y"], 17)
    network = Network("small", onnx_format.from_proto(proto, Path("model.onnx")), (x.shape,))
    letters = np.eye(24, dtype="f4")[None, :5]
    for given_x, count in ((x, 0), (letters, 4)):
        assert len(texts.beside(network, Calibration(({"x": given_x},), "own"), 0).added) == count
