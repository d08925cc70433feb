"""WebDNN folders in parts: stock WebDNN loads them by one more script, a fault is an error, and joining undoes it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink import formats, parts
from shrink.errors import BadInput, BoundNotMet, IntegrityError, ShrinkError, UsageError
from shrink.progress import silent
from shrink.split import webdnn
from tests.browser import chromium
from tests.faulty_server import Answer, Site, cut, faulty_server, status, whole

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TESTS = Path(__file__).parent
STOCK = TESTS / "node_modules" / "webdnn"
SNAPSHOT = TESTS.parent / "benchmarks" / "models" / "cdcgan.npz"
LIMIT = 100_000

needs_webdnn = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("chainer", "webdnn"))
    or shutil.which("em++") is None
    or not STOCK.is_dir(),
    reason="chainer, webdnn, emscripten or the npm package webdnn is not installed",
)

Content = dict[str, bytes]


def content(folder: Path) -> Content:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def split(folder: Path, limit: int, *, force: bool = False) -> list[str]:
    """Split a folder; the names of what was planned."""
    plan = webdnn.plan(folder, limit, folder, force=force)
    plan.write(silent)
    for file in plan.files:
        assert (folder / file.name).stat().st_size == file.size_bytes <= limit, file
    return [file.name for file in plan.files]


def part_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("weight_*-of-*.bin"))


def sri(data: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()


# --- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a network on stock WebDNN, not split."""
    from shrink.export import Network
    from shrink.export import webdnn as target
    from shrink.networks import chainer

    folder = tmp_path_factory.mktemp("whole")
    weights = formats.sniff(SNAPSHOT).read(SNAPSHOT)
    chain = chainer.load(f"{SNAPSHOT.with_name('networks.py')}:Generator", weights)
    target.export(Network("Generator", weights, ((1, 110),), chain), folder, None, runtime=STOCK)
    return folder


