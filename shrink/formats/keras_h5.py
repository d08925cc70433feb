"""Keras `.h5`: weights and whole models of Keras 1 and 2 and of tf.keras.

A whole model keeps its layers under `model_weights/` and, beside it, the optimizer's state; a file of weights keeps
the layers at its root. A tensor is named by its path inside the layers, as in `lstm_1/lstm_1/kernel:0`; what lies
beside the layers of a whole model has its full path, as in `optimizer_weights/Variable:0`, and the role `state`.

The texts at the file's root (`model_config`, `training_config`, `keras_version`, `backend`) are attributes of the
model, byte for byte; a text that is not UTF-8 is refused. Everything else that a written file needs is JSON in the
attribute `shrink.layout`:

    {"whole": whether a whole model,
     "beside": [names],                 what lies beside `model_weights` at the root of a whole model
     "groups": {path: {name: value}}}   attributes, without the texts at the root; among them `layer_names` and
                                        `weight_names`, which say in what order Keras wants the tensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shrink.errors import BadInput, UsageError, printable
from shrink.formats import _hdf5, _hdf5_write
from shrink.model import Entry, Model, Role, Source, Tensor, plain_values

NAME = "keras-h5"
SUFFIX = ".h5"
HOLDS = frozenset({"float32", "float16"})

_LAYERS = "model_weights"
_LAYOUT = "shrink.layout"

Attributes = Mapping[str, Mapping[str, _hdf5.Attribute]]


def sniff(path: Path, head: bytes) -> bool:
    return _hdf5.is_hdf5(head) and _hdf5.holds_keras(path)


@dataclass(frozen=True)
class _Layout:
    """Where things are. `groups` maps paths to attributes, `beside` are names at the root of a whole model."""

    whole: bool
    beside: frozenset[str]
    groups: Attributes

    def is_beside(self, name: str) -> bool:
        return name.split("/")[0] in self.beside

    def path(self, name: str) -> str:
        """The dataset that holds the tensor `name`."""
        return f"{_LAYERS}/{name}" if self.whole and not self.is_beside(name) else name

    def name(self, path: str) -> str:
        """The tensor that the dataset at `path` is."""
        return path.removeprefix(f"{_LAYERS}/") if self.whole else path

    def listed(self, group: str) -> list[str]:
        """The tensors that the group's `weight_names` promise; empty for a group that lists none."""
        prefix = f"{group}/" if group else ""
        return [self.name(prefix + weight) for weight in _joined(self.groups[group], "weight_names") or ()]

    def in_order(self, file: Path) -> list[str]:
        """Groups that list tensors: the layers as `layer_names` has them, then the others.

        Raises:
            BadInput: a layer is not there, or a list is none.
        """
        base = _LAYERS if self.whole else ""
        names = _joined(self.groups.get(base, {}), "layer_names")
        if names is None:
            raise BadInput("it does not list its layers (layer_names)", file=file)
        layers = [f"{base}/{name}" if base else name for name in names]
        for name, layer in zip(names, layers, strict=True):
            if layer not in self.groups:
                raise BadInput(f"the layer {printable(name)} is listed, but it is not there", file=file)
            if _joined(self.groups[layer], "weight_names") is None:
                raise BadInput(f"the layer {printable(name)} does not list its weights (weight_names)", file=file)
        return list(dict.fromkeys([*layers, *self.groups]))


def _joined(attributes: Mapping[str, _hdf5.Attribute], name: str) -> list[str] | None:
    """A list of texts, put together from `name0`, `name1` … where Keras had to split it. None when it is none."""
    parts = [attributes[name]] if name in attributes else []
    while name not in attributes and f"{name}{len(parts)}" in attributes:
        parts.append(attributes[f"{name}{len(parts)}"])
    joined: list[str] = []
    for part in parts:
        if isinstance(part, list):
            joined += part
        # The numbers of an empty list: it has no text that could say what type it is.
        elif not (isinstance(part, dict) and part.get("shape") == [0]):
            return None
    return joined if parts else None


