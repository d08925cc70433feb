"""WebDNN folders, in place: weights and graphs over the limit in parts, which stock WebDNN loads by one more script.

    split.json   {"shrink": {"version": 1, "files": {"weight_webassembly.bin": {"bytes", "integrity", "parts"}}}}
    split.js     answers the page's requests for those files; <script src="model/split.js"></script> is all it needs

Stock WebDNN takes the page that a server answers for a missing file as weights. So the graph of weights in parts is in
parts too: on a page without the script it is missing first, and a missing graph is an error.

Parts have a hash of the whole file in their names. They are written first, then the index, and then the files that
are in parts now go: at any time the folder holds the old model or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shrink import parts
from shrink.errors import BadInput, BoundNotMet, UsageError, printable
from shrink.files import atomic_file, file_size, finishing, io_errors, put
from shrink.formats._webdnn_read import GRAPH_FILE, WEIGHT_FILE
from shrink.parts import Part
from shrink.progress import Progress, silent
from shrink.split import File, Plan

__all__ = ["INDEX", "SCRIPT", "join", "plan"]

INDEX, SCRIPT = "split.json", "split.js"

_PART = re.compile(r"(weight|graph)_\w{1,64}-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.bin")
_INDEX_PART = re.compile(r"split-[0-9a-f]{8}-index\d?-\d{5,}-of-\d{5,}\.json")


@dataclass(frozen=True)
class _Cut:
    """A file in parts, as split.json lists it."""

    size_bytes: int
    integrity: str
    parts: tuple[Part, ...]

    def as_json(self) -> dict[str, Any]:
        listed = [part.as_json() for part in self.parts]
        return {"bytes": self.size_bytes, "integrity": self.integrity, "parts": listed}


@dataclass(frozen=True)
class _Index:
    """What is in parts, by name, and the parts that the index itself lies in."""

    files: Mapping[str, _Cut]
    parts: tuple[Part, ...] = ()

    def names(self) -> set[str]:
        return {part.file for part in (*(p for file in self.files.values() for p in file.parts), *self.parts)}


def plan(source: Path, limit: int, folder: Path, *, force: bool = False, dry_run: bool = False) -> Plan:
    """The parts of each file over the limit, the script and the index. The files themselves go when all is written.

    Raises:
        UsageError: the folder is split for a larger limit, or it holds another model since and there is no `force`.
        BoundNotMet: a file that cannot be cut, such as compiled kernels, is over the limit.
    """
    sizes = dict(_sizes(folder))
    old = _read(folder) if INDEX in sizes else _Index({})
    listed = {*old.names(), INDEX, SCRIPT}
    large = {name for name, size in sizes.items() if size > limit and name not in listed}
    for name in sorted(large):
        if not _can_be_cut(name):
            least = max(sizes[other] for other in large if not _can_be_cut(other))
            raise BoundNotMet(
                f"its {sizes[name]} bytes are over the limit of {limit}, and such a file cannot be cut",
                file=folder / name,
                hint=f"the smallest limit that works is {least} bytes",
            )
    wholes = {name: _integrity(folder, name) for name in old.files if name in sizes}
    for name in sorted(old.files):
        if name in wholes and wholes[name] != old.files[name].integrity and not force:
            hint = "--force splits the file that is there whole"
            raise UsageError(f"{printable(name)} is in parts and, with other content, there", file=folder, hint=hint)
    # A file that is there whole as well is one that a split which was stopped did not come to remove.
    same = {
        name
        for name in wholes
        if wholes[name] == old.files[name].integrity and all(p.size_bytes <= limit for p in old.files[name].parts)
    }
    in_parts = {*large, *same, *(name for name in old.files if name not in sizes)}
    # A graph only needs to be in parts where it is large, or its weights are.
    same -= {n for n in same if sizes[n] <= limit and all(_graph_of(o) != n for o in in_parts - {n})}
    kept = {name: file for name, file in old.files.items() if name not in sizes or name in same}
    large -= same
    if any(part.size_bytes > limit for file in kept.values() for part in file.parts):
        raise UsageError("it is split already, for a larger limit", file=folder, hint="join it first: shrink join")
    large |= {graph for name in large if (graph := _graph_of(name)) in sizes and graph not in same}
    if not large and not wholes:
        return _nothing_to_do(folder, limit, old)
    if SCRIPT in sizes and not old.files and not force and (folder / SCRIPT).read_bytes() != _script():
        raise UsageError("exists already", file=folder / SCRIPT, hint="--force replaces it")
    cut = {name: _planned(name, sizes[name], _integrity(folder, name), limit) for name in sorted(large)}
    new = {**kept, **cut}
    if not new:
        own = (SCRIPT, *sorted(_all_parts(folder)), INDEX)
        note = "every file is within the limit: only what splitting once put here goes"
        return Plan(source, folder, limit, (), (note,), lambda progress: _remove(folder, own))
    files = _files(new, cut, limit)
    for file in files:
        if file.size_bytes > limit:
            raise BoundNotMet(f"it would have {file.size_bytes} bytes, over the limit of {limit}", file=file.name)
    script = f'<script src="{quote(folder.resolve().name, errors="surrogateescape")}/{SCRIPT}"></script>'
    note = f"the page needs one more line, before it calls WebDNN.load: {script}"

    def write(progress: Progress) -> None:
        _write(folder, kept, cut, limit, progress)
        _remove(folder, sorted(same))

    return Plan(source, folder, limit, files, (note,), write)


def _nothing_to_do(folder: Path, limit: int, old: _Index) -> Plan:
    held = tuple(File(p.file, p.size_bytes, f"part of {n}") for n, file in old.files.items() for p in file.parts)
    why = "it is split already" if old.files else "every file is within the limit already"
    return Plan(folder, folder, limit, held, (f"{why}: nothing is written",), lambda progress: None)


def _can_be_cut(name: str) -> bool:
    """Whether it is one of the files that WebDNN asks for where a script of the page hears of it."""
    return bool(GRAPH_FILE.fullmatch(name) or WEIGHT_FILE.fullmatch(name))


def _graph_of(name: str) -> str:
    """The graph that weights belong to."""
    found = WEIGHT_FILE.fullmatch(name)
    return f"graph_{found[1]}.json" if found else name


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    with io_errors(folder):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix(), path.stat().st_size


def _integrity(folder: Path, name: str) -> str:
    with io_errors(folder / name), open(folder / name, "rb", buffering=0) as file:
        return parts.describe(name, file, file_size(folder / name)).integrity


def _planned(name: str, size_bytes: int, integrity: str, limit: int) -> _Cut:
    lengths = parts.even(size_bytes, limit)
    names = parts.numbered(f"{Path(name).stem}-{_mark(integrity)}", len(lengths), ".bin")
    found = (Part(part, length, parts.NO_INTEGRITY) for part, length in zip(names, lengths, strict=True))
    return _Cut(size_bytes, integrity, tuple(found))


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _indexed(files: Mapping[str, _Cut], limit: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The index and its parts; their names tell this content and this division from any other."""
    listed = {name: file.as_json() for name, file in sorted(files.items())}
    text = parts.as_bytes({"shrink": {"version": parts.VERSION, "files": listed}})
    mark = _mark(" ".join(f"{part.file} {file.integrity}" for file in files.values() for part in file.parts))
    return parts.fit_index(text, f"split-{mark}", limit)


