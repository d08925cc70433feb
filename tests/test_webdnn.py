"""WebDNN folders: what stock WebDNN reads is what shrink reads, and nothing is lost on the way through shrink."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink import formats
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import BadInput, OutputError, ShrinkError, UsageError
from shrink.formats import _webdnn_read, safetensors, webdnn
from shrink.model import DTYPES, Entry, Model, Quantized, Source, Tensor
from shrink.steps import Step
from tests.browser import chromium, serve
from tests.samples import webdnn as sample

TESTS = Path(__file__).parent
STOCK = TESTS / "node_modules" / "webdnn"
SQUEEZENET = TESTS.parent.parent / "shared" / "models" / "squeezenet-webdnn"

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]

needs_stock = pytest.mark.skipif(
    not (STOCK / "package.json").is_file() or shutil.which("node") is None,
    reason="stock webdnn is not installed: run `npm ci` in tests/",
)
needs_squeezenet = pytest.mark.skipif(not SQUEEZENET.is_dir(), reason="../shared/models/squeezenet-webdnn is absent")

DECODE = """
const fs = require("fs");
const [decoders, graph, weights] = process.argv.slice(1);
const decoder = require(decoders).default(JSON.parse(fs.readFileSync(graph, "utf8")).weight_encoding);
decoder.decode(new Uint8Array(fs.readFileSync(weights)))
    .then(values => process.stdout.write(new Uint8Array(values.buffer, values.byteOffset, values.byteLength)))
    .catch(error => { console.error(error); process.exitCode = 1; });
