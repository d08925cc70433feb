"""The two forms of a container, each made of the other by hand: shrink has no part in what tests expect of it."""

from __future__ import annotations

import json
import zlib
from typing import Any

Header = dict[str, Any]


def parts(data: bytes) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: Any, body: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return len(head).to_bytes(8, "little") + head + body


def with_metadata(said: Header, specs: Header) -> Header:
    text = json.dumps(said, ensure_ascii=False)
    return {"__metadata__": {"shrink": text, "shrink.crc32": f"{zlib.crc32(text.encode()):08x}"}, **specs}


def is_packed(data: bytes) -> bool:
    said: Header = json.loads(parts(data)[0]["__metadata__"]["shrink"])
    return bool(said["version"] == 2)


def packed_parts(data: bytes) -> tuple[Header, bytes]:
    """The packed header and the data of a packed file."""
    _, held = parts(data)
    end = 4 + int.from_bytes(held[:4], "little")
    return json.loads(zlib.decompress(held[4:end])), held[end:]


def packed_whole(said: Any, body: bytes) -> bytes:
    """A packed file of this packed header, as text or as what it says."""
    text = said if isinstance(said, bytes) else json.dumps(said, ensure_ascii=False).encode()
    deflated = zlib.compress(text, 9)
    return around(len(deflated).to_bytes(4, "little") + deflated + body)


def around(held: bytes, version: int = 2) -> bytes:
    """A packed file whose one tensor is this."""
    spec = {"dtype": "U8", "shape": [len(held)], "data_offsets": [0, len(held)]}
    return whole(with_metadata({"version": version}, {"shrink.packed": spec}), held)


def plain(data: bytes) -> bytes:
    """The same container in version 1."""
    if not is_packed(data):
        return data
    said, body = packed_parts(data)
    specs, tensors, end = {}, {}, 0
    for crc, size, shape, name, dtype, *steps in said["tensors"]:
        stored = {"dtype": "U8", "shape": [size]} if steps else {"dtype": dtype, "shape": shape}
        specs[name] = {**stored, "data_offsets": [end, end + size]}
        encoded = {"dtype": dtype, "shape": shape, "steps": steps[0]} if steps else {}
        tensors[name] = {"crc32": crc, **encoded}
        end += size
    head = json.dumps(with_metadata({"version": 1, **said, "tensors": tensors}, specs), ensure_ascii=False).encode()
    # Padded, so that a CRC of a digit more changes no size.
    return whole(head + b" " * (-len(head) % 64), body)


def packed_form(data: bytes) -> tuple[Header, bytes]:
    """What the packed header of a container in version 1 would say, and its data."""
    header, body = parts(data)
    said = json.loads(header.pop("__metadata__")["shrink"])
    rows = []
    for name, spec in header.items():
        start, end = spec["data_offsets"]
        tensor = {**spec, **said["tensors"][name]}
        rows.append([tensor["crc32"], end - start, tensor["shape"], name, tensor["dtype"]])
        rows[-1] += [tensor["steps"]] if "steps" in tensor else []
    return {"source": said["source"], "state": said["state"], "tensors": rows}, body
