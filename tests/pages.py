"""Exported sites for tests: a network, its site, and the page in a real Chromium."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shrink import formats, site
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


def in_half(model: Any) -> Any:
    """The same network in float16, from its inputs to its outputs."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(model)
    return model


NETWORKS: dict[str, Callable[[], Any]] = {
    "generator": generator,
    "classifier": classifier,
    "half-generator": lambda: in_half(generator()),
    "half-classifier": lambda: in_half(classifier()),
}
_INPUTS = {"classifier": ["--input", "1,3,24,32"]}
_SHAPES: dict[str, tuple[int, ...]] = {"generator": (1, 20), "classifier": (1, 3, 24, 32)}


def put_networks(folder: Path) -> Path:
    for name, make in NETWORKS.items():
        onnx.save(make(), folder / f"{name}.onnx")
    return folder


def exported(folder: Path, network: str, *options: str) -> Path:
    """The site of a network with these options, made once."""
    out = folder / "-".join([network, *(o.strip("-") for o in options)])
    if not out.exists():
        inputs = _INPUTS.get(network.removeprefix("half-"), [])
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
            own = helper.tensor_dtype_to_np_dtype(initializer.data_type)
            initializer.CopyFrom(numpy_helper.from_array(model[initializer.name].array.astype(own), initializer.name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (input,) = session.get_inputs()
    dtype = {"tensor(float)": "float32", "tensor(float16)": "float16"}[input.type]
    values = session.run(None, {input.name: site.seeded_input(seed, 0, shape_of(network), dtype)})
    return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}


def shape_of(network: str) -> tuple[int, ...]:
    return _SHAPES[network.removeprefix("half-")]


# --- the browser -----------------------------------------------------------------------------------------------


@contextmanager
def chromium() -> Iterator[Browser]:
    """With WebGPU, if by software."""
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

    def feeds(self) -> dict[str, list[float]]:
        """What the page fed last, input by input."""
        found: dict[str, list[float]] = self.page.evaluate(
            "import('./page.js').then(({ last }) => Object.fromEntries("
            "Object.entries(last.feeds).map(([name, values]) => [name, Array.from(values, Number)])))"
        )
        return found

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


def assert_close(page: Outputs, python: Outputs, bound: float = 1e-5) -> None:
    assert page.keys() == python.keys()
    for name, values in python.items():
        assert page[name].shape == values.shape
        assert np.abs(page[name] - values).max() < bound, name


def all_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
