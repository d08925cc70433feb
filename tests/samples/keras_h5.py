from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from tests.samples import Damaged
from tests.samples._hdf5 import Builder

# Only a model that was read from a Keras file says which layers the tensors belong to.
writable = False

# Spaces, key order and escapes that another JSON writer would change.
CONFIG = '{"class_name":  "Model", "b": 1.0, "a": [1e-07, null],\n "name": "\\u751f成器"}'


def make(folder: Path) -> Path:
    path = folder / "識別器.h5"
    with h5py.File(path, "w") as file:
        _fill(file)
    return path


def _fill(file: Any) -> None:
    """A whole model, as `model.save` makes it: texts as variable-length bytes, lists as fixed-length ones."""
    rng = np.random.default_rng(12)
    weights: dict[str, dict[str, Any]] = {
        "dense_2": {
            "dense_2/kernel:0": rng.standard_normal((30, 11)).astype("f4"),
            "dense_2/bias:0": rng.standard_normal(11).astype("f4"),
        },
        "畳み込み": {"畳み込み/kernel:0": rng.standard_normal((3, 3, 4, 8)).astype("f4")},
        "wide": {
            "kernel:0": rng.standard_normal((12, 9)),
            "count:0": np.array(7, "i8"),
            "none:0": np.empty((0, 3), "f4"),
        },
        "flatten": {},
        "block/a": {"block/a/kernel:0": np.arange(6, dtype=">f4").reshape(2, 3)},
    }
    file.attrs["keras_version"] = "2.2.4-tf"
    file.attrs["backend"] = b"tensorflow"
    file.attrs["model_config"] = CONFIG.encode()
    file.attrs["training_config"] = b'{"loss": "mse"}'
    file.attrs["epochs"] = np.array([3, 5], "<i4")
    layers = file.create_group("model_weights")
    layers.attrs["backend"] = b"tensorflow"
    layers.attrs["keras_version"] = b"2.2.4-tf"
    names = np.array([name.encode() for name in weights])
    # As Keras does for lists of more than 64 KiB.
    layers.attrs["layer_names0"] = names[:2]
    layers.attrs["layer_names1"] = names[2:]
    for layer, tensors in weights.items():
        group = layers.create_group(layer)
        group.attrs["weight_names"] = np.array([name.encode() for name in tensors]) if tensors else []
        for name, values in tensors.items():
            packing = {"compression": 4, "shuffle": True} if values.size > 100 else {}
            group.create_dataset(name, data=values, **packing)
    state = file.create_group("optimizer_weights")
    state.attrs["weight_names"] = np.array([b"training/Adam/iterations:0", "Adam/畳み込み/m:0".encode()])
    state["training/Adam/iterations:0"] = np.array(99, "i8")
    state["Adam/畳み込み/m:0"] = rng.standard_normal((3, 3, 4, 8)).astype("f4")


def damaged(folder: Path) -> Iterator[Damaged]:
    files = Builder(folder, _fill)
    good = make(folder).read_bytes()
    yield files.put("keras-truncated", good[: len(good) // 2], "HDF5")
    yield files.put("keras-no-end", good[:-100], "HDF5")

    def layers(file: Any) -> Any:
        return file["model_weights"]

    def link(file: Any) -> None:
        layers(file)["dense_2"]["soft"] = h5py.SoftLink("/model_weights/wide/kernel:0")

    def external(file: Any) -> None:
        layers(file).create_dataset("outside", (9,), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])

    def no_layer(file: Any) -> None:
        del layers(file)["wide"]

    def no_weight(file: Any) -> None:
        del layers(file)["dense_2/dense_2/bias:0"]

    def no_state(file: Any) -> None:
        del file["optimizer_weights/training/Adam/iterations:0"]

    def no_list(file: Any) -> None:
        del layers(file).attrs["layer_names0"]

    def no_weight_list(file: Any) -> None:
        del layers(file)["flatten"].attrs["weight_names"]

    def text_for_list(file: Any) -> None:
        layers(file)["flatten"].attrs["weight_names"] = "kernel:0"

    def numbers_for_list(file: Any) -> None:
        layers(file)["flatten"].attrs["weight_names"] = np.arange(3)

    def same_name(file: Any) -> None:
        layers(file).create_dataset("optimizer_weights/x", data=np.zeros(3, "f4"))

    def escaped(file: Any) -> None:
        layers(file)["flatten"].attrs["weight_names"] = [b"../wide/kernel:0"]

    def layer_name(file: Any) -> None:
        layers(file).create_group("x\x1b[2J")

    def latin(file: Any) -> None:
        file.attrs.create("model_config", b"caf\xe9", dtype=h5py.string_dtype("ascii"))

    def nothing(file: Any) -> None:
        layers(file)["wide"].create_dataset("initial", data=h5py.Empty("f"))

    def objects(file: Any) -> None:
        layers(file)["wide"].create_dataset("o", data=["a"], dtype=h5py.string_dtype())

    def table(file: Any) -> None:
        layers(file).attrs["table"] = np.array([[b"a", b"b"]])

    yield files.changed("keras-soft-link", link, "dense_2/soft", "never followed")
    yield files.changed("keras-external", external, "outside", "another file")
    yield files.changed("no-layer", no_layer, "layer wide", "not there")
    yield files.changed("no-weight", no_weight, "dense_2/bias:0", "listed")
    yield files.changed("no-state", no_state, "iterations", "listed")
    yield files.changed("no-list", no_list, "layer_names")
    yield files.changed("no-weight-list", no_weight_list, "flatten", "weight_names")
    yield files.changed("text-for-list", text_for_list, "flatten", "weight_names")
    yield files.changed("numbers-for-list", numbers_for_list, "flatten", "weight_names")
    yield files.changed("same-name", same_name, "optimizer_weights/x", "beside")
    yield files.changed("escaping-weight", escaped, "../wide", "listed")
    yield files.changed("control-layer", layer_name, "control characters")
    yield files.changed("latin-config", latin, "model_config", "UTF-8")
    yield files.changed("no-values", nothing, "wide/initial", "no values")
    yield files.changed("keras-texts", objects, "wide/o", "text")
    yield files.changed("table", table, "table")
    yield files.changed("reserved", lambda f: f.attrs.__setitem__("shrink.layout", "{}"), "shrink.layout")
