"""The command as a user meets it: outputs, streams, exit codes, and what is left on disk."""

from __future__ import annotations

import json
import math
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shrink
from shrink.cli import command
from tests.command import run

rng = np.random.default_rng(2)
CONV = (rng.standard_normal((32, 16, 3, 3)) * 0.05).astype("f4")
DENSE = (rng.standard_normal((100, 80)) * 0.1).astype("f4")
BIAS = rng.standard_normal(32).astype("f4")


def savez(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


@pytest.fixture
def gen(tmp_path: Path) -> Path:
    path = tmp_path / "gen.npz"
    savez(path, **{"c/W": CONV, "c/b": BIAS, "l/W": DENSE, "bn/avg_var": np.ones(32, "f4"), "bn/N": 7})
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot_iter_1000.npz"
    arrays = {"updater/model:main/c/W": CONV, "updater/model:main/c/b": BIAS, "updater/iteration": np.array(1000)}
    arrays |= {"updater/optimizer:main/c/W/m": CONV, "updater/optimizer:main/c/W/v": CONV**2}
    savez(path, **arrays)
    return path


def child(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    outcome: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "shrink", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    return outcome


def test_every_command_has_help_with_an_example() -> None:
    assert run("--help").code == 0
    for name in command.commands:
        outcome = run(name, "--help")
        assert outcome.code == 0
        assert f"shrink {name} " in outcome.stdout
        assert "Example" in outcome.stdout
        if name != "serve":  # which writes nothing
            assert "--json" in outcome.stdout
            assert "-o" in outcome.stdout


def test_the_module_is_the_command(gen: Path) -> None:
    outcome = child("inspect", gen)
    assert outcome.returncode == 0
    assert "c/W" in outcome.stdout
    assert outcome.stderr == ""


def test_quantize_restore_compare(gen: Path, tmp_path: Path) -> None:
    first = run("quantize", gen, "--mode", "eightbit")
    assert first.code == 0, first.stderr
    assert "eightbit" in first.stdout
    small = tmp_path / "gen.eightbit.safetensors"
    assert small.stat().st_size < gen.stat().st_size / 3
    assert run("restore", small, "-o", tmp_path / "back.npz").code == 0
    back = np.load(tmp_path / "back.npz")
    assert sorted(back) == sorted(np.load(gen))
    assert back["c/W"].dtype == np.float32
    assert np.array_equal(back["c/b"], BIAS)
    assert back["bn/N"] == 7
    compared = run("compare", gen, small)
    rows = [line.split()[0] for line in compared.stdout.splitlines()[2:7]]
    assert set(rows[:2]) == {"c/W", "l/W"}
    assert run("compare", gen, tmp_path / "back.npz").stdout.splitlines()[2:7] == compared.stdout.splitlines()[2:7]


def test_float16_npz_is_an_ordinary_npz(gen: Path, tmp_path: Path) -> None:
    assert run("quantize", gen, "--mode", "float16", "-o", tmp_path / "half.npz").code == 0
    half = np.load(tmp_path / "half.npz")
    assert half["c/W"].dtype == np.float16
    assert np.array_equal(half["c/W"], CONV.astype("f2"))
    assert half["c/b"].dtype == np.float32


def test_json_says_what_the_table_says(gen: Path) -> None:
    result = json.loads(run("quantize", gen, "--mode", "int8", "--json").stdout)
    assert result["output"].endswith("gen.int8.safetensors")
    assert result["output_bytes"] == Path(result["output"]).stat().st_size
    by_name = {t["name"]: t for t in result["tensors"]}
    assert by_name["c/W"]["mode"] == "int8"
    assert by_name["c/b"]["mode"] == "kept"
    assert by_name["c/b"]["note"]
    decoded = shrink.load(result["output"])["c/W"].array
    error = decoded.astype(np.float64) - CONV
    assert by_name["c/W"]["max_error"] == pytest.approx(np.abs(error).max())
    assert by_name["c/W"]["rmse"] == pytest.approx(math.sqrt((error**2).mean()))
    expected = 10 * math.log10((CONV.astype(float) ** 2).sum() / (error**2).sum())
    assert by_name["c/W"]["sqnr_db"] == pytest.approx(expected)
    for arguments in (["inspect", gen], ["compare", gen, gen]):
        assert json.loads(run(*arguments, "--json").stdout)["tensors"]


def test_inspect_tells_what_is_in_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    savez(path, half=np.tile(np.array([0, 1], "f4"), 512), bad=np.array([np.nan, 2, -np.inf, 0], "f4"), n=np.array(4))
    facts = {t["name"]: t for t in json.loads(run("inspect", path, "--json").stdout)["tensors"]}
    assert facts["half"]["sparsity"] == 0.5
    assert facts["half"]["entropy_bits"] == 1.0
    assert facts["half"]["stored_bytes"] == 4096
    assert (facts["bad"]["nonfinite"], facts["bad"]["smallest"], facts["bad"]["largest"]) == (2, 0.0, 2.0)
    assert facts["n"]["shape"] == []


def test_trainer_snapshots_lose_their_optimizer(trainer: Path, tmp_path: Path) -> None:
    inspected = run("inspect", trainer)
    assert "training state" in inspected.stdout
    outcome = run("quantize", trainer, "--mode", "float16", "-o", tmp_path / "gen.npz")
    assert "Dropped" in outcome.stdout
    assert sorted(np.load(tmp_path / "gen.npz")) == ["c/W", "c/b"]
    assert run("compare", trainer, tmp_path / "gen.npz").stdout.count("only in") == 0
    assert run("quantize", trainer, "--mode", "float16", "--keep-all", "-o", tmp_path / "all.npz").code == 0
    everything = np.load(tmp_path / "all.npz")
    assert sorted(everything) == sorted(np.load(trainer))
    assert everything["updater/optimizer:main/c/W/m"].dtype == np.float32
    assert everything["updater/model:main/c/W"].dtype == np.float16


def test_include_exclude_and_recipe_choose_tensors(gen: Path, tmp_path: Path) -> None:
    def modes(*flags: object) -> dict[str, str]:
        outcome = run("quantize", gen, "--json", "--force", "-o", tmp_path / "out.safetensors", *flags)
        assert outcome.code == 0, outcome.stderr
        return {t["name"]: t["mode"] for t in json.loads(outcome.stdout)["tensors"]}

    kept = {"c/W": "kept", "c/b": "kept", "l/W": "kept", "bn/avg_var": "kept", "bn/N": "kept"}
    assert modes("--mode", "int8") == kept | {"c/W": "int8", "l/W": "int8"}
    assert modes("--mode", "int8", "--exclude", "c/*") == kept | {"l/W": "int8"}
    assert modes("--mode", "int8", "--include", "c/?") == kept | {"c/W": "int8", "c/b": "int8"}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'mode = "eightbit"\n[[rule]]\ntensors = "l/*"\nmode = "prune,int8"\nsparsity = 0.8\n'
        '[[rule]]\ntensors = ["c/b"]\nmode = "keep"\n'
    )
    assert modes("--recipe", recipe) == kept | {"c/W": "eightbit", "l/W": "int8"}
    assert np.count_nonzero(shrink.load(tmp_path / "out.safetensors")["l/W"].array == 0) >= 0.8 * DENSE.size
    assert modes("--recipe", recipe, "--mode", "float16")["c/W"] == "float16"


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        ([], ["--mode"], 2),
        (["--mode", "ninebit"], ["ninebit", "eightbit"], 2),
        (["--mode", "int8,"], ["no mode"], 2),
        (["--mode", "int8", "--sparsity", "0.5"], ["sparsity"], 2),
        (["--mode", "prune", "--sparsity", "7"], ["sparsity"], 2),
        (["--mode", "prune", "--sparsity", "many"], ["many"], 2),
        (["--mode", "int8", "--include", "c/*", "--exclude", "*/W"], ["--include c/*", "--exclude */W", "c/W"], 2),
        (["--mode", "int8", "--exclude", "nothing*"], ["nothing*", "inspect"], 2),
        (["--include", "c/*"], ["--mode"], 2),
        (["--mode", "int8", "-o", "out.npz"], ["chainer-npz", "int8"], 2),
        (["--mode", "int8", "-o", "out.docx"], [".docx", ".npz"], 2),
        (["--mode", "int8", "-o", "folder"], ["folder"], 2),
        (["--mode", "float16", "-o", "gen.npz"], ["model itself"], 2),
        (["--mode", "float16", "-o", "gen.npz", "--force"], ["model itself"], 2),
        (["--mode", "int8", "-o", "there.safetensors"], ["exists", "--force"], 2),
        (["--mode", "int8", "-o", "no/such/x.safetensors"], ["folder does not exist"], 5),
        (["--mode", "int8", "--recipe", "gone.toml"], ["gone.toml"], 5),
        (["--recipe", "bad.toml"], ["bad.toml", "TOML"], 3),
        (["--recipe", "odd.toml"], ["odd.toml", "colour"], 3),
        (["--recipe", "prune.toml", "--sparsity", "0.9"], ["sparsity", "--mode"], 2),
        (["--mode", "int8,prune", "--scope", "global"], ["prune,int8"], 2),
        (["--mode", "int8", "--block", "99999999999999"], ["block"], 2),
        (["--recipe", "two.toml"], ["rule 1", "rule 2", "c/W"], 2),
        (["--mode", "int8", "--colour"], ["--colour"], 2),
    ],
)
def test_requests_that_make_no_sense(
    gen: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: list[str], code: int
) -> None:
    monkeypatch.chdir(gen.parent)
    Path("there.safetensors").write_bytes(b"old")
    Path("bad.toml").write_text("mode = ")
    Path("odd.toml").write_text('[[rule]]\ntensors = "*"\nmode = "int8"\ncolour = 3\n')
    Path("prune.toml").write_text('mode = "prune"\n')
    Path("two.toml").write_text(
        '[[rule]]\ntensors = "c/*"\nmode = "int8"\n[[rule]]\ntensors = "*/W"\nmode = "eightbit"\n'
    )
    before = {p: p.read_bytes() for p in Path().iterdir()}
    outcome = run("quantize", gen, *flags)
    assert outcome.code == code, outcome
    assert outcome.stderr.startswith("shrink: error: ")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.stderr
    assert {p: p.read_bytes() for p in Path().iterdir()} == before


