"""Exported pages: files over the limit become raw parts, in place, and the manifest lists them.

The page's adapter joins what the manifest lists in parts, whatever file it is: weights, graph or runtime. Scripts,
pages and styles are loaded by the browser itself, one file each, and cannot be cut.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from shrink import parts
from shrink.errors import BoundNotMet, IntegrityError, UsageError
from shrink.files import atomic_file, atomic_folder, finishing, io_errors, put
from shrink.manifest import MANIFEST, Listed, as_bytes, is_ours, part_stem, read, strangers
from shrink.parts import Part
from shrink.progress import Progress, silent
from shrink.split import File, Plan

__all__ = ["join", "plan"]

_SUFFIX = ".bin"
# What the adapters fetch; all else of a page the browser loads by itself.
_FETCHED = (".safetensors", ".onnx", ".gz", ".bin", ".wasm", ".json")
_OWN_FOLDER = "shrink"


def plan(source: Path, limit: int, folder: Path, *, force: bool = False, dry_run: bool = False) -> Plan:
    """How the page in `source` fits a host that takes files of `limit` bytes.

    With `folder` elsewhere the page is copied there first; `force` lets it replace what is there.

    Raises:
        BadInput: it is not an exported page.
        BoundNotMet: a file that cannot be cut is over the limit.
        UsageError: there is something at `folder` that is no such copy.
    """
    content, files = read(source)
    in_place = folder.resolve() == source.resolve()
    if not in_place:
        _check_copy(source, folder, force=force)
    large = {name: about for name, about in files.items() if _largest(name, about) > limit}
    stuck = {name: about.size_bytes for name, about in files.items() if name in large and not _can_be_cut(name)}
    if stuck:
        name = max(stuck, key=lambda name: stuck[name])
        raise BoundNotMet(
            f"{name} has {stuck[name]:,} bytes, and the browser loads it as one file",
            file=source,
            hint=f"the smallest limit for this page is {stuck[name]:,} bytes",
        )
    planned = {name: _planned(name, about, limit) for name, about in large.items()}
    after = {**files, **planned}
    size = len(_manifest(content, after))
    if size > limit:
        raise BoundNotMet(
            f"{MANIFEST} would have {size:,} bytes, and the browser loads it as one file",
            file=source,
            hint=f"the smallest limit for this page is about {size:,} bytes",
        )
    notes = _notes(source, files, limit, large)

    def write(progress: Progress) -> None:
        if in_place:
            _write(source, content, files, planned, progress)
            return
        with atomic_folder(folder) as copy:
            # A link is copied as a link: what it leads to is not the page's to publish. A pipe would never end.
            shutil.copytree(source, copy, symlinks=True, ignore=_special, dirs_exist_ok=True)
            _write(copy, content, files, planned, progress)

    if not large and in_place:
        return Plan(source, folder, limit, (), notes, lambda progress: None)
    cut = [
        File(str(PurePosixPath(name).with_name(part.file)), part.size_bytes, f"part of {name}")
        for name, about in sorted(planned.items())
        for part in about.parts
    ]
    return Plan(source, folder, limit, (*cut, File(MANIFEST, size, "the list of all files")), notes, write)


def _check_copy(source: Path, folder: Path, *, force: bool) -> None:
    """Raises UsageError where a copy of the page would replace what is no page, or come into itself."""
    ours, copy = source.resolve(), folder.resolve()
    if copy.is_relative_to(ours) or ours.is_relative_to(copy):
        raise UsageError("one of the folders lies in the other", file=folder, hint="choose another -o")
    if folder.is_dir() and not is_ours(folder):
        raise UsageError("holds files that shrink did not export", file=folder, hint="choose another -o")
    if folder.exists() and not force:
        raise UsageError("exists already", file=folder, hint="--force replaces it")


def _special(folder: str, names: list[str]) -> set[str]:
    """What is no file, folder or link."""
    paths = {name: Path(folder, name) for name in names}
    return {name for name, p in paths.items() if not (p.is_symlink() or p.is_file() or p.is_dir())}


def join(folder: Path, progress: Progress = silent) -> None:
    """Put every split file of the page in `folder` together again, in place.

    Raises:
        BadInput: it is not an exported page.
        IntegrityError: a part is missing or damaged; nothing is changed then.
        UsageError: none of its files is split, and nothing is left of a split.
    """
    content, files = read(folder)
    split = {name: about for name, about in files.items() if about.parts}
    whole = {name: Listed(about.size_bytes, about.integrity) for name, about in files.items()}
    if not split and not _left_over(folder, whole):
        raise UsageError("none of its files is split", file=folder)
    # Together: where one part is wrong, none of the files appears.
    with contextlib.ExitStack() as together:
        for name, about in split.items():
            place = folder / name
            out = together.enter_context(atomic_file(place))
            parts.join(place.parent, about.parts, out, file=folder / MANIFEST, progress=progress)
            out.flush()
            _check_whole(place, about, Path(out.name))
    if not split:
        # Joining was stopped while it tidied up: what is left may go where it is not needed any more.
        for name, about in whole.items():
            _check_whole(folder / name, about)
    _commit(folder, content, whole)


def _left_over(folder: Path, files: Mapping[str, Listed]) -> set[str]:
    """What is the page's, lies there, and is needed by nobody."""
    needed = {MANIFEST}
    for name, about in files.items():
        cut = {str(PurePosixPath(name).with_name(part.file)) for part in about.parts}
        needed |= cut or {name}
    present = _present(folder)
    return present - needed - strangers(folder, files, present)