"""


def stock_values(folder: Path, backend: str) -> F32:
    """All weights of a backend, as the decoder of the npm package gives them."""
    decoders = STOCK / "src" / "descriptor_runner" / "decoder" / "get_weight_decoder.js"
    files = [decoders, folder / f"graph_{backend}.json", folder / f"weight_{backend}.bin"]
    done = subprocess.run(["node", "-e", DECODE, *map(str, files)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, "<f4")


def values_of(model: Model, backend: str) -> F32:
    arrays = [t.array for t in model.tensors if t.name.startswith(f"{backend}/")]
    return np.concatenate([np.empty(0, "f4"), *arrays])


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


def assert_same_model(a: Model, b: Model) -> None:
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert same_bits(x.array, y.array), x.name


def eightbit(tensor: Entry) -> Quantized:
    [(codes, scale)] = webdnn.encode(tensor.array)
    step = Step("codebook.1", {"table": "eightbit", "scale": scale})
    return Quantized.of(tensor.name, DTYPES["F32"], tensor.shape, (step,), codes.tobytes())


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write(model: Model, entries: Iterable[Entry], path: Path) -> Model:
    webdnn.write(model, entries, path, None)
    return webdnn.read(path)


def one_backend(folder: Path, places: sample.Places, weights: bytes, encoding: str = "eightbit") -> Model:
    sample.put_backend(folder / "in", "webassembly", sample.graph(places, encoding), weights)
    return webdnn.read(folder / "in")


# --- stock WebDNN is the oracle --------------------------------------------------------------------------------


@needs_stock
def test_stock_decoder_agrees_on_what_is_read_and_written(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    coded = write(model, map(eightbit, model.tensors), tmp_path / "coded")
    plain = write(model, (Tensor.of(t.name, t.array) for t in model.tensors), tmp_path / "plain")
    for backend in ("fallback", "webassembly", "webgl_4096"):
        for each in (model, coded, plain):
            assert same_bits(stock_values(each.source.path, backend), values_of(each, backend))
    assert all(isinstance(t, Quantized) for t in coded.tensors)
    assert all(isinstance(t, Tensor) for t in plain.tensors)
    assert_same_model(plain, model)


@needs_stock
@needs_squeezenet
def test_stock_decoder_agrees_on_squeezenet(tmp_path: Path) -> None:
    model = webdnn.read(SQUEEZENET)
    assert len(model.tensors) == 52
    original = stock_values(SQUEEZENET, "webassembly")
    assert original.size == 1_235_496
    assert same_bits(original, values_of(model, "webassembly"))
    again = write(model, model.tensors, tmp_path / "out")
    assert same_bits(original, stock_values(tmp_path / "out", "webassembly"))
    assert same_bits(original, values_of(again, "webassembly"))


@needs_squeezenet
def test_squeezenet_written_again_is_not_larger(tmp_path: Path) -> None:
    model = webdnn.read(SQUEEZENET)
    again = write(model, model.tensors, tmp_path / "out")
    assert_same_model(model, again)
    new, old = (p / "weight_webassembly.bin" for p in (tmp_path / "out", SQUEEZENET))
    assert new.stat().st_size <= old.stat().st_size
    name = "graph_webassembly.json"
    assert (tmp_path / "out" / name).read_bytes() == (SQUEEZENET / name).read_bytes()


RUN = """async x => {
    const runner = await WebDNN.load("./model", {
        backendOrder: ["fallback"], saveCache: false, cacheStrategy: "networkOnly",
    });
    runner.getInputViews()[0].set(x);
    await runner.run();
    return [runner.backendName, Array.from(runner.getOutputViews()[0].toActual())];
}"""


@needs_stock
def test_stock_webdnn_runs_a_quantized_network_in_a_browser(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    site = tmp_path / "site"
    site.mkdir()
    coded = write(model, map(eightbit, model.tensors), site / "model")
    shutil.copy(STOCK / "dist" / "webdnn.js", site)
    (site / "index.html").write_text("<!doctype html><head></head><script src=webdnn.js></script>")
    x = np.random.default_rng(5).standard_normal(sample.N_IN).astype("f4")
    with serve(site) as url, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{url}/index.html")
        backend, y = page.evaluate(RUN, x.astype(float).tolist())
    W, b = (coded[f"fallback/{name}"].array.astype("f8") for name in "Wb")
    assert backend == "fallback"
    np.testing.assert_allclose(y, W.reshape(sample.N_OUT, sample.N_IN) @ x + b, rtol=0, atol=1e-6)
    # The weights are those of the coded file, not of the original.
    W0, b0 = (model[f"fallback/{name}"].array.astype("f8") for name in "Wb")
    assert np.abs(y - (W0.reshape(sample.N_OUT, sample.N_IN) @ x + b0)).max() > 1e-4


# --- nothing is lost -------------------------------------------------------------------------------------------


def test_a_folder_written_again_is_the_same(tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    (path / "labels.json").write_text('["cat"]')
    (path / "weight_webgpu.bin").write_bytes(b"stale: it has no graph")
    (path / ".hidden").write_text("secret")
    (path / "folder").mkdir()
    outside = tmp_path / "outside.txt"
    outside.write_text("not of this folder")
    (path / "link.txt").symlink_to(outside)
    os.mkfifo(path / "pipe")
    model = webdnn.read(path)
    again = write(model, model.tensors, tmp_path / "out")
    assert_same_model(model, again)
    copied = {"kernels_fallback.js", "labels.json"}
    graphs = {f"graph_{b}.json" for b in ("fallback", "webassembly", "webgl_4096")}
    weights = {f"weight_{b}.bin" for b in ("fallback", "webassembly", "webgl_4096")}
    assert set(files_of(tmp_path / "out")) == copied | graphs | weights
    for name in copied | graphs:
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()


def test_same_input_same_bytes_in_any_order(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    entries = [eightbit(t) for t in model.tensors]
    webdnn.write(model, entries, tmp_path / "a", None)
    webdnn.write(model, reversed(entries), tmp_path / "b", 19)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_only_the_encoding_changes_in_a_graph(tmp_path: Path) -> None:
    # Spelled as no JSON writer would: a decoy, escapes, numbers that a parser would round or spell anew.
    odd = (
        '{ "licenses" : {"weight_encoding":"eightbit"},\n\t"x":[1e5, 1e400, -0.0, 12345678901234567890],'
        '"s":"\\u00e9\\ud800é","weight_encoding" :"raw" ,"memory_layout":'
        '{"static":{"size":4,"allocations":{"A":{"size":4,"offset":0}}}}}'
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "graph_fallback.json").write_text(odd, encoding="utf-8")
    (tmp_path / "in" / "weight_fallback.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    model = webdnn.read(tmp_path / "in")
    webdnn.write(model, map(eightbit, model.tensors), tmp_path / "out", None)
    text = (tmp_path / "out" / "graph_fallback.json").read_text(encoding="utf-8")
    assert text == odd.replace(':"raw"', ':"eightbit"')


def cut_up(folder: Path) -> Model:
    """Tensors that are not one record each: two records, half of one, an empty one, and gaps before and after."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, 100).astype(np.uint8)
    ends = [10, 30, 50, 50, 90, 100]
    scales = [0.1, 0.7, 1.3, 9.0, 2.5, 0.0]
    parts = list(zip(np.split(codes, ends[:-1]), np.array(scales, "f4").tolist(), strict=True))
    # Values:       0 … 9   10 … 49 of two records   50 … 69   70 … 89 of the other half   90 … 99
    places = {"act": (100, 50), "two": (10, 40), "left": (50, 20), "right": (70, 20), "none": (60, 0), "zero": (50, 0)}
    return one_backend(folder, places, sample.records(parts))


