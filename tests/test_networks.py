"""Chainer, onnx_chainer and WebDNN run today, leave others alone, and networks come through with their weights."""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from benchmarks import train
from shrink import formats, pipeline, recipe
from shrink.errors import BadInput, MissingDependency, ShrinkError, UsageError
from shrink.model import Model, Quantized, Source, Tensor
from shrink.networks import chainer as networks
from shrink.networks import legacy
from shrink.networks.legacy import import_chainer, import_onnx_chainer, import_webdnn

for package in ("chainer", "onnx", "onnxruntime", "webdnn"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "benchmarks" / "models"
NETWORKS = MODELS / "networks.py"
SNAPSHOT = MODELS / "cdcgan.npz"


def read(path: Path) -> Model:
    return formats.sniff(path).read(path)


def in_new_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what is gone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", legacy._MENDS)
def test_every_mend_finds_its_place(module: str) -> None:
    spec = importlib.machinery.PathFinder.find_spec(module.partition(".")[0])
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes()
    for old, _ in legacy._MENDS[module]:
        assert old.encode() in source
    ast.parse(legacy.mended(module, source))


ALL_OF_THEM = "from shrink.networks.legacy import *; import_chainer(), import_onnx_chainer(), import_webdnn()"


def test_nobody_else_sees_a_change() -> None:
    code = f"""
import collections, importlib, json, sys, numpy, onnx
gone = {{"numpy": ["sctypes", "float", "int", "fromstring"], "collections": ["Collection"], "onnx": ["mapping"]}}
modules = ["pkg_resources", "onnx.mapping"]
def look():
    return [[getattr(importlib.import_module(m), n, None) for n in names] for m, names in gone.items()], [
        sys.modules.get(m) for m in modules], [f for f in sys.meta_path if f.__module__.startswith('shrink')]
before = look()
{ALL_OF_THEM}
print(before == look())
"""
    assert in_new_python(code).strip() == "True"


def test_modules_that_newer_pythons_lack_are_not_needed() -> None:
    code = f"import sys; sys.modules.update({{'pkg_resources': None, 'numpy.distutils': None}}); {ALL_OF_THEM}"
    in_new_python(code + "; print(sys.modules['pkg_resources'])")


@pytest.mark.parametrize(
    ("package", "function", "hint"),
    [
        ("chainer", "import_chainer", "shrink[chainer]"),
        ("onnx", "import_onnx_chainer", "shrink[onnx]"),
        ("webdnn", "import_webdnn", "shrink[webdnn]"),
    ],
)
def test_a_missing_package_is_named(package: str, function: str, hint: str) -> None:
    code = f"""
import sys; sys.modules[{package!r}] = None
from shrink.errors import MissingDependency
from shrink.networks import legacy
try:
    legacy.{function}()
except MissingDependency as error:
    print(error)
"""
    said = in_new_python(code)
    assert f"needs the package {package}" in said
    assert hint in said


def test_importing_twice_is_once() -> None:
    for function in (import_chainer, import_onnx_chainer, import_webdnn):
        assert function() is function()


def test_chainer_functions_that_use_old_numpy_names() -> None:
    chainer = import_chainer()
    x = chainer.Variable(np.arange(16, dtype="f4").reshape(1, 1, 4, 4))
    assert chainer.functions.resize_images(x, (2, 2)).shape == (1, 1, 2, 2)  # numpy.float
    flat = chainer.Variable(np.arange(4, dtype="f4"))
    windows = chainer.functions.as_strided(flat, (3, 2), (1, 1), 0)
    windows.grad = np.ones((3, 2), "f4")
    windows.backward()  # numpy.sctypes
    np.testing.assert_array_equal(flat.grad, [1, 2, 2, 1])


def test_webdnn_functions_that_use_old_names() -> None:
    webdnn = import_webdnn()
    numbers = {"i": np.int64(3), "f": np.float32(0.5), "a": np.arange(2)}
    assert json.loads(webdnn.util.json.dumps(numbers)) == {"i": 3, "f": 0.5, "a": [0, 1]}  # numpy.int, numpy.float
    from webdnn.backend.webassembly.graph_descriptor import GraphDescriptor

    class Kernel:
        class exec_info:
            meta_buffer = np.array([7, -1], "<i4").tobytes()

    line = GraphDescriptor.generate_kernel_metabuffer_initializer_line(None, Kernel, 5)  # numpy.fromstring
    assert line == "int meta_buf_5[] = {7,-1};\n"


def test_webdnn_says_which_shapes_do_not_fit() -> None:
    webdnn = import_webdnn()
    from webdnn.graph.operators.elementwise_add import ElementwiseAdd
    from webdnn.graph.order import OrderNC

    a, b = (webdnn.graph.variable.Variable(shape, OrderNC) for shape in ([2, 3], [2, 4]))
    with pytest.raises(AssertionError, match=r"same shape:\s+\(y\.shape\) = "):  # the f-string
        ElementwiseAdd(None)(a, b)


# --- networks from files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> Model:
    return read(SNAPSHOT)


def model_of(**arrays: Any) -> Model:
    tensors = tuple(Tensor.of(name.replace("__", "/"), np.asarray(value)) for name, value in arrays.items())
    return Model(tensors, Source("chainer-npz", Path("weights.npz"), 0))


@pytest.fixture(autouse=True)
def _nothing_left_importable() -> Iterator[None]:
    yield
    networks._make_importable(str(ROOT))


def network_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "netze für mich.py"
    path.write_text("import chainer\nimport chainer.links as L\n" + text, encoding="utf-8")
    return path


LINEAR = """
class Net(chainer.Chain):
    def __init__(self, size=2, *, bias=True):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(3, size, nobias=not bias)
    def forward(self, x):
        return self.l(x)
made = Net(2)
def make():
    return Net(2)
class Lazy(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(None, 2)
    def forward(self, x):
        return self.l(x)
"""
W, B = np.arange(6, dtype="f4").reshape(2, 3), np.array([1, -1], "f4")


@pytest.mark.parametrize("call", ["Net", "Net()", "Net(2)", "Net(size=2, bias=True)", "made", "make", "make()", "Lazy"])
def test_ways_to_name_a_network(tmp_path: Path, call: str) -> None:
    path = network_file(tmp_path, LINEAR)
    chain = networks.load(f"{path}:{call}", model_of(l__W=W, l__b=B))
    [y] = networks.run(chain, [np.ones((1, 3), "f4")])
    np.testing.assert_array_equal(y, [[4, 11]])
    assert os.listdir(tmp_path) == [path.name], "bytecode was left behind"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("Net(__import__('os'))", "not a name with literals"),
        ("Net(2 ** 2)", "not a name with literals"),
        ("Net(*[2])", "not a name with literals"),
        ("Net(**{})", "not a name with literals"),
        ("Net(", "not a name with literals"),
        ("Net.mro()", "not a name with literals"),
        ("Net; made", "not a name with literals"),
        ("Nobody", "there is no Nobody in it"),
        ("", "does not name a network"),
    ],
)
def test_arguments_are_literals(tmp_path: Path, call: str, words: str) -> None:
    path = network_file(tmp_path, LINEAR)
    with pytest.raises(UsageError, match=words):
        networks.load(f"{path}:{call}", model_of(l__W=W, l__b=B))


