"""Exports to ONNX Runtime Web, opened in a real browser: what the page computes is what Python computes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shrink import formats, site
from shrink.errors import BadInput, IntegrityError, OutputError, UsageError
from shrink.export import _npm
from shrink.serve import Server
from tests import browser as browsers
from tests.command import run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

F32 = NDArray[np.float32]
Outputs = dict[str, F32]

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tests" / "node_modules" / "onnxruntime-web"
needs_package = pytest.mark.skipif(
    not (PACKAGE / "package.json").is_file(), reason="onnxruntime-web is not installed: run `npm ci` in tests/"
)

needs_chainer = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("chainer", "webdnn")), reason="chainer and webdnn are not installed"
)
needs_emscripten = pytest.mark.skipif(
    shutil.which("em++") is None or not PACKAGE.with_name("webdnn").is_dir(),
    reason="emscripten, or the npm package webdnn in tests/, is not installed",
)

# A software adapter, so that WebGPU is there on any machine.
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


# --- networks --------------------------------------------------------------------------------------------------


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any], opset: int = 17) -> Any:
    initializers = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def generator() -> Any:
    """A vector to a picture of 16×16, and a row of scores."""
    rng = np.random.default_rng(0)

    def normal(scale: float, *shape: int) -> F32:
        return (rng.standard_normal(shape) * scale).astype("f4")

    weights = {
        "fc/W": normal(0.5, 512, 20),
        "fc/b": normal(0.1, 512),
        "shape": np.array([1, 32, 4, 4], "i8"),
        "逆畳み込み/W": normal(0.1, 32, 16, 4, 4),
        "c1/b": normal(0.1, 16),
        "c2/W": normal(0.1, 16, 3, 4, 4),
        "c2/b": normal(0.1, 3),
        "scores/W": normal(0.1, 30, 512),
    }
    up: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [4, 4]}
    nodes = [
        helper.make_node("Gemm", ["z", "fc/W", "fc/b"], ["fc"], transB=1),
        helper.make_node("Relu", ["fc"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["planes"]),
        helper.make_node("ConvTranspose", ["planes", "逆畳み込み/W", "c1/b"], ["c1"], **up),
        helper.make_node("Relu", ["c1"], ["h1"]),
        helper.make_node("ConvTranspose", ["h1", "c2/W", "c2/b"], ["c2"], **up),
        helper.make_node("Sigmoid", ["c2"], ["image"]),
        helper.make_node("Gemm", ["h", "scores/W"], ["scores"], transB=1),
    ]
    value = helper.make_tensor_value_info
    outputs = [
        value("image", TensorProto.FLOAT, ["N", 3, 16, 16]),
        value("scores", TensorProto.FLOAT, ["N", 30]),
    ]
    return model_of(nodes, [value("z", TensorProto.FLOAT, ["N", 20])], outputs, weights)


def classifier() -> Any:
    """A fire module as SqueezeNet has, on a picture; the answer is a table of one largest value and where it is."""
    rng = np.random.default_rng(1)

    def conv(name: str, x: str, into: int, out: int, kernel: int) -> list[Any]:
        weights[f"{name}/W"] = (rng.standard_normal((out, into, kernel, kernel)) / (into * kernel)).astype("f4")
        weights[f"{name}/b"] = (rng.standard_normal(out) * 0.1).astype("f4")
        pad = [kernel // 2] * 4
        return [
            helper.make_node("Conv", [x, f"{name}/W", f"{name}/b"], [f"{name}.y"], pads=pad),
            helper.make_node("Relu", [f"{name}.y"], [name]),
        ]

    weights: dict[str, Any] = {}
    nodes = [
        *conv("first", "x", 3, 16, 3),
        helper.make_node("MaxPool", ["first"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        *conv("squeeze", "pooled", 16, 8, 1),
        *conv("expand1", "squeeze", 8, 32, 1),
        *conv("expand3", "squeeze", 8, 32, 3),
        helper.make_node("Concat", ["expand1", "expand3"], ["fire"], axis=1),
        *conv("last", "fire", 64, 10, 1),
        helper.make_node("GlobalAveragePool", ["last"], ["average"]),
        helper.make_node("Flatten", ["average"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["y"], axis=1),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("y", TensorProto.FLOAT, [1, 10]), value("best", TensorProto.INT64, [1])]
    return model_of(nodes, [value("x", TensorProto.FLOAT, [1, 3, "h", "w"])], outputs, weights, opset=13)


NETWORKS = {"generator": (generator, []), "classifier": (classifier, ["--input", "1,3,24,32"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    for name, (make, _) in NETWORKS.items():
        onnx.save(make(), folder / f"{name}.onnx")
    return folder


def exported(folder: Path, network: str, *options: str) -> Path:
    """The site of a network with these options, made once."""
    out = folder / "-".join([network, *(o.strip("-") for o in options)])
    if not out.exists():
        inputs = NETWORKS[network][1]
        arguments = [folder / f"{network}.onnx", "--to", "onnxruntime-web", "--runtime", PACKAGE, *inputs]
        done = run("export", *arguments, *options, "-o", out)
        assert done.code == 0, done.stderr
    return out


def python_outputs(folder: Path, network: str, mode: str | None, seed: int) -> Outputs:
    """What native ONNX Runtime computes from the weights that `shrink quantize` gives."""
    import onnxruntime  # type: ignore[import-untyped]

    proto = onnx.load(folder / f"{network}.onnx")
    if mode is not None:
        path = folder / f"{network}.{mode}.safetensors"
        if not path.exists():
            assert run("quantize", folder / f"{network}.onnx", "--mode", mode, "-o", path).code == 0
        model = formats.sniff(path).read(path)
        for initializer in proto.graph.initializer:
            values = model[initializer.name].array
            wide = values.astype("f4") if values.dtype.kind == "f" else values
            initializer.CopyFrom(numpy_helper.from_array(wide, initializer.name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    feeds = {}
    for number, (info, shape) in enumerate(zip(session.get_inputs(), [shape_of(network)], strict=True)):
        feeds[info.name] = site.seeded_input(seed, number, shape, "float32")
    values = session.run(None, feeds)
    return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}


def shape_of(network: str) -> tuple[int, ...]:
    return {"generator": (1, 20), "classifier": (1, 3, 24, 32)}[network]


# --- the browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = [a for a in browsers._ARGUMENTS if a != "--disable-gpu"] + WEBGPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browsers, "_ARGUMENTS", arguments)
        with browsers.chromium() as browser:
            yield browser


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Opened:
    """A page that was opened, and what went wrong in it."""

    def __init__(self, page: Page, url: str):
        self.page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        page.locator("#timings tr, #error:not([hidden])").first.wait_for(timeout=60_000)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def outputs(self) -> Outputs:
        found = self.page.evaluate(
            "import('./page.js').then(({ last }) => Object.entries(last.outputs)"
            ".map(([name, { dims, data }]) => [name, dims, Array.from(data, Number)]))"
        )
        return {name: np.array(data).reshape(dims) for name, dims, data in found}


@contextmanager
def opened(browser: Browser, url: str, script: str = "", **options: Any) -> Iterator[Opened]:
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        if script:
            page.add_init_script(script)
        yield Opened(page, url)
    finally:
        context.close()


def assert_close(page: Outputs, python: Outputs) -> None:
    assert page.keys() == python.keys()
    for name, values in python.items():
        assert page[name].shape == values.shape
        assert np.abs(page[name] - values).max() < 1e-5, name


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
    weights.write_bytes(weights.read_bytes()[:-100])
    with served(out) as url, opened(browser, url) as page:
        assert "LoadError" in page.text("#error")
        assert page.page.locator("canvas").count() == 0


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


# --- what the page shows ---------------------------------------------------------------------------------------


@needs_package
def test_pictures_tables_and_figures(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    python = python_outputs(folder, "generator", None, 0)
    with served(out) as url, opened(browser, url) as page:
        pixels = page.page.evaluate(
            "(() => { const c = document.querySelector('canvas');"
            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
        )
        shown = np.array(pixels).reshape(16, 16, 4)
        expected = np.moveaxis(python["image"][0], 0, 2) * 255
        assert np.abs(shown[..., :3] - expected).max() <= 0.51
        assert (shown[..., 3] == 255).all()
        first = page.text("#outputs table tr >> nth=0").split()
        assert first == [str(python["scores"].argmax()), f"{python['scores'].max():.6g}"]
        assert page.page.locator("#timings tr").count() == 6
        names = ("weights.safetensors", "model.onnx", "runtime/ort-wasm-simd-threaded.wasm.gz")
        total = sum((out / name).stat().st_size for name in names)
        assert page.page.evaluate("[progress.value, progress.max]") == [total, total]
        weights = (out / "weights.safetensors").stat().st_size
        assert f"{weights / 1e6:.2f} MB" in page.text("#sizes")


@needs_package
def test_a_phone_a_keyboard_and_the_dark(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    dark: dict[str, Any] = {"viewport": {"width": 320, "height": 568}, "color_scheme": "dark"}
    with served(out) as url, opened(browser, url, **dark) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 320
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        page.page.keyboard.press("Tab")
        assert page.page.evaluate("document.activeElement.id") == "seed"
        page.page.keyboard.press("Control+A")
        page.page.keyboard.type("4294967295")
        page.page.keyboard.press("Enter")
        page.page.get_by_text("Run in").wait_for()
        assert_close(page.outputs(), python_outputs(folder, "generator", None, 2**32 - 1))


@needs_package
def test_the_page_may_not_evaluate_text_or_reach_out(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    with served(out) as url, browsers.serve(out) as other, opened(browser, url) as page:
        # What the test itself asks for may evaluate; what the page does later may not.
        for attempt in ("new Function('return 1')()", f"await fetch('{other}/model.onnx', {{ mode: 'no-cors' }})"):
            later = f"(async () => {{ try {{ {attempt}; return 'done'; }} catch (error) {{ return error.name; }} }})"
            name = page.page.evaluate(f"new Promise((tell) => setTimeout(() => {later}().then(tell)))")
            assert name in ("EvalError", "TypeError")


@needs_package
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("weights.safetensors", "missing", "weights.safetensors: the server answered 404"),
        ("weights.safetensors", "cut", "weights.safetensors: "),
        ("weights.safetensors", "flipped", "weights.safetensors: "),
        ("model.onnx", "missing", "model.onnx: the server answers 404"),
        ("model.onnx", "flipped", "model.onnx: it is not the file that was exported"),
        ("runtime/ort-wasm-simd-threaded.wasm.gz", "cut", "belong there"),
        ("runtime/ort.wasm.min.js", "missing", "ort.wasm.min.js"),
        ("manifest.json", "missing", "manifest.json: the server answers 404"),
        ("shrink/loader.js", "missing", "TypeError"),
    ],
)
def test_what_is_damaged_is_said_and_nothing_is_drawn(
    browser: Browser, folder: Path, tmp_path: Path, file: str, damage: str, words: str
) -> None:
    out = tmp_path / "site"
    shutil.copytree(exported(folder, "generator"), out)
    data = bytearray((out / file).read_bytes())
    if damage == "missing":
        (out / file).unlink()
    elif damage == "cut":
        (out / file).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) * 3 // 4] ^= 4
        (out / file).write_bytes(data)
    with served(out) as url, opened(browser, url) as page:
        assert words in page.text("#error")
        assert page.text("#error").endswith(("(LoadError)", "(TypeError)"))
        assert page.text("#status") == "The network could not be run."
        assert page.page.locator("canvas").count() == 0
        assert not page.page.locator("#result").is_visible()


# --- the folder ------------------------------------------------------------------------------------------------


def all_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


# --- where the runtime comes from ------------------------------------------------------------------------------


def tarball(version: str, *leave_out: str) -> bytes:
    """A package of the layout of the real one, with small files."""
    files = {"package.json": json.dumps({"name": "onnxruntime-web", "version": version}).encode()}
    for api, module in (
        ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
        ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.jsep"),
    ):
        files[f"dist/{api}"] = f'import("{module}.mjs")'.encode()
        files[f"dist/{module}.mjs"] = files[f"dist/{module}.wasm"] = module.encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name in files.keys() - set(leave_out):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
        archive.addfile(tarfile.TarInfo("../../escaped"))
    return out.getvalue()


@contextmanager
def registry(data: bytes | None) -> Iterator[tuple[str, list[str]]]:
    """A registry that answers everything with `data`, or that nothing is there; and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without node_modules, with a cache of its own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def find(elsewhere: Path, address: str = "http://127.0.0.1:9/") -> _npm.Package:
    environment = {"XDG_CACHE_HOME": str(elsewhere / "cache"), "npm_config_registry": address}
    return _npm.find("onnxruntime-web", None, lambda name, done, total: None, environment)


