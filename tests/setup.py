"""Makes this folder ready to test: two virtual environments, npm packages, Debian packages, codec.wasm's compiler.

Only the standard library is used, as this runs before anything is installed. What is there already is left
alone: each environment carries a stamp of everything that it was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "tests" / "requirements.txt"
BUILD_LOCK = ROOT / "tests" / "build-requirements.txt"
CODEC_LOCK = ROOT / "tests" / "codec-requirements.txt"
CODEC_TOOLS = ROOT / "build" / "codec"
VENV = ROOT / ".venv"
OTHER_VENV = ROOT / ".venv-other"
NPM = ROOT / "tests"

OLDEST = (3, 10)
STAMP = ".shrink-setup"
# Command or file -> the Debian package that brings it.
DEBIAN = {
    "chromium": "chromium",
    "node": "nodejs",
    "npm": "npm",
    "em++": "emscripten",
    "/usr/include/eigen3/Eigen/Core": "libeigen3-dev",
}

# What a candidate for the second Python says about itself. A build without the GIL is another ABI, for which
# the locked packages have no wheels.
_PROBE = (
    "import sys, sysconfig; "
    "print(sys.implementation.name, sys.version_info[0], sys.version_info[1], "
    "sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
)


class SetupFailed(Exception):
    """Nothing can be tested; the message says why and what to do."""


@dataclass
class Ready:
    """What the run needs to know: the Python to run, variables to set, and which steps went wrong."""

    python: Path
    env: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def prepare() -> Ready:
    """Set up what is missing.

    Raises:
        SetupFailed: the virtual environment could not be made.
    """
    start = time.monotonic()
    ready = Ready(VENV / "bin" / "python")
    with one_at_a_time():
        debian_packages()
        main_venv()
        if not npm_packages():
            ready.failed.append("npm ci")
        if not codec_tools():
            ready.failed.append("codec.wasm's compiler")
        other = other_venv()
    ready.env["PATH"] = os.pathsep.join([str(VENV / "bin"), os.environ.get("PATH", os.defpath)])
    if other:
        ready.env["SHRINK_OTHER_PYTHON"] = str(other)
    say(f"ready after {time.monotonic() - start:.1f} s")
    return ready


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two runs in one folder would build the same environment over each other."""
    with open(LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def call(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command, showing only its stderr. Raises CalledProcessError."""
    subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "UV_PYTHON_DOWNLOADS": "never", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )


# Virtual environments


def main_venv() -> None:
    key = digest([LOCK, BUILD_LOCK, ROOT / "pyproject.toml"], str(ROOT), sys.version)
    python = VENV / "bin" / "python"
    bootstrap = VENV / "bootstrap.txt"

    def create() -> None:
        # Inside a virtual environment, sys.executable may be in the very folder that is made anew.
        base = getattr(sys, "_base_executable", None) or sys.executable
        call(base, "-m", "venv", VENV)

    def fill() -> None:
        say("installing the locked packages into .venv")
        # A requirements file, because only there does pip check hashes.
        bootstrap.write_text(locked("uv", LOCK.read_text()))
        call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", bootstrap)
        call(python, "-m", "uv", "pip", "sync", "--quiet", *into(VENV), "--build-constraints", BUILD_LOCK, LOCK)
        install_shrink(VENV)

    try:
        ready_venv(VENV, key, sys.version, create, fill)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupFailed(
            f".venv could not be made: {error}; it takes Python {dotted(OLDEST)} or newer with pip and venv "
            "(Debian: apt-get install python3-venv) and a way to pypi.org"
        ) from None


def other_venv() -> Path | None:
    """The Python of an environment with shrink on another Python version, None where the machine has no other."""
    python = OTHER_VENV / "bin" / "python"
    running = sys.version_info[:2]
    key = digest([LOCK, ROOT / "pyproject.toml"], str(ROOT))
    if probe(python) not in (None, running) and is_fresh(OTHER_VENV, key):
        return python
    for version, executable in other_pythons(running):
        say(f"installing shrink and what it needs into .venv-other, Python {dotted(version)}")
        exactly = ("--exact", "--only-binary", ":all:", "--constraints", LOCK)
        try:
            # Always from scratch: it takes about a second, and the old one may be of any version.
            remove(OTHER_VENV)
            call(*uv_command(), "venv", "--quiet", "--python", executable, OTHER_VENV)
            call(*uv_command(), "pip", "install", "--quiet", *into(OTHER_VENV), *exactly, "-r", "pyproject.toml")
            install_shrink(OTHER_VENV)
        except subprocess.CalledProcessError:
            say(f"{executable} does not take the locked packages")
        else:
            write_stamp(OTHER_VENV, key)
            return python
    say(f"beside Python {dotted(running)} there is no other that serves: tests on a second Python skip")
    return None


def ready_venv(folder: Path, key: str, version: str, create: Callable[[], None], fill: Callable[[], None]) -> None:
    """Bring `folder` to the state that `key` stands for, and leave it alone where it is there already.

    `version` is the sys.version that its Python must have. An environment that is stale is filled again in
    place; one that is broken, or that cannot be filled, is made anew.
    """
    usable = sys_version(folder / "bin" / "python") == version
    if usable and is_fresh(folder, key):
        return
    if usable:
        (folder / STAMP).unlink(missing_ok=True)
        try:
            fill()
        except subprocess.CalledProcessError:
            say(f"{folder.name} cannot be mended: making it anew")
            usable = False
    if not usable:
        remove(folder)
        create()
        fill()
    write_stamp(folder, key)


def is_fresh(folder: Path, key: str) -> bool:
    """Whether the environment was made from what `key` stands for, and no package has gone since then."""
    try:
        made_from, *names = (folder / STAMP).read_text().splitlines()
    except (OSError, ValueError):
        return False
    return made_from == key and set(names) <= set(distributions(folder))


def write_stamp(folder: Path, key: str) -> None:
    (folder / STAMP).write_text("\n".join([key, *distributions(folder)]) + "\n")


def distributions(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("lib/python*/site-packages/*.dist-info"))


def remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def install_shrink(folder: Path) -> None:
    """Shrink itself, editable; the lock holds the exact version of what builds it."""
    call(
        *(*uv_command(), "pip", "install", "--quiet", *into(folder)),
        *("--no-deps", "--build-constraints", LOCK, "--editable", ROOT),
    )


def uv_command() -> tuple[str | Path, ...]:
    return VENV / "bin" / "python", "-m", "uv"


def into(folder: Path) -> tuple[str | Path, ...]:
    return "--python", folder / "bin" / "python"


def digest(files: Iterable[Path], *more: str) -> str:
    parts = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    return hashlib.sha256("\n".join([*parts, *more]).encode()).hexdigest()


def locked(package: str, lock: str) -> str:
    """The entry of a package in the text of a lock file: its exact version and its hashes."""
    found = re.search(rf"^{re.escape(package)}==(.*\\\n)*.*\n", lock, re.MULTILINE)
    if not found:
        raise SetupFailed(f"tests/requirements.txt does not hold {package}")
    return found[0]


# Other Pythons


def other_pythons(running: tuple[int, int]) -> list[tuple[tuple[int, int], Path]]:
    """CPythons that run here and are not of the `running` version, one of each version.

    The oldest comes first: the lock gives it the oldest packages, so it has the most to differ in.
    """
    found: dict[tuple[int, int], Path] = {}
    for executable in python_executables():
        version = probe(executable)
        if version and version != running and version >= OLDEST:
            found.setdefault(version, executable)
    return sorted(found.items())


def python_executables() -> Iterator[Path]:
    for minor in range(OLDEST[1], OLDEST[1] + 10):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield Path(found)
    with contextlib.suppress(RuntimeError):  # no home folder
        yield from sorted(Path.home().glob(".pyenv/versions/*/bin/python3"))


def probe(executable: Path) -> tuple[int, int] | None:
    """(major, minor) of an ordinary CPython that runs; None for anything else, as for a shim that leads nowhere."""
    words = output(executable, "-c", _PROBE).split()
    if len(words) == 4 and words[0] == "cpython" and words[3] == "0":
        return int(words[1]), int(words[2])
    return None


def sys_version(executable: Path) -> str:
    """The sys.version of a Python; "" when it does not run."""
    return output(executable, "-c", "import sys; print(sys.version, end='')")


def output(*command: str | Path) -> str:
    """What a command prints; "" when it fails."""
    try:
        done = subprocess.run(
            [str(c) for c in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


# Everything else


def npm_packages() -> bool:
    """`npm ci` in tests/, when it has a package.json; False when that went wrong."""
    manifests = [NPM / "package.json", NPM / "package-lock.json"]
    stamp = NPM / "node_modules" / STAMP
    if not manifests[0].exists():
        return True
    if not shutil.which("npm"):
        say("npm is not here: tests that need Node.js packages skip")
        return True
    key = digest(f for f in manifests if f.exists())
    if stamp.exists() and stamp.read_text() == key:
        return True
    say("npm ci in tests/")
    try:
        call("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", cwd=NPM)
    except (OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return False
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(key)
    return True


def codec_tools() -> bool:
    """What shrink/web/codec.wasm is made with: a compiler and Zstandard's sources; False when that went wrong."""
    if not _codec_platform():
        say("codec.wasm's compiler is locked for Linux on x86-64 only: the test that rebuilds it skips")
        return True
    if codec_obstacle() is None:
        return True
    say("fetching codec.wasm's compiler into build/codec")
    compiler, archives, sources = (CODEC_TOOLS / name for name in ("compiler", "archives", "zstd"))
    requirement = CODEC_TOOLS / "zstandard.txt"
    try:
        remove(CODEC_TOOLS)
        sources.mkdir(parents=True)
        hashed = ("--quiet", "--no-deps", "--require-hashes")
        call(*uv_command(), "pip", "install", *hashed, *into(VENV), "--target", compiler, "-r", CODEC_LOCK)
        requirement.write_text(locked("zstandard", LOCK.read_text()))
        # Only pip can fetch a source package and leave it as it is.
        pip = (VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "download")
        call(*pip, *hashed, "--no-binary", "zstandard", "--dest", archives, "-r", requirement)
        (archive,) = archives.glob("zstandard-*.tar.gz")
        unpack_zstd(archive, sources)
    except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError) as error:
        say(str(error))
        return False
    (CODEC_TOOLS / STAMP).write_text(_codec_key())
    return True


def codec_obstacle() -> str | None:
    """Why codec.wasm cannot be made here; None where it can."""
    if not _codec_platform():
        return "its compiler is locked for Linux on x86-64 only"
    stamp = CODEC_TOOLS / STAMP
    if not stamp.exists() or stamp.read_text() != _codec_key():
        return "its compiler is not in build/codec, or is another one (`python3 -m tests` brings it)"
    return None


def codec_locks() -> list[str]:
    """The exact versions, with hashes, of what codec.wasm is made with."""
    return [CODEC_LOCK.read_text(), locked("zstandard", LOCK.read_text())]


def _codec_key() -> str:
    return digest([], *codec_locks())


def _codec_platform() -> bool:
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def unpack_zstd(archive: Path, folder: Path) -> None:
    """Zstandard's sources, out of the sdist of zstandard into the folder."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            # zstandard-<version>/zstd/<file>: only plain files of that one folder, by their last name.
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and Path(member.name).parts[1:-1] == ("zstd",):
                (folder / Path(member.name).name).write_bytes(content.read())


def debian_packages() -> None:
    """Install what is missing where that is allowed, else say how; the tests that need it skip and say so."""
    missing = missing_packages(is_here)
    if not missing:
        return
    install = ("apt-get", "install", "--yes", "--no-install-recommends")
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with contextlib.suppress(subprocess.CalledProcessError):  # apt-get has said why
            call("apt-get", "update", "--quiet")
        for package in missing:
            # One by one, so that a package which cannot be had does not hold back the others.
            say(f"installing the Debian package {package}")
            with contextlib.suppress(subprocess.CalledProcessError):
                call(*install, package)
        missing = missing_packages(is_here)
    if missing:
        say(f"not here, tests that need them skip: {' '.join(missing)} (as root: {' '.join([*install, *missing])})")


def missing_packages(here: Callable[[str], object]) -> list[str]:
    return [package for name, package in DEBIAN.items() if not here(name)]


def is_here(name: str) -> bool:
    return Path(name).exists() if os.path.isabs(name) else shutil.which(name) is not None