def _script() -> bytes:
    return (resources.files("shrink") / "web" / SCRIPT).read_bytes()


def _files(new: Mapping[str, _Cut], cut: Mapping[str, _Cut], limit: int) -> tuple[File, ...]:
    top, index_parts = _indexed(new, limit)
    return (
        *(File(part.file, part.size_bytes, f"part of {name}") for name, file in cut.items() for part in file.parts),
        File(SCRIPT, len(_script()), "what joins the parts on the page"),
        *(File(name, len(data), "part of the index") for name, data in index_parts),
        File(INDEX, len(top), "index"),
    )


def _write(folder: Path, kept: Mapping[str, _Cut], cut: Mapping[str, _Cut], limit: int, progress: Progress) -> None:
    done = {name: replace(file, parts=tuple(found)) for name, file, found in _written(folder, cut, progress)}
    new = _Index({**kept, **done})
    top, index_parts = _indexed(new.files, limit)
    for name, data in ((SCRIPT, _script()), *index_parts, (INDEX, top)):
        put(folder / name, data)
    _remove(folder, [*done, *(_all_parts(folder) - new.names() - {name for name, _ in index_parts})])


def _written(folder: Path, cut: Mapping[str, _Cut], progress: Progress) -> Iterator[tuple[str, _Cut, list[Part]]]:
    total, done = sum(file.size_bytes for file in cut.values()), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count

    for name, file in cut.items():
        path = folder / name
        if file_size(path) != file.size_bytes:
            raise BadInput("the file has changed since the split was planned", file=path)
        found = []
        with finishing() as finish, io_errors(path), open(path, "rb", buffering=0) as source:
            for part in file.parts:
                progress(part.file, done, total)
                place = folder / part.file
                found.append(parts.write_part(place, source, part.size_bytes, on_bytes=tell, finish=finish))
        yield name, file, found
    progress("", total, total)


def _all_parts(folder: Path) -> set[str]:
    """Everything that has the name of a part, listed or left by a split that was stopped."""
    with io_errors(folder):
        names = os.listdir(folder)
    return {name for name in names if _PART.fullmatch(name) or _INDEX_PART.fullmatch(name)}


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        # What is left lies in nobody's way.
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _read(folder: Path) -> _Index:
    path = folder / INDEX
    content, index_parts = parts.read_json(path)
    ours = content.get("shrink")
    files = ours.get("files") if isinstance(ours, dict) else None
    if not isinstance(ours, dict) or not isinstance(files, dict):
        raise BadInput("it is not the index of a WebDNN folder in parts", file=path)
    parts.check_version(ours, path)
    found = {}
    for name, said in files.items():
        integrity = said.get("integrity") if isinstance(said, dict) else None
        if not _can_be_cut(name) or not parts.is_integrity(integrity):
            raise BadInput(f"not a valid index: {printable(name)} is not such a file, or has no SHA-256", file=path)
        found[name] = _Cut(said["bytes"], integrity, parts.parse_parts(said.get("parts"), said.get("bytes"), file=path))
    return _Index(found, index_parts)


def join(folder: Path, *, progress: Progress = silent) -> Path:
    """Put the folder back as it was, every part checked, and say where it lies. The parts, index and script go.

    Raises:
        IntegrityError: a part is missing or not the one that was written.
        UsageError: a file that is in parts is there, with other content.
        BadInput: the folder is not split, or its index is malformed.
    """
    if not (folder / INDEX).is_file():
        raise BadInput(f"there is no {INDEX} in it: it is not in parts", file=folder)
    with contextlib.ExitStack() as together:
        for name, file in _read(folder).files.items():
            path = folder / name
            if not path.is_file():
                out = together.enter_context(atomic_file(path))
                parts.join(folder, file.parts, out, file=folder / INDEX, progress=progress)
            elif _integrity(folder, name) != file.integrity:
                raise UsageError("it is there already, with other content", file=path, hint="remove it, or the split")
    # The index last: until it goes, joining can go on where it stopped.
    _remove(folder, [SCRIPT, *sorted(_all_parts(folder)), INDEX])
    return folder
