"""Sizes: against the files themselves, the commands that hosts use, what a browser asks for, and other tools."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brotli
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import shrink
from shrink import given as given_network
from shrink import manifest
from shrink.bench import Variant, peers, size, variants
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import BadInput, UsageError
from shrink.progress import silent
from shrink.serve import Server
from tests import pages
from tests.browser import chromium
from tests.pages import PACKAGE, needs_chainer, needs_package

if TYPE_CHECKING:
    from playwright.sync_api import Browser

F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.put_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def first(folder: Path) -> Variant:
    network, _ = given_network.network(str(folder / "generator.onnx"), None, ())
    (folder / "variants").mkdir()
    return variants.original(network, folder / "variants", silent)


@pytest.fixture(scope="module")
def sites(folder: Path) -> variants.ExportedSites:
    return variants.ExportedSites(folder / "sites", PACKAGE)


def by_mode(first: Variant, folder: Path, mode: str) -> Variant:
    return variants.by_mode(first, mode, folder / "variants", silent)


# Compressed bytes


@given(st.binary(max_size=3000))
def test_gzip_and_brotli_are_those_of_the_libraries(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("data") / "file"
    file.write_bytes(data)
    assert size.gzip(file) == len(gzip.compress(data, 9))
    assert size.brotli(file) == len(brotli.compress(data, quality=11))


def test_large_files_are_compressed_in_pieces(tmp_path: Path) -> None:
    data = b"".join(b"line %d of a file\n" % (n * n) for n in range(15_000))
    (tmp_path / "file").write_bytes(data)
    told: list[tuple[int, int]] = []
    assert size.gzip(tmp_path / "file", lambda done, total: told.append((done, total))) == len(gzip.compress(data, 9))
    assert size.brotli(tmp_path / "file") == pytest.approx(len(brotli.compress(data, quality=11)), rel=0.02)
    assert told[0] == (0, len(data))
    assert told[-1] == (len(data), len(data))
    assert [done for done, _ in told] == sorted({done for done, _ in told})


# What a variant weighs


@needs_package
def test_sizes_are_those_of_the_files(first: Variant, folder: Path, sites: variants.ExportedSites) -> None:
    variant = by_mode(first, folder, "eightbit")
    found = size.sizes(variant, sites, ("wasm", "webgpu"), silent)
    out = found.size
    assert out["file"] == (folder / "variants" / "eightbit.safetensors").stat().st_size
    wasm, webgpu = (sites.folder(variant, backend, silent) for backend in ("wasm", "webgpu"))
    weights = (wasm / "weights.safetensors").read_bytes()
    assert weights == (webgpu / "weights.safetensors").read_bytes()
    assert (out["wire_raw"], out["wire_gzip"]) == (len(weights), len(gzip.compress(weights, 9)))
    assert out["wire_brotli"] is None
    packed, why = size.under_brotli(variant, sites, "wasm", silent)
    assert why == ""
    assert packed == pytest.approx(len(brotli.compress(weights, quality=11)), abs=64)
    assert out["graph"] == (wasm / "model.onnx").stat().st_size
    count = sum(int(np.prod(t.shape)) for t in first.network.model.tensors if t.dtype == np.float32)
    assert out["bits_per_weight"] == pytest.approx(8 * len(weights) / count)
    assert 7 < out["bits_per_weight"] < 10

    for backend, place in (("wasm", wasm), ("webgpu", webgpu)):
        about, _ = manifest.read(place)
        stored = {role: (place / about["runtime"][role]).read_bytes() for role in ("api", "module", "wasm")}
        inflated = gzip.decompress(stored["wasm"])
        assert out["runtime"][backend]["raw"] == len(stored["api"]) + len(stored["module"]) + len(inflated)
        scripts = sum(len(gzip.compress(stored[role], 9)) for role in ("api", "module"))
        assert out["runtime"][backend]["gzip"] == scripts + len(stored["wasm"])
        assert out["runtime"][backend]["brotli"] is None
        parts = out["first_visit_parts"][backend]
        assert (parts["weights"], parts["graph"]) == (out["wire_raw"], out["graph"])
        scripts = sum(len(brotli.compress(stored[role], quality=11)) for role in ("api", "module"))
        assert parts["runtime"] == scripts + len(stored["wasm"])
        assert 0 < parts["page"] < out["page"]["raw"]
        assert out["first_visit"][backend] == sum(parts.values())
    assert out["runtime"]["webgpu"]["raw"] > out["runtime"]["wasm"]["raw"]
    # Only the original says once what holds for all.
    assert found.missing == []
    reasons = dict(size.sizes(first, sites, ("wasm",), silent).missing)
    assert "21 s" in reasons["runtime for wasm under brotli 11"]


@needs_package
def test_smaller_modes_are_smaller(first: Variant, folder: Path, sites: variants.ExportedSites) -> None:
    made = [first, *(by_mode(first, folder, mode) for mode in ("float16", "int8", "int4"))]
    found = [size.sizes(v, sites, ("wasm",), silent).size for v in made]
    for key in ("file", "wire_raw", "wire_gzip", "bits_per_weight"):
        numbers = [out[key] for out in found]
        assert numbers == sorted(numbers, reverse=True), key
        assert len(set(numbers)) == 4
    # The runtime and the page are the same for all, but for the manifest.
    assert len({out["first_visit_parts"]["wasm"]["runtime"] for out in found}) == 1
    pages_ = [out["first_visit_parts"]["wasm"]["page"] for out in found]
    assert max(pages_) - min(pages_) < 500


@needs_package
def test_large_weights_are_not_put_through_brotli_unasked(
    first: Variant, sites: variants.ExportedSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "BROTLI_AT_MOST", 1000)
    assert size.under_brotli(first, sites, "wasm", silent) == (None, "it would take about 1 s")
    assert (size.under_brotli(first, sites, "wasm", silent, slow=True)[0] or 0) > 1000


@needs_package
def test_a_visit_downloads_what_is_counted(first: Variant, sites: variants.ExportedSites) -> None:
    place = sites.folder(first, "wasm", silent)
    about, _ = manifest.read(place)
    with chromium() as browser:
        asked = requested(browser, place)
    counted = size.loaded(place, about)
    assert asked <= counted
    # What is counted beyond that is loaded where it is needed: by workers, and by other ways to store weights.
    assert counted - asked <= {"shrink/stages.js", "shrink/chain.js", "shrink/rans.js", "shrink/rans.wasm"}


def requested(browser: Browser, place: Path) -> set[str]:
    """The files that a page asks its server for, until it has shown its result."""
    lines: list[str] = []
    with serving(place, lines) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#timings tr").first.wait_for(timeout=60_000)
    paths = {line.split()[1].partition("?")[0].lstrip("/") for line in lines if line.startswith('"GET')}
    return {path or "index.html" for path in paths}


@contextmanager
def serving(place: Path, lines: list[str]) -> Iterator[str]:
    server = Server(place, log=lines.append)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Variants


def test_the_original_has_plain_values(folder: Path, tmp_path: Path) -> None:
    plain = shrink.load(folder / "generator.onnx")
    small = tmp_path / "small.safetensors"
    shrink.save(shrink.quantize(plain, "eightbit"), small)
    network, _ = given_network.network(str(small), None, ())
    variant = variants.original(network, tmp_path, silent)
    decoded = {t.name: t.array for t in shrink.restore(shrink.load(small)).tensors}
    for tensor in variant.network.model.tensors:
        np.testing.assert_array_equal(tensor.array, decoded[tensor.name])
    # Its size is that of the plain values, not of the file that has them coded.
    assert variants.file_bytes(variant) > 2 * small.stat().st_size
    network, _ = given_network.network(str(folder / "generator.onnx"), None, ())
    assert variants.file_bytes(variants.original(network, tmp_path, silent)) == plain.source.size_bytes


def test_half_networks_stay_in_half(folder: Path, tmp_path: Path) -> None:
    network, _ = given_network.network(str(folder / "half-generator.onnx"), None, ())
    variant = variants.original(network, tmp_path, silent)
    assert {t.dtype for t in variant.network.model.tensors if t.dtype.kind == "f"} == {np.dtype("f2")}


def test_modes_may_be_joined(first: Variant, folder: Path) -> None:
    variant = by_mode(first, folder, "prune+int8")
    assert (variant.name, variant.mode) == ("prune+int8", "prune,int8")
    weights = variant.network.model["fc/W"].array
    assert np.mean(weights == 0) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UsageError, match="nonsense"):
        by_mode(first, folder, "nonsense")


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_variants_on_disk(first: Variant, folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"small{suffix}"
    shrink.save(shrink.quantize(shrink.load(folder / "generator.onnx"), "int8"), path)
    variant = variants.from_file(first, "small", path)
    assert variants.file_bytes(variant) == path.stat().st_size
    # ONNX computes the values in its graph; ours keeps the original's graph.
    assert (variant.network.model.graph == first.network.model.graph) == (suffix == ".safetensors")


@needs_chainer
def test_weights_alone_get_the_graph_of_the_original(tmp_path: Path) -> None:
    models = Path(__file__).parents[1] / "benchmarks" / "models"
    network, _ = given_network.network(f"{models / 'networks.py'}:Generator", models / "cdcgan.npz", ("1,110",))
    first = variants.original(network, tmp_path, silent)
    small = tmp_path / "small.npz"
    shrink.save(shrink.quantize(shrink.load(models / "cdcgan.npz"), "float16"), small)
    variant = variants.from_file(first, "small", small)
    assert variant.network.model.graph == first.network.model.graph
    expected = shrink.load(models / "cdcgan.npz")["dc1/W"].array.astype("f2")
    np.testing.assert_array_equal(variant.network.model["dc1/W"].array, expected)


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def test_variants_that_do_not_fit_are_refused(first: Variant, folder: Path, tmp_path: Path) -> None:
    weights = {t.name: t.array for t in first.network.model.tensors}
    save_npz(tmp_path / "missing.npz", {k: v for k, v in weights.items() if k != "fc/W"})
    with pytest.raises(BadInput, match="fc/W: the network needs it"):
        variants.from_file(first, "a", tmp_path / "missing.npz")
    save_npz(tmp_path / "shape.npz", weights | {"fc/W": np.zeros((20, 512), "f4")})
    with pytest.raises(BadInput, match="its shape is"):
        variants.from_file(first, "a", tmp_path / "shape.npz")
    with pytest.raises(BadInput, match="it takes x of float32, the original takes z of float32"):
        variants.from_file(first, "a", folder / "classifier.onnx")


def test_names_of_variants_differ() -> None:
    paths = [Path("a/gen.int8.safetensors"), Path("b/gen.int8.npz"), Path("float32.onnx"), Path("x.safetensors")]
    assert variants.names_of(paths) == ["gen.int8", "gen.int8 2", "float32 2", "x"]


# Peers

finite = st.floats(-100, 100, width=32)


@given(arrays("f4", st.integers(1, 50), elements=finite), st.sampled_from([8, 16]))
def test_tensorflowjs_codes_are_near_the_values(x: F32, bits: int) -> None:
    codes, scale, low = peers.tensorflowjs_affine(x, bits)
    assert codes.dtype.itemsize * 8 == bits
    decoded = codes * scale + low
    # Half a step, and what moving zero onto a code costs.
    assert np.abs(decoded - x).max() <= scale * (1 + 1e-5) + 1e-6
    assert np.abs(decoded[x == 0]).max(initial=0) <= 1e-5 * scale


def test_peers_of_real_weights(folder: Path, first: Variant) -> None:
    rows, missing = peers.peers(first, silent)
    found = {row["name"]: row for row in rows}
    weights = {t.name: t.array for t in first.network.model.tensors if t.dtype == np.float32}
    count = sum(x.size for x in weights.values())
    assert found["TensorFlow.js uint8"]["bytes"] == count
    assert found["TensorFlow.js uint16"]["bytes"] == found["TensorFlow.js float16"]["bytes"] == 2 * count
    large = {name: x for name, x in weights.items() if x.ndim > 1}
    signal = sum(float((x.astype("f8") ** 2).sum()) for x in large.values())
    noise = sum(float(((x - x.astype("f2").astype("f8")) ** 2).sum()) for x in large.values())
    assert found["TensorFlow.js float16"]["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise))
    assert found["TensorFlow.js uint16"]["sqnr_db"] - found["TensorFlow.js uint8"]["sqnr_db"] == pytest.approx(
        48, abs=2
    )
    int8 = found["ONNX Runtime dynamic int8"]
    # It knows the two Gemms, and no ConvTranspose.
    assert "2 of 4 weights" in int8["note"]
    assert int8["bytes"] < (folder / "generator.onnx").stat().st_size
    assert 30 < int8["sqnr_db"] < 50
    assert [name for name, _ in missing] == [row["name"] for row in rows if row["bytes"] is None]


def test_a_peer_that_knows_no_operator_says_so(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    proto = pages.model_of(
        [onnx.helper.make_node("Mul", ["x", "w"], ["y"])],
        [value("x", onnx.TensorProto.FLOAT, [1, 64])],
        [value("y", onnx.TensorProto.FLOAT, [1, 64])],
        {"w": np.random.default_rng(0).standard_normal((1, 64)).astype("f4")},
    )
    onnx.save(proto, tmp_path / "mul.onnx")
    network, _ = given_network.network(str(tmp_path / "mul.onnx"), None, ())
    rows, missing = peers.peers(variants.original(network, tmp_path, silent), silent)
    (row,) = [row for row in rows if row["name"] == "ONNX Runtime dynamic int8"]
    assert row["bytes"] is None
    assert row["note"].startswith("not measured: it knows none of the operators")
    assert "ONNX Runtime dynamic int8" in dict(missing)


@needs_chainer
def test_webdnn_is_measured_by_its_own_encoder(first: Variant) -> None:
    rows, _ = peers.peers(first, silent)
    (row,) = [row for row in rows if row["name"] == "WebDNN eightbit"]
    encode, _ = peers.webdnn_encoder()
    weights: dict[str, Any] = {t.name: t.array for t in first.network.model.tensors if t.dtype == np.float32}
    assert row["bytes"] == sum(len(encode(x)) for x in weights.values())
    decoded = peers.webdnn_decode(encode(weights["fc/W"]), EIGHTBIT_TABLE)
    assert np.abs(decoded - weights["fc/W"].reshape(-1)).max() < 0.02 * np.abs(weights["fc/W"]).max()
