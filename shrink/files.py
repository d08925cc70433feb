"""Reading and writing files so that nothing is lost: whole or not at all, and errors said in one way."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from shrink.errors import BadInput, OutputError

__all__ = ["atomic_file", "atomic_folder", "file_size", "inside", "io_errors", "read_all", "section"]


@contextlib.contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn the system's own errors about `path` into an OutputError that names it."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.strerror or error}", file=path) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the block ends well, and leaves no trace when it does not."""
    temporary = path.with_name(f".shrink-{secrets.token_hex(6)}.tmp")
    try:
        with io_errors(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears at `path` when the block ends well. An old one there is replaced at the end."""
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
            if path.exists():
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


def file_size(path: Path) -> int:
    with io_errors(path):
        return path.stat().st_size


def read_all(path: Path, *, at_most: int) -> bytes:
    """The whole file. Raises BadInput when it is larger than `at_most` bytes."""
    if file_size(path) > at_most:
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
