"""Every format of the folder keeps its contract, on its sample models in tests/samples/."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import shrink
from shrink import formats
from shrink.errors import ShrinkError
from shrink.model import Entry, Model, Quantized
from tests.command import run
from tests.samples import Damaged

FORMATS = {f.__name__.rsplit(".", 1)[-1]: f for f in formats.all_formats()}  # type: ignore[attr-defined]


@pytest.fixture(params=sorted(FORMATS))
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sample(module: str) -> ModuleType:
    """A format without samples fails here."""
    return importlib.import_module(f"tests.samples.{module}")


def values(model: Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (str(t.dtype), t.shape, t.array.tobytes()) for t in model.tensors}


def test_samples_are_found_by_content(module: str, tmp_path: Path) -> None:
    path = sample(module).make(tmp_path)
    assert formats.sniff(path) is FORMATS[module]
    if path.is_file() and path.suffix != ".onnx":
        bare = tmp_path / "no suffix at all"
        shutil.copy(path, bare)
        assert formats.sniff(bare).NAME == FORMATS[module].NAME


def test_tensors_are_what_the_index_says_and_read_only(module: str, tmp_path: Path) -> None:
    model = FORMATS[module].read(sample(module).make(tmp_path))
    assert model.tensors
    assert model.source.size_bytes > 0
    for tensor in model.tensors:
        array = tensor.array
        assert array.dtype == tensor.dtype
        assert array.dtype.newbyteorder("<") == array.dtype
        assert array.shape == tensor.shape
        assert array.flags.c_contiguous
        assert not array.flags.writeable


def test_writing_and_reading_gives_the_same_values(module: str, tmp_path: Path) -> None:
    chosen = FORMATS[module]
    model = chosen.read(sample(module).make(tmp_path))
    out = tmp_path / f"again{chosen.SUFFIX}"
    chosen.write(model, model.tensors, out, 3)
    again = chosen.read(out)
    assert values(again) == values(model)
    assert again.attributes == model.attributes


def test_same_model_same_bytes(module: str, tmp_path: Path) -> None:
    chosen = FORMATS[module]
    model = chosen.read(sample(module).make(tmp_path))
    outs = [tmp_path / f"{name}{chosen.SUFFIX}" for name in "ab"]
    for out in outs:
        chosen.write(model, model.tensors, out, 3)
    first, second = (
        {p.relative_to(out).as_posix(): p.read_bytes() for p in ([out] if out.is_file() else sorted(out.rglob("*")))}
        for out in outs
    )
    assert first == second


def test_every_format_survives_our_container(module: str, tmp_path: Path) -> None:
    """What a model needs to become its own format again travels in the container."""
    chosen = FORMATS[module]
    model = chosen.read(sample(module).make(tmp_path))
    packed = tmp_path / "packed.safetensors"
    shrink.save(model, packed)
    loaded = shrink.load(packed)
    assert loaded.source.format == model.source.format
    assert loaded.attributes == model.attributes
    out = tmp_path / f"back{chosen.SUFFIX}"
    shrink.save(shrink.restore(loaded), out)
    back = chosen.read(out)
    for tensor in shrink.restore(model).tensors:
        assert np.array_equal(back[tensor.name].array, tensor.array), tensor.name


def test_a_failing_write_leaves_the_old_file_and_nothing_else(module: str, tmp_path: Path) -> None:
    chosen = FORMATS[module]
    model = chosen.read(sample(module).make(tmp_path))
    out = tmp_path / "out" / f"model{chosen.SUFFIX}"
    out.parent.mkdir()
    if chosen.SUFFIX:
        out.write_bytes(b"the old one")
    else:
        out.mkdir()
        (out / "old").write_bytes(b"the old one")

    def fails() -> Iterator[Entry]:
        yield model.tensors[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chosen.write(model, fails(), out, 3)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert (out if chosen.SUFFIX else out / "old").read_bytes() == b"the old one"


def test_quantized_forms_that_a_format_holds_decode_to_the_same_values(module: str, tmp_path: Path) -> None:
    chosen = FORMATS[module]
    model = shrink.load(sample(module).make(tmp_path))
    # What is calibrated needs a network: test_cli_quantize_calibrated.py writes it and reads it back.
    for mode in sorted(chosen.HOLDS - {"float32", "calibrated"}):
        if module == "webdnn" and mode != "eightbit":
            continue
        small = shrink.quantize(model, mode, include=["*"]) if module == "webdnn" else shrink.quantize(model, mode)
        assert any(isinstance(t, Quantized) for t in small.tensors)
        out = tmp_path / f"{mode}{chosen.SUFFIX}"
        shrink.save(small, out)
        if module == "onnx":
            continue  # the weights have become nodes of the graph: test_onnx.py runs them
        back = shrink.load(out)
        for tensor in small.tensors:
            assert np.array_equal(back[tensor.name].array, tensor.array), (mode, tensor.name)


def test_damaged_models_are_refused_with_one_clear_line(module: str, tmp_path: Path) -> None:
    labels = set()
    for case in sample(module).damaged(tmp_path):
        assert isinstance(case, Damaged)
        assert case.label not in labels
        labels.add(case.label)
        before = set(tmp_path.rglob("*"))
        out = tmp_path / "result.safetensors"
        outcome = run("quantize", case.path, "--mode", "int8", "-o", out)
        assert outcome.code == case.exit_code, (case.label, outcome)
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("shrink: error: "), (case.label, outcome.stderr)
        assert outcome.stderr.count("\n") == 1
        for word in (*case.words, case.path.name[:20]):
            assert word in outcome.stderr, (case.label, outcome.stderr)
        assert set(tmp_path.rglob("*")) == before, case.label
    assert len(labels) >= 5


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 600])
def test_what_no_format_knows_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing.bin"
    path.write_bytes(content)
    with pytest.raises(ShrinkError) as caught:
        shrink.load(path)
    assert caught.value.exit_code == 3


def test_what_is_missing_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(ShrinkError) as caught:
        shrink.load(tmp_path / "nothing.npz")
    assert caught.value.exit_code == 5
