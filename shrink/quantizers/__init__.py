"""Quantizers. Every public module of this folder offers some; listing the folder is the registry.

A module has `MODES`, from mode name to a quantizer with its default parameters. A quantizer is a frozen
dataclass of its parameters with

    stores                     what its result is: "float32", "float16", "eightbit", "int8" or "int4"
    quantize(name, x)          -> Quantized, or Kept with the reason why the tensor should stay as it is
    bound(x, quantized)        -> the largest |error| that any value of x may have

`x` is finite float32 in C order. Quantizers are pure: same values in, same bytes out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shrink.errors import UsageError
from shrink.model import Quantized
from shrink.registry import modules

__all__ = ["Kept", "Quantizer", "by_mode", "modes", "parameters_of"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is, and why; `asked` where a user's rule says so."""

    reason: str
    asked: bool = False


class Quantizer(Protocol):
    @property
    def stores(self) -> str: ...
    def quantize(self, name: str, x: F32) -> Quantized | Kept: ...
    def bound(self, x: F32, quantized: Quantized) -> float: ...


@cache
def modes() -> dict[str, Quantizer]:
    """Every mode's name and its quantizer with default parameters."""
    return {mode: quantizer for module in modules(__name__, __path__) for mode, quantizer in module.MODES.items()}


def parameters_of(quantizer: Quantizer) -> frozenset[str]:
    """The parameters that a user may set: the fields without metadata that says who else sets them."""
    fields = dataclasses.fields(quantizer)  # type: ignore[arg-type]
    return frozenset(f.name for f in fields if "set_by" not in f.metadata)


def by_mode(mode: str, **parameters: Any) -> Quantizer:
    """The quantizer of a mode, with some of its parameters changed.

    Raises:
        UsageError: no such mode, no such parameter, or a value it does not take.
    """
    quantizer = modes().get(mode)
    if quantizer is None:
        raise UsageError(f"there is no mode {mode!r}", hint="known: " + ", ".join(sorted(modes())))
    known = parameters_of(quantizer)
    for key in parameters:
        if key not in known:
            raise UsageError(
                f"mode {mode!r} has no parameter {key!r}", hint=f"it has: {', '.join(sorted(known)) or 'none'}"
            )
    try:
        return dataclasses.replace(quantizer, **parameters)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise UsageError(f"mode {mode!r}: {error}") from None
