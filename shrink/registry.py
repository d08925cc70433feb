"""The folder is the registry: what a package offers are its public modules, found by listing it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from shrink.errors import UsageError

__all__ = ["modules", "named"]


class _Named(Protocol):
    NAME: str


_N = TypeVar("_N", bound=_Named)


def modules(package: str, folders: Iterable[str]) -> tuple[Any, ...]:
    """The public modules of a package, imported, in order of their names. `folders` is its `__path__`."""
    names = sorted(m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"{package}.{name}") for name in names)


def named(candidates: Sequence[_N], name: str, kind: str) -> _N:
    """The one whose NAME this is. `kind` is what the error calls it.

    Raises:
        UsageError: there is none.
    """
    for candidate in candidates:
        if name == candidate.NAME:
            return candidate
    raise UsageError(f"there is no {kind} {name!r}", hint="known: " + ", ".join(c.NAME for c in candidates))
