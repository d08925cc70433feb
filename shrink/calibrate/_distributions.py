"""Distributions of inputs: how they are written, and how samples are drawn.

A distribution has an entry for each input of the network, in order, with commas between: `normal,tokens:1000`. Entries
are of these kinds; numbers in brackets may be left out, both together:

    normal[:0:1]       normally distributed: mean, standard deviation
    uniform[:0:1]      evenly distributed between two numbers
    integers:0:255     whole numbers, each as likely, the last one included
    tokens:1000        whole numbers from 0 to 999
    onehot:10          one number of every 10 is 1, the others are 0
    constant:1         the same everywhere, as masks have it
    pictures           synthetic pictures (shrink.calibrate.pictures)

A network with one input may take several entries: they then lie behind one another along axis 1, as in
`normal,onehot:10` for a conditional generator. `normal*20` says how wide an entry is, `onehot:10` is 10 wide, and one
of the others may leave it open and gets the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._arrays import Input
from shrink.calibrate.pictures import Size
from shrink.errors import UsageError, printable

__all__ = [
    "EXAMPLE",
    "Entry",
    "default_distribution",
    "drawn",
    "given_out",
    "number",
    "parse_distribution",
    "picture_size",
]

Array = NDArray[Any]

EXAMPLE = "for example normal, uniform:-1:1 or, for noise and a label, normal,onehot:10"
"""For the hints of errors."""

_SMALLEST_PICTURE = 8

_NUMBERS = {
    "normal": (0, 2),
    "uniform": (0, 2),
    "integers": (2,),
    "tokens": (1,),
    "onehot": (1,),
    "constant": (1,),
    "pictures": (0,),
}
"""How many numbers each kind has."""

_WHOLE = ("integers", "tokens", "onehot")
_ENTRY = re.compile(r"([a-z]+)((?::[^:*]+)*)(?:\*([1-9][0-9]{0,9}))?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})(e[+-]?[0-9]{1,3})?", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One entry of a distribution. `width` is how much of axis 1 it takes, None where that is left open."""

    kind: str
    numbers: tuple[float, ...] = ()
    width: int | None = None

    def __str__(self) -> str:
        text = ":".join([self.kind, *map(str, self.numbers)])
        return text if self.width is None or self.kind == "onehot" else f"{text}*{self.width}"


def number(text: str) -> float | None:
    """A finite number; an int where it is written as one. None for anything else."""
    if _INTEGER.fullmatch(text):
        return int(text)
    value = float(text) if _FLOAT.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def parse_distribution(text: str) -> tuple[Entry, ...]:
    """The entries of a distribution. Raises UsageError."""
    return tuple(_entry(part.strip(), text) for part in text.split(","))


def _entry(part: str, text: str) -> Entry:
    def refused(why: str) -> UsageError:
        where = f" in {printable(text)!r}" if part != text.strip() else ""
        return UsageError(f"the distribution {printable(part)!r}{where} {why}", hint=EXAMPLE)

    found = _ENTRY.fullmatch(part)
    if found is None:
        raise refused("is not written as kind:number:number*width")
    if found[1] not in _NUMBERS:
        raise refused("is none of " + ", ".join(_NUMBERS))
    kind = found[1]
    numbers = tuple(number(n) for n in found[2].split(":")[1:])
    if len(numbers) not in _NUMBERS[kind]:
        raise refused(f"has {len(numbers)} numbers, not {' or '.join(map(str, _NUMBERS[kind]))}")
    values = tuple(n for n in numbers if n is not None)
    if len(values) != len(numbers) or (kind in _WHOLE and not all(isinstance(n, int) for n in values)):
        raise refused(
            "has something else where a whole number belongs" if kind in _WHOLE else "has a number that is none"
        )
    if kind == "normal" and values and values[1] < 0:
        raise refused("has a negative standard deviation")
    if kind in ("uniform", "integers") and values and values[0] > values[1]:
        raise refused("goes down")
    if kind in ("tokens", "onehot") and not 1 <= values[0] < 1 << 31:
        raise refused("has no values")
    width = int(found[3]) if found[3] else None
    if kind in ("onehot", "pictures") and width is not None:
        raise refused("has its width already")
    return Entry(kind, values, int(values[0]) if kind == "onehot" else width)


def picture_size(shape: Sequence[int]) -> tuple[Size, bool] | None:
    """What pictures an input of this shape takes, and whether channels come last. None where it takes none.

    [N, 1 or 3 or 4, height, width] and [N, height, width, 1 or 3 or 4] do, from 8 × 8 pixels on.
    """
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) >= _SMALLEST_PICTURE:
        return Size(shape[2], shape[3], shape[1]), False
    if len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) >= _SMALLEST_PICTURE:
        return Size(shape[1], shape[2], shape[3]), True
    return None


def default_distribution(inputs: Sequence[Input], vocabulary: Mapping[str, int] | None = None) -> tuple[Entry, ...]:
    """What the inputs most likely take: pictures, tokens where the vocabulary is known, as numbers or as one of so many
    that is 1, else 0 or 1, or normal numbers.

    Raises UsageError where the tokens do not fit the type of their input.
    """

    def entry(wanted: Input) -> Entry:
        tokens = (vocabulary or {}).get(wanted.name)
        kind = np.dtype(wanted.dtype).kind
        if kind != "b" and picture_size(wanted.shape) is not None and tokens is None:
            return Entry("pictures")
        if kind == "f":
            return Entry("normal") if tokens is None else Entry("onehot", (tokens,), tokens)
        if tokens is None:
            return Entry("integers", (0, 1))
        (found,) = parse_distribution(f"tokens:{tokens}")
        _check_entry(found, wanted, alone=True)
        return found

    return tuple(map(entry, inputs))