@needs_stock
def test_tensors_that_are_not_one_record_are_kept(tmp_path: Path) -> None:
    model = cut_up(tmp_path)
    names = [t.name.removeprefix("webassembly/") for t in model.tensors]
    assert names == ["gap@0", "two", "zero", "left", "none", "right", "gap@90"]
    assert [isinstance(t, Quantized) for t in model.tensors] == [True, False, False, False, False, False, True]
    stock = stock_values(tmp_path / "in", "webassembly")
    assert same_bits(stock, values_of(model, "webassembly"))
    again = write(model, model.tensors, tmp_path / "out")
    assert_same_model(model, again)
    assert json.loads(again.attributes["graph_webassembly.json"])["weight_encoding"] == "eightbit"
    assert same_bits(stock, stock_values(tmp_path / "out", "webassembly"))


@pytest.mark.parametrize("level", [None, 19])
@pytest.mark.parametrize("make", ["sample", "cut_up"])
def test_a_folder_comes_back_from_our_container(tmp_path: Path, make: str, level: int | None) -> None:
    model = webdnn.read(sample.make(tmp_path)) if make == "sample" else cut_up(tmp_path)
    safetensors.write(model, model.tensors, tmp_path / "m.safetensors", level)
    restored = safetensors.read(tmp_path / "m.safetensors")
    assert restored.source.format == webdnn.NAME
    again = write(restored, restored.tensors, tmp_path / "out")
    assert_same_model(model, again)
    webdnn.write(model, model.tensors, tmp_path / "direct", None)
    direct = {n: b for n, b in files_of(tmp_path / "direct").items() if not n.startswith("kernels_")}
    # The container holds no kernels, and its own folder is not searched for them.
    assert files_of(tmp_path / "out") == direct


