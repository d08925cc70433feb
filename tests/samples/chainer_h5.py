from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from tests.samples import Damaged
from tests.samples._hdf5 import Builder


def make(folder: Path) -> Path:
    rng = np.random.default_rng(11)
    path = folder / "生成器 gen.h5"
    arrays: dict[str, Any] = {
        "l1/W": rng.standard_normal((40, 30)).astype("f4"),
        "l1/b": rng.standard_normal(40).astype("f4"),
        "畳み込み/W": rng.standard_normal((8, 4, 3, 3)).astype(">f4"),
        "wide/W": rng.standard_normal((30, 11)),
        "half/W": rng.standard_normal((7, 5)).astype("f2"),
        "bn/avg_var": np.ones(40, "f4"),
        "bn/N": np.array(3, "i4"),
        "bn/trained": np.array(True),
        "empty": np.empty((0, 5), "f4"),
    }
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            packing = {"compression": 4} if values.size > 1 else {}
            file.create_dataset(name, data=values, **packing)
        file.create_dataset("chunked/W", data=np.arange(35, dtype="f4").reshape(5, 7), chunks=(2, 3), fletcher32=True)
        file.create_dataset("lzf/W", data=np.zeros((64, 64), "f4"), compression="lzf", shuffle=True)
        # What save_hdf5 makes of None, and of a link without parameters.
        file.create_dataset("l1/initial", data=h5py.Empty("f"))
        file.create_group("activation")
    return path


def damaged(folder: Path) -> Iterator[Damaged]:
    files = Builder(folder, lambda file: file.create_dataset("W", data=np.zeros(4, "f4")))
    good = make(folder).read_bytes()
    for share in (1, 4, 7):
        yield files.put(f"truncated-{share}", good[: len(good) * share // 8], "HDF5")
    yield files.put("one-byte-short", good[:-1], "HDF5")
    yield files.put("signature-only", good[:8], "HDF5")
    yield files.put("nothing-after-the-signature", good[:8] + bytes(2000), "HDF5")
    yield files.put("text-after-the-signature", good[:8] + b"no HDF5 at all " * 100, "HDF5")
    yield files.put("not-hdf5", b"no HDF5 at all", "HDF5")
    other = folder / "other.h5"
    with h5py.File(other, "w") as file:
        file["W"] = np.zeros(4, "f4")

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(other, "W", (4,))
        file.create_virtual_dataset("virtual", layout)

    def external(file: Any) -> None:
        file.create_dataset("outside", (100,), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])

    def huge(file: Any) -> None:
        file.create_dataset("huge", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024))

    def bomb(file: Any) -> None:
        # Chunks whose compressed bytes are few, in a dataset that claims many more of them.
        file.create_dataset("bomb", (1 << 30,), "f4", chunks=(1 << 16,), compression=9)[: 1 << 16] = 1

    def many_fills(file: Any) -> None:
        for i in range(20):
            file.create_dataset(f"fill{i:02}", (1 << 20,), "u1", chunks=(1 << 16,))

    def again(file: Any) -> None:
        file["same"] = file["W"]

    def cycle(file: Any) -> None:
        file.create_group("a")["back"] = file["/"]

    def deep(file: Any) -> None:
        file.create_group("/".join(["g"] * 100))

    def reference(file: Any) -> None:
        file.create_dataset("ref", data=np.array([file["W"].ref], dtype=h5py.ref_dtype))

    def committed(file: Any) -> None:
        file["type"] = np.dtype([("a", "f4"), ("b", "i4")])

    def soft(file: Any) -> None:
        file["soft"] = h5py.SoftLink("/W")

    def abroad(file: Any) -> None:
        file["abroad"] = h5py.ExternalLink(str(other), "/W")

    def texts(file: Any) -> None:
        file.create_dataset("texts", data=["a", "b"], dtype=h5py.string_dtype())

    def attribute(file: Any) -> None:
        file.attrs.create("latin", b"caf\xe9", dtype="S4")

    def attribute_reference(file: Any) -> None:
        file.attrs["ref"] = file["W"].ref

    def name(value: bytes | str) -> Callable[[Any], None]:
        return lambda file: file.create_dataset(value, data=np.zeros(4, "f4"))

    def of(dtype: object) -> Callable[[Any], None]:
        return lambda file: file.create_dataset("odd", data=np.zeros(4, dtype))  # type: ignore[call-overload]

    def scaled(file: Any) -> None:
        file.create_dataset("scaled", data=np.zeros(64, "i4"), scaleoffset=4)

    yield files.changed("virtual", virtual, "virtual", "elsewhere")
    yield files.changed("external-storage", external, "outside", "another file")
    yield files.changed("external-link", abroad, "abroad", "link to another file")
    yield files.changed("soft-link", soft, "soft", "never followed")
    yield files.changed("four-terabytes", huge, "huge", "claim")
    yield files.changed("bomb", bomb, "bomb", "claim")
    yield files.changed("many-fills", many_fills, "fill", "claim")
    yield files.changed("same-object", again, "twice")
    yield files.changed("cycle", cycle, "a/back", "twice")
    yield files.changed("deep", deep, "nested")
    yield files.changed("reference", reference, "ref", "references")
    yield files.changed("named-type", committed, "type", "records")
    yield files.changed("texts", texts, "texts", "text")
    yield files.changed("objects", lambda f: f.create_dataset("o", (2,), h5py.vlen_dtype("f4")), "varying")
    yield files.changed("records", of([("a", "f4")]), "odd", "records")
    yield files.changed("opaque", of("V3"), "odd", "opaque")
    yield files.changed("complex", of("c8"), "odd", "not supported")
    yield files.changed("enum", of(h5py.enum_dtype({"A": 0, "B": 1})), "odd", "not supported")
    yield files.changed("long-double", of(np.longdouble), "odd", "not supported")
    yield files.changed("filter", scaled, "scaled", "filter 6")
    yield files.changed("latin-attribute", attribute, "UTF-8")
    yield files.changed("attribute-reference", attribute_reference, "references")
    yield files.changed("climbing", name("../x"), "climbs")
    yield files.changed("control", name("a\x1b[31m"), "control characters")
    yield files.changed("long-name", name("n" * 2000), "2000 characters")
    yield files.changed("not-utf-8", name(b"caf\xe9"), "UTF-8")