@pytest.fixture(scope="module")
def split_site(whole_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "site"
    shutil.copytree(whole_site, folder)
    split(folder / "model", LIMIT)
    assert len(part_names(folder / "model")) == 9
    return folder


@pytest.fixture
def site(split_site: Path) -> Iterator[Site]:
    """The split folder, with scripts of this test's own."""
    with faulty_server({"/": split_site}) as site:
        yield site


PAGE = "<!doctype html><head><link rel=icon href=data:></head><script src=runtime/webdnn.js></script>{}"
SCRIPT = "<script src=model/split.js></script>"
RUN = """async options => {
    const runner = await WebDNN.load("./model", { backendOrder: ["webassembly"], saveCache: false, ...options });
    const [x] = runner.getInputViews();
    x.set(Float32Array.from({ length: x.length }, (_, i) => Math.sin(i)));
    await runner.run();
    return Array.from(runner.getOutputViews()[0].toActual());
}"""


class Opened:
    def __init__(self, page: Page, site: Site, body: str = SCRIPT):
        site.put(whole(PAGE.format(body).encode(), content_type="text/html"), name="/index.html")
        self.page = page
        self.said: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.goto(f"{site.url}/index.html")

    def run(self, **options: Any) -> list[float]:
        values: list[float] = self.page.evaluate(RUN, options)
        return values


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def expected(browser: Browser, whole_site: Path) -> list[float]:
    """What the network makes of its weights in one file."""
    context = browser.new_context()
    with faulty_server({"/": whole_site}) as site:
        values = Opened(context.new_page(), site, body="").run()
    context.close()
    assert np.ptp(values) > 0.1
    return values


@needs_webdnn
@pytest.mark.parametrize("strategy", ["latest", "networkOnly"])
def test_stock_webdnn_computes_the_same(site: Site, page: Page, expected: list[float], strategy: str) -> None:
    assert Opened(page, site).run(cacheStrategy=strategy) == expected
    asked = [path for path, _ in site.requests if "weight" in path]
    assert sorted(asked) == [f"/model/{name}" for name in part_names(site.folders["/"] / "model")]


@needs_webdnn
def test_without_the_script_nothing_is_computed(site: Site, page: Page) -> None:
    with pytest.raises(Exception, match="No backend is available"):
        Opened(page, site, body="").run()


FETCH = """async path => {
    const response = await fetch(path);
    const length = response.headers.get("Content-Length");
    const data = new Uint8Array(await response.arrayBuffer());
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    return [length, data.length, "sha256-" + btoa(String.fromCharCode(...hash))];
}"""
REQUEST = """([path, type]) => new Promise((done, failed) => {
    const xhr = new XMLHttpRequest();
    xhr.open("GET", path);
    xhr.responseType = type;
    const heard = [];
    xhr.onreadystatechange = () => heard.push(xhr.readyState);
    const loaded = [];
    xhr.onprogress = (event) => loaded.push([event.loaded, event.total]);
    xhr.onload = async () => {
        const body = type ? await new Response(xhr.response).text() : xhr.responseText;
        done([xhr.status, body.length, heard, loaded]);
    };
    xhr.onerror = (event) => failed(new Error(`error: ${event.message}`));
    xhr.send();
})"""


@needs_webdnn
@pytest.mark.parametrize("query", ["", "?t=1699999999", "#x"])
def test_fetch_gives_the_whole_file(site: Site, whole_site: Path, page: Page, query: str) -> None:
    data = (whole_site / "model" / "weight_webassembly.bin").read_bytes()
    found = Opened(page, site).page.evaluate(FETCH, f"model/weight_webassembly.bin{query}")
    assert found == [str(len(data)), len(data), sri(data)]


@needs_webdnn
def test_other_files_come_as_they_are(site: Site, page: Page) -> None:
    opened = Opened(page, site)
    for path in ("/model/weight_other.bin", "/elsewhere/weight_webassembly.bin"):
        site.put(whole(b"other"), name=path)
        assert opened.page.evaluate(FETCH, path) == ["5", 5, sri(b"other")]
        for kind in ("", "text", "blob", "arraybuffer"):
            assert opened.page.evaluate(REQUEST, [path, kind])[:2] == [200, 5]
    assert opened.page.evaluate(REQUEST, ["model/weight_nothing.bin", "text"])[0] == 404


@needs_webdnn
def test_xmlhttprequest_gives_the_whole_file(site: Site, page: Page) -> None:
    opened = Opened(page, site)
    for kind in ("blob", "arraybuffer"):
        status, _, heard, loaded = opened.page.evaluate(REQUEST, ["model/weight_webassembly.bin", kind])
        assert (status, heard) == (200, [4])
        assert [total for _, total in loaded] == [840_452] * 9
        assert [now for now, _ in loaded] == sorted(now for now, _ in loaded)
        assert loaded[-1][0] == 840_452
    # Used again for another file, nothing of the first answer is left.
    again = """async () => {
        const xhr = new XMLHttpRequest();
        const get = (path) => new Promise((done) => {
            xhr.open("GET", path);
            xhr.responseType = "arraybuffer";
            xhr.onload = () => done(xhr.response.byteLength);
            xhr.send();
        });
        return [await get("model/weight_webassembly.bin"), await get("model/kernels_webassembly.js")];
    }"""
    kernels = (site.folders["/"] / "model" / "kernels_webassembly.js").stat().st_size
    assert opened.page.evaluate(again) == [840_452, kernels]


@needs_webdnn
def test_a_request_can_be_aborted(site: Site, page: Page) -> None:
    stop = """async () => {
        const abort = new AbortController();
        const answer = fetch("model/weight_webassembly.bin", { signal: abort.signal });
        abort.abort();
        const xhr = new XMLHttpRequest();
        let loaded = false;
        xhr.onload = () => (loaded = true);
        xhr.open("GET", "model/weight_webassembly.bin");
        xhr.send();
        xhr.abort();
        const failed = await answer.then(() => false, () => true);
        const whole = await fetch("model/weight_webassembly.bin").then((r) => r.arrayBuffer());
        return [failed, loaded, whole.byteLength];
    }"""
    assert Opened(page, site).page.evaluate(stop) == [True, False, 840_452]


def damaged(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


# Of the third part: what its server answers, and what is said of it.
FAULTS: dict[str, tuple[Callable[[bytes, bytes], Answer], str]] = {
    "missing": (lambda data, other: status(404), "the server answers 404"),
    "an error": (lambda data, other: status(503), "the server answers 503"),
    "an HTML page": (lambda data, other: status(200), "bytes came, "),
    "an HTML page of its length": (
        lambda data, other: whole((b"<!DOCTYPE html>" * len(data))[: len(data)]),
        "it is not the part that was written",
    ),
    "cut short": (lambda data, other: whole(data[:-1]), "bytes came, "),
    "broken off": (lambda data, other: cut(data, 5000), "broke"),
    "too long": (lambda data, other: whole(data + b"\0"), "bytes came, "),
    "one bit flipped": (lambda data, other: whole(damaged(data)), "it is not the part that was written"),
    "swapped": (lambda data, other: whole(other), "part"),
}


@needs_webdnn
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_part_is_an_error(site: Site, page: Page, fault: str) -> None:
    folder = site.folders["/"] / "model"
    first, _, name, *_ = part_names(folder)
    make, said = FAULTS[fault]
    site.put(make((folder / name).read_bytes(), (folder / first).read_bytes()), name=f"/model/{name}")
    opened = Opened(page, site)
    with pytest.raises(Exception, match="No backend is available"):
        opened.run()
    blamed = [text for text in opened.said if "Trying next backend" in text and name in text]
    assert len(blamed) == 1
    assert said in blamed[0] or "bytes came" in blamed[0]
    opened.said.clear()
    with pytest.raises(Exception, match="Failed to fetch"):
        opened.page.evaluate(FETCH, "model/weight_webassembly.bin")
    assert any(text.startswith(f"split.js: {name}: ") for text in opened.said)
    with pytest.raises(Exception, match=f"error: {name}: "):
        opened.page.evaluate(REQUEST, ["model/weight_webassembly.bin", "blob"])


@needs_webdnn
def test_a_part_that_fails_once_is_fetched_again(site: Site, page: Page, expected: list[float]) -> None:
    folder = site.folders["/"] / "model"
    for name in part_names(folder)[::3]:
        data = (folder / name).read_bytes()
        site.put(whole(damaged(data)), whole(data), name=f"/model/{name}")
    assert Opened(page, site).run() == expected


@needs_webdnn
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (status(404), "split.json: the server answers 404"),
        (status(200), "split.json: it is not JSON"),
        (whole(b"null"), "split.json: its version"),
        (whole(b'{"shrink": {"version": 2, "files": {}}}'), "split.json: its version"),
    ],
)
def test_a_bad_index_is_an_error(site: Site, page: Page, answer: Answer, said: str) -> None:
    site.put(answer, name="/model/split.json")
    opened = Opened(page, site)
    with pytest.raises(Exception, match="No backend is available"):
        opened.run()
    assert any(said in text for text in opened.said)
    # The next request asks again.
    del site.scripts["/model/split.json"]
    assert opened.page.evaluate(FETCH, "model/weight_webassembly.bin")[1] == 840_452


