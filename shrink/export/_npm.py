"""Where the runtimes of pages come from: npm packages, in the versions that are pinned.

Version and SHA-512 of each stand in shrink/web/package-lock.json. No npm is needed: a package is looked for in
`node_modules` here and above, then in the user's cache, and else downloaded there once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from shrink.errors import BadInput, IntegrityError, OutputError, UsageError
from shrink.files import atomic_folder, io_errors, read_all
from shrink.progress import Progress

__all__ = ["Package", "find", "pinned"]

# What is kept of a downloaded package: the few files that pages may use.
_KEPT = {
    "onnxruntime-web": re.compile(r"dist/(ort\.(wasm|webgpu)\.min\.mjs|ort-wasm-simd-threaded(\.\w+)?\.(mjs|wasm))"),
    "webdnn": re.compile(r"LICENSE\.txt|dist/webdnn\.js"),
}
_ABOUT = "package.json"

_LOCK = Path(__file__).parents[1] / "web" / "package-lock.json"
_REGISTRY = "https://registry.npmjs.org"
_PACKAGE_AT_MOST = 1 << 28
_FILE_AT_MOST = 1 << 27
_TIMEOUT_S = 60
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Package:
    """An unpacked package."""

    name: str
    version: str
    folder: Path

    def read(self, file: str) -> bytes:
        """The bytes of one of its files. Raises OutputError when it is missing."""
        return read_all(self.folder / file, at_most=_FILE_AT_MOST)


@dataclass(frozen=True)
class Pin:
    version: str
    sha512: bytes


@cache
def pinned(name: str) -> Pin:
    locked = json.loads(_LOCK.read_text())["packages"][f"node_modules/{name}"]
    return Pin(locked["version"], base64.b64decode(locked["integrity"].removeprefix("sha512-")))


def find(name: str, given: Path | None, progress: Progress, environment: Mapping[str, str] = os.environ) -> Package:
    """The package: the one at `given`, of any version, or the pinned one from wherever it can be had.

    Raises:
        UsageError: `given` is not a folder of this package.
        OutputError: it is nowhere and cannot be downloaded.
        IntegrityError: the download is not what the lock says.
    """
    if given is not None:
        version = _version(given, name)
        if version is None:
            raise UsageError(f"not a folder of the npm package {name}", file=given)
        return Package(name, version, given)
    pin = pinned(name)
    cached = _cache_folder(environment) / f"{name}-{pin.version}"
    here = Path.cwd()
    for folder in (*(parent / "node_modules" / name for parent in (here, *here.parents)), cached):
        if _version(folder, name) == pin.version:
            return Package(name, pin.version, folder)
    registry = environment.get("npm_config_registry") or environment.get("NPM_CONFIG_REGISTRY") or _REGISTRY
    _download(name, pin, cached, registry, progress)
    return Package(name, pin.version, cached)


def _version(folder: Path, name: str) -> str | None:
    """The version of the package in `folder`, None where it is not there."""
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(about, dict) or about.get("name") != name or not isinstance(about.get("version"), str):
        return None
    return str(about["version"])


def _cache_folder(environment: Mapping[str, str]) -> Path:
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if Path(environment.get(variable, "")).is_absolute():
            return Path(environment[variable]) / "shrink"
    home = Path(environment.get("HOME") or Path.home())
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "shrink"


def _download(name: str, pin: Pin, target: Path, registry: str, progress: Progress) -> None:
    with io_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as spool:
        address = f"{registry.rstrip('/')}/{name}/-/{name}-{pin.version}.tgz"
        _fetch(address, spool, f"{name} {pin.version}", pin.sha512, progress)
        spool.seek(0)
        with atomic_folder(target) as folder:
            _unpack(name, spool, folder)


def _fetch(url: str, spool: IO[bytes], what: str, sha512: bytes, progress: Progress) -> None:
    import urllib.error
    import urllib.request

    digest, done = hashlib.sha512(), 0
    try:
        if not url.startswith(("https:", "http:")):
            raise OSError(f"{url} is no web address")
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while data := response.read(_CHUNK):
                digest.update(data)
                spool.write(data)
                done += len(data)
                progress(f"downloading {what}", done, max(total, done))
                if done > _PACKAGE_AT_MOST:
                    break
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise OutputError(
            f"{what} could not be downloaded: {getattr(error, 'reason', None) or error}",
            file=url,
            hint=f"run `npm install {what.replace(' ', '@')}` here, or give its folder with --runtime",
        ) from None
    if digest.digest() != sha512:
        raise IntegrityError(f"the download is not {what} (SHA-512)", file=url)


def _unpack(name: str, spool: IO[bytes], folder: Path) -> None:
    """The files that are kept, by the names we know: no path in the archive leads anywhere else."""
    try:
        with tarfile.open(fileobj=spool) as archive:
            for member in archive:
                file = member.name.removeprefix("package/")
                if member.isfile() and (file == _ABOUT or _KEPT[name].fullmatch(file)):
                    data = archive.extractfile(member)
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).write_bytes(data.read(_FILE_AT_MOST) if data else b"")
    except (tarfile.TarError, EOFError):
        raise BadInput(f"the downloaded package of {name} is no archive") from None
    if _version(folder, name) is None:
        raise BadInput(f"the downloaded package of {name} says nothing about itself")
