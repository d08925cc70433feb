"""The page of a curve: what it says, what it lets in, and how it looks in a real Chromium without a network."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.bench.curve import CALIBRATED, checked, write
from shrink.bench.curve_page import headline, render, share_at
from shrink.bench.markup import AT_MOST_BYTES
from shrink.errors import BadInput
from tests.browser import chromium
from tests.command import run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("jinja2", reason="jinja2 is not installed")

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
SVG = "svg[class^=plot]"

Document = dict[str, Any]


# --- Documents -------------------------------------------------------------------------------------------------


def point(mode: str, share: float, psnr_db: float | None, **more: Any) -> Document:
    exact = psnr_db is None and "problem" not in more
    figures = {
        "psnr_db": psnr_db,
        "mean_psnr_db": psnr_db and psnr_db + 0.3,
        "worst_psnr_db": psnr_db and psnr_db - 2,
    }
    cosine = None if psnr_db is None else 1 - 10 ** (-psnr_db / 10)
    return {
        "mode": mode,
        "label": mode,
        "step": None,
        "size_bytes": round(share * 1_000_000),
        "share": share,
        "exact": exact,
        "cosine": cosine,
        "problem": None,
        **figures,
        **more,
    }


def calibrated(share: float, psnr_db: float | None, step: float, layers: int = 4) -> Document:
    names = [f"conv{number}/W" for number in range(layers)]
    found = [
        {
            "tensor": name,
            "kind": "conv",
            "shape": [64, 32, 3, 3],
            "bits_per_weight": 32 * share * (1 + number / 10),
            "size_bytes": round(1000 * share) + number,
            "sensitivity": 0.03 * 3 ** min(number, 20) if number != 1 else 0.0,
            "step": step / (1 + number),
            "note": "" if number else "by sensitivity alone",
        }
        for number, name in enumerate(names)
    ]
    kept = [{"tensor": "conv0/b", "shape": [64], "size_bytes": 256, "reason": "one number per channel"}]
    label = f"{CALIBRATED} {step:g}"
    return point(CALIBRATED, share, psnr_db, step=step, label=label, layers=found, kept=kept)


CURVE = [(0.16, 64.8, 0.001), (0.1, 54.0, 0.003), (0.06, 44.0, 0.01), (0.03, 34.0, 0.03), (0.02, 25.5, 0.1)]


def sample(*points: Document, made_up: bool = False, **more: Any) -> Document:
    modes = [
        point("float16", 0.5, 80.0),
        point("int8", 0.253, 47.1),
        point("eightbit", 0.22, 44.6),
        point("prune,int8", 0.2, 20.0),
    ]
    asked = {"source": "images.npz", "made_up": made_up, "samples": 64, "held_out": 16, "unseen": True}
    return checked(
        {
            "shrink_curve": 1,
            "title": "Generator",
            "command": "shrink curve gen.onnx --calibrate images.npz",
            "partial": False,
            "model": {
                "file": "gen.onnx",
                "weights": 250_000,
                "outputs": [{"name": "y", "shape": [1, 3, 32, 32], "kind": "image", "peak": 1.0}],
            },
            "calibration": {**asked, "seed": 0, "effort": 1},
            "points": [
                point("float32", 1.0, None, cosine=1.0),
                *(points or (*modes, *(calibrated(*c) for c in CURVE))),
            ],
            "not_measured": [],
            **more,
        }
    )


# --- What it says ----------------------------------------------------------------------------------------------


def test_the_headline_says_the_result() -> None:
    # Between 44.0 and 54.0 dB the logarithm of the share is a straight line.
    expected = 0.06 ** (9 / 10) * 0.1 ** (1 / 10)
    assert share_at(sample(), 45) == pytest.approx(expected)
    assert headline(sample()) == "At 45 dB calibrated needs 6.3 % of float32, int8 25.3 % at 47.1 dB."
    tiny = sample(calibrated(0.006123, 40.0, 0.1), calibrated(0.0071, 50.0, 0.1))
    assert headline(tiny) == "At 45 dB calibrated needs 0.66 % of float32."
    assert headline(sample(made_up=True)).startswith("At 45 dB on made-up inputs calibrated needs 6.3 %")


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "Nothing calibrated was measured."),
        ([point("int8", 0.25, 47.0)], "Nothing calibrated was measured."),
        ([calibrated(0.1, 52.5, 0.01), calibrated(0.2, 71.0, 0.001)], "At 55 dB calibrated needs 11.0 % of float32."),
        ([calibrated(0.1, 21.0, 0.01), calibrated(0.2, 33.0, 0.001)], "At 30 dB calibrated needs 16.8 % of float32."),
        (
            [calibrated(0.1, 46.0, 0.01), calibrated(0.2, 48.0, 0.001)],
            "Calibrated needs 10.0 % of float32 at 46.0 dB, the point nearest to 45 dB.",
        ),
        (
            [
                point("prune", 0.5, 20.0),
                point("int4", 0.15, 30.0),
                calibrated(0.1, 44.0, 0.1),
                calibrated(0.2, 46.0, 1),
            ],
            "At 45 dB calibrated needs 14.1 % of float32, int4 15.0 % at 30.0 dB.",
        ),
        ([point("int8", 0.3, None, problem="its outputs are not finite"), calibrated(0.1, None, 0.1)], "Nothing"),
    ],
)
def test_headlines_of_less(points: list[Document], words: str) -> None:
    document = sample()
    document["points"] = [document["points"][0], *points]
    assert headline(document).startswith(words)
    assert "<h1>" in render(document)


def test_a_point_that_another_one_beats_is_not_on_the_curve() -> None:
    """Larger and yet less accurate: nobody would take it."""
    found = sample(*(calibrated(*c) for c in CURVE), calibrated(0.08, 40.0, 0.02))
    assert share_at(found, 40.0) == pytest.approx(share_at(sample(), 40.0))


@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(1, 100)), min_size=2, max_size=8), st.floats(-10, 110))
def test_what_is_interpolated_lies_between_what_was_measured(curve: list[tuple[float, float]], psnr: float) -> None:
    document = sample()
    document["points"] = [calibrated(share, db, 0.01, layers=0) for share, db in curve]
    found = share_at(document, psnr)
    if found is None:
        return
    # Some point that is at least as accurate is at least as large, and none that is worse in both is larger.
    assert any(db >= psnr and share >= found - 1e-9 for share, db in curve)
    assert min(share for share, _ in curve) - 1e-9 <= found <= max(share for share, _ in curve) + 1e-9
    assert found <= min(share for share, db in curve if db >= psnr) + 1e-6
    assert math.isfinite(found)


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table's rows, notes in brackets."""
    (body,) = re.findall(rf'<table id="table-{table}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<small>(.*?)</small>", r" (\1)", c).replace("\xa0", " ") for c in row] for row in found]


def test_the_table_compares_at_the_same_accuracy() -> None:
    rows = cells(render(sample()), "points")
    assert rows[0] == ["float32, the original", "", "1.00 MB", "100 %", *["identical"] * 3, "1.000000", ""]
    last = {row[0]: row[-1] for row in rows}
    assert last["float16"] == "finer than measured"
    assert last["int8"] == "7.0 % (3.6 × smaller)"
    # Below the coarsest point: that one is better, and says how good it is.
    assert last["prune,int8"] == "2.0 % (10 × smaller and 25.5 dB)"
    assert [row[1] for row in rows[-5:]] == ["0.001", "0.003", "0.01", "0.03", "0.1"]
    worse = sample(point("int8", 0.05, 47.1), *(calibrated(*c) for c in CURVE))
    assert cells(render(worse), "points")[1][-1] == "7.0 % (1.41 × larger)"


def test_every_calibrated_point_has_its_layers() -> None:
    page = render(sample())
    assert page.count("<details ") == 5
    # That nearest to 45 dB stands open.
    assert re.findall(r'<details id="layers-(\d)" open>', page) == ["2"]
    rows = cells(page, "layers-2")
    assert rows[0][:5] == ["conv0/W", "64 × 32 × 3 × 3", "conv", "1.92", "60"]
    assert rows[0][-1] == "by sensitivity alone"
    assert cells(page, "kept-2") == [["conv0/b", "64", "256", "one number per channel"]]


def test_it_says_what_was_measured_on_what() -> None:
    page = render(sample())
    assert "Calibrated on 48 samples and measured on 16 others, to which no weight was fitted." in page
    assert "All come from: images.npz." in page
    assert "Made up." not in page
    assert "Made up." in render(sample(made_up=True))
    single = sample()
    single["calibration"] |= {"samples": 1, "held_out": 1, "unseen": False}
    assert "measured on that same one" in render(single)
    broken = sample(not_measured=[{"what": "int4", "why": "32 of 32 weights are infinite"}])
    assert "32 of 32 weights are infinite" in render(broken)
    assert "Partial." in render({**sample(), "partial": True})
    unseen = sample(point("int8", 0.25, None, problem="its outputs are not finite"))
    assert "its outputs are not finite" in render(unseen)


# --- What it is made of ----------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_nothing_outside_is_named() -> None:
    page = render(sample())
    assert page == render(sample())
    assert len(page.encode()) < AT_MOST_BYTES
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.replace("&#39;", "'").split("; ")}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert rules["script-src"] == [digest(s) for s in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)]
    assert {digest(s) for s in re.findall(r"<style>(.*?)</style>", page, re.DOTALL)} <= set(rules["style-src"])
    assert "unsafe" not in policy
    assert page.count("THE SOFTWARE IS PROVIDED") == 2
    bare = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    links = re.findall(r'(?:src|href)="([^"]*)"', bare)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(re.findall(r' id="([^"]*)"', bare))


