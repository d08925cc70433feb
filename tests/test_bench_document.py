"""The document of a benchmark: what is read is checked, and its table and bounds say what stands in it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.bench import accuracy, document, summary
from shrink.bench.document import checked
from shrink.errors import BadInput, OutputError, UsageError

SAMPLE = Path(__file__).parent / "samples_bench" / "document.json"

Document = dict[str, Any]


@pytest.fixture
def raw() -> Document:
    found: Document = json.loads(SAMPLE.read_text())
    return found


def put(value: Any, path: str, new: Any) -> None:
    """Set what `path` names: keys and numbers with dots between."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        value = value[part]
    value[last] = new


# Reading


def test_the_sample_is_read_as_it_stands(raw: Document) -> None:
    found = document.read(SAMPLE)
    raw.pop("fixture")
    assert without_nulls(found) == without_nulls(raw)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def test_what_is_written_is_read_again(raw: Document, tmp_path: Path) -> None:
    found = checked(raw)
    document.write(found, tmp_path / "a.json")
    again = document.read(tmp_path / "a.json")
    assert again == found
    assert document.as_bytes(again) == (tmp_path / "a.json").read_bytes()


def test_every_key_is_there_and_no_other() -> None:
    least = {"shrink_bench": 1, "title": "a", "created": "2026", "partial": True, "variants": [], "not_measured": []}
    found = checked({**least, "evil": "x", "variants": [{"name": "float32", "evil": 1, "size": {"file": 3}}]})
    assert "evil" not in json.dumps(found)
    assert found["browser"] is found["peers"] is found["server"] is found["checks"] is None
    (variant,) = found["variants"]
    assert variant["accuracy"] is variant["latency"] is variant["layers"] is variant["pictures"] is None
    assert variant["size"]["wire_brotli"] is variant["size"]["first_visit"] is None
    assert variant["size"]["file"] == 3


_PNG = "iVBORw0KGgo="


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("shrink_bench", 2, "another version"),
        ("shrink_bench", True, "another version"),
        ("shrink_bench", "1", "another version"),
        ("title", 5, "title is not text"),
        ("title", "x" * 2000, "more than 1024 characters"),
        ("partial", 1, "neither true nor false"),
        ("variants", {}, "variants is not a list"),
        ("variants", [{"name": "a"}] * 65, "more than 64"),
        ("variants", [{"name": "a"}, {"name": "a"}], "same name"),
        ("variants.0.name", None, "variants[0].name is not text"),
        ("variants.1", 7, "variants[1] is not an object"),
        ("variants.1.size.file", -1, "variants[1].size.file is not a count"),
        ("variants.1.size.file", 2.5, "is not a count"),
        ("variants.1.size.file", True, "is not a count"),
        ("variants.1.size.file", 1 << 53, "is not a count"),
        ("variants.1.size.runtime.wasm", [], "runtime.wasm is not an object"),
        ("variants.1.size.first_visit", [1], "first_visit is not an object"),
        ("variants.1.size.bits_per_weight", "8", "bits_per_weight is not a number"),
        ("variants.1.accuracy.native.psnr_db.mean", 10**400, "is not a number"),
        ("variants.1.accuracy.native.psnr_db.mean", 1e301, "is not a number"),
        ("variants.1.accuracy.native.cosine", 1.5, "is not from -1 to 1"),
        ("variants.1.accuracy.native.top1_agreement", -0.1, "is not from 0 to 1"),
        ("variants.1.accuracy.wasm.wrong", "no", "neither true nor false"),
        ("variants.1.pictures.worst.original", "<script>", "is not a PNG"),
        ("variants.1.pictures.worst.original", "R0lGODlhAQABAAAAACw=", "is not a PNG"),
        ("variants.1.pictures.worst.variant", _PNG + "\n", "is not a PNG"),
        ("variants.1.pictures.worst.variant", _PNG + '"', "is not a PNG"),
        ("variants.1.layers.0.shape", [-1], "is not a count"),
        ("variants.1.layers.0.shape", [1] * 33, "more than 32 entries"),
        ("variants.1.latency.wasm.warm.samples", [1, -1], "samples[1] is below 0"),
        ("variants.1.latency.wasm.warm.samples", None, "samples is not a list"),
        ("variants.1.latency.wasm.cold.download", -5, "is below 0"),
        ("model.outputs.0.kind", "sound", "is none of image"),
        ("peers.0.bytes", [], "is not a count"),
        ("server.samples", [1] * 100_001, "more than 100000"),
        ("not_measured", None, "not_measured is not a list"),
        ("not_measured.0.why", 3, "is not text"),
        ("checks.0.met", None, "neither true nor false"),
    ],
)
def test_what_is_not_valid_is_refused(raw: Document, path: str, value: Any, words: str) -> None:
    put(raw, path, value)
    with pytest.raises(BadInput) as refused:
        checked(raw)
    assert words in str(refused.value)