def read(path: Path) -> Model:
    file = _hdf5.opened(path)
    whole = _LAYERS in file.groups
    tops = {name.split("/")[0] for name in (*file.groups, *(d.name for d in file.datasets))} - {"", _LAYERS}
    texts = {name: value for name, value in file.groups[""].items() if isinstance(value, str)}
    if _LAYOUT in texts:
        raise BadInput(f"it has an attribute {_LAYOUT}, a name that shrink needs", file=path)
    bare = set(file.bare_groups())
    groups = {name: attributes for name, attributes in file.groups.items() if attributes or name in bare}
    if "" in groups:
        groups[""] = {name: value for name, value in groups[""].items() if name not in texts}
    layout = _Layout(whole, frozenset(tops if whole else ()), groups)
    datasets = {layout.name(d.name): d for d in file.datasets}
    listed = [name for group in layout.in_order(path) for name in layout.listed(group)]
    for name in listed:
        if name not in datasets:
            raise BadInput("it is listed, but the file does not hold it", file=path, tensor=name)
    tensors = []
    for name in dict.fromkeys([*listed, *datasets]):
        dataset = datasets[name]
        if dataset.dtype is None or dataset.shape is None:
            raise BadInput("it has no values", file=path, tensor=name)
        if layout.path(name) != dataset.name:
            raise BadInput(f"its layer has the name of something beside {_LAYERS}", file=path, tensor=name)
        role: Role = "state" if layout.is_beside(name) else "weight"
        tensors.append(Tensor(name, dataset.dtype, dataset.shape, partial(file.load, dataset), role))
    text = json.dumps({"whole": whole, "beside": sorted(layout.beside), "groups": groups}, ensure_ascii=False)
    return Model(tuple(tensors), Source(NAME, path, file.size_bytes), {**texts, _LAYOUT: text})


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """A file that Keras loads as it loads the one the model came from; deflated where there is a `level`.

    Where the model has lost its training state as a whole, the optimizer's group is left out, which Keras takes for a
    model that was saved before it was trained.

    Raises:
        UsageError: the model did not come from a Keras file.
        BadInput: a listed tensor is missing.
    """
    layout = _layout(model)
    file = model.source.path
    with _hdf5_write.writing(path) as out:
        for entry in entries:
            out.put(entry.name, np.asarray(plain_values(entry)), layout.path(entry.name), pack=level is not None)
        kept = {name.split("/")[0] for name in out.stored}
        for group in sorted(layout.groups):
            missing = [name for name in layout.listed(group) if name not in out.stored]
            top = group.split("/")[0]
            if missing and layout.whole and top in layout.beside and top not in kept:
                continue
            if missing:
                raise BadInput("its layer lists it, but the model does not hold it", file=file, tensor=missing[0])
            out.group(group)
            for name, value in sorted(layout.groups[group].items()):
                out.attribute(group, name, value)
        for name, text in sorted(model.attributes.items()):
            if name != _LAYOUT:
                out.attribute("", name, text)
    return out.stored


def _layout(model: Model) -> _Layout:
    text = model.attributes.get(_LAYOUT)
    if text is None or model.source.format != NAME:
        raise UsageError(
            "only a model that came from a Keras file can become one", file=model.source.path, hint="use .safetensors"
        )
    bad = BadInput(f"its attribute {_LAYOUT} is not valid", file=model.source.path)
    try:
        value: Any = json.loads(text)
        whole, beside, groups = value["whole"], value["beside"], value["groups"]
        layout = _Layout(whole, frozenset(beside), {name: dict(groups[name]) for name in groups})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise bad from None
    attributes = [a for group in layout.groups.values() for a in group.values()]
    if type(whole) is not bool or not all(isinstance(b, str) for b in layout.beside):
        raise bad
    if not all(_hdf5.is_attribute(a) for a in attributes):
        raise bad
    layout.in_order(model.source.path)
    return layout
