"""Which pictures of a document stand in its report, and beside which words."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from typing import Any

from shrink.bench import wording
from shrink.errors import printable

__all__ = ["PIXELS_AT_MOST", "Group", "Original", "Picture", "Pictures", "pictures", "pixels_of"]

_HEADINGS = {"worst": "The worst case", "typical": "A typical case"}
_MARKUP_BYTES = 1500
# A file of a few kB can be a picture of gigabytes once it is shown.
PIXELS_AT_MOST = 1 << 22
"""Of one picture."""
_PIXELS_OF_ALL = 1 << 26

Document = dict[str, Any]


@dataclass(frozen=True)
class Original:
    """A picture that several variants are compared with: once in the file, shown beside each. `data` is base64."""

    id: str
    width: int
    height: int
    data: str


@dataclass(frozen=True)
class Picture:
    """One comparison. `original` is the id of an Original, the other two are base64."""

    name: str
    input: int
    width: int
    height: int
    original: str
    variant: str
    difference: str
    words: str


@dataclass(frozen=True)
class Group:
    heading: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Pictures:
    """`missing` says what is not shown, and why."""

    originals: tuple[Original, ...]
    groups: tuple[Group, ...]
    missing: tuple[str, ...]


@dataclass
class _Room:
    """How many bytes and pixels are left, and the originals that take none any more."""

    left: int
    pixels: int = _PIXELS_OF_ALL
    originals: dict[str, Original] = field(default_factory=dict)


def pictures(document: Document, room: int) -> Pictures:
    """As many of them as fit into `room` bytes, the worst cases first."""
    rest = _Room(room)
    groups, left_out, missing = [], [], []
    for case, heading in _HEADINGS.items():
        shown = []
        for variant in document["variants"]:
            found = (variant["pictures"] or {}).get(case)
            if not found:
                continue
            picture = _picture(variant, found, rest)
            if picture:
                shown.append(picture)
            else:
                left_out.append(f"{wording.name_of(variant['name'])} ({heading.lower()})")
        if shown:
            groups.append(Group(heading, tuple(shown)))
    for variant in document["variants"][1:]:
        if not variant["pictures"] and any(v["pictures"] for v in document["variants"]):
            missing.append(f"{wording.name_of(variant['name'])}: {wording.why(document, 'pictures', variant['name'])}.")
    if left_out:
        missing.append(f"Too large for this file, they are in the JSON data beside it: {', '.join(left_out)}.")
    if not groups and not missing:
        missing.append(_none(document))
    return Pictures(tuple(rest.originals.values()), tuple(groups), tuple(missing))


def _none(document: Document) -> str:
    kinds = {output["kind"] for output in (document["model"] or {}).get("outputs") or ()}
    if kinds and "image" not in kinds:
        return "The outputs of this network are no pictures."
    return f"Pictures: {wording.why(document, 'pictures')}."


def _picture(variant: dict[str, Any], found: dict[str, Any], room: _Room) -> Picture | None:
    """None where it does not fit, or is too large to be shown."""
    data = found["original"]
    new = [found["variant"], found["difference_x10"], *([] if data in room.originals else [data])]
    cost, pixels = sum(map(len, new)) + _MARKUP_BYTES, [pixels_of(picture) for picture in new]
    if not all(0 < count <= PIXELS_AT_MOST for count in pixels) or cost > room.left or sum(pixels) > room.pixels:
        return None
    room.left -= cost
    room.pixels -= sum(pixels)
    width, height = _dimensions(data)
    original = room.originals.setdefault(data, Original(f"original-{len(room.originals)}", width, height, data))
    name, number = wording.name_of(variant["name"]), found["input"]
    note = f"; {printable(found['note'], at_most=200)}" if found.get("note") else ""
    parts = (original.id, found["variant"], found["difference_x10"], _words(variant, number) + note)
    return Picture(name, number, width, height, *parts)


def pixels_of(data: str) -> int:
    """How many pixels a PNG file in base64 says that it has."""
    width, height = _dimensions(data)
    return width * height


def _dimensions(data: str) -> tuple[int, int]:
    """Width and height, from the start of a PNG file in base64; (0, 0) where it is too short to say."""
    start = base64.b64decode(data[:32])
    return struct.unpack(">II", start[16:24]) if len(start) >= 24 else (0, 0)


def _words(variant: dict[str, Any], number: int) -> str:
    native = (variant["accuracy"] or {}).get("native") or {}
    words = ""
    for key, label in (("psnr_db", "PSNR"), ("ssim", "SSIM")):
        samples = (native.get(key) or {}).get("samples") or []
        if number < len(samples) and samples[number] is not None:
            value = samples[number]
            shown = wording.decibels(value) if key == "psnr_db" else f"{value:.4f}".replace("-", wording.MINUS)
            words += f", {label} {shown}"
    return words
