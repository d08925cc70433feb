"""What happened to one layer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerResult"]


@dataclass(frozen=True)
class LayerResult:
    """One weight tensor. `sensitivity` is the output error (mean squared, of peak²) that errors of 1 in all its weights
    would make; `step` the geometric mean of its steps; `note` says what was not as usual."""

    tensor: str
    kind: str
    shape: tuple[int, ...]
    size_bytes: int
    bits_per_weight: float
    sensitivity: float
    step: float
    note: str = ""
