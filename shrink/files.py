"""Reading and writing files so that nothing is lost: whole or not at all, and errors said in one way."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from shrink.errors import BadInput, OutputError

__all__ = [
    "Finish",
    "Scratch",
    "atomic_file",
    "atomic_folder",
    "file_size",
    "finishing",
    "holds",
    "inside",
    "io_errors",
    "is_folder",
    "is_taken",
    "put",
    "read_all",
    "section",
]

# Of Linux: relative to the working folder, and both names keep standing for something.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Bytes that are worth a way to the disk while more are written.
_WORTH_SYNCING = 4 << 20
# Finished files on their way to the disk at a time.
_FINISHING = 2

Finish = Callable[[Callable[[], None]], object]
"""Runs what is left to do for a written file: bringing it to the disk and giving it its name."""


@contextlib.contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn the system's own errors about `path` into an OutputError that names it."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.strerror or error}", file=path) from error


@contextlib.contextmanager
def atomic_file(path: Path, *, finish: Finish = lambda end: end()) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the block ends well, and leaves no trace when it does not.

    With the `finish` of `finishing` it appears by the end of that block.
    """
    temporary = path.with_name(f".shrink-{secrets.token_hex(6)}.tmp")
    with contextlib.ExitStack() as undo:
        undo.enter_context(io_errors(path))
        undo.callback(temporary.unlink, missing_ok=True)
        raw = _SyncedFile(temporary)
        file = undo.enter_context(io.BufferedWriter(raw))
        yield file
        file.flush()
        written = undo.pop_all()

    def end() -> None:
        with written:
            raw.sync()
            file.close()
            os.replace(temporary, path)

    finish(end)


@contextlib.contextmanager
def finishing() -> Iterator[Finish]:
    """A `finish` for several files: each is brought to the disk while the next is written.

    When the block ends well, all of them are in their places. The error of one is raised, at the latest, then.
    """
    with ThreadPoolExecutor(_FINISHING, "finishing") as pool:
        ends: deque[Future[None]] = deque()

        def later(end: Callable[[], None]) -> None:
            ends.append(pool.submit(end))
            if len(ends) > _FINISHING:
                ends.popleft().result()

        yield later
        for end in ends:
            end.result()


class _SyncedFile(io.FileIO):
    """A new file that goes to the disk while more of it is written, so that less is left for the end."""

    def __init__(self, path: Path):
        self._thread = ThreadPoolExecutor(1, "fsync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0
        super().__init__(path, "x")

    def write(self, data: Any, /) -> int:
        count = super().write(data)
        self._unsynced += count
        if self._unsynced >= _WORTH_SYNCING and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._syncing = self._thread.submit(os.fsync, self.fileno())
            self._unsynced = 0
        return count

    def sync(self) -> None:
        """Come back when all of it is on the disk."""
        self._wait()
        os.fsync(self.fileno())

    def close(self) -> None:
        self._thread.shutdown()
        super().close()

    def _wait(self) -> None:
        # The system tells an error once: whoever asks later hears that all is well.
        if self._syncing is not None:
            self._syncing.result()


def put(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(path) as out:
        out.write(data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears at `path` when the block ends well. An old one there is replaced at the end.

    On Linux the two are exchanged in one step, where the file system can. Elsewhere the old one is renamed first: who
    is killed right then finds it as `.shrink-….old` beside its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError("is not a folder", file=path)
    path = path.resolve()  # `.` and `..` have no name
    temporary = path.with_name(f".shrink-{secrets.token_hex(6)}.tmp")
    old = temporary.with_suffix(".old")
    try:
        with io_errors(path):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists() and _exchanged(temporary, path):
                shutil.rmtree(temporary, ignore_errors=True)
            elif path.exists():
                os.rename(path, old)
                try:
                    os.rename(temporary, path)
                except OSError:
                    os.rename(old, path)
                    raise
                shutil.rmtree(old)
            else:
                os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchanged(a: Path, b: Path) -> bool:
    """Let two names of one file system stand for each other's content, in one step. False where that cannot be."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or an old one; TypeError is Windows
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return done == 0


class Scratch:
    """A name for a file or folder to work with, which goes when nobody holds this any more.

    It lies beside what will be written, so that it can be moved there; in the system's own temporary folder where
    nothing is to be written, or can be.
    """

    def __init__(self, folder: Path, *, dry_run: bool = False):
        folder = folder.absolute()
        there = next(f for f in (folder, *folder.parents) if f.is_dir())
        if dry_run or not os.access(there, os.W_OK):
            there = Path(tempfile.gettempdir())
        self.path = there / f".shrink-{secrets.token_hex(6)}.tmp"
        weakref.finalize(self, _remove, self.path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_taken(path: Path) -> bool:
    """Whether there is anything of this name. Raises OutputError where nothing can be."""
    with io_errors(path):
        return path.is_symlink() or path.exists()


def is_folder(path: Path) -> bool:
    """Whether this is a folder. Raises OutputError for a name that nothing can have."""
    with io_errors(path):
        return path.is_dir()


def holds(path: Path, data: bytes) -> bool:
    """Whether the file is there and its content is this."""
    with contextlib.suppress(OSError):
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    return False


def file_size(path: Path) -> int:
    with io_errors(path):
        return path.stat().st_size


def read_all(path: Path, *, at_most: int) -> bytes:
    """The whole file. Raises BadInput when it is larger than `at_most` bytes, or a pipe or a device."""
    with io_errors(path):
        found = path.stat()
    # Opening a pipe could wait for ever. The system itself says best that a folder is none.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise BadInput("it is a pipe or a device, not a file", file=path)
    if found.st_size > at_most:
        raise BadInput(f"the file is larger than {at_most} bytes", file=path)
    with io_errors(path):
        return path.read_bytes()


def section(path: Path, start: int, length: int, *, tensor: str) -> Callable[[], bytes]:
    """A reader for `length` bytes from `start`, opened anew at each call so that no file stays open."""

    def read() -> bytes:
        with io_errors(path), open(path, "rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise BadInput("the file ends inside it", file=path, tensor=tensor)
        return data

    return read


def inside(folder: Path, name: str, *, file: Path) -> Path:
    """The path of a file that `file` names in its own folder; a name that leads anywhere else is refused."""
    if not name or "\0" in name or "\\" in name or os.path.isabs(name) or ".." in name.split("/"):
        raise BadInput(f"it refers to {name!r}, outside its own folder", file=file, hint="refused")
    path = folder / name
    try:
        resolved, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links in a circle are a RuntimeError before Python 3.13
        raise BadInput(f"it refers to {name!r}, which leads nowhere", file=file, hint="refused") from None
    if not resolved.is_relative_to(root):
        raise BadInput(f"it refers to {name!r}, a link out of its own folder", file=file, hint="refused")
    return path
