"""Split pages in a real browser: what they compute is what the whole page computes, or they say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shrink.manifest import MANIFEST
from shrink.progress import silent
from shrink.split import site as splitting
from tests.command import run
from tests.pages import chromium, exported, needs_package, opened, put_networks, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Below this the runtime's own scripts do not fit.
LIMIT = 50_000
WEIGHTS = "weights.safetensors"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(put_networks(tmp_path_factory.mktemp("networks")), "generator")


@pytest.fixture
def split(whole: Path, tmp_path: Path) -> Path:
    splitting.plan(whole, LIMIT, tmp_path / "split").write(silent)
    return tmp_path / "split"


@needs_package
def test_it_computes_the_same_bit_for_bit_from_files_within_the_limit(
    browser: Browser, whole: Path, split: Path
) -> None:
    with served(whole) as url, opened(browser, url) as page:
        expected = page.outputs()
    sizes = {p.name: p.stat().st_size for p in split.rglob("*") if p.is_file()}
    assert max(sizes.values()) <= LIMIT
    with served(split) as url, opened(browser, url) as page:
        assert page.faults == []
        outputs = page.outputs()
        assert page.page.evaluate("progress.value === progress.max")
        asked = [request for request in page.requests if request.endswith(".bin")]
        assert len(asked) == len(set(asked)) == sum(name.endswith(".bin") for name in sizes)
        # A second visit has every part in its cache.
        page.requests.clear()
        page.page.reload()
        page.page.locator("#timings tr").first.wait_for()
        assert [request for request in page.requests if request.endswith(".bin")] == []
    for name, values in expected.items():
        assert np.array_equal(outputs[name], values)


@needs_package
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda part, other: part.unlink(), "404"),
        (lambda part, other: part.write_bytes(part.read_bytes()[:-9]), ""),
        (lambda part, other: part.write_bytes(part.read_bytes()[:-1] + b"!"), ""),
        (lambda part, other: part.write_bytes(other.read_bytes()), ""),
        (lambda part, other: part.write_text("<!DOCTYPE html><title>Home</title>"), ""),
    ],
    ids=["missing", "short", "flipped", "swapped", "web page"],
)
@pytest.mark.parametrize("name", [WEIGHTS, "ort-wasm-simd-threaded.wasm.gz"])
def test_a_damaged_part_is_named_and_no_picture_drawn(
    browser: Browser, split: Path, name: str, damage: Callable[[Path, Path], object], said: str
) -> None:
    (part,) = split.rglob(f"{name}-*-00002-of-*.bin")
    (other,) = split.rglob(f"{name}-*-00001-of-*.bin")
    damage(part, other)
    with served(split) as url, opened(browser, url) as page:
        error = page.text("#error")
        assert part.name in error
        assert said in error
        assert page.page.locator("canvas").count() == 0


@needs_package
def test_a_page_of_two_deployments_draws_nothing_or_the_right_thing(browser: Browser, whole: Path, split: Path) -> None:
    """The parts of another export under the names of this one, and this one's manifest."""
    for part in split.glob(f"{WEIGHTS}-*.bin"):
        shutil.copy(exported(whole.parent, "generator", "--mode", "float16") / WEIGHTS, part)
    with served(split) as url, opened(browser, url) as page:
        assert WEIGHTS in page.text("#error")
        assert page.page.locator("canvas").count() == 0


@needs_package
@pytest.mark.parametrize("options", [[], ["--sequential"], ["--mode", "float16"]], ids=" ".join)
def test_stages_compute_the_same_bit_for_bit(browser: Browser, whole: Path, options: list[str]) -> None:
    modes = [option for option in options if option != "--sequential"]
    with served(exported(whole.parent, "generator", *modes)) as url, opened(browser, url) as page:
        expected = page.outputs()
    cut = exported(whole.parent, "generator", "--max-mb", "0.05", "--cut", *options)
    stages = json.loads((cut / MANIFEST).read_bytes())["stages"]
    assert len(stages) > 1
    assert max(p.stat().st_size for p in cut.rglob("*") if p.is_file()) <= LIMIT
    with served(cut) as url, opened(browser, url) as page:
        assert page.faults == []
        outputs = page.outputs()
        assert page.page.evaluate("progress.value === progress.max")
    assert list(outputs) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(outputs[name], values)


@needs_package
def test_a_damaged_stage_is_named(browser: Browser, whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(exported(whole.parent, "generator", "--max-mb", "0.05", "--cut", "--sequential"), cut)
    (cut / "model-2.onnx").write_bytes(b"")
    with served(cut) as url, opened(browser, url) as page:
        assert "model-2.onnx" in page.text("#error")
        assert page.page.locator("canvas").count() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cut"], "give one of --max-mb, --max-mib and --host"),
        (["--sequential", "--max-mb", "20"], "--sequential is for --cut"),
        (["--max-mb", "20", "--host", "github"], "give one of"),
        (["--cut", "--max-mb", "20", "--to", "webdnn"], "--cut is not for webdnn"),
    ],
    ids=str,
)
def test_options_that_do_not_belong_together(tmp_path: Path, options: list[str], said: str) -> None:
    to = [] if "--to" in options else ["--to", "onnxruntime-web"]
    done = run("export", tmp_path / "model.onnx", *to, *options, "-o", tmp_path / "site")
    assert (done.code, said in done.stderr) == (2, True), done.stderr
