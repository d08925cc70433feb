"""Keras 3 `.weights.h5`: what the format has beyond the contract of all formats."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

import shrink
from shrink.errors import BadInput, UsageError
from shrink.formats import keras3_h5
from shrink.model import Model, Source
from shrink.quantizers.affine import output_axis
from tests.command import run
from tests.samples import keras3_h5 as sample

DENSE = "layers/sequential/layers/dense_1/vars"


def objects(path: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """Every group and dataset of a file with its attributes and values."""
    found: dict[str, tuple[dict[str, Any], Any]] = {}

    def visit(name: str, item: Any) -> None:
        values = item[()].tolist() if isinstance(item, h5py.Dataset) else None
        found[name] = dict(item.attrs), values

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def test_names_order_and_roles(tmp_path: Path) -> None:
    model = shrink.load(sample.make(tmp_path))
    assert model.source.format == "keras3-h5"
    names = [t.name for t in model.tensors]
    assert [n for n in names if n.startswith("optimizer/")] == [f"optimizer/vars/{i}" for i in range(12)]
    assert {n: model[n].shape for n in (f"{DENSE}/0", f"{DENSE}/1")} == {f"{DENSE}/0": (30, 11), f"{DENSE}/1": (11,)}
    assert {t.name for t in model.tensors if t.role == "state"} == {n for n in names if n.startswith("optimizer/")}
    assert "layers/block/bn/vars/moving" in names


def test_comes_back_from_the_container_as_it_was(tmp_path: Path) -> None:
    source = sample.make(tmp_path)
    small, out = tmp_path / "small.safetensors", tmp_path / "back.weights.h5"
    shrink.save(shrink.load(source), small)
    assert run("restore", small, "-o", out).code == 0
    expected = objects(source)
    assert objects(out) == expected
    assert expected["layers/dropout/vars"] == ({"name": "dropout"}, None)


def test_training_state_is_dropped_with_its_groups(tmp_path: Path) -> None:
    source, out = sample.make(tmp_path), tmp_path / "half.weights.h5"
    done = run("quantize", source, "--mode", "float16", "-o", out)
    assert done.code == 0, done.stderr
    before, after = objects(source), objects(out)
    assert after.keys() == {name for name in before if name.split("/")[0] != "optimizer"}
    with h5py.File(out, "r") as file:
        assert file[f"{DENSE}/0"].dtype == np.float16
        assert file["layers/dropout/seed_generator/vars/0"].dtype == np.uint32
    assert run("quantize", source, "--mode", "float16", "--keep-all", "--force", "-o", out).code == 0
    assert objects(out).keys() == before.keys()


def put(*names: str) -> Callable[[Any], None]:
    def fill(file: Any) -> None:
        for name in names:
            file[name] = np.zeros((2, 2), "f4")

    return fill


def listed(file: Any) -> None:
    file["dense/vars/0"] = np.zeros(4, "f4")
    file.attrs["layer_names"] = np.array([b"dense"])
    file["dense"].attrs["weight_names"] = np.array([b"vars/0"])


@pytest.mark.parametrize(
    ("fill", "name"),
    [
        (put("vars/0"), "keras3-h5"),
        (put("_layer_checkpoint_dependencies/dense/vars/0"), "keras3-h5"),
        # Chainer: a link that is called so, its parameters, and links that are numbered.
        (put("vars/W", "vars/b"), "chainer-h5"),
        (put("vars/0/W"), "chainer-h5"),
        (put("vars/0", "l1/W"), "chainer-h5"),
        (put(), "chainer-h5"),
        (listed, "keras-h5"),
    ],
)
def test_what_is_taken_for_keras_3(fill: Callable[[Any], None], name: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        fill(file)
    assert shrink.load(tmp_path / "x.h5").source.format == name


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("layers/dense_1/vars/0", (30, 11), 1),
        ("layers/conv2d/vars/0", (3, 3, 4, 8), 3),
        ("layers/lstm/cell/vars/1", (8, 32), 1),
        ("layers/depthwise_conv2d_2/vars/0", (3, 3, 8, 1), 2),
        ("layers/separable_conv2d/vars/0", (3, 3, 8, 1), 2),
        ("layers/separable_conv2d/vars/1", (1, 1, 8, 16), 3),
        ("layers/embedding/vars/0", (1000, 16), 0),
        ("layers/dense/vars/1", (11,), None),
        ("vars/W", (30, 11), 0),
    ],
)
def test_channels_are_along_the_last_axis(name: str, shape: tuple[int, ...], axis: int | None) -> None:
    assert output_axis(name, shape) == axis


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"groups": 3}', '{"groups": {"a": 1}}', '{"groups": {"a": {"b": 1}}}']
)
def test_hostile_layouts(text: str, tmp_path: Path) -> None:
    model = Model((), Source("keras3-h5", Path("x.safetensors"), 0), {"shrink.layout": text})
    with pytest.raises(BadInput, match=r"shrink\.layout is not valid"):
        keras3_h5.write(model, [], tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_climbs(tmp_path: Path) -> None:
    layout = {"shrink.layout": '{"groups": {"../x": {}}}'}
    with pytest.raises(BadInput, match="climbs"):
        keras3_h5.write(Model((), Source("keras3-h5", Path("x"), 0), layout), [], tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


def test_only_keras_3_becomes_keras_3(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="came from a Keras 3 file"):
        keras3_h5.write(Model((), Source("chainer-npz", Path("x"), 0)), [], tmp_path / "out.h5", 3)


def test_a_whole_keras_3_model_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "{}")
        archive.write(sample.make(tmp_path), "model.weights.h5")
    done = run("inspect", path)
    assert done.code == 3
    assert "a Keras 3 model" in done.stderr
    assert "unzip model.weights.h5" in done.stderr
