"""Progress as plain calls: the command line draws bars from them, a library caller may ignore them."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    def __call__(self, name: str, done_bytes: int, total_bytes: int, /) -> None:
        """`done_bytes` of `total_bytes` of the work lie behind; `name` is the tensor that comes next."""


def silent(name: str, done_bytes: int, total_bytes: int, /) -> None:
    """Progress for nobody."""
