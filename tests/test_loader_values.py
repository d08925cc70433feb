"""The loader's values in a real browser are Python's, bit for bit; what Python refuses, the loader refuses."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shrink
from shrink.coders import rans
from shrink.errors import BadInput
from shrink.model import DTYPES, Model, Quantized, Source, Tensor
from shrink.steps import Step, decode, groups, matrix
from tests import containers, test_steps
from tests.command import run
from tests.faulty_server import whole
from tests.samples import safetensors as sample
from tests.web import WEB, Loader, build, container, in_python, loader_in_chromium
from tests.zoo import NETWORKS

GOLDEN = sorted((Path(__file__).parent / "golden" / "steps").glob("*.json"))
SIZE_BUDGET = 40_000
LATER_BUDGET = 10_000


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


def assert_bit_equal(loader: Loader, folder: Path, data: bytes) -> None:
    expected = in_python(folder, data)
    result = loader.load(loader.site.put(whole(data)))
    assert result.get("tensors") == expected, result.get("error")
    assert {event["total"] for event in result["progress"]} == {sum(t["bytes"] for t in expected)}


# --- the same bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files(loader: Loader, tmp_path: Path, path: Path) -> None:
    entries = []
    for number, case in enumerate(json.loads(path.read_text())):
        steps = tuple(Step(name, params) for name, params in case["steps"])
        payload = base64.b64decode(case["payload"])
        dtype, shape = DTYPES[case["dtype"]], tuple(case["shape"])
        entries.append(Quantized.of(f"case {number}", dtype, shape, steps, payload))
    assert entries
    assert_bit_equal(loader, tmp_path, container(tmp_path, entries))


def network() -> Model:
    """What a snapshot may hold: weights of several forms, and everything that is none."""
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    arrays = {
        "conv/W": normal(24, 7, 3, 3),
        "conv/b": normal(24),
        "positive/W": np.abs(normal(33, 65)) + 3,
        "dense/kernel:0": normal(70, 130),
        "重み/W": normal(11, 5),
        "e\u0301/\U0001f600": normal(3, 3),
        "double/W": rng.standard_normal((31, 9)),
        "half/W": normal(19, 17).astype("f2"),
        "large/W": normal(300, 700),
        "scalar": np.array(2.5, "f4"),
        "empty/W": np.empty((0, 5), "f4"),
        "zeros/W": np.zeros((40, 10), "f4"),
        "epoch": np.array(2**60 + 1, "i8"),
        "flags": np.array([True, False, True]),
        "bytes": np.arange(9, dtype="u1").reshape(3, 3),
        "counts": np.array([0, 2**64 - 1], "u8"),
        "-1/2": normal(4),
        "__proto__": normal(2, 2),
    }
    tensors = tuple(Tensor.of(name, values) for name, values in arrays.items())
    return Model(tensors, Source("test", Path("network"), 0))


MODES = ("float16", "eightbit", "int8", "int4", "prune", "prune,eightbit", "prune,float16", "prune,int8", "prune,int4")


@pytest.mark.parametrize("level", [None, 3, 12])
def test_every_mode(loader: Loader, tmp_path: Path, level: int | None) -> None:
    for mode in MODES:
        path = tmp_path / "network.safetensors"
        shrink.save(shrink.quantize(network(), mode, keep_all=True), path, level=level)
        assert_bit_equal(loader, tmp_path, path.read_bytes())


def test_the_modes_of_this_test_are_all_modes_and_use_all_steps(tmp_path: Path) -> None:
    """A new mode or step has to come in here."""
    from shrink import quantizers, steps

    assert {name for mode in MODES for name in mode.split(",")} == set(quantizers.modes())
    used = set()
    zeros = set()
    for mode in MODES:
        for level in (None, 3, 12):
            shrink.save(shrink.quantize(network(), mode, keep_all=True), tmp_path / "n.safetensors", level=level)
            for entry in shrink.load(tmp_path / "n.safetensors").tensors:
                if isinstance(entry, Quantized):
                    used |= {step.name for step in entry.steps}
                    zeros |= {step.params["zero"] for step in entry.steps if step.name == "affine.1"}
    # The others are those of calibrated files.
    assert used == {*steps._BYTE_STEPS, *steps._VALUE_STEPS} - {"rans.1", "trellis.1", "grid.1", "fill.1"}
    assert zeros == {True, False}


def test_unquantized_values(loader: Loader, tmp_path: Path) -> None:
    """Also those with which arithmetic goes wrong: every float16, NaNs, infinities, denormals, negative zero."""
    halves = np.arange(1 << 16, dtype="u2").view("f2")
    # What a processor makes of a signalling NaN is its own affair.
    halves = halves[~np.isnan(halves)]
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], "f4")
    arrays = {code: np.arange(-3, 4).astype(dtype) for code, dtype in DTYPES.items()}
    tensors = [Tensor.of(name, values) for name, values in {**arrays, "halves": halves, "odd": odd}.items()]
    assert_bit_equal(loader, tmp_path, container(tmp_path, tensors))
    assert_bit_equal(loader, tmp_path, container(tmp_path, tensors, level=3))


def test_files_of_others(loader: Loader, tmp_path: Path) -> None:
    values = np.random.default_rng(8).integers(0, 0x7F00, 600).astype("<u2")
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "BF16", "shape": [20, 30], "data_offsets": [0, 1200]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [1200, 1208]},
    }
    data = containers.whole(header, values.tobytes() + bytes(8))
    assert_bit_equal(loader, tmp_path, data)


@pytest.mark.parametrize("name", ["waifu2x/upconv7_scale_rgb.npz", "lstm-text-keras/lstm_text_generation.h5"])
@pytest.mark.parametrize("mode", ["eightbit", "float16", "prune,int8", "int4"])
def test_real_models(loader: Loader, tmp_path: Path, shared_models: Path, name: str, mode: str) -> None:
    shrink.save(shrink.quantize(shrink.load(shared_models / name), mode), tmp_path / "m.safetensors")
    assert_bit_equal(loader, tmp_path, (tmp_path / "m.safetensors").read_bytes())


def test_calibrated_networks(loader: Loader, tmp_path: Path) -> None:
    """Files as users make them: constants, vectors, codes with a trellis and without, in a packed file."""
    pytest.importorskip("onnxruntime")
    used = set()
    for zoo in NETWORKS:
        output = tmp_path / f"{zoo.name}.safetensors"
        shape = ",".join(map(str, (1, *zoo.calibration.shape[1:])))
        line = ("--mode", "calibrated", "--step", 0.01, "--samples", 8, "--input", shape, "-o", output)
        outcome = run("quantize", zoo.path, *line)
        assert outcome.code == 0, outcome.stderr
        assert_bit_equal(loader, tmp_path, output.read_bytes())
        entries = shrink.load(output).tensors
        used |= {step.name for entry in entries if isinstance(entry, Quantized) for step in entry.steps}
    assert used == {"rans.1", "trellis.1", "grid.1", "fill.1", "affine.1"}


def random_values(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Step, bytes]:
    """A value step with bytes that fit it."""
    size = int(np.prod(shape))
    kind = rng.choice(["affine.1", "codebook.1", "cast.1", "grid.1", "fill.1"])
    if kind == "grid.1":
        return random_grid(rng, shape)
    if kind == "fill.1":
        return Step(kind, {"value": float(rng.choice([0, 1, -0.1, 1e-40, 3e38]))}), b""
    if kind == "affine.1":
        axis = int(rng.integers(len(shape))) if rng.random() < 0.7 else None
        block = int(rng.integers(1, 40)) if rng.random() < 0.6 else None
        bits, scale, zero = int(rng.choice([4, 8])), str(rng.choice(["F32", "BF16"])), bool(rng.random() < 0.5)
        rows, _, blocks = groups(shape, axis, block)
        scales = rng.standard_normal(rows * blocks).astype("f4")
        head = scales.tobytes() if scale == "F32" else (scales.view("u4") >> 16).astype("u2").tobytes()
        if zero:
            head += rng.bytes(rows * blocks)
        params = {"bits": bits, "axis": axis, "block": block, "scale": scale, "zero": zero}
        return Step(kind, params), head + rng.bytes(size if bits == 8 else (size + 1) // 2)
    if kind == "codebook.1":
        table: Any = "eightbit" if rng.random() < 0.5 else rng.standard_normal(256).tolist()
        return Step(kind, {"table": table, "scale": float(rng.lognormal())}), rng.bytes(size)
    source = str(rng.choice(["F32", "F16", "I8", "U16", "F64"]))
    return Step(kind, {"from": source}), rng.integers(-100, 100, size).astype(DTYPES[source]).tobytes()


def random_grid(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Step, bytes]:
    """Any axes as rows, in any order, now and then of a tensor that is seen in other dimensions."""
    size = int(np.prod(shape))
    first = int(rng.integers(1, 4))
    view = [first, size // first] if size % first == 0 and rng.random() < 0.7 else None
    dimensions = list(shape) if view is None else view
    axes = rng.permutation(len(dimensions))[: rng.integers(len(dimensions) + 1)].tolist()
    rows, columns = matrix(dimensions, axes)
    width = int(rng.choice([1, 2]))
    exponents = rng.integers(-60, 60, rows + columns).astype("i1").tobytes()
    params = {"scale": float(rng.lognormal()), "view": view, "rows": axes, "width": width}
    return Step("grid.1", params), exponents + rng.bytes(size * width)


def random_entropy(rng: np.random.Generator, data: bytes) -> tuple[list[Step], bytes]:
    """The bytes as codes behind a head; mostly of many small ones, as real codes are. Some payloads are damaged."""
    head = int(rng.integers(0, min(len(data), 40) + 1))
    rest = len(data) - head
    width = 2 if rest % 2 == 0 and rng.random() < 0.3 else 1
    count = rest // width
    rows = int(rng.choice([n for n in range(1, 20) if count % n == 0]))
    codes = np.frombuffer(data[head:], f"<i{width}").reshape(rows, -1).astype(np.int16)
    payload, params = rans.encode(data[:head], codes, effort=int(rng.integers(3)))
    if rng.random() < 0.1:
        damaged = bytearray(payload)
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        payload = bytes(damaged)
    return [Step("rans.1", {**params, "width": width})], payload


def random_trellis(rng: np.random.Generator, data: bytes, count: int) -> tuple[list[Step], bytes]:
    """Codes of a trellis where grid.1 has others; now and then one is too large."""
    head, width = len(data) - 2 * count, int(rng.choice([1, 2]))
    most = 60 if width == 1 else rng.choice([60, 16383, 16384], p=[0.5, 0.4, 0.1])
    codes = np.clip(np.round(rng.laplace(0, rng.choice([1.0, 9000.0]), count)), -most, most).astype(f"<i{width}")
    rows = int(rng.choice([n for n in range(1, 20) if count % n == 0]))
    params = {"rows": rows, "columns": count // rows, "head": head, "width": width}
    return [Step("trellis.1", params)], data[:head] + codes.tobytes()


def random_packing(rng: np.random.Generator, data: bytes) -> tuple[list[Step], bytes]:
    """Byte steps, and the bytes from which they make `data`; now and then a byte is missing."""
    steps: list[Step] = []
    skip, width = int(rng.integers(0, 9)), int(rng.integers(1, 9))
    if len(data) > skip and (len(data) - skip) % width == 0:
        items = np.frombuffer(data, "u1")[skip:].reshape(-1, width)
        present = items.any(axis=1)
        data = data[:skip] + np.packbits(present, bitorder="little").tobytes() + items[present].tobytes()
        steps.insert(0, Step("sparse.1", {"width": width, "count": len(items), "skip": skip}))
    skip, width = int(rng.integers(0, 9)), int(rng.integers(2, 70))
    if len(data) > skip and (len(data) - skip) % width == 0:
        data = data[:skip] + np.frombuffer(data, "u1")[skip:].reshape(-1, width).T.tobytes()
        steps.insert(0, Step("planes.1", {"width": width, "skip": skip}))
    return steps, data[:-1] if rng.random() < 0.1 else data


def random_entries(seed: int, count: int) -> Iterator[Quantized]:
    """Chains that no quantizer writes today, but that the format allows; some of them do not fit together."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        low = 0 if rng.random() < 0.1 else 1
        shape = tuple(int(n) for n in rng.integers(low, 12, rng.integers(1, 5)))
        value_step, data = random_values(rng, shape)
        middle: list[Step] = []
        if value_step.params.get("width") == 2 and rng.random() < 0.6:
            middle, data = random_trellis(rng, data, math.prod(shape))
        steps, packed = (random_entropy if rng.random() < 0.4 else random_packing)(rng, data)
        yield Quantized.of(f"t{number}", DTYPES["F32"], shape, (*steps, *middle, value_step), packed)


