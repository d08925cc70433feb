"""Sample models, one module per format, named as the module in `shrink/formats/`.

make(folder) -> Path                   writes a small valid model and returns its path (a file or a folder)
damaged(folder) -> Iterator[Damaged]   writes malformed models; every one must be refused as it says
writable                               False where `write` cannot take an arbitrary float32 model (default True)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damaged:
    """A malformed model: its label, where it lies, words the error line must hold, and its exit code."""

    label: str
    path: Path
    words: tuple[str, ...]
    exit_code: int = 3