def test_what_is_no_document_is_not_rendered() -> None:
    with pytest.raises(BadInput, match="another version"):
        render({**sample(), "shrink_curve": 2})


def test_a_large_document_loses_its_data_first_and_then_layers() -> None:
    deep = sample(*(calibrated(share, db, step, layers=2000) for share, db, step in CURVE))
    page = render(deep)
    assert len(page.encode()) < AT_MOST_BYTES
    assert "The data is too large to stand in this file" in page
    assert len(cells(page, "layers-0")) == 120
    assert "The JSON data has 1880 more." in page
    many = sample(*(calibrated(0.1 + n / 1000, 40 + n / 50, 0.01 + n / 1e4, layers=200) for n in range(400)))
    with pytest.raises(BadInput, match="more than a page"):
        render(many)


def test_shrink_report_draws_it_again(tmp_path: Path) -> None:
    data, page = tmp_path / "curve.json", tmp_path / "curve.html"
    write(sample(), data)
    outcome = run("report", data)
    assert outcome.code == 0, outcome.stderr
    assert page.read_text(encoding="utf-8") == render(sample())
    assert outcome.stdout.splitlines()[0] == headline(sample())
    assert f"Written: {page}" in outcome.stdout
    said = json.loads(run("report", data, "--json").stdout)
    assert said == sample()
    data.write_text('{"shrink_curve": 2}')
    outcome = run("report", data, "-o", tmp_path / "other.html")
    assert outcome.code == 3
    assert "curve.json: it is a document of another version than 1" in outcome.stderr
    assert not (tmp_path / "other.html").exists()


