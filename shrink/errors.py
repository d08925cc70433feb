"""Everything shrink raises on purpose.

    ShrinkError                 exit code 1
    ├── UsageError              2   the request makes no sense, whatever the file holds
    ├── BadInput                3   a file is malformed, unsupported or refused
    │   └── IntegrityError      3   a file is not the one that was written
    ├── BoundNotMet             4   a limit or a quality bound cannot be met
    ├── OutputError             5   reading or writing failed (missing, permission, disk full)
    └── MissingDependency       5   an optional package is not installed

Any other exception that reaches the command line is a bug.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator

__all__ = [
    "BadInput",
    "BoundNotMet",
    "IntegrityError",
    "MissingDependency",
    "OutputError",
    "ShrinkError",
    "UsageError",
    "blaming",
    "printable",
]

_SHOWN_CHARACTERS = 120


def printable(name: object, *, at_most: int = _SHOWN_CHARACTERS) -> str:
    """A name out of a file, safe to print: one line, no control or direction marks, cut when long."""
    text = str(name)
    if len(text) > at_most:
        text = text[: at_most - 1] + "…"
    # Categories C* are controls, formats (right-to-left marks), surrogates and unassigned code points;
    # Zl and Zp break lines.
    return "".join(
        c
        if unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp")
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


class ShrinkError(Exception):
    """Root of the tree. `file` and `tensor` say where; `hint` says what the user can do."""

    exit_code = 1

    def __init__(self, message: str, *, file: object = None, tensor: str | None = None, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor
        self.hint = hint

    def __str__(self) -> str:
        where = f"{printable(self.file, at_most=4096)}: " if self.file is not None else ""
        which = f"tensor {printable(self.tensor)}: " if self.tensor is not None else ""
        what_to_do = f" ({self.hint})" if self.hint else ""
        return f"{where}{which}{self.message}{what_to_do}"


@contextlib.contextmanager
def blaming(file: object) -> Iterator[None]:
    """Errors that know their tensor but not their file get this one."""
    try:
        yield
    except ShrinkError as error:
        error.file = error.file or file
        raise


class UsageError(ShrinkError):
    exit_code = 2


class BadInput(ShrinkError):
    exit_code = 3


class IntegrityError(BadInput):
    pass


class BoundNotMet(ShrinkError):
    exit_code = 4


class OutputError(ShrinkError):
    exit_code = 5


class MissingDependency(ShrinkError):
    exit_code = 5

    def __init__(self, package: str, extra: str):
        super().__init__(f"this needs the package {package}", hint=f"pip install 'shrink[{extra}]'")
