"""What the suites of splitting publish: a page beside the numbers, of the very numbers."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, pages, split
from benchmarks.tables import Table, published
from shrink.bench.machine import machine, processor
from tests.test_bench_report import Reader

pytest.importorskip("jinja2", reason="jinja2 is not installed")

REPORTS = Path(__file__).parents[1] / "reports"

SPLIT = {
    "bytes": 217_727_652,
    "limit_bytes": 20_000_000,
    "shards": [19_794_076, 19_846_360],
    "rounds": 5,
    "functions": {
        "copy": {"seconds": [0.1], "median_seconds": 0.1, "times_a_copy_with_fsync": 0.5, "times_a_copy": 1.0},
        "split": {"seconds": [0.25], "median_seconds": 0.25, "times_a_copy_with_fsync": 1.25, "times_a_copy": 2.5},
    },
    "commands": {
        "split": {
            "seconds": [0.75],
            "median_seconds": 0.75,
            "times_a_copy_with_fsync": 3.75,
            "times_a_copy": 7.5,
            "peak_bytes": 61_400_000,
        },
    },
}
PAGES = {
    "limit_mb": 20.0,
    "mode": "float32",
    "pages": [
        {
            "form": "whole",
            "files": 37,
            "largest_bytes": 181_451_609,
            "peak_bytes": 1_263_181_824,
            "first_ms": 4341.46,
            "again_ms": 210.03,
        },
        {"form": "in parts", "not_measured": "not measured: there is no browser"},
    ],
    "outputs_equal": True,
}


def shown(folder: Path, name: str, about: str, result: dict[str, Any], tables: list[Table]) -> Reader:
    published(result, about, tables, folder / f"{name}.json")
    found = json.loads((folder / f"{name}.json").read_text())
    assert {key: value for key, value in found.items() if key != "machine"} == result
    return Reader((folder / f"{name}.html").read_text())


def cells(page: Reader) -> list[str]:
    return [text for _, text in (*page.all("th"), *page.all("td"))]


def test_splitting_has_a_page_of_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(tmp_path, "split", split.__doc__ or "", copy.deepcopy(SPLIT), split.tables(SPLIT))
    assert [text for _, text in page.all("h2")] == ["functions", "commands", "How it was measured"]
    for cell in ("0.250", "1.25", "2.50", "0.750", "3.75", "7.50", "61"):
        assert cell in cells(page), cell
    assert any("217,727,652 bytes in 2 shards of 19,794,076 to 19,846,360 bytes" in text for _, text in page.all("p"))
    assert "217,727,652 bytes in 2 shards" in capsys.readouterr().out


def test_split_pages_have_a_page_of_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(tmp_path, "pages", pages.__doc__ or "", copy.deepcopy(PAGES), pages.tables(PAGES))
    for cell in ("whole", "37", "181.5", "4.3", "0.21", "1263", "in parts", "not measured: there is no browser"):
        assert cell in cells(page), cell
    words = [text for _, text in page.all("p")]
    assert "Outputs: the same bit for bit." in words
    assert "not measured: there is no browser" in capsys.readouterr().out
    different: dict[str, Any] = {**PAGES, "outputs_equal": False}
    assert pages.tables(different)[0].notes == ["Outputs: NOT the same."]


def test_the_published_numbers_render(tmp_path: Path) -> None:
    for suite, name in ((split, "split"), (pages, "pages")):
        found = json.loads((REPORTS / f"{name}.json").read_text())
        del found["machine"]
        page = shown(tmp_path, name, suite.__doc__ or "", found, suite.tables(found))
        assert not any(text.startswith("not measured") for text in cells(page))


def test_without_a_browser_the_rows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *command, **more: None)
    monkeypatch.setattr(pages, "_exported", lambda *given: tmp_path)

    def absent(form: str, site: Path) -> dict[str, Any]:
        pytest.skip("there is no browser")

    monkeypatch.setattr(pages, "_measured", absent)
    output = tmp_path / "pages.json"
    assert pages.main(["-o", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [row["form"] for row in found["pages"]] == list(pages.FORMS)
    assert {row["not_measured"] for row in found["pages"]} == {"not measured: there is no browser"}
    assert found["outputs_equal"] is None
    assert (tmp_path / "pages.html").read_text().count("not measured: there is no browser") == len(pages.FORMS)
    assert "not measured: there is no browser" in capsys.readouterr().out


def test_the_machine_has_one_name() -> None:
    assert measure.machine()["processor"] == machine()["processor"] == processor()
    assert measure.machine()["cores"] == os.cpu_count()
    assert machine()["python"] == platform.python_version()


def test_one_policy_for_all_pages(tmp_path: Path) -> None:
    page = shown(tmp_path, "split", "Split.", copy.deepcopy(SPLIT), split.tables(SPLIT))
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["script-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
