"""The report in a real Chromium, from a file, with no network: charts, sorting, widths, colours, accessibility."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shrink.bench.index import index
from shrink.bench.report import render
from tests.bench_documents import Document, bare, sample, size, variant
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("jinja2", reason="jinja2 is not installed")

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
CHARTS = {"overview": 1, "visits": 3, "layers": 1}
SVG = "svg[class^=plot]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("report"), sample())


def written(folder: Path, document: Document) -> Path:
    file = folder / "report.html"
    file.write_text(render(document), encoding="utf-8")
    return file


@dataclass
class Opened:
    """A page, and what it should not do: requests, messages on the console, errors, violations of its policy."""

    page: Page
    faults: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


def until(page: Page, expression: str) -> None:
    """Wait until it is true. Playwright's own wait evaluates text in the page, which the policy forbids."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never true: {expression}")


@contextlib.contextmanager
def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Opened]:
    options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
    context = browser.new_context(**options)
    found = Opened(context.new_page())
    found.page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (e) => console.error('policy', e.effectiveDirective))"
    )
    found.page.on("console", lambda message: found.faults.append(message.text))
    found.page.on("pageerror", lambda error: found.faults.append(str(error)))

    def only_the_file(route: Any) -> None:
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            found.faults.append(route.request.url)
            route.abort()

    found.page.route("**/*", only_the_file)
    try:
        found.page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            until(found.page, f"[...document.querySelectorAll('.chart')].every((c) => c.querySelector('{SVG}'))")
        yield found
        assert found.faults == []
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_chart_is_drawn_and_nothing_leaves(browser: Browser, report: Path, width: int, scheme: str) -> None:
    with opened(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme) as found:
        for name, count in CHARTS.items():
            charts = found.page.locator(f"#chart-{name} {SVG}")
            assert charts.count() == count
            for number in range(count):
                box = charts.nth(number).bounding_box()
                assert box is not None
                assert 0 < box["x"] < box["x"] + box["width"] <= width
        wide = found.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, "the page must not scroll sideways"
        size = found.page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
        assert size >= 16
        # Five variants: as many dots, names and, in a table of the same numbers, rows.
        assert found.page.locator(f"#chart-overview {SVG} g[aria-label=dot] circle").count() == 5
        assert found.page.locator("#table-size tbody tr").count() == 5
        bars = found.page.locator(f"#chart-visits {SVG} g[aria-label=bar] rect").count()
        assert bars == (5 + 5 + 4) * 5
        assert "the page crashed" in found.page.locator("#chart-visits").inner_text()
        background = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        shade = sum(int(part) for part in background[4:-1].split(",")) / 3
        assert (shade > 200) == (scheme == "light")
        assert (shade < 60) == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 1280])
def test_names_in_the_chart_cover_nothing(browser: Browser, tmp_path: Path, width: int) -> None:
    """Variants close together: each name stands clear of the others and of all dots."""
    near = (("one", 100, 0.57), ("two", 300, 0.572), ("three", 340, 0.56), ("four", 330, 0.44))
    made = bare(
        *(
            variant(name, size=size(kilobytes * 1000), accuracy={"native": {"top1_agreement": share}})
            for name, kilobytes, share in near
        )
    )
    with opened(browser, written(tmp_path, made), viewport={"width": width, "height": 800}) as found:
        boxes = found.page.evaluate(
            f"[...document.querySelectorAll('#chart-overview {SVG} :is(g[aria-label=text], g[aria-label=dot]) > *')]"
            ".map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.top, b.right, b.bottom])"
        )
        assert len(boxes) == 8
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= width
            for other in boxes[number + 1 :]:
                dots = number < 4 and boxes.index(other) < 4
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                assert apart or dots