def test_an_index_in_parts_is_read_by_the_page(browser: Browser, tmp_path: Path) -> None:
    model = make(tmp_path / "model", weights=1_500_000)
    data = (model / "weight_webassembly.bin").read_bytes()
    names = split(model, 10_000)
    assert sum(name.startswith("split-") for name in names) > 1
    context = browser.new_context()
    with faulty_server({"/": tmp_path}) as site:
        site.put(whole(f"<!doctype html>{SCRIPT}".encode(), content_type="text/html"), name="/index.html")
        page = context.new_page()
        page.goto(f"{site.url}/index.html")
        assert page.evaluate(FETCH, "model/weight_webassembly.bin")[2] == sri(data)
    context.close()


# --- without one -----------------------------------------------------------------------------------------------


def make(folder: Path, weights: int = 250_000, seed: int = 0) -> Path:
    """Files as a WebDNN folder has them; nothing here looks inside."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    (folder / "graph_webassembly.json").write_text('{"weight_encoding": "raw"}')
    (folder / "kernels_webassembly.js").write_text("// kernels")
    (folder / "weight_webassembly.bin").write_bytes(rng.bytes(weights))
    return folder


def assert_sound(folder: Path, *models: Content) -> None:
    """The folder holds one of these models, so that a page gets it."""
    listed = {}
    if (folder / "split.json").exists():
        listed = parts.read_json(folder / "split.json")[0]["shrink"]["files"]
    held = {name: data for name, data in content(folder).items() if name in models[0]}
    for name, said in listed.items():
        if held.keys() == models[0].keys() and held in models and not (folder / "split.js").exists():
            continue  # joined, but for the parts
        data = b"".join((folder / part["file"]).read_bytes() for part in said["parts"])
        assert sri(data) == said["integrity"]
        held[name] = data
    assert held in models


@given(
    sizes=st.lists(st.integers(0, 120_000), min_size=1, max_size=3),
    limit=st.integers(10_000, 60_000),
    graph=st.integers(0, 30_000),
)
def test_joining_undoes_splitting(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, graph: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    for number, size in enumerate(sizes):
        (folder / f"weight_b{number}.bin").write_bytes(np.random.default_rng(number).bytes(size))
    (folder / "graph_b0.json").write_bytes(b" " * graph)
    before = content(folder)
    planned = split(folder, limit)
    after = content(folder)
    assert all(len(data) <= limit for data in after.values())
    cut_files = {name for name, data in before.items() if len(data) > limit}
    assert "graph_b0.json" not in after or "weight_b0.bin" in after
    if "weight_b0.bin" in cut_files:
        cut_files.add("graph_b0.json")
    expected = sum(max(1, -(-len(before[n]) // limit)) for n in cut_files)
    assert set(planned) == set(after) - set(before)
    assert len([n for n in planned if n.endswith(".bin")]) == expected
    if cut_files:
        assert split(folder, limit) == [n for n in planned if n.endswith(".bin")]
        assert content(folder) == after
        assert webdnn.join(folder) == folder
    assert content(folder) == before


def test_a_real_model(shared_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "squeezenet"
    shutil.copytree(shared_models / "squeezenet-webdnn", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    before = content(folder)
    split(folder, 200_000)
    assert len(part_names(folder)) == 6
    webdnn.join(folder)
    assert content(folder) == before


def test_splitting_is_deterministic(tmp_path: Path) -> None:
    folders = [make(tmp_path / name) for name in "ab"]
    for folder in folders:
        split(folder, 30_000)
    assert content(folders[0]) == content(folders[1])


def test_the_script_is_within_the_smallest_limit() -> None:
    assert len(webdnn._script()) <= 10_000


def test_the_plan_says_what_the_page_needs(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    before = content(folder)
    plan = webdnn.plan(folder, 60_000, folder)
    assert content(folder) == before
    assert '<script src="model/split.js"></script>' in plan.notes[0]
    assert [f.name for f in plan.files][-2:] == ["split.js", "split.json"]


def test_the_line_for_the_page_is_html_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = make(tmp_path / 'モデル "><script>#?%')
    (note,) = webdnn.plan(folder, 60_000, folder).notes
    address = note.partition('src="')[2].partition('"')[0]
    assert note.endswith(f'<script src="{address}"></script>')
    assert not set(address) & set("<>#? ")
    assert unquote(address) == f"{folder.name}/split.js"


def test_a_folder_within_the_limit_stays_as_it_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    before = content(folder)
    plan = webdnn.plan(folder, 250_000, folder)
    plan.write(silent)
    assert plan.files == ()
    assert "within the limit already" in plan.notes[0]
    assert content(folder) == before


@pytest.mark.parametrize("name", ["kernels_webassembly.wasm", "kernels_webassembly.js", "sub/photo.jpg"])
def test_a_file_that_cannot_be_cut_is_named(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(bytes(20_001))
    before = content(folder)
    with pytest.raises(BoundNotMet, match=rf"{name}: its 20001 bytes.*smallest limit that works is 20001") as caught:
        split(folder, 20_000)
    assert caught.value.exit_code == 4
    assert content(folder) == before
    split(folder, 20_001)


def test_a_new_model_replaces_the_parts_of_the_old(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    split(folder, 60_000)
    old = set(part_names(folder))
    make(folder, seed=1)
    new = content(folder)["weight_webassembly.bin"]
    with pytest.raises(UsageError, match=r"weight_webassembly\.bin is in parts and, with other content, there"):
        webdnn.plan(folder, 60_000, folder)
    split(folder, 60_000, force=True)
    assert old.isdisjoint(part_names(folder))
    webdnn.join(folder)
    assert content(folder)["weight_webassembly.bin"] == new


def test_a_new_model_within_the_limit_ends_the_split(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    split(folder, 60_000)
    make(folder, weights=500)
    before = content(folder)
    split(folder, 60_000, force=True)
    kept = ("graph_webassembly.json", "kernels_webassembly.js", "weight_webassembly.bin")
    assert content(folder) == {name: before[name] for name in kept}


def test_a_smaller_limit_needs_a_join_first(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    before = content(folder)
    split(folder, 60_000)
    for force in (False, True):
        with pytest.raises(UsageError, match=r"split already, for a larger limit .join it first"):
            webdnn.plan(folder, 40_000, folder, force=force)
    webdnn.join(folder)
    split(folder, 40_000)
    webdnn.join(folder)
    assert content(folder) == before


def test_a_script_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "split.js").write_text("mine")
    with pytest.raises(UsageError, match=r"split.js: exists already"):
        webdnn.plan(folder, 60_000, folder)
    assert (folder / "split.js").read_text() == "mine"


class Killed(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do the work until just before its rename or removal number `step`; whether it ended before."""
    count = 0

    def counted(original: Callable[..., Any], temporary_too: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            if temporary_too or not str(arguments[0]).endswith(".tmp"):
                count += 1
                if count > step:
                    raise Killed
            return original(*arguments, **more)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace, True))
        patch.setattr(Path, "unlink", counted(Path.unlink, False))
        try:
            work()
        except Killed:
            return False
    return True


