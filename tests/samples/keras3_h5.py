from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from tests.samples import Damaged
from tests.samples._hdf5 import Builder

# Only a model that was read from a Keras 3 file has the groups that Keras looks for.
writable = False


def make(folder: Path) -> Path:
    path = folder / "識別器.weights.h5"
    with h5py.File(path, "w") as file:
        _fill(file)
    return path


def _fill(file: Any) -> None:
    """As Keras 3.15's `save_weights` makes it, and with a container as the first Keras 3 called it."""
    rng = np.random.default_rng(13)
    objects: dict[str, tuple[str, list[Any]]] = {
        "": ("functional_1", []),
        "layers/input_layer": ("input_layer", []),
        "layers/conv2d": ("ステム", [rng.standard_normal((3, 3, 4, 8)).astype("f4"), np.zeros(8, "f4")]),
        "layers/dropout": ("dropout", []),
        "layers/dropout/seed_generator": ("seed_generator", [np.array([7, 3], "u4")]),
        "layers/block/bn": ("bn", [np.ones(9, "f4") for _ in range(4)]),
        "layers/block": ("block", []),
        "layers/sequential/layers/dense_1": ("head", [rng.standard_normal((30, 11)).astype("f4"), np.ones(11, "f2")]),
        "_layer_checkpoint_dependencies/dense": ("dense", [rng.standard_normal((12, 9)).astype(">f4")]),
        "optimizer": ("adam", [np.array(5, "i4"), *(np.full((3, 3), i, "f4") for i in range(11))]),
    }
    for path, (name, variables) in objects.items():
        group = file.require_group(path or "/").create_group("vars")
        group.attrs["name"] = name
        for number, values in enumerate(variables):
            group[str(number)] = values
    # Of an object with a way of its own to save.
    file["layers/block/bn/vars/moving"] = rng.standard_normal((20, 15)).astype("f4")


def damaged(folder: Path) -> Iterator[Damaged]:
    files = Builder(folder, _fill)
    good = make(folder).read_bytes()

    def dense(file: Any) -> Any:
        return file["layers/sequential/layers/dense_1/vars"]

    def soft(file: Any) -> None:
        dense(file)["2"] = h5py.SoftLink("/optimizer/vars/0")

    def external(file: Any) -> None:
        dense(file).create_dataset("2", (9,), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])

    def nothing(file: Any) -> None:
        dense(file).create_dataset("2", data=h5py.Empty("f"))

    def brain_float(file: Any) -> None:
        # What Keras makes of bfloat16.
        dense(file).create_dataset("2", data=np.zeros(4, "V2"))

    def name(file: Any) -> None:
        file["layers"].create_group("x\x1b[2J/vars")

    def latin(file: Any) -> None:
        dense(file).attrs.create("name", b"caf\xe9", dtype=h5py.string_dtype("ascii"))

    yield files.put("keras3-truncated", good[: len(good) // 2], "HDF5")
    yield files.put("keras3-no-end", good[:-100], "HDF5")
    yield files.changed("keras3-soft-link", soft, "dense_1/vars/2", "never followed")
    yield files.changed("keras3-external", external, "dense_1/vars/2", "another file")
    yield files.changed("keras3-empty", nothing, "dense_1/vars/2", "no values")
    yield files.changed("keras3-bfloat16", brain_float, "dense_1/vars/2", "opaque")
    yield files.changed("keras3-control", name, "control characters")
    yield files.changed("keras3-latin", latin, "name", "UTF-8")
