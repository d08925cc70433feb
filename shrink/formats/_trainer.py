"""What Chainer's trainer snapshots call things: weights under `updater/model:<name>/`, all else is training state."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shrink.model import Role

__all__ = ["is_trainer", "model_prefix", "role_of"]

_WEIGHT = re.compile(r"updater/model:[^/]*/")


def model_prefix(name: str) -> str:
    """`updater/model:main/` of `updater/model:main/l1/W`; empty for a name that is no weight of a trainer snapshot."""
    found = _WEIGHT.match(name)
    return found[0] if found else ""


def is_trainer(names: Iterable[str]) -> bool:
    """Whether these are the names of a trainer snapshot."""
    return any(map(model_prefix, names))


def role_of(name: str, of_trainer: bool) -> Role:
    """What a tensor is for; `of_trainer`: it stands in a trainer snapshot."""
    return "state" if of_trainer and not model_prefix(name) else "weight"