def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make(tmp_path / "model")
    first = content(original)
    second = {**first, "weight_webassembly.bin": content(make(tmp_path / "other", seed=1))["weight_webassembly.bin"]}
    for step in range(100):
        folder = tmp_path / f"{step}"
        shutil.copytree(original, folder)
        done = killed_at(step, monkeypatch, lambda folder=folder: split(folder, 60_000))  # type: ignore[misc]
        assert_sound(folder, first)
        split(folder, 60_000)
        (folder / "weight_webassembly.bin").write_bytes(second["weight_webassembly.bin"])
        killed_at(step, monkeypatch, lambda folder=folder: split(folder, 60_000, force=True))  # type: ignore[misc]
        assert_sound(folder, first, second)
        split(folder, 60_000, force=True)
        killed_at(step, monkeypatch, lambda folder=folder: webdnn.join(folder))  # type: ignore[misc]
        assert_sound(folder, second) if step < 8 else None
        if (folder / "split.json").exists():
            webdnn.join(folder)
        assert content(folder) == second
        if done:
            break
    assert 5 < step < 50


def test_a_damaged_part_is_not_joined(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    split(folder, 60_000)
    name = part_names(folder)[1]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(data))
    after = content(folder)
    with pytest.raises(IntegrityError, match=f"part {name}: its content is not"):
        webdnn.join(folder)
    assert content(folder) == after


