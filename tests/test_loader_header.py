"""The loader on headers that nest as deep as they can: an error with a name, never a stack that overflows."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator

import pytest

from tests.faulty_server import whole
from tests.web import Loader, loader_in_chromium

SPEC = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


def file(header: str) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def described(metadata: str) -> str:
    """A header in which shrink's own metadata is this text, with its checksum right."""
    return json.dumps({"__metadata__": {"shrink": metadata, "shrink.crc32": f"{zlib.crc32(metadata.encode()):08x}"}})


def arrays(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


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
        error = loader.load(loader.site.put(whole(file(header))), tries=1)["error"]
        assert error["code"] == "corrupt", error
        assert len(error["message"]) < 300


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