def pin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    pinned = _npm.Pin("1.2.3", hashlib.sha512(data).digest())
    monkeypatch.setattr(_npm, "pinned", lambda name: pinned)


def test_the_runtime_is_downloaded_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tarball("1.2.3")
    pin(monkeypatch, data)
    with registry(data) as (address, asked):
        found = find(elsewhere, address)
        assert find(elsewhere, address) == found
    assert asked == ["/onnxruntime-web/-/onnxruntime-web-1.2.3.tgz"]
    assert found == _npm.Package("onnxruntime-web", "1.2.3", elsewhere / "cache" / "shrink" / "onnxruntime-web-1.2.3")
    assert all_files(found.folder).keys() == {
        "package.json",
        *(f"dist/{api}" for api in ("ort.wasm.min.mjs", "ort.webgpu.min.mjs")),
        *(f"dist/ort-wasm-simd-threaded{kind}" for kind in (".mjs", ".wasm", ".jsep.mjs", ".jsep.wasm")),
    }
    assert sorted(p.name for p in elsewhere.iterdir()) == ["cache", "cwd"]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("changed", IntegrityError, "SHA-512"),
        ("incomplete", BadInput, "says nothing about itself"),
        ("no archive", BadInput, "is no archive"),
        ("missing", OutputError, "npm install onnxruntime-web@1.2.3"),
        ("unreachable", OutputError, "npm install onnxruntime-web@1.2.3"),
    ],
)
def test_a_bad_download_leaves_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], words: str
) -> None:
    data = {"no archive": b"no archive", "incomplete": tarball("1.2.3", "package.json")}.get(kind, tarball("1.2.3"))
    pin(monkeypatch, data)
    answer = {"changed": data + b"\0", "missing": None}.get(kind, data)
    with registry(answer) as (address, _), pytest.raises(error, match=words):
        find(elsewhere, "http://127.0.0.1:9/" if kind == "unreachable" else address)
    assert list((elsewhere / "cache" / "shrink").iterdir()) == []


def test_node_modules_is_taken_where_its_version_is_the_pinned_one(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tarball("1.2.3")
    pin(monkeypatch, data)
    folder = elsewhere / "node_modules" / "onnxruntime-web"
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.2.3"}))
    assert find(elsewhere).folder == folder
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.2.4"}))
    with pytest.raises(OutputError, match=r"onnxruntime-web 1\.2\.3 could not be downloaded"):
        find(elsewhere)
    assert _npm.find("onnxruntime-web", folder, lambda name, done, total: None).version == "1.2.4"
    with pytest.raises(UsageError):
        _npm.find("onnxruntime-web", elsewhere, lambda name, done, total: None)


@needs_package
def test_the_tests_run_what_users_get() -> None:
    assert json.loads((PACKAGE / "package.json").read_text())["version"] == _npm.pinned("onnxruntime-web").version
