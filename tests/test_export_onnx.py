"""Exports to ONNX Runtime Web, opened in a real browser: what the page computes is what Python computes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from shrink import formats, site
from tests import browser as browsers
from tests.command import run
from tests.pages import (
    F32,
    PACKAGE,
    ROOT,
    all_files,
    assert_close,
    chromium,
    exported,
    generator,
    needs_chainer,
    needs_emscripten,
    needs_package,
    opened,
    put_networks,
    python_outputs,
    served,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_networks(tmp_path_factory.mktemp("networks"))


# --- what the page computes ------------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize(
    ("network", "mode"),
    [
        ("generator", None),
        ("generator", "eightbit"),
        ("generator", "int8"),
        ("generator", "float16"),
        ("classifier", None),
        ("classifier", "prune,eightbit"),
        ("classifier", "int4"),
    ],
)
def test_the_page_computes_what_python_computes(browser: Browser, folder: Path, network: str, mode: str | None) -> None:
    out = exported(folder, network, *(["--mode", mode] if mode else []))
    with served(out) as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        assert_close(page.outputs(), python_outputs(folder, network, mode, 0))
        assert page.page.evaluate("crossOriginIsolated")
        assert "WebAssembly" in page.text("#status")
        assert [r for r in page.requests if not r.startswith((url, "data:"))] == []
        assert page.faults == []


@needs_package
@pytest.mark.parametrize("mode", [None, "int8"])
def test_webgpu_computes_what_python_computes(browser: Browser, folder: Path, mode: str | None) -> None:
    out = exported(folder, "generator", "--backend", "webgpu", *(["--mode", mode] if mode else []))
    with served(out) as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        assert "WebGPU" in page.text("#status"), "this Chromium gives no software adapter for WebGPU"
        assert "no WebGPU" not in page.text("#status"), "this Chromium gives no software adapter for WebGPU"
        assert_close(page.outputs(), python_outputs(folder, "generator", mode, 0))


@needs_package
def test_without_webgpu_the_page_says_so_and_runs(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator", "--backend", "webgpu")
    none = "Object.defineProperty(Navigator.prototype, 'gpu', { value: undefined })"
    with served(out) as url, opened(browser, url, script=none) as page:
        assert "no WebGPU" in page.text("#status")
        assert_close(page.outputs(), python_outputs(folder, "generator", None, 0))


@needs_package
def test_on_a_host_without_headers_there_is_one_thread(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    with browsers.serve(out) as url, opened(browser, f"{url}/index.html") as page:
        assert not page.page.evaluate("crossOriginIsolated")
        assert "1 thread." in page.text("#status")
        assert_close(page.outputs(), python_outputs(folder, "generator", None, 0))
        assert page.faults == []


@needs_package
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_a_model_that_was_quantized_before_keeps_its_weights(
    browser: Browser, folder: Path, tmp_path: Path, suffix: str
) -> None:
    quantized = tmp_path / f"quantized{suffix}"
    assert run("quantize", folder / "generator.onnx", "--mode", "eightbit", "-o", quantized).code == 0
    out = tmp_path / "site"
    done = run("export", quantized, "--to", "onnxruntime-web", "--runtime", PACKAGE, "-o", out)
    assert done.code == 0, done.stderr
    # Codes travel packed, not as float32 and not as they stand in the graph.
    assert (out / "weights.safetensors").stat().st_size + (out / "model.onnx").stat().st_size < 42_000
    with served(out) as url, opened(browser, url) as page:
        assert_close(page.outputs(), python_outputs(folder, "generator", "eightbit", 0))


# --- Chainer networks, on both targets -------------------------------------------------------------------------


def generator_options(target: str) -> list[str]:
    models = ROOT / "benchmarks" / "models"
    stock = PACKAGE.with_name(target)
    return [f"{models / 'networks.py'}:Generator", "--weights", str(models / "cdcgan.npz"), "--input", "1,110",
            "--to", target, "--runtime", str(stock)]  # fmt: skip


def chainer_output(weights: Path) -> F32:
    """What Chainer makes of the page's input for seed 0."""
    from shrink.networks import chainer

    chain = chainer.load(
        f"{ROOT / 'benchmarks' / 'models' / 'networks.py'}:Generator", formats.sniff(weights).read(weights)
    )
    (output,) = chainer.run(chain, [site.seeded_input(0, 0, (1, 110), "float32")])
    return output


