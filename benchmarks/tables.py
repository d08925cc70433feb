"""The tables of a suite: printed, and as a page beside its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.measure import machine
from shrink.bench.markup import template
from shrink.errors import MissingDependency
from shrink.files import atomic_file

__all__ = ["Table", "published"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """The first column names the rows; what stands in the others is read as a number. `notes` come after it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def published(result: Mapping[str, Any], about: str, tables: Sequence[Table], output: Path) -> None:
    """Print the tables, write `result` to `output`, and the tables as a page beside it.

    `about` is the documentation of the suite: its first line is the title.
    """
    for table in tables:
        print(_as_text(table), end="\n\n")
    result = {"machine": machine(), **result}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    try:
        page = _as_page(about, tables, result["machine"], output.name)
    except MissingDependency as error:
        print(f"no page: {error}")
        return
    with atomic_file(output.with_suffix(".html")) as file:
        file.write(page.encode())


def _as_text(table: Table) -> str:
    align = ["left", *("right" for _ in table.headers[1:])]
    # What was not measured says why below the table, where there is room for it.
    short = [row for row in table.rows if len(row) < len(table.headers)]
    rows = [[row[0], *["–"] * (len(table.headers) - 1)] if row in short else row for row in table.rows]
    text = tabulate(rows, [table.title, *table.headers[1:]], disable_numparse=True, colalign=align)
    return "\n".join([text, *table.notes, *(f"{row[0]}: {row[1]}" for row in short)])


def _as_page(about: str, tables: Sequence[Table], made_on: Mapping[str, Any], data: str) -> str:
    title, _, rest = about.partition("\n")
    context = {
        "title": title.strip().rstrip(".").replace("`", ""),
        "paragraphs": [" ".join(part.split()).replace("`", "") for part in rest.strip().split("\n\n")],
        "tables": tables,
        "machine": made_on,
        "data": data,
    }
    return template("tables.html", [], context, folder=_HERE)