def given_out(entries: tuple[Entry, ...], inputs: Sequence[Input]) -> list[tuple[Entry, ...]]:
    """The entries of each input, their widths filled in where there are several."""
    if len(inputs) == 1:
        parts = [_widths(entries, inputs[0])] if len(entries) > 1 else [entries]
    elif len(entries) == len(inputs):
        parts = [(entry,) for entry in entries]
    else:
        names = ", ".join(printable(i.name) for i in inputs)
        raise UsageError(
            f"the distribution has {len(entries)} entries, the network {len(inputs)} inputs: {names}",
            hint="give one for each, " + EXAMPLE,
        )
    for wanted, group in zip(inputs, parts, strict=True):
        for entry in group:
            _check_entry(entry, wanted, alone=len(group) == 1)
    return parts


def _widths(entries: tuple[Entry, ...], wanted: Input) -> tuple[Entry, ...]:
    """The entries of one input with all their widths, which fill axis 1."""
    name, shape = printable(wanted.name), list(wanted.shape)
    if any(e.kind == "pictures" for e in entries):
        raise UsageError(f"pictures fill the input {name} alone", hint=EXAMPLE)
    if len(shape) < 2:
        raise UsageError(f"the input {name} has no axis 1 for {len(entries)} entries, its shape is {shape}")
    left = shape[1] - sum(e.width or 0 for e in entries)
    free = sum(e.width is None for e in entries)
    if free > 1:
        raise UsageError(
            f"the distribution leaves the widths of {free} entries open, at most one can be",
            hint=f"write {entries[0].kind}*20,… for one that is 20 wide",
        )
    if left < free or (left > 0 and not free):
        raise UsageError(
            f"the widths of the distribution are {shape[1] - left}{' and one more' if free else ''} together, "
            f"axis 1 of the input {name} has {shape[1]}",
            hint=EXAMPLE,
        )
    return tuple(Entry(e.kind, e.numbers, left if e.width is None else e.width) for e in entries)


def _check_entry(entry: Entry, wanted: Input, *, alone: bool) -> None:
    name, shape, dtype = printable(wanted.name), wanted.shape, np.dtype(wanted.dtype)
    if alone and entry.width is not None and _axis(entry, shape) is None:
        raise UsageError(f"{entry} does not fit the input {name}, its shape is {list(shape)}", hint=EXAMPLE)
    if entry.kind == "pictures":
        return
    if dtype.kind == "f":
        # 40 standard deviations out nothing is ever drawn.
        weights = (1, 40) if entry.kind == "normal" else (1, 1)
        reached = [abs(n) * w for n, w in zip(entry.numbers, weights, strict=False)]
        reach = sum(reached) if entry.kind == "normal" else max(reached, default=1)
        if entry.kind != "onehot" and reach > float(np.finfo(dtype).max):
            raise UsageError(f"{entry} has numbers too large for the input {name} of type {dtype}")
        return
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    first, last = {
        "tokens": (0, entry.numbers[0] - 1 if entry.numbers else 0),
        "integers": entry.numbers,
        "onehot": (0, 1),
        "constant": entry.numbers * 2,
    }.get(entry.kind, (0.5, 0.5))
    if not all(isinstance(n, int) for n in (first, last)) or first < low or last > high:
        raise UsageError(
            f"{entry} is not for the input {name} of type {dtype}",
            hint=f"give it whole numbers from {low} to {high}, as in integers:0:1 or tokens:2",
        )


def _axis(entry: Entry, shape: tuple[int, ...]) -> int | None:
    """Along which axis an entry that fills an input alone is as wide as it says. A one-hot sequence has it last."""
    axes = (len(shape) - 1, 1) if entry.kind == "onehot" else (1,)
    return next((a for a in axes if 0 < a < len(shape) and shape[a] == entry.width), None)


def drawn(rng: np.random.Generator, entries: tuple[Entry, ...], wanted: Input) -> Array:
    """One sample of an input."""
    shape = wanted.shape
    if len(entries) == 1:
        values = _of(rng, entries[0], shape, _axis(entries[0], shape))
    else:
        widths = [e.width or 0 for e in entries]
        values = np.concatenate(
            [_of(rng, e, (shape[0], w, *shape[2:]), 1) for e, w in zip(entries, widths, strict=True)], axis=1
        )
    # NumPy's own ascontiguousarray makes a row of a single number.
    return values.astype(wanted.dtype, order="C")


def _of(rng: np.random.Generator, entry: Entry, shape: tuple[int, ...], axis: int | None) -> Array:
    numbers = entry.numbers
    if entry.kind == "normal":
        mean, deviation = numbers or (0.0, 1.0)
        return rng.normal(float(mean), float(deviation), shape)
    if entry.kind == "uniform":
        low, high = numbers or (0.0, 1.0)
        share = rng.random(shape)
        return low * (1 - share) + high * share
    if entry.kind == "constant":
        return np.full(shape, numbers[0])
    if entry.kind == "onehot" and axis is not None:
        places = rng.integers(0, shape[axis], (*shape[:axis], 1, *shape[axis + 1 :]))
        indices = np.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
        return np.asarray(places == indices)
    low, high = numbers if entry.kind == "integers" else (0, numbers[0] - 1)
    return rng.integers(int(low), int(high), shape, endpoint=True)
