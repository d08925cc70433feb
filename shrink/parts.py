"""A file in parts: the list that says which files, in order, give the original's bytes, and how it is read and joined.

A part is a file beside its index. Its first `skip` bytes are its own (the header that makes a shard a valid
safetensors file); the rest of all parts, in order, is the original. In JSON:

    {"file": name, "bytes": length of the file, "skip": number, 0 where left out, "integrity": "sha256-<base64>"}

An index is a JSON object with the key `shrink`:

    {"version": 1, "file": name of the original, "bytes": its length, "parts": [part, …], …}

or, where that text would itself be over the limit, {"version": 1, "index": {"bytes": length, "parts": [part, …]}},
whose parts join to the index. All of it is hostile: names stay in the index's own folder, and no length is believed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from shrink.errors import BadInput, IntegrityError, ShrinkError, UsageError, printable
from shrink.files import Finish, atomic_file, inside, io_errors, read_all
from shrink.progress import Progress, silent

__all__ = [
    "NO_INTEGRITY",
    "Part",
    "PartsIndex",
    "as_bytes",
    "check_version",
    "describe",
    "even",
    "fit_index",
    "integrity",
    "is_integrity",
    "is_length",
    "is_plain",
    "is_there",
    "join",
    "mark",
    "numbered",
    "parse_parts",
    "read_index",
    "read_json",
    "verify",
    "write_part",
]

VERSION = 1
# As long as every other: what an index is planned with before anything is hashed.
NO_INTEGRITY = "sha256-" + "A" * 43 + "="

_INTEGRITY = re.compile(r"sha256-[A-Za-z0-9+/]{43}=")
# Separators, controls, and halves of characters, which no file system takes.
_NO_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Small enough to stay in the processor's cache from reading to hashing to writing.
_BLOCK = 1 << 18
# Blocks that may wait for the hashing thread.
_WAITING = 8
# The largest index that is believed, whole or joined.
_INDEX_AT_MOST = 1 << 27
_ROUNDS_AT_MOST = 8
# Larger whole numbers are not exact in a browser.
_NUMBER_AT_MOST = 1 << 53


@dataclass(frozen=True)
class Part:
    """One part: a plain file name, the file's length in bytes (the skipped ones included), and its SHA-256 (SRI)."""

    file: str
    size_bytes: int
    integrity: str
    skip: int = 0

    def as_json(self) -> dict[str, Any]:
        skip = {"skip": self.skip} if self.skip else {}
        return {"file": self.file, "bytes": self.size_bytes, **skip, "integrity": self.integrity}


@dataclass(frozen=True)
class PartsIndex:
    """A checked index: the original's name and bytes, its parts, and the parts that the index itself lies in."""

    path: Path
    file: str
    size_bytes: int
    parts: tuple[Part, ...]
    index_parts: tuple[Part, ...]
    content: dict[str, Any]