def test_any_chain(loader: Loader, tmp_path: Path) -> None:
    """What decodes in Python gives the same bits, all in one file; what does not is refused, each in its own."""
    good, bad = [], []
    for entry in random_entries(6, 400):
        try:
            decode(entry.payload, entry.steps, entry.shape, entry.dtype, entry.name)
            good.append(entry)
        except BadInput:
            bad.append(entry)
    assert len(good) > 300
    assert len(bad) > 20
    names = {s.name for e in good for s in e.steps}
    others = {"planes.1", "sparse.1", "cast.1", "fill.1", "codebook.1", "affine.1"}
    assert names == others | {"rans.1", "trellis.1", "grid.1"}
    assert_bit_equal(loader, tmp_path, container(tmp_path, good))
    for entry in bad:
        assert loader.fails(loader.site.put(whole(container(tmp_path, [entry])))) == "corrupt"


# --- hostile files ---------------------------------------------------------------------------------------------


def test_what_python_refuses_is_refused(loader: Loader, tmp_path: Path) -> None:
    codes = {}
    for case in sample.damaged(tmp_path):
        if case.path.suffix == ".safetensors":
            result = loader.load(loader.site.put(whole(case.path.read_bytes())))
            codes[case.label] = result["error"]["code"] if "error" in result else "loaded"
    assert len(codes) > 105
    assert [label for label, code in codes.items() if code == "loaded"] == []
    unsupported = {label for label, code in codes.items() if code == "unsupported"}
    packed = {f"packed-{what}" for what in ("version-3", "row-short", "step-unknown")}
    packed |= {f"packed-dtype-{what}" for what in ("odd", "float8", "list")}
    assert unsupported == {"odd-dtype", "float8", "version-3", "unknown-step"} | packed
    truncated = {label for label, code in codes.items() if code == "truncated"}
    packed = {"packed-empty", "packed-no-length"}
    assert truncated == {"empty-file", "seven-bytes", "truncated-header", "truncated-body", "past-the-end"} | packed
    assert set(codes.values()) == {"corrupt", "truncated", "unsupported"}