def test_hovering_shows_the_numbers(browser: Browser, report: Path) -> None:
    with opened(browser, report) as found:
        page = found.page
        for name, mark, words in (
            ("overview", "g[aria-label=dot] circle", "First visit: 3.60 MB"),  # float16: the slowest, so drawn first
            ("layers", "g[aria-label=dot] path", "dB"),
            ("visits", "g[aria-label=bar] rect", "download: 3.27 s"),
        ):
            target = page.locator(f"#chart-{name} {SVG}").first.locator(mark).first
            target.scroll_into_view_if_needed()
            box = target.bounding_box()
            assert box is not None
            tip = page.locator(f"#chart-{name} g[aria-label=tip]").first
            page.mouse.move(1, 1)
            assert tip.text_content() == ""
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=2)
            until(page, f"document.querySelector('#chart-{name} g[aria-label=tip]').textContent.includes('{words}')")


def test_the_axis_can_be_chosen(browser: Browser, report: Path) -> None:
    with opened(browser, report) as found:
        page = found.page
        chart = page.locator("#chart-overview")
        assert "First visit →" in chart.inner_text()
        page.get_by_label("Size:").select_option("Weights on the wire")
        assert "Weights on the wire →" in page.locator(f"#chart-overview {SVG}").text_content()  # type: ignore[operator]
        dots = page.locator(f"#chart-overview {SVG} g[aria-label=dot] circle")
        before = dots.evaluate_all("(all) => all.map((c) => c.getAttribute('r'))")
        page.get_by_label("Area of a dot").select_option("WebGPU")
        assert dots.evaluate_all("(all) => all.map((c) => c.getAttribute('r'))") != before


def test_tables_are_sorted_by_a_press_on_a_heading(browser: Browser, report: Path) -> None:
    def names(page: Page, table: str, column: int = 1) -> list[str]:
        return page.locator(f"#table-{table} tbody tr > :nth-child({column})").all_inner_texts()

    with opened(browser, report) as found:
        page = found.page
        heading = page.locator("#table-size thead th", has_text="File")
        assert heading.get_attribute("aria-sort") is None
        heading.get_by_role("button").press("Enter")
        assert heading.get_attribute("aria-sort") == "descending"
        first = [name.split()[0] for name in names(page, "size")]
        assert first == ["float32", "float16", "prune", "eightbit", "int8"]
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == "ascending"
        assert [name.split()[0] for name in names(page, "size")] == first[::-1]
        by_name = page.locator("#table-size thead th", has_text="Variant")
        by_name.get_by_role("button").click()
        assert by_name.get_attribute("aria-sort") == "ascending"
        assert heading.get_attribute("aria-sort") is None
        assert [name.split()[0] for name in names(page, "size")] == sorted(first)
        # What has no number comes last, either way; what is identical is better than any number.
        psnr = page.locator("#table-accuracy thead th", has_text="PSNR, worst").get_by_role("button")
        for end in ("identical", "8.8 dB"):
            psnr.click()
            shown = names(page, "accuracy", 5)
            assert shown[0] == end
            assert "crashed" in page.locator("#table-accuracy tbody tr").last.inner_text()


def test_without_scripts_all_can_be_read(browser: Browser, report: Path) -> None:
    with opened(browser, report, java_script_enabled=False) as found:
        assert found.page.locator(SVG).count() == 0
        assert found.page.get_by_text("The chart is drawn by a script").count() == 3
        assert found.text("#table-warm").count("WebAssembly, 2 threads") == 5


def test_pictures_are_shown_beside_each_other(browser: Browser, report: Path) -> None:
    with opened(browser, report) as found:
        rows = found.page.locator(".three:not(.labels)")
        assert rows.count() == 8
        boxes = [rows.nth(0).locator("> *").nth(n).bounding_box() for n in range(3)]
        lefts = [box["x"] for box in boxes if box]
        assert lefts == sorted(lefts)
        assert len(set(lefts)) == 3
        assert len({(round(box["y"]), round(box["width"]), round(box["height"])) for box in boxes if box}) == 1
        loaded = "[...document.images].every((i) => i.complete && i.naturalWidth === 56)"
        assert found.page.evaluate(loaded)
        # The original is drawn once and used beside each variant: its pixels must be there.
        corner = rows.nth(0).locator("svg").screenshot()
        assert len(corner) > 500


