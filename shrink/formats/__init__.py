"""File formats. Every public module of this folder is one; listing the folder is the registry.

A format is a module with:

    NAME        what users call it
    SUFFIX      what a file name ends in when it is written; "" for a folder
    HOLDS       what a written tensor may be: any of "float32", "float16", "eightbit", "int8", "int4"
    sniff(path, head) -> bool           head: the first 512 bytes, b"" for a folder
    read(path) -> Model                 reads the index; values are read when asked for
    write(model, entries, path, level)  entries: the tensors to write, a stream in model order;
                                        level: Zstandard's, None for no compression, where the format packs at all;
                                        returns the stored bytes of each tensor, {} where the format cannot tell

`read` raises BadInput for everything a file can have wrong; `write` is atomic.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Protocol

from shrink.errors import BadInput, UsageError
from shrink.files import io_errors
from shrink.model import Entry, Model
from shrink.registry import modules, named

__all__ = ["Format", "all_formats", "by_name", "for_output", "sniff"]


class Format(Protocol):
    NAME: str
    SUFFIX: str
    HOLDS: frozenset[str]

    def sniff(self, path: Path, head: bytes) -> bool: ...
    def read(self, path: Path) -> Model: ...
    def write(self, model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]: ...


@cache
def all_formats() -> tuple[Format, ...]:
    return modules(__name__, __path__)


def by_name(name: str) -> Format:
    return named(all_formats(), name, "format")


def sniff(path: Path) -> Format:
    """The format of what lies at `path`, by its content.

    Raises:
        OutputError: nothing is there, or it cannot be read.
        BadInput: no format knows it.
    """
    with io_errors(path):
        if path.is_dir():
            head = b""
        elif path.exists() and not path.is_file():
            raise BadInput("neither a file nor a folder", file=path)
        else:
            with open(path, "rb") as file:
                head = file.read(512)
    for candidate in all_formats():
        if candidate.sniff(path, head):
            return candidate
    raise BadInput(
        "not a model that shrink knows" if head or path.is_dir() else "the file is empty",
        file=path,
        hint="known: " + ", ".join(f.NAME for f in all_formats()),
    )


def for_output(path: Path, source: str) -> Format:
    """The format to write at `path`, by its suffix; where several share it, the one that `source` names.

    Raises:
        UsageError: no format is written with this suffix, or not from a model of this source.
    """
    fitting = [f for f in all_formats() if path.suffix.lower() == f.SUFFIX and f.SUFFIX]
    own = next((f for f in all_formats() if source == f.NAME), None)
    if fitting:
        return own if own in fitting and own is not None else fitting[0]
    if own is not None and not own.SUFFIX:
        # Folders may be called anything, as in `model.eightbit`.
        return own
    if not path.suffix:
        raise UsageError(
            "a folder can only be written for a model that was one", file=path, hint="add a suffix: .safetensors"
        )
    suffixes = ", ".join(sorted({f.SUFFIX for f in all_formats()} - {""}))
    raise UsageError(f"no format has the suffix {path.suffix!r}", file=path, hint=f"use {suffixes}")
