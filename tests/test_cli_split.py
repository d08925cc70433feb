"""`shrink split`, `shrink join` and `shrink hosts` as a user meets them: outputs, streams, exit codes, files."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.command import Outcome, run
from tests.samples import webdnn as sample

rng = np.random.default_rng(5)
TENSORS = {
    "l1/W": rng.standard_normal((200, 250)).astype("f4"),
    "l1/b": rng.standard_normal(200).astype("f4"),
    "l2/W": rng.standard_normal((100, 200)).astype("f4"),
}
BYTES = sum(array.nbytes for array in TENSORS.values())


@pytest.fixture
def gen(tmp_path: Path) -> Path:
    path = tmp_path / "gen.safetensors"
    save_file(TENSORS, path)
    return path


def child(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    outcome: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "shrink", *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )
    return outcome


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def fails(outcome: Outcome, code: int, *words: str) -> None:
    """One line that says why, on stderr alone."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("shrink: error: ")
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_split_and_join_give_the_same_bytes(gen: Path, tmp_path: Path) -> None:
    original = gen.read_bytes()
    outcome = run("split", gen, "--max-mb", "0.1")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    index = tmp_path / "gen.safetensors.index.json"
    shards = sorted(tmp_path.glob("gen-0000*.safetensors"))
    assert len(shards) == 3
    assert all(file.stat().st_size <= 100_000 for file in [*shards, index])
    assert gen.read_bytes() == original
    table = outcome.stdout
    assert all(f"{file.name} " in table and f" {file.stat().st_size:,} " in table for file in [*shards, index])
    assert "4 files, the largest" in table
    assert "limit 0.1 MB" in table
    assert f"shrink join {index}" in table
    gen.unlink()
    joined = run("join", index, "-o", tmp_path / "back.safetensors")
    assert joined.code == 0, joined.stderr
    assert "back.safetensors" in joined.stdout
    assert (tmp_path / "back.safetensors").read_bytes() == original


def test_join_writes_the_old_name_and_not_over_a_file(gen: Path, tmp_path: Path) -> None:
    original = gen.read_bytes()
    assert run("split", gen, "--max-mb", "0.1").code == 0
    index = tmp_path / "gen.safetensors.index.json"
    gen.write_bytes(b"another file")
    fails(run("join", index), 2, "gen.safetensors", "exists already", "--force")
    assert gen.read_bytes() == b"another file"
    assert run("join", index, "--force").code == 0
    assert gen.read_bytes() == original


