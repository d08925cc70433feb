"""safetensors: plain files, shrink's own, and sharded ones by their `*.index.json`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from shrink import container, parts
from shrink.errors import BadInput, ShrinkError, printable
from shrink.files import file_size, inside, io_errors
from shrink.model import Entry, Model, Source, Tensor

NAME = "safetensors"
SUFFIX = ".safetensors"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4", "calibrated"})

T = TypeVar("T")


def sniff(path: Path, head: bytes) -> bool:
    if path.name.endswith(".safetensors.index.json"):
        return True
    return (head[8:9] == b"{" and head[6:8] == b"\0\0") or path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    contents = container.read(path)
    source = Source(contents.source or NAME, path, file_size(path))
    return Model(contents.entries, source, contents.attributes, contents.graph)


class _Joined:
    """The whole file, put together for as long as somebody holds this."""

    def __init__(self, index: Path):
        said = parts.read_index(index)
        with io_errors(Path(tempfile.gettempdir())):
            handle, name = tempfile.mkstemp(SUFFIX, "shrink-")
            self.path, self.index = Path(name), index
            weakref.finalize(self, self.path.unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as out:
                parts.join(index.parent, said.parts, out, file=index)

    def reading(self, load: Callable[[], T]) -> Callable[[], T]:
        """`load`, which reads the whole file, and blames the index where that is wrong."""

        def read() -> T:
            try:
                return load()
            except ShrinkError as error:
                if error.file == self.path:
                    error.file = self.index
                raise

        return read


def _read_joined(path: Path) -> Model:
    """The model of a file that shrink split: the very same as of the whole."""
    whole = _Joined(path)
    contents = whole.reading(lambda: container.read(whole.path))()
    entries = tuple(_held(entry, whole) for entry in contents.entries)
    source = Source(contents.source or NAME, path, file_size(whole.path))
    return Model(entries, source, contents.attributes, contents.graph)


def _held(entry: Entry, whole: _Joined) -> Entry:
    if isinstance(entry, Tensor):
        return dataclasses.replace(entry, load=whole.reading(entry.load))
    return dataclasses.replace(entry, load=whole.reading(entry.load))


def _read_sharded(path: Path) -> Model:
    index, _ = parts.read_json(path)
    if "shrink" in index:
        return _read_joined(path)
    try:
        weight_map: dict[str, Any] = dict(index["weight_map"])
        if not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise BadInput("not a valid index of shards: no weight_map of names to files", file=path) from None
    entries: dict[str, Entry] = {}
    size = file_size(path)
    shards = []
    for shard in sorted(set(weight_map.values())):
        shard_path = inside(path.parent, shard, file=path)
        if not os.path.isfile(shard_path):
            raise BadInput(f"its shard {printable(shard)} is missing", file=path)
        part = container.read(shard_path)
        shards.append(part)
        size += file_size(shard_path)
        for entry in part.entries:
            if weight_map.get(entry.name) != shard:
                raise BadInput(f"it is in {shard}, which the index does not say", file=path, tensor=entry.name)
            entries[entry.name] = entry
    for name in weight_map:
        if name not in entries:
            raise BadInput(
                f"the index promises it in {weight_map[name]}, which does not hold it", file=path, tensor=name
            )
    first = shards[0] if shards else container.Contents(())
    return Model(tuple(entries.values()), Source(first.source or NAME, path, size), first.attributes, first.graph)


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    return container.write(
        entries, path, source=model.source.format, attributes=model.attributes, graph=model.graph, level=level
    )
