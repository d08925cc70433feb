"""ONNX Runtime Web: the graph as a small .onnx file, the weights beside it in our container.

The page's adapter decodes the weights and hands them to stock ONNX Runtime Web as external data, so that any mode of
ours runs, at the precision of the graph, and what the visitor downloads is as small as our container makes it. The
largest file is the runtime itself: it is stored gzipped and inflated by the browser, which no host has to be set up
for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deflate
import numpy as np

from shrink import container
from shrink.errors import BadInput, UsageError
from shrink.export import Exported, Network, _npm
from shrink.export._stages import in_stages
from shrink.files import atomic_file
from shrink.formats._onnx_proto import NAMED_DTYPES, Reader, clear, parse
from shrink.model import DTYPES, Entry, Model, Quantized
from shrink.pipeline import Change, decided, drop_state, quantized
from shrink.progress import Progress
from shrink.recipe import Recipe

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto, ValueInfoProto

NAME = "onnxruntime-web"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4"})
# The smallest build of the API that serves a backend. Which .mjs and .wasm it loads, its own text says.
BACKENDS = {"wasm": "ort.wasm.min.mjs", "webgpu": "ort.webgpu.min.mjs"}
PACKAGE = "onnxruntime-web"

# ONNX Runtime 1.22 knows nothing newer. A higher IR version only adds what a model may use, and says nothing about
# what it does use; a higher opset may change what an operator means.
_NEWEST_IR = 10
_NEWEST_OPSET = 22
# Shape inference needs the values of shapes, axes and the like while the session is built, so that these, and all
# that is too small to gain anything, stay in the graph.
_SMALL_BYTES = 1024
# What the adapter can hand over: the loader gives float32 where float16 or a coded float64 belongs, and the adapter
# makes that of it.
_F64 = np.dtype("<f8")
_FLOATS = frozenset({np.dtype("<f2"), np.dtype("<f4"), _F64})
_BYTES = frozenset({np.dtype("i1"), np.dtype("u1")})
# ONNX Runtime gives outputs, and takes inputs, as properties of an object, where this one is none.
_NO_PROPERTY = "__proto__"
# Packed once and downloaded often: high enough that both coders are tried on every tensor.
_LEVEL = 10
_GZIP_LEVEL = 10
_WEIGHTS = "weights.safetensors"
_LOADS = re.compile(rb"\bort-wasm-simd-threaded(?:\.[a-z]+)?\.mjs\b")
_LICENSE = Path(__file__).parents[1] / "web" / "runtimes" / "onnxruntime_web.LICENSE.txt"


def export(
    network: Network,
    folder: Path,
    recipe: Recipe | None,
    progress: Progress,
    *,
    backend: str = "wasm",
    runtime: Path | None = None,
    cut: int | None = None,
    sequential: bool = False,
) -> Exported:
    """Fill `folder` with the graph, the weights and the runtime for `backend`, "wasm" or "webgpu".

    `runtime` is a folder of the npm package onnxruntime-web; None finds or downloads the pinned version. With `cut` the
    network is in stages of that many bytes at most; with `sequential` the page loads, runs and drops one at a time.

    Raises:
        UsageError: an unknown backend, a model without a graph, or a recipe that does not fit it.
        BadInput: a network that the runtime cannot run.
        OutputError: the runtime cannot be had.
        MissingDependency: the package onnx is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r}", hint="known: " + ", ".join(BACKENDS))
    model = drop_state(network.model)
    source = model.source.path
    if model.graph is None:
        raise UsageError("this model has only weights, and a page needs the graph", file=source)
    proto = parse(model.graph, source)
    if runtime is None:
        _check_opset(proto, source)
    proto.ir_version = min(proto.ir_version, _NEWEST_IR)
    inputs = _inputs(proto, network.input_shapes, source)
    outputs = [{"name": _property(output.name, "output", source)} for output in proto.graph.output]
    found = _npm.find(PACKAGE, runtime, progress)

    changes: list[Change] = []
    entries: Iterable[Entry] = model.tensors
    if recipe is not None:
        entries = quantized(model, decided(model, recipe), progress, changes.append)
    external: dict[str, dict[str, Any]] = {}
    sizes = container.write(
        _externalized(proto, entries, external, source),
        folder / _WEIGHTS,
        source=model.source.format,
        attributes={},
        graph=None,
        level=_LEVEL,
    )
    notes: list[str] = []
    files: dict[str, Any] = {"model": "model.onnx", "weights": _WEIGHTS, "external": external}
    if cut is None:
        _put(folder / "model.onnx", proto.SerializeToString(deterministic=True))
    else:
        stages, notes = in_stages(proto, network.input_shapes, folder / _WEIGHTS, sizes, external, cut, source)
        files = {"stages": stages, "sequential": sequential}
    page = {
        "backend": backend,
        "float16": _has_float16(proto),
        "inputs": inputs,
        "outputs": outputs,
        **files,
        "runtime": {"name": "ONNX Runtime Web", "version": found.version, **_runtime(found, backend, folder)},
        "float32_bytes": _float32_bytes(model),
    }
    return Exported(page, tuple(changes), tuple(notes))


def _runtime(found: _npm.Package, backend: str, folder: Path) -> dict[str, str]:
    """Store the files of the runtime; their paths, by what the adapter does with them."""
    (folder / "runtime").mkdir()
    _put(folder / "runtime" / "LICENSE.txt", _LICENSE.read_bytes())
    paths = {}
    for role, (name, data) in zip(("api", "module", "wasm"), _runtime_files(found, backend).items(), strict=True):
        if role == "wasm":
            name, data = f"{name}.gz", bytes(deflate.gzip_compress(data, _GZIP_LEVEL))
        else:
            # Many a host, nginx as it comes among them, does not know .mjs, and a browser refuses what is no script.
            name = name.removesuffix(".mjs") + ".js"
        paths[role] = f"runtime/{name}"
        _put(folder / paths[role], data)
    return paths


