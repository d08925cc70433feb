"""WebDNN 1.2 on WebAssembly: a descriptor folder that stock `webdnn.js` loads, made by WebDNN's own converter.

WebDNN rewrites weights as it converts: it changes layouts, merges constants, folds batch norm into the convolution
before it or else into one factor and one bias. Weights are quantized after that, so that the visitor downloads what
the descriptor holds and nothing is quantized twice. `float32` and `eightbit` are WebDNN's own encodings. In any other
mode the weights lie in `weights.safetensors` instead of `weight_webassembly.bin`: the decoded tensors in file order,
end to end, are the `raw` file that the graph asks for.

Kernels are C++ that emscripten compiles, with SIMD; asm.js, WebDNN's fallback for browsers of before 2017, no longer
compiles and is left out.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shrink import formats, pipeline
from shrink.errors import BadInput, MissingDependency, OutputError, ShrinkError, UsageError, blaming, printable
from shrink.export import Exported, Network, _npm
from shrink.files import io_errors
from shrink.model import Quantized
from shrink.networks.chainer import numbered, seeded_inputs, variables
from shrink.networks.legacy import import_chainer, import_webdnn
from shrink.pipeline import Change
from shrink.progress import Progress, silent
from shrink.recipe import Recipe

NAME = "webdnn"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4"})

MODEL, CONTAINER = "model", "weights.safetensors"
BACKEND = "webassembly"

_OWN_ENCODINGS = frozenset({"float32", "eightbit"})
_PAGE_BYTES = 1 << 16
# Packed once and downloaded often.
_LEVEL = 19
# What WebDNN exports for its own side of the page, as its generator has it.
_EXPORTS = (
    "run",
    "init",
    "get_static_buffer",
    "allocate_dynamic_buffer",
    "get_dynamic_buffer",
    "set_placeholder_value",
)
_EIGEN = Path("/usr/include/eigen3")
_NODE_PACKAGES = Path("/usr/share/nodejs")

__all__ = ["HOLDS", "NAME", "MissingCompiler", "export"]


class MissingCompiler(MissingDependency):
    """What compiles WebDNN's kernels is no Python package."""

    def __init__(self, what: str):
        ShrinkError.__init__(self, f"WebDNN's kernels need {what}", hint="Debian: emscripten and libeigen3-dev")


def export(
    network: Network,
    folder: Path,
    recipe: Recipe | None = None,
    progress: Progress = silent,
    *,
    runtime: Path | None = None,
) -> Exported:
    """Fill `folder` with the descriptor, in `model/`, and the runtime.

    `runtime` is a folder of the npm package webdnn; None finds or downloads the pinned version.

    Raises:
        UsageError: the network is no Chainer network, or its weights would be quantized twice.
        BadInput: WebDNN cannot convert the network.
        OutputError: the runtime cannot be had, or compiling failed.
        MissingDependency: chainer, webdnn, emscripten or Eigen is not installed.
    """
    if network.chain is None:
        raise UsageError("WebDNN takes a Chainer network, not an ONNX file", hint="--to onnxruntime-web takes it")
    encoded = any(isinstance(t, Quantized) or t.dtype == np.float16 for t in network.model.tensors)
    if encoded and recipe is not None:
        raise UsageError("the weights are quantized already, and WebDNN changes them", hint="give the float32 weights")
    compiler = _compiler()
    descriptor = _converted(network)
    package = _npm.find(NAME, runtime, progress)
    with blaming(network.title):
        _write(descriptor, folder / MODEL, compiler)
    weights, changes = _quantize(folder / MODEL, recipe, progress) if recipe else (f"weight_{BACKEND}.bin", ())
    page = {
        "backend": BACKEND,
        "inputs": _described("input", descriptor.inputs),
        "outputs": _described("output", descriptor.outputs),
        "model": MODEL,
        "weights": f"{MODEL}/{weights}",
        "runtime": {"name": "WebDNN", "version": package.version, "api": _put_runtime(package, folder)},
        "float32_bytes": len(descriptor.weights),
    }
    note = "WebDNN changed the decoded weights, so that they are float32 again: use --mode on float32 weights"
    return Exported(page, changes, (note,) if encoded else ())


def _described(name: str, shapes: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    names = numbered(name, len(shapes))
    return [{"name": n, "dtype": "float32", "shape": list(s)} for n, s in zip(names, shapes, strict=True)]


def _put_runtime(package: _npm.Package, folder: Path) -> str:
    with io_errors(folder):
        (folder / "runtime").mkdir()
        (folder / "runtime" / "LICENSE.txt").write_bytes(package.read("LICENSE.txt"))
        (folder / "runtime" / "webdnn.js").write_bytes(package.read("dist/webdnn.js"))
    return "runtime/webdnn.js"


def _quantize(descriptor: Path, recipe: Recipe, progress: Progress) -> tuple[str, tuple[Change, ...]]:
    """Quantize the weights of a descriptor in place; the name of their file."""
    changes: list[Change] = []
    own = recipe.stores <= _OWN_ENCODINGS
    model = formats.by_name(NAME).read(descriptor)
    entries = pipeline.quantized(model, pipeline.decided(model, recipe, to_webdnn=own), progress, changes.append)
    if own:
        formats.by_name(NAME).write(model, entries, descriptor, None)
        return f"weight_{BACKEND}.bin", tuple(changes)
    formats.by_name("safetensors").write(model, entries, descriptor / CONTAINER, _LEVEL)
    (descriptor / f"weight_{BACKEND}.bin").unlink()
    return CONTAINER, tuple(changes)


@dataclass(frozen=True)
class _Descriptor:
    """What WebDNN made of a network, optimized: all but the compiled kernels."""

    graph: str
    weights: bytes
    kernels: str
    heap_bytes: int
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]


