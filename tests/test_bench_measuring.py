"""A benchmark as a whole: what cannot be measured is named, and costs nothing else."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from shrink import given
from shrink.bench import BrowserOptions, Cell, Inputs, Plan, browser, document, measure, report, size
from shrink.bench._page import absence
from shrink.bench.browser import Found
from shrink.bench.native import Native
from shrink.errors import MissingDependency, OutputError
from shrink.export import Network
from tests import pages
from tests.pages import PACKAGE, needs_package

needs_browser = pytest.mark.skipif(absence(None) is not None, reason=str(absence(None) or "there is a browser"))

NO_BROWSER = BrowserOptions(backends=())
QUICK = BrowserOptions(backends=("wasm",), runs=2, seconds=0, cold_runs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.put_networks(tmp_path_factory.mktemp("networks"))


def network(folder: Path, name: str) -> Network:
    inputs = ("1,3,24,32",) if name.endswith("classifier") else ()
    return given.network(str(folder / f"{name}.onnx"), None, inputs)[0]


def plan(network: Network, options: BrowserOptions = NO_BROWSER, **more: Any) -> Plan:
    more = {"modes": ("int8",), "runtime": PACKAGE, "inputs": Inputs(count=2), **more}
    return Plan(network, "a.onnx", "2026-11-21T07:00:00Z", browser=options, **more)


def missing(found: dict[str, Any]) -> dict[str, str]:
    return {entry["what"]: entry["why"] for entry in document.checked(found)["not_measured"]}


# Labels


def labelled(folder: Path, tmp_path: Path, name: str, labels: NDArray[Any]) -> dict[str, Any]:
    np.save(tmp_path / "y.npy", labels)
    of = network(folder, name)
    rng = np.random.default_rng(0)
    (shape,) = of.input_shapes
    inputs = {"classifier": "x", "generator": "z"}[name]
    data: Any = {inputs: rng.random((len(labels), *shape[1:])).astype("f4")}
    np.savez(tmp_path / "a.npz", **data)
    return measure(plan(of, inputs=Inputs(tmp_path / "a.npz", tmp_path / "y.npy")))


@needs_package
@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("classifier", [0, 10, 3], "there is a label 10, and the network has 10 classes, from 0 on"),
        ("generator", [0, 1, 2], "the output image is no table of classes"),
    ],
)
def test_labels_that_cannot_be_used_are_named(
    folder: Path, tmp_path: Path, name: str, labels: list[int], words: str
) -> None:
    found = labelled(folder, tmp_path, name, np.array(labels))
    assert words in missing(found)["what the labels say"]
    assert found["inputs"]["labels"] is False
    assert all(v["accuracy"]["native"]["top1_accuracy"] is None for v in found["variants"])


@needs_package
def test_labels_that_can_be_used_are(folder: Path, tmp_path: Path) -> None:
    found = labelled(folder, tmp_path, "classifier", np.array([0, 9, 3]))
    assert found["inputs"]["labels"] is True
    assert "what the labels say" not in missing(found)
    assert all(v["accuracy"]["native"]["top1_accuracy"] is not None for v in found["variants"])


# Exports


@needs_package
def test_one_backend_that_cannot_be_exported_leaves_the_sizes_of_the_other(folder: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "onnxruntime-web"
    ignored = shutil.ignore_patterns("*webgpu*", "*jsep*", "*.map", "*.all.*", "lib", "docs")
    shutil.copytree(PACKAGE, runtime, ignore=ignored)
    options = BrowserOptions(("webgpu", "wasm"), chromium=tmp_path / "none")
    found = measure(plan(network(folder, "generator"), options, runtime=runtime))
    for variant in found["variants"]:
        sizes = variant["size"]
        assert sizes["file"] > sizes["wire_raw"] > 1000
        # Packed files leave gzip nothing to do but to add its own header.
        assert 1000 < sizes["wire_gzip"] < 1.01 * sizes["wire_raw"]
        assert sizes["wire_brotli"] > 1000
        assert sizes["bits_per_weight"] > 4
        assert list(sizes["first_visit"]) == list(sizes["runtime"]) == ["wasm"]
        assert "ort.webgpu.min.mjs" in missing(found)[f"{variant['name']}: sizes on webgpu"]
    assert missing(found).keys() >= {"wasm", "wasm-1", "webgpu"}


@needs_package
def test_a_network_that_no_page_can_hold_keeps_its_file_and_its_outputs(tmp_path: Path) -> None:
    proto = pages.generator()
    for node in proto.graph.node:
        node.output[:] = ["__proto__" if name == "image" else name for name in node.output]
    proto.graph.output[0].name = "__proto__"
    onnx.save(proto, tmp_path / "odd.onnx")
    of, _ = given.network(str(tmp_path / "odd.onnx"), None, ())
    found = measure(plan(of, QUICK))
    for variant in found["variants"]:
        name = variant["name"]
        assert variant["size"]["file"] > 1000
        assert variant["size"].get("wire_raw") is None
        assert variant["accuracy"]["native"]["psnr_db"] is not None
        assert "__proto__" in missing(found)[f"{name}: sizes on wasm"]
        assert "__proto__" in missing(found)[f"{name}: weights under brotli 11"]
    assert report.render(document.checked(found))


@needs_package
@needs_browser
def test_such_a_network_says_so_in_the_cells_of_its_browser(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    proto = pages.model_of(
        [helper.make_node("MatMul", ["x", "W"], ["__proto__"])],
        [value("x", TensorProto.FLOAT, [1, 20])],
        [value("__proto__", TensorProto.FLOAT, [1, 30])],
        {"W": np.random.default_rng(0).standard_normal((20, 30)).astype("f4")},
    )
    onnx.save(proto, tmp_path / "odd.onnx")
    of, _ = given.network(str(tmp_path / "odd.onnx"), None, ())
    found = document.checked(measure(plan(of, QUICK)))
    assert [v["latency"]["wasm"]["problem"][:21] for v in found["variants"]] == ["it cannot be exported"] * 2


# Names


@needs_package
def test_names_of_any_length_cost_nothing(tmp_path: Path) -> None:
    long = "n" * 5000
    value = helper.make_tensor_value_info
    proto = pages.model_of(
        [helper.make_node("MatMul", [f"x{long}", "W"], [f"y{long}"])],
        [value(f"x{long}", TensorProto.FLOAT, [1, 60])],
        [value(f"y{long}", TensorProto.FLOAT, [1, 70])],
        {"W": np.random.default_rng(0).standard_normal((60, 70)).astype("f4")},
    )
    onnx.save(proto, tmp_path / "long.onnx")
    of, _ = given.network(str(tmp_path / "long.onnx"), None, ())
    found = document.checked(measure(plan(of)))
    names = [found["model"][part][0]["name"] for part in ("inputs", "outputs")]
    assert names == [f"{start}{long}"[:1023] + "…" for start in "xy"]
    assert found["variants"][1]["layers"][0]["output_sqnr_db"] > 20
    assert report.render(found)


# Backends


@needs_package
@pytest.mark.parametrize(("backends", "absent"), [((), {"wasm", "webgpu"}), (("wasm",), {"webgpu"})])
def test_backends_that_were_not_asked_for_are_named(
    folder: Path, tmp_path: Path, backends: tuple[str, ...], absent: set[str]
) -> None:
    options = BrowserOptions(backends, chromium=tmp_path / "none")
    found = document.checked(measure(plan(network(folder, "generator"), options)))
    unasked = {what for what, why in missing(found).items() if why == "it was left out, with --backends"}
    assert unasked == absent
    page = report.render(found)
    assert "Everything that was asked for was measured." not in page
    if not backends:
        assert "<dt>Browser</dt><dd>not measured: it was left out, with --backends</dd>" in page


def answered(name: str, cell: str, outputs: Sequence[Any]) -> Cell:
    latency = dict.fromkeys(("threads", "note", "problem", "memory_peak", "memory_how", "cold", "warm"))
    return Cell(name, cell, latency, tuple(outputs))


@needs_package
def test_each_count_of_threads_is_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WebAssembly that is wrong with one thread, and all threads that never give an answer."""

    def planted(variants: Any, samples: Any, sites: Any, options: Any, on_cell: Any, *rest: Any, **more: Any) -> Found:
        for variant in variants:
            run = Native(variant.network).run
            right = [{n: v.astype("f4") for n, v in run(s).items()} for s in samples]
            wrong = [{n: v + np.float32(0.5) for n, v in s.items()} for s in right]
            on_cell(answered(variant.name, "wasm-1", wrong if variant.name == "int8" else right))
            lost = answered(variant.name, "wasm", ())
            on_cell(dataclasses.replace(lost, latency={**lost.latency, "problem": "the page crashed"}))
        return Found({"name": "Chromium", "adapter": None, "software_adapter": None})

    monkeypatch.setattr(browser, "measure", planted)
    found = document.checked(measure(plan(network(folder, "generator"), QUICK)))
    first, small = (v["accuracy"] for v in found["variants"])
    assert (first["wasm-1"]["wrong"], small["wasm-1"]["wrong"]) == (False, True)
    assert "wasm" not in first
    page = report.render(found)
    assert "WebAssembly, 1 thread does not compute int8 as native arithmetic does" in page