@needs_package
@needs_chainer
@pytest.mark.parametrize("mode", [None, "eightbit"])
def test_a_chainer_network_on_onnxruntime_web(browser: Browser, tmp_path: Path, mode: str | None) -> None:
    weights = ROOT / "benchmarks" / "models" / "cdcgan.npz"
    out, quantized = tmp_path / "site", tmp_path / "quantized.safetensors"
    done = run("export", *generator_options("onnxruntime-web"), *(["--mode", mode] if mode else []), "-o", out)
    assert done.code == 0, done.stderr
    assert "As ONNX it differs from Chainer by at most" in done.stdout
    if mode:
        assert run("quantize", weights, "--mode", mode, "-o", quantized).code == 0
    with served(out) as url, opened(browser, url) as page:
        (output,) = page.outputs().values()
        assert np.abs(output - chainer_output(quantized if mode else weights)).max() < 1e-5


@needs_chainer
@needs_emscripten
@pytest.mark.parametrize(("mode", "bound"), [(None, 1e-5), ("eightbit", 0.1), ("int8", 0.1)])
def test_a_chainer_network_on_webdnn(browser: Browser, tmp_path: Path, mode: str | None, bound: float) -> None:
    """How near a quantized one is to what Python computes from its decoded weights is tested beside the target."""
    out = tmp_path / "site"
    done = run("export", *generator_options("webdnn"), *(["--mode", mode] if mode else []), "-o", out)
    assert done.code == 0, done.stderr
    expected = chainer_output(ROOT / "benchmarks" / "models" / "cdcgan.npz")
    with served(out) as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        assert page.page.locator("canvas").count() == 1
        (output,) = page.outputs().values()
        assert output.shape == expected.shape
        assert np.abs(output - expected).max() < bound
        assert [r for r in page.requests if not r.startswith((url, f"blob:{url}", "data:"))] == []
        assert page.faults == []
    weights = out / json.loads((out / "manifest.json").read_text())["weights"]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with served(out) as url, opened(browser, url) as page:
        assert "LoadError" in page.text("#error")
        assert page.page.locator("canvas").count() == 0
    weights.write_bytes(whole)
    (out / "runtime" / "webdnn.js").unlink()
    with served(out) as url, opened(browser, url) as page:
        assert "webdnn.js: the server answers 404" in page.text("#error")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net.py:Net", "--input", "1,110"], "a network in Python needs --weights"),
        (["net.py:Net", "--weights", "w.npz"], "a network in Python needs --input"),
        (["net.onnx", "--weights", "w.npz"], "--weights belongs to a network in Python"),
        (["net.onnx", "--to", "webdnn", "--backend", "wasm"], "--backend is not for webdnn"),
    ],
)
def test_options_that_do_not_belong_together(tmp_path: Path, arguments: list[str], words: str) -> None:
    to = [] if "--to" in arguments else ["--to", "onnxruntime-web"]
    done = run("export", *arguments, *to, "-o", tmp_path / "site")
    assert done.code == 2
    assert words in done.stderr


# --- the folder ------------------------------------------------------------------------------------------------


