"""Chainer `.h5`: snapshots of `save_hdf5`, trainer snapshots, and any other HDF5 file of plain arrays.

A trainer snapshot keeps its weights under `updater/model:<name>/` beside the optimizer's state; what is not a
weight there has the role `state`. `save_hdf5` makes two things that are not tensors, and `load_hdf5` wants them
back: an empty dataset for every None, and a group for every link, with parameters or without. They are kept in
the attribute `hdf5` as JSON, {"none": [paths], "groups": [paths], "trainer": whether from a trainer snapshot}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from shrink.errors import BadInput
from shrink.formats import _hdf5, _hdf5_write
from shrink.formats._trainer import is_trainer, model_prefix, role_of
from shrink.model import Entry, Model, Source, Tensor, plain_values

NAME = "chainer-h5"
SUFFIX = ".h5"
HOLDS = frozenset({"float32", "float16"})

_EXTRAS = "hdf5"


def sniff(path: Path, head: bytes) -> bool:
    if _hdf5.is_hdf5(head):
        return not (_hdf5.holds_keras(path) or _hdf5.holds_keras3(path))
    # Named as one, but not one: `read` says so.
    return bool(head) and path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    file = _hdf5.opened(path)
    of_trainer = is_trainer(d.name for d in file.datasets)
    tensors: list[Tensor] = []
    none: list[str] = []
    for dataset in file.datasets:
        if dataset.dtype is None or dataset.shape is None:
            none.append(dataset.name)
            continue
        role = role_of(dataset.name, of_trainer)
        tensors.append(Tensor(dataset.name, dataset.dtype, dataset.shape, partial(file.load, dataset), role))
    attributes = {"trainer": "1"} if of_trainer else {}
    bare = file.bare_groups()
    if none or bare:
        extras = {"none": none, "groups": bare, "trainer": of_trainer}
        attributes[_EXTRAS] = json.dumps(extras, ensure_ascii=False)
    return Model(tuple(tensors), Source(NAME, path, file.size_bytes), attributes)


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """An HDF5 file that `chainer.serializers.load_hdf5` takes; deflated as `save_hdf5` does it, whatever the level.

    Raises:
        BadInput: names that HDF5 cannot hold together, such as the tensors `a` and `a/b`.
    """
    none, groups, from_trainer = _extras(model)
    with _hdf5_write.writing(path) as out:
        names = []
        for entry in entries:
            out.put(entry.name, np.asarray(plain_values(entry)), entry.name, pack=True)
            names.append(entry.name)
        if from_trainer and "trainer" not in model.attributes and not is_trainer(names):
            # The training state was dropped and the weights renamed; what is neither goes the same way.
            none, groups = _of_the_model(none), _of_the_model(groups)
        for name in none:
            out.put_none(name)
        for name in groups:
            out.group(name)
    return out.stored


def _of_the_model(names: list[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if (prefix := model_prefix(name))]


def _extras(model: Model) -> tuple[list[str], list[str], bool]:
    text = model.attributes.get(_EXTRAS)
    if text is None or model.source.format != NAME:
        return [], [], False
    try:
        extras = json.loads(text)
        none, groups, from_trainer = extras["none"], extras["groups"], extras["trainer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        none = groups = from_trainer = None
    for names in (none, groups):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadInput(f"its attribute {_EXTRAS} is not valid", file=model.source.path)
    return none, groups, from_trainer is True