def test_a_folder_can_replace_itself(tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    model = webdnn.read(path)
    before = [t.array.copy() for t in model.tensors]
    names = set(files_of(path))
    again = write(model, (Tensor.of(t.name, t.array) for t in model.tensors), path)
    assert set(files_of(path)) == names
    assert all(same_bits(a, t.array) for a, t in zip(before, again.tensors, strict=True))
    assert os.listdir(tmp_path) == [path.name]


def test_one_plain_tensor_among_coded_ones_is_coded(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    exact, lossy = model["webassembly/a1"].array, np.linspace(-2, 3, 192).astype("f4")
    entries: list[Entry] = [
        Tensor.of("webassembly/a1", exact),
        model["webassembly/a2"],
        Tensor.of("webassembly/a3", lossy),
        *(t for t in model.tensors if not t.name.startswith("webassembly/")),
    ]
    again = write(model, entries, tmp_path / "out")
    assert all(isinstance(t, Quantized) for t in again.tensors if t.name.startswith("webassembly/"))
    assert same_bits(again["webassembly/a1"].array, exact)
    assert same_bits(again["webassembly/a2"].array, model["webassembly/a2"].array)
    assert 0 < np.abs(again["webassembly/a3"].array - lossy).max() <= 0.0086 * 3


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    n, count = 100_000, 40
    places = {f"t{i}": (n * i, n) for i in range(count)}
    model = one_backend(tmp_path, places, np.zeros(n * count, "<f4").tobytes(), "raw")

    def entries() -> Iterator[Entry]:
        for i, tensor in enumerate(model.tensors):
            plain = Tensor.of(tensor.name, np.random.default_rng(i).standard_normal(n).astype("f4"))
            # The last one makes an eightbit file of all that were plain floats until then.
            yield plain if i < count - 1 else eightbit(plain)

    tracemalloc.start()
    try:
        webdnn.write(model, entries(), tmp_path / "out", None)
        assert tracemalloc.get_traced_memory()[1] < 12 * 4 * n
    finally:
        tracemalloc.stop()
    assert all(isinstance(t, Quantized) for t in webdnn.read(tmp_path / "out").tensors)


def test_float16_is_widened(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    halves = [Tensor.of(t.name, t.array.astype("f2")) for t in model.tensors]
    again = write(model, halves, tmp_path / "out")
    for half, tensor in zip(halves, again.tensors, strict=True):
        assert same_bits(half.array.astype("f4"), tensor.array)


@pytest.mark.parametrize("scale", [-1.0, 0.1, 1e300])
def test_a_scale_that_no_record_holds_keeps_its_values(tmp_path: Path, scale: float) -> None:
    model = one_backend(tmp_path, {"A": (0, 4)}, np.zeros(4, "<f4").tobytes(), "raw")
    codes = bytes([0, 0, 0, 0] if scale > 1 else [1, 77, 127, 200])
    step = Step("codebook.1", {"table": "eightbit", "scale": scale})
    entry = Quantized.of("webassembly/A", DTYPES["F32"], (4,), (step,), codes)
    if scale > 1:
        with pytest.raises(BadInput, match="too large"):
            write(model, [entry], tmp_path / "out")
        return
    again = write(model, [entry], tmp_path / "out")
    assert same_bits(again["webassembly/A"].array, entry.array)


# --- the code --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=50),
    st.floats(0, 2.0**127, width=32),
    st.integers(0, 49),
)
def test_coded_values_are_coded_again_without_loss(codes: list[int], scale: float, at: int) -> None:
    values = (EIGHTBIT_TABLE[codes] * scale).astype("f4")
    pieces = [(at, scale), (values.size - at, scale)] if 0 < at < values.size else [(values.size, scale)]
    out = webdnn.encode(values, pieces)
    assert [c.size for c, _ in out] == [n for n, _ in pieces]
    assert same_bits(np.concatenate([(EIGHTBIT_TABLE[c] * s).astype("f4") for c, s in out]), values)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_any_values_get_the_nearest_code(listed: list[float]) -> None:
    values = np.array(listed, "f4")
    [(codes, scale)] = webdnn.encode(values)
    decoded = EIGHTBIT_TABLE[codes] * scale
    assert scale == np.abs(values).max()
    assert np.array_equal(np.signbit(decoded), np.signbit(values))
    best = np.abs(values[:, None] - EIGHTBIT_TABLE[None] * scale).min(axis=1)
    # Codes that are exact after rounding to float32 may be a rounding error off the nearest in exact numbers.
    assert (np.abs(values - decoded) <= best + scale * 2.0**-24 + 2.0**-149).all()


# --- what is refused -------------------------------------------------------------------------------------------


def test_every_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    for case in sample.damaged(tmp_path):
        with pytest.raises(ShrinkError) as caught:
            formats.sniff(case.path).read(case.path)
        assert caught.value.exit_code == case.exit_code, case.label
        assert [w for w in case.words if w not in str(caught.value)] == [], (case.label, str(caught.value))


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Neither when it claims more than the layout holds nor when the layout goes along with it."""
    n = 60_000_000
    weights = sample.record(0, np.empty(0, np.uint8), body=zlib.compress(bytes(n), 9))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="more than"):
            one_backend(tmp_path, {"A": (0, n - 1)}, weights)
        model = one_backend(tmp_path, {"A": (0, n)}, weights)
        assert model["webassembly/A"].shape == (n,)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_changes_after_it_was_read_is_refused(tmp_path: Path) -> None:
    codes = np.arange(100, dtype=np.uint8)
    model = one_backend(tmp_path, {"A": (0, 100)}, sample.record(0, codes))
    path = tmp_path / "in" / "weight_webassembly.bin"
    size = path.stat().st_size
    path.write_bytes(sample.record(0, codes[:50]).ljust(size, b"\0"))
    with pytest.raises(BadInput, match="webassembly/A"):
        _ = model["webassembly/A"].array
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="webassembly/A"):
        _ = model["webassembly/A"].array


@pytest.mark.parametrize("how", ["longer", "shorter", "without an end"])
def test_codes_that_change_after_they_were_read_are_refused(tmp_path: Path, how: str) -> None:
    codes = np.random.default_rng(1).integers(0, 256, 100).astype(np.uint8)
    stored = zlib.compress(codes.tobytes(), 0)
    model = one_backend(tmp_path, {"A": (0, 100)}, sample.record(0, codes, body=stored))
    if how == "longer":
        other = zlib.compress(bytes(100_000), 9)
    elif how == "shorter":
        other = zlib.compress(bytes(99), 9)
    else:
        # All 100 codes are there, and their block is not the last one.
        deflater = zlib.compressobj(0)
        other = deflater.compress(codes.tobytes()) + deflater.flush(zlib.Z_SYNC_FLUSH)
    other = other[: len(stored)].ljust(len(stored), b"\0")
    (tmp_path / "in" / "weight_webassembly.bin").write_bytes(sample.record(0, codes, body=other))
    with pytest.raises(BadInput, match="webassembly/A: the file changed"):
        _ = model["webassembly/A"].array


def test_a_record_of_many_tensors_is_inflated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.arange(200, dtype=np.uint8)
    model = one_backend(tmp_path, {f"t{i}": (4 * i, 4) for i in range(50)}, sample.record(0, codes))
    inflate = Mock(side_effect=_webdnn_read._codes_of)
    monkeypatch.setattr(_webdnn_read, "_codes_of", inflate)
    assert same_bits(values_of(model, "webassembly"), EIGHTBIT_TABLE[codes].astype("f4"))
    assert inflate.call_count == 1


def test_a_container_that_lost_a_last_tensor_is_refused(tmp_path: Path) -> None:
    good = webdnn.read(sample.make(tmp_path))
    kept = tuple(t for t in good.tensors if t.name != "webgl_4096/v3")
    with pytest.raises(BadInput, match="webgl_4096/v3: it ends at value 416, the weights at 296"):
        webdnn.write(Model(kept, good.source, good.attributes), kept, tmp_path / "out", None)


def test_other_folders_are_not_webdnn(tmp_path: Path) -> None:
    assert not webdnn.sniff(tmp_path, b"")
    (tmp_path / "graph_fallback.json").write_text("{}")
    assert not webdnn.sniff(tmp_path, b"")
    assert not webdnn.sniff(tmp_path / "graph_fallback.json", b"{}")
    (tmp_path / "graph_fallback.json").write_text(json.dumps(sample.graph({})))
    with pytest.raises(BadInput, match=r"weight_fallback\.bin"):
        webdnn.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("missing", UsageError, "webassembly/a3: a WebDNN folder must have all"),
        ("missing-inside", UsageError, "webassembly/a1: a WebDNN folder must have all"),
        ("size", BadInput, "webassembly/a2: it has 31 values, its place in the graph 32"),
        ("unknown", BadInput, "webassembly/nobody: the graph has no such allocation"),
        ("activation", BadInput, "webassembly/a5: it belongs at value 1188"),
        ("backend", BadInput, "metal/a1: no graph has it"),
        ("twice", BadInput, "webassembly/a1: it belongs at value 0"),
        ("gap", BadInput, "webassembly/gap@5000: it belongs at value 5000"),
        ("not-finite", BadInput, "webassembly/a1: eightbit cannot hold"),
        ("float64", BadInput, "webassembly/a1: WebDNN holds float32 only"),
        ("codes", BadInput, "webassembly/a2: 31 codes are there where 32 belong"),
    ],
)
def test_entries_that_do_not_fit_are_refused(tmp_path: Path, change: str, error: type[ShrinkError], words: str) -> None:
    model = webdnn.read(sample.make(tmp_path))
    a1, a2, a3 = (f"webassembly/a{i}" for i in (1, 2, 3))
    entries = {t.name: t for t in model.tensors}
    more: list[Entry] = []
    if change == "missing":
        del entries[a3]
    elif change == "missing-inside":
        del entries[a1]
    elif change == "size":
        entries[a2] = Tensor.of(a2, np.zeros(31, "f4"))
    elif change == "unknown":
        more = [Tensor.of("webassembly/nobody", np.zeros(3, "f4"))]
    elif change == "activation":
        # a5 lies where a4 does: both cannot be weights.
        more = [Tensor.of("webassembly/a4", np.zeros(200, "f4")), Tensor.of("webassembly/a5", np.zeros(300, "f4"))]
    elif change == "backend":
        more = [Tensor.of("metal/a1", np.zeros(3, "f4"))]
    elif change == "twice":
        more = [entries[a1]]
    elif change == "gap":
        more = [Tensor.of("webassembly/gap@5000", np.zeros(3, "f4"))]
    elif change == "not-finite":
        entries[a1] = Tensor.of(a1, np.full(864, np.inf, "f4"))
    elif change == "float64":
        entries[a1] = Tensor.of(a1, np.zeros(864))
    elif change == "codes":
        steps = (Step("codebook.1", {"table": "eightbit", "scale": 1.0}),)
        entries[a2] = Quantized.of(a2, DTYPES["F32"], (32,), steps, bytes(31))
    with pytest.raises(error, match=words):
        webdnn.write(model, [*entries.values(), *more], tmp_path / "out", None)
    assert [p.name for p in tmp_path.iterdir()] == [model.source.path.name], "something was left behind"


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("graph_webassembly.json", "{", "graph_webassembly.json is not valid JSON"),
        ("graph_webassembly.json", '{"weight_encoding":"raw","x":"\ud800"}', "not valid JSON"),
        ("graph_webassembly.json", '{"weight_encoding":"raw"}', "memory_layout"),
        ("records_webassembly", "[]", "not a JSON object"),
        ("records_webassembly", '{"a1":[[864,-1]]}', "a1: its list of records"),
        ("records_webassembly", '{"a1":[[864,1e39]]}', "a1: its list of records"),
        ("records_webassembly", '{"a1":[[864,0.1]]}', "a1: its list of records"),
        ("records_webassembly", '{"a1":[[0,1]]}', "a1: its list of records"),
        ("records_webassembly", '{"a1":[["864",1]]}', "a1: its list of records"),
        ("records_webassembly", '{"a1":[[1000000000000000,1]]}', "a1: its list of records"),
    ],
)
def test_attributes_of_a_foreign_container_are_checked(tmp_path: Path, key: str, text: str, words: str) -> None:
    good = webdnn.read(sample.make(tmp_path))
    model = Model(good.tensors, good.source, {**good.attributes, key: text})
    with pytest.raises(BadInput, match=words):
        webdnn.write(model, model.tensors, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_graph_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    good = webdnn.read(sample.make(tmp_path))
    text = json.dumps(sample.graph({}))
    hostile = {"graph_../../x.json": text, "graph_/etc/x.json": text, "graph_a\n.json": text}
    webdnn.write(Model(good.tensors, good.source, {**good.attributes, **hostile}), good.tensors, tmp_path / "out", None)
    assert set(files_of(tmp_path / "out")) == set(files_of(good.source.path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", good.source.path.name]
    with pytest.raises(UsageError, match="only a model that was read from a WebDNN folder"):
        webdnn.write(Model((), Source("chainer-npz", tmp_path, 0), hostile), (), tmp_path / "out2", None)


def test_what_lies_at_the_output_is_not_lost(tmp_path: Path) -> None:
    model = webdnn.read(sample.make(tmp_path))
    site = tmp_path / "site"
    site.mkdir()
    webdnn.write(model, model.tensors, site, None)
    webdnn.write(model, model.tensors, site, None)
    for name in ("index.html", ".git", "kernels_asmjs.js"):
        (site / name).write_text("mine")
        with pytest.raises(OutputError, match=name.replace(".", r"\.")):
            webdnn.write(model, model.tensors, site, None)
        assert (site / name).read_text() == "mine"
        (site / name).unlink()
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(site)
    file.write_text("mine")
    for path in (link, file):
        with pytest.raises(OutputError, match="not a folder"):
            webdnn.write(model, model.tensors, path, None)
    assert link.is_symlink()
    assert file.read_text() == "mine"
