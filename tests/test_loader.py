"""The loader on a bad network: every fault gives its named error or the right values, never wrong weights."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from shrink.model import DTYPES, Entry, Quantized, Tensor
from shrink.quantizers import modes
from shrink.steps import Step
from tests import containers
from tests.faulty_server import Answer, Site, cut, gzipped, hanging, later, ranged, status, whole
from tests.web import WEB, Loader, Result, container, in_python, loader_in_chromium


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("file"), 1, "int8", 50)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same network, trained further: every tensor has the same size and other values."""
    return make(tmp_path_factory.mktemp("other"), 2, "int8", 50)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """More than the 2 MB that a browser buffers: a part has arrived for certain when the connection breaks."""
    return make(tmp_path_factory.mktemp("large"), 1, "float16", 20_000)


@pytest.fixture(scope="module")
def large_other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("large_other"), 2, "float16", 20_000)


def make(folder: Path, seed: int, mode: str, columns: int, last: int | None = None) -> bytes:
    """Eight layers from a seed, the last one from another where there is `last`."""
    rng = np.random.default_rng(seed)
    entries: list[Entry] = [Tensor.of("step", np.array(seed))]
    for i in range(8):
        drawn = rng if last is None or i < 7 else np.random.default_rng(last)
        entry = modes()[mode].quantize(f"layer {i}", drawn.standard_normal((40, columns), np.float32))
        assert isinstance(entry, Quantized)
        entries.append(entry)
    return container(folder, entries, graph=b"graph")


def assert_holds(result: Result, data: bytes, folder: Path) -> None:
    assert result.get("tensors") == in_python(folder, data), result.get("error")
    assert result["graph"] == hashlib.sha256(b"graph").hexdigest()
    assert result["attributes"] == {"note": "ノート"}


def sri(data: bytes) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(data).digest()).decode()}"


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# --- one answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code", "requests"),
    [
        (lambda data: status(404), "http", 1),
        (lambda data: status(403), "http", 1),
        (lambda data: status(500), "http", 3),
        (lambda data: status(503), "http", 3),
        (lambda data: whole(b"<!DOCTYPE html><title>Home</title>", content_type="text/html"), "http", 1),
        (lambda data: whole(b"<!DOCTYPE html><title>Home</title>"), "corrupt", 1),
        (lambda data: whole(b""), "truncated", 3),
        (lambda data: whole(data[:5]), "truncated", 3),
        (lambda data: whole(data[:100]), "truncated", 3),
        (lambda data: whole(data[:-1]), "truncated", 3),
        (lambda data: ranged(data[:-1], '"tag"'), "truncated", 2),
        (lambda data: whole(data, content_length=str(len(data) - 50)), "truncated", 3),
        (lambda data: whole(data + b"!"), "corrupt", 1),
        (lambda data: whole(data[:-1] + b"?"), "corrupt", 1),
        (lambda data: cut(data, 5000), "network", 3),
        (lambda data: cut(data, 0), "network", 3),
        (lambda data: cut(data, 5000, content_length=""), "truncated", 3),
        (lambda data: whole(data, content_encoding="gzip"), "network", 3),
    ],
)
def test_a_fault_has_a_name(
    loader: Loader, file: bytes, answer: Callable[[bytes], Answer], code: str, requests: int
) -> None:
    path = loader.site.put(answer(file))
    assert loader.fails(path) == code
    assert len(loader.site.asked(path)) == requests


def test_every_flipped_bit_is_noticed(loader: Loader, file: bytes) -> None:
    """In the header, the metadata, each tensor, the graph; a bit of white space in the header means nothing."""
    places = [0, 3, 7, 8, 9, 20, *range(30, len(file), 500), len(file) - 1]
    codes = {place: loader.fails(loader.site.put(whole(flipped(file, place))), tries=1) for place in places}
    assert set(codes.values()) <= {"corrupt", "truncated", "unsupported"}
    assert sum(code == "corrupt" for code in codes.values()) > 0.8 * len(places)


def test_nobody_there(loader: Loader) -> None:
    assert loader.fails("http://127.0.0.1:1/x.safetensors") == "network"
    assert loader.fails("no-such-scheme:x") == "network"


