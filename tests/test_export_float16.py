"""Networks in float16: weights travel in our container, and the page hands the runtime their exact bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from shrink import formats, site
from tests.command import run
from tests.pages import (
    PACKAGE,
    ROOT,
    assert_close,
    chromium,
    exported,
    model_of,
    needs_package,
    opened,
    put_networks,
    python_outputs,
    served,
    shape_of,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WITHOUT_ARRAYS = "delete globalThis.Float16Array"
# One step of float16 at 1, the largest output: sums in another order may round to the next number.
STEP = 2.0**-10


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_networks(tmp_path_factory.mktemp("networks"))


# --- the conversion --------------------------------------------------------------------------------------------

CONVERT = """async bits => {
    const { toHalves, fromHalves } = await import("/float16.js");
    const halves = toHalves(new Float32Array(Uint32Array.from(bits).buffer));
    const all = Uint16Array.from({ length: 65536 }, (_, half) => half);
    return [Array.from(halves), Array.from(new Uint32Array(fromHalves(all).buffer))];
}"""


def test_the_page_rounds_as_numpy_does(browser: Browser) -> None:
    halves = np.arange(1 << 16, dtype="<u2").view("<f2").astype("<f4")
    finite = np.sort(halves[np.isfinite(halves)])
    # Numbers halfway between two of float16, 65520 among them, and those next to them on either side.
    middles = np.append((finite[1:] + finite[:-1]) / 2, np.array([65520, -65520], "f4"))
    beside = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint64).astype("<u4").view("<f4")
    values = np.concatenate([halves, middles, *beside, any_bits])
    with served(ROOT / "shrink" / "web") as url:
        page = browser.new_page()
        page.goto(f"{url}pages/page.css")  # any file: what counts is where it comes from
        narrow, wide = page.evaluate(CONVERT, values.view("<u4").tolist())
        page.close()
    with np.errstate(over="ignore"):
        expected = values.astype("<f2")
    assert np.array_equal(np.array(narrow, "<u2"), expected.view("<u2"))
    assert np.array_equal(np.array(wide, "<u4").view("<f4"), halves, equal_nan=True)


# --- in the page -----------------------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize("script", ["", WITHOUT_ARRAYS], ids=["", "no Float16Array"])
@pytest.mark.parametrize(
    ("network", "mode"),
    [
        ("half-generator", None),
        ("half-generator", "eightbit"),
        ("half-generator", "prune,int8"),
        ("half-classifier", None),
        ("half-classifier", "int4"),
    ],
)
def test_the_page_computes_what_python_computes(
    browser: Browser, folder: Path, network: str, mode: str | None, script: str
) -> None:
    out = exported(folder, network, *(["--mode", mode] if mode else []))
    python = python_outputs(folder, network, mode, 0)
    with served(out) as url, opened(browser, url, script) as page:
        assert page.text("#error") == ""
        assert page.page.evaluate("typeof Float16Array") == ("undefined" if script else "function")
        assert_close(page.outputs(), python, STEP)
        assert page.faults == []
        [fed] = page.feeds().values()
        assert fed == site.seeded_input(0, 0, shape_of(network), "float16").reshape(-1).tolist()
        assert "float16" in page.text("#outputs")
        if network == "half-generator":
            assert page.page.locator("canvas").count() == 1


BITS = """async () => {
    const { load } = await import("./shrink/loader.js");
    const { toHalves } = await import("./shrink/float16.js");
    const weights = await load("weights.safetensors");
    return [...weights].map(([name, values]) => [name, Array.from(toHalves(values))]);
}"""


@needs_package
@pytest.mark.parametrize("mode", [None, "eightbit", "int8", "int4", "prune,eightbit"])
def test_the_runtime_gets_the_bits_that_python_decodes(
    browser: Browser, folder: Path, tmp_path: Path, mode: str | None
) -> None:
    out = exported(folder, "half-generator", *(["--mode", mode] if mode else []))
    model = formats.by_name("onnx").read(folder / "half-generator.onnx")
    if mode:
        quantized = tmp_path / "quantized.safetensors"
        assert run("quantize", folder / "half-generator.onnx", "--mode", mode, "-o", quantized).code == 0
        model = formats.by_name("safetensors").read(quantized)
    external = json.loads((out / "manifest.json").read_text())["external"]
    with served(out) as url, opened(browser, url) as page:
        found = dict(page.page.evaluate(BITS))
    assert found.keys() == external.keys() == {"fc/W", "scores/W", "c2/W", "逆畳み込み/W"}
    for name, bits in found.items():
        expected = model[name].array.astype("<f2").reshape(-1).view("<u2")
        assert np.array_equal(np.array(bits, "<u2"), expected), name
        assert external[name]["dtype"] == "float16"
        assert external[name]["bytes"] == expected.nbytes


@needs_package
def test_float16_is_not_offered_to_a_webgpu_without_it(browser: Browser, folder: Path) -> None:
    out = exported(folder, "half-generator", "--backend", "webgpu")
    none = "GPUSupportedFeatures.prototype.has = (name) => name !== 'shader-f16'"
    with served(out) as url, opened(browser, url, none) as page:
        assert "no float16 on WebGPU here, so the network runs on WebAssembly." in page.text("#status")
        assert_close(page.outputs(), python_outputs(folder, "half-generator", None, 0), STEP)


# --- what travels ----------------------------------------------------------------------------------------------


def graph_bytes(site: Path) -> int:
    return (site / "model.onnx").stat().st_size


@needs_package
@pytest.mark.parametrize("network", ["generator", "half-generator"])
@pytest.mark.parametrize("mode", ["float16", "eightbit", "int8", "int4"])
def test_what_the_table_calls_coded_is_coded(folder: Path, network: str, mode: str) -> None:
    """Never the plain numbers in the graph, where nothing compresses them."""
    out = exported(folder, network, "--mode", mode)
    plain = exported(folder, network)
    assert graph_bytes(out) == graph_bytes(plain) < 6000
    stored = formats.by_name("safetensors").read(out / "weights.safetensors")
    assert {e.name for e in stored.tensors} >= {"fc/W", "scores/W", "c2/W", "逆畳み込み/W"}


@needs_package
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_small_tensors_that_are_coded_travel_coded_too(tmp_path: Path, dtype: str) -> None:
    weights: dict[str, NDArray[Any]] = {"W": np.random.default_rng(0).standard_normal((8, 8)).astype(dtype)}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    onnx.save(model_of(nodes, [value("x", kind, [1, 8])], [value("y", kind, [1, 8])], weights), tmp_path / "m.onnx")
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\ntensors = "W"\nmode = "int8"\n')
    out = tmp_path / "site"
    arguments = ["--to", "onnxruntime-web", "--runtime", PACKAGE, "--recipe", rules, "-o", out]
    done = run("export", tmp_path / "m.onnx", *arguments)
    assert done.code == 0, done.stderr
    assert "1 int8" in done.stdout
    (stored,) = formats.by_name("safetensors").read(out / "weights.safetensors").tensors
    assert stored.name == "W"
    assert json.loads((out / "manifest.json").read_text())["external"]["W"]["bytes"] == weights["W"].nbytes


@needs_package
@pytest.mark.parametrize("mode", [None, "eightbit", "int8"])
def test_float64_weights(browser: Browser, tmp_path: Path, mode: str | None) -> None:
    rng = np.random.default_rng(2)
    weights = {"W": rng.standard_normal((64, 40)), "b": rng.standard_normal(40)}
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["y"])]
    double = TensorProto.DOUBLE
    model = model_of(nodes, [value("x", double, [1, 64])], [value("y", double, [1, 40])], weights)
    onnx.save(model, tmp_path / "double.onnx")
    out, quantized = tmp_path / "site", tmp_path / "quantized.safetensors"
    arguments = ["--to", "onnxruntime-web", "--runtime", PACKAGE, *(["--mode", mode] if mode else [])]
    done = run("export", tmp_path / "double.onnx", *arguments, "-o", out)
    assert done.code == 0, done.stderr
    W = weights["W"]
    if mode:
        assert run("quantize", tmp_path / "double.onnx", "--mode", mode, "-o", quantized).code == 0
        W = formats.sniff(quantized).read(quantized)["W"].array.astype("f8")
        assert (out / "weights.safetensors").stat().st_size < 4000
    expected = site.seeded_input(0, 0, (1, 64), "float64") @ W + weights["b"]
    with served(out) as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        [y] = page.outputs().values()
        assert np.abs(y - expected).max() < 1e-12
