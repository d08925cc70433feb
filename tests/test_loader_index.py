"""Indexes of files in parts, in a real browser: nested, damaged, hostile, and those that others write."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from shrink.progress import silent
from shrink.split import shards
from tests import containers
from tests.command import run
from tests.faulty_server import cut, status, whole
from tests.test_loader import assert_holds, flipped, make, sri
from tests.web import Loader, in_python, loader_in_chromium
from tests.web.parts import (
    INDEX,
    STEM,
    WEB_PAGE,
    Split,
    decoded_bytes,
    deploy,
    deploy_split,
    progress_of,
    raw_parts,
    split,
)
from tests.zoo import NETWORKS


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("file"), 1, "int8", 50)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same network, trained further: every tensor has the same size and other values."""
    return make(tmp_path_factory.mktemp("other"), 2, "int8", 50)


@pytest.fixture(scope="module")
def three(file: bytes, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(file, decoded_bytes(tmp_path_factory.mktemp("three"), file))


@pytest.fixture(scope="module")
def newer(other: bytes, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(other, decoded_bytes(tmp_path_factory.mktemp("newer"), other))


# --- indexes ---------------------------------------------------------------------------------------------------


def nested(text: bytes, rounds: int, limit: int) -> tuple[bytes, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    for number in range(rounds):
        parts, pieces = raw_parts(text, limit, f"index{number}")
        files |= pieces
        text = json.dumps({"shrink": {"version": 1, "index": {"bytes": len(text), "parts": parts}}}).encode()
    return text, files


def test_an_index_in_parts(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    for rounds in (1, 3, 8):
        text, files = nested(three.text, rounds, 400)
        assert_holds(loader.load(deploy(loader, text, {**files, **three.files}).url), file, tmp_path)
    text, files = nested(three.text, 9, 400)
    assert loader.fails(deploy(loader, text, {**files, **three.files}).url) == "corrupt"


def test_what_shrink_split_writes(loader: Loader, tmp_path: Path) -> None:
    """The smallest limit: shards of 10 kB, and an index that is cut itself."""
    data = make(tmp_path, 3, "float16", 1000)
    (tmp_path / f"{STEM}.safetensors").write_bytes(data)
    folder = tmp_path / "split"
    folder.mkdir()
    shards.plan(tmp_path / f"{STEM}.safetensors", 10_000, folder).write(silent)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert max(map(len, files.values())) <= 10_000
    assert b'"index"' in files[INDEX]
    result = loader.load(deploy(loader, files[INDEX], files).url)
    assert_holds(result, data, tmp_path)
    progress_of(result)


def test_a_calibrated_file_in_parts(loader: Loader, tmp_path: Path) -> None:
    """Many of its tensors take no bytes: some stand where a part ends, and one of two kinds of header is in parts."""
    pytest.importorskip("onnxruntime")
    output = tmp_path / "residual.safetensors"
    network = next(zoo for zoo in NETWORKS if zoo.name == "residual")
    outcome = run("quantize", network.path, "--mode", "calibrated", "--step", 0.01, "--samples", 8, "-o", output)
    assert outcome.code == 0, outcome.stderr
    packed = output.read_bytes()
    for data in (packed, containers.plain(packed)):
        for count in (2, 9, 40):
            found = loader.load(deploy_split(loader, split(data, decoded_bytes(tmp_path, data), count)).url)
            assert found.get("tensors") == in_python(tmp_path, data), found.get("error")


def test_faults_of_an_index_in_parts(loader: Loader, file: bytes, three: Split, newer: Split, tmp_path: Path) -> None:
    text, files = nested(three.text, 1, 400)
    name = list(files)[1]
    for answer, code in (
        (status(404), "http"),
        (whole(flipped(files[name], 3)), "corrupt"),
        (whole(files[name][:-1]), "truncated"),
    ):
        deployed = deploy(loader, text, {**files, **three.files})
        deployed.put(name, answer)
        error = loader.load(deployed.url)["error"]
        assert error["code"] == code
        assert name in error["message"]
    # A redeploy: only the parts of the newer index are there.
    newer_text, newer_files = nested(newer.text, 1, 400)
    deployed = deploy(loader, text, {**newer_files, **newer.files})
    deployed.put(INDEX, whole(text), whole(newer_text))
    result = loader.load(deployed.url)
    assert "tensors" in result, result["error"]


def test_faults_of_the_index(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    for answer, code in (
        (status(404), "http"),
        (status(500), "http"),
        (whole(WEB_PAGE, content_type="text/html"), "http"),
        (whole(WEB_PAGE), "corrupt"),
        (whole(b""), "corrupt"),
        (whole(three.text[:-1]), "corrupt"),
        (cut(three.text, 100), "network"),
    ):
        deployed = deploy_split(loader, three)
        deployed.put(INDEX, answer)
        error = loader.load(deployed.url)["error"]
        assert error["code"] == code
        assert error["message"].startswith(f"{INDEX}: ")
    deployed.put(INDEX, cut(three.text, 100), status(503), whole(three.text))
    assert_holds(loader.load(deployed.url), file, tmp_path)


def test_the_hash_of_the_index_pins_everything(
    loader: Loader, file: bytes, three: Split, newer: Split, tmp_path: Path
) -> None:
    deployed = deploy_split(loader, three)
    assert_holds(loader.load(deployed.url, integrity=sri(three.text)), file, tmp_path)
    assert loader.fails(deployed.url, integrity=sri(newer.text)) == "corrupt"


def changed(**said: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["shrink"].update(said)


def part_changed(**said: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["shrink"]["parts"][1].update(said)


def cut_index(**said: Any) -> Callable[[dict[str, Any]], None]:
    part = {"file": "x", "bytes": 10, "integrity": sri(b"")}
    return lambda index: index["shrink"].update(index={"bytes": 10, "parts": [part], **said})


HASH = base64.b64encode(bytes(32)).decode()
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no key": (lambda index: index.clear(), "corrupt"),
    "shrink is a list": (lambda index: index.update(shrink=[]), "corrupt"),
    "shrink is null": (lambda index: index.update(shrink=None), "corrupt"),
    "no version": (lambda index: index["shrink"].pop("version"), "unsupported"),
    "version 2": (changed(version=2), "unsupported"),
    "version is text": (changed(version="1"), "unsupported"),
    "no parts": (changed(parts=[]), "corrupt"),
    "parts is an object": (changed(parts={}), "corrupt"),
    "parts of null": (changed(parts=[None]), "corrupt"),
    "parts of lists": (changed(parts=[[]]), "corrupt"),
    "one part missing": (lambda index: index["shrink"]["parts"].pop(), "corrupt"),
    "no file": (changed(file=None), "corrupt"),
    "bytes do not fit": (changed(bytes=7), "corrupt"),
    "bytes is text": (changed(bytes="7"), "corrupt"),
    "no decoded bytes": (changed(decoded_bytes=None), "corrupt"),
    "negative decoded bytes": (changed(decoded_bytes=-1), "corrupt"),
    "fraction": (changed(decoded_bytes=0.5), "corrupt"),
    "decodes to too much": (changed(decoded_bytes=2**40), "unsupported"),
    "part without bytes": (part_changed(bytes=None), "corrupt"),
    "negative part": (part_changed(bytes=-1), "corrupt"),
    "part of text": (part_changed(bytes="100"), "corrupt"),
    "infinite part": (part_changed(bytes=1e400), "corrupt"),
    "skips all": (part_changed(bytes=100, skip=100), "corrupt"),
    "skips more": (part_changed(bytes=100, skip=101), "corrupt"),
    "skips backwards": (part_changed(skip=-1), "corrupt"),
    "skips null": (part_changed(skip=None), "corrupt"),
    "no hash": (part_changed(integrity=None), "corrupt"),
    "empty hash": (part_changed(integrity=""), "corrupt"),
    "weak hash": (part_changed(integrity=f"md5-{HASH}"), "corrupt"),
    "short hash": (part_changed(integrity="sha256-AAAA"), "corrupt"),
    "two hashes": (part_changed(integrity=f"sha256-{HASH} sha256-{HASH}"), "corrupt"),
    "index is null": (changed(index=None), "corrupt"),
    "index is too large": (cut_index(bytes=2**40), "corrupt"),
    "index has other bytes": (cut_index(bytes=11), "corrupt"),
    "index without parts": (cut_index(parts=[]), "corrupt"),
} | {
    f"name {name!r}": (part_changed(file=name), "corrupt")
    for name in (
        "",
        ".",
        "..",
        "...",
        "../up",
        "a/b",
        "/etc/passwd",
        "..\\up",
        "C:\\x",
        "https://elsewhere.example/x",
        "//elsewhere.example/x",
        "new\nline",
        "\0",
        "\x7f",
        "\x9b2J",
        "\u2028",
        "\ud800",
        "x" * 256,
        7,
        None,
        ["x"],
    )
}


def test_hostile_indexes(loader: Loader, three: Split) -> None:
    """Each is refused before anything but it is asked for."""
    for label, (change, code) in HOSTILE.items():
        index = json.loads(three.text)
        change(index)
        deployed = deploy(loader, json.dumps(index).encode(), three.files)
        loader.site.requests.clear()
        result = loader.load(deployed.url)
        assert result["error"]["code"] == code, label
        paths = {path for path, _ in loader.site.requests if not path.startswith("/web/")}
        assert paths == {deployed.url}, label


def test_hostile_sizes(loader: Loader, three: Split) -> None:
    """Parts that come to more than may be loaded, however the sum is hidden."""
    for skip in (0, 2**40 - 10):
        index = json.loads(three.text)
        added = {"file": "x", "bytes": 2**40, "skip": skip, "integrity": f"sha256-{HASH}"}
        index["shrink"]["parts"].append(added)
        index["shrink"]["bytes"] += 2**40 - skip
        assert loader.fails(deploy(loader, json.dumps(index).encode(), {}).url) == "unsupported"
    deployed = deploy_split(loader, three)
    assert loader.fails(deployed.url, maxBytes=three.index["shrink"]["decoded_bytes"] - 1) == "unsupported"
    index = json.loads(three.text)
    index["shrink"]["decoded_bytes"] -= 1
    assert loader.fails(deploy(loader, json.dumps(index).encode(), three.files).url) == "corrupt"


@pytest.mark.parametrize(
    "text",
    [b"[]", b"null", b"7", b'"x"', b'{"shrink": {}, "shrink": {}}', b"\xff{}", b"[" * 100_000, b'{"a":' * 50_000],
)
def test_what_is_no_index(loader: Loader, text: bytes) -> None:
    assert loader.fails(deploy(loader, text, {}).url) == "corrupt"


# --- shards of others ------------------------------------------------------------------------------------------


def foreign(map_changes: Mapping[str, str | None] = {}, **metadata: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Hugging Face's convention: plain files, and a map from each tensor to its own; not in their order."""
    rng = np.random.default_rng(5)
    tensors = {name: rng.standard_normal((40, 30), np.float32) for name in "abcd"}
    files = {
        "model-00001-of-00002.safetensors": save({name: tensors[name] for name in "ac"}),
        "model-00002-of-00002.safetensors": save({name: tensors[name] for name in "bd"}),
    }
    first, second = files
    weight_map = {"a": first, "b": second, "c": first, "d": second, **map_changes}
    index = {"metadata": metadata, "weight_map": {k: v for k, v in weight_map.items() if v is not None}}
    files["whole"] = save(tensors)
    return index, files


@pytest.mark.parametrize("metadata", [{"total_size": 19_200}, {}, {"total_size": "much"}])
def test_shards_of_others(loader: Loader, tmp_path: Path, metadata: dict[str, Any]) -> None:
    index, files = foreign(**metadata)
    result = loader.load(deploy(loader, json.dumps(index).encode(), files).url, cache=True)
    expected = sorted(in_python(tmp_path, files["whole"]), key=lambda entry: str(entry["name"]))
    assert result.get("tensors") == expected, result.get("error")
    progress_of(result)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"e": "model-00001-of-00002.safetensors"}, "e"),
        ({"b": "model-00001-of-00002.safetensors"}, "b"),
        ({"c": None}, "c"),
    ],
)
def test_an_index_of_others_must_be_right(loader: Loader, changes: dict[str, str | None], tensor: str) -> None:
    index, files = foreign(changes)
    error = loader.load(deploy(loader, json.dumps(index).encode(), files).url)["error"]
    assert error["code"] == "corrupt"
    assert error["message"].startswith(f'tensor "{tensor}": ')


def test_faults_of_shards_of_others(loader: Loader) -> None:
    index, files = foreign()
    text = json.dumps(index).encode()
    second = "model-00002-of-00002.safetensors"
    for answer, code in (
        (status(404), "http"),
        (whole(files[second][:-1]), "truncated"),
        (whole(files[second][:50]), "truncated"),
        (whole(WEB_PAGE, content_type="text/html"), "http"),
    ):
        deployed = deploy(loader, text, files)
        deployed.put(second, answer)
        error = loader.load(deployed.url)["error"]
        assert error["code"] == code
        assert error["message"].startswith(f"{second}: ")
    assert loader.fails(deploy(loader, text, files).url, maxBytes=19_199) == "unsupported"
    weight_maps: list[Any] = [{}, [], {"a": "../x"}, {"a": 7}]
    for weight_map in weight_maps:
        assert loader.fails(deploy(loader, json.dumps({"weight_map": weight_map}).encode(), {}).url) == "corrupt"