def test_the_data_can_be_saved(browser: Browser, report: Path) -> None:
    with opened(browser, report) as found:
        with found.page.expect_download() as download:
            found.page.get_by_text("Download the numbers as JSON").click()
        assert download.value.suggested_filename == "generator.json"
        saved = json.loads(Path(download.value.path()).read_bytes())
        assert saved["title"] == "Generator"
        assert found.faults == [] or all(fault.startswith("data:") for fault in found.faults)
        found.faults.clear()


def test_it_prints(browser: Browser, report: Path) -> None:
    """On A4 nothing is cut off at the right, and dark colours are left on the screen."""
    with opened(browser, report, color_scheme="dark") as found:
        page = found.page
        page.set_viewport_size({"width": 718, "height": 1000})
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        until(page, f"document.querySelector('#chart-overview {SVG}').getBoundingClientRect().right <= 718")
        rights = page.evaluate("[...document.querySelectorAll('table')].map((t) => t.getBoundingClientRect().right)")
        assert max(rights) <= 718 + 1
        assert not page.locator("nav").is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_narrow_window_draws_again(browser: Browser, report: Path) -> None:
    with opened(browser, report) as found:
        found.page.set_viewport_size({"width": 400, "height": 800})
        until(found.page, f"[...document.querySelectorAll('.chart {SVG}')].every((c) => c.getAttribute('width') < 400)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, report: Path, tmp_path: Path, scheme: str) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run `npm ci` in tests/")
    (tmp_path / "gen.html").write_bytes(report.read_bytes())
    (tmp_path / "gen.json").write_text(json.dumps(sample()))
    index(tmp_path)
    for file in (report, tmp_path / "index.html"):
        with opened(browser, file, color_scheme=scheme) as found:
            found.page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
            found.page.evaluate(f"() => {{ {AXE.read_text(encoding='utf-8')} }}")
            result = found.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
            faults = [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in result["violations"]]
            assert faults == []


def test_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    text = "</script><img src=x onerror=console.log(1)><svg onload=console.log(2)>"
    made = sample()
    for number, entry in enumerate(made["variants"]):
        entry["name"] = f"{text}{number}"
        for layer in entry["layers"] or ():
            layer["name"] = f"\u202e{text}{layer['name']}"
    made["title"] = made["command"] = made["machine"]["processor"] = text
    with opened(browser, written(tmp_path, made)) as found:
        assert found.text("h1") == text
        assert found.page.locator("img[src=x]").count() == 0
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [360, 1280])
def test_long_names_and_few_numbers(browser: Browser, tmp_path: Path, width: int) -> None:
    """Charts of one variant, of zeros, of equal values: nothing throws, nothing is cut off."""
    cell = {"cold": {"samples": [], "first_picture": 0.0}, "warm": {"samples": [], "median": 0.0}}
    error = {"native": {"relative_error": 1.0}}
    long = "n" * 190
    layers = [{"name": f"{long}{number}", "shape": [1], "sqnr_db": 30.0} for number in range(40)]
    made = bare(
        variant(long, size=size(1, 1), accuracy=error, layers=layers, latency={"wasm": cell, "webgpu": cell}),
        variant("b", size=size(1, 1), accuracy=error, latency={"wasm": {"problem": "lost " * 100}}),
    )
    with opened(browser, written(tmp_path, made), viewport={"width": width, "height": 800}) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        assert "NaN" not in found.page.locator("main").inner_text()
        assert found.page.locator(f"#chart-layers {SVG} g[aria-label=dot] path").count() == 24


def test_nothing_measured(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, bare())) as found:
        assert found.page.locator(SVG).count() == 0
        assert found.text(".headline") == "Only the original was measured."