def changed(index: dict[str, Any], **what: Any) -> dict[str, Any]:
    return {"shrink": {**index["shrink"], **what}}


def entry(index: dict[str, Any], **what: Any) -> dict[str, Any]:
    name = "weight_webassembly.bin"
    return changed(index, files={name: {**index["shrink"]["files"][name], **what}})


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda index: [],
    "not ours": lambda index: {},
    "a later version": lambda index: changed(index, version=2),
    "a version that is no number": lambda index: changed(index, version=True),
    "no files": lambda index: changed(index, files=[]),
    "a file elsewhere": lambda index: changed(index, files={"../x.bin": {}}),
    "another file": lambda index: changed(index, files={"index.html": next(iter(index["shrink"]["files"].values()))}),
    "an entry that is none": lambda index: changed(index, files={"weight_a.bin": 7}),
    "no parts": lambda index: entry(index, parts=[]),
    "no hash": lambda index: entry(index, integrity=None),
    "a part elsewhere": lambda index: entry(
        index, parts=[{"file": "../a", "bytes": 1, "integrity": sri(b"a")}], bytes=1
    ),
    "a wrong sum": lambda index: entry(index, bytes=7),
    "no length": lambda index: entry(index, bytes=None),
    "an endless length": lambda index: entry(index, bytes=10**30),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_index_is_refused(tmp_path: Path, what: str) -> None:
    folder = make(tmp_path / "model")
    split(folder, 60_000)
    index = json.loads((folder / "split.json").read_text())
    (folder / "split.json").write_text(json.dumps(MALFORMED[what](index)))
    before = content(tmp_path)
    with pytest.raises(BadInput):
        webdnn.join(folder)
    with pytest.raises(ShrinkError):
        webdnn.plan(folder, 60_000, folder, force=True)
    assert content(tmp_path) == before


def test_what_an_index_names_is_not_removed_unless_it_is_ours(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    split(folder, 60_000)
    data = b"precious"
    (folder / "thesis.txt").write_bytes(data)
    index = json.loads((folder / "split.json").read_text())
    mine = {"bytes": 8, "integrity": sri(data), "parts": [{"file": "thesis.txt", "bytes": 8, "integrity": sri(data)}]}
    index["shrink"]["files"]["weight_x.bin"] = mine
    (folder / "split.json").write_text(json.dumps(index))
    webdnn.join(folder)
    assert (folder / "thesis.txt").read_bytes() == (folder / "weight_x.bin").read_bytes() == data


def test_a_folder_that_is_not_split_is_not_joined(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no split\.json"):
        webdnn.join(make(tmp_path / "model"))


def test_a_file_that_changes_after_planning_is_not_split(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    plan = webdnn.plan(folder, 60_000, folder)
    (folder / "weight_webassembly.bin").write_bytes(b"short")
    with pytest.raises(BadInput, match="changed since"):
        plan.write(silent)
    assert (folder / "weight_webassembly.bin").read_bytes() == b"short"
    assert not (folder / "split.json").exists()
