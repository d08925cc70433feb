"""Accuracy: outputs against plain ONNX Runtime, planted losses, and the document as it grows."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import shrink
from shrink import given as given_network
from shrink.bench import BrowserOptions, Inputs, Plan, Variant, accuracy, document, measure, samples, variants
from shrink.bench.accuracy import compared, judged
from shrink.bench.native import Native
from shrink.errors import BadInput, UsageError
from shrink.export import Network
from shrink.model import Tensor
from shrink.progress import silent
from tests import pages
from tests.pages import PACKAGE, needs_package

Array = NDArray[Any]
F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.put_networks(tmp_path_factory.mktemp("networks"))


def network(folder: Path, name: str) -> Network:
    inputs = ("1,3,24,32",) if name.endswith("classifier") else ()
    return given_network.network(str(folder / f"{name}.onnx"), None, inputs)[0]


@dataclasses.dataclass(frozen=True)
class Given:
    """A network that is ready to be measured."""

    first: Variant
    samples: samples.Samples
    reference: accuracy.Reference


@pytest.fixture(scope="module", params=["generator", "classifier", "half-generator"])
def each(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return ready(folder, request.param, tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def generator(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return ready(folder, "generator", tmp_path_factory.mktemp("variants"))


def ready(folder: Path, name: str, place: Path) -> Given:
    first = variants.original(network(folder, name), place, silent)
    found = samples.samples(samples.inputs_of(first.network), Inputs(count=3))
    return Given(first, found, accuracy.Reference(first, found.values, silent))


def plainly(given: Given, weights: Mapping[str, Array]) -> list[dict[str, Array]]:
    """What ONNX Runtime makes of an ordinary file with these weights."""
    import onnxruntime  # type: ignore[import-untyped]

    proto = onnx.load(given.first.file)
    for initializer in proto.graph.initializer:
        dtype = helper.tensor_dtype_to_np_dtype(initializer.data_type)
        values = weights[initializer.name].astype(dtype)
        initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(None, dict(feeds)), strict=True)) for feeds in given.samples.values]


def weights_of(variant: Variant) -> dict[str, Array]:
    return {tensor.name: tensor.array for tensor in variant.network.model.tensors}


def assert_same(ours: accuracy.Outputs, theirs: accuracy.Outputs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            bound = 2e-2 if a[name].dtype == np.float16 else 1e-5
            np.testing.assert_allclose(a[name], b[name], rtol=bound, atol=bound)


# Native outputs


def test_the_original_gives_what_its_file_gives(each: Given) -> None:
    assert_same(each.reference.outputs, plainly(each, weights_of(each.first)))


@pytest.mark.parametrize("mode", ["eightbit", "int4", "prune"])
def test_a_variant_gives_what_its_decoded_weights_give(each: Given, tmp_path: Path, mode: str) -> None:
    variant = variants.by_mode(each.first, mode, tmp_path, silent)
    ours = each.reference.of(variant, silent)
    assert_same(ours, plainly(each, weights_of(variant)))
    assert not compared(each.reference.outputs, ours)["exact"]


def test_weights_that_cannot_be_exchanged_are_measured_all_the_same(generator: Given, tmp_path: Path) -> None:
    # The bias of three values is a constant of the session.
    changed = with_weights(generator.first, {"c2/b": np.array([1, 2, 3], "f4")})
    assert not generator.reference.exchangeable("c2/b")
    ours = generator.reference.of(changed, silent)
    assert_same(ours, plainly(generator, weights_of(changed)))


def with_weights(variant: Variant, weights: Mapping[str, Array], name: str = "changed") -> Variant:
    tensors = tuple(Tensor.of(t.name, weights.get(t.name, t.array)) for t in variant.network.model.tensors)
    model = dataclasses.replace(variant.network.model, tensors=tensors)
    return dataclasses.replace(variant, name=name, network=dataclasses.replace(variant.network, model=model))


def test_a_variant_with_a_graph_of_its_own(generator: Given, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    shrink.save(shrink.quantize(shrink.load(folder / "generator.onnx"), "int8"), path)
    variant = variants.from_file(generator.first, "small", path)
    stored = variants.by_mode(generator.first, "int8", tmp_path, silent)
    assert_same(generator.reference.of(variant, silent), generator.reference.of(stored, silent))
    assert accuracy.layers(generator.reference, variant, silent) is None


def test_operators_that_want_constants_get_them(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    scales = np.array([1, 1, 2, 2], "f4")
    proto = pages.model_of(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")],
        [value("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [value("y", TensorProto.FLOAT, [1, 1, 8, 8])],
        {"scales": scales},
    )
    onnx.save(proto, tmp_path / "resize.onnx")
    native = Native.of(given_network.network(str(tmp_path / "resize.onnx"), None, ())[0])
    x = np.arange(16, dtype="f4").reshape(1, 1, 4, 4)
    np.testing.assert_array_equal(native.run({"x": x})["y"], x.repeat(2, 2).repeat(2, 3))


def test_a_network_that_does_not_run_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Nonsense", ["x"], ["y"], domain="made.up")
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("made.up", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "odd.onnx")
    with pytest.raises(BadInput, match="ONNX Runtime does not take the network"):
        Native.of(given_network.network(str(tmp_path / "odd.onnx"), None, ())[0])


# Figures


def outputs(*values: Any) -> list[dict[str, Array]]:
    return [{"y": np.asarray(v, "f4")} for v in values]


def test_pictures_by_hand() -> None:
    zeros, tenths, halves = (np.full((1, 1, 16, 16), v) for v in (0.0, 0.1, 0.5))
    found = compared(outputs(zeros, halves, zeros), outputs(tenths, halves, zeros + 0.01))
    psnr = found["psnr_db"]
    assert psnr["samples"] == [pytest.approx(20, abs=1e-5), None, pytest.approx(40, abs=1e-5)]
    assert (psnr["mean"], psnr["worst"]) == (pytest.approx(30, abs=1e-5), pytest.approx(20, abs=1e-5))
    assert found["worst_input"] == 0
    assert found["max_error"] == pytest.approx(0.1)
    assert found["exact"] is False
    assert found["problem"] is None
    assert found["ssim"]["samples"][1] == 1
    assert found["top1_agreement"] is None


def test_classes_by_hand() -> None:
    before = outputs([[0.1, 0.7, 0.2]], [[0.6, 0.3, 0.1]], [[0.2, 0.2, 0.6]], [[0.5, 0.25, 0.25]])
    after = outputs([[0.1, 0.6, 0.3]], [[0.3, 0.6, 0.1]], [[0.2, 0.2, 0.6]], [[0.5, 0.25, 0.25]])
    labels = np.array([[1], [0], [0], [0]])
    found = compared(before, after, labels)
    assert found["top1_agreement"] == 0.75
    assert found["top5_agreement"] is None
    assert found["top1_accuracy"] == 0.5
    assert found["perplexity"] == pytest.approx((1 / (0.6 * 0.3 * 0.2 * 0.5)) ** 0.25)
    assert found["worst_input"] == 1
    assert found["psnr_db"] is None


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((1, 3), [[0], [2]], None),
        ((1, 3), [[0], [3]], "there is a label 3, and the network has 3 classes, from 0 on"),
        ((1, 3), [[0]], "there are 1 labels for 2 rows of classes"),
        ((1, 4, 3), [[0], [1]], "there are 2 labels for 8 rows of classes"),
        ((1, 2, 3), [[0, 1], [2, 0]], None),
        ((1, 1, 16, 16), [[0], [1]], "the output y is no table of classes"),
        ((3,), [[0], [1]], "the output y is no table of classes"),
    ],
)
def test_labels_that_cannot_be_used_say_why(shape: tuple[int, ...], labels: Any, words: str | None) -> None:
    given = np.random.default_rng(0).random((2, *shape))
    assert accuracy.unusable(outputs(*given), np.array(labels)) == words
    if words is not None:
        assert compared(outputs(*given), outputs(*given), np.array(labels))["top1_accuracy"] is None


def test_pictures_are_by_the_peak_that_is_given() -> None:
    """Twice the peak is 6 dB more; backends that are fed only some of the samples have that of all."""
    before, after = outputs(np.full((1, 1, 16, 16), 0.5)), outputs(np.full((1, 1, 16, 16), 0.6))
    assert accuracy.peak(before) == 1.0
    assert accuracy.peak(outputs([[1.0, 2.0]])) is None
    assert accuracy.peak([{"y": np.full((1, 1, 16, 16), 1e200)}]) is None
    one, two = (compared(before, after, by=by)["psnr_db"]["worst"] for by in (None, 2.0))
    assert two - one == pytest.approx(20 * math.log10(2))


def test_scores_that_are_no_distribution_go_through_softmax() -> None:
    logits = np.array([[2.0, 0.0, -1.0]])
    share = np.exp(logits) / np.exp(logits).sum()
    found = compared(outputs(logits), outputs(logits), np.array([[2]]))
    assert found["perplexity"] == pytest.approx(1 / share[0, 2])
    assert found["exact"] is True
    assert found["worst_input"] is None


def test_labels_for_each_step_of_a_sequence() -> None:
    steps = np.array([[[0.5, 0.5], [0.25, 0.75]]])
    found = compared(outputs(steps, steps), outputs(steps, steps), np.array([[0, 1], [1, 0]]))
    assert found["perplexity"] == pytest.approx((1 / (0.5 * 0.75 * 0.5 * 0.25)) ** 0.25)
    assert found["top1_accuracy"] == 0.5
    # One label for two steps says nothing, and neither does a class that there is not.
    for labels in (np.array([[0], [1]]), np.array([[0, 1], [1, 2]])):
        assert compared(outputs(steps, steps), outputs(steps, steps), labels)["top1_accuracy"] is None


def test_the_largest_error_is_that_of_all_outputs() -> None:
    before = [{"a": np.ones((1, 3), "f4"), "b": np.ones(4, "f4")}]
    after = [{"a": np.ones((1, 3), "f4"), "b": np.array([1, 1, 1, 3], "f4")}]
    found = compared(before, after)
    assert (found["max_error"], found["relative_error"]) == (2, 1)
    assert found["exact"] is False


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([], "outputs for 0 of 1 inputs"),
        ([{}], "every output"),
        ([{"y": np.zeros((1, 3), "f4")}], "the shape [1, 3], the original's has [1, 2]"),
        ([{"y": np.array([[math.nan, 1]], "f4")}], "NaN or infinity"),
        ([{"y": np.array([[math.inf, 1]], "f4")}], "NaN or infinity"),
    ],
)
def test_outputs_that_cannot_be_compared_say_why(after: accuracy.Outputs, words: str) -> None:
    before = outputs([[1.0, 2.0]])
    found = compared(before, after)
    assert words in found["problem"]
    assert found["relative_error"] is None
    verdict = judged(found, before, after, half=False)
    assert (verdict["wrong"], verdict["wrong_by"]) == (True, None)


@pytest.mark.parametrize(
    ("error", "half", "wrong"),
    [(0.0, False, False), (3e-3, False, False), (5e-3, False, True), (5e-2, True, False), (0.2, True, True)],
)
def test_a_wrong_backend_is_named(error: float, half: bool, wrong: bool) -> None:
    """The largest output is 4: a thousandth of it is 0.004, two hundredths are 0.08."""
    native = outputs([[1.0, -4.0, 2.0]], [[0.0, 0.5, 0.0]])
    backend = copy.deepcopy(native)
    backend[1]["y"][0, 0] += error
    verdict = judged({}, native, backend, half=half)
    assert verdict["wrong"] is wrong
    assert verdict["wrong_by"] == pytest.approx(error / 4)
    assert verdict["tolerance"] == (2e-2 if half else 1e-3)


def test_a_backend_may_give_the_same_infinity() -> None:
    native = outputs([[math.inf, 1.0]])
    assert judged({}, native, copy.deepcopy(native), half=False)["wrong"] is False


any_outputs = st.integers(1, 3).flatmap(
    lambda n: st.lists(arrays("f4", (1, 4), elements=st.floats(width=32)), min_size=n, max_size=n)
)


@given(any_outputs, any_outputs)
def test_any_outputs_give_a_valid_document(before: list[F32], after: list[F32]) -> None:
    found = judged(compared(outputs(*before), outputs(*after)), outputs(*before), outputs(*after), half=False)
    whole = {"shrink_bench": 1, "title": "", "created": "", "partial": False, "not_measured": []}
    variant = {"name": "a", "accuracy": {"wasm": found}}
    assert document.checked({**whole, "variants": [variant]})["variants"][0]["accuracy"]["wasm"] == found


# Layers


def test_one_bad_layer_stands_first(generator: Given) -> None:
    rng = np.random.default_rng(0)
    weights = weights_of(generator.first)

    def spoiled(name: str, share: float) -> Array:
        x = weights[name]
        noise = rng.standard_normal(x.shape).astype("f4")
        out: Array = x + noise * np.float32(share * np.sqrt(np.mean(x**2)))
        return out

    shares = {"fc/W": 0.01, "逆畳み込み/W": 0.3, "c2/W": 0.001}
    changed = {name: spoiled(name, share) for name, share in shares.items()}
    found = accuracy.layers(generator.reference, with_weights(generator.first, changed), silent)
    assert found is not None
    assert [row["name"] for row in found.rows[:3]] == ["逆畳み込み/W", "fc/W", "c2/W"]
    for row in found.rows:
        share = shares.get(row["name"])
        if share is None:
            assert (row["mode"], row["sqnr_db"], row["output_sqnr_db"]) == ("kept", None, None)
            continue
        assert row["sqnr_db"] == pytest.approx(-20 * math.log10(share), abs=0.5)
        alone = plainly(generator, weights | {row["name"]: changed[row["name"]]})
        a = np.concatenate([s["image"].reshape(-1) for s in generator.reference.outputs])
        b = np.concatenate([s["image"].reshape(-1) for s in alone])
        by_hand = 10 * math.log10(float((a.astype("f8") ** 2).sum() / ((a.astype("f8") - b) ** 2).sum()))
        assert row["output_sqnr_db"] == pytest.approx(by_hand, abs=0.05)
    assert found.why == ""


def test_layers_without_a_limit_of_time(generator: Given, tmp_path: Path) -> None:
    variant = variants.by_mode(generator.first, "int8", tmp_path, silent)
    found = accuracy.layers(generator.reference, variant, silent, seconds=math.inf)
    assert found is not None
    assert found.why == ""
    assert found.rows[0]["output_sqnr_db"] is not None


def test_what_layers_became_and_take(generator: Given, tmp_path: Path) -> None:
    for mode, became in (("int8", "int8"), ("prune", "pruned"), ("float16", "float16")):
        variant = variants.by_mode(generator.first, mode, tmp_path, silent)
        found = accuracy.layers(generator.reference, variant, silent)
        assert found is not None
        rows = {row["name"]: row for row in found.rows}
        assert rows["fc/W"]["mode"] == became
        assert rows["fc/W"]["shape"] == [512, 20]
        stored = {t.name: t for t in variant.network.model.tensors}
        assert rows["fc/W"]["bytes"] == stored["fc/W"].size_bytes < 4 * 512 * 20
        assert rows["fc/b"]["mode"] == "kept"
        # Indices and shapes are no layers.
        assert "shape" not in rows


def test_layers_that_take_too_long_are_left_out_with_the_reason(generator: Given, tmp_path: Path) -> None:
    variant = variants.by_mode(generator.first, "int8", tmp_path, silent)
    found = accuracy.layers(generator.reference, variant, silent, seconds=0)
    assert found is not None
    assert "layers would take about 1 min" in found.why
    assert all(row["output_sqnr_db"] is None for row in found.rows)
    # The weights themselves cost next to nothing.
    worst = [row["sqnr_db"] for row in found.rows if row["mode"] != "kept"]
    assert worst == sorted(worst)


# The document as it grows


def plan(network: Network, **options: Any) -> Plan:
    browser = BrowserOptions(backends=())
    return Plan(network, "a.onnx", "2026-11-21T07:00:00Z", runtime=PACKAGE, browser=browser, **options)


@needs_package
def test_a_benchmark_without_a_browser(folder: Path) -> None:
    heard: list[dict[str, Any]] = []
    found = measure(plan(network(folder, "generator"), modes=("int8", "prune+int8")), heard.append)
    assert document.checked(found) is not found
    assert found["partial"] is False
    assert [h["partial"] for h in heard] == [True] * len(heard)
    assert [v["name"] for v in found["variants"]] == ["float32", "int8", "prune+int8"]
    # It grows, and what was heard stays as it was.
    assert [len(h["variants"]) for h in heard] == sorted(len(h["variants"]) for h in heard)
    assert len(heard[0]["variants"]) == 1
    first, small, pruned = found["variants"]
    assert first["accuracy"]["native"]["exact"] is True
    assert first["layers"] is None
    assert small["accuracy"]["native"]["psnr_db"]["worst"] > pruned["accuracy"]["native"]["psnr_db"]["worst"] > 10
    assert small["pictures"]["worst"]["input"] == small["accuracy"]["native"]["worst_input"]
    assert found["model"] == {
        "file": "a.onnx",
        "weights": 35_091,
        "inputs": [{"name": "z", "dtype": "float32", "shape": [1, 20]}],
        "outputs": [
            {"name": "image", "shape": [1, 3, 16, 16], "kind": "image", "peak": 1.0},
            {"name": "scores", "shape": [1, 30], "kind": "classes", "peak": None},
        ],
    }
    assert found["inputs"] == {"source": "seeded", "count": 6, "labels": False}
    assert found["machine"]["cores"] >= 1
    assert len(found["peers"]) == 5
    assert all(v["size"]["wire_brotli"] > 1000 for v in found["variants"])


@needs_package
@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_benchmark_keeps_what_it_has(folder: Path, after: int) -> None:
    heard: list[dict[str, Any]] = []

    def interrupt(partial: dict[str, Any]) -> None:
        heard.append(partial)
        if len(heard) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(plan(network(folder, "generator"), modes=("int8",)), interrupt)
    kept = document.checked(heard[-1])
    assert kept["partial"] is True
    assert kept["variants"][0]["size"]["file"] > 0


@needs_package
def test_labels_and_files_on_disk(folder: Path, tmp_path: Path) -> None:
    given = network(folder, "classifier")
    x = np.random.default_rng(0).random((9, 3, 24, 32), "f4")
    native = Native.of(given)
    best = np.array([int(native.run({"x": sample[np.newaxis]})["best"][0]) for sample in x])
    best[0] = (best[0] + 1) % 10
    np.save(tmp_path / "y.npy", best)
    path = tmp_path / "small.safetensors"
    shrink.save(shrink.quantize(shrink.load(folder / "classifier.onnx"), "int8"), path)
    np.savez(tmp_path / "a.npz", x=x)
    inputs = Inputs(tmp_path / "a.npz", tmp_path / "y.npy")
    found = measure(plan(given, files=(path,), inputs=inputs))
    assert [v["name"] for v in found["variants"]] == ["float32", "small"]
    assert found["variants"][1]["file"] == str(path)
    assert found["inputs"] == {"source": "a.npz", "count": 9, "labels": True}
    figures = found["variants"][0]["accuracy"]["native"]
    assert figures["top1_accuracy"] == pytest.approx(8 / 9)
    assert figures["perplexity"] > 1
    assert found["variants"][1]["accuracy"]["native"]["top1_agreement"] > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ("int8", "nonsense")}, "nonsense"),
        ({"modes": ("int8", "int8")}, "named twice"),
        ({"modes": ("+".join(["prune"] * 40),)}, "more than 200 characters"),
        ({"browser": BrowserOptions(backends=("webgl",))}, "no backend 'webgl'"),
        ({"browser": BrowserOptions(network="56k")}, "no network '56k'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_at_once(folder: Path, options: dict[str, Any], words: str) -> None:
    heard: list[dict[str, Any]] = []
    asked = dataclasses.replace(plan(network(folder, "generator")), **options)
    with pytest.raises(UsageError, match=words):
        measure(asked, heard.append)
    assert heard == []


@needs_package
def test_a_mode_that_does_not_go_stands_in_the_document(folder: Path, tmp_path: Path) -> None:
    proto = pages.generator()
    weight = next(i for i in proto.graph.initializer if i.name == "fc/W")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, "fc/W"))
    onnx.save(proto, tmp_path / "nan.onnx")
    given, _ = given_network.network(str(tmp_path / "nan.onnx"), None, ())
    found = measure(plan(given, modes=("int8",)))
    assert [v["name"] for v in found["variants"]] == ["float32"]
    missing = {entry["what"]: entry["why"] for entry in found["not_measured"]}
    assert "NaN" in missing["int8"]
    assert document.checked(found)["variants"][0]["accuracy"]["native"]["problem"] == "the outputs hold NaN or infinity"
