from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.samples import Damaged


def make(folder: Path) -> Path:
    rng = np.random.default_rng(7)
    path = folder / "生成器 gen.npz"
    arrays: dict[str, Any] = {
        "l1/W": rng.standard_normal((40, 30)).astype("f4"),
        "l1/b": rng.standard_normal(40).astype("f4"),
        "畳み込み/W": rng.standard_normal((8, 4, 3, 3)).astype(">f4"),
        "wide/W": rng.standard_normal((30, 11)),
        "bn/avg_var": np.ones(40, "f4"),
        "bn/N": np.array(3, "i4"),
        "empty": np.empty((0, 5), "f4"),
        "fortran/W": np.asfortranarray(rng.standard_normal((16, 24)).astype("f4")),
    }
    np.savez_compressed(path, **arrays)
    return path


def damaged(folder: Path) -> Iterator[Damaged]:
    good = make(folder).read_bytes()

    def put(label: str, data: bytes, *words: str) -> Damaged:
        path = folder / f"{label}.npz"
        path.write_bytes(data)
        return Damaged(label, path, words)

    def archive(label: str, members: list[tuple[str, bytes]], *words: str) -> Damaged:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            for name, data in members:
                z.writestr(zipfile.ZipInfo(name), data)
        return put(label, buffer.getvalue(), *words)

    def npy(shape: str = "(2, 2)", descr: str = "<f4", values: bytes = bytes(16)) -> bytes:
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values

    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)

    yield put("truncated", good[: len(good) // 2], "zip")
    yield put("not-a-zip", b"PK\x03\x04 no zip at all", "zip")
    yield put("empty-file", b"", "empty")
    yield archive("pickled", [("obj.npy", pickled.getvalue())], "obj", "pickled")
    yield archive("ten-terabytes", [("W.npy", npy("(1600000, 1600000)"))], "W", "claims")
    yield archive("negative", [("W.npy", npy("(-1, 2)"))], "W", "shape")
    yield archive("short-values", [("W.npy", npy(values=bytes(12)))], "W", "claims")
    yield archive("no-header", [("W.npy", b"\x93NUMPY\x01\x00\xff\xff{")], "W", "damaged")
    yield archive("seventy-dimensions", [("W.npy", npy("(" + "1, " * 70 + ")", values=bytes(4)))], "W", "shape")
    yield archive("empty-but-huge", [("W.npy", npy(f"(0, {2**62}, {2**62})", values=b""))], "W", "shape")
    yield archive("unfinished-header", [("W.npy", npy("(2, 2"))], "W", "damaged")
    yield archive("deep-header", [("W.npy", npy("-" * 9000))], "W", "damaged")
    yield archive("climbing", [("../../x.npy", npy())], "climbs")
    yield archive("absolute", [("/etc/x.npy", npy())], "climbs")
    yield archive("control", [("a\x1b[31m.npy", npy())], "control characters")
    yield archive("text-dtype", [("W.npy", npy(descr="<U4", values=bytes(64)))], "W", "not supported")
    yield archive("not-an-array", [("readme.txt", b"hello")], "readme.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield archive("duplicate", [("W.npy", npy()), ("W.npy", npy())], "W", "twice")