# What stops it


@needs_package
def test_an_error_on_the_way_leaves_what_was_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise MissingDependency("brotli", "bench")

    monkeypatch.setattr(size, "under_brotli", fails)
    heard: list[dict[str, Any]] = []
    with pytest.raises(MissingDependency):
        measure(plan(network(folder, "generator")), heard.append)
    assert [v["name"] for v in document.checked(heard[-1])["variants"]] == ["float32", "int8"]


@needs_package
def test_a_variant_that_is_gone_when_it_is_packed_costs_only_that(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise OutputError("No space left on device", file=tmp_path)

    monkeypatch.setattr(size, "under_brotli", fails)
    found = measure(plan(network(folder, "generator")))
    assert found["partial"] is False
    assert "No space left" in missing(found)["int8: weights under brotli 11"]


# What the PSNR means


@needs_package
def test_the_peak_of_the_psnr_stands_in_the_document(folder: Path) -> None:
    found = document.checked(measure(plan(network(folder, "generator"))))
    image, scores = found["model"]["outputs"]
    # Out of a Sigmoid; and its PSNR is the one of that peak.
    assert (image["peak"], scores["peak"]) == (1.0, None)
    page = report.render(found)
    assert "PSNR and SSIM are by a peak of 1." in page
    assert "The peak of PSNR and SSIM is 1 where" in page
    old = copy.deepcopy(found)
    del old["model"]["outputs"][0]["peak"]
    assert "by a peak of" not in report.render(old)