def as_bytes(value: Any) -> bytes:
    """JSON in one spelling, so that the same index is the same bytes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def integrity(data: bytes) -> str:
    """SHA-256 in the spelling of Subresource Integrity."""
    return _spelled(hashlib.sha256(data).digest())


def _spelled(digest: bytes) -> str:
    return "sha256-" + base64.b64encode(digest).decode()


def even(size: int, limit: int) -> list[int]:
    """The lengths of the fewest parts, as equal as can be, of which none is over `limit`; one where `size` is 0."""
    count = max(1, -(-size // limit))
    return [size * (i + 1) // count - size * i // count for i in range(count)]


def numbered(stem: str, count: int, suffix: str) -> list[str]:
    """File names of parts: `gen-00001-of-00003.safetensors` …"""
    return [f"{stem}-{i:05}-of-{count:05}{suffix}" for i in range(1, count + 1)]


def mark(*content: bytes) -> str:
    """What tells the names of these parts from those of others: `-3f9a2c1b`."""
    return "-" + hashlib.sha256(b"".join(content)).hexdigest()[:8]


def is_plain(name: object) -> TypeGuard[str]:
    """Whether this is the name of a file in the same folder, and of nothing else."""
    return isinstance(name, str) and 0 < len(name) <= 255 and name not in (".", "..") and not _NO_NAME.search(name)


def is_length(value: object, at_most: int = _NUMBER_AT_MOST) -> TypeGuard[int]:
    """Whether this is a whole number that can be a length."""
    return type(value) is int and 0 <= value <= at_most


def is_integrity(value: object) -> TypeGuard[str]:
    """Whether this is a SHA-256 in the spelling of Subresource Integrity."""
    return isinstance(value, str) and _INTEGRITY.fullmatch(value) is not None


def parse_parts(value: object, total_bytes: object, *, file: Path) -> tuple[Part, ...]:
    """The list of parts out of the JSON of `file`, checked. Their joined length must be `total_bytes`.

    Raises:
        BadInput: anything in it is missing, of the wrong type, out of bounds, or leads out of the folder.
    """

    def wrong(what: str) -> BadInput:
        return BadInput(f"not a valid list of parts: {what}", file=file)

    if not isinstance(value, list) or not value:
        raise wrong("there is none")
    found: list[Part] = []
    for item in value:
        if not isinstance(item, dict):
            raise wrong("a part is not an object")
        name, size, skip, sri = item.get("file"), item.get("bytes"), item.get("skip", 0), item.get("integrity")
        if not isinstance(name, str):
            raise wrong("a part has no file")
        if not is_plain(name):
            raise BadInput(f"it refers to {printable(name)}, outside its own folder", file=file, hint="refused")
        if not is_length(size) or not is_length(skip) or skip > size:
            raise wrong(f"{printable(name)} has no believable number of bytes")
        if not is_integrity(sri):
            raise wrong(f"{printable(name)} has no SHA-256")
        found.append(Part(name, size, sri, skip))
    names = {part.file for part in found}
    # A file that is named twice could be named a million times.
    if len(names) != len(found):
        raise wrong("a file is named twice")
    if file.name in names:
        raise wrong("it names itself")
    if not is_length(total_bytes) or sum(part.size_bytes - part.skip for part in found) != total_bytes:
        raise wrong("the parts do not add up to the length of the whole")
    return tuple(found)


def read_json(path: Path) -> tuple[dict[str, Any], tuple[Part, ...]]:
    """The JSON object of an index, put together where it is cut itself, and the parts that it then lay in.

    Raises:
        BadInput: no index, or one that cannot be.
        IntegrityError: a part of the index is missing or not the one that was written.
        OutputError: it is missing or cannot be read.
    """
    text = read_all(path, at_most=_INDEX_AT_MOST)
    lay_in: list[Part] = []
    for _ in range(_ROUNDS_AT_MOST):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise BadInput("not a valid index: it is not JSON", file=path) from None
        if not isinstance(content, dict):
            raise BadInput("not a valid index: it is not a JSON object", file=path)
        ours = content.get("shrink")
        if not isinstance(ours, dict) or "index" not in ours:
            return content, tuple(lay_in)
        check_version(ours, path)
        inner = ours["index"]
        if not isinstance(inner, dict) or not is_length(inner.get("bytes"), _INDEX_AT_MOST):
            raise BadInput("not a valid index: its own parts are not said", file=path)
        parts = parse_parts(inner.get("parts"), inner["bytes"], file=path)
        lay_in.extend(parts)
        joined = io.BytesIO()
        join(path.parent, parts, joined, file=path)
        text = joined.getvalue()
    raise BadInput("not a valid index: it is an index of an index without end", file=path)


def read_index(path: Path) -> PartsIndex:
    """The index of a file in parts, checked.

    Raises: as `read_json`, and BadInput where it is not an index that shrink wrote.
    """
    content, index_parts = read_json(path)
    ours = content.get("shrink")
    if not isinstance(ours, dict):
        raise BadInput("it does not list the parts of a file", file=path, hint="shrink did not write it")
    check_version(ours, path)
    name = ours.get("file")
    if not is_plain(name):
        raise BadInput("not a valid index: it does not name the file that was split", file=path)
    parts = parse_parts(ours.get("parts"), ours.get("bytes"), file=path)
    return PartsIndex(path, name, ours["bytes"], parts, index_parts, content)


def check_version(ours: dict[str, Any], path: Path) -> None:
    """Raises BadInput where what an index says under `shrink` is of another version."""
    if ours.get("version") != VERSION or type(ours["version"]) is not int:
        raise BadInput(
            f"version {printable(ours.get('version'))} of the index is not known",
            file=path,
            hint="a newer shrink may know it",
        )


def verify(folder: Path, parts: Sequence[Part], *, file: Path, progress: Progress = silent) -> None:
    """Read every part and compare length and SHA-256. `file`: who lists them, for messages.

    Raises:
        IntegrityError: a part is missing, shorter, longer, or has other content.
    """
    _each(folder, parts, lambda block: None, file=file, progress=progress)


def is_there(folder: Path, part: Part) -> bool:
    """Whether the part is there, with the very content that it was written with."""
    try:
        verify(folder, [part], file=folder)
    except ShrinkError:
        return False
    return True


def join(folder: Path, parts: Sequence[Part], out: IO[bytes], *, file: Path, progress: Progress = silent) -> None:
    """Write the joined bytes to `out`, each part checked as it is read. `file`: who lists them, for messages.

    `out` holds nothing of use when this raises.

    Raises:
        IntegrityError: a part is missing, shorter, longer, or has other content.
    """
    _each(folder, parts, out.write, file=file, progress=progress)


def _each(
    folder: Path, parts: Sequence[Part], write: Callable[[memoryview], object], *, file: Path, progress: Progress
) -> None:
    total = sum(part.size_bytes for part in parts)
    done = 0
    with _hashing() as hashing:
        for part in parts:
            path = inside(folder, part.file, file=file)
            with _opened(path, part, file) as source:
                digest, left, skip = hashing(), part.size_bytes, part.skip
                while left:
                    progress(part.file, done, total)
                    with io_errors(path):
                        block = source.read(min(_BLOCK, left))
                    if not block:
                        raise _unlike(part, file, "it is shorter than it was written")
                    digest.update(block)
                    if skip < len(block):
                        write(memoryview(block)[skip:])
                    skip = max(0, skip - len(block))
                    left -= len(block)
                    done += len(block)
                if source.read(1):
                    raise _unlike(part, file, "it is longer than it was written")
                if digest.integrity() != part.integrity:
                    raise _unlike(part, file, "its content is not what was written (SHA-256)")
    progress("", total, total)


def _unlike(part: Part, file: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"part {printable(part.file)}: {what}",
        file=file,
        hint="copy it here again from where it was made, or split anew",
    )


@contextmanager
def _opened(path: Path, part: Part, file: Path) -> Iterator[IO[bytes]]:
    """The part to read. Its length is compared before anything of it is read."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _unlike(part, file, "it is missing") from None
    except (OSError, ValueError) as error:
        raise _unlike(part, file, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(found.st_mode):
        raise _unlike(part, file, "it is not a file")
    if found.st_size != part.size_bytes:
        shorter = "shorter" if found.st_size < part.size_bytes else "longer"
        raise _unlike(part, file, f"it is {shorter} than it was written: {found.st_size}, not {part.size_bytes} bytes")
    with io_errors(path), open(path, "rb", buffering=0) as source:
        yield source


class _Digest:
    """SHA-256 in a thread beside reading and writing; small blocks are not worth the way there."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._hash = hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def update(self, block: bytes) -> None:
        if len(block) < _BLOCK // 4 and not self._waiting:
            self._hash.update(block)
            return
        self._waiting.append(self._pool.submit(self._hash.update, block))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def integrity(self) -> str:
        while self._waiting:
            self._waiting.popleft().result()
        return _spelled(self._hash.digest())


@contextmanager
def _hashing() -> Iterator[Callable[[], _Digest]]:
    with ThreadPoolExecutor(1, "sha256") as pool:
        yield lambda: _Digest(pool)


def write_part(
    path: Path,
    source: IO[bytes],
    length: int,
    *,
    head: bytes = b"",
    on_bytes: Callable[[int], object] = lambda count: None,
    finish: Finish = lambda end: end(),
) -> Part:
    """Write `head` and the next `length` bytes of `source` to `path`, whole or not at all, and say what was written.

    `on_bytes` hears of every block. `head` is what joining skips. `finish` is as in `shrink.files.atomic_file`.

    Raises:
        BadInput: the source ends too soon.
        OutputError: writing failed.
    """
    with atomic_file(path, finish=finish) as out:
        part = describe(path.name, source, length, head=head, write=out.write, on_bytes=on_bytes)
    return part


def describe(
    name: str,
    source: IO[bytes],
    length: int,
    *,
    head: bytes = b"",
    write: Callable[[bytes], object] = lambda block: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Part:
    """The part that `write_part` would write, without writing it anywhere but where `write` puts it."""
    with _hashing() as hashing:
        digest = hashing()
        if head:
            digest.update(head)
            write(head)
        left = length
        while left:
            block = source.read(min(_BLOCK, left))
            if not block:
                raise BadInput("it became shorter while it was read", file=getattr(source, "name", None))
            digest.update(block)
            write(block)
            left -= len(block)
            on_bytes(len(block))
        return Part(name, len(head) + length, digest.integrity(), len(head))


def fit_index(text: bytes, stem: str, limit: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """An index text as files of `limit` bytes at most: the bytes of the index file, and the parts it lies in.

    The sizes depend on the length of the text alone, not on what it says.

    Raises:
        UsageError: the text is too long to be read again.
    """
    if len(text) > _INDEX_AT_MOST:
        raise UsageError(f"with {limit} bytes a file the index would be larger than {_INDEX_AT_MOST} bytes")
    files: list[tuple[str, bytes]] = []
    for deep in range(_ROUNDS_AT_MOST):
        if len(text) <= limit:
            return text, files
        lengths = even(len(text), limit)
        suffix = "-index" if not deep else f"-index{deep + 1}"
        parts, start = [], 0
        for name, length in zip(numbered(stem + suffix, len(lengths), ".json"), lengths, strict=True):
            data = text[start : start + length]
            start += length
            parts.append(Part(name, length, integrity(data)))
            files.append((name, data))
        inner = {"bytes": len(text), "parts": [part.as_json() for part in parts]}
        text = as_bytes({"shrink": {"version": VERSION, "index": inner}})
    raise UsageError(f"with {limit} bytes a file the index would never fit")
