"""The harness itself: what decides whether an environment is made, and that a failure cannot hide."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.version import Version

from tests import setup
from tests.__main__ import exit_code, static_checks
from tests.conftest import NetworkRefused, is_this_machine


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body + "\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str, *, implementation: str = "cpython", free_threaded: int = 0) -> Path:
    major, minor = version.split(".")
    return script(path, f"echo {implementation} {major} {minor} {free_threaded}")


# The environments


class Folder:
    """A virtual environment whose making is only counted; `fill` may be told to fail."""

    def __init__(self, path: Path):
        self.path = path
        self.done: list[str] = []
        self.broken = 0

    def create(self) -> None:
        self.done.append("create")
        script(self.path / "bin" / "python", "printf %s 3.11")

    def fill(self) -> None:
        self.done.append("fill")
        if self.broken:
            self.broken -= 1
            raise subprocess.CalledProcessError(1, "uv")
        (self.path / "lib/python3.11/site-packages/numpy-2.dist-info").mkdir(parents=True, exist_ok=True)

    def ready(self, key: str = "key") -> list[str]:
        self.done.clear()
        setup.ready_venv(self.path, key, "3.11", self.create, self.fill)
        return list(self.done)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "venv")
    assert folder.ready() == ["create", "fill"]
    return folder


def test_a_second_run_does_nothing(folder: Folder) -> None:
    assert folder.ready() == []


def test_another_lock_fills_again(folder: Folder) -> None:
    assert folder.ready("other key") == ["fill"]
    assert folder.ready("other key") == []


def test_a_missing_package_fills_again(folder: Folder) -> None:
    (folder.path / "lib/python3.11/site-packages/numpy-2.dist-info").rmdir()
    assert folder.ready() == ["fill"]


def test_a_package_that_someone_added_is_left_alone(folder: Folder) -> None:
    (folder.path / "lib/python3.11/site-packages/extra-1.dist-info").mkdir()
    assert folder.ready() == []


@pytest.mark.parametrize("damage", ["exit 1", "printf %s 3.10"])
def test_a_python_that_fails_or_changed_is_made_anew(folder: Folder, damage: str) -> None:
    script(folder.path / "bin" / "python", damage)
    assert folder.ready() == ["create", "fill"]


def test_a_dangling_python_is_made_anew(folder: Folder) -> None:
    (folder.path / "bin" / "python").unlink()
    (folder.path / "bin" / "python").symlink_to("/nowhere/python")
    assert folder.ready() == ["create", "fill"]


def test_a_file_in_its_place_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "venv").write_text("not a folder")
    assert Folder(tmp_path / "venv").ready() == ["create", "fill"]


def test_what_cannot_be_mended_is_made_anew(folder: Folder) -> None:
    folder.broken = 1
    assert folder.ready("other key") == ["fill", "create", "fill"]


def test_a_failed_making_is_said_and_not_taken_for_done(folder: Folder) -> None:
    folder.broken = 2
    with pytest.raises(subprocess.CalledProcessError):
        folder.ready("other key")
    assert folder.ready("other key") == ["fill"]


def test_the_key_follows_contents(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.write_text("a==1")
    before = setup.digest([file], "x")
    assert setup.digest([file], "x") == before
    assert setup.digest([file], "y") != before
    file.write_text("a==2")
    assert setup.digest([file], "x") != before


# Other Pythons


def test_other_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # All names that are looked for stand in this folder, so that none of this machine's own is found.
    script(tmp_path / "bin/python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127")
    fake_python(tmp_path / "bin/python3.11", "3.11")
    first = fake_python(tmp_path / "bin/python3.12", "3.12")
    for minor in (13, 14, 15, 16, 17, 18, 19):
        fake_python(tmp_path / f"bin/python3.{minor}", f"3.{minor}", free_threaded=1)
    versions = tmp_path / "home/.pyenv/versions"
    fake_python(versions / "3.12.1/bin/python3", "3.12")
    fake_python(versions / "3.9.18/bin/python3", "3.9")
    fake_python(versions / "pypy3.10/bin/python3", "3.10", implementation="pypy")
    second = fake_python(versions / "3.13.0/bin/python3", "3.13")

    assert setup.other_pythons((3, 11)) == [((3, 12), first), ((3, 13), second)]


def test_the_probe_knows_this_python() -> None:
    assert setup.probe(Path(sys.executable)) == sys.version_info[:2]


def test_the_other_python_runs_shrink_and_is_of_another_version(other_python: Path) -> None:
    assert setup.probe(other_python) not in (None, sys.version_info[:2])
    where = subprocess.run(
        [other_python, "-c", "import shrink.container; print(shrink.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert Path(where.stdout.strip()) == setup.ROOT / "shrink" / "__init__.py"


# Debian packages


def test_missing_packages() -> None:
    here = {"node": "/usr/bin/node"}
    assert setup.missing_packages(here.get) == ["chromium", "npm", "emscripten", "libeigen3-dev"]
    assert setup.missing_packages(lambda command: command) == []


def test_without_root_the_command_is_said_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "is_here", lambda name: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(setup, "call", lambda *command, **_: pytest.fail(str(command)))
    setup.debian_packages()
    said = capsys.readouterr().out
    assert "apt-get install" in said
    assert "chromium nodejs npm emscripten libeigen3-dev" in said


def test_with_root_a_package_manager_that_fails_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, ...]] = []

    def fail(*command: str, **_: object) -> None:
        calls.append(command)
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(setup, "is_here", lambda name: False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup, "call", fail)
    setup.debian_packages()
    assert [(c[1], c[-1]) for c in calls if c[1] == "install"] == [
        ("install", "chromium"),
        ("install", "nodejs"),
        ("install", "npm"),
        ("install", "emscripten"),
        ("install", "libeigen3-dev"),
    ]
    assert "not here" in capsys.readouterr().out


# npm


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package.json, and an npm that counts its runs in runs.txt there."""
    monkeypatch.setattr(setup, "NPM", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    script(tmp_path / "bin/npm", 'echo "$1" >> runs.txt; rm -rf node_modules; mkdir node_modules')
    (tmp_path / "package.json").write_text("{}")
    return tmp_path


def test_npm_runs_once_for_each_lock(npm: Path) -> None:
    assert setup.npm_packages()
    assert setup.npm_packages()
    assert (npm / "runs.txt").read_text().split() == ["ci"]
    (npm / "package-lock.json").write_text("{}")
    assert setup.npm_packages()
    assert (npm / "runs.txt").read_text().split() == ["ci", "ci"]


def test_an_npm_that_fails_is_said_and_tried_again(npm: Path) -> None:
    good = (npm / "bin/npm").read_text()
    script(npm / "bin/npm", "exit 1")
    assert not setup.npm_packages()
    (npm / "bin/npm").write_text(good)
    assert setup.npm_packages()


def test_without_a_package_json_npm_is_not_run(npm: Path) -> None:
    (npm / "package.json").unlink()
    assert setup.npm_packages()
    assert not (npm / "runs.txt").exists()


# What codec.wasm is made with


class Fetched:
    """build/codec in a folder of its own; what installs and downloads is only counted, and may be told to fail."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: list[str] = []
        self.broken = False

    def call(self, *command: str | Path, **_: object) -> None:
        words = [str(c) for c in command]
        assert "--require-hashes" in words
        self.done.append("install" if "install" in words else "download")
        if self.broken:
            raise subprocess.CalledProcessError(1, words)
        if self.done[-1] == "download":
            archives = Path(words[words.index("--dest") + 1])
            archives.mkdir()
            sdist(archives / "zstandard-1.tar.gz", {"zstandard-1/zstd/zstd.c": tarfile.REGTYPE})


def sdist(path: Path, members: dict[str, bytes]) -> None:
    """An archive of members by their type, each with its own name as content, or as what it links to."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in members.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(name) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(name.encode()))


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    fetched = Fetched(tmp_path / "codec")
    monkeypatch.setattr(setup, "CODEC_TOOLS", fetched.folder)
    monkeypatch.setattr(setup, "call", fetched.call)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return fetched


def test_codec_tools_are_fetched_once_for_each_lock(
    fetched: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.codec_obstacle()
    assert setup.codec_tools()
    assert setup.codec_tools()
    assert fetched.done == ["install", "download"]
    assert setup.codec_obstacle() is None
    assert (fetched.folder / "zstd" / "zstd.c").read_text() == "zstandard-1/zstd/zstd.c"
    (tmp_path / "lock").write_text("ziglang==0")
    monkeypatch.setattr(setup, "CODEC_LOCK", tmp_path / "lock")
    assert setup.codec_obstacle()
    assert setup.codec_tools()
    assert fetched.done == ["install", "download"] * 2


def test_codec_tools_that_cannot_be_fetched_are_said_and_tried_again(
    fetched: Fetched, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched.broken = True
    assert not setup.codec_tools()
    assert "non-zero exit status" in capsys.readouterr().out
    assert setup.codec_obstacle()
    fetched.broken = False
    assert setup.codec_tools()
    assert setup.codec_obstacle() is None


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "x86_64"), ("Linux", "aarch64")])
def test_elsewhere_no_compiler_is_fetched(
    fetched: Fetched,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
    machine: str,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert setup.codec_tools()
    assert fetched.done == []
    assert "skips" in capsys.readouterr().out
    assert "x86-64" in (setup.codec_obstacle() or "")


def test_only_plain_files_of_the_one_folder_are_unpacked(tmp_path: Path) -> None:
    members = {
        "z-1/zstd/zstd.c": tarfile.REGTYPE,
        "z-1/zstd/zstd.h": tarfile.SYMTYPE,
        "z-1/zstd/LICENSE": tarfile.LNKTYPE,
        "z-1/zstd/deeper/zdict.h": tarfile.REGTYPE,
        "z-1/setup.py": tarfile.REGTYPE,
        "z-1/../zstd/outside.c": tarfile.REGTYPE,
        "/z-1/zstd": tarfile.DIRTYPE,
    }
    sdist(tmp_path / "z.tar.gz", members)
    folder = tmp_path / "zstd"
    folder.mkdir()
    setup.unpack_zstd(tmp_path / "z.tar.gz", folder)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["z.tar.gz", "zstd.c"]


# The lock


def lock_entries() -> list[Requirement]:
    text = setup.LOCK.read_text().replace("\\\n", " ")
    lines = [re.sub(r"\s--hash=\S+", "", line) for line in text.splitlines()]
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def wanted() -> list[Requirement]:
    project = tomli.loads((setup.ROOT / "pyproject.toml").read_text())
    lines = [line.split("#")[0].strip() for line in (setup.ROOT / "tests/requirements.in").read_text().splitlines()]
    return [
        Requirement(line)
        for line in [
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["onnx"],
            *project["project"]["optional-dependencies"]["bench"],
            *lines,
        ]
        if line
    ]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_meets_every_requirement(python: str) -> None:
    environment = {"python_version": python, "python_full_version": python + ".1"}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    locked = {}
    for entry in filter(applies, lock_entries()):
        (specifier,) = entry.specifier
        assert specifier.operator == "=="
        assert entry.name not in locked
        locked[entry.name] = Version(specifier.version)
    for requirement in filter(applies, wanted()):
        assert requirement.name in locked
        assert requirement.specifier.contains(locked[requirement.name])


@pytest.mark.parametrize("lock", [setup.LOCK, setup.CODEC_LOCK], ids=lambda path: path.name)
def test_every_locked_package_has_a_hash(lock: Path) -> None:
    entries = lock.read_text().replace("\\\n", " ").splitlines()
    assert all("--hash=sha256:" in e for e in entries if "==" in e and not e.lstrip().startswith("#"))


def test_the_entry_of_one_package() -> None:
    entry = "uv==0.13.8 \\\n    --hash=sha256:01 \\\n    --hash=sha256:02\n"
    lock = "uvloop==1 \\\n    --hash=sha256:00\n" + entry + "    # via x\nz==1\n"
    assert setup.locked("uv", lock) == entry
    with pytest.raises(setup.SetupFailed, match="does not hold nothing"):
        setup.locked("nothing", lock)


# The run


@pytest.mark.parametrize(
    ("pytest_code", "failed", "code"), [(0, [], 0), (0, ["mypy"], 1), (1, [], 1), (5, [], 5), (2, ["mypy"], 2)]
)
def test_the_exit_code_is_honest(pytest_code: int, failed: list[str], code: int) -> None:
    assert exit_code(pytest_code, failed) == code


@pytest.mark.parametrize(
    ("check", "source"),
    [
        ("ruff check", "import os\n"),
        ("ruff format", "x = [ 1 ]\n"),
        ("mypy", "def f(x):\n    return x\n"),
    ],
)
def test_each_check_finds_its_own_fault(check: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((setup.ROOT / "pyproject.toml").read_text())
    (tmp_path / "shrink").mkdir()
    (tmp_path / "shrink" / "__init__.py").write_text(source)
    codes = {
        name: subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
        for name, command in static_checks(Path(sys.executable), ["shrink"]).items()
    }
    assert {name for name, code in codes.items() if code} == {check}


def test_continuous_integration_runs_the_same_command() -> None:
    run = setup.ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    last = run.read_text().splitlines()[-1]
    assert last == 'exec python3 -m tests "$@"'


# No network


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0), ("example.org", 80), ("", 80)])
def test_other_machines_are_refused(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family) as s, pytest.raises(NetworkRefused):
        s.connect(address)
    with socket.socket(family) as s, pytest.raises(NetworkRefused):
        s.connect_ex(address)
    with socket.socket(family, socket.SOCK_DGRAM) as s, pytest.raises(NetworkRefused):
        s.sendto(b"x", address)


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=10) as client:
            assert client.recv(1) == b""
        thread.join()
    assert is_this_machine(socket.AF_UNIX, "/tmp/socket")
    assert is_this_machine(socket.AF_INET6, ("::1", 80, 0, 0))
    assert is_this_machine(socket.AF_INET, ("127.3.2.1", 80))
