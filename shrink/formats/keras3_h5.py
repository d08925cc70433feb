"""Keras 3 `.weights.h5`: what `save_weights` writes, and the `model.weights.h5` inside a `.keras` file.

Every object of a model has a group by its place in the model, and the values of its variables lie below that by number,
as in `layers/dense_1/vars/0`; the class of a layer stands there, not the layer's own name. Those paths are the names
of the tensors. What lies under `optimizer/` or `metrics/` has the role `state`.

What else a written file needs is JSON in the attribute `shrink.layout`: {"groups": {path: {name: value}}}, the groups
that have attributes (a layer's own name) or nothing in them. Keras looks for those too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shrink.errors import BadInput, UsageError
from shrink.formats import _hdf5, _hdf5_write
from shrink.model import Entry, Model, Role, Source, Tensor, plain_values

NAME = "keras3-h5"
# `.weights.h5` for Keras itself, which goes by the whole name.
SUFFIX = ".h5"
HOLDS = frozenset({"float32", "float16"})

_STATE = ("optimizer", "metrics")
_LAYOUT = "shrink.layout"


def sniff(path: Path, head: bytes) -> bool:
    return _hdf5.is_hdf5(head) and _hdf5.holds_keras3(path)


def read(path: Path) -> Model:
    file = _hdf5.opened(path)
    tensors = []
    for dataset in sorted(file.datasets, key=_place):
        if dataset.dtype is None or dataset.shape is None:
            raise BadInput("it has no values", file=path, tensor=dataset.name)
        role: Role = "state" if _is_state(dataset.name) else "weight"
        tensors.append(Tensor(dataset.name, dataset.dtype, dataset.shape, partial(file.load, dataset), role))
    bare = set(file.bare_groups())
    groups = {name: attributes for name, attributes in file.groups.items() if attributes or name in bare}
    text = json.dumps({"groups": groups}, ensure_ascii=False)
    return Model(tuple(tensors), Source(NAME, path, file.size_bytes), {_LAYOUT: text})


def _place(dataset: _hdf5.Dataset) -> list[tuple[int, str]]:
    """Sorts `vars/10` after `vars/9`."""
    return [(int(part), "") if re.fullmatch("[0-9]{1,9}", part) else (-1, part) for part in dataset.name.split("/")]


def _is_state(path: str) -> bool:
    return path.split("/")[0] in _STATE


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """A file that Keras loads as it loads the one the model came from; deflated where there is a `level`.

    Where the model has lost its training state, its groups are left out, and Keras says that the optimizer starts anew.

    Raises:
        UsageError: the model did not come from a Keras 3 file.
    """
    groups = _groups(model)
    with _hdf5_write.writing(path) as out:
        for entry in entries:
            out.put(entry.name, np.asarray(plain_values(entry)), entry.name, pack=level is not None)
        has_state = any(map(_is_state, out.stored))
        for group in sorted(groups):
            if has_state or not _is_state(group):
                out.group(group)
                for name, value in sorted(groups[group].items()):
                    out.attribute(group, name, value)
    return out.stored


def _groups(model: Model) -> Mapping[str, Mapping[str, _hdf5.Attribute]]:
    text = model.attributes.get(_LAYOUT)
    if text is None or model.source.format != NAME:
        raise UsageError(
            "only a model that came from a Keras 3 file can become one", file=model.source.path, hint="use .safetensors"
        )
    try:
        value: Any = json.loads(text)
        groups = {name: dict(value["groups"][name]) for name in value["groups"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        groups = None
    if groups is None or not all(_hdf5.is_attribute(a) for group in groups.values() for a in group.values()):
        raise BadInput(f"its attribute {_LAYOUT} is not valid", file=model.source.path)
    return groups