# --- In a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("curve"), sample(made_up=True))


def written(folder: Path, document: Document) -> Path:
    path = folder / "curve.html"
    path.write_text(render(document), encoding="utf-8")
    return path


def until(page: Page, expression: str) -> None:
    """Wait until it is true. Playwright's own wait evaluates text in the page, which the policy forbids."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never true: {expression}")


@contextlib.contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """The page, with its charts drawn. It fails where the page asks for anything, or says anything on the console."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    page, faults = context.new_page(), []
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (e) => console.error('policy', e.effectiveDirective))"
    )
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if request.url != path.as_uri() else None)
    try:
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            until(page, f"[...document.querySelectorAll('.chart')].every((c) => c.querySelector('{SVG}'))")
        yield page
        assert faults == []
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_charts_are_drawn_and_nothing_is_cut_off(browser: Browser, file: Path, width: int, scheme: str) -> None:
    with opened(browser, file, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for number in range(page.locator(SVG).count()):
            box = page.locator(SVG).nth(number).bounding_box()
            assert box is not None
            assert 0 < box["x"] < box["x"] + box["width"] <= width
        # A line with five dots; five squares, those of the original and the modes.
        dots = page.locator(f"#chart-curve {SVG} g[aria-label=dot]")
        assert [dots.nth(n).locator("> *").count() for n in range(dots.count())] == [5, 5]
        assert page.locator(f"#chart-curve {SVG} g[aria-label=line] path").count() == 1
        assert page.locator(f"#chart-layers {SVG}").count() == 2
        assert page.locator(f"#chart-layers {SVG} g[aria-label=bar] rect").count() == 4
        # One sensitivity is 0, which has no place on a logarithmic scale.
        assert page.locator(f"#chart-layers {SVG} g[aria-label=dot] circle").count() == 3
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shade = sum(int(part) for part in background[4:-1].split(",")) / 3
        assert (shade > 200) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1280])