def test_errors_say_where(loader: Loader, file: bytes) -> None:
    error = loader.load(loader.site.put(status(404)))["error"]
    assert error["status"] == 404
    assert "404" in error["message"]
    payload_of_layer_2 = in_file(file, "layer 2")
    error = loader.load(loader.site.put(whole(flipped(file, payload_of_layer_2))))["error"]
    assert error["message"] == 'tensor "layer 2": its bytes are not the ones that were written (CRC)'


def in_file(data: bytes, tensor: str) -> int:
    if not containers.is_packed(data):
        header, body = containers.parts(data)
        start: int = header[tensor]["data_offsets"][0]
        return len(data) - len(body) + start
    said, body = containers.packed_parts(data)
    names = [row[3] for row in said["tensors"]]
    before: int = sum(row[1] for row in said["tensors"][: names.index(tensor)])
    return len(data) - len(body) + before


# --- several answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "requests"),
    [
        (lambda data: [status(503), whole(data)], 2),
        (lambda data: [status(500), status(429), whole(data)], 3),
        (lambda data: [cut(data, 9000), whole(data)], 2),
        (lambda data: [cut(data, 9000, content_length=""), whole(data)], 2),
        (lambda data: [cut(data, 50), cut(data, 12000), whole(data)], 3),
        (lambda data: [ranged(data, '"a"', breaks_after=9000), whole(data)], 2),
        (lambda data: [ranged(data, 'W/"a"', breaks_after=9000), whole(data)], 2),
        (lambda data: [gzipped(data, etag='"a"')], 1),
    ],
)
def test_a_passing_fault_does_no_harm(
    loader: Loader, file: bytes, tmp_path: Path, answers: Callable[[bytes], list[Answer]], requests: int
) -> None:
    path = loader.site.put(*answers(file))
    assert_holds(loader.load(path), file, tmp_path)
    assert len(loader.site.asked(path)) == requests