def test_chains_that_python_refuses_are_refused(loader: Loader, tmp_path: Path) -> None:
    (mark,) = test_steps.test_malformed_chains_are_refused.pytestmark
    cases = mark.args[1]
    assert len(cases) > 35
    for label, chain, payload, shape, _ in cases:
        if not chain:
            continue  # not how an encoded tensor is written
        dtype = DTYPES["F32" if label == "ten terabytes" else "U8"]
        steps = [Step(name, params) for name, params in chain]
        if [s.name for s in steps] == ["cast.1"]:
            # Alone it would be written as a plain tensor.
            steps.insert(0, Step("planes.1", {"width": 2, "skip": len(payload)}))
        entry = Quantized.of("W", dtype, shape, tuple(steps), payload)
        result = loader.load(loader.site.put(whole(container(tmp_path, [entry]))))
        assert result.get("error", {}).get("code") in ("corrupt", "unsupported"), (label, result)


@pytest.mark.parametrize("where", ["worker", "page"])
def test_bombs_are_refused_before_they_take_memory(loader: Loader, tmp_path: Path, where: str) -> None:
    page = loader if where == "worker" else loader.fresh_page("delete globalThis.Worker")
    zeros = Tensor.of("W", np.zeros((4000, 4000), "f4"))
    data = container(tmp_path, [zeros], level=3)
    assert len(data) < 30_000
    assert page.fails(page.site.put(whole(data)), maxBytes=63_999_999) == "unsupported"
    assert "tensors" in page.load(page.site.put(whole(data)), maxBytes=64_000_000)
    steps = (Step("deflate.1", {"size": 400}), Step("cast.1", {"from": "F32"}))
    bomb = Quantized.of("W", DTYPES["F32"], (100,), steps, zlib.compress(bytes(300_000_000), 9))
    assert page.fails(page.site.put(whole(container(tmp_path, [bomb])))) == "corrupt"