def _converted(network: Network) -> _Descriptor:
    webdnn, chainer = import_webdnn(), import_chainer()
    inputs = [chainer.Variable(x) for x in seeded_inputs(network.input_shapes)]
    try:
        # WebDNN follows the record that Chainer keeps for training.
        with chainer.using_config("train", False), chainer.using_config("enable_backprop", True):
            outputs = variables(network.chain(*inputs))
        with _quiet(), _reproducible(webdnn):
            graph = webdnn.frontend.chainer.ChainerConverter().convert(inputs, outputs)
            data = webdnn.backend.generate_descriptor(BACKEND, graph, constant_encoder_name="raw")
            # Stock `webdnn.js` keeps weights in the visitor's browser until this number changes. It was the clock.
            description = {**data.descriptor._to_serializable_(), "converted_at": zlib.crc32(data.constants)}
            return _Descriptor(
                webdnn.util.json.dumps(description),
                data.constants,
                data.descriptor.concat_kernel_sources(),
                data.descriptor.required_heap,
                [tuple(v.shape) for v in data.graph.inputs],
                [tuple(v.shape) for v in data.graph.outputs],
            )
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(f"WebDNN cannot convert the network: {printable(said)}", file=network.title) from error


def _write(descriptor: _Descriptor, folder: Path, compiler: list[str]) -> None:
    with io_errors(folder):
        folder.mkdir()
        (folder / f"graph_{BACKEND}.json").write_text(descriptor.graph, encoding="utf-8")
        (folder / f"weight_{BACKEND}.bin").write_bytes(descriptor.weights)
        with tempfile.TemporaryDirectory(prefix="shrink-") as build:
            source = Path(build) / "kernels.cpp"
            source.write_text(descriptor.kernels, encoding="utf-8")
            _compile(source, folder / f"kernels_{BACKEND}.js", descriptor.heap_bytes, compiler)


def _compiler() -> list[str]:
    """The command that compiles, up to the files. Raises MissingCompiler."""
    found = shutil.which("em++")
    if found is None:
        raise MissingCompiler("the compiler emscripten (em++)")
    if not (_EIGEN / "Eigen").is_dir():
        raise MissingCompiler("the library Eigen")
    return [found, f"-I{_EIGEN}"]


def _compile(source: Path, output: Path, heap_bytes: int, compiler: list[str]) -> None:
    from webdnn.backend.webassembly import generator

    # Whole pages; the heap grows when it must.
    heap_bytes = -(-heap_bytes // _PAGE_BYTES) * _PAGE_BYTES
    exports = ",".join(f"'_{name}'" for name in _EXPORTS)
    settings = [f"EXPORTED_FUNCTIONS=[{exports}]", "WASM=1", f"INITIAL_MEMORY={heap_bytes}", "ALLOW_MEMORY_GROWTH=1"]
    command = [
        *compiler,
        *("-O3", "-std=c++14", "-msimd128", "-Wno-everything"),
        *(word for setting in settings for word in ("-s", setting)),
        *("--pre-js", str(Path(generator.__file__).with_name("webassembly_header.js"))),
        *("-o", str(output.absolute()), source.name),
    ]
    # emscripten's optimizer of JavaScript looks for acorn among node's packages; Debian keeps them here.
    packages = os.pathsep.join(filter(None, [os.environ.get("NODE_PATH"), str(_NODE_PACKAGES)]))
    done = subprocess.run(
        command,
        env={**os.environ, "NODE_PATH": packages},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=source.parent,
    )
    if done.returncode != 0:
        # Where it worked is gone when the user reads this.
        said = done.stderr.decode(errors="replace")
        for folder in (output.absolute().parent, source.parent):
            said = said.replace(f"{folder}{os.sep}", "")
        errors = [line for line in said.splitlines() if "error" in line]
        raise OutputError(f"emscripten failed: {printable((errors or ['it does not say why'])[0])}")


@contextmanager
def _quiet() -> Iterator[None]:
    """WebDNN warns of versions, and makes all later threads and recursions large."""
    depth, stack = sys.getrecursionlimit(), threading.stack_size()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.setrecursionlimit(depth)
        threading.stack_size(stack)


@contextmanager
def _reproducible(webdnn: Any) -> Iterator[None]:
    """Have the same network give the same files.

    WebDNN keeps nodes, their attributes and allocations in sets, which iterate by hash: the memory address. Here they
    are numbered instead, as they come. It names nodes, by which it sorts them, and allocations with numbers that go on
    through the life of the process.
    """
    allocator, node = webdnn.backend.code_generator.allocator, webdnn.graph.node
    classes = (node.Node, webdnn.graph.attribute.Attribute, allocator.Allocation)
    numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
    fresh = itertools.count()

    def number(self: object) -> int:
        # Not an attribute: what is copied would bring the number of its original.
        known = numbers.get(id(self))
        if known is None or known[0]() is not self:
            known = numbers[id(self)] = weakref.ref(self), next(fresh)
        return known[1]

    allocations, allocator._count = allocator._count, 0
    nodes, node._node_serial_counter_dict = node._node_serial_counter_dict, {}
    for each in classes:
        each.__hash__ = number
    try:
        yield
    finally:
        allocator._count = allocations
        node._node_serial_counter_dict = nodes
        for each in classes:
            del each.__hash__