def test_a_dry_run_says_the_same_and_writes_nothing(gen: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    planned = json.loads(run("split", gen, "--max-mb", "0.1", "--dry-run", "--json").stdout)
    assert "--dry-run" in run("split", gen, "--max-mb", "0.1", "--dry-run").stdout
    assert contents(tmp_path) == before
    written = json.loads(run("split", gen, "--max-mb", "0.1", "--json").stdout)
    assert planned.pop("dry_run") is True
    assert written.pop("dry_run") is False
    assert planned == written
    assert {f["file"]: f["bytes"] for f in written["files"]} == {
        name: len(data) for name, data in contents(tmp_path).items() if name not in before
    }
    assert all(f["holds"] for f in written["files"])
    assert written["limit_bytes"] == 100_000
    assert written["largest_bytes"] == max(f["bytes"] for f in written["files"]) <= 100_000


def test_mb_and_mib_are_not_the_same(gen: Path) -> None:
    def limit(*arguments: object) -> int:
        return int(json.loads(run("split", gen, *arguments, "--dry-run", "--json").stdout)["limit_bytes"])

    assert limit("--max-mb", "0.25") == 250_000
    assert limit("--max-mib", "0.25") == 1 << 18
    assert limit("--max-mb", "0.01") == 10_000
    assert limit("--max-mb", "0.0123456789") == 12_345
    assert limit("--max-mb", "8.2") == 8_200_000
    assert limit("--host", "cloudflare-pages") == 25 << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--max-mb", "--max-mib", "--host"]),
        (["--max-mb", "1", "--max-mib", "1"], ["give one of"]),
        (["--max-mb", "1", "--host", "github"], ["give one of"]),
        (["--max-mb", "0.0099"], ["too small", "0.01"]),
        (["--max-mib", "0.0095"], ["too small"]),
        (["--max-mb", "0"], ["too small"]),
        (["--max-mb", "-20"], ["too small"]),
        (["--max-mb", "nan"], ["--max-mb nan"]),
        (["--max-mb", "inf"], ["--max-mb inf"]),
        (["--max-mb", "many"], ["many"]),
        (["--host", "geocities"], ["geocities", "cloudflare-pages"]),
        (["--host", "npm"], ["npm", "publishes no limit", "--max-mb"]),
        (["--max-mb", "1", "--input", "1,2"], ["--input", "--cut"]),
        (["--max-mb", "0.1", "--cut"], ["--cut", "ONNX"]),
    ],
)
def test_a_request_without_sense_is_refused(gen: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    before = contents(tmp_path)
    fails(run("split", gen, *arguments), 2, *words)
    assert contents(tmp_path) == before


def test_what_is_there_stays_unless_forced(gen: Path, tmp_path: Path) -> None:
    assert run("split", gen, "--max-mb", "0.1").code == 0
    before = contents(tmp_path)
    fails(run("split", gen, "--max-mb", "0.05"), 2, "exists already", "--force")
    assert contents(tmp_path) == before
    assert run("split", gen, "--max-mb", "0.1").code == 0, "the very same split"
    assert contents(tmp_path) == before
    assert run("split", gen, "--max-mb", "0.05", "--force").code == 0
    index = tmp_path / "gen.safetensors.index.json"
    assert run("join", index, "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == gen.read_bytes()


def test_another_folder_is_made(gen: Path, tmp_path: Path) -> None:
    outcome = run("split", gen, "--max-mb", "0.1", "-o", tmp_path / "web")
    assert outcome.code == 0, outcome.stderr
    assert "gen.safetensors.index.json" in contents(tmp_path / "web")
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["gen.safetensors"]


def test_the_one_model_here_needs_no_name(gen: Path, tmp_path: Path) -> None:
    outcome = child("split", "--max-mb", "0.1", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "gen.safetensors.index.json").exists()
    assert "shrink join gen.safetensors.index.json" in outcome.stdout


def test_several_models_here_are_listed(gen: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "disc.npz", **TENSORS)  # type: ignore[arg-type]
    outcome = child("split", "--max-mb", "0.1", cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "disc.npz" in outcome.stderr
    assert "gen.safetensors" in outcome.stderr
    assert sorted(contents(tmp_path)) == ["disc.npz", "gen.safetensors"]


def test_no_model_here_is_said(tmp_path: Path) -> None:
    outcome = child("split", "--max-mb", "0.1", cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith("shrink: error: ")


def test_a_file_within_the_limit_is_left_alone(gen: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    outcome = run("split", gen, "--max-mb", "20")
    assert outcome.code == 0
    assert "fits already" in outcome.stdout
    assert contents(tmp_path) == before
    result = json.loads(run("split", gen, "--max-mb", "20", "--json").stdout)
    assert result["files"] == []
    assert "fits already" in result["notes"][0]


@pytest.mark.parametrize(
    "name", ["生成器.safetensors", "生成\u3000器.safetensors", "ge n'\"(1).safetensors", "ğ.eightbit.safetensors"]
)
def test_names_are_of_any_letters(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    outcome = run("split", tmp_path / name, "--max-mb", "0.1")
    assert outcome.code == 0, outcome.stderr
    (said,) = [line for line in outcome.stdout.splitlines() if "shrink join" in line]
    original = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    # What it tells the user to type is what works.
    typed = shlex.split(said.partition("shrink ")[2])
    assert run(*typed).code == 0
    assert (tmp_path / name).read_bytes() == original


def test_a_name_that_would_garble_a_terminal_is_refused_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "gen\n\u202enew.safetensors"
    save_file(TENSORS, path)
    outcome = run("split", path, "--max-mb", "0.1")
    fails(outcome, 2, "rename it")
    assert "\u202e" not in outcome.stderr
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_name_like_an_option_is_typed_with_its_folder(gen: Path, tmp_path: Path) -> None:
    gen.rename(tmp_path / "-o.safetensors")
    outcome = child("split", "./-o.safetensors", "--max-mb", "0.1", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    (said,) = [line for line in outcome.stdout.splitlines() if "shrink join" in line]
    original = (tmp_path / "-o.safetensors").read_bytes()
    (tmp_path / "-o.safetensors").unlink()
    joined = child(*shlex.split(said.partition("shrink ")[2]), cwd=tmp_path)
    assert joined.returncode == 0, joined.stderr
    assert (tmp_path / "-o.safetensors").read_bytes() == original


def test_names_that_are_too_long_are_one_clear_line(gen: Path, tmp_path: Path) -> None:
    longest = gen.rename(tmp_path / f"{'x' * 243}.safetensors")
    before = contents(tmp_path)
    fails(run("split", longest, "--max-mb", "0.1"), 5, f"error: {tmp_path}/xxx", ": File name too long\n")
    fails(run("split", longest, "--max-mb", "0.1", "--dry-run"), 5, f"error: {tmp_path}/xxx", ": File name too long\n")
    fails(
        run("split", tmp_path / ("x" * 300), "--max-mb", "0.1"), 5, f"error: {tmp_path}/xxx", ": File name too long\n"
    )
    fails(run("join", tmp_path / ("x" * 300)), 5, f"error: {tmp_path}/xxx", ": File name too long\n")
    fails(
        run("split", longest, "--max-mb", "0.1", "-o", tmp_path / ("y" * 300)),
        5,
        f"error: {tmp_path}/yyy",
        ": File name too long\n",
    )
    assert contents(tmp_path) == before
    network = _network(tmp_path).rename(tmp_path / f"{'z' * 250}.onnx")
    fails(run("split", network, "--max-mb", "1.8", "--cut"), 5, f"error: {tmp_path}/zzz", ": File name too long\n")
    fails(run("split", network, "--max-mb", "1.8"), 5, f"error: {tmp_path}/zzz", ": File name too long\n")
    index = tmp_path / "gen.index.json"
    part = {"file": "p", "bytes": 1, "integrity": "sha256-" + "A" * 43 + "="}
    # As long as a name may be in letters, but not in bytes.
    index.write_text(json.dumps({"shrink": {"version": 1, "file": "名" * 200, "bytes": 1, "parts": [part]}}))
    fails(run("join", index), 5, f"error: {tmp_path}/名名名", ": File name too long\n")


def test_what_is_no_file_is_not_joined(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.index.json")
    for path in (tmp_path / "pipe.index.json", Path(os.devnull)):
        # Whoever opens a pipe waits until somebody writes.
        outcome = child("join", path, timeout=30)
        fails(Outcome(outcome.returncode, outcome.stdout, outcome.stderr), 3, path.name, "not a file")


def test_an_index_whose_names_would_garble_a_terminal_is_refused(gen: Path, tmp_path: Path) -> None:
    assert run("split", gen, "--max-mb", "0.1").code == 0
    index = tmp_path / "gen.safetensors.index.json"
    said = json.loads(index.read_text())
    for name in ("\x1b[2Jgen", "gen\nnew", "\udc80"):
        said["shrink"]["file"] = name
        index.write_text(json.dumps(said))
        before = contents(tmp_path)
        fails(run("join", index), 3, "gen.safetensors.index.json")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["npz", "onnx", "cut"])
def test_a_dry_run_does_not_touch_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import onnx

    system, folder = tmp_path / "system", tmp_path / "folder"
    system.mkdir()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    if kind == "npz":
        np.savez(folder / "model.npz", **TENSORS)  # type: ignore[arg-type]
    else:
        onnx.save(
            onnx.load(_network(folder)), folder / "model.onnx", save_as_external_data=kind == "onnx", location="w"
        )
    source = next(f for f in folder.iterdir() if f.stem == "model")
    # Whatever is made in a folder, and be it gone again, is seen by the time of its last change.
    os.utime(folder, ns=(0, 0))
    limit = ["--max-mb", "0.1"] if kind == "npz" else ["--max-mb", "1.8"]
    outcome = run("split", source, *limit, "--dry-run", *(["--cut"] if kind == "cut" else []))
    assert outcome.code == 0, outcome.stderr
    assert folder.stat().st_mtime_ns == 0
    assert list(system.iterdir()) == []


def test_npz_goes_by_way_of_the_container_and_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "gen.npz", **TENSORS)  # type: ignore[arg-type]
    outcome = run("split", tmp_path / "gen.npz", "--max-mb", "0.1")
    assert outcome.code == 0, outcome.stderr
    assert "gen.safetensors" in outcome.stdout
    assert run("join", tmp_path / "gen.safetensors.index.json").code == 0
    assert run("compare", tmp_path / "gen.npz", tmp_path / "gen.safetensors").code == 0


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), ["missing"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), ["shorter"]),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), ["longer"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])), ["SHA-256"]),
    ],
)
def test_a_harmed_part_is_named(gen: Path, tmp_path: Path, harm: Any, words: list[str]) -> None:
    assert run("split", gen, "--max-mb", "0.1").code == 0
    harm(tmp_path / "gen-00002-of-00003.safetensors")
    before = contents(tmp_path)
    outcome = run("join", tmp_path / "gen.safetensors.index.json", "-o", tmp_path / "back.safetensors")
    fails(outcome, 3, "gen-00002-of-00003.safetensors", *words)
    assert contents(tmp_path) == before


