"""`shrink serve`: what a static host does, for this machine only, and nothing outside the folder."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shrink.errors import OutputError
from shrink.serve import Server
from tests.command import run

DATA = bytes(range(256)) * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    (folder / "sub").mkdir(parents=True)
    (folder / "index.html").write_text("<p>top</p>")
    (folder / "sub" / "index.html").write_text("<p>sub</p>")
    (folder / "données 1.bin").write_bytes(DATA)
    for name in ("a.wasm", "a.mjs", "a.js", "a.css", "a.json"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html?a=b#c", "text/html; charset=utf-8"),
        ("/a.wasm", "application/wasm"),
        ("/a.mjs", "text/javascript; charset=utf-8"),
        ("/a.js", "text/javascript; charset=utf-8"),
        ("/a.css", "text/css; charset=utf-8"),
        ("/a.json", "application/json"),
        ("/donn%C3%A9es%201.bin", "application/octet-stream"),
    ],
)
def test_files_have_their_types_and_the_headers_for_threads(server: Server, path: str, kind: str) -> None:
    response, body = ask(server, path)
    assert response.status == 200
    assert response.getheader("Content-Type") == kind
    assert response.getheader("Content-Length") == str(len(body))
    assert response.getheader("Cross-Origin-Opener-Policy") == "same-origin"
    assert response.getheader("Cross-Origin-Embedder-Policy") == "require-corp"
    assert response.getheader("X-Content-Type-Options") == "nosniff"


def test_folders_give_their_index(server: Server) -> None:
    assert ask(server, "/")[1] == b"<p>top</p>"
    assert ask(server, "/sub/")[1] == b"<p>sub</p>"


def test_a_folder_without_a_slash_leads_to_the_one_with_it(server: Server) -> None:
    """Else the page's own links would start one folder too high."""
    response, _ = ask(server, "/sub?a=b")
    assert response.status == 308
    assert response.getheader("Location") == "/sub/?a=b"


@pytest.mark.parametrize(
    "path",
    [
        "/missing",
        "/index.html/",
        "/../secret",
        "/sub/../../secret",
        "/%2e%2e/secret",
        "/..%2fsecret",
        "/..%5csecret",
        "/link",
        "/linked/secret",
        "/linked",
        "/%00",
        "/%ff",
        "/" + "a" * 5000,
        "//etc/passwd",
        "/%2Fetc/passwd",
    ],
)
def test_nothing_outside_the_folder_is_served(server: Server, path: str) -> None:
    response, body = ask(server, path)
    assert response.status == 404
    assert b"secret" not in body
    assert b"root:" not in body


def test_a_redirect_never_leads_to_another_host(folder: Path, server: Server) -> None:
    (folder / "example.org").mkdir()
    response, _ = ask(server, "//example.org")
    assert response.getheader("Location") == "/example.org/"


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=1000-", 1000, 1024),
        ("bytes=-24", 1000, 1024),
        ("bytes=1000-5000", 1000, 1024),
        ("bytes=-5000", 0, 1024),
        ("bytes=0-", 0, 1024),
    ],
)
def test_parts_of_a_file(server: Server, asked: str, start: int, stop: int) -> None:
    response, body = ask(server, "/donn%C3%A9es%201.bin", Range=asked)
    assert response.status == 206
    assert response.getheader("Content-Range") == f"bytes {start}-{stop - 1}/1024"
    assert body == DATA[start:stop]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=1024-", 416),
        ("bytes=1024-1030", 416),
        ("bytes=-0", 416),
        ("bytes=9-3", 200),
        ("bytes=2000-3", 200),
        ("bytes=0-1,5-6", 200),
        ("lines=1-2", 200),
        ("bytes=-", 200),
    ],
)
def test_parts_that_are_not_there(server: Server, asked: str, status: int) -> None:
    response, body = ask(server, "/donn%C3%A9es%201.bin", Range=asked)
    assert response.status == status
    assert body == (DATA if status == 200 else b"")


def test_parts_are_for_get_and_for_whoever_names_no_version(server: Server) -> None:
    response, _ = ask(server, "/donn%C3%A9es%201.bin", "HEAD", Range="bytes=0-9")
    assert (response.status, response.getheader("Content-Length")) == (200, "1024")
    response, body = ask(server, "/donn%C3%A9es%201.bin", **{"Range": "bytes=0-9", "If-Range": '"v1"'})
    assert (response.status, body) == (200, DATA)


def test_only_reading_and_only_by_our_own_name(server: Server) -> None:
    response, body = ask(server, "/a.js", "HEAD")
    assert (response.status, response.getheader("Content-Length"), body) == (200, "1", b"")
    assert ask(server, "/a.js", "POST")[0].status == 501
    assert ask(server, "/a.js", Host="localhost:1")[0].status == 200
    assert ask(server, "/a.js", Host="evil.example")[0].status == 421


def test_only_this_machine_can_reach_it(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_several_requests_on_one_connection(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        for path, status in (("/a.js", 200), ("/a.js", 200), ("/missing", 404)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == status
    finally:
        connection.close()


def test_what_cannot_be_served(folder: Path, server: Server) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        Server(folder / "missing")
    with pytest.raises(OutputError, match=r"cannot be used.*another --port"):
        Server(folder, server.server_address[1])
    assert run("serve", folder / "missing").code == 5
    assert run("serve", folder, "--port", "70000").code == 2


def test_the_command_prints_the_address_and_ends_with_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "shrink", "serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            port = int(address.removeprefix("http://127.0.0.1:").removesuffix("/"))
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"GET /a\x1b[31m HTTP/1.0\r\nHost: localhost\r\n\r\n")
                assert connection.recv(20).startswith(b"HTTP/1.1 404")
            os.kill(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "404" in stderr
    assert "\x1b" not in stderr
    assert "Traceback" not in stderr
    assert "error" not in stderr


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")
def test_an_answer_is_not_held_back(server: Server) -> None:
    """Else the last bytes of each wait until the browser has confirmed those before, 40 ms a file."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("GET", "/a.js")
    connection.getresponse().read()
    ours = connection.sock.getsockname()
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            end = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        with end, contextlib.suppress(OSError):
            if end.family == socket.AF_INET and end.getpeername() == ours:
                found.append(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    connection.close()
    assert len(found) == 1
    assert found[0] != 0
