"""safetensors: plain files, shrink's own, and sharded ones by their `*.index.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from shrink import container
from shrink.errors import BadInput, printable
from shrink.files import file_size, inside, read_all
from shrink.model import Entry, Model, Source

NAME = "safetensors"
SUFFIX = ".safetensors"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4"})

_INDEX_AT_MOST = 100_000_000


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


def _read_sharded(path: Path) -> Model:
    try:
        index = json.loads(read_all(path, at_most=_INDEX_AT_MOST))
        weight_map = dict(index["weight_map"])
        if not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadInput("not a valid index of shards: no weight_map of names to files", file=path) from None
    entries: dict[str, Entry] = {}
    size = file_size(path)
    parts = []
    for shard in sorted(set(weight_map.values())):
        shard_path = inside(path.parent, shard, file=path)
        if not os.path.isfile(shard_path):
            raise BadInput(f"its shard {printable(shard)} is missing", file=path)
        part = container.read(shard_path)
        parts.append(part)
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
    first = parts[0] if parts else container.Contents(())
    return Model(tuple(entries.values()), Source(first.source or NAME, path, size), first.attributes, first.graph)


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    return container.write(
        entries, path, source=model.source.format, attributes=model.attributes, graph=model.graph, level=level
    )
