"""safetensors in shards: each a valid safetensors file, together the very bytes of the whole.

The index follows Hugging Face's convention (`weight_map`, `metadata.total_size`) and has one key more:

    "shrink": {"version": 1, "file": name of the whole, "bytes": its length, "decoded_bytes": of its values,
               "parts": [part, …],                      as in `shrink.parts`
               "tensors": {name: [shard numbers]}}      those that lie in chunks or under another name; from 1

The first tensor of the first shard, `shrink.header`, is the header of the whole. Shards are written first, each whole
or not at all, and the index last. A shard never replaces one of other content: where that would happen, and in the
folder of a page, whose visitors may have the old ones in their caches, the new names hold a hash.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shrink import container, formats, parts
from shrink.errors import BadInput, ShrinkError, UsageError, printable
from shrink.files import Scratch, file_size, finishing, holds, io_errors, is_taken, put
from shrink.parts import Part
from shrink.progress import Progress
from shrink.split import DONE, RENAMED, File, Plan, is_web
from shrink.split._layout import Shard, items, layout

__all__ = ["INDEX_SUFFIX", "plan"]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_HEADER = "shrink.header"
# Zstandard's level for models that come in another format.
_LEVEL = 3


def plan(source: Path, limit: int, folder: Path, *, force: bool = False, dry_run: bool = False) -> Plan:
    """Shards of a safetensors file, or of the safetensors file that an npz or h5 becomes on the way.

    Raises:
        UsageError: there is an index already, and no `force`.
        BadInput: the source is malformed.
    """
    if formats.sniff(source).NAME == "safetensors":
        return _plan(_Split.of(source, source.name, limit, folder), source, (), force=force)
    whole = Scratch(folder, dry_run=dry_run)
    model = formats.sniff(source).read(source)
    formats.by_name("safetensors").write(model, model.tensors, whole.path, _LEVEL)
    name = source.with_suffix(SUFFIX).name
    note = (
        f"{printable(source.name)} becomes {printable(name)} (float values as they are, Zstandard) on the way, "
        "and that is what joining gives back"
    )
    return _plan(_Split.of(whole.path, name, limit, folder), source, (note,), force=force, alive=whole)


@dataclass(frozen=True)
class _Split:
    """A file to split: where it lies, what it is called, and its shards."""

    whole: Path
    name: str
    limit: int
    folder: Path
    head: bytes
    size_bytes: int
    decoded_bytes: int
    tensors: tuple[str, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, whole: Path, name: str, limit: int, folder: Path) -> _Split:
        head, tensors, decoded_bytes = _read(whole)
        own = _HEADER
        names = {tensor[0] for tensor in tensors}
        while own in names:
            own += "_"
        stream = [(own, "U8", (len(head),), len(head)), *tensors]
        shards = layout(items(stream, limit), limit)
        size = len(head) + sum(tensor[3] for tensor in tensors)
        shown = tuple(tensor[0] for tensor in stream)
        return cls(whole, name, limit, folder, head, size, decoded_bytes, shown, tuple(shards))

    @property
    def stem(self) -> str:
        return self.name.removesuffix(SUFFIX)

    @property
    def index(self) -> Path:
        return self.folder / f"{self.stem}{INDEX_SUFFIX}"

    def names(self, mark: str = "") -> list[str]:
        return parts.numbered(self.stem + mark, len(self.shards), SUFFIX)

    def unhashed(self) -> list[Part]:
        """The parts as they will be, but for what only reading everything can tell."""
        return [
            Part(name, len(head) + shard.stop - shard.start, parts.NO_INTEGRITY, len(head))
            for name, shard in zip(self.names(), self.shards, strict=True)
            for head in (shard.header,)
        ]


def _read(path: Path) -> tuple[bytes, list[tuple[str, str, tuple[int, ...], int]], int]:
    """The bytes before the data; name, dtype, shape and bytes of the tensors in file order; their bytes decoded."""
    try:
        # Opening validates everything: header size, overlaps, holes, offsets against dtype and shape.
        with io_errors(path), safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BadInput(f"not a valid safetensors file: {error}", file=path) from None
    with io_errors(path), open(path, "rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
    try:
        header = dict(json.loads(head[8:], object_pairs_hook=_no_twins))
    except (ValueError, RecursionError):
        raise BadInput("its header names a tensor twice, or is not JSON", file=path) from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = [
        (name, spec["dtype"], tuple(spec["shape"]), spec["data_offsets"][1] - spec["data_offsets"][0])
        for name, spec in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    ]
    decoded = sum(tensor[3] for tensor in tensors)
    if "shrink" in metadata:
        decoded = sum(entry.size * entry.dtype.itemsize for entry in container.read(path).entries)
    return head, tensors, decoded


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError
    return out


def _index_text(split: _Split, found: list[Part]) -> bytes:
    weight_map = {}
    elsewhere: dict[str, list[int]] = {}
    for number, (shard, part) in enumerate(zip(split.shards, found, strict=True), 1):
        for piece in shard.pieces:
            weight_map[piece.key] = part.file
            if piece.key != split.tensors[piece.item]:
                elsewhere.setdefault(split.tensors[piece.item], []).append(number)
    ours = {
        "version": parts.VERSION,
        "file": split.name,
        "bytes": split.size_bytes,
        "decoded_bytes": split.decoded_bytes,
        **({"tensors": elsewhere} if elsewhere else {}),
        "parts": [part.as_json() for part in found],
    }
    metadata = {"total_size": split.size_bytes - len(split.head)}
    return parts.as_bytes({"metadata": metadata, "weight_map": weight_map, "shrink": ours})


@dataclass(frozen=True)
class _Set:
    """The files of a finished split: its shards, the parts of its index, and its index."""

    parts: list[Part]
    index_parts: list[tuple[str, bytes]]
    index: bytes

    @classmethod
    def of(cls, split: _Split, found: list[Part], mark: str = "") -> _Set:
        named = [replace(part, file=name) for part, name in zip(found, split.names(mark), strict=True)]
        top, index_parts = parts.fit_index(_index_text(split, named), split.stem + mark, split.limit)
        return cls(named, index_parts, top)

    @property
    def mark(self) -> str:
        return parts.mark(self.index, *(data for _, data in self.index_parts))

    @property
    def names(self) -> set[str]:
        return {part.file for part in self.parts} | {name for name, _ in self.index_parts}


def _plan(split: _Split, source: Path, notes: tuple[str, ...], *, force: bool, alive: object = None) -> Plan:
    """The plan. `alive` is held as long as the plan can be carried out."""
    expected = _Set.of(split, split.unhashed())
    mark, kept = "", frozenset[str]()
    taken = [n for n in (*expected.names, split.index.name) if is_taken(split.folder / n)]
    old = _names_of_old(split)
    web = is_web(split.folder)
    if taken or web:
        # Names are in use, or hold a hash: only now is it worth reading everything before anything is written.
        exact = _Set.of(split, [*_hashed(split)])
        if web:
            mark = exact.mark
            exact = _Set.of(split, exact.parts, mark)
        same = {name for name in exact.names if _is_there(split.folder, exact, name)}
        index_is_same = holds(split.index, exact.index)
        if index_is_same and same == exact.names:
            return Plan(source, split.folder, split.limit, _files(split, exact), (*notes, DONE), lambda progress: None)
        if split.index.name in taken and not force:
            raise UsageError("exists already", file=split.index, hint="--force replaces it")
        if not mark and any(name in exact.names and name not in same for name in taken):
            mark = exact.mark
            exact = _Set.of(split, exact.parts, mark)
            same = {name for name in exact.names if _is_there(split.folder, exact, name)}
            notes = (*notes, RENAMED)
        expected, kept = exact, frozenset(same)
    if split.size_bytes <= split.limit:
        notes = (*notes, f"the whole file is within the limit already: {split.size_bytes} bytes")

    def write(progress: Progress) -> None:
        _write(split, expected.parts, mark, kept, old, progress)
        _ = alive

    return Plan(source, split.folder, split.limit, _files(split, expected), notes, write)


def _files(split: _Split, found: _Set) -> tuple[File, ...]:
    shards = [
        File(part.file, part.size_bytes, _holds_words(split, shard))
        for part, shard in zip(found.parts, split.shards, strict=True)
    ]
    index_parts = [File(name, len(data), "part of the index") for name, data in found.index_parts]
    return (*shards, *index_parts, File(split.index.name, len(found.index), "index"))


def _holds_words(split: _Split, shard: Shard) -> str:
    whole, words = 0, []
    for piece in shard.pieces:
        name = split.tensors[piece.item]
        if piece.item == 0:
            words.append("header" if piece.key == name else "part of the header")
        elif piece.key == name:
            whole += 1
        else:
            words.append(f"part of {printable(name, at_most=40)}")
    tensors = [f"{whole} tensor{'' if whole == 1 else 's'}"] if whole else []
    return ", ".join(tensors + words)


def _hashed(split: _Split) -> Iterator[Part]:
    """The parts, by reading the whole once."""
    with io_errors(split.whole), open(split.whole, "rb", buffering=0) as file:
        for name, shard in zip(split.names(), split.shards, strict=True):
            yield parts.describe(name, file, shard.stop - shard.start, head=shard.header)


def _is_there(folder: Path, wanted: _Set, name: str) -> bool:
    """Whether the file is there with the very content that it would be written with."""
    for other, data in wanted.index_parts:
        if other == name:
            return holds(folder / name, data)
    return all(parts.is_there(folder, part) for part in wanted.parts if part.file == name)


def _names_of_old(split: _Split) -> frozenset[str]:
    """The files of the set that is replaced, as far as its index can be read and the names are like ours."""
    if not split.index.is_file():
        return frozenset()
    try:
        old = parts.read_index(split.index)
    except ShrinkError:
        return frozenset()
    ours = re.compile(re.escape(split.stem) + r"(-[0-9a-f]{8})?(-index\d?)?-\d{5,}-of-\d{5,}\.(safetensors|json)")
    return frozenset(part.file for part in (*old.parts, *old.index_parts) if ours.fullmatch(part.file))


def _write(
    split: _Split, expected: list[Part], mark: str, kept: frozenset[str], old: frozenset[str], progress: Progress
) -> None:
    with io_errors(split.folder):
        split.folder.mkdir(parents=True, exist_ok=True)
    if file_size(split.whole) != split.size_bytes:
        raise BadInput("the file has changed since the split was planned", file=split.whole)
    found = _Set.of(split, list(_written(split, expected, kept, progress)), mark)
    for name, data in found.index_parts:
        if name not in kept:
            put(split.folder / name, data)
    put(split.index, found.index)
    for name in old - found.names:
        # What is left of an old set is in nobody's way.
        with contextlib.suppress(OSError):
            (split.folder / name).unlink()


def _written(split: _Split, expected: list[Part], kept: frozenset[str], progress: Progress) -> Iterator[Part]:
    done = 0
    with finishing() as finish, io_errors(split.whole), open(split.whole, "rb", buffering=0) as file:
        head = file.read(len(split.head))
        if head != split.head:
            raise BadInput("the file has changed since the split was planned", file=split.whole)
        file.seek(0)
        for planned, shard in zip(expected, split.shards, strict=True):
            name, length = planned.file, shard.stop - shard.start

            def tell(count: int, name: str = name) -> None:
                nonlocal done
                progress(name, done, split.size_bytes)
                done += count

            if name in kept:
                part = parts.describe(name, file, length, head=shard.header, on_bytes=tell)
            else:
                path = split.folder / name
                part = parts.write_part(path, file, length, head=shard.header, on_bytes=tell, finish=finish)
            if planned.integrity not in (parts.NO_INTEGRITY, part.integrity):
                raise BadInput("the file has changed since the split was planned", file=split.whole)
            yield part
    progress("", split.size_bytes, split.size_bytes)
