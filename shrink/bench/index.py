"""The page that lists the reports of a folder."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shrink.bench.document import read
from shrink.bench.markup import template
from shrink.bench.pictures import PIXELS_AT_MOST, pixels_of
from shrink.bench.report import summary
from shrink.errors import ShrinkError, printable
from shrink.files import atomic_file, io_errors

__all__ = ["NAME", "index"]

NAME = "index.html"

# Small enough that a folder of many stays a small page.
_PICTURE_AT_MOST = 60_000
# Its title stands before that.
_HEAD_BYTES = 1 << 12


def index(folder: Path) -> None:
    """Write `index.html` in `folder`: every other .html file there, with the answer of the document it was made of.

    Same reports, same page. A page without a valid document beside it comes last, with its title.

    Raises:
        OutputError: the folder cannot be read, or the page not written.
        MissingDependency: jinja2 is not installed.
    """
    with io_errors(folder):
        files = sorted(file for file in folder.iterdir() if file.suffix == ".html" and file.name != NAME)
    reports = sorted(map(_report, files), key=lambda report: report["json"] is None)
    page = template("index.html", [], {"reports": reports})
    with atomic_file(folder / NAME) as out:
        out.write(page.encode())


def _report(file: Path) -> dict[str, Any]:
    """What the page says of one report."""
    plain = {"href": _href(file), "title": printable(file.stem), "json": None, "picture": None, "tone": "unknown"}
    data = file.with_suffix(".json")
    try:
        document = read(data)
    except ShrinkError:
        return {**plain, "about": _titled(file), "answer": "", "numbers": ""}
    found = [variant["pictures"] for variant in document["variants"] if variant["pictures"]]
    pictures = [one["original"] for pair in found for one in (pair.get("typical"), pair.get("worst")) if one]
    small = next((p for p in pictures if len(p) <= _PICTURE_AT_MOST and 0 < pixels_of(p) <= PIXELS_AT_MOST), None)
    return {**plain, **summary(document), "json": _href(data), "picture": small}


def _titled(file: Path) -> str:
    """What a page that is no report says it is."""
    with io_errors(file), open(file, "rb") as page:
        head = page.read(_HEAD_BYTES).decode(errors="replace")
    found = re.search(r"<title>([^<]+)</title>", head)
    return printable(html.unescape(found[1]), at_most=400) if found else "A page without a document beside it."


def _href(file: Path) -> str:
    # A leading "./" keeps a name like "javascript:x.html" a path.
    return f"./{quote(file.name, errors='surrogateescape')}"