def _largest(name: str, about: Listed) -> int:
    return max((part.size_bytes for part in about.parts), default=about.size_bytes)


def _can_be_cut(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _FETCHED and path.parts[0] != _OWN_FOLDER


def _planned(name: str, about: Listed, limit: int) -> Listed:
    """The file in parts whose hashes are not known yet."""
    lengths = parts.even(about.size_bytes, limit)
    names = parts.numbered(part_stem(PurePosixPath(name).name, about.integrity), len(lengths), _SUFFIX)
    cut = tuple(Part(file, size, parts.NO_INTEGRITY) for file, size in zip(names, lengths, strict=True))
    return Listed(about.size_bytes, about.integrity, cut)


def _manifest(content: Mapping[str, object], files: Mapping[str, Listed]) -> bytes:
    return as_bytes({**content, "files": {name: about.as_json() for name, about in files.items()}})


def _notes(source: Path, files: Mapping[str, Listed], limit: int, large: Mapping[str, Listed]) -> tuple[str, ...]:
    others = strangers(source, files, _present(source))
    over = sorted(name for name in others if (source / name).stat().st_size > limit)
    warned = tuple(f"{name} is over the limit too, but not part of the page: it stays as it is." for name in over)
    return warned if large else ("Every file of the page fits already.", *warned)


def _present(folder: Path) -> set[str]:
    with io_errors(folder):
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _write(
    folder: Path,
    content: Mapping[str, object],
    files: Mapping[str, Listed],
    planned: Mapping[str, Listed],
    progress: Progress,
) -> None:
    total = sum(about.size_bytes for about in planned.values())
    done = 0
    cut = {}
    for name, about in planned.items():
        place = folder / name
        with finishing() as finish, _whole(place, files[name], folder) as whole:
            written = []
            for part in about.parts:
                progress(part.file, done, total)
                path = place.with_name(part.file)
                written.append(parts.write_part(path, whole, part.size_bytes, finish=finish))
                done += part.size_bytes
        cut[name] = Listed(about.size_bytes, about.integrity, tuple(written))
    _commit(folder, content, {**files, **cut})
    progress("", total, total)


@contextlib.contextmanager
def _whole(place: Path, about: Listed, folder: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file of the page, put together where it is in parts, and checked."""
    if not about.parts:
        # Parts of a damaged file would be taken for good ones.
        _check_whole(place, about)
        with io_errors(place), open(place, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile(dir=place.parent) as joined:
        parts.join(place.parent, about.parts, joined, file=folder / MANIFEST)
        joined.seek(0)
        yield joined


def _check_whole(place: Path, about: Listed, lies_at: Path | None = None) -> None:
    path = lies_at or place
    with io_errors(place):
        found = path.stat()
        # Opening a pipe would wait for ever.
        same = stat.S_ISREG(found.st_mode) and found.st_size == about.size_bytes
        if same:
            with open(path, "rb") as file:
                same = parts.describe(place.name, file, about.size_bytes).integrity == about.integrity
    if not same:
        raise IntegrityError("it is not the file that was exported", file=place, hint="export the page again")


def _commit(folder: Path, content: Mapping[str, object], files: Mapping[str, Listed]) -> None:
    """Replace the manifest: from here on the page is the new one. Then what no page needs goes."""
    put(folder / MANIFEST, _manifest(content, files))
    for name in _left_over(folder, files):
        (folder / name).unlink(missing_ok=True)
