from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import shrink
from shrink.model import Model, Source, Tensor
from tests.samples import Damaged


def make(folder: Path) -> Path:
    """A container of ours: some tensors encoded, some plain, all with their CRC."""
    rng = np.random.default_rng(5)
    tensors = (
        Tensor.of("l1/W", rng.standard_normal((40, 30)).astype("f4")),
        Tensor.of("l1/b", rng.standard_normal(40).astype("f4")),
        Tensor.of("層/W", rng.standard_normal((16, 8, 3, 3))),
        Tensor.of("half", rng.standard_normal((3, 3)).astype("f2")),
        Tensor.of("N", np.array(3, "i8")),
        Tensor.of("flag", np.array([True, False])),
        Tensor.of("empty", np.empty((0, 5), "f4")),
        Tensor.of("moment", rng.standard_normal((8, 8)).astype("f4"), "state"),
    )
    path = folder / "生成器.safetensors"
    model = Model(tensors, Source("safetensors", path, 0), {"note": "ノート"})
    shrink.save(shrink.quantize(model, "int8", keep_all=True), path)
    return path


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _whole(header: Any, body: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return len(head).to_bytes(8, "little") + head + body


def _plain(**tensors: tuple[str, list[int], list[int]]) -> dict[str, Any]:
    return {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}


def damaged(folder: Path) -> Iterator[Damaged]:
    good = make(folder).read_bytes()
    header, body = _parts(good)

    def put(label: str, data: bytes, *words: str) -> Damaged:
        path = folder / f"{label}.safetensors"
        path.write_bytes(data)
        return Damaged(label, path, words)

    def meta(label: str, change: Callable[[dict[str, Any]], object], *words: str) -> Damaged:
        """The sample with its metadata changed, and its CRC made to fit: damage with intent."""
        changed = json.loads(json.dumps(header))
        said = json.loads(changed["__metadata__"]["shrink"])
        change(said)
        text = json.dumps(said, ensure_ascii=False)
        changed["__metadata__"]["shrink"] = text
        changed["__metadata__"]["shrink.crc32"] = f"{zlib.crc32(text.encode()):08x}"
        return put(label, _whole(changed, body), *words)

    def steps(label: str, chain: list[Any], *words: str) -> Damaged:
        return meta(label, lambda m: m["tensors"]["l1/W"].update(steps=chain), "l1/W", *words)

    yield put("empty-file", b"", "empty")
    yield put("seven-bytes", b"\1\2\3\4\5\6\7", "safetensors")
    yield put("truncated-header", good[:40], "safetensors")
    yield put("truncated-body", good[:-10], "safetensors")
    yield put("trailing-bytes", good + b"xxxx", "safetensors")
    yield put("huge-header", (1 << 62).to_bytes(8, "little") + b"{}" * 50, "safetensors")
    yield put("not-json", _whole(b"{oops}  ", b""), "safetensors")
    yield put("a-list", _whole([1, 2], b""), "safetensors")
    yield put("overlap", _whole(_plain(a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])), bytes(6)), "safetensors")
    yield put("hole", _whole(_plain(a=("U8", [4], [0, 4]), b=("U8", [4], [6, 10])), bytes(10)), "safetensors")
    yield put("past-the-end", _whole(_plain(a=("U8", [400], [0, 400])), bytes(10)), "safetensors")
    yield put("shape-lies", _whole(_plain(a=("F32", [400], [0, 4])), bytes(4)), "safetensors")
    yield put("ten-terabytes", _whole(_plain(a=("F32", [1600000, 1600000], [0, 4])), bytes(4)), "safetensors")
    yield put("negative-shape", _whole(_plain(a=("U8", [-4], [0, 4])), bytes(4)), "safetensors")
    yield put("odd-dtype", _whole(_plain(a=("F7", [4], [0, 4])), bytes(4)), "safetensors")
    yield put("float8", _whole(_plain(a=("F8_E4M3", [4], [0, 4])), bytes(4)), "a", "F8_E4M3")
    twice = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    yield put("twice", _whole(twice, bytes(2)), "twice")
    yield put("climbing", _whole(_plain(**{"../../x": ("U8", [2], [0, 2])}), bytes(2)), "climbs")
    yield put("control", _whole(_plain(**{"a\x1b[2J": ("U8", [2], [0, 2])}), bytes(2)), "control characters")
    flipped = bytearray(good)
    flipped[len(good) - len(body) + header["l1/b"]["data_offsets"][0]] ^= 16
    yield put("flipped-body-bit", bytes(flipped), "CRC")
    at = good.index(b"source")
    flipped = bytearray(good)
    flipped[at] ^= 1
    yield put("flipped-metadata-bit", bytes(flipped), "damaged")
    renamed = json.loads(json.dumps(header))
    renamed["__metadata__"]["shrinj"] = renamed["__metadata__"].pop("shrink")
    yield put("flipped-key-bit", _whole(renamed, body), "damaged")
    yield put("seventy-dimensions", _whole(_plain(a=("U8", [1] * 70, [0, 1])), bytes(1)), "a", "shape")
    yield meta("source-escapes", lambda m: m.update(source="\x1b[31mnpz\nok"), "wrong type")
    yield meta("shape-empty-but-huge", lambda m: m["tensors"]["l1/W"].update(shape=[0, 1 << 47, 1 << 47]), "shape")
    yield steps("scale-huge", [["codebook.1", {"table": "eightbit", "scale": 10**400}]], "scale")
    yield steps("table-huge", [["codebook.1", {"table": [10**400], "scale": 1.0}]], "table")
    yield meta("version-2", lambda m: m.update(version=2), "version 2")
    yield meta("no-parts", lambda m: m.pop("tensors"), "missing")
    yield meta("wrong-parts", lambda m: m.update(state=[1]), "wrong type")
    yield meta("unknown-tensor", lambda m: m["tensors"].update(ghost=m["tensors"]["l1/W"]), "ghost")
    yield meta("not-a-payload", lambda m: m["tensors"].update({"l1/b": m["tensors"]["l1/W"]}), "l1/b", "U8")
    yield meta("wrong-crc", lambda m: m["tensors"]["l1/b"].update(crc32=1), "l1/b", "CRC")
    yield meta("shape-of-text", lambda m: m["tensors"]["l1/W"].update(shape="40"), "l1/W", "shape")
    yield meta("shape-huge", lambda m: m["tensors"]["l1/W"].update(shape=[1 << 40, 1 << 40]), "l1/W", "shape")
    yield meta("shape-ten-terabytes", lambda m: m["tensors"]["l1/W"].update(shape=[1600000, 1600000]), "l1/W", "claim")
    yield meta("shape-other", lambda m: m["tensors"]["l1/W"].update(shape=[40, 31]), "l1/W")
    yield meta("dtype-unknown", lambda m: m["tensors"]["l1/W"].update(dtype="F7"), "l1/W", "dtype")
    yield steps("no-steps", [], "steps")
    yield steps("odd-step", ["cast.1"], "step")
    yield steps("unknown-step", [["run.1", {"code": "import os"}], ["cast.1", {"from": "F32"}]], "run.1")
    yield steps("zstd-bomb", [["zstd.1", {"size": 1 << 50}], ["cast.1", {"from": "F32"}]], "size")

    index = folder / "gone.safetensors.index.json"
    for label, content, words, code in (
        ("index-not-json", "{", ("index",), 3),
        ("index-no-map", '{"weight_map": 5}', ("index",), 3),
        ("index-climbs", '{"weight_map": {"a": "../../etc/passwd"}}', ("outside",), 3),
        ("index-absolute", '{"weight_map": {"a": "/etc/passwd"}}', ("outside",), 3),
        ("index-missing-shard", '{"weight_map": {"a": "nowhere.safetensors"}}', ("nowhere", "missing"), 3),
    ):
        index = folder / f"{label}.safetensors.index.json"
        index.write_text(content)
        yield Damaged(label, index, words, code)
    (folder / "shard.safetensors").write_bytes(_whole(_plain(a=("U8", [2], [0, 2])), bytes(2)))
    index = folder / "promise.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}')
    yield Damaged("index-promise", index, ("b", "promises"))
    (folder / "linked.safetensors").symlink_to("/etc/passwd")
    index = folder / "link.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "linked.safetensors"}}')
    yield Damaged("index-link", index, ("link",))
    at = len(good) - len(body) + header["shrink.attributes"]["data_offsets"][0]
    yield put("flipped-attributes", good[:at] + b"?" + good[at + 1 :], "shrink.attributes", "CRC")
    blob = zlib.compress(b"[]")
    shorter = json.loads(json.dumps(header))
    start = shorter["shrink.attributes"]["data_offsets"][0]
    shorter["shrink.attributes"] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [start, start + len(blob)]}
    said = json.loads(shorter["__metadata__"]["shrink"])
    said["tensors"]["shrink.attributes"]["crc32"] = zlib.crc32(blob)
    text = json.dumps(said)
    shorter["__metadata__"] = {"shrink": text, "shrink.crc32": f"{zlib.crc32(text.encode()):08x}"}
    yield put("attributes-list", _whole(shorter, body[:start] + blob), "attributes")
