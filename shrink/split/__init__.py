"""Fitting a model to a host's upload limit: files cut into parts that join to the very same bytes.

    plan(source, limit=…)   what would be written, with exact sizes; `Plan.write` does it
    join(index or folder)   the original back
    the_model_in(folder)    the one model there, for a command without one

Each kind of source is a module of this folder with

    plan(source: Path, limit: int, folder: Path, *, force: bool = False, dry_run: bool = False) -> Plan

and, where `shrink.parts` alone cannot join it, one of

    join(folder: Path, *, progress: Progress) -> Any                                      in place
    join(index: Path, output: Path | None, *, force: bool, progress: Progress) -> Path    the file written

`shrink.parts` is what they share: the list of parts, and how it is read, checked and joined.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrink import formats, parts
from shrink.errors import BadInput, OutputError, ShrinkError, UsageError, printable
from shrink.files import atomic_file, io_errors, is_folder, is_taken
from shrink.manifest import is_manifest
from shrink.progress import Progress, silent

__all__ = [
    "DONE",
    "RENAMED",
    "SMALLEST_LIMIT",
    "File",
    "Plan",
    "is_web",
    "join",
    "plan",
    "refuse_index",
    "the_model_in",
]

SMALLEST_LIMIT = 10_000
DONE = "it is split exactly so already: nothing is written"
RENAMED = "there are files of these names with other content, so the new names hold a hash"


@dataclass(frozen=True)
class File:
    """One file that the plan writes: its name, relative to the folder, and in short words what it holds."""

    name: str
    size_bytes: int
    holds: str


@dataclass(frozen=True)
class Plan:
    """What splitting `source` writes into `folder`: every file, the index last. Nothing is written before `write`.

    `notes` are sentences for the user: what was done on the way, or that there is nothing to do.
    """

    source: Path
    folder: Path
    limit_bytes: int
    files: tuple[File, ...]
    notes: tuple[str, ...]
    write: Callable[[Progress], None]


def plan(source: Path, *, limit: int, output: Path | None = None, force: bool = False, dry_run: bool = False) -> Plan:
    """What splitting writes so that no file is over `limit` bytes.

    `output` is the folder for the files, by default the one that the source lies in. A web folder is split in place;
    an exported page can be copied to `output` on the way. With `dry_run` what has to be made before it can be planned
    lies in the system's temporary folder.

    Raises:
        UsageError: a limit below 10,000 bytes, the source is the index of a split, or there is a split already and
            no `force`.
        BadInput: the source is malformed, or nothing that can be split.
        BoundNotMet: a file cannot be brought below the limit.
        OutputError: the source is missing or cannot be read.
    """
    if limit < SMALLEST_LIMIT:
        raise UsageError(f"a limit of {limit} bytes is too small", hint=f"the smallest is {SMALLEST_LIMIT} bytes")
    refuse_index(source)
    kind = _kind(source)
    if source.is_dir():
        folder = output if output is not None else source
        if kind == "webdnn" and folder.resolve() != source.resolve():
            raise UsageError("a folder is split in place", file=source, hint="leave the output out, or copy it first")
    else:
        folder = output if output is not None else source.parent
        if not parts.is_plain(source.name):
            raise UsageError("a file of this name cannot be listed in an index", file=source, hint="rename it")
        if is_taken(folder) and not folder.is_dir():
            raise OutputError("is not a folder", file=folder)
    made: Plan = _module(kind).plan(source, limit, folder, force=force, dry_run=dry_run)
    for file in made.files:
        # A name that is too long is better heard of before anything is written.
        is_taken(folder / file.name)
    return made


def is_web(folder: Path) -> bool:
    """Whether the folder is for a web server: it holds a page."""
    with io_errors(folder):
        return any(folder.glob("*.html"))


def refuse_index(source: Path) -> None:
    """Raises UsageError for the index of a split: the model itself is not there."""
    if is_folder(source):
        return
    if source.name.endswith(_STAGES):
        raise UsageError("it is the index of stages", file=source, hint="name the ONNX file that was cut")
    if source.name.endswith(_INDEX):
        what = "an ONNX file in parts" if source.name.endswith(_ONNX_INDEX) else "shards"
        raise UsageError(f"it is the index of {what} already", file=source, hint="join it first: shrink join")


def join(
    source: Path, output: Path | None = None, *, force: bool = False, progress: Progress = silent
) -> tuple[Path, ...]:
    """Write what was split as it was, every part checked, and return what was written.

    `source` is an index, or a web folder that was split in place and is joined in place. `output` is by default the
    original's name, beside the index; it appears when all of it is right, or not at all. The parts of an index stay.

    Raises:
        UsageError: the output exists and there is no `force`, a folder with an output, or an index of stages.
        IntegrityError: a part is missing or not the one that was written.
        BadInput: not an index that shrink wrote.
    """
    if is_folder(source):
        if output is not None and output.resolve() != source.resolve():
            raise UsageError("a folder is joined in place", file=source, hint="leave the output out")
        _module(_folder_kind(source)).join(source, progress=progress)
        return (source,)
    if source.name.endswith(_STAGES):
        what = "it lists the stages that a network was cut into, which run one after another and are not joined"
        raise UsageError(what, file=source, hint="keep the ONNX file that was cut")
    if source.name.endswith(_ONNX_INDEX):
        return (_module("onnx_data").join(source, output, force=force, progress=progress),)
    index = parts.read_index(source)
    target = output if output is not None else source.parent / index.file
    if is_folder(target):
        target = target / index.file
    if is_taken(target) and not force:
        raise UsageError("exists already", file=target, hint="--force replaces it, -o names another")
    if any((source.parent / name).resolve() == target.resolve() for name in (source.name, *_named(index))):
        raise UsageError("the output would replace a file that it is made of", file=target)
    with atomic_file(target) as out:
        parts.join(source.parent, index.parts, out, file=source, progress=progress)
    return (target,)


def the_model_in(folder: Path) -> Path:
    """The one model that lies in `folder`, or `folder` itself where it is one. Shards and indexes do not count.

    Raises:
        UsageError: there is none, or more than one.
    """
    if _is_folder_model(folder):
        return folder
    with io_errors(folder):
        files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    indexes = [f for f in files if f.name.endswith((_INDEX, _STAGES)) and f.is_file()]
    shards = {name for index in indexes for name in _listed_in(index)}
    models = [f for f in files if f not in indexes and f.name not in shards and _is_model(f)]
    if len(models) == 1:
        return models[0]
    if models:
        shown = ", ".join(printable(f.name) for f in models[:10]) + (", …" if len(models) > 10 else "")
        raise UsageError(f"there are {len(models)} models: {shown}", file=folder, hint="say which")
    split = f"{printable(indexes[0].name)} is split already" if indexes else "name one"
    raise UsageError("there is no model here that could be split", file=folder, hint=split)


_ONNX_INDEX = ".onnx.index.json"
_INDEX, _STAGES = ".index.json", ".stages.json"
_WEBDNN_INDEX = "split.json"
# The kind of each format: the module here that splits it.
_KINDS = {
    "safetensors": "shards",
    "chainer-npz": "shards",
    "chainer-h5": "shards",
    "keras-h5": "shards",
    "onnx": "onnx_data",
    "webdnn": "webdnn",
}


def _module(kind: str) -> Any:
    return importlib.import_module(f"shrink.split.{kind}")


def _kind(source: Path) -> str:
    if source.is_dir():
        return _folder_kind(source)
    name = formats.sniff(source).NAME
    if name not in _KINDS:
        raise BadInput(f"a model of the format {name} cannot be split", file=source)
    return _KINDS[name]


def _folder_kind(folder: Path) -> str:
    if is_manifest(folder):
        return "site"
    # Once it is split, its weights have other names.
    if (folder / _WEBDNN_INDEX).is_file():
        return "webdnn"
    return _KINDS[formats.sniff(folder).NAME]


def _is_folder_model(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(_folder_kind(folder))
    except (BadInput, KeyError):
        return False


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return _is_folder_model(path)
    try:
        return path.is_file() and formats.sniff(path).NAME in _KINDS
    except ShrinkError:
        return False


def _listed_in(index: Path) -> set[str]:
    """The files that an index names, whoever wrote it, without the original."""
    try:
        content, own = parts.read_json(index)
    except ShrinkError:
        return set()
    found = {part.file for part in own}
    left: list[Any] = [content]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
            weight_map = value.get("weight_map")
            said = [*(weight_map.values() if isinstance(weight_map, dict) else ()), value.get("graph")]
            # What has a version is the index, and its file the original.
            said.append(value.get("file") if "version" not in value else None)
            found.update(name for name in said if isinstance(name, str))
    return found


def _named(index: parts.PartsIndex) -> list[str]:
    return [part.file for part in (*index.parts, *index.index_parts)]
