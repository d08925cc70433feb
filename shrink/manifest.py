"""The manifest of an exported page: every file with its bytes and SHA-256, and the parts of those that are split.

    {"shrink": 1, …, "files": {path: {"bytes", "integrity", "parts": [part, …] where it is split}}}

The page can tell a damaged file by it, `shrink export` a folder that it may replace, and `shrink split` what it may
cut. Parts lie beside the file that they stand for, and carry the first digits of its hash in their names.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shrink import parts
from shrink.errors import BadInput, OutputError
from shrink.files import inside, io_errors, read_all
from shrink.parts import Part, is_integrity, is_length, parse_parts

__all__ = [
    "MANIFEST",
    "VERSION",
    "Listed",
    "as_bytes",
    "is_manifest",
    "is_ours",
    "listed",
    "part_stem",
    "read",
    "strangers",
]

MANIFEST = "manifest.json"
VERSION = 1

_AT_MOST = 1 << 24


@dataclass(frozen=True)
class Listed:
    """What the manifest says of one file: its length in bytes, SHA-256 (SRI) and parts, () where it is whole."""

    size_bytes: int
    integrity: str
    parts: tuple[Part, ...] = ()

    def as_json(self) -> dict[str, Any]:
        parts = {"parts": [part.as_json() for part in self.parts]} if self.parts else {}
        return {"bytes": self.size_bytes, "integrity": self.integrity, **parts}


def is_manifest(folder: Path) -> bool:
    """Whether the folder has a manifest of ours, in whatever state."""
    try:
        return "shrink" in json.loads(read_all(folder / MANIFEST, at_most=_AT_MOST))
    except (BadInput, OutputError, ValueError, TypeError, RecursionError):
        return False


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Listed]]:
    """The manifest of an exported page, and its files by path, checked.

    Raises:
        BadInput: it is none, of another version, or says what cannot be.
        OutputError: it is missing or cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_all(path, at_most=_AT_MOST))
    except (ValueError, RecursionError):
        raise BadInput("it is not JSON", file=path, hint="export the page again") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise BadInput("it does not list the files of a page that shrink exported", file=path)
    if content.get("shrink") != VERSION or type(content["shrink"]) is not int:
        raise BadInput("another version of shrink exported this page", file=path, hint="export the page again")
    return content, {name: _listed(name, about, path) for name, about in content["files"].items()}


def _listed(name: str, about: object, path: Path) -> Listed:
    inside(path.parent, name, file=path)
    size, integrity = (about.get("bytes"), about.get("integrity")) if isinstance(about, dict) else (None, None)
    if not isinstance(about, dict) or not is_length(size) or not isinstance(integrity, str):
        raise BadInput(f"what it says of {name!r} is not a length and a hash", file=path)
    if not is_integrity(integrity):
        raise BadInput(f"the hash of {name!r} is no SHA-256", file=path)
    parts = parse_parts(about["parts"], size, file=path) if "parts" in about else ()
    return Listed(size, integrity, parts)


def as_bytes(content: Mapping[str, Any]) -> bytes:
    """The manifest as it is written: one spelling for the same content."""
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def listed(folder: Path) -> dict[str, Listed]:
    """All that lies in a folder, by path."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            files[file.relative_to(folder).as_posix()] = Listed(len(data), parts.integrity(data))
    return files


def part_stem(name: str, integrity: str) -> str:
    """What the names of the parts of a file begin with: no two deployments can mix."""
    return f"{name}-{base64.b64decode(integrity.removeprefix('sha256-')).hex()[:8]}"


def strangers(folder: Path, files: Mapping[str, Listed], present: Iterable[str]) -> set[str]:
    """Which of the paths `present` are not the page's: neither listed, nor parts, nor left of an unfinished split."""
    return {name for name in present if not _belongs(PurePosixPath(name), files)}


def _belongs(path: PurePosixPath, files: Mapping[str, Listed]) -> bool:
    if path.as_posix() in (MANIFEST, *files) or re.fullmatch(r"\.shrink-[0-9a-f]+\.tmp", path.name):
        return True
    whole = re.fullmatch(r"(.+)-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.bin", path.name)
    return whole is not None and path.with_name(whole.group(1)).as_posix() in files


def is_ours(folder: Path) -> bool:
    """Whether `folder` is empty or holds an exported page and nothing else, so that replacing it loses nothing."""
    with io_errors(folder):
        present = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir()}
    try:
        return not present or not strangers(folder, read(folder)[1], present)
    except (BadInput, OutputError):
        return False