def test_only_the_rest_is_asked_for(loader: Loader, large: bytes, tmp_path: Path) -> None:
    half = len(large) // 2
    path = loader.site.put(ranged(large, '"tag"', breaks_after=half), ranged(large, '"tag"'))
    assert_holds(loader.load(path), large, tmp_path)
    first, second = loader.site.asked(path)
    assert "range" not in first
    assert second["if-range"] == '"tag"'
    start = int(second["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= half


def test_many_breaks(loader: Loader, large: bytes, tmp_path: Path) -> None:
    path = loader.site.put(ranged(large, '"tag"', breaks_after=len(large) // 3))
    assert_holds(loader.load(path, tries=9), large, tmp_path)
    assert len(loader.site.asked(path)) > 2


def test_a_file_replaced_on_the_way_is_never_spliced(
    loader: Loader, large: bytes, large_other: bytes, tmp_path: Path
) -> None:
    assert len(large) == len(large_other)
    begin = ranged(large, '"old"', breaks_after=len(large) // 2)
    scripts = {
        "honest": [begin, ranged(large_other, '"new"')],
        "ignores If-Range": [begin, ranged(large_other, '"new"', heeds_if_range=False), whole(large_other)],
        # Only the checksums tell.
        "same tag for another file": [begin, ranged(large_other, '"old"'), whole(large_other)],
    }
    for label, script in scripts.items():
        path = loader.site.put(*script)
        assert_holds(loader.load(path), large_other, tmp_path)
        assert len(loader.site.asked(path)) == len(script), label
    path = loader.site.put(begin, ranged(large_other, '"old"'))
    assert loader.fails(path, tries=2) == "corrupt"


def test_a_file_without_checksums_is_not_spliced_either(loader: Loader, tmp_path: Path) -> None:
    """One that shrink did not write, from a server that ignores If-Range: only the tag of its answer tells."""
    old, new = (save({"w": np.full((2000, 2000), value, "f4")}) for value in (1, 2))
    script = [ranged(old, '"old"', breaks_after=len(old) // 2), ranged(new, '"new"', heeds_if_range=False), whole(new)]
    assert loader.load(loader.site.put(*script)).get("tensors") == in_python(tmp_path, new)


def test_a_server_that_promises_too_much(loader: Loader, file: bytes, tmp_path: Path) -> None:
    """Whether the browser hands out the last bytes before it complains is a race; wrong values never come of it."""
    result = loader.load(loader.site.put(whole(file, content_length=str(len(file) + 100))))
    if "error" in result:
        assert result["error"]["code"] == "network"
    else:
        assert_holds(result, file, tmp_path)


def test_waiting_doubles(loader: Loader) -> None:
    """In a page with a clock of its own; no time passes here."""
    script = """
        globalThis.waits = [];
        const later = setTimeout;
        globalThis.setTimeout = (work, milliseconds) => { waits.push(milliseconds); return later(work, 0); };
    """
    page = loader.fresh_page(script)
    assert page.fails(page.site.put(status(503)), tries=5, delay=100) == "http"
    assert page.page.evaluate("waits.filter(ms => ms >= 100)") == [100, 200, 400, 800]


def test_a_slow_server_is_waited_for(loader: Loader, file: bytes, tmp_path: Path) -> None:
    event = threading.Event()
    path = loader.site.put(later(event, whole(file)))
    loader.page.evaluate("url => begin(url)", path)
    loader.page.wait_for_timeout(200)
    event.set()
    assert_holds(loader.page.evaluate("url => end(url)", path), file, tmp_path)
    assert len(loader.site.asked(path)) == 1


def test_tensors_are_decoded_while_later_ones_are_on_their_way(loader: Loader, file: bytes) -> None:
    """A damaged tensor shows before the file has come, and nobody waits for the rest."""
    event = threading.Event()
    damaged = flipped(file, in_file(file, "layer 0"))
    try:
        path = loader.site.put(hanging(damaged, in_file(file, "layer 7"), event))
        assert loader.fails(path) == "corrupt"
    finally:
        event.set()


# --- integrity -------------------------------------------------------------------------------------------------


def test_the_hash_of_the_whole_file(loader: Loader, file: bytes, other: bytes, large: bytes, tmp_path: Path) -> None:
    path = loader.site.put(whole(file))
    assert_holds(loader.load(path, integrity=sri(file)), file, tmp_path)
    assert loader.fails(path, integrity=sri(other)) == "corrupt"
    assert_holds(loader.load(loader.site.put(gzipped(file)), integrity=sri(file)), file, tmp_path)
    resumed = loader.site.put(ranged(large, '"a"', breaks_after=len(large) // 2))
    assert_holds(loader.load(resumed, integrity=sri(large), tries=9), large, tmp_path)
    with pytest.raises(AssertionError, match="integrity is not like sha256"):
        loader.load(path, integrity="sha256:abc")


def test_the_hash_notices_what_has_no_checksum(loader: Loader, tmp_path: Path) -> None:
    data = save({"w": np.arange(100, dtype="f4")})
    assert "tensors" in loader.load(loader.site.put(whole(flipped(data, -9))))
    assert loader.fails(loader.site.put(whole(flipped(data, len(data) - 9))), integrity=sri(data)) == "corrupt"


# --- progress and abort ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", [whole, gzipped])
def test_progress_counts_decoded_bytes(loader: Loader, tmp_path: Path, send: Callable[[bytes], Answer]) -> None:
    entries = [Tensor.of(f"t{i}", np.full(10**6, i, "f4")) for i in range(3)]
    half = Quantized.of(
        "h", DTYPES["F32"], (10**6,), (Step("cast.1", {"from": "F16"}),), np.zeros(10**6, "f2").tobytes()
    )
    result = loader.load(loader.site.put(send(container(tmp_path, [*entries, half]))))
    events = result["progress"]
    loaded = [event["loaded"] for event in events]
    assert loaded == sorted(loaded)
    assert {event["total"] for event in events} == {16_000_000}
    assert loaded[-1] == 16_000_000
    assert max(loaded[:-1]) < 16_000_000
    assert len(set(loaded)) > 5
    names = [event["name"] for event in events]
    assert list(dict.fromkeys(names)) == ["t0", "t1", "t2", "h", ""]


def test_abort_on_the_way(loader: Loader, file: bytes) -> None:
    event = threading.Event()
    path = loader.site.put(hanging(file, 9000, event))
    try:
        loader.page.evaluate("url => begin(url, { cache: true })", path)
        loader.page.wait_for_function("url => asked(url)", arg=path)
        loader.page.evaluate("url => abort(url)", path)
        error = loader.page.evaluate("url => end(url)", path)["error"]
    finally:
        event.set()
    assert (error["code"], error["cause"]) == ("aborted", "enough")
    assert not any(path in url for url in loader.page.evaluate("cached()"))
    wait_for_no_workers(loader)


def test_abort_at_any_time(loader: Loader, file: bytes, tmp_path: Path) -> None:
    for at in (0, 1, 10_000, 40_000):
        path = loader.site.put(whole(file))
        assert loader.fails(path, abortAt=at, cache=True) == "aborted"
        assert not any(path in url for url in loader.page.evaluate("cached()"))
    path = loader.site.put(status(503))
    assert loader.fails(path, aborted=True, delay=100_000) == "aborted"
    assert loader.site.asked(path) == []


# --- cache -----------------------------------------------------------------------------------------------------


def cached(loader: Loader, path: str) -> list[str]:
    return [url for url in loader.page.evaluate("cached()") if path in url]


def test_a_known_hash_needs_no_network(loader: Loader, file: bytes, tmp_path: Path) -> None:
    path = loader.site.put(whole(file), status(500))
    options = {"cache": True, "integrity": sri(file)}
    assert_holds(loader.load(path, **options), file, tmp_path)
    assert_holds(loader.load(path, **options), file, tmp_path)
    assert len(loader.site.asked(path)) == 1


def test_without_a_hash_the_header_tells(loader: Loader, file: bytes, other: bytes, tmp_path: Path) -> None:
    # From the second answer only the header can be used: what follows it is damaged.
    path = loader.site.put(whole(file), whole(flipped(file, len(file) - 1)), whole(other), whole(other[:-9] + bytes(9)))
    for expected in (file, file, other, other):
        assert_holds(loader.load(path, cache=True), expected, tmp_path)
        assert len(cached(loader, path)) == 1


def test_a_redeploy_replaces_what_is_cached(loader: Loader, file: bytes, other: bytes, tmp_path: Path) -> None:
    path = loader.site.put(whole(file), whole(other))
    neighbour = loader.site.put(whole(file), name=f"{path}.2")
    loader.load(neighbour, cache=True)
    loader.load(path, cache=True, integrity=sri(file))
    before = cached(loader, path)
    assert_holds(loader.load(path, cache=True, integrity=sri(other)), other, tmp_path)
    after = cached(loader, path)
    assert len(before) == len(after) == 2
    assert len(set(before) & set(after)) == 1, "the neighbour stays, the old file goes"


@pytest.mark.parametrize("integrity", [True, False])
def test_a_damaged_cache_is_mended(loader: Loader, file: bytes, tmp_path: Path, integrity: bool) -> None:
    path = loader.site.put(whole(file))
    options = {"cache": True, **({"integrity": sri(file)} if integrity else {})}
    loader.load(path, **options)
    loader.page.evaluate("damageCache()")
    assert_holds(loader.load(path, **options), file, tmp_path)
    assert_holds(loader.load(path, **options), file, tmp_path)
    assert len(cached(loader, path)) == 1


def test_nothing_wrong_is_cached(loader: Loader, file: bytes, other: bytes) -> None:
    for answer in (whole(flipped(file, len(file) - 1)), whole(file[:-1]), cut(file, 9000), status(404)):
        path = loader.site.put(answer)
        loader.fails(path, cache=True)
        assert cached(loader, path) == []
    path = loader.site.put(whole(file))
    loader.fails(path, cache=True, integrity=sri(other))
    assert cached(loader, path) == []


@pytest.mark.parametrize(
    "script",
    [
        "Cache.prototype.put = async () => { throw new DOMException('full', 'QuotaExceededError'); }",
        "Cache.prototype.match = Cache.prototype.keys = async () => { throw new DOMException('no', 'UnknownError'); }",
        "CacheStorage.prototype.open = async () => { throw new DOMException('no', 'SecurityError'); }",
        "Object.defineProperty(globalThis, 'caches', { value: undefined })",
    ],
)
def test_without_a_working_cache(loader: Loader, file: bytes, tmp_path: Path, script: str) -> None:
    page = loader.fresh_page(script)
    for options in ({}, {"integrity": sri(file)}):
        for _ in range(2):
            assert_holds(page.load(page.site.put(whole(file)), cache=True, **options), file, tmp_path)


# --- the thread ------------------------------------------------------------------------------------------------


def wait_for_no_workers(loader: Loader) -> None:
    """The browser tells that a worker has ended some time after it was told to end it."""
    for _ in range(100):
        if loader.page.workers == []:
            return
        loader.page.wait_for_timeout(50)
    pytest.fail("a worker is left behind")


def test_decoding_runs_in_a_worker_which_ends(loader: Loader, file: bytes) -> None:
    page = loader.fresh_page()
    started = []
    page.page.on("worker", lambda worker: started.append(worker))
    page.load(page.site.put(whole(file)))
    page.fails(page.site.put(whole(flipped(file, len(file) - 1))))
    assert len(started) == 2
    wait_for_no_workers(page)


@pytest.mark.parametrize(
    "script",
    [
        "delete globalThis.Worker",
        "globalThis.Worker = class { constructor() { throw new DOMException('no', 'SecurityError'); } }",
        "const Real = Worker; globalThis.Worker = class extends Real { constructor() { super('/no-such-file.js'); } }",
    ],
)
def test_without_a_worker(loader: Loader, file: bytes, tmp_path: Path, script: str) -> None:
    page = loader.fresh_page(script)
    assert_holds(page.load(page.site.put(whole(file))), file, tmp_path)
    assert page.fails(page.site.put(whole(flipped(file, in_file(file, "layer 0"))))) == "corrupt"


def test_under_a_strict_policy(loader: Loader, file: bytes, tmp_path: Path) -> None:
    """The one that GUIDE.md names."""
    (policy,) = re.findall("`(script-src .*)`", (WEB / "GUIDE.md").read_text())
    html = (Path(__file__).parent / "web" / "page.html").read_bytes()
    path = loader.site.put(whole(html, content_type="text/html", content_security_policy=policy), name="/strict.html")
    page = loader.fresh_page(path=path)
    assert_holds(page.load(page.site.put(whole(file))), file, tmp_path)


def test_a_missing_codec_is_named(loader: Loader, file: bytes, tmp_path: Path) -> None:
    site: Site = loader.site
    site.put(status(404), name="/web/codec.wasm")
    try:
        page = loader.fresh_page()
        error = page.load(site.put(whole(file)))["error"]
        assert (error["code"], error["status"]) == ("http", 404)
        assert "codec.wasm" in error["message"]
    finally:
        del site.scripts["/web/codec.wasm"]
    assert_holds(page.load(site.put(whole(file))), file, tmp_path)


@pytest.mark.parametrize("name", ["rans.js", "rans.wasm"])
def test_what_few_files_need_and_is_missing_is_named(loader: Loader, file: bytes, tmp_path: Path, name: str) -> None:
    site: Site = loader.site
    grid = Step("grid.1", {"scale": 1.0, "view": None, "rows": [0], "width": 1})
    entry = Quantized.of("W", np.dtype("f4"), (1, 3), (grid,), bytes(4) + b"abc")
    few = container(tmp_path, [entry], graph=b"graph")
    site.put(status(404), name=f"/web/{name}")
    try:
        page = loader.fresh_page()
        error = page.load(site.put(whole(few)))["error"]
        assert error["code"] in ("network", "http")
        assert name in error["message"]
        assert_holds(page.load(site.put(whole(file))), file, tmp_path)
    finally:
        del site.scripts[f"/web/{name}"]
    assert_holds(loader.fresh_page().load(site.put(whole(few))), few, tmp_path)


def test_many_at_once(loader: Loader, file: bytes, other: bytes, tmp_path: Path) -> None:
    paths = [loader.site.put(whole(file if i % 2 else other)) for i in range(6)]
    results = loader.page.evaluate("paths => Promise.all(paths.map(path => attempt(path, { cache: true })))", paths)
    for i, result in enumerate(results):
        assert_holds(result, file if i % 2 else other, tmp_path)
