"""Files in parts, in a real browser: whatever the network does, a named error or the right values."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shrink.model import Tensor
from tests.containers import plain
from tests.faulty_server import Answer, Gauge, cut, gzipped, hanging, later, ranged, shared, status, watched, whole
from tests.test_loader import assert_holds, flipped, make, sri, wait_for_no_workers
from tests.web import Loader, container, in_python, loader_in_chromium
from tests.web.parts import (
    INDEX,
    SECOND,
    STEM,
    WEB_PAGE,
    Split,
    decoded_bytes,
    deploy,
    deploy_split,
    progress_of,
    raw_parts,
    split,
    wait_until,
)


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loader_in_chromium() as loader:
        yield loader


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return plain(make(tmp_path_factory.mktemp("file"), 1, "int8", 50))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same network, trained further: the file has the same size and other values."""
    return plain(make(tmp_path_factory.mktemp("other"), 2, "int8", 50))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Thirds of it are more than the 2 MB that a browser buffers: some of one has come for certain before a break."""
    return make(tmp_path_factory.mktemp("large"), 1, "float16", 20_000)


@pytest.fixture(scope="module")
def three(file: bytes, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(file, decoded_bytes(tmp_path_factory.mktemp("three"), file))


@pytest.fixture(scope="module")
def newer(other: bytes, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(other, decoded_bytes(tmp_path_factory.mktemp("newer"), other))


@pytest.fixture(scope="module")
def big(large: bytes, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(large, decoded_bytes(tmp_path_factory.mktemp("big"), large))


# --- the right values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_shards_give_the_file(loader: Loader, file: bytes, tmp_path: Path, count: int) -> None:
    """With 40, the header alone lies in several."""
    shards = split(file, decoded_bytes(tmp_path, file), count)
    deployed = deploy_split(loader, shards)
    assert_holds(loader.load(deployed.url), file, tmp_path)
    assert sorted(deployed.all_asked()) == sorted([INDEX, *shards.names])
    (headers,) = deployed.asked(INDEX)
    assert headers["cache-control"] == "max-age=0", "the index is asked of the server each time"


def test_parts_that_the_page_knows(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    deployed = deploy_split(loader, three)
    url = f"{deployed.folder}/{STEM}.safetensors"
    total = decoded_bytes(tmp_path, file)
    # As a manifest has it: the hash of the whole is none to check once more.
    listed = {"bytes": len(file), "integrity": sri(file), "parts": three.parts}
    for options, expected in ((listed, len(file)), ({**listed, "decodedBytes": total}, total)):
        result = loader.load(url, **options)
        assert_holds(result, file, tmp_path)
        assert {event["total"] for event in result["progress"]} == {expected}
    assert deployed.asked(INDEX) == []
    assert loader.fails(url, parts=three.parts, decodedBytes=total + 1) == "corrupt"
    assert loader.fails(url, parts=three.parts, bytes=len(file) + 1) == "corrupt"
    assert loader.fails(url, parts=three.parts, maxBytes=total - 1) == "unsupported"
    assert loader.fails(url, parts=[]) == "corrupt"


def test_any_file_in_parts(loader: Loader, three: Split, tmp_path: Path) -> None:
    """A graph, a runtime: raw parts, names that a URL must spell otherwise."""
    data = np.random.default_rng(1).bytes(100_000)
    parts, files = raw_parts(data, 9_000, "ort wasm#1?%20ü")
    deployed = deploy(loader, b"", files)
    script = "([url, parts, options]) => join(url, parts, options)"
    result = loader.page.evaluate(script, [f"{deployed.folder}/ort.wasm", parts, {"bytes": 100_000}])
    assert (result["bytes"], result["sha256"]) == (100_000, hashlib.sha256(data).hexdigest())
    assert result["progress"] == sorted(result["progress"])
    assert result["progress"][-1] == 100_000
    result = loader.page.evaluate(script, [f"{deployed.folder}/ort.wasm", parts, {"bytes": 99_999}])
    assert result["error"]["code"] == "corrupt"
    deployed.put(parts[3]["file"], whole(flipped(files[parts[3]["file"]], 5)))
    result = loader.page.evaluate(script, [f"{deployed.folder}/ort.wasm", parts, {}])
    assert result["error"]["message"].startswith(f"{parts[3]['file']}: ")


def test_nothing_is_larger_than_the_limit(loader: Loader, file: bytes, tmp_path: Path) -> None:
    """From a server that gives no file over 3000 bytes, and so no index in one piece either."""
    shards = split(file, decoded_bytes(tmp_path, file), count=20)
    text, files = shards.text, dict(shards.files)
    rounds = 0
    while len(text) > 3000:
        parts, pieces = raw_parts(text, 3000, f"index{rounds}")
        files |= pieces
        text = json.dumps({"shrink": {"version": 1, "index": {"bytes": len(text), "parts": parts}}}).encode()
        rounds += 1
    assert rounds == 1
    deployed = deploy(loader, text, {name: data for name, data in files.items() if len(data) <= 3000})
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert len(deployed.cached()) == 20


# --- one fault -------------------------------------------------------------------------------------------------


FAULTS: dict[str, tuple[Callable[[Split, Split], Answer], str]] = {
    "missing": (lambda old, new: status(404), "http"),
    "forbidden": (lambda old, new: status(403), "http"),
    "out of order": (lambda old, new: status(500), "http"),
    "web page": (lambda old, new: whole(WEB_PAGE, content_type="text/html"), "http"),
    "web page as data": (lambda old, new: whole(WEB_PAGE), "truncated"),
    "empty": (lambda old, new: whole(b""), "truncated"),
    "truncated": (lambda old, new: whole(old.files[SECOND][:-1]), "truncated"),
    "too long": (lambda old, new: whole(old.files[SECOND] + b"!"), "corrupt"),
    "first bit": (lambda old, new: whole(flipped(old.files[SECOND], 0)), "corrupt"),
    "some bit": (lambda old, new: whole(flipped(old.files[SECOND], 2000)), "corrupt"),
    "last bit": (lambda old, new: whole(flipped(old.files[SECOND], len(old.files[SECOND]) - 1)), "corrupt"),
    "another, shorter shard": (lambda old, new: whole(old.files[old.names[0]][:-9]), "truncated"),
    "another deployment's": (lambda old, new: whole(new.files[SECOND]), "corrupt"),
    "breaks": (lambda old, new: cut(old.files[SECOND], 1000), "network"),
    "breaks at once": (lambda old, new: cut(old.files[SECOND], 0), "network"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_part(loader: Loader, three: Split, newer: Split, fault: str) -> None:
    answer, code = FAULTS[fault]
    deployed = deploy_split(loader, three)
    deployed.put(SECOND, answer(three, newer))
    result = loader.load(deployed.url)
    assert result["error"]["code"] == code
    assert result["error"]["message"].startswith(f"{SECOND}: ")
    assert len(deployed.asked(SECOND)) <= 4
    wait_for_no_workers(loader)


def test_swapped_shards(loader: Loader, three: Split) -> None:
    first, _, third = three.names
    deployed = deploy_split(loader, three)
    deployed.put(first, whole(three.files[third]))
    deployed.put(third, whole(three.files[first]))
    assert loader.fails(deployed.url) in ("corrupt", "truncated")
    # Their order in the index is the order of the bytes: there nothing is wrong but the content.
    swapped = json.loads(three.text)
    swapped["shrink"]["parts"].reverse()
    deployed = deploy(loader, json.dumps(swapped).encode(), three.files)
    assert loader.fails(deployed.url) in ("corrupt", "truncated")


def test_a_failed_part_ends_all(loader: Loader, three: Split) -> None:
    """Although the first, whose turn it is, may never come."""
    event = threading.Event()
    deployed = deploy_split(loader, three)
    deployed.put(three.names[0], hanging(three.files[three.names[0]], 100, event))
    deployed.put(three.names[2], status(404))
    try:
        assert loader.fails(deployed.url) == "http"
    finally:
        event.set()


# --- several answers -------------------------------------------------------------------------------------------


PASSING: dict[str, tuple[Callable[[bytes, bytes], list[Answer]], int]] = {
    "busy": (lambda right, wrong: [status(503), whole(right)], 2),
    "breaks": (lambda right, wrong: [cut(right, 1000), whole(right)], 2),
    "short": (lambda right, wrong: [whole(right[:-1]), whole(right)], 2),
    "compressed": (lambda right, wrong: [gzipped(right, etag='"a"')], 1),
    "stale": (lambda right, wrong: [whole(wrong), whole(right)], 2),
    "damaged once": (lambda right, wrong: [whole(flipped(right, 9)), whole(right)], 2),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_does_no_harm(
    loader: Loader, file: bytes, three: Split, newer: Split, tmp_path: Path, fault: str
) -> None:
    answers, requests = PASSING[fault]
    deployed = deploy_split(loader, three)
    deployed.put(SECOND, *answers(three.files[SECOND], newer.files[SECOND]))
    assert_holds(loader.load(deployed.url), file, tmp_path)
    assert len(deployed.asked(SECOND)) == requests
    assert len(deployed.asked(INDEX)) == 1


@pytest.mark.parametrize("tag", ['"tag"', 'W/"weak"', ""])
def test_only_the_rest_of_a_part_is_asked_for(
    loader: Loader, large: bytes, big: Split, tmp_path: Path, tag: str
) -> None:
    """With a strong tag the server is told which file; without, the hash will tell."""
    data = big.files[SECOND]
    strong = tag.startswith('"')
    begin = ranged(data, tag, breaks_after=len(data) // 2)
    deployed = deploy_split(loader, big)
    deployed.put(SECOND, begin, ranged(data, tag, heeds_if_range=strong))
    assert_holds(loader.load(deployed.url), large, tmp_path)
    first, second = deployed.asked(SECOND)
    assert "range" not in first
    assert second.get("if-range") == (tag if strong else None)
    assert 0 < int(second["range"].removeprefix("bytes=").removesuffix("-")) <= len(data) // 2


def test_a_part_replaced_on_the_way(loader: Loader, large: bytes, big: Split, tmp_path: Path) -> None:
    """The first half of another shard, then the rest of the right one: the hash tells, and it comes anew."""
    data = big.files[SECOND]
    begin = ranged(flipped(data, 12), "", breaks_after=len(data) // 2)
    deployed = deploy_split(loader, big)
    deployed.put(SECOND, begin, ranged(data, "", heeds_if_range=False), whole(data))
    assert_holds(loader.load(deployed.url), large, tmp_path)
    assert ["range" in headers for headers in deployed.asked(SECOND)] == [False, True, False]
    deployed.put(SECOND, begin, ranged(data, "", heeds_if_range=False), whole(flipped(data, 12)))
    assert loader.fails(deployed.url) == "corrupt"


def test_parts_of_another_origin(loader: Loader, large: bytes, big: Split, tmp_path: Path) -> None:
    """Which shows neither ETag nor Content-Range: the hash suffices."""
    data = big.files[SECOND]
    deployed = deploy_split(loader, big)
    for name in big.names:
        deployed.put(name, shared(whole(big.files[name])))
    deployed.put(INDEX, shared(whole(big.text)))
    begin, rest = (ranged(data, '"a"', breaks_after=n, heeds_if_range=False) for n in (len(data) // 2, None))
    deployed.put(SECOND, shared(begin), shared(rest))
    elsewhere = loader.site.url.replace("127.0.0.1", "localhost")
    assert_holds(loader.load(elsewhere + deployed.url), large, tmp_path)
    first, second = deployed.asked(SECOND)
    assert "range" not in first
    assert "range" in second
    assert "if-range" not in second


def test_a_server_without_ranges(loader: Loader, large: bytes, big: Split, tmp_path: Path) -> None:
    deployed = deploy_split(loader, big)
    data = big.files[SECOND]
    deployed.put(SECOND, cut(data, len(data) // 2), whole(data))
    assert_holds(loader.load(deployed.url), large, tmp_path)


# --- a redeploy while it loads ---------------------------------------------------------------------------------


def test_a_redeploy_is_followed(
    loader: Loader, file: bytes, other: bytes, three: Split, newer: Split, tmp_path: Path
) -> None:
    """The index is the old one's, what it names is gone or is the new one's already."""
    hashed = split(other, decoded_bytes(tmp_path, other), stem=f"{STEM}-3f9a2c1b")
    for label, new in (("same names", newer), ("names with a hash", hashed)):
        deployed = deploy_split(loader, new)
        deployed.put(INDEX, whole(three.text), whole(new.text))
        result = loader.load(deployed.url)
        assert_holds(result, other, tmp_path)
        assert len(deployed.asked(INDEX)) == 2, label
        loaded = [event["loaded"] for event in result["progress"]]
        assert loaded == sorted(loaded)


def test_an_index_is_read_twice_at_most(loader: Loader, three: Split, newer: Split) -> None:
    for answers in ([whole(three.text)], [whole(three.text), status(404)], [whole(three.text), whole(newer.text)]):
        deployed = deploy(loader, b"", {})
        deployed.put(INDEX, *answers)
        error = loader.load(deployed.url)["error"]
        assert (error["code"], error["status"]) == ("http", 404)
        assert error["message"].startswith(STEM)
        assert len(deployed.asked(INDEX)) == 2


# --- many parts at once ----------------------------------------------------------------------------------------


def test_four_parts_at_once(loader: Loader, file: bytes, tmp_path: Path) -> None:
    gauge = Gauge()
    shards = split(file, decoded_bytes(tmp_path, file), 12)
    deployed = deploy_split(loader, shards)
    for name, data in shards.files.items():
        deployed.put(name, gauge.slow(0.05, whole(data)))
    assert_holds(loader.load(deployed.url), file, tmp_path)
    assert gauge.most == 4


def test_no_part_is_asked_for_before_there_is_room(loader: Loader, file: bytes, tmp_path: Path) -> None:
    shards = split(file, decoded_bytes(tmp_path, file), 10)
    deployed = deploy_split(loader, shards)
    page = loader.page
    page.evaluate("([url, parts]) => openParts(url, parts)", [deployed.url, shards.parts])
    for taken in range(1, 11):
        assert page.evaluate("nextPart()")
        page.wait_for_timeout(20)
        assert taken <= len(deployed.all_asked()) <= taken + 3
    assert not page.evaluate("nextPart()")
    contents = [shards.files[part["file"]][part["skip"] :] for part in shards.parts]
    assert page.evaluate("takenParts()") == [hashlib.sha256(content).hexdigest() for content in contents]
    page.evaluate("([url, parts]) => openParts(url, parts)", [deployed.url, shards.parts])
    page.evaluate("nextPart()")
    deployed.forget()
    page.evaluate("closeParts()")
    page.wait_for_timeout(20)
    assert len(deployed.all_asked()) <= 3, "who stops early leaves nothing running"


def test_the_network_waits_for_the_decoder(loader: Loader, tmp_path: Path) -> None:
    """A decoder that does nothing for a while: at most 32 MiB wait for it, and a few parts."""
    script = """
        const held = [];
        const post = Worker.prototype.postMessage;
        let holds = true;
        Worker.prototype.postMessage = function (message, transfer) {
          const copy = structuredClone(message, { transfer: transfer ?? [] });
          if (holds && message.section) held.push(() => post.call(this, copy));
          else post.call(this, copy);
        };
        globalThis.release = () => { holds = false; held.splice(0).forEach((work) => work()); };
    """
    page = loader.fresh_page(script)
    data = container(tmp_path, [Tensor.of(f"t{i:02}", np.full(2**20, i, "f4")) for i in range(16)])
    shards = split(data, 16 * 2**22, 16)
    deployed = deploy_split(page, shards)
    page.page.evaluate("url => begin(url)", deployed.url)
    wait_until(page, lambda: len(deployed.all_asked()) >= 10)
    page.page.wait_for_timeout(300)
    assert len(deployed.all_asked()) <= 1 + 9 + 4
    page.page.evaluate("release()")
    result = page.page.evaluate("url => end(url)", deployed.url)
    assert result.get("tensors") == in_python(tmp_path, data), result.get("error")
    page.page.close()


def test_progress_is_steady(loader: Loader, large: bytes, big: Split, tmp_path: Path) -> None:
    """Also over breaks, also while a later part comes before the first, and out of the cache."""
    total = decoded_bytes(tmp_path, large)
    event = threading.Event()
    first, second, third = big.names
    deployed = deploy_split(loader, big)
    deployed.put(first, later(event, whole(big.files[first])))
    deployed.put(second, ranged(big.files[second], "", breaks_after=len(big.files[second]) // 2, heeds_if_range=False))
    deployed.put(third, cut(big.files[third], 10**6), whole(big.files[third]))
    options = {"tries": 9, "cache": True}
    loader.page.evaluate("([url, options]) => begin(url, options)", [deployed.url, options])
    loader.page.wait_for_function("url => asked(url)", arg=deployed.url)
    event.set()
    result = loader.page.evaluate("url => end(url)", deployed.url)
    assert_holds(result, large, tmp_path)
    loaded = progress_of(result)
    assert loaded[-1] == total
    assert len(set(loaded)) > 6, "within parts, too"
    deployed.forget()
    assert len(progress_of(loader.load(deployed.url, cache=True))) >= 3
    assert deployed.all_asked() == [INDEX]


# --- abort -----------------------------------------------------------------------------------------------------


def test_abort_on_the_way(loader: Loader, three: Split) -> None:
    """Whole parts stay in the cache, nothing else stays anywhere."""
    gone = threading.Event()
    deployed = deploy_split(loader, three)
    deployed.put(SECOND, watched(three.files[SECOND], 1000, gone))
    loader.page.evaluate("url => begin(url, { cache: true })", deployed.url)
    wait_until(loader, lambda: len(deployed.cached()) == 2)
    assert not gone.is_set()
    loader.page.evaluate("url => abort(url)", deployed.url)
    error = loader.page.evaluate("url => end(url)", deployed.url)["error"]
    assert gone.wait(10), "the connection ends, too"
    assert (error["code"], error["cause"], error["message"]) == ("aborted", "enough", "loading was aborted")
    assert len(deployed.cached()) == 2
    wait_for_no_workers(loader)


def test_abort_at_any_time(loader: Loader, three: Split) -> None:
    for at in (0, 1, 10_000, 40_000, 60_000):
        deployed = deploy_split(loader, three)
        assert loader.fails(deployed.url, abortAt=at, cache=True) == "aborted"
    deployed = deploy_split(loader, three)
    assert loader.fails(deployed.url, aborted=True) == "aborted"
    deployed.put(SECOND, status(503))
    assert loader.fails(deployed.url, abortAt=0, delay=100_000) == "aborted"
    wait_for_no_workers(loader)


# --- cache -----------------------------------------------------------------------------------------------------


def test_a_second_visit_asks_for_what_is_missing(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    third = three.names[2]
    deployed = deploy_split(loader, three)
    event = threading.Event()
    # It comes when the others are there and kept.
    deployed.put(third, later(event, cut(three.files[third], 100)), whole(three.files[third]))
    loader.page.evaluate("url => begin(url, { cache: true, tries: 1 })", deployed.url)
    wait_until(loader, lambda: len(deployed.cached()) == 2)
    event.set()
    assert loader.page.evaluate("url => end(url)", deployed.url)["error"]["code"] == "network"
    assert len(deployed.cached()) == 2
    deployed.forget()
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert sorted(deployed.all_asked()) == sorted([INDEX, third])
    deployed.forget()
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert deployed.all_asked() == [INDEX]


def test_after_a_redeploy_what_is_stale_goes(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    deployed, neighbour = deploy_split(loader, three), deploy_split(loader, three)
    loader.load(deployed.url, cache=True)
    loader.load(neighbour.url, cache=True)
    before = set(deployed.cached())
    # The last tensor's payload stands in the last shard, its checksum in the first one.
    changed = plain(make(tmp_path, 1, "int8", 50, last=7))
    assert len(changed) == len(file)
    new = split(changed, decoded_bytes(tmp_path, changed))
    assert new.files[SECOND] == three.files[SECOND]
    for name, data in new.files.items():
        deployed.put(name, whole(data))
    deployed.put(INDEX, whole(new.text))
    deployed.forget()
    assert_holds(loader.load(deployed.url, cache=True), changed, tmp_path)
    assert SECOND not in deployed.all_asked()
    after = set(deployed.cached())
    assert len(before) == len(after) == 3
    assert len(before & after) == 1
    assert len(neighbour.cached()) == 3


def test_a_damaged_part_is_fetched_again(loader: Loader, file: bytes, three: Split, tmp_path: Path) -> None:
    deployed = deploy_split(loader, three)
    loader.load(deployed.url, cache=True)
    loader.page.evaluate("damageCache()")
    deployed.forget()
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert len(deployed.all_asked()) == 4
    deployed.forget()
    assert_holds(loader.load(deployed.url, cache=True), file, tmp_path)
    assert len(deployed.all_asked()) == 1


@pytest.mark.parametrize("fault", ["missing", "truncated", "some bit", "breaks", "web page"])
def test_nothing_wrong_is_cached(loader: Loader, three: Split, newer: Split, fault: str) -> None:
    deployed = deploy_split(loader, three)
    for name in three.names:
        deployed.put(name, FAULTS[fault][0](three, newer) if name == SECOND else status(404))
    loader.fails(deployed.url, cache=True)
    assert deployed.cached() == []


@pytest.mark.parametrize(
    "script",
    [
        "Cache.prototype.put = async () => { throw new DOMException('full', 'QuotaExceededError'); }",
        "Cache.prototype.match = Cache.prototype.keys = async () => { throw new DOMException('no', 'UnknownError'); }",
        "CacheStorage.prototype.open = async () => { throw new DOMException('no', 'SecurityError'); }",
        "Object.defineProperty(globalThis, 'caches', { value: undefined })",
    ],
)
def test_without_a_working_cache(loader: Loader, file: bytes, three: Split, tmp_path: Path, script: str) -> None:
    page = loader.fresh_page(script)
    deployed = deploy_split(page, three)
    for _ in range(2):
        assert_holds(page.load(deployed.url, cache=True), file, tmp_path)
    page.page.close()
