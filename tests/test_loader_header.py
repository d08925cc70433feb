"""The loader on headers: those that nest as deep as they can, and packed ones.

An error has a name, and no stack overflows.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shrink
from shrink.progress import silent
from shrink.split import join, plan
from tests import containers
from tests.faulty_server import cut, ranged, whole
from tests.test_loader import assert_holds, flipped, in_file, make, sri
from tests.web import Loader, in_python, loader_in_chromium
from tests.web.parts import INDEX, STEM, deploy, progress_of

GOLDEN = Path(__file__).parent / "golden" / "container" / "version2.safetensors"
SPEC = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


def file(header: str) -> bytes:
    text = header.encode()
    return containers.whole(text + b" " * (-len(text) % 8), b"")


def described(metadata: str) -> str:
    """A header in which shrink's own metadata is this text, with its checksum right."""
    return json.dumps({"__metadata__": {"shrink": metadata, "shrink.crc32": f"{zlib.crc32(metadata.encode()):08x}"}})


def arrays(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def refused(loader: Loader, data: bytes) -> None:
    error = loader.load(loader.site.put(whole(data)), tries=1)["error"]
    assert error["code"] == "corrupt", error
    assert len(error["message"]) < 300


@pytest.mark.parametrize("depth", [20_000, 200_000])
@pytest.mark.parametrize("nest", [arrays, objects])
def test_a_deep_header_has_a_named_error(loader: Loader, nest: Callable[[int], str], depth: int) -> None:
    deep = nest(depth)
    spec = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for header in (
        deep,
        f'{{"x":{deep}}}',
        f'{{"x":{spec},"__metadata__":{deep}}}',
        f'{{"x":{spec},"__metadata__":{{"shrink":{deep}}}}}',
        described(f'{{"version":1,"source":"onnx","state":[],"tensors":{{"x":{deep}}}}}'),
        described(f'{{"version":1,"source":"onnx","state":[],"tensors":{{"x":{{"steps":[["cast.1",{deep}]]}}}}}}'),
    ):
        refused(loader, file(header))
    row = '[0,0,{},"x","F32"]'
    for packed in (deep, *(f'{{"source":"a","state":[],"tensors":{x}}}' for x in (deep, f"[{deep}]", f"[[{deep}]]"))):
        refused(loader, containers.packed_whole(packed.encode(), b""))
    for value in (row.format(deep), f'[0,0,[0],"x","F32",[["cast.1",{deep}]]]'):
        refused(loader, containers.packed_whole(f'{{"source":"a","state":[],"tensors":[{value}]}}'.encode(), b""))


def test_what_is_deep_beside_it_does_no_harm(loader: Loader) -> None:
    """After all that the page still loads an honest file."""
    data = file(json.dumps({"x": SPEC})) + bytes(8)
    (tensor,) = loader.load(loader.site.put(whole(data)))["tensors"]
    assert (tensor["name"], tensor["shape"], tensor["bytes"]) == ("x", [2], 8)


def test_a_header_may_be_long(loader: Loader) -> None:
    """Some ten thousand tensors give a text of shrink's own with more characters than a stack has room for."""
    header = json.dumps({"__metadata__": {"note": 'a"\\: ' * 3_000_000}, "x": SPEC})
    loaded = loader.load(loader.site.put(whole(file(header) + bytes(8))), tries=1)
    assert "error" not in loaded, loaded


# --- packed files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    data = make(tmp_path_factory.mktemp("packed"), 1, "int8", 50)
    assert containers.is_packed(data)
    return data


def test_a_packed_file_gives_what_the_plain_one_gives(loader: Loader, packed: bytes, tmp_path: Path) -> None:
    plain = containers.plain(packed)
    assert not containers.is_packed(plain)
    loaded = [loader.load(loader.site.put(whole(data))) for data in (packed, plain)]
    for result in loaded:
        assert_holds(result, packed, tmp_path)
    assert {event["total"] for result in loaded for event in result["progress"]} == {64_008}


def test_the_golden_file(loader: Loader, tmp_path: Path) -> None:
    data = GOLDEN.read_bytes()
    result = loader.load(loader.site.put(whole(data)))
    assert result.get("tensors") == in_python(tmp_path, data), result.get("error")
    assert result["attributes"] == {"note": "覚え書き"}
    assert result["graph"] == hashlib.sha256(b"not really a graph").hexdigest()


def test_names_that_javascript_treats_otherwise(loader: Loader, tmp_path: Path) -> None:
    """Numbers come first in its objects, and some names mean something there."""
    names = ["b", "10", "9", "__proto__", "__metadata__", "constructor", "length", "0"]
    rows = [[0, 4, [1], name, "F32"] for name in names]
    body = b"".join(struct.pack("<f", n) for n in range(len(names)))
    for n, row in enumerate(rows):
        row[0] = zlib.crc32(body[4 * n : 4 * n + 4])
    data = containers.packed_whole({"source": "a", "state": [], "tensors": rows}, body)
    result = loader.load(loader.site.put(whole(data)))
    assert [tensor["name"] for tensor in result.get("tensors", [])] == names, result
    assert result["tensors"] == in_python(tmp_path, data)


def test_every_flipped_bit_before_the_data(loader: Loader, packed: bytes, tmp_path: Path) -> None:
    """Of every third byte one bit, another in each: an error, or the very same tensors."""
    _, body = containers.packed_parts(packed)
    wrong = 0
    places = range(0, len(packed) - len(body), 3)
    for at in places:
        data = packed[:at] + bytes([packed[at] ^ 1 << at % 8]) + packed[at + 1 :]
        result = loader.load(loader.site.put(whole(data)), tries=1)
        wrong += "error" in result
        if "error" not in result:
            assert_holds(result, packed, tmp_path)
    assert wrong > 0.9 * len(places)


def test_a_packed_file_comes_in_pieces(loader: Loader, packed: bytes, tmp_path: Path) -> None:
    """Broken off at every stage of the header, and with a hash of the whole."""
    header, _ = containers.parts(packed)
    outer = int.from_bytes(packed[:8], "little")
    for at in (3, 8, 8 + outer, 10 + outer, 12 + outer, 40 + outer, in_file(packed, "layer 0"), len(packed) - 1):
        for first in (cut(packed, at), ranged(packed, '"tag"', breaks_after=at)):
            path = loader.site.put(first, ranged(packed, '"tag"'))
            assert_holds(loader.load(path, integrity=sri(packed)), packed, tmp_path)
        assert loader.fails(loader.site.put(whole(packed[:at])), tries=1) == "truncated"
    assert header["shrink.packed"]["data_offsets"][1] == len(packed) - 8 - outer


def test_the_packed_header_tells_what_is_cached(loader: Loader, packed: bytes, tmp_path: Path) -> None:
    other = make(tmp_path, 2, "int8", 50)
    assert containers.is_packed(other)
    # From the second answer only the header can be used: what follows it is damaged.
    path = loader.site.put(whole(packed), whole(flipped(packed, len(packed) - 1)), whole(other))
    for expected in (packed, packed, other):
        assert_holds(loader.load(path, cache=True), expected, tmp_path)
    (key,) = [url for url in loader.page.evaluate("cached()") if path in url]
    assert "header-" in key


def test_a_packed_file_in_parts(loader: Loader, tmp_path: Path) -> None:
    """Split and joined as any, byte for byte, and loaded from its parts."""
    data = make(tmp_path, 4, "int4", 1500)
    assert len(data) > 100_000
    source = tmp_path / f"{STEM}.safetensors"
    # By hand, as a file of this size is not packed.
    packed = containers.packed_whole(*containers.packed_form(data))
    source.write_bytes(packed)
    plan(source, limit=30_000, output=tmp_path / "parts").write(silent)
    files = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert len(files) > 4
    result = loader.load(deploy(loader, files[INDEX], files).url)
    assert_holds(result, packed, tmp_path)
    progress_of(result)
    (joined,) = join(tmp_path / "parts" / INDEX, tmp_path / "joined.safetensors")
    assert joined.read_bytes() == packed
    in_parts = {t.name: t.array.tobytes() for t in shrink.load(tmp_path / "parts" / INDEX).tensors}
    assert in_parts == {t.name: t.array.tobytes() for t in shrink.load(source).tensors}


def test_bombs_in_a_packed_header(loader: Loader) -> None:
    """Half a megabyte that would be half a gigabyte."""
    deflate = zlib.compressobj(9)
    bomb = b"".join(deflate.compress(b" " * (1 << 24)) for _ in range(32)) + deflate.flush()
    assert len(bomb) < 550_000
    for stream in (bomb, bomb[:-9]):
        refused(loader, containers.around(len(stream).to_bytes(4, "little") + stream))
