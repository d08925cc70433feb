"""The page that an export writes: what it shows, and what it says of a folder that is damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests import browser as browsers
from tests import faulty_server
from tests.pages import (
    ROOT,
    Opened,
    assert_close,
    chromium,
    exported,
    needs_package,
    opened,
    put_networks,
    python_outputs,
    served,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_networks(tmp_path_factory.mktemp("networks"))


@needs_package
def test_pictures_tables_and_figures(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    python = python_outputs(folder, "generator", None, 0)
    with served(out) as url, opened(browser, url) as page:
        pixels = page.page.evaluate(
            "(() => { const c = document.querySelector('canvas');"
            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
        )
        shown = np.array(pixels).reshape(16, 16, 4)
        expected = np.moveaxis(python["image"][0], 0, 2) * 255
        assert np.abs(shown[..., :3] - expected).max() <= 0.51
        assert (shown[..., 3] == 255).all()
        first = page.text("#outputs table tr >> nth=0").split()
        assert first == [str(python["scores"].argmax()), f"{python['scores'].max():.6g}"]
        assert page.page.locator("#timings tr").count() == 6
        names = ("weights.safetensors", "model.onnx", "runtime/ort-wasm-simd-threaded.wasm.gz")
        total = sum((out / name).stat().st_size for name in names)
        assert page.page.evaluate("[progress.value, progress.max]") == [total, total]
        weights = (out / "weights.safetensors").stat().st_size
        assert f"{weights / 1e6:.2f} MB" in page.text("#sizes")


@needs_package
def test_a_phone_a_keyboard_and_the_dark(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    dark: dict[str, Any] = {"viewport": {"width": 320, "height": 568}, "color_scheme": "dark"}
    with served(out) as url, opened(browser, url, **dark) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 320
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        page.page.keyboard.press("Tab")
        assert page.page.evaluate("document.activeElement.id") == "seed"
        page.page.keyboard.press("Control+A")
        page.page.keyboard.type("4294967295")
        page.page.keyboard.press("Enter")
        page.page.get_by_text("Run in").wait_for()
        assert_close(page.outputs(), python_outputs(folder, "generator", None, 2**32 - 1))


@needs_package
def test_the_page_may_not_evaluate_text_or_reach_out(browser: Browser, folder: Path) -> None:
    out = exported(folder, "generator")
    with served(out) as url, browsers.serve(out) as other, opened(browser, url) as page:
        # What the test itself asks for may evaluate; what the page does later may not.
        for attempt in ("new Function('return 1')()", f"await fetch('{other}/model.onnx', {{ mode: 'no-cors' }})"):
            later = f"(async () => {{ try {{ {attempt}; return 'done'; }} catch (error) {{ return error.name; }} }})"
            name = page.page.evaluate(f"new Promise((tell) => setTimeout(() => {later}().then(tell)))")
            assert name in ("EvalError", "TypeError")


@needs_package
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("weights.safetensors", "missing", "weights.safetensors: the server answered 404"),
        ("weights.safetensors", "cut", "weights.safetensors: "),
        ("weights.safetensors", "flipped", "weights.safetensors: "),
        ("model.onnx", "missing", "model.onnx: the server answers 404"),
        ("model.onnx", "flipped", "model.onnx: it is not the file that was exported"),
        ("runtime/ort-wasm-simd-threaded.wasm.gz", "cut", "belong there"),
        ("runtime/ort.wasm.min.js", "missing", "ort.wasm.min.js"),
        ("manifest.json", "missing", "manifest.json: the server answers 404"),
        ("runtime/ort.wasm.min.js", "cut", "ort.wasm.min.js: "),
        ("runtime/ort-wasm-simd-threaded.js", "missing", "runtime/ort-wasm-simd-threaded.js: the server answers 404"),
        ("shrink/loader.js", "missing", "shrink/loader.js: the server answers 404"),
        ("shrink/loader.js", "cut", "shrink/loader.js: "),
        ("shrink/runtimes/onnxruntime_web.js", "missing", "shrink/runtimes/onnxruntime_web.js: the server answers 404"),
        ("shrink/fetch_file.js", "missing", "shrink/fetch_file.js: the server answers 404"),
        ("shrink/codec.wasm", "missing", "codec.wasm: the server answered 404"),
        ("show.js", "missing", "show.js: the server answers 404"),
        ("files.js", "missing", "files.js: it is missing or damaged"),
    ],
)
def test_what_is_damaged_is_said_and_nothing_is_drawn(
    browser: Browser, folder: Path, tmp_path: Path, file: str, damage: str, words: str
) -> None:
    out = tmp_path / "site"
    shutil.copytree(exported(folder, "generator"), out)
    data = bytearray((out / file).read_bytes())
    if damage == "missing":
        (out / file).unlink()
    elif damage == "cut":
        (out / file).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) * 3 // 4] ^= 4
        (out / file).write_bytes(data)
    with served(out) as url, opened(browser, url) as page:
        assert_failed(page, words)


def assert_failed(page: Opened, words: str) -> None:
    assert words in page.text("#error")
    assert page.text("#error").endswith(("(LoadError)", "(Error)"))
    assert page.text("#status") == "The network could not be run."
    assert page.page.locator("canvas").count() == 0
    assert not page.page.locator("#result").is_visible()


def without(manifest: dict[str, Any], key: str) -> str:
    return json.dumps({k: v for k, v in manifest.items() if k != key})


@needs_package
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: "", "it is damaged or cut off: it is not JSON"),
        (lambda m: json.dumps(m)[:-20], "it is damaged or cut off: it is not JSON"),
        (lambda m: "<!DOCTYPE html><h1>Welcome</h1>", "the server gives a web page in its place"),
        (lambda m: "[]", "it is not what shrink wrote"),
        (lambda m: "null", "it is not what shrink wrote"),
        (lambda m: without(m, "shrink"), "it is not what shrink wrote"),
        (lambda m: json.dumps({**m, "shrink": 2}), "its version is 2, this page knows 1"),
        *((lambda m, key=key: without(m, key), f'its part "{key}" is missing or damaged')
          for key in ("title", "adapter", "files", "runtime", "model", "weights", "inputs", "outputs")),
        (lambda m: json.dumps({**m, "adapter": "../../evil.js"}), 'its part "adapter" is missing or damaged'),
        (lambda m: json.dumps({**m, "inputs": [{"name": "z"}]}), 'its part "inputs" is missing or damaged'),
        (lambda m: json.dumps({**m, "files": {"model.onnx": {}}}), 'its part "files" is missing or damaged'),
        (lambda m: json.dumps({**m, "weights": "other.safetensors"}), "it does not list other.safetensors"),
        (lambda m: json.dumps({**m, "weights": "constructor"}), "it does not list constructor"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used(
    browser: Browser, folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], str], words: str
) -> None:
    out = tmp_path / "site"
    shutil.copytree(exported(folder, "generator"), out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(change(manifest))
    with served(out) as url, opened(browser, url) as page:
        assert_failed(page, f"manifest.json: {words}")


@needs_package
@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("manifest.json", faulty_server.status(500), "manifest.json: the server answers 500"),
        ("manifest.json", faulty_server.cut(b"{" * 99, 9), "manifest.json: the server cannot be reached, or the conn"),
        ("shrink/loader.js", faulty_server.status(503), "shrink/loader.js: the server answers 503"),
        ("shrink/loader.js", faulty_server.whole(b"<h1>Hello</h1>", content_type="text/html"), "14 bytes came"),
        ("shrink/loader.js", "text/plain", "shrink/loader.js: the server gives it as text/plain, not as a script"),
        ("runtime/ort.wasm.min.js", "application/octet-stream", "the server does not give it as a script"),
    ],
)
def test_a_server_that_misbehaves_is_said(
    browser: Browser, folder: Path, path: str, answer: faulty_server.Answer | str, words: str
) -> None:
    out = exported(folder, "generator")
    if isinstance(answer, str):
        answer = faulty_server.whole((out / path).read_bytes(), content_type=answer)
    with faulty_server.faulty_server({"/": out}) as site:
        site.put(answer, name=f"/{path}")
        with opened(browser, f"{site.url}/index.html") as page:
            assert_failed(page, words)


def test_what_every_adapter_imports_is_asked_for_at_once() -> None:
    web = ROOT / "shrink" / "web"
    linked = re.findall(r'<link rel="modulepreload" href="(.+?)">', (web / "pages" / "index.html").read_text())
    wanted, left = set[str](), ["site_downloads.js"]
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += re.findall(r'^import .* from "\./(.+)";$', (web / name).read_text(), re.MULTILINE)
    assert linked == ["files.js", "show.js", *(f"shrink/{name}" for name in sorted(wanted))]
