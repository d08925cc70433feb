"""What a value from a file must be: small checks that are put together, and say where they fail.

A check takes a value and the place it stands in, and returns it in the form that the rest of the program relies on:
records have all their keys and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from shrink.errors import printable

__all__ = ["Check", "Wrong", "choice", "count", "flag", "list_of", "mapping", "number", "or_null", "record", "text"]

Check = Callable[[object, str], Any]

# Larger integers lose digits in the browser that shows them.
_LARGEST_COUNT = 1 << 53


class Wrong(Exception):
    """A value that is not what it must be; the message says where and what."""

    def __init__(self, place: str, what: str):
        super().__init__(f"{printable(place) or 'it'} {what}")


def text(at_most: int = 1024) -> Check:
    def check(value: object, place: str) -> str:
        if not isinstance(value, str):
            raise Wrong(place, "is not text")
        if len(value) > at_most:
            raise Wrong(place, f"has more than {at_most} characters")
        # Half of a character, as the names of files can have: it cannot be written, and must not cost the rest.
        return value.encode(errors="backslashreplace").decode()

    return check


def choice(*known: str) -> Check:
    def check(value: object, place: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise Wrong(place, f"is none of {', '.join(known)}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in [low, high]."""

    def check(value: object, place: str) -> float:
        try:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        except OverflowError:  # an integer with hundreds of digits
            fits = False
        if not fits or not isinstance(value, int | float) or abs(value) > 1e300:
            raise Wrong(place, "is not a number")
        if not low <= value <= high:
            raise Wrong(place, f"is not from {low:g} to {high:g}" if math.isfinite(high) else f"is below {low:g}")
        return value

    return check


def count(value: object, place: str) -> int:
    """An integer, 0 or more."""
    if type(value) is not int or not 0 <= value < _LARGEST_COUNT:
        raise Wrong(place, "is not a count")
    return value


def flag(value: object, place: str) -> bool:
    if not isinstance(value, bool):
        raise Wrong(place, "is neither true nor false")
    return value


def or_null(inner: Check) -> Check:
    return lambda value, place: None if value is None else inner(value, place)


def list_of(inner: Check, at_most: int) -> Check:
    def check(value: object, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise Wrong(place, "is not a list")
        if len(value) > at_most:
            raise Wrong(place, f"has more than {at_most} entries")
        return [inner(item, f"{place}[{number}]") for number, item in enumerate(value)]

    return check


def mapping(inner: Check, known: tuple[str, ...]) -> Check:
    """An object with any of the `known` keys; others are left out."""

    def check(value: object, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong(place, "is not an object")
        return {key: inner(value[key], _within(place, key)) for key in known if key in value}

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys; an optional one that is missing or null is null. Other keys are left out."""

    def check(value: object, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong(place, "is not an object")
        out: dict[str, Any] = {}
        for key, inner in required.items():
            if key not in value:
                raise Wrong(_within(place, key), "is missing")
            out[key] = inner(value[key], _within(place, key))
        for key, inner in (optional or {}).items():
            out[key] = or_null(inner)(value.get(key), _within(place, key))
        return out

    return check


def _within(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
