"""The WebDNN target: what a real browser computes from the folder is what Chainer computes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shrink import formats, recipe
from shrink.errors import BadInput, OutputError, UsageError
from shrink.export import Exported, Network, all_targets, by_name, webdnn
from shrink.formats.webdnn import encode
from shrink.model import DTYPES, Model, Quantized, Source
from shrink.networks import chainer as networks
from shrink.networks.legacy import import_chainer, import_webdnn
from shrink.steps import Step
from tests.browser import chromium, serve

TESTS = Path(__file__).parent
STOCK = TESTS / "node_modules" / "webdnn"

for package in ("chainer", "webdnn"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
if not STOCK.is_dir():
    pytest.skip("stock webdnn is not installed: run `npm ci` in tests/", allow_module_level=True)

F32 = NDArray[np.float32]

NETWORKS = TESTS.parent / "benchmarks" / "models" / "networks.py"
SNAPSHOT = NETWORKS.with_name("cdcgan.npz")
SHAPES = ((1, 110),)
EIGHTBIT = recipe.from_flags("eightbit", (), (), None, {})

needs_compiler = pytest.mark.skipif(shutil.which("em++") is None, reason="emscripten is not installed")


def export(network: Network, folder: Path, recipe: recipe.Recipe | None = None) -> Exported:
    return webdnn.export(network, folder, recipe, runtime=STOCK)


@pytest.fixture(scope="module")
def network() -> Network:
    weights = formats.sniff(SNAPSHOT).read(SNAPSHOT)
    chain = networks.load(f"{NETWORKS}:Generator", weights)
    return Network("Generator", weights, SHAPES, chain)


@pytest.fixture(scope="module")
def exported(network: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("float32")
    return folder, export(network, folder)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the slow part: kernels are not compiled."""
    monkeypatch.setattr(webdnn, "_compiler", lambda: ["true"])
    monkeypatch.setattr(webdnn, "_compile", lambda source, output, heap, compiler: output.write_bytes(b""))


RUN = """async x => {
    const runner = await WebDNN.load("./model", {
        backendOrder: ["webassembly"], saveCache: false, cacheStrategy: "networkOnly",
    });
    runner.getInputViews()[0].set(x);
    await runner.run();
    return [runner.backendName, Array.from(runner.getOutputViews()[0].toActual())];
}"""


def in_the_browser(folder: Path, x: F32) -> F32:
    (folder / "index.html").write_text("<!doctype html><head></head><script src=runtime/webdnn.js></script>")
    with serve(folder) as url, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{url}/index.html")
        backend, values = page.evaluate(RUN, x.ravel().astype(float).tolist())
    assert backend == "webassembly"
    return np.array(values, np.float32)


# --- WebDNN's folding, done by hand ----------------------------------------------------------------------------


def folded(chain: Any) -> dict[str, F32]:
    """The generator's weights as WebDNN has them: bias and batch norm are one factor and one bias."""
    weights = {"l0/W": chain.l0.W.array, "l0/b": chain.l0.b.array}
    for layer, norm in ((chain.dc1, chain.bn1), (chain.dc2, chain.bn2)):
        factor = norm.gamma.array / np.sqrt(norm.avg_var + norm.eps)
        weights[f"{layer.name}/W"] = layer.W.array
        weights[f"{layer.name}/factor"] = factor
        weights[f"{layer.name}/b"] = (layer.b.array - norm.avg_mean) * factor + norm.beta.array
    return {**weights, "dc3/W": chain.dc3.W.array, "dc3/b": chain.dc3.b.array}


