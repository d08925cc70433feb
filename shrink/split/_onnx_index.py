"""The index of a split ONNX file, read and checked, and the original put together again by it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from shrink import parts
from shrink.errors import BadInput, IntegrityError, UsageError
from shrink.files import atomic_file, file_size, inside, io_errors, is_folder, is_taken
from shrink.parts import Part
from shrink.progress import Progress, silent

__all__ = ["Index", "join"]

_BLOCK = 1 << 20
# Data files and the rest are read by turns; very many of them must not all be open.
_OPEN_AT_MOST = 8


@dataclass(frozen=True)
class Index:
    """A checked index. Each place of the layout is a part's number, an offset in it and a length."""

    path: Path
    file: str
    size_bytes: int
    integrity: str
    graph: str
    parts: tuple[Part, ...]
    layout: tuple[tuple[int, int, int], ...]
    index_parts: tuple[Part, ...]

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises BadInput: not the index of a split ONNX file, or one that cannot be."""
        content, index_parts = parts.read_json(path)
        ours = content.get("shrink")
        if not isinstance(ours, dict) or "layout" not in ours:
            raise BadInput("it is not the index of a split ONNX file", file=path, hint="shrink did not write it")
        parts.check_version(ours, path)
        file, size, integrity, graph = (ours.get(key) for key in ("file", "bytes", "integrity", "graph"))
        if not parts.is_plain(file) or not parts.is_plain(graph) or not parts.is_length(size):
            raise _wrong(path, "it does not say which file was split, its length, or the graph")
        if not parts.is_integrity(integrity):
            raise _wrong(path, "there is no SHA-256 of the whole")
        found = ours.get("parts")
        sizes = [p.get("bytes") for p in found if isinstance(p, dict)] if isinstance(found, list) else []
        listed = parts.parse_parts(found, sum(n for n in sizes if type(n) is int), file=path)
        layout = tuple(_places(ours["layout"], listed, path))
        # Bytes that are used twice could be used a million times.
        if size > sum(part.size_bytes for part in listed):
            raise _wrong(path, "the whole is longer than its parts")
        if sum(length for _, _, length in layout) != size:
            raise _wrong(path, "the layout does not add up to the length of the whole")
        return cls(path, file, size, integrity, graph, listed, layout, index_parts)


def _wrong(path: Path, what: str) -> BadInput:
    return BadInput(f"not a valid index: {what}", file=path)


def _places(value: object, found: tuple[Part, ...], path: Path) -> Iterator[tuple[int, int, int]]:
    if not isinstance(value, list):
        raise _wrong(path, "the layout is not a list")
    for item in value:
        if not isinstance(item, list) or len(item) != 3 or not all(parts.is_length(number) for number in item):
            raise _wrong(path, "a place of the layout is not three whole numbers")
        number, offset, length = item
        if number >= len(found) or found[number].skip or offset + length > found[number].size_bytes:
            raise _wrong(path, "a place of the layout is outside its part")
        yield number, offset, length


def join(index: Path, output: Path | None = None, *, force: bool = False, progress: Progress = silent) -> Path:
    """Write the ONNX file that was split, and say where it lies. The parts stay.

    `output` is by default the original's name, beside the index.

    Raises:
        UsageError: the output exists and there is no `force`, or is one of the parts.
        IntegrityError: a part is missing or not the one that was written.
        BadInput: not the index of a split ONNX file.
    """
    found = Index.read(index)
    target = output if output is not None else index.parent / found.file
    if is_folder(target):
        target = target / found.file
    if is_taken(target) and not force:
        raise UsageError("exists already", file=target, hint="--force replaces it, -o names another")
    own = (index.name, found.graph, *(part.file for part in (*found.parts, *found.index_parts)))
    if any((index.parent / name).resolve() == target.resolve() for name in own):
        raise UsageError("the output would replace a file that it is made of", file=target)
    with atomic_file(target) as out:
        if _written(found, out, progress) != found.integrity:
            # One reading is enough while all is well; who is at fault is worth a second.
            parts.verify(index.parent, found.parts, file=index)
            raise IntegrityError("the joined file is not the one that was split (SHA-256)", file=index)
    return target


def _written(index: Index, out: IO[bytes], progress: Progress) -> str:
    """Write the whole, and give its SHA-256; "" where a part is missing or too short."""
    whole, done = hashlib.sha256(), 0
    with _Parts(index) as part:
        for number, offset, length in index.layout:
            progress(index.parts[number].file, done, index.size_bytes)
            left = length
            while left:
                block = part.read(number, offset + length - left, min(_BLOCK, left))
                if not block:
                    return ""
                whole.update(block)
                out.write(block)
                left -= len(block)
                done += len(block)
    progress("", index.size_bytes, index.size_bytes)
    return "sha256-" + base64.b64encode(whole.digest()).decode()


@dataclass
class _Parts:
    """The parts of an index, opened as they are read."""

    index: Index
    files: dict[int, IO[bytes]] = field(default_factory=dict)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """b"" where there is nothing."""
        name = self.index.parts[number].file
        path = self.index.path.parent / name
        if number not in self.files:
            inside(self.index.path.parent, name, file=self.index.path)
            # Opening a pipe would wait for ever.
            if not path.is_file() or file_size(path) != self.index.parts[number].size_bytes:
                return b""
            if len(self.files) >= _OPEN_AT_MOST:
                self.files.pop(next(iter(self.files))).close()
            with io_errors(path):
                self.files[number] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed at the end)
        with io_errors(path):
            self.files[number].seek(offset)
            return self.files[number].read(length)

    def __enter__(self) -> _Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.close()
