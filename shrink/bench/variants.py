"""What is measured: the float32 original, and each way of storing its weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink import container, formats, site
from shrink import recipe as recipes
from shrink.bench.plan import ORIGINAL, Variant
from shrink.errors import BadInput, ShrinkError, UsageError, printable
from shrink.export import Network, onnxruntime_web
from shrink.export.onnxruntime_web import graph_inputs
from shrink.files import file_size, io_errors
from shrink.formats import safetensors
from shrink.formats._onnx_proto import NAMED_DTYPES, Reader, parse
from shrink.model import Entry, Model, Tensor
from shrink.pipeline import decided, drop_state, quantized
from shrink.progress import Progress
from shrink.recipe import Recipe

__all__ = ["ExportedSites", "by_mode", "file_bytes", "from_file", "names_of", "original", "recipe_of"]

# As an export packs: what is measured is what a visitor downloads.
_LEVEL = 10


def original(network: Network, folder: Path, progress: Progress) -> Variant:
    """The network with every weight as a plain value of the type that its graph has.

    Raises:
        UsageError: the model has no graph.
        BadInput: graph and weights do not fit together.
    """
    model = drop_state(network.model)
    if model.graph is None:
        raise UsageError("this model has only weights, and a benchmark runs the graph", file=model.source.path)
    types = _types(model)
    entries = tuple(_plain(entry, types.get(entry.name, entry.dtype)) for entry in model.tensors)
    whole = dataclasses.replace(network, model=dataclasses.replace(model, tensors=entries))
    was_plain = all(a is b for a, b in zip(entries, model.tensors, strict=True))
    stored = _stored(whole, entries, folder / f"{ORIGINAL}.safetensors", progress)
    variant = Variant(ORIGINAL, None, stored, _reading(whole, stored))
    return dataclasses.replace(variant, file=model.source.path) if was_plain else variant


def _types(model: Model) -> dict[str, np.dtype[Any]]:
    """The type that the graph has for each weight."""
    path = model.source.path
    reader = Reader(path)
    slots = parse(model.graph or b"", path).graph.initializer
    return {s.external_data[0].value: NAMED_DTYPES[s.data_type] for s in slots if reader.storage(s) == "external"}


def _plain(entry: Entry, dtype: np.dtype[Any]) -> Entry:
    if isinstance(entry, Tensor) and entry.dtype == dtype:
        return entry

    def load() -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return entry.array.astype(dtype, copy=False)

    return Tensor(entry.name, dtype, entry.shape, load, entry.role)


def recipe_of(mode: str) -> Recipe:
    """What `eightbit` or `prune+int8` means. Raises UsageError."""
    return recipes.from_flags(mode.replace("+", ","), (), (), None, {})


def by_mode(first: Variant, mode: str, folder: Path, progress: Progress) -> Variant:
    """The original with its weights stored by a mode, such as `eightbit` or `prune+int8`.

    Raises:
        UsageError: there is no such mode.
        BadInput: a weight is NaN or infinite.
    """
    model = first.network.model
    entries = quantized(model, decided(model, recipe_of(mode)))
    stored = _stored(first.network, entries, folder / f"{mode}.safetensors", progress)
    return Variant(mode, mode.replace("+", ","), stored, _reading(first.network, stored))


def from_file(first: Variant, name: str, path: Path) -> Variant:
    """A variant that lies on disk, of any format: it has the original's weights by their names, or its own graph.

    Raises:
        BadInput: it has neither, or a weight has another shape.
        OutputError: it is missing or cannot be read.
    """
    model = drop_state(formats.sniff(path).read(path))
    network = first.network
    if model.graph is not None and model.graph != network.model.graph:
        _check_inputs(network.model, model)
        return Variant(name, None, path, dataclasses.replace(network, model=model, chain=None))
    theirs = {entry.name: entry for entry in model.tensors}
    entries = tuple(_theirs(entry, theirs.get(entry.name), path) for entry in network.model.tensors)
    both = dataclasses.replace(network.model, tensors=entries, source=model.source)
    return Variant(name, None, path, dataclasses.replace(network, model=both))


def _check_inputs(ours: Model, theirs: Model) -> None:
    """Refuse a network that takes other inputs. Raises BadInput."""
    wanted, found = _inputs(ours), _inputs(theirs)
    if wanted != found:
        raise BadInput(f"it takes {_in_words(found)}, the original takes {_in_words(wanted)}", file=theirs.source.path)


def _inputs(model: Model) -> list[tuple[str, int]]:
    path = model.source.path
    return [(i.name, i.type.tensor_type.elem_type) for i in graph_inputs(parse(model.graph or b"", path))]


def _in_words(inputs: list[tuple[str, int]]) -> str:
    known = [f"{printable(name)} of {NAMED_DTYPES.get(code, 'no numbers')}" for name, code in inputs]
    return " and ".join(known) or "nothing"


def _theirs(ours: Entry, theirs: Entry | None, path: Path) -> Entry:
    if theirs is None:
        # What only the graph needs, as ONNX has it and the snapshot does not.
        if ours.dtype.kind != "f" or ours.size <= 1:
            return ours
        raise BadInput("the network needs it, but it is not there", file=path, tensor=ours.name)
    if theirs.shape != ours.shape:
        raise BadInput(f"its shape is {list(theirs.shape)}, the network's is {list(ours.shape)}", file=path)
    return theirs


def names_of(paths: Sequence[Path]) -> list[str]:
    """What variants on disk are called: by their files, with a number where two would be the same."""
    names: list[str] = []
    for path in paths:
        suffix = path.suffix if path.suffix != ".json" else ""
        name = stem = printable(path.name.removesuffix(suffix) or path.resolve().name, at_most=150)
        number = 1
        while name in (ORIGINAL, *names):
            number += 1
            name = f"{stem} {number}"
        names.append(name)
    return names


def _stored(network: Network, entries: Iterable[Entry], path: Path, progress: Progress) -> Path:
    """Write the network as `shrink quantize` does, packed as for a page."""
    model = network.model
    total, done = sum(entry.size for entry in model.tensors), 0

    def told() -> Iterable[Entry]:
        nonlocal done
        for entry in entries:
            progress(f"{path.stem}: {entry.name}", done, total)
            yield entry
            done += entry.size

    container.write(
        told(), path, source=model.source.format, attributes=model.attributes, graph=model.graph, level=_LEVEL
    )
    progress(path.stem, total, total)
    return path


def _reading(network: Network, path: Path) -> Network:
    """The network with its weights out of a file that was just written, so that they take no memory."""
    model = dataclasses.replace(safetensors.read(path), source=network.model.source)
    return dataclasses.replace(network, model=model, chain=None)


class ExportedSites:
    """Pages of the variants on ONNX Runtime Web, in subfolders of `folder`, each made when it is first asked for."""

    def __init__(self, folder: Path, runtime: Path | None = None):
        self._folder = folder
        self._runtime = runtime
        self._made: dict[tuple[str, str], Path | ShrinkError] = {}

    def folder(self, variant: Variant, backend: str, progress: Progress) -> Path:
        key = (variant.name, backend)
        if key not in self._made:
            # Not the variant's name, which is the user's.
            folder = self._folder / f"site-{len(self._made)}-{backend}"
            try:
                self._made[key] = self._exported(folder, variant, backend, progress)
            except ShrinkError as error:
                # Asked for again it would take as long to fail again.
                self._made[key] = error
                shutil.rmtree(folder, ignore_errors=True)
        made = self._made[key]
        if isinstance(made, ShrinkError):
            raise made
        return made

    def _exported(self, folder: Path, variant: Variant, backend: str, progress: Progress) -> Path:
        with io_errors(folder):
            folder.mkdir(parents=True)
        exported = onnxruntime_web.export(
            variant.network, folder, None, progress, backend=backend, runtime=self._runtime
        )
        site.add_page(folder, onnxruntime_web.NAME, variant.network.title, exported)
        return folder


def file_bytes(variant: Variant) -> int:
    """The size of the variant's file; of external data too, where an ONNX file has some."""
    source = variant.network.model.source
    return source.size_bytes if source.path == variant.file else file_size(variant.file)