@pytest.mark.parametrize("key", ["title", "created", "partial", "variants", "not_measured"])
def test_what_is_missing_is_named(raw: Document, key: str) -> None:
    del raw[key]
    with pytest.raises(BadInput, match=f"{key} is missing"):
        checked(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"shrink_bench": NaN}', "not JSON"),
        ('{"shrink_bench": -Infinity}', "not JSON"),
        ("[]", "not the document of a benchmark"),
        ("{}", "not the document of a benchmark"),
        ("null", "not the document of a benchmark"),
        ('{"shrink_bench": 1}', "title is missing"),
        ('{"shrink_bench": ' + "1" * 5000 + "}", "JSON|another version"),
    ],
)
def test_a_file_that_is_no_document_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as refused:
        document.read(path)
    assert str(refused.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        document.read(tmp_path / "missing.json")
    (tmp_path / "utf-16.json").write_bytes(b"\xff\xfe{\xd8")
    with pytest.raises(BadInput, match="not JSON"):
        document.read(tmp_path / "utf-16.json")


def test_names_in_a_message_are_harmless(raw: Document) -> None:
    raw["variants"][0]["latency"] = {"\x1b[31mwasm": 1}
    assert checked(raw)["variants"][0]["latency"] == {}


def places(value: Any, way: str = "") -> Iterator[str]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield f"{way}{key}"
        yield from places(item, f"{way}{key}.")


_EXAMPLE: Document = json.loads(SAMPLE.read_text())
_PLACES = [place for place in places(_EXAMPLE) if place.count(".samples.") == 0 and not place.startswith("variants.3")]
_any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(_PLACES), _any_json)
def test_any_value_anywhere_is_checked_or_refused(place: str, value: Any) -> None:
    spoilt = copy.deepcopy(_EXAMPLE)
    put(spoilt, place, value)
    try:
        found = checked(spoilt)
    except BadInput:
        return
    assert checked(found) == found
    summary.table(found)
    summary.evaluated(found, [summary.Bound(name, 1.0, True) for name in summary.METRICS])
    json.dumps(found, allow_nan=False)


# The table


def made(**variants: Document) -> Document:
    return checked(
        {
            "shrink_bench": 1,
            "title": "made up",
            "created": "2026-11-21T07:00:00Z",
            "partial": False,
            "variants": [{"name": name, **about} for name, about in variants.items()],
            "not_measured": [],
        }
    )


def images(worst: float | None, mean: float | None, *, exact: bool = False) -> Document:
    return {"exact": exact, "psnr_db": {"mean": mean, "worst": worst, "samples": [worst]}, "max_error": 0.5}


def test_the_table_has_the_numbers_of_the_document() -> None:
    found = made(
        float32={"size": {"file": 4_000_000, "first_visit": {"wasm": 7_100_000, "webgpu": 9_000_000}}},
        eightbit={
            "size": {"file": 1_000_000, "first_visit": {"wasm": 4_250_000}},
            "accuracy": {"native": images(41.5, 43.0), "wasm": {**images(12.25, 13.0), "wrong": True}},
            "latency": {
                "wasm-1": {"warm": {"samples": [3.0], "median": 3.04}},
                "wasm": {"problem": "the page crashed"},
            },
        },
    )
    headers, rows = summary.table(found)
    assert [dict(zip(headers, row, strict=True)) for row in rows] == [
        {
            "variant": "float32",
            "file MB": "4.000",
            "first visit MB": "7.100",
            "worst PSNR dB": "",
            "first picture ms": "",
            "wasm-1 ms": "",
            "wasm ms": "",
            "wrong": "",
        },
        {
            "variant": "eightbit",
            "file MB": "1.000",
            "first visit MB": "4.250",
            "worst PSNR dB": "12.2",
            "first picture ms": "failed",
            "wasm-1 ms": "3.0",
            "wasm ms": "failed",
            "wrong": "wasm",
        },
    ]


def test_the_table_is_safe_to_print() -> None:
    _, rows = summary.table(made(**{"\x1b[31m\u202eevil\n": {}}))
    assert rows == [["\\x1b[31m\\u202eevil\\n"]]


# Bounds


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=x", "psnr=nan", "psnr=inf", "=4", ""])
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no bound|no metric"):
        summary.bound(text, at_most=False)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UsageError, match=r"no metric 'psnrr'.*psnr-mean"):
        summary.bound("psnrr=4", at_most=False)


