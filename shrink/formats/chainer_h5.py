"""Chainer `.h5`: snapshots of `save_hdf5`, trainer snapshots, and any other HDF5 file of plain arrays.

A trainer snapshot keeps its weights under `updater/model:<name>/` beside the optimizer's state; what is not a
weight there has the role `state`. `save_hdf5` makes two things that are not tensors, and `load_hdf5` wants them
back: an empty dataset for every None, and a group for every link, with parameters or without. They are kept in
the attribute `hdf5` as JSON, {"none": [paths], "groups": [paths], "trainer": whether from a trainer snapshot}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shrink.errors import BadInput
from shrink.formats import _hdf5
from shrink.model import Entry, Model, Role, Source, Tensor, plain_values

NAME = "chainer-h5"
SUFFIX = ".h5"
HOLDS = frozenset({"float32", "float16"})

_TRAINER_WEIGHT = re.compile(r"^updater/model:[^/]*/")
_EXTRAS = "hdf5"


def sniff(path: Path, head: bytes) -> bool:
    if _hdf5.is_hdf5(head):
        return not _hdf5.holds_keras(path)
    # Named as one, but not one: `read` says so.
    return bool(head) and path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    file = _hdf5.opened(path)
    is_trainer = any(_TRAINER_WEIGHT.match(d.name) for d in file.datasets)
    tensors = [_tensor(file, d, is_trainer) for d in file.datasets if d.dtype is not None]
    attributes = {"trainer": "1"} if is_trainer else {}
    none = [d.name for d in file.datasets if d.dtype is None]
    bare = _bare_groups(file)
    if none or bare:
        extras = {"none": none, "groups": bare, "trainer": is_trainer}
        attributes[_EXTRAS] = json.dumps(extras, ensure_ascii=False)
    return Model(tuple(tensors), Source(NAME, path, file.size_bytes), attributes)


def _tensor(file: _hdf5.File, dataset: _hdf5.Dataset, is_trainer: bool) -> Tensor:
    role: Role = "state" if is_trainer and not _TRAINER_WEIGHT.match(dataset.name) else "weight"
    assert_dtype, assert_shape = dataset.dtype, dataset.shape
    return Tensor(dataset.name, assert_dtype, assert_shape, lambda: file.load(dataset), role)


def _bare_groups(file: _hdf5.File) -> list[str]:
    """Groups with nothing in them, which no dataset's path brings back."""
    above = {name.rpartition("/")[0] for name in (*file.groups, *(d.name for d in file.datasets))}
    return [name for name in file.groups if name not in above]


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """An HDF5 file that `chainer.serializers.load_hdf5` takes; deflated like `save_hdf5` does, whatever the level.

    Raises:
        BadInput: two names that HDF5 cannot hold together, such as `a` and `a/b`.
    """
    none, groups = _extras(model)
    with _hdf5.writing(path) as out:
        names = []
        for entry in entries:
            out.put(entry.name, np.asarray(plain_values(entry)), entry.name, pack=True)
            names.append(entry.name)
        rename = _rename(model, names)
        for name in filter(None, map(rename, none)):
            out.put_empty(name)
        for name in filter(None, map(rename, groups)):
            out.group(name)
        return out.stored
