"""The line that says whether to ship a variant: its words follow from the numbers alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.bench import wording
from shrink.bench.document import checked
from shrink.bench.verdicts import best, dominated, quality, verdicts
from tests.bench_documents import Document, bare, exact, pictures_accuracy, sample, size, variant, warm


def document(one: Document, **more: Any) -> Document:
    """The original of 1 MB weights and a 4 MB first visit that runs in 10 ms, beside one other variant."""
    made = bare(one, **more)
    made["variants"][0] = variant(
        "float32", size=size(1_000_000, 4_000_000), accuracy={"native": exact()}, latency={"wasm": warm(10.0, 1.0)}
    )
    return checked(made)


def good(**parts: Any) -> Document:
    given = {
        "size": size(250_000, 3_250_000),
        "accuracy": {"native": pictures_accuracy(45.1, 43.0), "wasm": pictures_accuracy(45.1, 43.0, wrong=False)},
        "latency": {"wasm": warm(10.2, 1.02)},
    }
    return variant("small", **{**given, **parts})


def text(made: Document) -> str:
    return verdicts(made)[1].text


def test_a_good_variant_in_one_line() -> None:
    made = document(good())
    assert text(made) == (
        "small: weights 4.0 times smaller (250 kB instead of 1.00 MB), first visit 1.23 times smaller "
        "(3.25 MB instead of 4.00 MB); PSNR 45.1 dB (worst 43.0); as fast as float32 on WebAssembly: ship it"
    )
    assert best(made) == verdicts(made)[1]
    assert verdicts(made)[0].text == (
        "float32: weights 1.00 MB, first visit 4.00 MB: what the others are measured against"
    )


@pytest.mark.parametrize(
    ("change", "tone", "ends"),
    [
        ({"accuracy": {"native": pictures_accuracy(36.0, 30.0)}}, "look", "look at the pictures first"),
        ({"accuracy": {"native": pictures_accuracy(50.0, 29.9)}}, "no", "do not ship it, too much is lost"),
        ({"accuracy": {"native": exact()}}, "ship", "ship it"),
        ({"size": size(960_000, 3_960_000)}, "no", "do not ship it, it is hardly smaller"),
        ({"latency": {"wasm": warm(20.0, 2.0)}}, "look", "ship it where size counts more than speed"),
        ({"latency": {"wasm": warm(12.5, 1.25)}}, "ship", "ship it"),
        ({"latency": None}, "ship", "ship it"),
        ({"accuracy": {}}, "unknown", "no verdict, its accuracy was not measured"),
        ({"size": None}, "unknown", "no verdict, its size was not measured"),
        (
            {"accuracy": {"native": pictures_accuracy(45, 43), "wasm": pictures_accuracy(9, 8, wrong=True)}},
            "no",
            "do not ship it, wrong on WebAssembly",
        ),
        (
            {
                "accuracy": {
                    "native": pictures_accuracy(45, 43),
                    "wasm": pictures_accuracy(45, 43, wrong=False),
                    "webgpu": pictures_accuracy(9, 8, wrong=True),
                }
            },
            "look",
            "ship it on WebAssembly only: wrong on WebGPU",
        ),
        (
            {
                "latency": {"wasm": warm(10, 1.0), "webgpu": {"problem": "the page crashed"}},
            },
            "look",
            "ship it on WebAssembly only: the page crashed on WebGPU",
        ),
        (
            {
                "accuracy": {
                    "native": pictures_accuracy(45, 43),
                    "wasm-1": pictures_accuracy(9, 8, wrong=True),
                    "wasm": pictures_accuracy(45, 43, wrong=False),
                },
                "latency": {"wasm": warm(10, 1.0, threads=4)},
            },
            "look",
            "ship it on WebAssembly, 4 threads only: wrong on WebAssembly, 1 thread",
        ),
        (
            {
                "accuracy": {
                    "native": pictures_accuracy(45, 43),
                    "wasm-1": pictures_accuracy(9, 8, wrong=True),
                    "wasm": pictures_accuracy(9, 8, wrong=True),
                },
            },
            "no",
            "do not ship it, wrong on WebAssembly",
        ),
        (
            {
                "accuracy": {"native": pictures_accuracy(45, 43), "wasm-1": pictures_accuracy(45, 43, wrong=False)},
                "latency": {"wasm-1": warm(10, 1.0), "wasm": {"problem": "the page crashed"}},
            },
            "look",
            "ship it on WebAssembly, 1 thread only: the page crashed on WebAssembly, all threads",
        ),
        (
            {
                "accuracy": {
                    "native": pictures_accuracy(45, 43),
                    "wasm-1": pictures_accuracy(45, 43, wrong=False),
                    "wasm": pictures_accuracy(45, 43, wrong=False),
                    "webgpu": pictures_accuracy(9, 8, wrong=True),
                }
            },
            "look",
            "ship it on WebAssembly only: wrong on WebGPU",
        ),
        (
            {"accuracy": {"native": {"exact": False, "problem": "the outputs hold NaN"}}},
            "no",
            "do not ship it, too much is lost",
        ),
    ],
)
def test_what_changes_the_advice(change: Document, tone: str, ends: str) -> None:
    made = document(good(**change))
    verdict = verdicts(made)[1]
    assert (verdict.tone, verdict.advice) == (tone, ends)
    assert (best(made) is None) == (tone != "ship")


def test_a_check_that_is_not_met() -> None:
    checks = [{"check": "psnr>=44", "variant": "small", "value": 43.0, "met": False}]
    made = document(good(), checks=checks)
    assert verdicts(made)[1].advice == "do not ship it, the check psnr>=44 (43.0) is not met"
    checks[0]["met"] = True
    assert verdicts(document(good(), checks=checks))[1].tone == "ship"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.05, "as fast as float32 on WebAssembly"),
        (0.95, "as fast as float32 on WebAssembly"),
        (1.3, "a run takes 1.30 times as long as float32's on WebAssembly"),
        (0.5, "2.0 times as fast as float32 on WebAssembly"),
    ],
)
def test_speed_in_words(ratio: float, words: str) -> None:
    assert words in text(document(good(latency={"wasm": warm(10 * ratio, ratio)})))


def test_a_difference_within_the_noise_is_none() -> None:
    made = document(good(latency={"wasm": warm(13.0, 1.3)}))
    assert verdicts(made)[1].tone == "look"
    made["variants"][0]["latency"]["wasm"]["warm"]["samples"] = [9.0, 20.0, 20.0, 8.0, 9.0]
    assert "as fast as float32" in text(made)
    assert verdicts(made)[1].tone == "ship"


def test_webgpu_in_software_is_no_argument() -> None:
    cells = {"wasm": warm(10, 1.0), "webgpu": warm(30, 3.0)}
    software = {"name": "Chromium", "adapter": "SwiftShader", "software_adapter": True}
    assert "WebGPU" not in text(document(good(latency=cells), browser=software))
    gpu = {"name": "Chromium", "adapter": "a GPU", "software_adapter": False}
    assert "3.0 times as long as float32's on WebGPU" in text(document(good(latency=cells), browser=gpu))


@pytest.mark.parametrize(
    ("found", "original", "words", "level"),
    [
        ({"top1_accuracy": 0.702}, {"top1_accuracy": 0.712}, "top-1 accuracy 70.2 % (float32 71.2 %)", "good"),
        ({"top1_accuracy": 0.701}, {"top1_accuracy": 0.712}, "top-1 accuracy 70.1 % (float32 71.2 %)", "fair"),
        ({"top1_accuracy": 0.6}, {"top1_accuracy": 0.712}, "top-1 accuracy 60 % (float32 71.2 %)", "poor"),
        ({"top1_agreement": 0.99}, {}, "the same best class for 99 % of the inputs", "good"),
        ({"top1_agreement": 0.9999}, {}, "the same best class for more than 99.9 % of the inputs", "good"),
        ({"top1_agreement": 0.98, "perplexity": 12.34}, {}, "for 98 % of the inputs, perplexity 12.3", "fair"),
        ({"relative_error": 0.01}, {}, "relative error 0.010 (40.0 dB)", "good"),
        ({"relative_error": 0.02}, {}, "relative error 0.020 (34.0 dB)", "fair"),
        ({"relative_error": 0.5}, {}, "relative error 0.50 (6.0 dB)", "poor"),
    ],
)
def test_other_outputs_than_pictures(found: Document, original: Document, words: str, level: str) -> None:
    made = document(good(accuracy={"native": found}))
    made["variants"][0]["accuracy"] = {"native": original}
    made = checked(made)
    judged = quality(made, made["variants"][1])
    assert judged is not None
    assert words in judged.text
    assert judged.level == level


def test_the_smallest_that_may_be_shipped_is_named() -> None:
    made = sample()
    verdict = best(made)
    assert verdict is not None
    assert verdict.name == "eightbit"
    tones = {found.name: found.tone for found in verdicts(made)}
    assert tones == {"float32": "original", "float16": "ship", "eightbit": "ship", "int8": "look", "prune": "no"}


# Size of the weights, worst PSNR and the ratio of a run.
points = st.lists(
    st.tuples(st.integers(1, 30), st.integers(10, 60), st.sampled_from([0.5, 1.0, 1.03, 2.0])), min_size=1, max_size=6
)


@given(points)
def test_the_front_holds_who_nobody_beats(found: list[tuple[int, int, float]]) -> None:
    made = bare(
        *(
            variant(
                f"v{number}",
                size=size(wire * 1000),
                accuracy={"native": pictures_accuracy(worst, worst)},
                latency={"wasm": warm(1, ratio)},
            )
            for number, (wire, worst, ratio) in enumerate(found)
        )
    )
    front = {v["name"] for v in made["variants"][1:] if not dominated(made, v)}
    assert front
    smallest = min(found)[0]
    finest = max(worst for wire, worst, _ in found if wire == smallest)
    fastest = min(ratio for wire, worst, ratio in found if (wire, worst) == (smallest, finest))
    assert f"v{found.index((smallest, finest, fastest))}" in front
    for number, (wire, worst, ratio) in enumerate(found):
        beaten = any(w <= wire and p >= worst and (w, p) != (wire, worst) and r <= ratio * 1.05 for w, p, r in found)
        assert (f"v{number}" in front) is not beaten


def test_why_something_is_missing() -> None:
    made = bare(
        variant("int8"),
        variant("prune"),
        not_measured=[
            {"what": "prune: layers", "why": "a graph of its own"},
            {"what": "ONNX Runtime dynamic int8", "why": "an operator it does not know"},
            {"what": "webgpu", "why": "no adapter"},
            {"what": "prune on webgpu: accuracy and latency", "why": "the page\ncrashed"},
            {"what": "the server", "why": "no Flask"},
        ],
    )
    assert wording.why(made, "layers", "prune") == "not measured: a graph of its own"
    assert wording.why(made, "layers", "int8") == "not measured"
    assert wording.why(made, "accuracy", "int8") == "not measured"
    assert wording.why(made, "latency", "int8", "webgpu") == "not measured: no adapter"
    assert wording.why(made, "latency", "prune", "webgpu") == "not measured: the page\\ncrashed"
    assert wording.why(made, "latency", "prune", "wasm") == "not measured"
    assert wording.why(made, "server") == "not measured: no Flask"


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (54_400_000, "54.4 MB")],
)
def test_sizes_in_words(value: int, words: str) -> None:
    assert wording.size(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (0.00012, "0.000120"), (1e-7, "1.00e−07"), (-0.185, "−0.185"), (9.999, "10.0"), (123456, "123,000")],
)
def test_numbers_in_words(value: float, words: str) -> None:
    assert wording.plain(value) == words


@given(st.floats(1e-4, 1e6))
def test_words_stay_near_the_number(value: float) -> None:
    assert math.isclose(float(wording.plain(value).replace(",", "").replace("−", "-")), value, rel_tol=0.0051)


@given(st.floats(0, 1))
def test_all_is_said_only_of_all(share: float) -> None:
    words = wording.percent(share)
    assert (words == "100 %") == (share == 1)
    assert (words == "0 %") == (share == 0)