def _runtime_files(found: _npm.Package, backend: str) -> dict[str, bytes]:
    """The API, what loads the WebAssembly, and that, in this order."""
    api = found.read(f"dist/{BACKENDS[backend]}")
    loads = {match.decode() for match in _LOADS.findall(api)}
    if len(loads) != 1:
        raise BadInput(f"version {found.version} is not laid out as shrink knows it", file=found.folder)
    (module,) = loads
    wasm = module.removesuffix(".mjs") + ".wasm"
    return {BACKENDS[backend]: api, module: found.read(f"dist/{module}"), wasm: found.read(f"dist/{wasm}")}


def _put(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def _check_opset(proto: ModelProto, source: Path) -> None:
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset > _NEWEST_OPSET:
        raise BadInput(
            f"its opset is {opset}, ONNX Runtime Web {_npm.pinned(PACKAGE).version} runs {_NEWEST_OPSET} and older",
            file=source,
            hint="export it again with an older opset, or give a newer onnxruntime-web with --runtime",
        )


def _inputs(proto: ModelProto, shapes: tuple[tuple[int, ...], ...], source: Path) -> list[dict[str, Any]]:
    """Name, type and shape of each input that the page must feed."""
    inputs = graph_inputs(proto)
    if len(shapes) != len(inputs):
        raise UsageError(f"{len(shapes)} input shapes are given, the network has {len(inputs)} inputs", file=source)
    out = []
    for info, shape in zip(inputs, shapes, strict=True):
        dtype = NAMED_DTYPES.get(info.type.tensor_type.elem_type)
        if dtype is None or not info.type.HasField("tensor_type"):
            raise BadInput(f"its input {info.name!r} is not of numbers", file=source)
        out.append({"name": _property(info.name, "input", source), "dtype": dtype.name, "shape": list(shape)})
    return out


def _property(name: str, what: str, source: Path) -> str:
    if name == _NO_PROPERTY:
        raise BadInput(f"its {what} is named {name}, which no page can give ONNX Runtime", file=source)
    return name


def _has_float16(proto: ModelProto) -> bool:
    """Whether it computes in float16 anywhere, for which not every WebGPU is made."""
    types = {i.data_type for i in proto.graph.initializer}
    types |= {info.type.tensor_type.elem_type for info in (*proto.graph.input, *proto.graph.output)}
    attributes = [a for node in proto.graph.node if node.op_type in ("Cast", "Constant") for a in node.attribute]
    types |= {number for a in attributes for number in (a.i, a.t.data_type)}
    return any(NAMED_DTYPES.get(number) == np.float16 for number in types)


def graph_inputs(proto: ModelProto) -> list[ValueInfoProto]:
    """The inputs without those that only name an initializer, as files of IR version 3 list them."""
    initializers = {i.name for i in proto.graph.initializer}
    return [info for info in proto.graph.input if info.name not in initializers]


def _externalized(
    proto: ModelProto, entries: Iterable[Entry], external: dict[str, dict[str, Any]], source: Path
) -> Iterator[Entry]:
    """The entries for the container; the others get their values in the graph. `external` is filled on the way."""
    reader = Reader(source)
    slots: dict[str, TensorProto] = {
        slot.external_data[0].value: slot for slot in proto.graph.initializer if reader.storage(slot) == "external"
    }
    for entry in entries:
        slot = slots.pop(entry.name, None)
        if slot is None:
            if entry.role == "weight":
                raise BadInput("the graph has no initializer for it", file=source, tensor=entry.name)
            continue
        dtype, shape = NAMED_DTYPES[slot.data_type], tuple(slot.dims)
        if entry.shape != shape:
            raise BadInput(
                f"its shape is {list(entry.shape)}, the graph's is {list(shape)}", file=source, tensor=entry.name
            )
        nbytes = entry.size * dtype.itemsize
        clear(slot)
        if not _travels(entry, dtype, nbytes):
            with np.errstate(over="ignore"):
                slot.raw_data = entry.array.astype(dtype, copy=False).tobytes()
            continue
        # Not the tensor's name: the runtime takes this for a path.
        location = f"weight-{len(external)}"
        external[entry.name] = {"location": location, "bytes": nbytes, "dtype": dtype.name}
        slot.data_location = slot.EXTERNAL
        slot.external_data.add(key="location", value=location)
        slot.external_data.add(key="offset", value="0")
        slot.external_data.add(key="length", value=str(nbytes))
        yield entry
    for name in slots:
        raise BadInput("the graph needs it, but the model does not have it", file=source, tensor=name)


def _travels(entry: Entry, dtype: np.dtype[Any], nbytes: int) -> bool:
    """Whether the page can make the graph's values, of `dtype`, from what the container holds."""
    if dtype in _BYTES:
        return entry.dtype == dtype and nbytes > _SMALL_BYTES
    if not {dtype, entry.dtype} <= _FLOATS:
        return False
    stored = entry.dtype
    if isinstance(entry, Quantized):
        if entry.steps[-1].name != "cast.1":
            # However small: in the graph they would be plain numbers again.
            return True
        stored = DTYPES[entry.steps[-1].params["from"]]
    # The page narrows float32 only, and widens what is narrower.
    fits = entry.dtype == dtype if stored == _F64 else stored in _FLOATS
    return nbytes > _SMALL_BYTES and fits


def _float32_bytes(model: Model) -> int:
    return sum(entry.size * max(entry.dtype.itemsize, 4) for entry in model.tensors)