@needs_package
def test_the_same_input_gives_the_same_bytes_and_the_manifest_lists_them(folder: Path, tmp_path: Path) -> None:
    first = exported(folder, "generator", "--mode", "int8")
    arguments = [folder / "generator.onnx", "--to", "onnxruntime-web", "--runtime", PACKAGE, "--mode", "int8"]
    assert run("export", *arguments, "-o", tmp_path / "again").code == 0
    files = all_files(first)
    assert files == all_files(tmp_path / "again")
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"].keys() == files.keys()
    for name, about in manifest["files"].items():
        digest = base64.b64encode(hashlib.sha256(files[name]).digest()).decode()
        assert about == {"bytes": len(files[name]), "integrity": f"sha256-{digest}"}
    # A static host may limit files to 25 MiB; a visitor on WebAssembly downloads less than 3 MB beside the weights.
    assert sum(map(len, files.values())) - len(files["weights.safetensors"]) < 3_200_000
    assert max(map(len, all_files(exported(folder, "generator", "--backend", "webgpu")).values())) < 25 << 20


@needs_package
def test_a_folder_of_someone_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    arguments = ["export", folder / "generator.onnx", "--to", "onnxruntime-web", "--runtime", PACKAGE]
    out = tmp_path / "site"
    out.mkdir()
    assert run(*arguments, "-o", out).code == 0
    assert run(*arguments, "-o", out).code == 2
    assert run(*arguments, "-o", out, "--force").code == 0
    (out / "mine.txt").write_text("mine")
    done = run(*arguments, "-o", out, "--force")
    assert done.code == 2
    assert "did not export" in done.stderr
    assert (out / "mine.txt").read_text() == "mine"


@needs_package
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--backend", "webgl"], 2, "there is no backend 'webgl' (known: wasm, webgpu)"),
        (["--to", "nothing"], 2, "there is no target 'nothing'"),
        (["--input", "1,21"], 2, "--input 1,21 does not fit the input z: [?, 20]"),
        (["--input", "y=1,20"], 2, "the model has no input y (it has z)"),
        (["--input", "1,x"], 2, "'1,x' is no shape"),
        (["--input", "1,20", "--input", "1,20"], 2, "--input is given 2 times, the model has 1 inputs"),
        (["--mode", "tiny"], 2, "tiny"),
        (["--runtime", "."], 2, "not a folder of the npm package onnxruntime-web"),
    ],
)
def test_what_cannot_be_asked(folder: Path, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    arguments = ["export", folder / "generator.onnx", "--to", "onnxruntime-web", "--runtime", PACKAGE, *options]
    done = run(*arguments, "-o", tmp_path / "site")
    assert done.code == code
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(folder: Path, tmp_path: Path) -> None:
    newest = generator()
    newest.opset_import[0].version = 23
    onnx.save(newest, tmp_path / "newest.onnx")
    np.savez(tmp_path / "weights.npz", W=np.ones((4, 4), "f4"))
    for name, code, words in [
        ("newest.onnx", 3, "its opset is 23, ONNX Runtime Web 1.22.0 runs 22 and older"),
        ("weights.npz", 2, "this model has only weights"),
    ]:
        done = run("export", tmp_path / name, "--to", "onnxruntime-web", "-o", tmp_path / "site")
        assert done.code == code, done.stderr
        assert words in done.stderr
    done = run("export", folder / "classifier.onnx", "--to", "onnxruntime-web", "-o", tmp_path / "site")
    assert done.code == 2
    assert "leaves the shape of its input x open: [1, 3, ?, ?]" in done.stderr
    assert not (tmp_path / "site").exists()


def test_the_generator_of_inputs() -> None:
    # What its author's JavaScript gives for seed 0: 1144304738, 1416247, 958946056.
    bits = np.array([1144304738, 1416247, 958946056])
    assert site.seeded_input(0, 0, (3,), "float32").tolist() == ((bits >> 8) / 2**23 - 1).tolist()
    assert site.seeded_input(0, 0, (3,), "int64").tolist() == [0, 0, 0]
    values = site.seeded_input(2**32 - 1, 3, (2, 3, 1000), "float32")
    assert values.shape == (2, 3, 1000)
    assert -1 <= values.min() < -0.99
    assert 0.99 < values.max() < 1
