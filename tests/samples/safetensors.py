from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import shrink
from shrink.model import Model, Source, Tensor
from tests.containers import around, packed_parts, packed_whole, parts, plain, whole, with_metadata
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


def _plain(**tensors: tuple[str, list[int], list[int]]) -> dict[str, Any]:
    return {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}


Change = Callable[[dict[str, Any]], object]


def damaged_packed(good: bytes) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """Packed files that are none, by what is wrong: label, file, words of the error."""
    said, body = packed_parts(good)
    _, held = parts(good)
    end = 4 + int.from_bytes(held[:4], "little")
    deflated, text = held[4:end], zlib.decompress(held[4:end])

    def behind(stream: bytes, length: int | None = None) -> bytes:
        return around((len(stream) if length is None else length).to_bytes(4, "little") + stream + body)

    # What a packed file holds.
    two = {name: {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n, name in enumerate("ab")}
    yield "nothing", whole(with_metadata({"version": 2}, {}), b""), ("nothing else",)
    yield "two", whole(with_metadata({"version": 2}, two), b"ab"), ("nothing else",)
    yield "other", whole(with_metadata({"version": 2}, {"a": two["a"]}), b"a"), ("nothing else",)
    yield "version-3", around(held, 3), ("version 3",)
    yield "empty", around(b""), ("longer",)
    yield "no-length", around(b"\2\0\0"), ("longer",)
    yield "length-over", around(len(held).to_bytes(4, "little") + held[4:]), ("longer",)
    yield "length-huge", around(b"\xff\xff\xff\xff" + held[4:]), ("longer",)
    yield "length-short", behind(deflated, len(deflated) - 1), ("cut",)
    yield "length-zero", behind(deflated, 0), ("cut",)
    yield "length-long", behind(deflated, len(deflated) + 1), ("after the end",)
    yield "trailing", behind(deflated + b"!"), ("after the end",)
    yield "checksum", behind(deflated[:-1] + bytes([deflated[-1] ^ 1])), ("damaged",)
    yield "not-zlib", behind(text), ("damaged",)
    yield "gzip", behind(gzip.compress(text)), ("damaged",)
    yield "bomb", packed_whole(text + b" " * (1 << 24), body), ("believable",)
    # The packed header.
    yield "utf-16", packed_whole(text.decode().encode("utf-16"), body), ("not valid JSON",)
    yield "not-json", packed_whole(b"{oops}", body), ("not valid JSON",)
    yield "a-list", packed_whole([1], body), ("not a JSON object",)
    yield "key-twice", packed_whole(b'{"source":"npz",' + text[1:], body), ("twice",)
    yield "in-packed", packed_whole(good[8 : good.index(held)], body), ("no list of tensors",)
    yield "data-cut", packed_whole(said, body[:-1]), ("bytes",)
    yield "data-over", packed_whole(said, body + b"!"), ("bytes",)

    def header(label: str, change: Change, *words: str) -> tuple[str, bytes, tuple[str, ...]]:
        changed = json.loads(text)
        change(changed)
        return label, packed_whole(changed, body), words

    def row(label: str, at: int, value: Any, *words: str, name: str = "l1/W") -> tuple[str, bytes, tuple[str, ...]]:
        def change(said: dict[str, Any]) -> None:
            found = next(row for row in said["tensors"] if row[3] == name)
            found[at : at + 1] = [value]

        return header(label, change, *words)

    yield header("no-tensors", lambda m: m.pop("tensors"), "no list of tensors")
    yield header("tensors-object", lambda m: m.update(tensors={}), "no list of tensors")
    yield header("row-object", lambda m: m["tensors"].append({}), "row")
    yield header("row-text", lambda m: m["tensors"].append("abcde"), "row")
    yield header("row-null", lambda m: m["tensors"].append(None), "row")
    yield header("row-short", lambda m: m["tensors"][0].__delitem__(slice(4, None)), "row")
    yield header("row-long", lambda m: m["tensors"][0].append(1), "row")
    yield header("name-twice", lambda m: m["tensors"].append([0, 0, [0], "N", "U8"]), "twice")
    yield header("source-escapes", lambda m: m.update(source="\x1b[31mnpz"), "wrong type")
    yield header("no-state", lambda m: m.pop("state"), "wrong type")
    yield header("state-unknown", lambda m: m["state"].append("ghost"), "ghost")
    value: Any
    for label, value in (("number", 5), ("null", None), ("list", ["a"])):
        yield row(f"name-{label}", 3, value, "name")
    yield row("name-empty", 3, "", "empty")
    yield row("name-climbs", 3, "../../x", "climbs")
    yield row("name-control", 3, "a\x1b[2J", "control characters")
    for label, value in (("negative", -1), ("true", True), ("text", "8"), ("null", None), ("part", 7.5)):
        yield row(f"size-{label}", 1, value, "whole number", name="N")
    yield row("size-other", 1, 9, "fit", name="N")
    yield row("size-huge", 1, 1 << 60, "bytes")
    for label, value in (("text", "3"), ("number", 3), ("null", None), ("true", [True]), ("part", [1.5])):
        yield row(f"shape-{label}", 2, value, "shape", name="N")
        yield row(f"decoded-shape-{label}", 2, value, "shape")
    yield row("shape-negative", 2, [-1, -1], "shape", name="N")
    yield row("shape-overflows", 2, [1 << 47, 1 << 47], "shape", name="N")
    yield row("shape-empty-but-huge", 2, [0, 1 << 47, 1 << 47], "shape", name="empty")
    yield row("decoded-shape-huge", 2, [1600000, 1600000], "claim")
    yield row("dtype-odd", 4, "F7", "F7", name="N")
    yield row("dtype-float8", 4, "F8_E4M3", "F8_E4M3", name="half")
    yield row("dtype-list", 4, ["I64"], "not supported", name="N")
    yield row("decoded-dtype-odd", 4, "F7", "dtype")
    yield row("crc-other", 0, 1, "CRC", name="N")
    yield row("crc-text", 0, "1", "CRC", name="N")
    for label, value in (("null", None), ("empty", []), ("text", "cast.1"), ("odd", ["cast.1"])):
        yield row(f"steps-{label}", 5, value, "step")
    yield row("step-unknown", 5, [["run.1", {}], ["cast.1", {"from": "F32"}]], "run.1")


def damaged(folder: Path) -> Iterator[Damaged]:
    packed = make(folder).read_bytes()
    good = plain(packed)
    header, body = parts(good)

    def put(label: str, data: bytes, *words: str) -> Damaged:
        path = folder / f"{label}.safetensors"
        path.write_bytes(data)
        return Damaged(label, path, words)

    def meta(label: str, change: Change, *words: str) -> Damaged:
        """The sample with its metadata changed, and its CRC made to fit: damage with intent."""
        changed = json.loads(json.dumps(header))
        said = json.loads(changed["__metadata__"]["shrink"])
        change(said)
        text = json.dumps(said, ensure_ascii=False)
        changed["__metadata__"]["shrink"] = text
        changed["__metadata__"]["shrink.crc32"] = f"{zlib.crc32(text.encode()):08x}"
        return put(label, whole(changed, body), *words)

    def steps(label: str, chain: list[Any], *words: str) -> Damaged:
        return meta(label, lambda m: m["tensors"]["l1/W"].update(steps=chain), "l1/W", *words)

    for label, data, words in damaged_packed(packed):
        yield put(f"packed-{label}", data, *words)
    yield put("empty-file", b"", "empty")
    yield put("seven-bytes", b"\1\2\3\4\5\6\7", "safetensors")
    yield put("truncated-header", good[:40], "safetensors")
    yield put("truncated-body", good[:-10], "safetensors")
    yield put("trailing-bytes", good + b"xxxx", "safetensors")
    yield put("huge-header", (1 << 62).to_bytes(8, "little") + b"{}" * 50, "safetensors")
    yield put("not-json", whole(b"{oops}  ", b""), "safetensors")
    yield put("a-list", whole([1, 2], b""), "safetensors")
    yield put("overlap", whole(_plain(a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])), bytes(6)), "safetensors")
    yield put("hole", whole(_plain(a=("U8", [4], [0, 4]), b=("U8", [4], [6, 10])), bytes(10)), "safetensors")
    yield put("past-the-end", whole(_plain(a=("U8", [400], [0, 400])), bytes(10)), "safetensors")
    yield put("shape-lies", whole(_plain(a=("F32", [400], [0, 4])), bytes(4)), "safetensors")
    yield put("ten-terabytes", whole(_plain(a=("F32", [1600000, 1600000], [0, 4])), bytes(4)), "safetensors")
    yield put("negative-shape", whole(_plain(a=("U8", [-4], [0, 4])), bytes(4)), "safetensors")
    yield put("odd-dtype", whole(_plain(a=("F7", [4], [0, 4])), bytes(4)), "safetensors")
    yield put("float8", whole(_plain(a=("F8_E4M3", [4], [0, 4])), bytes(4)), "a", "F8_E4M3")
    twice = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    yield put("twice", whole(twice, bytes(2)), "twice")
    yield put("climbing", whole(_plain(**{"../../x": ("U8", [2], [0, 2])}), bytes(2)), "climbs")
    yield put("control", whole(_plain(**{"a\x1b[2J": ("U8", [2], [0, 2])}), bytes(2)), "control characters")
    flipped = bytearray(good)
    flipped[len(good) - len(body) + header["l1/b"]["data_offsets"][0]] ^= 16
    yield put("flipped-body-bit", bytes(flipped), "CRC")
    at = good.index(b"source")
    flipped = bytearray(good)
    flipped[at] ^= 1
    yield put("flipped-metadata-bit", bytes(flipped), "damaged")
    renamed = json.loads(json.dumps(header))
    renamed["__metadata__"]["shrinj"] = renamed["__metadata__"].pop("shrink")
    yield put("flipped-key-bit", whole(renamed, body), "damaged")
    yield put("seventy-dimensions", whole(_plain(a=("U8", [1] * 70, [0, 1])), bytes(1)), "a", "shape")
    yield meta("source-escapes", lambda m: m.update(source="\x1b[31mnpz\nok"), "wrong type")
    yield meta("shape-empty-but-huge", lambda m: m["tensors"]["l1/W"].update(shape=[0, 1 << 47, 1 << 47]), "shape")
    yield steps("scale-huge", [["codebook.1", {"table": "eightbit", "scale": 10**400}]], "scale")
    yield steps("table-huge", [["codebook.1", {"table": [10**400], "scale": 1.0}]], "table")
    yield meta("version-3", lambda m: m.update(version=3), "version 3")
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
    (folder / "shard.safetensors").write_bytes(whole(_plain(a=("U8", [2], [0, 2])), bytes(2)))
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
    yield put("attributes-list", whole(shorter, body[:start] + blob), "attributes")