def test_what_is_no_model_or_index_is_an_error(gen: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 200_000)
    fails(run("split", tmp_path / "bad.safetensors", "--max-mb", "0.1"), 3, "bad.safetensors")
    fails(run("split", tmp_path / "absent.npz", "--max-mb", "0.1"), 5, "absent.npz")
    fails(run("join", tmp_path / "absent.json"), 5, "absent.json")
    (tmp_path / "bad.index.json").write_text("{")
    fails(run("join", tmp_path / "bad.index.json"), 3, "bad.index.json")
    (tmp_path / "far.index.json").write_text(
        json.dumps({"shrink": {"version": 1, "file": "../gen", "bytes": 1, "parts": []}})
    )
    fails(run("join", tmp_path / "far.index.json"), 3, "far.index.json")


def test_where_nothing_can_be_written_is_an_error(gen: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    fails(run("split", gen, "--max-mb", "0.1", "-o", tmp_path / "file"), 5, "file")
    assert (tmp_path / "file").read_text() == "no folder"


def test_warnings_of_a_host_are_for_stderr(gen: Path) -> None:
    outcome = run("split", gen, "--host", "github-releases", "--json")
    assert outcome.code == 0
    assert outcome.stderr == (
        "shrink: warning: GitHub Releases sends no CORS headers, so no page can fetch these files\n"
    )
    assert json.loads(outcome.stdout)["limit_bytes"] == (2 << 30) - 1
    # Headers matter to the page, not to a file of weights.
    assert run("split", gen, "--host", "github-pages").stderr == ""


def test_the_bar_is_for_a_terminal_only(gen: Path, tmp_path: Path) -> None:
    assert child("split", gen, "--max-mb", "0.1").stderr == ""
    assert child("join", tmp_path / "gen.safetensors.index.json", "-o", tmp_path / "back").stderr == ""
    assert _on_a_terminal("split", gen, "--max-mb", "0.1", "-o", tmp_path / "web").count("splitting")
    index = tmp_path / "web" / "gen.safetensors.index.json"
    assert _on_a_terminal("join", index, "-o", tmp_path / "back2").count("joining")


def _on_a_terminal(*arguments: object) -> str:
    """What a terminal shows of stderr."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shrink", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 4096):
                seen += block
        except OSError:  # how Linux ends a terminal that nobody holds any more
            pass
        assert process.wait() == 0
    os.close(ours)
    return seen.decode()


def test_hosts_is_a_table_with_sources() -> None:
    outcome = run("hosts")
    assert outcome.code == 0
    assert "25 MiB" in outcome.stdout
    assert "not published" in outcome.stdout
    assert "https://developers.cloudflare.com/pages/platform/limits/" in outcome.stdout
    assert "2026-" in outcome.stdout
    table = json.loads(run("hosts", "--json").stdout)["hosts"]
    assert table["cloudflare-pages"]["file_bytes"] == 25 << 20
    assert table["npm"]["file_bytes"] is None
    for row in table.values():
        assert row["sources"]
        assert row["read"]


def test_hosts_can_be_written_to_a_file(tmp_path: Path) -> None:
    target = tmp_path / "hosts.json"
    assert run("hosts", "--json", "-o", target).code == 0
    assert json.loads(target.read_text())["hosts"]
    fails(run("hosts", "-o", target), 2, "exists already", "--force")
    assert run("hosts", "-o", target, "--force").code == 0
    assert "25 MiB" in target.read_text()


def test_shards_are_safetensors_for_any_reader(gen: Path, tmp_path: Path) -> None:
    assert run("split", gen, "--max-mb", "0.1").code == 0
    index = json.loads((tmp_path / "gen.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    # The bias is small enough to lie in one shard, under its own name.
    bias = load_file(tmp_path / index["weight_map"]["l1/b"])["l1/b"]
    assert np.array_equal(bias, TENSORS["l1/b"])


PACKAGE = Path(__file__).parent / "node_modules" / "onnxruntime-web"


def _network(folder: Path) -> Path:
    """A network of two weights, of 1.6 and 0.4 MB, as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {"V": (500, 800), "W": (800, 125)}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "V"], ["h"]), helper.make_node("MatMul", ["h", "W"], ["y"])],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 500])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 125])],
        [numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """An exported page, its runtime of some MB included."""
    if not (PACKAGE / "package.json").is_file():
        pytest.skip("onnxruntime-web is not installed: run `npm ci` in tests/")
    model = _network(tmp_path)
    folder = tmp_path / "site"
    exported = run("export", model, "--to", "onnxruntime-web", "--runtime", PACKAGE, "-o", folder)
    assert exported.code == 0, exported.stderr
    return folder


def test_a_page_is_split_in_place(page: Path) -> None:
    before = contents(page)
    planned = run("split", page, "--max-mb", "1", "--dry-run")
    assert planned.code == 0, planned.stderr
    assert contents(page) == before
    outcome = run("split", page, "--max-mb", "1")
    assert outcome.code == 0, outcome.stderr
    after = contents(page)
    assert max(map(len, before.values())) > 1_000_000 >= max(map(len, after.values()))
    assert str(page) in outcome.stdout
    again = run("split", page, "--max-mb", "1")
    assert again.code == 0
    assert "fits already" in again.stdout
    assert contents(page) == after
    joined = run("join", page)
    assert joined.code == 0, joined.stderr
    assert {name: data for name, data in contents(page).items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


def test_a_limit_that_a_page_cannot_meet_names_the_one_that_it_can(page: Path) -> None:
    before = contents(page)
    outcome = run("split", page, "--max-mb", "0.011")
    fails(outcome, 4, "smallest limit")
    assert contents(page) == before


def test_a_page_hears_what_its_host_cannot_do(page: Path) -> None:
    outcome = run("split", page, "--host", "github-pages", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == (
        "shrink: warning: GitHub Pages sets no COOP and COEP headers, so WebAssembly runs on one thread\n"
    )
    assert run("split", page, "--host", "cloudflare-pages", "--dry-run").stderr == ""


def test_a_host_that_takes_fewer_files_than_there_are_is_warned_of(page: Path) -> None:
    for number in range(1001):
        (page / f"{number}.txt").write_text("")
    outcome = run("split", page, "--host", "itch", "--dry-run")
    assert outcome.code == 0
    assert "itch.io, HTML5 takes 1,000 files, these are 1,0" in outcome.stderr


def test_onnx_is_split_into_a_graph_and_data(tmp_path: Path) -> None:
    path = _network(tmp_path)
    original = path.read_bytes()
    outcome = run("split", path, "--max-mb", "0.6")
    assert outcome.code == 0, outcome.stderr
    written = contents(tmp_path)
    assert written.pop("model.onnx") == original
    assert {"model.split.onnx", "model.onnx.index.json"} <= written.keys()
    assert max(map(len, written.values())) <= 600_000
    assert run("join", tmp_path / "model.onnx.index.json", "-o", tmp_path / "back.onnx").code == 0
    assert (tmp_path / "back.onnx").read_bytes() == original


def test_onnx_with_weights_elsewhere_fits_only_with_them(tmp_path: Path) -> None:
    import onnx

    path = _network(tmp_path)
    assert f"fits already: {path.stat().st_size:,} bytes" in run("split", path, "--max-mb", "2.1").stdout
    (tmp_path / "apart").mkdir()
    apart = tmp_path / "apart" / "model.onnx"
    onnx.save(onnx.load(path), apart, save_as_external_data=True, location="weights.bin")
    assert apart.stat().st_size < 10_000
    size = apart.stat().st_size + (tmp_path / "apart" / "weights.bin").stat().st_size
    assert f"fits already: {size:,} bytes" in run("split", apart, "--max-mb", "2.1").stdout
    outcome = run("split", apart, "--max-mb", "1")
    assert outcome.code == 0, outcome.stderr
    assert "external data" in outcome.stdout
    assert (tmp_path / "apart" / "model.onnx.index.json").exists()


def test_a_network_is_cut_into_stages(tmp_path: Path) -> None:
    path = _network(tmp_path)
    before = contents(tmp_path)
    planned = run("split", path, "--max-mb", "1.8", "--cut", "--dry-run", "--json")
    assert planned.code == 0, planned.stderr
    assert contents(tmp_path) == before
    outcome = run("split", path, "--max-mb", "1.8", "--cut", "--input", "x=1,500")
    assert outcome.code == 0, outcome.stderr
    written = {name: data for name, data in contents(tmp_path).items() if name not in before}
    assert written.keys() == {"model-stage-1-of-2.onnx", "model-stage-2-of-2.onnx", "model.stages.json"}
    assert max(map(len, written.values())) <= 1_800_000
    assert {f["file"]: f["bytes"] for f in json.loads(planned.stdout)["files"]} == {
        name: len(data) for name, data in written.items()
    }
    assert "2 stages" in outcome.stdout
    assert "shrink join" not in outcome.stdout
    fails(run("split", path, "--max-mb", "1.8", "--cut", "--input", "1,501"), 2, "--input 1,501")
    fails(run("split", path, "--max-mb", "1.8", "--cut", "--input", "moon=1,2"), 2, "moon")


def test_a_webdnn_folder_is_split_and_joined_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "webdnn"
    folder.mkdir()
    codes = rng.integers(1, 255, 40_000).astype("u1")
    sample.put_backend(folder, "webassembly", sample.graph({"W": (0, 40_000)}), sample.records([(codes, 1.0)]))
    before = contents(folder)
    outcome = run("split", folder, "--max-mb", "0.02")
    assert outcome.code == 0, outcome.stderr
    after = contents(folder)
    assert max(map(len, before.values())) > 20_000 >= max(map(len, after.values()))
    assert "split.js" in outcome.stdout
    assert str(folder) in outcome.stdout
    joined = run("join", folder)
    assert joined.code == 0, joined.stderr
    assert contents(folder) == before
