"""The page that lists the reports of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from shrink.bench.document import read
from shrink.bench.report import summary, template
from shrink.errors import ShrinkError, printable
from shrink.files import atomic_file, io_errors

__all__ = ["NAME", "index"]

NAME = "index.html"

# Small enough that a folder of many stays a small page.
_PICTURE_AT_MOST = 60_000


def index(folder: Path) -> None:
    """Write `index.html` in `folder`: every other .html file there, with the answer of the document it was made of.

    Same reports, same page. A report without a valid document beside it is listed by its name alone.

    Raises:
        OutputError: the folder cannot be read, or the page not written.
        MissingDependency: jinja2 is not installed.
    """
    with io_errors(folder):
        files = sorted(file for file in folder.iterdir() if file.suffix == ".html" and file.name != NAME)
    page = template("index.html", "report.css", [], {"reports": [_report(file) for file in files]})
    with atomic_file(folder / NAME) as out:
        out.write(page.encode())


def _report(file: Path) -> dict[str, Any]:
    """What the page says of one report."""
    plain = {"href": _href(file), "title": printable(file.stem), "json": None, "picture": None, "tone": "unknown"}
    data = file.with_suffix(".json")
    try:
        document = read(data)
    except ShrinkError:
        return {**plain, "about": "A page without a document of a benchmark beside it.", "answer": "", "numbers": ""}
    found = [variant["pictures"] for variant in document["variants"] if variant["pictures"]]
    pictures = [one["original"] for pair in found for one in (pair.get("typical"), pair.get("worst")) if one]
    small = next((picture for picture in pictures if len(picture) <= _PICTURE_AT_MOST), None)
    return {**plain, **summary(document), "json": _href(data), "picture": small}


def _href(file: Path) -> str:
    # A leading "./" keeps a name like "javascript:x.html" a path.
    return f"./{quote(file.name, errors='surrogateescape')}"