def test_what_names_a_network() -> None:
    assert networks.is_network("networks.py:Generator")
    assert networks.is_network("/a b/networks.py:Generator(100, x='y:z')")
    assert not networks.is_network("model.onnx")
    assert not networks.is_network("networks.py")
    assert not networks.is_network("C:/x/model.onnx")


@pytest.mark.parametrize(
    ("text", "call", "words"),
    [
        ("1 / 0", "Net", "running it failed: ZeroDivisionError: division by zero"),
        ("def", "Net", "running it failed: SyntaxError"),
        ("raise SystemExit(0)", "Net", "running it failed: SystemExit"),
        ("import not_here_at_all", "Net", "running it failed: ModuleNotFoundError"),
        ("raise ValueError('a\\x1b[31m\\nb')", "Net", r"running it failed: ValueError: a\\x1b\[31m$"),
        (LINEAR, "Net(1, 2, 3)", "Net failed: TypeError"),
        (LINEAR, "W", "there is no W"),
        ("Net = dict", "Net", "Net gives dict, not a Chainer network"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, text: str, call: str, words: str) -> None:
    path = network_file(tmp_path, text)
    with pytest.raises(ShrinkError, match=words) as caught:
        networks.load(f"{path}:{call}", model_of(l__W=W, l__b=B))
    assert caught.value.file == path


def test_a_network_that_is_made_already_takes_no_arguments(tmp_path: Path) -> None:
    path = network_file(tmp_path, LINEAR)
    for call in ("made(2)", "made(size=2)"):
        with pytest.raises(UsageError, match="made is a network already and takes no arguments") as caught:
            networks.load(f"{path}:{call}", model_of(l__W=W, l__b=B))
        assert caught.value.file == path


# The second of the imports waits until the chain is called.
WITH_NEIGHBORS = """
import json
from layers import Block, SCALE
class Net(Block):
    def forward(self, x):
        from deep.inside import shift
        return super().forward(x) * SCALE + shift + json.loads("0")
"""
NEIGHBOR = """
import chainer
import chainer.links as L
SCALE = {scale}
class Block(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(3, 2)
    def forward(self, x):
        return self.l(x)
"""


def with_neighbors(folder: Path, scale: int, shift: int) -> str:
    (folder / "deep").mkdir(parents=True)
    (folder / "layers.py").write_text(NEIGHBOR.format(scale=scale))
    (folder / "deep" / "inside.py").write_text(f"shift = {shift}")
    for name in ("json.py", "numpy.py", "not_asked_for.py"):
        (folder / name).write_text("raise SystemExit('was run')")
    return f"{network_file(folder, WITH_NEIGHBORS)}:Net"


def test_a_neighbor_is_run_when_it_is_imported_and_not_otherwise(tmp_path: Path) -> None:
    stored = model_of(l__W=W, l__b=B)
    chain = networks.load(with_neighbors(tmp_path / "net", 2, 100), stored)
    model, max_error = networks.to_onnx(chain, [(1, 3)], stored)
    assert max_error <= 1e-5
    assert {t.name for t in model.tensors} >= {"l/W", "l/b"}
    [y] = networks.run(chain, [np.ones((1, 3), "f4")])
    np.testing.assert_array_equal(y, [[108, 122]])


def test_neighbors_of_one_network_are_not_those_of_another(tmp_path: Path) -> None:
    before = list(sys.path)
    stored, ones = model_of(l__W=W, l__b=B), [np.ones((1, 3), "f4")]
    for number in (1, 2):
        chain = networks.load(with_neighbors(tmp_path / str(number), number, 10 * number), stored)
        [y] = networks.run(chain, ones)
        np.testing.assert_array_equal(y, number * np.array([[4, 11]]) + 10 * number)
        assert sys.path == [*before, str(tmp_path / str(number))]
        assert "deep.inside" in sys.modules
    # A network in a folder that Python looks into anyway.
    (tmp_path / "known").mkdir()
    path = network_file(tmp_path / "known", LINEAR)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path / "known")
        networks.load(f"{path}:Net", stored)
        assert sys.path == [str(tmp_path / "known"), *before]
    assert not {"layers", "deep", "deep.inside"} & sys.modules.keys()


def test_a_neighbor_that_fails(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("raise SystemExit('was run')")
    path = network_file(tmp_path, "import beside_it")
    with pytest.raises(BadInput, match="running it failed: SystemExit: was run"):
        networks.load(f"{path}:Net", model_of(l__W=W, l__b=B))


def test_a_folder_beside_a_network_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "not_installed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(MissingDependency, match="not_installed"):
            legacy._import("not_installed", extra="webdnn")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"l__W": W}, "tensor l/b: the network needs it, but it is not there"),
        ({"l__W": W, "l__b": B, "l__c": B}, "tensor l/c: the network has no such parameter"),
        ({"l__W": W.T, "l__b": B}, r"tensor l/W: it has the shape \(3, 2\), the network wants \(2, 3\)"),
        ({"l__W": W, "l__b": np.float32(1)}, r"tensor l/b: it has the shape \(\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    path = network_file(tmp_path, LINEAR)
    with pytest.raises(BadInput, match=words) as caught:
        networks.load(f"{path}:Net", model_of(**arrays))
    assert caught.value.file == Path("weights.npz")


def test_a_count_that_is_a_fraction(tmp_path: Path) -> None:
    path = network_file(tmp_path, "def make():\n    return chainer.Sequential(L.BatchNormalization(2))\n")
    two = np.ones(2, "f4")
    arrays = {f"0__{name}": two for name in ("gamma", "beta", "avg_mean", "avg_var")}
    with pytest.raises(BadInput, match="the network does not take these values: TypeError") as caught:
        networks.load(f"{path}:make", model_of(**arrays, **{"0__N": np.float32(0.5)}))
    assert caught.value.file == Path("weights.npz")


def test_weights_of_a_trainer_snapshot(tmp_path: Path) -> None:
    snapshot = {"updater/model:main/l/W": W, "updater/model:main/l/b": B, "updater/iteration": np.int64(5)}
    np.savez(tmp_path / "snapshot.npz", **snapshot)
    chain = networks.load(f"{network_file(tmp_path, LINEAR)}:Net", read(tmp_path / "snapshot.npz"))
    np.testing.assert_array_equal(chain.l.W.array, W)


@pytest.mark.parametrize("mode", ["float16", "eightbit", "int8"])
def test_weights_of_any_format_are_decoded(tmp_path: Path, weights: Model, mode: str) -> None:
    path = encoded(weights, mode, tmp_path)
    chain = networks.load(f"{NETWORKS}:Generator(100)", read(path))
    decoded = read(path)["l0/W"].array.astype("f4")
    np.testing.assert_array_equal(chain.l0.W.array, decoded)
    assert chain.l0.W.dtype == np.float32
    assert not np.array_equal(decoded, weights["l0/W"].array)


def encoded(weights: Model, mode: str, folder: Path) -> Path:
    path = folder / f"{mode}.safetensors"
    decisions = pipeline.decided(weights, recipe.from_flags(mode, (), (), None, {}))
    formats.for_output(path, weights.source.format).write(weights, pipeline.quantized(weights, decisions), path, 3)
    return path


# --- ONNX ------------------------------------------------------------------------------------------------------


def outputs_in_onnxruntime(path: Path, x: Any) -> Any:
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [only] = session.get_inputs()
    return session.run(None, {only.name: x})[0]


@pytest.mark.parametrize("mode", ["float32", "eightbit"])
def test_onnx_computes_what_chainer_does(tmp_path: Path, weights: Model, mode: str) -> None:
    import onnx

    stored = weights if mode == "float32" else read(encoded(weights, mode, tmp_path))
    chain = networks.load(f"{NETWORKS}:Generator", stored)
    model, max_error = networks.to_onnx(chain, [(1, 110)], stored)
    assert max_error <= 1e-5
    # What was encoded stays so, under its own name.
    assert {t.name for t in model.tensors} == {t.name for t in stored.tensors if not t.name.endswith("/N")}
    assert isinstance(model["l0/W"], Quantized) == (mode == "eightbit")

    formats.by_name("onnx").write(model, model.tensors, tmp_path / "m.onnx", None)
    proto = onnx.load(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 6
    assert len(proto.graph.input) == 1
    [x] = networks.seeded_inputs([(1, 110)], seed=3)
    [expected] = networks.run(chain, [x])
    assert np.abs(outputs_in_onnxruntime(tmp_path / "m.onnx", x) - expected).max() <= 1e-5


def test_the_error_is_measured(monkeypatch: pytest.MonkeyPatch, weights: Model) -> None:
    chain = networks.load(f"{NETWORKS}:Generator", weights)
    monkeypatch.setattr(networks, "run", lambda chain, inputs: [np.zeros((1, 1, 28, 28), "f4")])
    _, max_error = networks.to_onnx(chain, [(1, 110)], weights)
    assert max_error > 0.5


def test_constants_and_several_inputs_and_outputs(tmp_path: Path) -> None:
    path = network_file(
        tmp_path,
        """
import chainer.functions as F
class Two(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(3, 2)
    def forward(self, a, b):
        h = self.l(a) + b * 2
        return F.clip(h, -1.0, 1.0), F.mean(h, axis=1)
""",
    )
    stored = model_of(l__W=W, l__b=B)
    chain = networks.load(f"{path}:Two", stored)
    model, max_error = networks.to_onnx(chain, [(4, 3), (4, 2)], stored)
    assert max_error <= 1e-5
    assert {t.name for t in model.tensors} >= {"l/W", "l/b"}


@pytest.mark.parametrize(
    ("shapes", "call", "words"),
    [
        ([(1, 4)], "Net", "does not take an input of 1,4: "),
        ([(1, 3), (1, 3)], "Net", "does not take an input of 1,3 and 1,3: TypeError"),
        ([(1, 3)], "Odd", "onnx_chainer cannot export the network: .*FFT"),
    ],
)
def test_networks_that_cannot_be_exported(tmp_path: Path, shapes: Any, call: str, words: str) -> None:
    odd = """
class Odd(Net):
    def forward(self, x):
        return chainer.functions.fft((self.l(x), self.l(x)))[0]
"""
    stored = model_of(l__W=W, l__b=B)
    chain = networks.load(f"{network_file(tmp_path, LINEAR + odd)}:{call}", stored)
    with pytest.raises(BadInput, match=words):
        networks.to_onnx(chain, shapes, stored)


def test_what_onnx_runtime_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", Mock(side_effect=RuntimeError("no\nsuch operator")))
    stored = model_of(l__W=W, l__b=B)
    chain = networks.load(f"{network_file(tmp_path, LINEAR)}:Net", stored)
    with pytest.raises(BadInput, match=r"ONNX Runtime does not run what onnx_chainer exported: RuntimeError: no$"):
        networks.to_onnx(chain, [(1, 3)], stored)


# --- the sample networks ---------------------------------------------------------------------------------------


def test_the_unet() -> None:
    chainer = import_chainer()
    from benchmarks.models import networks as sample

    untyped: Any = sample
    with chainer.using_config("dtype", np.float32):
        unet = untyped.UNet()
    assert unet.count_params() == pytest.approx(54.4e6, rel=0.001)
    assert len(unet.down) == len(unet.up) == 8
    [y] = networks.run(unet, networks.seeded_inputs([(1, 3, 256, 256)]))
    assert y.shape == (1, 3, 256, 256)


def test_a_narrow_unet_becomes_onnx(tmp_path: Path) -> None:
    """All that the large one is made of: links in lists, what goes around, and statistics of batches."""
    chainer = import_chainer()
    narrow = NETWORKS.read_text() + "\nclass Narrow(UNet):\n    WIDTHS = (2, 3, 4, 5, 5, 5, 5, 6)\n"
    path = network_file(tmp_path, narrow)
    wanted = chainer.serializers.DictionarySerializer()
    with chainer.using_config("dtype", np.float32):
        wanted.save(networks._run_file(path).Narrow())
    rng = np.random.default_rng(0)
    arrays = {
        name: np.abs(rng.standard_normal(np.shape(v), "f4")) if name.rpartition("/")[2] != "N" else np.int64(0)
        for name, v in wanted.target.items()
    }
    stored = model_of(**{name.replace("/", "__"): values for name, values in arrays.items()})
    chain = networks.load(f"{path}:Narrow", stored)
    assert all(p.grad is None for p in chain.params()), "gradients take as much memory as the weights"
    model, max_error = networks.to_onnx(chain, [(1, 3, 256, 256)], stored)
    assert max_error <= 1e-5
    assert {"down/7/W", "up/7/W", "down_bn/0/avg_var", "up_bn/6/gamma"} <= {t.name for t in model.tensors}


def test_the_committed_generator_draws_digits(weights: Model) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    real, labels = next(train.batches(np.random.default_rng(0), 1500))
    judge = neighbors.KNeighborsClassifier(3).fit(real.reshape(1500, -1), labels.argmax(axis=1))
    chain = networks.load(f"{NETWORKS}:Generator", weights)
    rng = np.random.default_rng(11)
    wanted = np.repeat(np.arange(10), 20)
    [drawn] = networks.run(chain, [train.generator_input(rng, train.one_hot(wanted))])
    right = judge.predict(drawn.reshape(200, -1)) == wanted
    assert right.mean() >= 0.95
    assert right.reshape(10, 20).mean(axis=1).min() >= 0.7, "one of the digits is none"
    spread = drawn.reshape(10, 20, -1).std(axis=1).mean()
    assert spread > 0.02, "all digits of a kind are the same"


def test_training_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    for name in "ab":
        out = tmp_path / f"{name}.npz"
        code = train.main(["cdcgan", "--steps", "2", "--output", str(out), "--preview", str(tmp_path / f"{name}.png")])
        assert code == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    png = (tmp_path / "a.png").read_bytes()
    assert png == (tmp_path / "b.png").read_bytes()
    start = png.index(b"IDAT") + 4
    size = int.from_bytes(png[start - 8 : start - 4], "big")
    assert len(zlib.decompress(png[start : start + size])) == 280 * (12 * 28 + 1)
    assert {t.name: t.shape for t in read(tmp_path / "a.npz").tensors} == {
        t.name: t.shape for t in read(SNAPSHOT).tensors
    }
