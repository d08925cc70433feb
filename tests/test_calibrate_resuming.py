"""Work that was interrupted goes on with the layers that are done, and gives the very same bytes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shrink import given
from shrink.calibrate.inputs import Calibration, inputs_of
from shrink.calibrate.layer_result import LayerResult
from shrink.calibrate.quantizing import Target, Work, quantized
from shrink.calibrate.resuming import Store, identity_of
from shrink.model import Quantized, Tensor
from shrink.quantizers import Kept, by_mode
from tests.command import run
from tests.zoo import NETWORKS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
RESIDUAL = next(zoo for zoo in NETWORKS if zoo.name == "residual")
TRANSFORMER = next(zoo for zoo in NETWORKS if zoo.name == "transformer")
LAYER = "*.layer.safetensors"
RESULT = LayerResult("a/b", "dense", (3, 4), 12, 8.0, 0.25, 0.001, "a note")


def entries() -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype("f4")
    half = by_mode("float16").quantize("b", x[0])
    assert isinstance(half, Quantized | Tensor)
    return {"a/b": Tensor.of("a/b", x), "b": half}


def stored(folder: Path, identity: str = "one") -> Store:
    store = Store(folder, identity)
    store.keep("key", (RESULT, entries()))
    store.keep_gradients({"a/b": np.eye(3)[None], "../../c": np.ones((2, 1, 1)), "file": np.zeros((1, 2, 2))})
    store.keep_weights({"a/b": 2.5, "../../c": 1.0})
    return store


def check_layer(found: Any) -> None:
    result, read = found
    assert result == RESULT
    assert set(read) == set(entries())
    for name, entry in entries().items():
        np.testing.assert_array_equal(read[name].array, entry.array)
        assert read[name].shape == entry.shape


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    stored(folder)
    store = Store(folder, "one")
    found = store.layer("key")
    gradients = store.gradients()
    assert gradients is not None
    assert store.weights() == {"a/b": 2.5, "../../c": 1.0}
    store.clear()
    # What was found lives on without its file.
    assert not folder.exists()
    check_layer(found)
    assert store.found == 1
    assert set(gradients) == {"a/b", "../../c", "file"}
    np.testing.assert_array_equal(gradients["a/b"], np.eye(3)[None])
    assert store.layer("key") is None
    assert store.gradients() is None
    assert store.weights() == {}


def test_nothing_is_found_under_other_names(tmp_path: Path) -> None:
    store = stored(tmp_path / "work")
    assert store.layer("another key") is None
    assert Store(tmp_path / "elsewhere", "one").layer("key") is None
    assert Store(None, "one").layer("key") is None
    assert Store(None, "one").gradients() is None
    assert Store(None, "one").weights() == {}
    Store(None, "one").clear()


def test_work_of_another_kind_is_thrown_away_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    stored(folder)
    (folder / "mine.txt").write_text("precious")
    other = Store(folder, "two")
    assert other.layer("key") is None
    assert other.gradients() is None
    assert other.weights() == {}
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    other.keep("key", (RESULT, entries()))
    check_layer(Store(folder, "two").layer("key"))
    other.clear()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("gradients.npz", "some.layer.safetensors", "other"):
        (folder / name).write_text("precious")
    Store(folder, "one").clear()
    assert sorted(path.name for path in folder.iterdir()) == ["gradients.npz", "other", "some.layer.safetensors"]


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "dead link"])
def test_where_no_folder_can_be_nothing_is_kept(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "work"
    make(path)
    store = stored(path)
    assert store.layer("key") is None
    assert store.gradients() is None
    store.clear()
    assert os.path.lexists(path)


def damages(data: bytes) -> list[bytes]:
    rng = np.random.default_rng(1)
    found = [data[:n] for n in (0, 1, 8, 9, len(data) // 2, len(data) - 1)]
    found += [bytes(len(data)), b"precious", data + b"\0"]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        found.append(bytes(flipped))
    return found


def test_damaged_files_are_done_again(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    stored(folder)
    layer, gradients = next(folder.glob(LAYER)), folder / "gradients.npz"
    for data in damages(layer.read_bytes()):
        layer.write_bytes(data)
        found = Store(folder, "one").layer("key")
        if found is not None:
            # What was hit tells nothing about the layer, such as who wrote the file.
            check_layer(found)
    for data in damages(gradients.read_bytes()):
        gradients.write_bytes(data)
        read = Store(folder, "one").gradients()
        if read is not None:
            # The archive has checksums for values, and names twice.
            np.testing.assert_array_equal(read["a/b"], np.eye(3)[None])
            assert set(read) == {"a/b", "../../c", "file"}
    weights = folder / "weights.json"
    for data in [*damages(weights.read_bytes())[:9], b"[1]", b'["one", {"a": true}]', b'["one", [2.0]]', b"[" * 9999]:
        weights.write_bytes(data)
        assert Store(folder, "one").weights() == {}


def test_identity_is_that_of_all_that_matters() -> None:
    network = given.network(str(RESIDUAL.path), None, ("1,1,16,16",))[0]
    samples = Calibration(({"image": RESIDUAL.calibration[:1]}, {"image": RESIDUAL.calibration[1:2]}), "a")
    names = [t.name for t in network.model.tensors if len(t.shape) > 1]
    first = network.model.tensors[0]
    changed = Tensor.of(first.name, first.array + np.float32(1e-6))
    weights = dataclasses.replace(network.model, tensors=(changed, *network.model.tensors[1:]))
    found = [
        identity_of(network, samples, names, 0, 1),
        identity_of(network, samples, names[:-1], 0, 1),
        identity_of(network, samples, names, 1, 1),
        identity_of(network, samples, names, 0, 2),
        identity_of(network, Calibration(samples.samples[:1], "a"), names, 0, 1),
        identity_of(network, Calibration(samples.samples[::-1], "a"), names, 0, 1),
        identity_of(dataclasses.replace(network, model=weights), samples, names, 0, 1),
        identity_of(
            dataclasses.replace(network, model=dataclasses.replace(network.model, graph=b"\x08\x08")),
            samples,
            names,
            0,
            1,
        ),
    ]
    assert len(set(found)) == len(found)
    # What the samples are called does not.
    assert identity_of(network, Calibration(samples.samples, "b"), names[::-1], 0, 1) == found[0]


def work() -> Work:
    network = given.network(str(RESIDUAL.path), None, ("1,1,16,16",))[0]
    name = inputs_of(network)[0].name
    samples = Calibration(tuple({name: value[None]} for value in RESIDUAL.calibration[:6]), "residual")
    decisions: dict[str, Any] = {
        t.name: () if len(t.shape) > 1 and t.size >= 256 else Kept("few") for t in network.model.tensors
    }
    return Work(network, samples, network.model, decisions)


def values(done: Any) -> dict[str, bytes]:
    return {name: entry.array.astype("f8").tobytes() for name, entry in done.result.entries.items()}


class Interrupted(Exception):
    pass


def test_interrupted_anywhere_it_gives_the_same(tmp_path: Path) -> None:
    """At any time: what comes out is the same as without, and layers that were finished are not done again."""
    target = Target(step=0.02)
    asked: list[str] = []
    whole = quantized(work(), target, lambda e: 0, None, lambda name, done, total: asked.append(name))
    assert whole.resumed == 0
    resumed = []
    for stop in (0, len(asked) // 3, len(asked) // 2, len(asked) - 3):
        folder = tmp_path / f"{stop}.unfinished"
        count = 0

        def until(name: str, done: int, total: int, stop: int = stop) -> None:
            nonlocal count
            if count == stop:
                raise Interrupted
            count += 1

        with pytest.raises(Interrupted):
            quantized(work(), target, lambda e: 0, folder, until)
        finished = len(list(folder.glob(LAYER)))
        again = quantized(work(), target, lambda e: 0, folder, lambda *_: None)
        assert values(again) == values(whole)
        assert again.result.quality == whole.result.quality
        assert again.result.layers == whole.result.layers
        assert again.resumed == finished
        resumed.append(again.resumed)
        again.store.clear()
        assert not folder.exists()
    assert resumed == sorted(resumed)
    assert resumed[0] == 0
    assert resumed[-1] > 1


def test_damaged_work_is_done_again_as_a_whole(tmp_path: Path) -> None:
    """Whatever lies in the folder: the result is the same."""
    target = Target(step=0.02)
    whole = quantized(work(), target, lambda e: 0, None, lambda *_: None)
    folder = tmp_path / "x.unfinished"
    quantized(work(), target, lambda e: 0, folder, lambda *_: None)
    kept = sorted(folder.iterdir())
    assert len(kept) > 4
    contents = [path.read_bytes() for path in kept]
    for what in ("cut", "empty", "exchanged", "gradients of something else"):
        for path, data, other in zip(kept, contents, [*contents[1:], contents[0]], strict=True):
            path.write_bytes(data)
            if path.name == "identity":
                continue
            if what == "gradients of something else" and path.name == "gradients.npz":
                Store(folder, path.with_name("identity").read_text()).keep_gradients({"else": np.eye(3)[None]})
            elif what != "gradients of something else":
                path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "exchanged": other}[what])
        again = quantized(work(), target, lambda e: 0, folder, lambda *_: None)
        assert values(again) == values(whole), what


# --- the command -------------------------------------------------------------------------------------------------


def command(folder: Path, name: str) -> list[str]:
    np.savez(folder / "samples.npz", TRANSFORMER.calibration[:24])
    return [
        *("quantize", str(TRANSFORMER.path), "--mode", "calibrated", "--min-psnr", "52", "--effort", "2"),
        *("--calibrate", str(folder / "samples.npz"), "-o", str(folder / name)),
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shrink", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that comes out when nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run(*command(folder, "a.safetensors"))
    assert outcome.code == 0, outcome.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "samples.npz"]
    return (folder / "a.safetensors").read_bytes()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_command_that_is_stopped_goes_on_the_next_time(
    sent: signal.Signals, code: int, undisturbed: bytes, tmp_path: Path
) -> None:
    unfinished = tmp_path / "a.safetensors.unfinished"
    process = start(command(tmp_path, "a.safetensors"))
    try:
        until = time.monotonic() + 60
        while not any(unfinished.glob(LAYER)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, (out, err)
    assert out == ""
    assert err.strip() == ("shrink: error: interrupted" if sent == signal.SIGINT else "")
    assert not (tmp_path / "a.safetensors").exists()
    assert any(unfinished.glob(LAYER))
    outcome = run(*command(tmp_path, "a.safetensors"))
    assert outcome.code == 0, outcome.stderr
    assert "done already by a run that was interrupted" in outcome.stdout
    assert (tmp_path / "a.safetensors").read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "samples.npz"]


def test_the_same_bytes_in_another_process(undisturbed: bytes, tmp_path: Path) -> None:
    process = start(command(tmp_path, "a.safetensors"))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "a.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("what", ["folder of a user", "file", "work on something else", "damaged"])
def test_what_lies_at_the_place_does_no_harm(what: str, undisturbed: bytes, tmp_path: Path) -> None:
    unfinished = tmp_path / "a.safetensors.unfinished"
    left: list[str] = []
    if what == "file":
        unfinished.write_text("precious")
        left = [unfinished.name]
    else:
        unfinished.mkdir()
        if what == "work on something else":
            stored(unfinished)
        elif what == "damaged":
            (unfinished / "identity").write_bytes(b"\xff\xfe")
            (unfinished / "gradients.npz").write_bytes(b"PK\x03\x04")
        else:
            (unfinished / "mine.txt").write_text("precious")
            left = [unfinished.name]
    outcome = run(*command(tmp_path, "a.safetensors"))
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.safetensors", "samples.npz", *left])
    if what == "folder of a user":
        assert [path.name for path in unfinished.iterdir()] == ["mine.txt"]
    if what == "file":
        assert unfinished.read_text() == "precious"