def test_names_in_the_chart_cover_no_other_name(browser: Browser, file: Path, width: int) -> None:
    with opened(browser, file, viewport={"width": width, "height": 800}) as page:
        boxes = page.evaluate(
            f"[...document.querySelectorAll('#chart-curve {SVG} g[aria-label=text] > text')]"
            ".map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.top, b.right, b.bottom])"
        )
        assert len(boxes) == 6
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= width
            for other in boxes[number + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_a_point_is_chosen(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        select = page.get_by_label("Calibrated at:")
        assert "44.0 dB, 6.0 % of float32 (step 0.01)" in select.inner_text()
        assert select.input_value() == "2"
        assert page.locator("#table-layers-2").is_visible()
        before = page.locator(f"#chart-layers {SVG}").first.inner_html()
        select.select_option("0")
        assert page.locator("#table-layers-0").is_visible()
        assert not page.locator("#table-layers-2").is_visible()
        assert page.locator(f"#chart-layers {SVG}").first.inner_html() != before
        assert "5.12" in page.locator(f"#chart-layers {SVG}").first.inner_html()


def test_hovering_shows_the_numbers(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        target = page.locator(f"#chart-curve {SVG} g[aria-label=dot] circle").nth(2)
        target.scroll_into_view_if_needed()
        box = target.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=2)
        until(page, "document.querySelector('#chart-curve g[aria-label=tip]').textContent.includes('PSNR: 44.0 dB')")


def test_without_scripts_all_can_be_read(browser: Browser, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as page:
        assert page.locator(SVG).count() == 0
        assert page.locator("#table-points tbody tr").count() == 10
        page.locator("#layers-4 summary").click()
        assert page.locator("#table-layers-4").is_visible()


def test_the_data_can_be_saved(browser: Browser, file: Path) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(file.as_uri())
        with page.expect_download() as download:
            page.get_by_text("Download the numbers as JSON").click()
        assert download.value.suggested_filename == "generator.curve.json"
        assert checked(json.loads(Path(download.value.path()).read_bytes())) == sample(made_up=True)
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, file: Path, scheme: str) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run `npm ci` in tests/")
    with opened(browser, file, color_scheme=scheme) as page:
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        page.evaluate(f"() => {{ {AXE.read_text(encoding='utf-8')} }}")
        result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        assert [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in result["violations"]] == []


def test_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    text = "</script><img src=x onerror=console.log(1)><svg onload=console.log(2)>"
    document = sample()
    document["title"] = document["command"] = document["calibration"]["source"] = text
    for found in document["points"]:
        found["mode"] = found["mode"] if found["mode"] in ("float32", CALIBRATED) else f"{text}{found['mode']}"
        found["label"] = f"\u202e{text}"
        for entry in (*(found["layers"] or ()), *(found["kept"] or ())):
            entry["tensor"] = f"\u202e{text}{entry['tensor']}"
    document["not_measured"] = [{"what": text, "why": text}]
    with opened(browser, written(tmp_path, document)) as page:
        assert page.locator("h1").inner_text() == text
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [360, 1280])
def test_few_numbers_and_long_names(browser: Browser, tmp_path: Path, width: int) -> None:
    """One point, equal sizes, no sensitivity: nothing throws, nothing is cut off."""
    alone = calibrated(0.5, 30.0, 0.01, layers=60)
    for entry in alone["layers"]:
        entry["tensor"] = "n" * 180 + entry["tensor"]
        entry["sensitivity"] = entry["step"] = None
    document = sample(alone, point("m" * 190, 1.0, None))
    document["points"][0]["share"] = 1.0
    with opened(browser, written(tmp_path, document), viewport={"width": width, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert "NaN" not in page.locator("main").inner_text()
        assert page.locator(f"#chart-layers {SVG} g[aria-label=bar] rect").count() == 40
        assert "and 20 tensors that take fewer bytes" in page.locator("#chart-layers").inner_text()