def layout_of(flat: Mapping[str, F32], known: Mapping[str, F32]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Which weight each flat tensor of a descriptor is, and by which order of axes."""
    found = {}
    for tensor, values in flat.items():
        for (name, weight), axes in (
            (pair, axes) for pair in known.items() for axes in itertools.permutations(range(pair[1].ndim))
        ):
            if weight.size == values.size and np.allclose(weight.transpose(axes).ravel(), values, rtol=0, atol=1e-6):
                found[tensor] = (name, axes)
    return found


def in_python(weights: Mapping[str, F32], x: F32) -> F32:
    """The generator with such weights, by Chainer's functions."""
    F = import_chainer().functions
    h = F.reshape(F.relu(F.linear(x, weights["l0/W"], weights["l0/b"])), (-1, 128, 3, 3))
    for layer in ("dc1", "dc2"):
        h = F.deconvolution_2d(h, weights[f"{layer}/W"], stride=2)
        factor, bias = (np.broadcast_to(weights[f"{layer}/{v}"][:, None, None], h.shape) for v in ("factor", "b"))
        h = F.relu(h * factor + bias)
    y: F32 = F.sigmoid(F.deconvolution_2d(h, weights["dc3/W"], weights["dc3/b"], stride=2)).array
    return y.ravel()


def tensors_of(folder: Path) -> dict[str, F32]:
    model = formats.by_name("webdnn").read(folder / webdnn.MODEL)
    return {t.name: t.array for t in model.tensors}


# --- in a browser ----------------------------------------------------------------------------------------------


@needs_compiler
def test_the_page_computes_what_chainer_does(network: Network, exported: tuple[Path, Exported]) -> None:
    folder, result = exported
    [x] = networks.seeded_inputs(SHAPES, seed=7)
    [expected] = networks.run(network.chain, [x])
    y = in_the_browser(folder, x)
    assert np.abs(y - expected.ravel()).max() <= 1e-5
    assert np.ptp(y) > 0.5, "no picture"
    assert result.page["inputs"] == [{"name": "input", "dtype": "float32", "shape": [1, 110]}]
    assert result.page["outputs"] == [{"name": "output", "dtype": "float32", "shape": [1, 1, 28, 28]}]
    assert (folder / result.page["runtime"]["api"]).is_file()
    assert "MIT License" in (folder / "runtime" / "LICENSE.txt").read_text()


@needs_compiler
def test_eightbit_is_what_the_decoded_weights_give(
    network: Network, exported: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before(source: Path, output: Path, *more: object) -> None:
        # Kernels do not depend on the weights, and take seconds to compile.
        for kernel in (exported[0] / "model").glob("kernels_*"):
            shutil.copy(kernel, output.parent)

    monkeypatch.setattr(webdnn, "_compile", as_before)
    result = export(network, tmp_path, EIGHTBIT)
    known = folded(network.chain)
    layout = layout_of(tensors_of(exported[0]), known)
    assert {name for name, _ in layout.values()} == set(known)
    decoded = {}
    for tensor, values in tensors_of(tmp_path).items():
        name, axes = layout[tensor]
        shape = [known[name].shape[a] for a in axes]
        decoded[name] = np.ascontiguousarray(values.reshape(shape).transpose(np.argsort(axes)))
    [x] = networks.seeded_inputs(SHAPES, seed=7)
    y = in_the_browser(tmp_path, x)
    assert np.abs(y - in_python(decoded, x)).max() <= 1e-5
    assert np.abs(y - in_python(known, x)).max() > 1e-4, "nothing was quantized"
    assert {c.mode for c in result.changes} <= {"eightbit", "kept"}


# --- without one -----------------------------------------------------------------------------------------------


def test_the_folder_is_the_registry() -> None:
    assert by_name("webdnn") is webdnn
    assert {t.NAME for t in all_targets()} >= {"webdnn"}
    with pytest.raises(UsageError, match=r"no target 'nowhere'.*webdnn"):
        by_name("nowhere")


@pytest.mark.usefixtures("no_compiler")
def test_the_same_network_gives_the_same_files(network: Network, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        export(network, folder)
    first, *others = [{p.name: p.read_bytes() for p in (folder / "model").iterdir()} for folder in folders]
    assert set(first) == {"graph_webassembly.json", "weight_webassembly.bin", "kernels_webassembly.js"}
    assert others == [first, first]


def test_the_same_network_gives_the_same_kernels_in_any_process(network: Network) -> None:
    code = f"""
from pathlib import Path
from shrink import formats
from shrink.export import Network, webdnn
from shrink.networks import chainer
weights = formats.by_name("chainer-npz").read(Path({str(SNAPSHOT)!r}))
chain = chainer.load({f"{NETWORKS}:Generator"!r}, weights)
print(repr(webdnn._converted(Network("Generator", weights, {SHAPES}, chain))))
"""
    texts = {repr(webdnn._converted(network)) for _ in range(2)}
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        texts.add(done.stdout.strip())
    [text] = texts
    assert "float static_buffer" in text


def test_buffers_are_used_again_when_they_are_free(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    import_webdnn()
    from webdnn.backend.webassembly import generator

    allocate = generator.allocate
    layouts: list[Any] = []

    def watched(graph: Any) -> Any:
        layouts.append(allocate(graph))
        return layouts[-1]

    monkeypatch.setattr(generator, "allocate", watched)
    weights_bytes = len(webdnn._converted(network).weights)
    [layout] = layouts
    buffers = list({id(a): a for a in layout.allocations.values()}.values())
    for a, b in itertools.combinations(buffers, 2):
        at_once = a.begin < b.end and b.begin < a.end
        assert not at_once or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
    most = max(sum(a.size for a in buffers if a.begin <= step < a.end) for step in range(max(a.end for a in buffers)))
    assert layout.static_size <= 1.1 * most
    assert sum(a.size for a in buffers) - weights_bytes // 4 > 2 * (layout.static_size - weights_bytes // 4)


def test_converting_leaves_python_as_it_was(network: Network) -> None:
    node = import_webdnn().graph.node.Node
    before = sys.getrecursionlimit(), threading.stack_size(), node.__hash__
    webdnn._converted(network)
    assert (sys.getrecursionlimit(), threading.stack_size(), node.__hash__) == before


@pytest.mark.usefixtures("no_compiler")
def test_other_modes_go_into_our_container(network: Network, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    export(network, tmp_path / "raw")
    raw = np.fromfile(tmp_path / "raw" / "model" / "weight_webassembly.bin", "<f4")
    (tmp_path / "int8").mkdir()
    result = export(network, tmp_path / "int8", recipe.from_flags("int8", (), (), None, {}))
    model = tmp_path / "int8" / "model"
    assert {p.name for p in model.iterdir()} == {"graph_webassembly.json", "kernels_webassembly.js", webdnn.CONTAINER}
    assert result.page["weights"] == "model/weights.safetensors"
    stored = formats.by_name("safetensors").read(model / webdnn.CONTAINER)
    values = np.concatenate([t.array for t in stored.tensors])
    assert values.shape == raw.shape
    assert 0 < np.abs(values - raw).max() < 0.1 * np.abs(raw).max()
    assert "int8" in {c.mode for c in result.changes}


@pytest.mark.usefixtures("no_compiler")
def test_weights_are_never_quantized_twice(network: Network, tmp_path: Path) -> None:
    [(codes, scale)] = encode(network.model["l0/W"].array.ravel())
    step = Step("codebook.1", {"table": "eightbit", "scale": scale})
    coded = Quantized.of("l0/W", DTYPES["F32"], (1152, 110), (step,), codes.tobytes())
    others = [t for t in network.model.tensors if t.name != "l0/W"]
    twice = replace(network, model=Model((coded, *others), network.model.source))
    with pytest.raises(UsageError, match="quantized already"):
        export(twice, tmp_path, EIGHTBIT)
    assert list(tmp_path.iterdir()) == []
    [note] = export(twice, tmp_path).notes
    assert "float32 again" in note


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    model = Model((), Source("onnx", tmp_path, 0), graph=b"")
    with pytest.raises(UsageError, match="takes a Chainer network"):
        export(Network("m", model, SHAPES), tmp_path)


def test_a_network_that_webdnn_cannot_convert(network: Network, tmp_path: Path) -> None:
    class Odd(import_chainer().Chain):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return import_chainer().functions.erf(x)

    with pytest.raises(BadInput, match=r"odd: WebDNN cannot convert the network: .*Erf"):
        webdnn._converted(replace(network, title="odd", chain=Odd()))


def test_a_missing_compiler_names_the_packages(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(webdnn.MissingCompiler, match=r"emscripten \(em\+\+\).*emscripten and libeigen3-dev"):
        export(network, tmp_path)
    (tmp_path / "em++").touch(0o755)
    monkeypatch.setattr(webdnn, "_EIGEN", tmp_path / "nothing")
    with pytest.raises(webdnn.MissingCompiler, match=r"Eigen.*libeigen3-dev") as caught:
        export(network, tmp_path)
    assert caught.value.exit_code == 5


def test_a_compiler_that_fails_says_why(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "em++"
    fake.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no\x1b[1m luck' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(webdnn, "_compiler", lambda: [str(fake)])
    with pytest.raises(OutputError, match=r"emscripten failed: kernels.cpp:1: error: no\\x1b\[1m luck"):
        export(network, tmp_path)