@pytest.mark.parametrize("mode", ["float16", "eightbit", "int8", "int4", "prune", "prune,eightbit"])
@pytest.mark.parametrize(("name", "value"), [("c/W", np.nan), ("c/b", np.inf)])
def test_non_finite_weights_are_refused_in_every_mode(mode: str, name: str, value: float, tmp_path: Path) -> None:
    arrays = {"c/W": CONV.copy(), "c/b": BIAS.copy()}
    arrays[name].flat[[3, 5]] = value
    savez(tmp_path / "m.npz", **arrays)
    outcome = run("quantize", tmp_path / "m.npz", "--mode", mode)
    assert outcome.code == 3
    assert f"tensor {name}: 2 of " in outcome.stderr
    assert "m.npz" in outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def test_names_from_a_file_are_printed_harmlessly(tmp_path: Path) -> None:
    name = "x\u202egnp.W<script>"
    savez(tmp_path / "m.npz", **{name: CONV})
    outcome = run("inspect", tmp_path / "m.npz")
    assert outcome.code == 0
    assert "\u202e" not in outcome.stdout
    assert "\\u202e" in outcome.stdout


def test_globally_pruned_weights_share_one_threshold(gen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert run("quantize", gen, "--mode", "prune", "--sparsity", "0.7", "--scope", "global", "-o", out).code == 0
    model = shrink.load(out)
    kept = np.concatenate([model[n].array.ravel() for n in ("c/W", "l/W")])
    everything = np.concatenate([CONV.ravel(), DENSE.ravel()])
    threshold = np.sort(np.abs(everything))[round(0.7 * everything.size) - 1]
    assert np.array_equal(kept, np.where(np.abs(everything) <= threshold, 0, everything))


def test_globally_pruned_ties_go_one_by_one(tmp_path: Path) -> None:
    savez(tmp_path / "m.npz", W=np.where(rng.random((64, 48)) < 0.5, 0.1, -0.1).astype("f4"), V=DENSE)
    out = tmp_path / "out.safetensors"
    flags = ("--mode", "prune", "--scope", "global", "--sparsity", "0.3", "-o", out)
    assert run("quantize", tmp_path / "m.npz", *flags).code == 0
    zeros = sum(np.count_nonzero(t.array == 0) for t in shrink.load(out).tensors)
    assert zeros == round(0.3 * (64 * 48 + DENSE.size))


def test_keep_keeps(gen: Path, tmp_path: Path) -> None:
    outcome = run("quantize", gen, "--mode", "keep", "--json")
    assert outcome.code == 0, outcome.stderr
    assert {t["mode"] for t in json.loads(outcome.stdout)["tensors"]} == {"kept"}


def test_what_a_user_keeps_may_be_infinite_what_shrink_keeps_may_not(tmp_path: Path) -> None:
    savez(tmp_path / "m.npz", W=CONV, mask=np.array([0, -np.inf], "f4"), big=np.array([1e300, 1.0]))
    refused = run("quantize", tmp_path / "m.npz", "--mode", "int8")
    assert refused.code == 3
    assert "mask" in refused.stderr
    assert run("quantize", tmp_path / "m.npz", "--mode", "int8", "--exclude", "mask").code == 0
    assert shrink.load(tmp_path / "m.int8.safetensors")["big"].array[0] == 1e300


def test_compare_says_what_cannot_be_compared(tmp_path: Path) -> None:
    count = np.array([10**9])
    savez(tmp_path / "a.npz", W=CONV, inf=np.array([np.inf, 1.0]), huge=np.full(4, 1e300), n=count)
    other = CONV * np.float32(1.01)
    savez(tmp_path / "b.npz", W=other, inf=np.array([np.inf, 2.0]), huge=np.full(4, -1e300), n=count)
    outcome = run("compare", tmp_path / "a.npz", tmp_path / "b.npz")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert outcome.stdout.count("holds NaN") == 2
    # Counters are no signal: 1 % of error is 40 dB whatever they count.
    assert "overall SQNR 40.00 dB" in outcome.stdout
    assert json.loads(run("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--json").stdout)


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_a_written_table_replaces_nothing_unasked(name: str, gen: Path, tmp_path: Path) -> None:
    models = [gen] * (2 if name == "compare" else 1)
    before = gen.read_bytes()
    out = tmp_path / "table.txt"
    assert run(name, *models, "-o", out).code == 0
    assert "c/W" in out.read_text()
    assert run(name, *models, "-o", out).code == 2
    assert run(name, *models, "-o", out, "--force").code == 0
    assert run(name, *models, "-o", gen, "--force").code == 2
    assert gen.read_bytes() == before


def test_thousands_of_tensors_take_seconds(tmp_path: Path) -> None:
    """Work per tensor must not depend on how many there are; at 5000 the difference is minutes."""
    savez(tmp_path / "many.npz", **{f"l{i}/W": CONV[:4, :4, 0] for i in range(5000)})
    assert run("quantize", tmp_path / "many.npz", "--mode", "prune", "--scope", "global").code == 0


def test_the_output_lies_beside_the_name_that_was_given(
    gen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "link.npz").symlink_to(gen)
    monkeypatch.chdir(folder)
    assert "Written: link.int8.safetensors" in run("quantize", "link.npz", "--mode", "int8").stdout
    assert (folder / "link.int8.safetensors").exists()


def test_a_model_in_memory_is_refused_where_the_format_cannot_hold_it(gen: Path, tmp_path: Path) -> None:
    with pytest.raises(shrink.ShrinkError, match="eightbit"):
        shrink.save(shrink.quantize(shrink.load(gen), "eightbit"), tmp_path / "x.npz")
    with pytest.raises(shrink.ShrinkError, match="conv1"):
        shrink.quantize(shrink.load(gen), "int8", include="conv1*")


def test_a_name_that_the_container_needs_is_refused(tmp_path: Path) -> None:
    savez(tmp_path / "m.npz", __metadata__=CONV)
    outcome = run("quantize", tmp_path / "m.npz", "--mode", "int8")
    assert outcome.code == 3
    assert "reserved" in outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def test_without_a_command_there_is_help() -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Commands:" in outcome.stderr


def test_closed_streams_are_no_bug(gen: Path, tmp_path: Path) -> None:
    for closed in (">&-", "2>&-"):
        script = f"{sys.executable} -m shrink quantize {gen} --mode int8 --force {closed}"
        outcome = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, (closed, outcome)


def test_pruned_channels_are_reported(tmp_path: Path) -> None:
    weights = CONV.copy()
    weights[4:7] *= 1e-4
    savez(tmp_path / "m.npz", W=weights)
    assert "3 of 32 channels are all zero" in run("quantize", tmp_path / "m.npz", "--mode", "prune").stdout


def test_without_compression_any_safetensors_reader_sees_float16(gen: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "plain.safetensors"
    assert run("quantize", gen, "--mode", "float16", "--no-compress", "-o", out).code == 0
    plain = load_file(out)
    assert np.array_equal(plain["c/W"], CONV.astype("f2"))
    assert plain["bn/N"] == 7


def test_unicode_paths_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "学習済み モデル"
    folder.mkdir()
    savez(folder / "生成器.npz", **{"畳み込み/W": CONV})
    outcome = run("quantize", folder / "生成器.npz", "--mode", "eightbit")
    assert outcome.code == 0, outcome.stderr
    assert (folder / "生成器.eightbit.safetensors").exists()
    assert run("restore", folder / "生成器.eightbit.safetensors").code == 0
    assert list(np.load(folder / "生成器.eightbit.restored.npz")) == ["畳み込み/W"]


def test_force_replaces_and_an_error_keeps_the_old_output(gen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run("quantize", gen, "--mode", "int8", "-o", out, "--force").code == 0
    good = out.read_bytes()
    bad = tmp_path / "bad.npz"
    savez(bad, a=CONV, z=np.full((40, 40), np.nan, "f4"))
    assert run("quantize", bad, "--mode", "int8", "-o", out, "--force").code == 3
    assert out.read_bytes() == good


def test_a_full_disk_leaves_nothing_behind(gen: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    outcome = child("quantize", gen, "--mode", "float16", preexec_fn=small_files_only)
    assert outcome.returncode == 5, outcome.stderr
    assert outcome.stderr.startswith("shrink: error: ")
    assert outcome.stderr.count("\n") == 1
    assert "gen.float16.safetensors" in outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["gen.npz"]


def test_an_unwritable_folder_is_said(gen: Path) -> None:
    # /proc takes no files, not even from root.
    outcome = run("quantize", gen, "--mode", "int8", "-o", "/proc/out.safetensors")
    assert outcome.code == 5
    assert "/proc/out.safetensors" in outcome.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_half_way_it_leaves_nothing_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Interrupted for real: the child is sent the signal when its progress bar shows that it is at work."""
    arrays = {f"l{i:03}/W": np.zeros((1000, 1000), "f4") + i for i in range(60)}
    savez(tmp_path / "big.npz", **arrays)
    shown, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shrink", "quantize", tmp_path / "big.npz", "--mode", "int4"],
        stderr=terminal,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    while b"l0" not in seen:
        seen += os.read(shown, 4096)
    assert any(p.name.endswith(".tmp") for p in tmp_path.iterdir())
    process.send_signal(number)
    try:
        while chunk := os.read(shown, 4096):
            seen += chunk
    except OSError:  # how a pty says that the other side is closed
        pass
    os.close(shown)
    stdout, _ = process.communicate()
    assert process.returncode == code
    assert stdout == b""
    assert (b"shrink: error: interrupted" in seen) == (number == signal.SIGINT)
    assert b"Traceback" not in seen
    assert [p.name for p in tmp_path.iterdir()] == ["big.npz"]


def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    one = rng.standard_normal((2000, 2000)).astype("f4")
    savez(tmp_path / "big.npz", **{f"l{i}/W": one for i in range(16)})
    script = (
        "import sys; from shrink.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1], file=sys.stderr)"
    )
    for mode in ("eightbit", "float16", "int8", "prune"):
        outcome = subprocess.run(
            [sys.executable, "-c", script, "quantize", tmp_path / "big.npz", "--mode", mode],
            capture_output=True,
            text=True,
            check=True,
        )
        peak_bytes = int(outcome.stderr) * 1024
        assert peak_bytes < 100e6 + 6 * one.nbytes < 16 * one.nbytes, mode


def test_a_closed_pipe_is_no_error(gen: Path) -> None:
    script = f"{sys.executable} -m shrink inspect {gen} | true"
    outcome = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False)
    assert outcome.stderr == ""
    assert outcome.returncode == 0


def test_a_traceback_only_with_debug(gen: Path) -> None:
    bad = gen.with_name("bad.npz")
    bad.write_bytes(gen.read_bytes()[:200])
    assert "Traceback" not in run("inspect", bad).stderr
    assert "Traceback" in run("--debug", "inspect", bad).stderr


def test_same_input_same_bytes_on_another_python(gen: Path, tmp_path: Path, shared_models: Path) -> None:
    other = os.environ.get("SHRINK_OTHER_PYTHON")
    if not other:
        pytest.skip("no second Python on this machine")
    models = [gen, shared_models / "waifu2x" / "vgg7_noise0_y.npz"]
    for model in models:
        for mode in ("float16", "eightbit", "int8", "int4", "prune,eightbit"):
            outputs: list[bytes] = []
            for python in (sys.executable, other, other):
                out = tmp_path / f"{len(outputs)}.safetensors"
                arguments = [python, "-m", "shrink", "quantize", model, "--mode", mode, "-o", out, "--force"]
                subprocess.run(list(map(str, arguments)), check=True, capture_output=True)
                outputs.append(out.read_bytes())
            assert outputs[0] == outputs[1] == outputs[2], (model, mode)