# --- what is shipped -------------------------------------------------------------------------------------------


def modules_of(entry: str) -> set[str]:
    """The files that a page gets when it loads one: imports, the worker and the codec."""
    found, todo = set(), [entry]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            text = (WEB / name).read_text() if name.endswith(".js") else ""
            todo += re.findall(r'(?:from |new URL\()"\./([\w.]+)"', text)
    return found


def test_the_size_budget() -> None:
    files = modules_of("loader.js")
    assert {"loader.js", "worker.js", "codec.wasm", "eightbit.js"} <= files
    sizes = {name: len(gzip.compress((WEB / name).read_bytes(), 9)) for name in files}
    assert sum(sizes.values()) < SIZE_BUDGET, sizes


def test_what_few_files_need_comes_later() -> None:
    """rans.js and rans.wasm are in nobody's way who has no such file, and small for those who have."""
    later = modules_of("rans.js") - modules_of("loader.js")
    assert later == {"rans.js", "rans.wasm"}
    sizes = {name: len(gzip.compress((WEB / name).read_bytes(), 9)) for name in later}
    assert sum(sizes.values()) < LATER_BUDGET, sizes


def test_the_guide_names_all_files() -> None:
    guide = (WEB / "GUIDE.md").read_text()
    assert {name for name in modules_of("loader.js") | modules_of("rans.js") if f"`{name}`" not in guide} == set()


def test_generated_files_are_up_to_date() -> None:
    """They stem from sources that may have changed since `python -m tests.web.build`."""
    assert (WEB / "eightbit.js").read_text() == build.eightbit_js()
    for module in build.MODULES:
        assert module.path.read_bytes().endswith(build.stamp(module)), f"{module.path.name} was made from other sources"
    assert (WEB / "zstd.LICENSE").read_text().startswith("BSD License")
