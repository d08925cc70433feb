"""Shards: within the limit whatever the tensors, few, even, valid by themselves, and together the very same bytes."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open

import shrink
from shrink import parts
from shrink.errors import BadInput, IntegrityError, OutputError, UsageError
from shrink.model import Model, Source, Tensor
from shrink.progress import silent
from shrink.split import Plan, join, plan, the_model_in
from shrink.split._layout import items, layout
from tests.samples import chainer_npz, keras_h5, onnx, webdnn

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "shards"
SIZES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "I64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
Spec = tuple[str, str, int]
"""Name, dtype and number of values."""


def write_plain(path: Path, specs: list[Spec], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file as another program would write it."""
    bytes_of = random.Random(1)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, dtype, count in specs:
        data = bytes_of.randbytes(count * SIZES[dtype])
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)


def made(source: Path, limit: int, folder: Path, *, force: bool = False) -> Plan:
    planned = plan(source, limit=limit, output=folder, force=force)
    planned.write(silent)
    return planned


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(source: Path, limit: int, folder: Path, *, entries_are_small: bool) -> None:
    """Everything that is promised of a split."""
    out = folder / "out"
    planned = plan(source, limit=limit, output=out)
    assert not out.exists()
    planned.write(silent)
    found = sizes(out)
    assert found == {file.name: file.size_bytes for file in planned.files}
    assert max(found.values()) <= limit
    assert planned.files[-1].name == "gen.safetensors.index.json"
    shards = [size for name, size in sorted(found.items()) if name.endswith(".safetensors")]
    index, _ = parts.read_json(out / "gen.safetensors.index.json")
    for name in sorted(found):
        if name.endswith(".safetensors"):
            with safe_open(out / name, framework="numpy") as opened:
                assert {index["weight_map"].pop(key) for key in opened.keys()} <= {name}  # noqa: SIM118
    assert index["weight_map"] == {}
    if entries_are_small:
        assert len(shards) <= -(-sum(shards) // limit) + 1
        assert max(shards) - min(shards) <= sum(shards) / len(shards) * 0.5 + 200
    (back,) = join(out / "gen.safetensors.index.json", folder / "back.safetensors")
    assert back.read_bytes() == source.read_bytes()
    made(source, limit, folder / "again")
    assert contents(folder / "again") == contents(out)


names = st.one_of(
    st.text('abc/[]0123456789"\\ 層é😀_.', min_size=1, max_size=12),
    st.sampled_from(["W", "W[1/2]", "W[1/2]_", "W_", "shrink.header", "shrink.header_", "shrink.tensor-1", "[1/2]"]),
)
counts = st.one_of(st.integers(0, 3), st.integers(0, 400), st.integers(0, 30_000))
limits = st.one_of(st.integers(10_000, 10_100), st.integers(10_000, 300_000))

_CHUNKS_OF_W_ = [(f"W_[{i}/{n}]", "U8", 1) for n in (2, 3) for i in (1, 2, 3)]


@given(
    st.lists(st.tuples(names, st.sampled_from(sorted(SIZES)), counts), max_size=30, unique_by=lambda spec: spec[0]),
    limits,
    st.booleans(),
)
@example([], 10_000, False)
@example([("W", "F32", 100_000)], 10_000, True)
@example([("W", "F64", 40_000), ("W[1/2]", "U8", 0), ("W_", "F32", 9_000), ("W_[1/2]", "U8", 3)], 10_000, False)
@example([("W", "F32", 4_000), *((f"W[{i}/{n}]", "U8", 1) for n in (2, 3) for i in (1, 2, 3))], 10_000, False)
@example([("W", "F32", 4_000), ("W[1/2]", "U8", 0), ("W_", "F32", 4_000), *_CHUNKS_OF_W_], 10_000, False)
@example([(f"layer{i}/b", "F32", 1) for i in range(1500)], 10_000, True)
@example([(f"empty{i}", "F32", 0) for i in range(900)], 10_007, False)
@example([("almost", "U8", 9_800), ("tiny", "F64", 1), ("more", "F16", 4_900)], 10_000, False)
def test_join_gives_back_what_split_took(specs: list[Spec], limit: int, has_metadata: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "gen.safetensors"
        write_plain(source, specs, {"format": "pt"} if has_metadata else None)
        check(source, limit, Path(folder), entries_are_small=True)


@pytest.mark.parametrize("length", [900, 4_900, 6_000, 30_000])
def test_names_may_be_as_long_as_shards(length: int, tmp_path: Path) -> None:
    specs = [(f"{i}" + "層" * (length // 3), "F32", 700 * i) for i in range(6)]
    write_plain(tmp_path / "gen.safetensors", specs)
    check(tmp_path / "gen.safetensors", 10_000, tmp_path, entries_are_small=False)


def container(path: Path, *, seed: int = 0, tensors: int = 12) -> Path:
    """A container of ours with encoded tensors, plain ones, attributes and a graph."""
    rng = np.random.default_rng(seed)
    weights = [Tensor.of(f"l{i}/W", rng.standard_normal((40 + 10 * i, 60)).astype("f4")) for i in range(tensors)]
    others = [
        Tensor.of("層/b", rng.standard_normal(40).astype("f4")),
        Tensor.of("N", np.array(3, "i8")),
        Tensor.of("empty", np.empty((0, 5), "f4")),
        Tensor.of("moment", rng.standard_normal((8, 8)).astype("f4"), "state"),
    ]
    model = Model((*weights, *others), Source("chainer-npz", path, 0), {"note": "ノート"}, b"a graph")
    shrink.save(shrink.quantize(model, "int8", keep_all=True), path)
    return path


@given(st.integers(0, 1000), st.integers(1, 14), limits)
def test_containers_come_back_too(seed: int, tensors: int, limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = container(Path(folder) / "gen.safetensors", seed=seed, tensors=tensors)
        check(source, limit, Path(folder), entries_are_small=True)


@pytest.mark.parametrize("dtype", ["U8", "F64"])
def test_a_shard_is_filled_to_the_last_byte_and_no_further(dtype: str) -> None:
    """Where one shard is just large enough there is one, and where it is not by a byte there are two."""
    for count in range(9_600 // SIZES[dtype], 10_000 // SIZES[dtype]):
        size = count * SIZES[dtype]
        stream = items([("shrink.header", "U8", (64,), 64), ("W", dtype, (count,), size)], 10_000)
        shards = layout(stream, 10_000)
        assert all(len(s.header) + s.stop - s.start <= 10_000 for s in shards)
        header = {
            "shrink.header": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
            "W": {"dtype": dtype, "shape": [count], "data_offsets": [64, 64 + size]},
        }
        alone = 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + 64 + size
        assert len(shards) == (1 if alone <= 10_000 else 2)


def test_a_cut_snaps_to_the_end_of_a_tensor(tmp_path: Path) -> None:
    write_plain(tmp_path / "gen.safetensors", [(f"W{i}", "F32", 4_500 + 80 * i) for i in range(6)])
    planned = made(tmp_path / "gen.safetensors", 21_000, tmp_path)
    index = json.loads((tmp_path / "gen.safetensors.index.json").read_text())
    assert len(planned.files) == 7
    assert "tensors" not in index["shrink"]
    assert len(set(index["weight_map"].values())) == 6


def test_a_tensor_in_chunks_is_said_in_the_index(tmp_path: Path) -> None:
    write_plain(tmp_path / "gen.safetensors", [("small", "F32", 2), ("W", "F32", 10_000), ("odd", "F8_E4M3", 20_000)])
    planned = made(tmp_path / "gen.safetensors", 25_000, tmp_path)
    index = json.loads((tmp_path / "gen.safetensors.index.json").read_text())
    assert index["shrink"]["tensors"]["W"] == [1, 2]
    assert index["metadata"]["total_size"] == 8 + 40_000 + 20_000
    assert index["shrink"]["decoded_bytes"] == 60_008
    assert {"shrink.header", "small", "W[1/2]", "W[2/2]"} <= set(index["weight_map"])
    with safe_open(tmp_path / index["weight_map"]["W[1/2]"], framework="numpy") as opened:
        assert opened.get_tensor("W[1/2]").dtype == np.float32
    assert planned.files[0].holds == "1 tensor, header, part of W"
    assert planned.files[-1].holds == "index"


def test_decoded_bytes_are_those_of_the_values(tmp_path: Path) -> None:
    source = container(tmp_path / "gen.safetensors")
    made(source, 20_000, tmp_path)
    said, _ = parts.read_json(tmp_path / "gen.safetensors.index.json")
    assert said["shrink"]["decoded_bytes"] == sum(t.size * t.dtype.itemsize for t in shrink.load(source).tensors)


# The model of an index


def values(model: Model) -> dict[str, tuple[Any, ...]]:
    return {t.name: (t.dtype, t.shape, t.role, t.array.tobytes()) for t in model.tensors}


def test_an_index_is_the_model_of_the_whole(tmp_path: Path) -> None:
    source = container(tmp_path / "gen.safetensors")
    made(source, 10_000, tmp_path / "out")
    whole, split = shrink.load(source), shrink.load(tmp_path / "out" / "gen.safetensors.index.json")
    assert values(split) == values(whole)
    assert list(map(repr, split.tensors)) == list(map(repr, whole.tensors))
    assert (split.attributes, split.graph) == (whole.attributes, whole.graph)
    assert (split.source.format, split.source.size_bytes) == (whole.source.format, whole.source.size_bytes)
    assert shrink.inspect(split) == shrink.inspect(whole)
    assert all(c.difference is None or c.difference.max_error == 0 for c in shrink.compare(whole, split))
    for model, name in ((whole, "a"), (split, "b")):
        shrink.save(shrink.restore(model), tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_joined_file_lives_as_long_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(container(tmp_path / "gen.safetensors"), 10_000, tmp_path / "out")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model = shrink.load(tmp_path / "out" / "gen.safetensors.index.json")
    derived = shrink.restore(model)
    shutil.rmtree(tmp_path / "out")
    del model
    gc.collect()
    assert values(derived)
    assert derived.tensors
    weight = shrink.load(GOLDEN / "set" / "gen.safetensors.index.json").tensors[0]
    gc.collect()
    assert weight.array.size
    del derived, weight
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_an_index_of_hugging_face_is_read_as_before(tmp_path: Path) -> None:
    for i in (1, 2):
        write_plain(tmp_path / f"model-0000{i}-of-00002.safetensors", [(f"W{i}", "F32", 10)])
    index = tmp_path / "model.safetensors.index.json"
    files = {f"W{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index.write_text(json.dumps({"metadata": {"total_size": 80}, "weight_map": files}))
    assert [t.name for t in shrink.load(index).tensors] == ["W1", "W2"]
    with pytest.raises(BadInput, match="shrink did not write it"):
        join(index, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def from_another(path: Path) -> None:
    """The shard of an older split of another model: the same name, the same length."""
    other = container(path.parent / "gen.safetensors", seed=9)
    made(other, 10_000, path.parent / "other")
    path.write_bytes((path.parent / "other" / path.name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "shorter"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(100)), "longer"),
        (flip, "SHA-256"),
        (from_another, "SHA-256|shorter|longer"),
    ],
    ids=["missing", "truncated", "longer", "flipped", "another"],
)
def test_a_damaged_shard_is_named_and_nothing_is_written(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    made(container(tmp_path / "gen.safetensors"), 10_000, tmp_path / "out")
    index = tmp_path / "out" / "gen.safetensors.index.json"
    shard = sorted((tmp_path / "out").glob("gen-00002-of-*"))[0]
    damage(shard)
    (tmp_path / "back.safetensors").write_bytes(b"old")
    with pytest.raises(IntegrityError, match=words) as caught:
        join(index, tmp_path / "back.safetensors", force=True)
    assert shard.name in str(caught.value)
    assert (tmp_path / "back.safetensors").read_bytes() == b"old"
    with pytest.raises(IntegrityError, match=words):
        shrink.load(index)
    assert not list(tmp_path.rglob(".shrink-*"))


def test_an_index_of_something_else_is_blamed_for_it(tmp_path: Path) -> None:
    """Parts that are right, but join to no safetensors file."""
    (tmp_path / "a.bin").write_bytes(b"nonsense")
    part = parts.Part("a.bin", 8, parts.integrity(b"nonsense"))
    ours = {"version": 1, "file": "gen.safetensors", "bytes": 8, "parts": [part.as_json()]}
    index = tmp_path / "gen.safetensors.index.json"
    index.write_bytes(parts.as_bytes({"shrink": ours}))
    with pytest.raises(BadInput, match="not a valid safetensors") as caught:
        shrink.load(index)
    assert caught.value.file == index


# Other formats


@pytest.mark.parametrize("sample", [chainer_npz, keras_h5])
def test_other_formats_become_a_container_on_the_way(sample: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = sample.make(tmp_path / "in")
    planned = plan(source, limit=10_000, output=tmp_path / "out")
    assert any("becomes" in note and source.stem in note for note in planned.notes)
    planned.write(silent)
    (whole,) = join(tmp_path / "out" / planned.files[-1].name)
    assert whole.name == f"{source.stem}.safetensors"
    assert values(shrink.load(whole)) == values(shrink.load(source))
    made(source, 10_000, tmp_path / "again")
    whole.unlink()
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    del planned
    gc.collect()
    assert not list(tmp_path.rglob(".shrink-*"))


def test_real_models_come_back(shared_models: Path, tmp_path: Path) -> None:
    for source in sorted([*shared_models.rglob("*.npz"), *shared_models.rglob("*.h5")]):
        for limit in (10_000, 300_000):
            out = tmp_path / f"{source.stem}-{limit}"
            planned = made(source, limit, out)
            assert max(sizes(out).values()) <= limit
            assert values(shrink.load(out / planned.files[-1].name)) == values(shrink.load(source))


# Old and new


def test_splitting_again_writes_nothing(tmp_path: Path) -> None:
    source = container(tmp_path / "gen.safetensors")
    made(source, 10_000, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    planned = made(source, 10_000, tmp_path / "out")
    assert any("already" in note for note in planned.notes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_another_split_there_needs_force(tmp_path: Path) -> None:
    source = container(tmp_path / "gen.safetensors")
    made(source, 10_000, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        plan(source, limit=12_000, output=tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_new_set_never_takes_the_names_of_the_old(tmp_path: Path) -> None:
    source, out = container(tmp_path / "gen.safetensors"), tmp_path / "out"
    made(source, 10_000, out)
    old = contents(out)
    (out / "mine.safetensors").write_bytes(b"kept")
    (out / "gen-notes.txt").write_bytes(b"kept")
    other = container(tmp_path / "gen.safetensors", seed=1)
    planned = plan(other, limit=10_000, output=out, force=True)
    assert not {file.name for file in planned.files[:-1]} & set(old)
    planned.write(silent)
    assert set(sizes(out)) == {file.name for file in planned.files} | {"mine.safetensors", "gen-notes.txt"}
    (back,) = join(out / "gen.safetensors.index.json", tmp_path / "back.safetensors")
    assert back.read_bytes() == other.read_bytes()


def test_in_the_folder_of_a_page_the_names_hold_a_hash(tmp_path: Path) -> None:
    """What a browser or a server between has kept of the old shards is never taken for the new."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<p>")
    found: list[set[str]] = []
    for seed in (1, 2):
        source = container(folder / "gen.safetensors", seed=seed)
        planned = made(source, 10_000, folder, force=True)
        there = set(sizes(folder)) - {"index.html", "gen.safetensors", "gen.safetensors.index.json"}
        assert {f.name for f in planned.files} == there | {"gen.safetensors.index.json"}
        assert all(re.fullmatch(r"gen-[0-9a-f]{8}-.*\d{5}-of-\d{5}\.\w+", name) for name in there)
        (back,) = join(folder / "gen.safetensors.index.json", tmp_path / "back", force=True)
        assert back.read_bytes() == source.read_bytes()
        assert "exactly so already" in made(source, 10_000, folder).notes[0]
        found.append(there)
    assert not found[0] & found[1]


def test_what_lies_there_without_an_index_is_kept(tmp_path: Path) -> None:
    source, out = container(tmp_path / "gen.safetensors"), tmp_path / "out"
    planned = plan(source, limit=10_000, output=out)
    out.mkdir()
    mine = out / planned.files[1].name
    mine.write_bytes(b"mine")
    again = made(source, 10_000, out)
    assert any("hash" in note for note in again.notes)
    assert mine.read_bytes() == b"mine"
    (back,) = join(out / "gen.safetensors.index.json", tmp_path / "back.safetensors")
    assert back.read_bytes() == source.read_bytes()


def test_an_old_index_cannot_make_us_delete(tmp_path: Path) -> None:
    source, out = container(tmp_path / "gen.safetensors"), tmp_path / "out"
    out.mkdir()
    (out / "precious.safetensors").write_bytes(b"x")
    part = parts.Part("precious.safetensors", 1, parts.integrity(b"x"))
    ours = {"version": 1, "file": "gen.safetensors", "bytes": 1, "parts": [part.as_json()]}
    (out / "gen.safetensors.index.json").write_bytes(parts.as_bytes({"shrink": ours}))
    made(source, 10_000, out, force=True)
    assert (out / "precious.safetensors").read_bytes() == b"x"


def test_a_source_that_changed_after_the_plan_is_refused(tmp_path: Path) -> None:
    source, out = container(tmp_path / "gen.safetensors"), tmp_path / "out"
    planned = plan(source, limit=10_000, output=out)
    container(source, seed=3)
    with pytest.raises(BadInput, match="changed"):
        planned.write(silent)
    assert not list(out.glob("*.index.json"))


_KILLED = """
import os, signal, sys
from pathlib import Path
from shrink.progress import silent
from shrink.split import plan

source, out, limit, force = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "force"
from shrink.split import shards  # what is imported late would count as an opened file
plan(source, limit=limit, output=out.with_name("warm")).write(silent)

def kill_at(step):
    left = step
    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out) in str(arguments):
            left -= 1
            if left <= 0:  # threads may come together here
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

step = 0
while True:
    step += 1
    copy = out.with_name(f"{out.name}-{step}")
    if out.exists():
        import shutil
        shutil.copytree(out, copy)
    child = os.fork()
    if not child:
        out = copy
        planned = plan(source, limit=limit, output=copy, force=force)
        kill_at(step)
        planned.write(silent)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    if status != signal.SIGKILL:
        sys.exit("the child failed by itself")
print(step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("has_old", [True, False])
def test_killed_at_any_step_the_old_or_the_new_joins(has_old: bool, tmp_path: Path) -> None:
    """SIGKILL before each file is opened, renamed or removed."""
    source, out = tmp_path / "gen.safetensors", tmp_path / "out"
    old = container(source, seed=1).read_bytes()
    if has_old:
        made(source, 16_000, out)
    new = container(source, seed=2).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, source, out, "15000", "force" if has_old else ""],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 10
    found = []
    for step in range(1, steps + 1):
        folder = tmp_path / f"out-{step}"
        index = folder / "gen.safetensors.index.json"
        if has_old or index.exists():
            (back,) = join(index, folder / "back")
            found.append(back.read_bytes())
            back.unlink()
        # And what was killed can be done again.
        made(source, 15_000, folder, force=has_old)
        (back,) = join(index, folder / "back")
        assert back.read_bytes() == new
    assert set(found) == ({old, new} if has_old else {new})


# The stored form


def test_version_1_is_read_as_it_always_was(tmp_path: Path) -> None:
    model = shrink.load(GOLDEN / "set" / "gen.safetensors.index.json")
    assert values(model) == values(shrink.load(GOLDEN / "gen.safetensors"))
    (back,) = join(GOLDEN / "set" / "gen.safetensors.index.json", tmp_path / "back.safetensors")
    assert back.read_bytes() == (GOLDEN / "gen.safetensors").read_bytes()


def test_version_1_is_written_as_it_always_was(tmp_path: Path) -> None:
    """Shards, one of them with chunks, and an index that is itself in parts."""
    made(GOLDEN / "gen.safetensors", 10_000, tmp_path)
    assert contents(tmp_path) == contents(GOLDEN / "set")
    assert {"gen-00002-of-00005.safetensors", "gen-index-00001-of-00002.json"} <= set(contents(tmp_path))


# What to split, and where to


def test_limits_that_are_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too small"):
        plan(container(tmp_path / "gen.safetensors"), limit=9_999)


def test_an_index_is_not_split_again(tmp_path: Path) -> None:
    made(container(tmp_path / "gen.safetensors"), 10_000, tmp_path)
    with pytest.raises(UsageError, match="join it first"):
        plan(tmp_path / "gen.safetensors.index.json", limit=10_000)


def test_indexes_of_any_kind_are_not_split(tmp_path: Path) -> None:
    for name, words in (("model.onnx.index.json", "join it first"), ("model.stages.json", "name the ONNX file")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UsageError, match=words):
            plan(tmp_path / name, limit=10_000)


def test_stages_are_not_joined(tmp_path: Path) -> None:
    (tmp_path / "model.stages.json").write_text("{}")
    with pytest.raises(UsageError, match="stages"):
        join(tmp_path / "model.stages.json")


@pytest.mark.parametrize("name", ["a\\b.safetensors", "a\nb.safetensors", "a\udc80.safetensors"])
def test_names_that_no_index_may_hold_are_refused(name: str, tmp_path: Path) -> None:
    shutil.copyfile(container(tmp_path / "gen.safetensors"), tmp_path / name)
    with pytest.raises(UsageError, match="rename"):
        plan(tmp_path / name, limit=10_000)


def test_malformed_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a":          }')
    with pytest.raises(BadInput, match="not a valid safetensors"):
        plan(tmp_path / "bad.safetensors", limit=10_000)
    with pytest.raises(OutputError, match="No such file"):
        plan(tmp_path / "gone.safetensors", limit=10_000)
    source = container(tmp_path / "gen.safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="not a folder"):
        plan(source, limit=10_000, output=tmp_path / "file")
    damaged = source.read_bytes().replace(b'\\"version\\":2', b'\\"version\\":1')
    source.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="damaged"):
        plan(source, limit=10_000)


def test_a_file_within_the_limit_says_so(tmp_path: Path) -> None:
    planned = made(container(tmp_path / "gen.safetensors"), 10_000_000, tmp_path)
    assert any("within the limit already" in note for note in planned.notes)
    assert len(planned.files) == 2


def test_joining_writes_where_nothing_is_lost(tmp_path: Path) -> None:
    source = container(tmp_path / "gen.safetensors")
    data = source.read_bytes()
    made(source, 10_000, tmp_path)
    index = tmp_path / "gen.safetensors.index.json"
    with pytest.raises(UsageError, match="exists already"):
        join(index)
    for own in (index, tmp_path / sorted(sizes(tmp_path))[0]):
        before = own.read_bytes()
        with pytest.raises(UsageError, match="made of"):
            join(index, own, force=True)
        assert own.read_bytes() == before
    assert shrink.join(str(index), force=True) == (source,)
    (tmp_path / "elsewhere").mkdir()
    assert join(index, tmp_path / "elsewhere") == (tmp_path / "elsewhere" / "gen.safetensors",)
    assert source.read_bytes() == data


def test_the_one_model_of_a_folder_is_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model here"):
        the_model_in(tmp_path)
    source = container(tmp_path / "gen.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "folder").mkdir()
    assert the_model_in(tmp_path) == source
    made(source, 10_000, tmp_path)
    assert the_model_in(tmp_path) == source
    other = chainer_npz.make(tmp_path)
    with pytest.raises(UsageError, match=r"2 models: .*gen\.safetensors"):
        the_model_in(tmp_path)
    other.unlink()
    source.unlink()
    with pytest.raises(UsageError, match=r"no model here.*gen\.safetensors\.index\.json is split already"):
        the_model_in(tmp_path)


def test_what_splits_of_onnx_files_left_is_no_model(tmp_path: Path) -> None:
    model = onnx.make(tmp_path)
    for name in ("net.split.onnx", "net-stage-1-of-1.onnx", "of-others.onnx"):
        shutil.copyfile(model, tmp_path / name)
    ours = {"version": 1, "file": model.name, "graph": "net.split.onnx", "parts": [{"file": "net-00001-of-00001.data"}]}
    (tmp_path / "net.onnx.index.json").write_text(json.dumps({"shrink": ours}))
    stages = {"shrink": {"version": 1, "file": model.name}, "stages": [{"file": "net-stage-1-of-1.onnx", "data": [5]}]}
    (tmp_path / "net.stages.json").write_text(json.dumps(stages))
    (tmp_path / "odd.index.json").write_text("[" * 5000)
    with pytest.raises(UsageError, match=f"2 models: .*{model.name}"):
        the_model_in(tmp_path)
    (tmp_path / "of-others.onnx").unlink()
    assert the_model_in(tmp_path) == model


def test_a_split_web_folder_is_joined_in_place(tmp_path: Path) -> None:
    folder = webdnn.make(tmp_path)
    weights = next(folder.glob("weight_*.bin"))
    weights.write_bytes(weights.read_bytes() + bytes(25_000))
    before = contents(folder)
    plan(folder, limit=10_000).write(silent)
    assert not weights.exists()
    assert the_model_in(folder) == folder
    assert join(folder) == (folder,)
    assert contents(folder) == before


def test_a_folder_that_is_a_model_is_found(tmp_path: Path) -> None:
    folder = webdnn.make(tmp_path)
    assert the_model_in(folder) == folder
    assert the_model_in(folder.parent) == folder
    model = onnx.make(tmp_path / "..")
    model.rename(tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="2 models"):
        the_model_in(tmp_path)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "manifest.json").write_text('{"shrink": 1, "files": {}}')
    assert the_model_in(tmp_path / "page") == tmp_path / "page"


def test_a_folder_is_split_in_place(tmp_path: Path) -> None:
    folder = webdnn.make(tmp_path)
    with pytest.raises(UsageError, match="in place"):
        plan(folder, limit=10_000, output=tmp_path / "out")
    with pytest.raises(UsageError, match="in place"):
        join(folder, tmp_path / "out")