@pytest.mark.parametrize(
    ("text", "at_most", "value", "met"),
    [
        ("psnr=41.5", False, 41.5, True),
        ("psnr=41.6", False, 41.5, False),
        ("psnr-mean=43", False, 43.0, True),
        ("first-visit-mb=2", True, 2.25, False),
        ("first-visit-mb=2.25", True, 2.25, True),
        ("weights-mb=1", True, 0.75, True),
        ("file-mb=0.8", True, 0.8, True),
        ("bits-per-weight=8", True, 8.5, False),
        ("ssim=0.9", False, 0.875, False),
        ("cosine=0.5", False, 0.5, True),
        ("top1-agreement=0.99", False, 0.5, False),
        ("top5-agreement=1", False, 1.0, True),
        ("top1-accuracy=0.7", False, 0.75, True),
        ("relative-error=0.1", True, 0.125, False),
        ("max-error=0.5", True, 0.5, True),
        ("perplexity=3", True, 4.0, False),
        ("warm-ms=4", True, 5.0, False),
        ("warm-ratio=1.5", True, 1.25, True),
        ("first-picture-ms=900", True, 900.0, True),
        ("memory-mb=60", True, 64.0, False),
    ],
)
def test_a_bound_is_kept_or_not(text: str, at_most: bool, value: float, met: bool) -> None:
    accuracy = {
        **images(41.5, 43.0),
        "ssim": {"mean": 0.95, "worst": 0.875, "samples": [0.875]},
        "cosine": 0.5,
        "top1_agreement": 0.5,
        "top5_agreement": 1.0,
        "top1_accuracy": 0.75,
        "relative_error": 0.125,
        "perplexity": 4.0,
    }
    cell = {
        "warm": {"samples": [], "median": 5.0, "ratio": 1.25},
        "cold": {"samples": [], "first_picture": 900.0},
        "memory_peak": 64_000_000,
    }
    size = {
        "file": 800_000,
        "wire_raw": 750_000,
        "bits_per_weight": 8.5,
        "first_visit": {"wasm": 2_000_000, "webgpu": 2_250_000},
    }
    found = made(float32={}, int8={"accuracy": {"native": accuracy}, "size": size, "latency": {"webgpu": cell}})
    asked = summary.bound(text, at_most=at_most)
    sign = "<=" if at_most else ">="
    assert summary.evaluated(found, [asked]) == [
        {"check": text.replace("=", sign), "variant": "int8", "value": value, "met": met, "why": None}
    ]


@pytest.mark.parametrize("metric", list(summary.METRICS))
@pytest.mark.parametrize("at_most", [False, True])
def test_what_was_not_measured_keeps_no_bound(metric: str, at_most: bool) -> None:
    limit = 1e9 if at_most else -1e9
    (check,) = summary.evaluated(made(float32={}, int8={}), [summary.Bound(metric, limit, at_most)])
    assert (check["met"], check["value"], check["why"]) == (False, None, "not measured")


def test_a_variant_that_could_not_be_made_keeps_no_bound() -> None:
    bound = summary.Bound("psnr", 1.0, False)
    (check,) = summary.evaluated(made(float32={}), [bound], ["eightbit"])
    assert check == {
        "check": str(bound),
        "variant": "eightbit",
        "value": None,
        "met": False,
        "why": "it could not be made",
    }


@pytest.mark.parametrize("metric", ["psnr", "ssim", "cosine", "top1-accuracy", "relative-error"])
def test_outputs_with_nan_keep_no_bound(metric: str) -> None:
    """One input of three gives NaN: the figures of the other two say nothing of it."""
    picture = np.full((1, 1, 16, 16), 0.5, "f4")
    before = [{"y": picture}] * 3
    after = [{"y": picture + np.float32(1e-3)}, {"y": np.full_like(picture, np.nan)}, {"y": picture}]
    found = made(float32={}, int8={"accuracy": {"native": accuracy.compared(before, after)}})
    (check,) = summary.evaluated(found, [summary.Bound(metric, -1e9, metric == "relative-error")])
    assert (check["met"], "NaN" in check["why"]) == (False, True)


def test_a_psnr_of_nothing_is_a_number() -> None:
    found = made(float32={}, int8={"accuracy": {"native": images(0.0, 0.0)}})
    assert [c["value"] for c in summary.evaluated(found, [summary.Bound("psnr", 40, False)])] == [0.0]


def test_a_name_that_no_file_can_hold_costs_nothing_else(raw: Document) -> None:
    raw["title"] = "a\ud800b"
    assert checked(raw)["title"] == "a\\ud800b"


def test_the_worst_of_all_places_counts() -> None:
    places: Callable[[float], Document] = lambda wasm: {  # noqa: E731
        "accuracy": {"native": images(50.0, 50.0), "wasm": images(wasm, wasm)}
    }
    found = made(float32={}, good=places(49.0), bad=places(9.0))
    assert [c["met"] for c in summary.evaluated(found, [summary.Bound("psnr", 40, False)])] == [True, False]


def test_what_does_not_differ_keeps_every_psnr() -> None:
    found = made(float32={}, same={"accuracy": {"native": images(None, None, exact=True)}})
    (check,) = summary.evaluated(found, [summary.Bound("psnr", 1e6, False)])
    assert check == {"check": "psnr>=1e+06", "variant": "same", "value": None, "met": True, "why": "nothing differs"}
    assert summary.table(found)[1][1][1:] == ["exact"]
    assert math.isinf(summary.METRICS["psnr"].values(found["variants"][1])[0])
