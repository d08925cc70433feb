"""Where an export takes the runtime from: node_modules, or the registry, once and checked."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from shrink.errors import BadInput, IntegrityError, OutputError, UsageError
from shrink.export import _npm
from tests.pages import PACKAGE, all_files, needs_package


def tarball(version: str, *leave_out: str) -> bytes:
    """A package of the layout of the real one, with small files."""
    files = {"package.json": json.dumps({"name": "onnxruntime-web", "version": version}).encode()}
    for api, module in (
        ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
        ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.jsep"),
    ):
        files[f"dist/{api}"] = f'import("{module}.mjs")'.encode()
        files[f"dist/{module}.mjs"] = files[f"dist/{module}.wasm"] = module.encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name in files.keys() - set(leave_out):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
        archive.addfile(tarfile.TarInfo("../../escaped"))
    return out.getvalue()


@contextmanager
def registry(data: bytes | None) -> Iterator[tuple[str, list[str]]]:
    """A registry that answers everything with `data`, or that nothing is there; and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without node_modules, with a cache of its own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def find(elsewhere: Path, address: str = "http://127.0.0.1:9/") -> _npm.Package:
    environment = {"XDG_CACHE_HOME": str(elsewhere / "cache"), "npm_config_registry": address}
    return _npm.find("onnxruntime-web", None, lambda name, done, total: None, environment)


def pin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    pinned = _npm.Pin("1.2.3", hashlib.sha512(data).digest())
    monkeypatch.setattr(_npm, "pinned", lambda name: pinned)


def test_the_runtime_is_downloaded_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tarball("1.2.3")
    pin(monkeypatch, data)
    with registry(data) as (address, asked):
        found = find(elsewhere, address)
        assert find(elsewhere, address) == found
    assert asked == ["/onnxruntime-web/-/onnxruntime-web-1.2.3.tgz"]
    assert found == _npm.Package("onnxruntime-web", "1.2.3", elsewhere / "cache" / "shrink" / "onnxruntime-web-1.2.3")
    assert all_files(found.folder).keys() == {
        "package.json",
        *(f"dist/{api}" for api in ("ort.wasm.min.mjs", "ort.webgpu.min.mjs")),
        *(f"dist/ort-wasm-simd-threaded{kind}" for kind in (".mjs", ".wasm", ".jsep.mjs", ".jsep.wasm")),
    }
    assert sorted(p.name for p in elsewhere.iterdir()) == ["cache", "cwd"]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("changed", IntegrityError, "SHA-512"),
        ("incomplete", BadInput, "says nothing about itself"),
        ("no archive", BadInput, "is no archive"),
        ("missing", OutputError, "npm install onnxruntime-web@1.2.3"),
        ("unreachable", OutputError, "npm install onnxruntime-web@1.2.3"),
    ],
)
def test_a_bad_download_leaves_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], words: str
) -> None:
    data = {"no archive": b"no archive", "incomplete": tarball("1.2.3", "package.json")}.get(kind, tarball("1.2.3"))
    pin(monkeypatch, data)
    answer = {"changed": data + b"\0", "missing": None}.get(kind, data)
    with registry(answer) as (address, _), pytest.raises(error, match=words):
        find(elsewhere, "http://127.0.0.1:9/" if kind == "unreachable" else address)
    assert list((elsewhere / "cache" / "shrink").iterdir()) == []


def test_node_modules_is_taken_where_its_version_is_the_pinned_one(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tarball("1.2.3")
    pin(monkeypatch, data)
    folder = elsewhere / "node_modules" / "onnxruntime-web"
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.2.3"}))
    assert find(elsewhere).folder == folder
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.2.4"}))
    with pytest.raises(OutputError, match=r"onnxruntime-web 1\.2\.3 could not be downloaded"):
        find(elsewhere)
    assert _npm.find("onnxruntime-web", folder, lambda name, done, total: None).version == "1.2.4"
    with pytest.raises(UsageError):
        _npm.find("onnxruntime-web", elsewhere, lambda name, done, total: None)


@needs_package
def test_the_tests_run_what_users_get() -> None:
    assert json.loads((PACKAGE / "package.json").read_text())["version"] == _npm.pinned("onnxruntime-web").version
