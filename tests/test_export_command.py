"""`shrink export` as people call it: where the output goes, hostile ONNX files, and what is refused, in words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shrink import site
from tests.command import run
from tests.pages import (
    PACKAGE,
    ROOT,
    assert_close,
    chromium,
    needs_chainer,
    needs_emscripten,
    needs_package,
    opened,
    served,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MODELS = ROOT / "benchmarks" / "models"
GENERATOR = (f"{MODELS / 'networks.py'}:Generator", "--weights", str(MODELS / "cdcgan.npz"))
ORT = ("--to", "onnxruntime-web", "--runtime", PACKAGE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def linear(shape: list[Any], x: str = "x", y: str = "y", weight: str = "W") -> Any:
    """A network of one layer whose input is declared with this shape; nothing is checked."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", [x, weight], [y])],
        "network",
        [value(x, TensorProto.FLOAT, shape)],
        [value(y, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.arange(600, dtype="f4").reshape(20, 30) / 600, weight)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


# --- where the output goes -------------------------------------------------------------------------------------


def in_folder(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shrink", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@needs_package
@pytest.mark.parametrize("output", ["site", "."])
def test_a_relative_output_for_onnxruntime_web(tmp_path: Path, output: str) -> None:
    onnx.save(linear([1, 20]), tmp_path / "model.onnx")
    folder = tmp_path / "here"
    folder.mkdir()
    done = in_folder(folder, "../model.onnx", *ORT, "-o", output)
    assert done.returncode == 0, done.stderr
    check_listed(folder / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "model.onnx"]


@needs_chainer
@needs_emscripten
@pytest.mark.parametrize("output", ["site", "."])
def test_a_relative_output_for_webdnn(tmp_path: Path, output: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    to = ("--to", "webdnn", "--runtime", PACKAGE.with_name("webdnn"))
    put_chainer_network(tmp_path)
    network = ("../net.py:Net", "--weights", "../net.npz", "--input", "1,4")
    done = in_folder(folder, *network, *to, "-o", output)
    assert done.returncode == 0, done.stderr
    assert {"model/kernels_webassembly.js", "model/kernels_webassembly.wasm"} <= check_listed(folder / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "net.npz", "net.py"]


def put_chainer_network(folder: Path) -> None:
    """One small layer: net.py:Net with net.npz, which takes 1,4."""
    (folder / "net.py").write_text("import chainer.links\n\ndef Net():\n    return chainer.links.Linear(4, 3)\n")
    np.savez(folder / "net.npz", W=np.ones((3, 4), "f4"), b=np.zeros(3, "f4"))


def check_listed(folder: Path) -> set[str]:
    """The files of a site, which are those that its manifest lists."""
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert files == {"manifest.json", *listed}
    return files


@needs_chainer
@needs_package
def test_a_failing_compiler_is_told_without_paths_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real program in place of emscripten, which complains as that does, with the paths it was given."""
    if not Path("/usr/include/eigen3/Eigen").is_dir() or not PACKAGE.with_name("webdnn").is_dir():
        pytest.skip("Eigen, or the npm package webdnn in tests/, is not installed")
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "em++"
    compiler.write_text('#!/bin/sh\necho "$PWD/kernels.cpp:1:2: error: in $*" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "out").mkdir()
    put_chainer_network(tmp_path)
    network = (f"{tmp_path / 'net.py'}:Net", "--weights", tmp_path / "net.npz", "--input", "1,4")
    to = ("--to", "webdnn", "--runtime", PACKAGE.with_name("webdnn"))
    done = run("export", *network, *to, "-o", tmp_path / "out" / "site")
    assert done.code == 5
    assert "shrink: error: Net: emscripten failed: kernels.cpp:1:2: error: in " in done.stderr
    assert "/out/" not in done.stderr
    assert "/tmp/shrink-" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@needs_package
def test_errors_about_files_of_the_site_name_the_output(tmp_path: Path) -> None:
    onnx.save(linear([1, 20], weight="shrink.graph"), tmp_path / "model.onnx")
    done = run("export", tmp_path / "model.onnx", *ORT, "-o", tmp_path / "site")
    assert done.code == 3
    assert f"{tmp_path / 'site' / 'weights.safetensors'}: tensor shrink.graph: this name is reserved" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# --- inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "code", "words"),
    [
        ([0, 20], 3, "its input x has a shape that no values have: [0, 20]"),
        ([1, 0], 3, "its input x has a shape that no values have: [1, 0]"),
        ([-2, 20], 3, "its input x has a shape that no values have: [-2, 20]"),
        ([1, -(2**63)], 3, "its input x has a shape that no values have: [1, -9223372036854775808]"),
        ([1, -1], 2, "leaves the shape of its input x open: [1, ?]"),
        ([1, 2**31], 3, "its input x is too large: [1, 2147483648]"),
        ([2**62, 2**62], 3, "its input x is too large: [4611686018427387904, 4611686018427387904]"),
        (["N", 2**40], 3, "its input x is too large: [?, 1099511627776]"),
        ([1] * 40, 3, "its input x is too large: [1, 1, 1"),
        (None, 2, "leaves the shape of its input x open"),
    ],
)
def test_shapes_that_no_input_has(tmp_path: Path, shape: Any, code: int, words: str) -> None:
    onnx.save(linear(shape), tmp_path / "model.onnx")
    # What is only left open, --input closes.
    for asked in ([], ["--input", "1,20"]) if code == 3 else ([],):
        done = run("export", tmp_path / "model.onnx", "--to", "onnxruntime-web", *asked, "-o", tmp_path / "site")
        assert done.code == code, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@needs_package
def test_minus_one_first_is_the_batch(browser: Browser, tmp_path: Path) -> None:
    onnx.save(linear([-1, 20]), tmp_path / "model.onnx")
    done = run("export", tmp_path / "model.onnx", *ORT, "-o", tmp_path / "site")
    assert done.code == 0, done.stderr
    with served(tmp_path / "site") as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        assert page.outputs()["y"].shape == (1, 30)


@pytest.mark.parametrize("asked", ["1,0", "0", "-1,20", "1,2147483648", ",", "1,,20", "1e3", "1," * 40 + "20", ""])
def test_shapes_that_nobody_can_ask_for(tmp_path: Path, asked: str) -> None:
    onnx.save(linear([None, None]), tmp_path / "model.onnx")
    arguments = ["--to", "onnxruntime-web", f"--input={asked}", "-o", tmp_path / "site"]
    done = run("export", tmp_path / "model.onnx", *arguments)
    assert done.code == 2, done.stderr
    assert "is no shape (write --input 1,3,224,224)" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("target", ["onnxruntime-web", "webdnn"])
def test_inputs_of_a_network_in_python_have_no_names(tmp_path: Path, target: str) -> None:
    done = run("export", *GENERATOR, "--input", "z=1,110", "--to", target, "-o", tmp_path / "site")
    assert done.code == 2
    assert "--input z=1,110: inputs of a network in Python have no names" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "of an ONNX file also by NAME=" in " ".join(run("export", "--help").stdout.split())


@needs_chainer
def test_what_chainer_says_of_a_shape_is_shown(tmp_path: Path) -> None:
    done = run("export", *GENERATOR, "--input", "1,50", "--to", "onnxruntime-web", "-o", tmp_path / "site")
    assert done.code == 3
    assert len(done.stderr.splitlines()) == 1
    assert "the network does not take an input of 1,50: InvalidType: " in done.stderr
    assert "Expect: x.shape[1] == W.shape[1]" in done.stderr
    assert "Actual: 50 != 110" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [("__proto__", "y"), ("x", "__proto__")])
def test_a_name_that_no_object_can_have_is_refused(tmp_path: Path, x: str, y: str) -> None:
    onnx.save(linear([1, 20], x, y), tmp_path / "model.onnx")
    done = run("export", tmp_path / "model.onnx", "--to", "onnxruntime-web", "-o", tmp_path / "site")
    assert done.code == 3
    assert "put is named __proto__, which no page can give ONNX Runtime" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@needs_package
@pytest.mark.parametrize(
    ("x", "y", "weight"),
    [("constructor", "hasOwnProperty", "toString"), ("x", "y", "__proto__"), ("valueOf", "<b>y</b>", "W.__proto__")],
)
def test_names_that_every_object_has_are_like_others(
    browser: Browser, tmp_path: Path, x: str, y: str, weight: str
) -> None:
    onnx.save(linear([1, 20], x, y, weight), tmp_path / "model.onnx")
    done = run("export", tmp_path / "model.onnx", *ORT, "-o", tmp_path / "site")
    assert done.code == 0, done.stderr
    expected = site.seeded_input(0, 0, (1, 20), "float32") @ (np.arange(600, dtype="f4").reshape(20, 30) / 600)
    with served(tmp_path / "site") as url, opened(browser, url) as page:
        assert page.text("#error") == ""
        assert_close(page.outputs(), {y: expected.astype("f4")})
        assert y in page.text("#outputs")
