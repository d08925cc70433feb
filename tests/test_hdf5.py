from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from shrink import container, formats
from shrink.errors import BadInput, MissingDependency, OutputError, UsageError
from shrink.formats import _hdf5, _hdf5_process, _hdf5_write, chainer_h5, keras_h5
from shrink.model import Model, Source, Tensor, plain_values
from shrink.pipeline import drop_state
from tests.samples import chainer_h5 as chainer_sample
from tests.samples import keras_h5 as keras_sample

LSTM = Path(__file__).parents[2] / "shared/models/lstm-text-keras/lstm_text_generation.h5"
SAMPLES = [(chainer_sample, chainer_h5), (keras_sample, keras_h5)]

needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no such limits")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The children that the test starts; at its end none of them may be running."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(_hdf5_process, "subprocess", types.SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    _hdf5._looked.clear()
    yield started
    _hdf5._looked.clear()
    gc.collect()
    assert [child.returncode for child in started if child.returncode is None] == []


def build(path: Path, fill: Callable[[Any], object]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def values(model: Model) -> dict[str, Any]:
    return {t.name: plain_values(t) for t in model.tensors}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and left[n].tobytes() == right[n].tobytes()
        for n in left
    )


def objects(path: Path) -> dict[str, Any]:
    """Everything in a file of ours, as h5py sees it: attributes of groups, values of datasets.

    Without what no reader sees: the byte order, and the width of a list of texts.
    """
    found: dict[str, Any] = {}

    def attributes(item: Any) -> dict[str, Any]:
        return {name: plain(value) for name, value in sorted(item.attrs.items())}

    def plain(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return value.tolist() if value.dtype.kind == "S" else value.astype(value.dtype.newbyteorder("<"))

    with h5py.File(path, "r") as file:
        found[""] = attributes(file)

        def visit(name: str, item: Any) -> None:
            found[name] = attributes(item) if isinstance(item, h5py.Group) else plain(item[()])

        file.visititems(visit)
    return found


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("sample", "module"), SAMPLES)
def test_read_gives_what_h5py_reads(sample: Any, module: Any, tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    model = formats.sniff(path).read(path)
    assert model.source.format == module.NAME
    assert model.source.size_bytes == path.stat().st_size
    inside = "model_weights/" if module is keras_h5 else ""
    with h5py.File(path, "r") as file:
        for tensor in model.tensors:
            expected = file[tensor.name if tensor.role == "state" else inside + tensor.name][()]
            assert tensor.array.shape == expected.shape
            assert tensor.dtype == expected.dtype.newbyteorder("<")
            assert tensor.array.tobytes() == expected.astype(tensor.dtype).tobytes()
            assert not tensor.array.flags.writeable


@pytest.mark.parametrize(("sample", "module"), SAMPLES)
def test_damaged_samples_are_claimed_once_and_refused(sample: Any, module: Any, tmp_path: Path) -> None:
    for case in sample.damaged(tmp_path):
        head = case.path.read_bytes()[:512]
        claims = [f for f in (chainer_h5, keras_h5) if f.sniff(case.path, head)]
        assert len(claims) == 1, case.label
        with pytest.raises(BadInput) as error:
            claims[0].read(case.path)
        for word in case.words:
            assert word in str(error.value), case.label
        assert error.value.exit_code == case.exit_code
        assert error.value.file == case.path


def test_one_child_serves_sniffing_index_and_all_values(tmp_path: Path, children: list[Any]) -> None:
    arrays = {f"l{i:02}/W": np.full((3, i), i, "f4") for i in range(60)}
    path = build(tmp_path / "many.h5", lambda f: [f.__setitem__(n, a) for n, a in arrays.items()])
    model = formats.sniff(path).read(path)
    assert same(values(model), arrays)
    assert len(children) == 1


def test_the_child_ends_with_the_model_and_leaves_no_descriptor(tmp_path: Path, children: list[Any]) -> None:
    path = chainer_sample.make(tmp_path)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    model = chainer_h5.read(path)
    assert children[0].poll() is None
    del model
    gc.collect()
    assert children[0].returncode is not None
    assert (len(list(descriptors.iterdir())) if descriptors.exists() else 0) == before
    assert threading.active_count() == 1 or not any(isinstance(t, threading.Timer) for t in threading.enumerate())


def test_a_failed_read_leaves_no_child(tmp_path: Path, children: list[Any]) -> None:
    path = tmp_path / "bad.h5"
    path.write_bytes(_hdf5.SIGNATURE + bytes(100))
    with pytest.raises(BadInput):
        chainer_h5.read(path)
    assert len(children) == 1
    assert children[0].returncode is not None


def test_values_are_not_read_before_they_are_asked_for(tmp_path: Path) -> None:
    path = build(tmp_path / "lazy.h5", lambda f: f.create_dataset("W", data=np.arange(10_000, dtype="f4")))
    with h5py.File(path, "r") as file:
        start = file["W"].id.get_offset()
    model = chainer_h5.read(path)
    # Values that change in place show when they are read: now. A changed file is refused, so its time is put back.
    times = path.stat()
    with open(path, "r+b") as raw:
        raw.seek(start)
        raw.write(np.full(1, 77, "f4").tobytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model["W"].array[0] == 77


def test_a_file_that_changed_in_place_is_refused(tmp_path: Path) -> None:
    path = chainer_sample.make(tmp_path)
    model = chainer_h5.read(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadInput, match="changed"):
        _ = model["l1/W"].array


def test_a_replaced_file_still_gives_its_values(tmp_path: Path) -> None:
    """The result may be written over its source."""
    path = chainer_sample.make(tmp_path)
    model = chainer_h5.read(path)
    expected = values(chainer_h5.read(path))
    chainer_h5.write(model, model.tensors[:3], path, 3)
    assert same(values(model), expected)
    assert len(chainer_h5.read(path).tensors) == 3


def test_more_models_than_children(tmp_path: Path, children: list[Any]) -> None:
    paths = [tmp_path / f"{i}.h5" for i in range(7)]
    for i, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file["W"] = np.full(5, i, "f4")
    models = [chainer_h5.read(p) for p in paths]
    for _ in range(2):
        for i, model in enumerate(models):
            assert model["W"].array.tolist() == [i] * 5
            assert sum(child.returncode is None for child in children) <= _hdf5_process._CHILDREN_AT_MOST


def test_values_from_many_threads(tmp_path: Path) -> None:
    arrays = {f"W{i:02}": np.arange(1000 + i, dtype="f4") for i in range(24)}
    path = build(tmp_path / "threads.h5", lambda f: [f.__setitem__(n, a) for n, a in arrays.items()])
    model = chainer_h5.read(path)
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(arrays, pool.map(lambda n: model[n].array, arrays), strict=True))
    assert same(read, arrays)


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_tensors_larger_than_a_slab(dtype: str, tmp_path: Path) -> None:
    arrays = {
        "contiguous": np.arange(5_000_000, dtype=dtype).reshape(2500, 2000),
        "flat": np.arange(3_000_001, dtype=dtype),
        "one row": np.arange(3_000_000, dtype=dtype).reshape(1, -1),
        "chunked": np.arange(2_500_000, dtype=dtype).reshape(2500, 1000),
    }
    path = build(
        tmp_path / "large.h5",
        lambda f: [
            f.create_dataset(n, data=a, chunks=(700, 300) if n == "chunked" else None) for n, a in arrays.items()
        ],
    )
    model = chainer_h5.read(path)
    for name, expected in arrays.items():
        assert np.array_equal(model[name].array, expected)
        assert model[name].dtype == np.dtype("<f4")


def test_names_that_a_file_system_encoding_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.h5")
    try:
        path.write_bytes(chainer_sample.make(tmp_path).read_bytes())
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert chainer_h5.read(path)["bn/N"].array == 3


def test_a_missing_file_is_no_bad_input(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        chainer_h5.read(tmp_path / "missing.h5")


def test_space_and_null_padded_attributes(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        for name, padding in (("term", h5py.h5t.STR_NULLTERM), ("space", h5py.h5t.STR_SPACEPAD)):
            tid = h5py.h5t.C_S1.copy()
            tid.set_size(8)
            tid.set_strpad(padding)
            tid.set_cset(h5py.h5t.CSET_UTF8)
            attribute = h5py.h5a.create(file.id, name.encode(), tid, h5py.h5s.create(h5py.h5s.SCALAR))
            attribute.write(np.array(b"ab\0cd" if name == "term" else b"ab      ", "S8"), tid)
        file.attrs["varying"] = ["é", ""]

    found = _hdf5.opened(build(tmp_path / "padded.h5", fill))
    assert found.groups[""] == {"term": "ab", "space": "ab", "varying": ["é", ""]}


# ------------------------------------------------------------------------------------------- the guard of the child


def child_does(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the child run `code`, with its module as `m`, in place of serving."""
    monkeypatch.setattr(_hdf5_process, "_BOOT", _hdf5_process._BOOT.replace("m.serve()", "exec(" + repr(code) + ")"))


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.abort()",
        "import os; os._exit(0)",
        "raise SystemExit(1)",
        "print('what a library prints' * 10, flush=True)",
        "import os; os.write(1, b'J' + b'\\xff' * 8)",
        "import os; os.write(1, b'D' + bytes(7) + b'\\x08' + bytes(8))",
        "import os; os.write(1, b'J' + bytes(7) + b'\\x02' + b'{]')",
        "import os; os.write(1, b'J' + bytes(7) + b'\\x02' + b'[]')",
        "import os; os.write(1, b'J' + bytes(7) + b'\\x02' + b'\\xff\\xff')",
        "import os; os.write(1, b'J' + bytes(6) + b'\\x75\\x30' + b'[' * 30000)",
        "import os; os.write(1, b'E' + bytes(7) + b'\\x02' + b'[]')",
    ],
)
def test_a_child_that_fails_is_a_damaged_file(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Any]
) -> None:
    path = chainer_sample.make(tmp_path)
    child_does(monkeypatch, code)
    with pytest.raises(BadInput, match="the HDF5 reader crashed on it: the file is damaged") as error:
        chainer_h5.read(path)
    assert error.value.file == path
    assert children[0].returncode is not None


@pytest.mark.parametrize(
    "said",
    [
        {"groups": [["", {}]], "datasets": [["W", "<f4", [-1]]]},
        {"groups": [["", {}]], "datasets": [["W", "<f4", [1.5]]]},
        {"groups": [["", {}]], "datasets": [["W", "nonsense", [1]]]},
        {"groups": [["", {}]], "datasets": [["W", "<f4", [1 << 40]]]},
        {"groups": [["", {}]], "datasets": [["W", "<f4", [0, 1 << 62]]]},
        {"groups": [["", {}]], "datasets": [["W", "|O", [1]]]},
        {"groups": [["", {}]], "datasets": [["../W", "<f4", [1]]]},
        {"groups": [["", {}]], "datasets": [["W", "<f4", [1]], ["W", "<f4", [1]]]},
        {"groups": [["", {}]], "datasets": [7]},
        {"groups": [["", {"a": 7}]], "datasets": []},
        {"groups": [["", {"a": {"dtype": "<f8", "shape": [9], "base64": ""}}]], "datasets": []},
        {"groups": [], "datasets": []},
        {"groups": [["", {}]]},
    ],
)
def test_what_the_child_says_is_not_believed(said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chainer_sample.make(tmp_path)
    text = json.dumps(said)
    child_does(monkeypatch, f"import os; os.write(1, m.FRAME.pack(b'J', {len(text)}) + {text.encode()!r})")
    with pytest.raises(BadInput):
        chainer_h5.read(path)


def test_a_child_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chainer_sample.make(tmp_path)
    child_does(monkeypatch, "while True: pass")
    monkeypatch.setattr(_hdf5, "_WALL_S", 0.5)
    with pytest.raises(BadInput, match="does not come to an end"):
        chainer_h5.read(path)


@needs_limits
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("m._limit(0.1, 1 << 30, None)\nwhile True: pass", "does not come to an end"),
        (
            "import os; m._limit(9, 64 << 20, os.open('/proc/self/statm', 0)); bytearray(128 << 20); m.serve()",
            "crashed",
        ),
        ("import os; m._limit(9, 64 << 20, os.open('/proc/self/statm', 0)); bytearray(16 << 20); m.serve()", ""),
        ("import h5py; m._no_more_files(); open('/etc/passwd'); m.serve()", "crashed"),
        ("open('/etc/passwd').close(); m.serve()", ""),
    ],
    ids=["cpu", "memory", "enough memory", "files", "files before"],
)
def test_the_limits_of_the_child(code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chainer_sample.make(tmp_path)
    child_does(monkeypatch, code)
    if words:
        with pytest.raises(BadInput, match=words):
            chainer_h5.read(path)
    else:
        chainer_h5.read(path)


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chainer_sample.make(tmp_path)
    child_does(monkeypatch, "sys.modules['h5py'] = None; m.serve()")
    with pytest.raises(MissingDependency, match="h5py"):
        formats.sniff(path)
    with pytest.raises(MissingDependency, match="h5py"), _hdf5_write.writing(tmp_path / "out.h5"):
        pass
    assert not (tmp_path / "out.h5").exists()


def test_an_interrupt_does_not_confuse_the_next_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chainer_h5.read(chainer_sample.make(tmp_path))
    fill = _hdf5_process.Child._fill

    def interrupted(self: Any, view: memoryview) -> None:
        fill(self, view)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_hdf5_process.Child, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = model["l1/W"].array
    assert model["bn/N"].array == 3
    assert model["l1/W"].array.shape == (40, 30)


def small_models(folder: Path) -> list[bytes]:
    """Small files, so that most bits are structure: old and new group forms, chunks, filters, attributes."""

    def chainer(file: Any) -> None:
        rng = np.random.default_rng(1)
        file.create_dataset("l1/W", data=rng.standard_normal((6, 4)).astype("f4"), compression=4)
        file.create_dataset("l1/b", data=rng.standard_normal(6).astype("f4"))
        file["bn/N"] = 3

    def keras(file: Any) -> None:
        file.attrs["layer_names"] = [b"d"]
        file.attrs["keras_version"] = b"2.0.5"
        file.create_group("d").attrs["weight_names"] = [b"d/kernel:0"]
        file["d/d/kernel:0"] = np.arange(6, dtype="f4").reshape(2, 3)

    made = []
    for name, fill, version in (("c", chainer, "earliest"), ("k", keras, "earliest"), ("n", keras, "latest")):
        path = folder / f"{name}.h5"
        with h5py.File(path, "w", libver=version) as file:
            fill(file)
        made.append(path.read_bytes())
    return made


def test_flipped_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit gives BadInput or valid tensors: never a crash, never a hang, never another exception."""
    monkeypatch.setattr(_hdf5, "_CPU_S", 2.0)
    monkeypatch.setattr(_hdf5, "_WALL_S", 10.0)
    rng = random.Random(5)
    cases: list[Path] = []
    for k, data in enumerate(small_models(tmp_path)):
        # Not where nothing is written: a flipped bit in a hole changes nothing.
        written = [i for i, byte in enumerate(data) if byte] + list(range(200))
        for i in range(50):
            flipped = bytearray(data)
            flipped[rng.choice(written)] ^= 1 << rng.randrange(8)
            path = tmp_path / f"{k}-{i}.h5"
            path.write_bytes(flipped)
            cases.append(path)

    def outcome(path: Path) -> str:
        try:
            model = formats.sniff(path).read(path)
            shapes = [tensor.array.shape == tensor.shape for tensor in model.tensors]
        except BadInput as error:
            return f"refused: {error}" if error.file == path else f"who? {error}"
        return "read" if all(shapes) else "wrong shape"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(outcome, cases))
    refused = sum(outcome.startswith("refused") for outcome in outcomes)
    assert refused + outcomes.count("read") == len(cases)
    assert refused >= 30
    assert outcomes.count("read") >= 10


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize(("sample", "module"), SAMPLES)
def test_round_trip(sample: Any, module: Any, level: int | None, tmp_path: Path) -> None:
    model = module.read(sample.make(tmp_path))
    out = tmp_path / "out.h5"
    stored = module.write(model, model.tensors, out, level)
    again = formats.sniff(out).read(out)
    assert again.source.format == module.NAME
    assert same(values(again), values(model))
    assert again.attributes == model.attributes
    assert [t.role for t in again.tensors] == [t.role for t in model.tensors]
    assert set(stored) == {t.name for t in model.tensors}
    assert 0 < sum(stored.values()) < out.stat().st_size


@pytest.mark.parametrize(("sample", "module"), SAMPLES)
def test_the_same_model_gives_the_same_bytes_without_a_clock(sample: Any, module: Any, tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    model = module.read(path)
    first, second = tmp_path / "first.h5", tmp_path / "second.h5"
    module.write(model, model.tensors, first, 3)
    # Another process, so that neither memory nor the order of sets can come out the same by chance.
    code = (
        "import sys, pathlib, importlib; f = importlib.import_module(sys.argv[1]);"
        "p, o = map(pathlib.Path, sys.argv[2:]); m = f.read(p); f.write(m, m.tensors, o, 3)"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, module.__name__, str(path), str(second)],
        check=True,
        env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"},
    )
    assert first.read_bytes() == second.read_bytes()
    with h5py.File(first, "r") as file:
        times = []
        file.visit(lambda name: times.append(h5py.h5o.get_info(file[name].id).mtime))
    assert set(times) == {0}


def test_level_packs_keras_and_chainer_is_always_packed(tmp_path: Path) -> None:
    model = Model((Tensor.of("d/W", np.zeros((200, 200), "f4")),), Source("chainer-h5", Path("x.h5"), 0))
    sizes = {}
    for level in (None, 3):
        sizes["chainer", level] = chainer_h5.write(model, model.tensors, tmp_path / "c.h5", level)["d/W"]
    layout = {"whole": False, "beside": [], "groups": {"": {"layer_names": ["d"]}, "d": {"weight_names": ["W"]}}}
    keras = replace(model, source=Source("keras-h5", Path("x.h5"), 0), attributes={"shrink.layout": json.dumps(layout)})
    for level in (None, 3):
        sizes["keras", level] = keras_h5.write(keras, keras.tensors, tmp_path / "k.h5", level)["d/W"]
    assert sizes["keras", None] == 160_000
    assert max(sizes["keras", 3], sizes["chainer", None], sizes["chainer", 3]) < 2000


def test_float16_stays_float16(tmp_path: Path) -> None:
    half = Tensor.of("l/W", np.arange(12, dtype="f2").reshape(3, 4))
    chainer_h5.write(Model((half,), Source("chainer-h5", Path("x"), 0)), [half], tmp_path / "h.h5", 3)
    with h5py.File(tmp_path / "h.h5", "r") as file:
        assert file["l/W"].dtype == np.dtype("<f2")
        target = np.empty((3, 4), "f4")
        # How load_hdf5 fills a parameter.
        file["l/W"].read_direct(target)
    assert target.tolist() == half.array.tolist()


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a//b",), ("a/./b",), ("a/",)])
def test_names_that_hdf5_cannot_hold(names: tuple[str, ...], tmp_path: Path) -> None:
    tensors = tuple(Tensor.of(name, np.zeros(3, "f4")) for name in names)
    with pytest.raises(BadInput, match="HDF5 cannot hold"):
        chainer_h5.write(Model(tensors, Source("x", Path("x"), 0)), tensors, tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> Any:
        raise BadInput("damaged")

    tensors = (Tensor.of("a", np.zeros(9, "f4")), Tensor("b", np.dtype("f4"), (2,), fail))
    with pytest.raises(BadInput, match="damaged"):
        chainer_h5.write(Model(tensors, Source("x", Path("x"), 0)), tensors, tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no way to make a disk look full")
    noise = np.random.default_rng(3).standard_normal(400_000).astype("f4")
    tensors = tuple(Tensor.of(name, noise) for name in "abc")
    model = Model(tensors, Source("x", Path("x"), 0))
    out = tmp_path / "out.h5"
    # Whether the disk fills up in the middle, or at the last bytes when the file is closed.
    chainer_h5.write(model, tensors, out, 3)
    whole = out.stat().st_size
    out.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for at_most in (1000, whole // 2, whole - 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, limits[1]))
        try:
            with pytest.raises(OutputError) as error:
                chainer_h5.write(model, tensors, out, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.file == out
        assert len(str(error.value)) < 300
        assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- Chainer


def trainer(file: Any) -> None:
    file["updater/model:main/l1/W"] = np.arange(6, dtype="f4").reshape(2, 3)
    file["updater/optimizer:main/l1/W/m"] = np.ones((2, 3), "f4")
    file["updater/iterator:main/is_new_epoch"] = True
    file["updater/iteration"] = 7
    file.create_dataset("updater/model:main/l1/b", data=h5py.Empty("f"))
    file.create_dataset("updater/iterator:main/order", data=h5py.Empty("f"))
    file.create_group("updater/model:main/relu")


def test_trainer_snapshot(tmp_path: Path) -> None:
    model = chainer_h5.read(build(tmp_path / "snapshot.h5", trainer))
    assert model.attributes["trainer"] == "1"
    assert {t.name: t.role for t in model.tensors} == {
        "updater/iteration": "state",
        "updater/iterator:main/is_new_epoch": "state",
        "updater/model:main/l1/W": "weight",
        "updater/optimizer:main/l1/W/m": "state",
    }
    chainer_h5.write(model, model.tensors, tmp_path / "again.h5", 3)
    assert str(objects(tmp_path / "again.h5")) == str(objects(tmp_path / "snapshot.h5"))


def test_trainer_snapshot_becomes_a_snapshot_of_its_model(tmp_path: Path) -> None:
    """The empty parts follow the weights: a None among them is a parameter that load_hdf5 asks for."""
    model = drop_state(chainer_h5.read(build(tmp_path / "snapshot.h5", trainer)))
    chainer_h5.write(model, model.tensors, tmp_path / "model.h5", 3)
    found = objects(tmp_path / "model.h5")
    assert set(found) == {"", "l1", "l1/W", "l1/b", "relu"}
    assert isinstance(found["l1/b"], h5py.Empty)


def test_none_and_bare_groups_survive_the_container(tmp_path: Path) -> None:
    source = chainer_sample.make(tmp_path)
    restored = through_container(chainer_h5.read(source), tmp_path)
    chainer_h5.write(restored, restored.tensors, tmp_path / "out.h5", 3)
    found = objects(tmp_path / "out.h5")
    assert isinstance(found["l1/initial"], h5py.Empty)
    assert found["activation"] == {}
    assert set(found) == set(objects(source))


@pytest.mark.parametrize("text", ["", "[]", "7", '{"none": [7], "groups": [], "trainer": false}', '{"none": "abc"}'])
def test_hostile_chainer_attributes(text: str, tmp_path: Path) -> None:
    model = Model((), Source("chainer-h5", Path("x.safetensors"), 0), {"hdf5": text})
    with pytest.raises(BadInput, match="hdf5"):
        chainer_h5.write(model, [], tmp_path / "out.h5", 3)
    climbing = {"hdf5": '{"none": ["../x"], "groups": [], "trainer": false}'}
    with pytest.raises(BadInput, match="climbs"):
        chainer_h5.write(replace(model, attributes=climbing), [], tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- Keras


def through_container(model: Model, folder: Path) -> Model:
    path = folder / "model.safetensors"
    container.write(
        model.tensors, path, source=model.source.format, attributes=model.attributes, graph=None, level=None
    )
    contents = container.read(path)
    return Model(contents.entries, Source(contents.source or "", path, 0), contents.attributes)


def test_keras_comes_back_from_the_container_as_it_was(tmp_path: Path) -> None:
    source = keras_sample.make(tmp_path)
    model = keras_h5.read(source)
    assert model.attributes["model_config"] == keras_sample.CONFIG
    restored = through_container(model, tmp_path)
    keras_h5.write(restored, restored.tensors, tmp_path / "out.h5", None)
    before, after = objects(source), objects(tmp_path / "out.h5")
    assert str(after) == str(before)
    assert after[""]["model_config"].encode() == keras_sample.CONFIG.encode()
    # Of fixed length: what varies in length comes back as str, which old versions of Keras cannot read.
    assert after["model_weights"]["layer_names1"] == [b"wide", b"flatten", b"block/a"]


def test_keras_order_is_the_order_of_its_lists(tmp_path: Path) -> None:
    names = [t.name for t in keras_h5.read(keras_sample.make(tmp_path)).tensors]
    assert names[:3] == ["dense_2/dense_2/kernel:0", "dense_2/dense_2/bias:0", "畳み込み/畳み込み/kernel:0"]
    assert names[-2:] == [
        "optimizer_weights/training/Adam/iterations:0",
        "optimizer_weights/Adam/畳み込み/m:0",
    ]


def test_keras_without_its_training_state(tmp_path: Path) -> None:
    model = drop_state(keras_h5.read(keras_sample.make(tmp_path)))
    keras_h5.write(model, model.tensors, tmp_path / "out.h5", 3)
    found = objects(tmp_path / "out.h5")
    assert not any(name.startswith("optimizer_weights") for name in found)
    assert found[""]["training_config"] == '{"loss": "mse"}'
    again = keras_h5.read(tmp_path / "out.h5")
    assert same(values(again), values(model))


def test_keras_with_a_part_of_its_tensors_is_refused(tmp_path: Path) -> None:
    model = keras_h5.read(keras_sample.make(tmp_path))
    for left_out in ("dense_2/dense_2/bias:0", "optimizer_weights/Adam/畳み込み/m:0"):
        entries = [t for t in model.tensors if t.name != left_out]
        with pytest.raises(BadInput, match="lists it") as error:
            keras_h5.write(model, entries, tmp_path / "out.h5", 3)
        assert error.value.tensor == left_out
    assert not (tmp_path / "out.h5").exists()


def test_keras_weights_only(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file.attrs["layer_names"] = [b"b", b"a"]
        file.attrs["backend"] = b"theano"
        for layer in "ab":
            group = file.create_group(layer)
            group.attrs["weight_names"] = [b"kernel:0"]
            group["kernel:0"] = np.full(3, ord(layer), "f4")
        # Not listed, but there: it is not lost.
        file["top_level/x"] = np.zeros(2, "f4")

    source = build(tmp_path / "weights.h5", fill)
    model = formats.sniff(source).read(source)
    assert model.source.format == "keras-h5"
    assert [(t.name, t.role) for t in model.tensors] == [
        ("b/kernel:0", "weight"),
        ("a/kernel:0", "weight"),
        ("top_level/x", "weight"),
    ]
    assert model.attributes["backend"] == "theano"
    keras_h5.write(model, model.tensors, tmp_path / "out.h5", None)
    # The newest h5py writes such lists as texts of varying length, which the oldest Keras cannot read.
    assert objects(tmp_path / "out.h5")[""]["layer_names"] == [b"b", b"a"]
    assert set(objects(tmp_path / "out.h5")) == set(objects(source))
    assert keras_h5.read(tmp_path / "out.h5").attributes == model.attributes


def test_long_lists_are_split_as_keras_splits_them(tmp_path: Path) -> None:
    names = [f"層{i:05}-{'x' * 60}" for i in range(3000)]
    with _hdf5_write.writing(tmp_path / "long.h5") as out:
        out.attribute("", "layer_names", names)
        out.attribute("", "longest", ["x" * 40_000, "y" * 30_000])
    found = _hdf5.opened(tmp_path / "long.h5").groups[""]
    assert "layer_names" not in found
    assert len(found) > 4
    assert keras_h5._joined(found, "layer_names") == names
    assert keras_h5._joined(found, "longest") == ["x" * 40_000, "y" * 30_000]
    with pytest.raises(BadInput, match="too long"), _hdf5_write.writing(tmp_path / "x.h5") as out:
        out.attribute("", "layer_names", ["x" * 70_000])


def test_only_keras_becomes_keras(tmp_path: Path) -> None:
    model = Model((), Source("chainer-npz", Path("gen.npz"), 0))
    with pytest.raises(UsageError, match="Keras"):
        keras_h5.write(model, [], tmp_path / "out.h5", 3)


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "[]",
        "[" * 100_000,
        {"whole": 1, "beside": [], "groups": {"": {"layer_names": []}}},
        {"whole": False, "beside": [[]], "groups": {"": {"layer_names": []}}},
        {"whole": False, "beside": [], "groups": {"": {}}},
        {"whole": False, "beside": [], "groups": []},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": ["a"]}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": []}, "../x": {}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": []}, "a//x": {}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": [], "x": 7}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": [], "x": "a\0b"}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": [], "x": ["\ud800"]}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": [], "": "empty name"}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": [], "a\0b": "name"}}},
        {"whole": False, "beside": [], "groups": {"": {"layer_names": ["a"]}, "a": {"weight_names": ["missing"]}}},
        {
            "whole": False,
            "beside": [],
            "groups": {"": {"layer_names": [], "x": {"dtype": "O", "shape": [], "base64": ""}}},
        },
    ],
)
def test_hostile_layouts(layout: Any, tmp_path: Path) -> None:
    text = layout if isinstance(layout, str) else json.dumps(layout)
    model = Model((), Source("keras-h5", Path("x.safetensors"), 0), {"shrink.layout": text})
    with pytest.raises(BadInput):
        keras_h5.write(model, [], tmp_path / "out.h5", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not LSTM.exists(), reason="the real Keras model is not here (../shared)")
def test_real_keras_model(tmp_path: Path) -> None:
    model = formats.sniff(LSTM).read(LSTM)
    assert model.source.format == "keras-h5"
    assert [(t.name, t.shape) for t in model.tensors if t.role == "weight"] == [
        ("lstm_1/lstm_1/kernel:0", (57, 512)),
        ("lstm_1/lstm_1/recurrent_kernel:0", (128, 512)),
        ("lstm_1/lstm_1/bias:0", (512,)),
        ("dense_1/dense_1/kernel:0", (128, 57)),
        ("dense_1/dense_1/bias:0", (57,)),
    ]
    assert sum(t.role == "state" for t in model.tensors) == 5
    assert json.loads(model.attributes["model_config"])["class_name"] == "Sequential"
    restored = through_container(model, tmp_path)
    keras_h5.write(restored, restored.tensors, tmp_path / "out.h5", None)
    assert str(objects(tmp_path / "out.h5")) == str(objects(LSTM))
    again = keras_h5.read(tmp_path / "out.h5")
    assert same(values(again), values(model))
    with h5py.File(LSTM, "r") as before, h5py.File(tmp_path / "out.h5", "r") as after:
        for name in ("model_config", "training_config", "keras_version", "backend"):
            assert after.attrs[name] == before.attrs[name]
            assert (
                h5py.h5a.open(after.id, name.encode()).get_type() == h5py.h5a.open(before.id, name.encode()).get_type()
            )
