"""The report: one file that says exactly what its document says, and lets nothing in."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import struct
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shrink.bench import report, tables
from shrink.bench.document import checked
from shrink.bench.index import index
from shrink.bench.png import png
from shrink.bench.report import AT_MOST_BYTES, render
from shrink.errors import BadInput, MissingDependency, OutputError
from tests.bench_documents import Document, bare, exact, pictures_accuracy, sample, size, variant, warm

pytest.importorskip("jinja2", reason="jinja2 is not installed")
import numpy as np

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "report"
VENDOR = TESTS.parent / "shrink" / "bench" / "templates" / "vendor"


class Reader(HTMLParser):
    """The tree of a page, as far as tests ask: elements, their text, and every attribute."""

    _EMPTY = frozenset({"meta", "link", "img", "br", "input", "image", "use"})

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        words: list[str] = []
        self.elements.append((tag, {key: value or "" for key, value in attrs}, words))
        if tag not in self._EMPTY:
            self._open.append((tag, words))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, words in self._open:
            words.append(data)

    def all(self, tag: str) -> Iterator[tuple[dict[str, str], str]]:
        return ((attrs, " ".join("".join(words).split())) for name, attrs, words in self.elements if name == tag)

    def text(self, tag: str, **attributes: str) -> str:
        """The text of the only such element."""
        (found,) = [t for attrs, t in self.all(tag) if all(attrs.get(k) == v for k, v in attributes.items())]
        return found


def shown(page: str) -> str:
    """The page without what is not for reading: its style and scripts, pictures and data are cut out."""
    page, styles = re.subn(r"<style>.*?</style>", "<style>…</style>", page, flags=re.DOTALL)
    page, scripts = re.subn(r"<script>.*?</script>", "<script>…</script>", page, flags=re.DOTALL)
    assert (styles, scripts) == (1, 3)
    page = re.sub(r"sha256-[A-Za-z0-9+/]{43}=", "sha256-…", page)
    return re.sub(
        r"[A-Za-z0-9+/]{200,}=*", lambda m: f"(base64 {hashlib.sha256(m[0].encode()).hexdigest()[:12]})", page
    )


def test_golden(tmp_path: Path) -> None:
    """To accept a change, read how it differs and copy the page that is named below over the golden file."""
    page = shown(render(sample()))
    (tmp_path / "document.html").write_text(page, encoding="utf-8")
    golden = (GOLDEN / "document.html").read_text(encoding="utf-8")
    assert golden == page, f"see {tmp_path / 'document.html'}"


def test_it_is_small_and_its_parts_are_there() -> None:
    page = render(sample())
    assert len(page.encode()) < AT_MOST_BYTES == 1_500_000
    found = Reader(page)
    headings = [text for _, text in found.all("h2")]
    assert headings == [
        "Which variant to ship",
        "Size, accuracy and latency",
        "Time to the first picture",
        "Size",
        "Accuracy",
        "Latency",
        "Pictures",
        "Which layer hurts",
        "How it was measured",
        "What was not measured",
        "The data",
    ]
    ids = [attrs["id"] for _, attrs, _ in found.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [attrs["href"] for attrs, _ in found.all("a") if attrs["href"].startswith("#")]
    assert links
    assert {link[1:] for link in links} <= set(ids)
    tables = [attrs["id"] for attrs, _ in found.all("table")]
    assert tables == [f"table-{n}" for n in ("size", "visits", "peers", "accuracy", "warm", "cold", "layers")]
    charts = [attrs["id"] for attrs, _ in found.all("div") if attrs.get("class") == "chart"]
    assert charts == ["chart-overview", "chart-visits", "chart-layers"]
    assert all(attrs["alt"] for attrs, _ in found.all("img"))


def test_nothing_outside_is_named() -> None:
    page = render(sample())
    found = Reader(page)
    for _, attrs, _ in found.elements:
        for name in ("src", "href", "srcset", "action", "style", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (name, attrs[name])
        assert not any(name.startswith("on") for name in attrs)
    policy = next(a["content"] for a, _ in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert rules["base-uri"] == rules["form-action"] == ["'none'"]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert rules["script-src"] == [sha256(script) for script in scripts]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert rules["style-src"][0] == sha256(style)
    assert "unsafe" not in policy


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_libraries_are_those_that_the_lock_names() -> None:
    """Versions and SHA-512 stand in tests/package-lock.json; npm has checked what it unpacked."""
    for package, file, name in (
        ("d3", "d3.min.js", "d3"),
        ("@observablehq/plot", "plot.umd.min.js", "plot"),
    ):
        folder = TESTS / "node_modules" / package
        if not folder.is_dir():
            pytest.skip(f"the npm package {package} is not installed: run `npm ci` in tests/")
        assert (VENDOR / file).read_bytes() == (folder / "dist" / file).read_bytes()
        assert (VENDOR / f"{name}.LICENSE").read_bytes() == (folder / "LICENSE").read_bytes()


def test_licences_go_with_the_libraries() -> None:
    assert render(sample()).count("THE SOFTWARE IS PROVIDED") == 2


def test_the_data_can_be_had() -> None:
    found = Reader(render(sample()))
    (link,) = [attrs for attrs, _ in found.all("a") if "download" in attrs]
    assert link["download"] == "generator.json"
    given = json.loads(base64.b64decode(link["href"].removeprefix("data:application/json;base64,")))
    expected = sample()
    for entry in expected["variants"]:
        entry["pictures"] = None
    assert given == expected
    assert checked(given) == given


def rows(page: str, table: str) -> list[list[str]]:
    body = re.search(rf'<table id="table-{table}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body[1].split("</tr>")[:-1]]
    return [[re.sub(r"<small>", " | ", cell).replace("</small>", "") for cell in row] for row in cells]


def known() -> Document:
    made = bare(
        variant(
            "small",
            file="net.small.safetensors",
            size={
                **size(250_000, 3_250_000),
                "wire_brotli": 240_000,
                "bits_per_weight": 8.02,
                "first_visit_parts": {
                    "wasm": {"weights": 240_000, "graph": 10_000, "runtime": 2_900_000, "page": 100_000}
                },
            },
            accuracy={
                "native": pictures_accuracy(45.15, 43.0, relative_error=0.0125, worst_input=3),
                "wasm": pictures_accuracy(8.25, 7.5, wrong=True, wrong_by=0.705, tolerance=0.001),
            },
            latency={
                "wasm": {
                    **warm(12.0, 1.2, threads=4, memory_peak=61_400_000, memory_how="asking it"),
                    "cold": {
                        "network": "4g",
                        "download": 1500.0,
                        "decode": 20.5,
                        "compile": 210.0,
                        "first_run": 30.25,
                        "first_picture": 1770.0,
                        "samples": [{"first_picture": 1700.0}, {"first_picture": 1770.0}, {"first_picture": 1900.0}],
                    },
                }
            },
            layers=[
                {"name": "fc", "shape": [10, 20], "mode": "eightbit", "sqnr_db": 31.2, "bytes": 217},
                {"name": "conv", "shape": [3, 3], "sqnr_db": 40.0, "output_sqnr_db": 28.5, "bytes": 9},
            ],
        ),
        model={"weights": 250_000, "file": "net.npz"},
        peers=[{"name": "Peer", "bytes": 300_000, "gzip": 290_000, "sqnr_db": 33.3, "note": "version 1"}],
        server={"samples": [8.0, 8.5, 12.0], "median": 8.5, "p95": 11.65, "note": "loopback"},
    )
    made["variants"][0] = variant(
        "float32",
        size={**size(1_000_000, 4_000_000), "wire_brotli": 960_000},
        accuracy={"native": exact()},
        latency={"wasm": warm(10.0, 1.0, threads=4)},
    )
    return checked(made)


def test_known_numbers() -> None:
    page = render(known())
    nothing, none = "–", "\N{NO-BREAK SPACE}"

    def smaller(times: str) -> str:
        return f"{times}{none}×{none}smaller"

    assert rows(page, "size")[1] == [
        "small | net.small.safetensors",
        "8.02",
        f"251 kB | {smaller('4.0')}",
        f"250 kB | {smaller('4.0')}",
        f"250 kB | {smaller('4.0')}",
        f"240 kB | {smaller('4.0')}",
        f"3.25 MB | {smaller('1.23')}",
        nothing,
    ]
    assert rows(page, "visits") == [["small", "WebAssembly", "3.25 MB", "240 kB", "10.0 kB", "2.90 MB", "100 kB"]]
    assert rows(page, "peers")[2] == ["Peer", "300 kB", "290 kB", "3.4", "33.3 dB", "version 1"]
    assert rows(page, "accuracy") == [
        ["float32", "native", "reference", "identical", "identical", "0", "0", nothing],
        ["small", "native", "reference", "45.1 dB", "43.0 dB", "0.013", nothing, "3"],
        [
            "small",
            "WebAssembly",
            "Wrong | off by 70.5 % of the largest output",
            "8.2 dB",
            "7.5 dB",
            nothing,
            nothing,
            nothing,
        ],
    ]
    assert rows(page, "warm") == [
        ["float32", "WebAssembly, 4 threads", "10.0 ms", "10.0 ms to 10.0 ms", "12.0 ms", "1.00", "5", nothing],
        [
            "small",
            "WebAssembly, 4 threads",
            "12.0 ms",
            "12.0 ms to 12.0 ms",
            "14.4 ms",
            "1.20 | 1.20 to 1.20",
            "5",
            "61.4 MB",
        ],
    ]
    assert rows(page, "cold")[1] == [
        "small",
        "WebAssembly, 4 threads",
        "1.77 s | 1.70 s to 1.90 s",
        "1.50 s",
        "20.5 ms",
        "210 ms",
        "30.2 ms",
        "3",
    ]
    assert rows(page, "layers") == [
        ["conv | 3 × 3", "small", nothing, "9 B", "40.0 dB", "28.5 dB"],
        ["fc | 10 × 20", "small", "eightbit", "217 B", "31.2 dB", nothing],
    ]
    found = Reader(page)
    assert found.text("p", **{"class": "headline"}) == "Ship none of these variants."
    assert "from request to result 8.50 ms (median of 3 requests, 95th percentile 11.7 ms). loopback." in page
    assert "WebAssembly does not compute small as native arithmetic does with the same weights" in page
    assert "off by 70.5 % of the largest output" in page
    assert "at most 0.1 % of the largest output off" in page
    assert "2 January 2026, 03:04 UTC" in page
    assert "net.npz, 250,000 weights" in page
    assert "Peak memory by asking it." in page


def charts_of(page: str) -> Any:
    return json.loads(Reader(page).text("script", id="charts"))


def test_charts_hold_the_numbers_of_the_tables() -> None:
    charts = charts_of(render(known()))
    assert charts["variants"] == ["float32", "small"]
    first, second = charts["overview"]["points"]
    assert first["exact"]
    assert first["y"] is None
    assert second["x"] == {"First visit": 3_250_000, "Weights on the wire": 240_000}
    assert second["y"] == 43.0
    assert second["run"] == {"WebAssembly, 4 threads": 12.0}
    steps = {bar["step"]: bar["ms"] for bar in charts["visits"]["bars"]}
    assert steps == {"download": 1500.0, "decode": 20.5, "compile": 210.0, "first_run": 30.25, "other": 9.25}
    assert [total["words"] for total in charts["visits"]["totals"]] == ["1.77 s"]
    assert charts["layers"]["names"] == ["conv"]
    assert [dot["db"] for dot in charts["layers"]["dots"]] == [28.5]


def test_layers_by_their_weights_where_no_output_was_measured() -> None:
    layers = [{"name": n, "shape": [1], "sqnr_db": db} for n, db in (("a", 40.0), ("b", 20.0), ("c", None))]
    charts = charts_of(render(bare(variant("x", layers=layers))))
    assert charts["layers"]["names"] == ["b", "a"]
    assert charts["layers"]["x"] == "SQNR of the weights (dB)"


def test_a_layer_that_is_all_noise_has_its_number() -> None:
    layers = [{"name": "a", "shape": [1], "sqnr_db": 0.0, "output_sqnr_db": 3.0}]
    (dot,) = charts_of(render(bare(variant("x", layers=layers))))["layers"]["dots"]
    assert "SQNR of its weights: 0.0 dB" in dot["words"]


@pytest.mark.parametrize(
    ("network", "words", "never"),
    [
        ("offline-cache: the second visit, with the weights in the browser's cache", "second visit", "fresh browser"),
        ("10mbit: 10 Mbit/s, each answer waits 40 ms", "first visit", "second visit"),
    ],
)
def test_visits_are_called_what_they_were(network: str, words: str, never: str) -> None:
    made = known()
    made["variants"][1]["latency"]["wasm"]["cold"]["network"] = network
    found = Reader(render(made))
    caption = found.text("span", id="caption-cold").replace(network, "")
    (waits,) = [t.replace(network, "") for _, t in found.all("p") if t.startswith("What a visitor waits for")]
    for text in (caption, waits):
        assert words in text
        assert never not in text


def test_what_came_after_an_interrupt_was_not_measured() -> None:
    whole = bare(variant("x"))
    assert "Everything that was asked for was measured." in render(whole)
    page = Reader(render({**whole, "partial": True})).text("section", id="missing")
    assert "Everything" not in page
    assert "what came after that was not measured" in page


def test_both_numbers_of_threads_have_their_row() -> None:
    made = known()
    made["variants"][1]["accuracy"]["wasm-1"] = pictures_accuracy(45.15, 43.0, wrong=False)
    shown = [row[1:3] for row in rows(render(made), "accuracy")]
    assert ["WebAssembly, 1 thread", "right"] in shown
    assert ["WebAssembly, 4 threads", "Wrong | off by 70.5 % of the largest output"] in shown
    assert "WebAssembly, 4 threads does not compute small" in render(made)


def test_webgpu_in_software_is_said_beside_its_numbers() -> None:
    page = render(sample())
    for table in ("accuracy", "warm", "cold"):
        beside = [row[1] for row in rows(page, table) if row[1].startswith("WebGPU")]
        assert beside
        assert set(beside) == {"WebGPU | in software, no GPU"}
    assert "WebGPU ran in software (SwiftShader Device (Subzero)): no GPU took part." in Reader(page).text(
        "section", id="latency"
    )
    backends = {bar["backend"] for bar in charts_of(page)["visits"]["bars"]}
    assert "WebGPU (in software)" in backends
    made = sample()
    made["browser"] = {"name": "Chromium", "adapter": "A real one", "software_adapter": False}
    assert "in software" not in Reader(render(made)).text("section", id="latency")


def test_a_crashed_page_is_said_in_its_row() -> None:
    page = render(sample())
    assert ["prune", "WebGPU | in software, no GPU", "not measured: the page crashed"] in rows(page, "warm")
    assert {"variant": 4, "backend": "WebGPU (in software)", "words": "the page crashed"} in charts_of(page)["visits"][
        "problems"
    ]


def test_what_is_missing_says_why() -> None:
    entries = [
        {"what": "latency", "why": "Chromium is not installed"},
        {"what": "int8: sizes", "why": "no room"},
        {"what": "int8: layers", "why": "a graph of its own"},
        {"what": "the server", "why": "Flask is not installed"},
    ]
    page = render(bare(variant("int8"), not_measured=entries))
    assert rows(page, "size") == [["float32", "not measured"], ["int8", "not measured: no room"]]
    assert rows(page, "warm")[1] == ["int8", "not measured: Chromium is not installed"]
    missing = [text for attrs, text in Reader(page).all("p") if attrs.get("class") == "missing"]
    assert missing == [
        "Accuracy: not measured.",
        "First visits: not measured: Chromium is not installed.",
        "Encoders of others: not measured.",
        "Pictures: not measured.",
        "Layers: not measured: a graph of its own.",
    ]
    assert "Server baseline: not measured: Flask is not installed." in page
    section = Reader(page).text("section", id="missing")
    assert all(entry["what"] in section and entry["why"] in section for entry in entries)
    assert charts_of(page) == {"variants": ["float32", "int8"], "overview": None, "visits": None, "layers": None}


@pytest.mark.parametrize("part", ["size", "accuracy", "pictures", "layers", "latency"])
def test_every_part_may_be_missing(part: str) -> None:
    made = sample()
    for entry in made["variants"]:
        entry[part] = None
    assert "not measured" in Reader(render(made)).text("main")


@pytest.mark.parametrize("part", ["command", "machine", "browser", "model", "inputs", "peers", "server", "checks"])
def test_every_part_of_the_whole_may_be_missing(part: str) -> None:
    made = sample()
    made[part] = None
    assert render(made) != render(sample())


def test_partial_has_a_banner() -> None:
    made = sample()
    assert "Partial." not in render(made)
    made["partial"] = True
    assert "Partial. The measurement was interrupted" in Reader(render(made)).text("header")


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "abc\u202etxt.exe",
    "a\r\nb\u2028c\x00",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "x" * 5000,
)


def planted(value: object, text: str) -> Any:
    """The document with a text put in place of every other, but for what must be one of a few words or a picture."""
    if isinstance(value, dict):
        return {
            key: inner if key in ("kind", "original", "variant", "difference_x10") else planted(inner, text)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [planted(inner, text) for inner in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_inert(text: str) -> None:
    made = planted(sample(), text[:60])
    for number, entry in enumerate(made["variants"]):
        entry["name"] = f"{text[:150]}{number}"
    made["checks"][0]["variant"] = made["variants"][1]["name"]
    page = render(made)
    honest, found = Reader(render(sample())), Reader(page)
    tags = [name for name, _, _ in found.elements]
    # A name can make a part of the page come or go, but brings no element of its own.
    assert set(tags) <= {name for name, _, _ in honest.elements}
    assert tags.count("script") == 4
    assert tags.count("img") == [name for name, _, _ in honest.elements].count("img")
    assert {key for _, attrs, _ in found.elements for key in attrs} <= {
        key for _, attrs, _ in honest.elements for key in attrs
    }
    for bad in "\x1b\u202e\x00\u2028\r":
        assert bad not in page
    if "7" in text:
        assert "{{ 7 * 7 }}" in page
    assert charts_of(page)["variants"][0].startswith(
        text[:10].replace("\x1b", "\\x1b").split("\u202e")[0].split("\r")[0]
    )


def picture(side: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return base64.b64encode(png(pixels)).decode()


def test_pictures_that_do_not_fit_are_named() -> None:
    """Noise of 300 × 300 takes 360 kB in base64: two fit, and an original that two share counts once."""
    original = picture(300, 0)

    def pictures(seed: int) -> Document:
        return {"worst": {"input": 1, "original": original, "variant": picture(40, seed), "difference_x10": original}}

    made = bare(*(variant(name, pictures=pictures(seed)) for seed, name in enumerate(("one", "two", "three"))))
    page = render(made)
    assert len(page.encode()) < AT_MOST_BYTES
    assert 'viewBox="0 0 300 300"' in page
    names = [text for attrs, text in Reader(page).all("figcaption")]
    assert names == ["one, input 1"]
    assert "Too large for this file, they are in the JSON data beside it: two (the worst case), three" in page
    assert page.count(original) == 2


def claiming(width: int, height: int) -> str:
    """A picture of one pixel whose file says that it has many."""
    data = bytearray(png(np.zeros((1, 1), np.uint8)))
    data[16:24] = struct.pack(">II", width, height)
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("part", ["original", "variant", "difference_x10"])
@pytest.mark.parametrize("size", [(16384, 16384), (0, 4), (4_194_305, 1), (2**32 - 1, 2**32 - 1)])
def test_pictures_of_too_many_pixels_are_not_shown(part: str, size: tuple[int, int], tmp_path: Path) -> None:
    small, huge = picture(8, 0), claiming(*size)
    found = {"original": small, "variant": small, "difference_x10": small, "input": 0} | {part: huge}
    made = bare(variant("one", pictures={"worst": found}))
    page = render(made)
    assert huge not in page
    assert "Too large for this file, they are in the JSON data beside it: one (the worst case)" in page
    (tmp_path / "gen.html").write_text(page)
    (tmp_path / "gen.json").write_text(json.dumps(made))
    index(tmp_path)
    assert huge not in (tmp_path / "index.html").read_text()


def test_all_pictures_together_have_a_bound() -> None:
    """Each of 4 million pixels could be shown alone, and sixteen together: the original, and two for each variant."""
    large = claiming(2048, 2048)
    made = bare(
        *(variant(f"v{number}", pictures={"worst": dict.fromkeys(PARTS, large) | {"input": 0}}) for number in range(20))
    )
    assert len(list(Reader(render(made)).all("figcaption"))) == 7


PARTS = ("original", "variant", "difference_x10")


def test_data_that_does_not_fit_is_named() -> None:
    samples = [float(n) / 7 for n in range(30_000)]
    page = render(bare(variant("x", latency={"wasm": {"warm": {"samples": samples, "median": 1.0}}})))
    assert len(page.encode()) < AT_MOST_BYTES
    assert "The data is too large to stand in this file" in page
    assert "download=" not in page


def test_what_no_page_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "AT_MOST_BYTES", 500_000)
    with pytest.raises(BadInput, match="can show"):
        render(bare(variant("x")))


def test_many_layers_stay_few_rows() -> None:
    layers = [{"name": f"layer{n}", "shape": [1], "output_sqnr_db": 1000.0 - n} for n in range(500)]
    page = render(bare(variant("x", layers=layers)))
    found = rows(page, "layers")
    assert len(found) == tables.LAYERS_SHOWN
    assert found[0][0].startswith("layer499")
    assert "380 more stand in the JSON data" in page
    assert charts_of(page)["layers"]["more"] == 500 - 24


def test_a_document_that_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match="not the document of a benchmark"):
        render({"a": 1})


def test_rendering_changes_nothing_and_is_repeatable() -> None:
    made = sample()
    before = copy.deepcopy(made)
    assert render(made) == render(made)
    assert made == before


def test_index(tmp_path: Path) -> None:
    for name in ("gen", "<b>"):
        (tmp_path / f"{name}.html").write_text(render(sample()))
    (tmp_path / "gen.json").write_text(json.dumps(sample()))
    (tmp_path / "javascript:x.html").write_text("x")
    (tmp_path / "size.json").write_text("{}")
    index(tmp_path)
    page = (tmp_path / "index.html").read_text()
    found = Reader(page)
    titles = [text for _, text in found.all("h2")]
    assert titles == ["Generator", "<b>", "javascript:x"]
    links = [attrs["href"] for attrs, _ in found.all("a")]
    assert links == ["./gen.html", "./gen.json", "./%3Cb%3E.html", "./javascript%3Ax.html"]
    assert "Ship eightbit." in page
    assert page.count("A page without a document beside it.") == 1
    assert page.count(f"{sample()['title']} – shrink bench") == 1
    policy = next(a["content"] for a, _ in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "script-src 'none'" in policy
    index(tmp_path)
    assert (tmp_path / "index.html").read_text() == page


def test_index_of_nothing(tmp_path: Path) -> None:
    index(tmp_path)
    assert "There is no report in this folder yet." in (tmp_path / "index.html").read_text()
    with pytest.raises(OutputError):
        index(tmp_path / "missing")


def test_without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependency, match=r"shrink\[bench\]"):
        render(sample())
