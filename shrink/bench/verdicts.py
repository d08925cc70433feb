"""Which variant to ship, and what is lost: one line for each, out of the numbers of the document and nothing else."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any, Literal

from shrink.bench import wording
from shrink.errors import printable

__all__ = [
    "RULES",
    "Quality",
    "Tone",
    "Verdict",
    "best",
    "dominated",
    "first_visit",
    "pairs",
    "quality",
    "quality_name",
    "speeds",
    "verdicts",
]

Tone = Literal["original", "ship", "look", "no", "unknown"]
Level = Literal["good", "fair", "poor"]
State = Literal["wrong", "broken", "right"]

# Below these the eye sees nothing, and little: PSNR of 8-bit pictures, the usual figures of lossy image coding.
_PSNR_GOOD, _PSNR_FAIR = 40.0, 30.0
_SQNR_GOOD, _SQNR_FAIR = 40.0, 30.0
_AGREEMENT_GOOD, _AGREEMENT_FAIR = 0.99, 0.95
_POINTS_GOOD, _POINTS_FAIR = 0.01, 0.03
_SMALLER = 1.05
_SAME_SPEED = 0.05
_TOO_SLOW = 1.25

RULES = (
    f"Pictures: a worst PSNR of {_PSNR_GOOD:.0f} dB or more is good, {_PSNR_FAIR:.0f} dB or more fair. The peak of "
    "PSNR and SSIM is 1 where the original's values are from 0 to 1, 2 where they are from \N{MINUS SIGN}1 to 1, 255 "
    "where they are bytes, and else the range that they have.",
    f"Classes and sequences: a top-1 accuracy at most {_POINTS_GOOD * 100:.0f} percentage point below that of float32 "
    f"is good, at most {_POINTS_FAIR * 100:.0f} fair; without labels, the same best class for "
    f"{_AGREEMENT_GOOD * 100:.0f} % of the inputs is good, for {_AGREEMENT_FAIR * 100:.0f} % fair.",
    f"Other outputs: {_SQNR_GOOD:.0f} dB between output and error is good, {_SQNR_FAIR:.0f} dB fair.",
    f"Ship it: good, its weights at least {_SMALLER:.2f} times smaller, no run takes more than {_TOO_SLOW:.2f} times "
    "as long as float32, right on every backend, every check met.",
    "Look first: fair, or slower, or wrong on some backend only. Do not ship it: anything else.",
    f"As fast as float32: within {_SAME_SPEED * 100:.0f} % of it, or no further from it than the runs are from each "
    "other (the middle half of the ratios holds 1). A speed in software in place of a GPU does not count.",
)


@dataclass(frozen=True)
class Quality:
    """How near the outputs are to those of float32.

    `merit` is the figure of the chart, the higher the better, and infinite where nothing differs; `figure` is that in
    words, without what it is.
    """

    merit: float
    figure: str
    text: str
    level: Level


@dataclass(frozen=True)
class Verdict:
    """`text` says it in one line; `advice` is its end, after the numbers."""

    name: str
    tone: Tone
    numbers: str
    advice: str

    @property
    def text(self) -> str:
        return f"{self.name}: {self.numbers}{': ' if self.numbers else ''}{self.advice}"


def verdicts(document: dict[str, Any]) -> list[Verdict]:
    """One for each variant, the float32 original first, in the order of the (checked) document."""
    return [_verdict(document, variant) for variant in document["variants"]]


def best(document: dict[str, Any]) -> Verdict | None:
    """The one to ship: the smallest of those that may be, the more accurate where that is equal."""
    fit = [
        (_cost(variant), -(found.merit if (found := quality(document, variant)) else 0), number, verdict)
        for number, (variant, verdict) in enumerate(zip(document["variants"], verdicts(document), strict=True))
        if verdict.tone == "ship"
    ]
    return min(fit)[-1] if fit else None


def _cost(variant: dict[str, Any]) -> float:
    return first_visit(variant) or weights_on_the_wire(variant) or math.inf


def first_visit(variant: dict[str, Any]) -> int | None:
    """Bytes of a first visit, on WebAssembly where that was measured."""
    visits = (variant["size"] or {}).get("first_visit") or {}
    return visits.get("wasm") or visits.get("webgpu")


def weights_on_the_wire(variant: dict[str, Any]) -> int | None:
    """Bytes of the weights as a first visit downloads them; where that is not known, the smallest form measured."""
    sizes = variant["size"] or {}
    for parts in (sizes.get("first_visit_parts") or {}).values():
        if parts:
            return int(parts["weights"])
    known = [sizes[key] for key in ("wire_brotli", "wire_gzip", "wire_raw") if sizes.get(key) is not None]
    return min(known) if known else sizes.get("file")


def _verdict(document: dict[str, Any], variant: dict[str, Any]) -> Verdict:
    name = wording.name_of(variant["name"])
    original = document["variants"][0]
    if variant is original:
        return Verdict(name, "original", _original_numbers(variant), "what the others are measured against")
    smaller, how_small = _size_words(variant, original)
    accuracy = quality(document, variant)
    found = speeds(document, variant)
    wrong, broken, right = _backends(variant)
    parts = [how_small, accuracy.text if accuracy else None, *(speed.words for speed in found)]
    numbers = "; ".join(part for part in parts if part)
    failed = [check for check in document["checks"] or () if check["variant"] == variant["name"] and not check["met"]]
    slow = any(speed.slow for speed in found)

    against = [f"the check {_check_words(check)} is not met" for check in failed]
    if accuracy and accuracy.level == "poor":
        against.append("too much is lost")
    if smaller is not None and smaller < _SMALLER:
        against.append("it is hardly smaller")
    if (wrong or broken) and not right:
        against += [f"wrong on {place}" for place in wrong] + [f"{what} on {place}" for place, what in broken]
    if against:
        return Verdict(name, "no", numbers, f"do not ship it, {_and(against)}")
    if not accuracy or smaller is None:
        missing = "accuracy" if not accuracy else "size"
        return Verdict(name, "unknown", numbers, f"no verdict, its {missing} was not measured")
    if wrong or broken:
        where = [f"wrong on {place}" for place in wrong] + [f"{what} on {place}" for place, what in broken]
        return Verdict(name, "look", numbers, f"ship it on {_and(right)} only: {_and(where)}")
    if accuracy.level == "fair":
        look = "at the pictures" if _kind(document) == "image" else "at what is lost"
        return Verdict(name, "look", numbers, f"look {look} first{', and it is slower' if slow else ''}")
    if slow:
        return Verdict(name, "look", numbers, "ship it where size counts more than speed")
    return Verdict(name, "ship", numbers, "ship it")


def _original_numbers(variant: dict[str, Any]) -> str:
    weights, visit = weights_on_the_wire(variant), first_visit(variant)
    parts = [
        f"weights {wording.size(weights)}" if weights else "",
        f"first visit {wording.size(visit)}" if visit else "",
    ]
    return ", ".join(part for part in parts if part)


def _size_words(variant: dict[str, Any], original: dict[str, Any]) -> tuple[float | None, str | None]:
    """How many times smaller the weights are, and that in words with the first visit."""
    mine, theirs = weights_on_the_wire(variant), weights_on_the_wire(original)
    if not mine or not theirs:
        return None, None
    words = f"weights {_smaller(mine, theirs)}"
    visit, their_visit = first_visit(variant), first_visit(original)
    if visit and their_visit:
        words += f", first visit {_smaller(visit, their_visit)}"
    return theirs / mine, words


def _smaller(mine: int, theirs: int) -> str:
    sizes = f"({wording.size(mine)} instead of {wording.size(theirs)})"
    ratio = theirs / mine
    if ratio >= 1.005:
        return f"{wording.times(ratio)} times smaller {sizes}"
    return f"no smaller {sizes}" if ratio > 0.995 else f"{wording.times(1 / ratio)} times larger {sizes}"


@dataclass(frozen=True)
class Speed:
    """The time of a warm run as a multiple of float32's, and that in words. `slow`: by more than noise, and much."""

    ratio: float
    words: str
    slow: bool


def speeds(document: dict[str, Any], variant: dict[str, Any]) -> list[Speed]:
    """On WebAssembly, and on WebGPU where that is a GPU."""
    cells = variant["latency"] or {}
    wasm = next((cell for cell in ("wasm", "wasm-1") if _ratio(cells.get(cell)) is not None), None)
    hardware = not (document["browser"] or {}).get("software_adapter")
    found = []
    for cell in filter(None, (wasm, "webgpu" if hardware else None)):
        ratio = _ratio(cells.get(cell))
        if ratio is None:
            continue
        same = round(abs(ratio - 1), 9) <= _SAME_SPEED or _straddles(pairs(document, variant, cell))
        where = wording.place_words(cell).partition(",")[0]
        words = f"{'as fast as float32' if same else _speed_words(ratio)} on {where}"
        found.append(Speed(ratio, words, ratio > _TOO_SLOW and not same))
    return found


def pairs(document: dict[str, Any], variant: dict[str, Any], cell: str) -> list[float]:
    """The ratio to float32 of every round; [] for float32 itself, and where the rounds are not the same."""
    original = document["variants"][0]
    mine, theirs = (
        (((v["latency"] or {}).get(cell) or {}).get("warm") or {}).get("samples") or [] for v in (variant, original)
    )
    if variant is original or len(mine) != len(theirs) or not all(theirs):
        return []
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _straddles(ratios: list[float]) -> bool:
    """Whether the middle half of them holds 1: then the machine's noise is larger than the difference."""
    if len(ratios) < 2:
        return False
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low <= 1 <= high


def _ratio(cell: dict[str, Any] | None) -> float | None:
    warm = (cell or {}).get("warm") or {}
    ratio = warm.get("ratio")
    return float(ratio) if ratio is not None else None


def _speed_words(ratio: float) -> str:
    if ratio > 1:
        return f"a run takes {wording.times(ratio)} times as long as float32's"
    return f"{wording.times(1 / ratio)} times as fast as float32" if ratio else "faster than float32"


def _backends(variant: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Backends that are wrong, those that failed with what happened, and those that are right.

    WebAssembly is one of them where it did the same with one thread and with all, else it is two.
    """
    wrong, broken, right = [], [], []
    for cells in (("wasm-1", "wasm"), ("webgpu",)):
        known = {cell: became for cell in cells if (became := _became(variant, cell))}
        alike = len(set(known.values())) == 1
        for cell, (state, problem) in list(known.items())[: 1 if alike else None]:
            words = wording.place_words(cells[-1]) if alike else wording.backend_words(cell, _cell(variant, cell))
            if state == "wrong":
                wrong.append(words)
            elif state == "broken":
                broken.append((words, problem))
            else:
                right.append(words)
    return wrong, broken, right


def _became(variant: dict[str, Any], cell: str) -> tuple[State, str] | None:
    """What became of a cell, and what happened where it broke; None where nothing is known."""
    found = (variant["accuracy"] or {}).get(cell)
    problem = (_cell(variant, cell) or {}).get("problem")
    if found and found["wrong"]:
        return "wrong", ""
    if problem:
        return "broken", printable(problem)
    return ("right", "") if found else None


def _cell(variant: dict[str, Any], cell: str) -> dict[str, Any] | None:
    return (variant["latency"] or {}).get(cell)


def _check_words(check: dict[str, Any]) -> str:
    value = f" ({wording.plain(check['value'])})" if check["value"] is not None else ""
    return wording.name_of(check["check"]) + value


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# Accuracy


def _kind(document: dict[str, Any]) -> str:
    """What figure the outputs are judged by: "image", "accuracy", "agreement" or "other"."""
    all_of = [found for variant in document["variants"] if (found := accuracy_of(variant))]
    if any(found["psnr_db"] for found in all_of):
        return "image"
    for kind in ("accuracy", "agreement"):
        if any(found[f"top1_{kind}"] is not None for found in all_of):
            return kind
    return "other"


def accuracy_of(variant: dict[str, Any]) -> dict[str, Any] | None:
    """That of native arithmetic, or of the first backend where that was not measured."""
    places = variant["accuracy"] or {}
    return next((places[place] for place in ("native", "wasm", "wasm-1", "webgpu") if places.get(place)), None)


def quality_name(document: dict[str, Any]) -> str:
    """The name of what `merit` counts, with its unit."""
    return {
        "image": "Worst PSNR (dB)",
        "accuracy": "Top-1 accuracy (%)",
        "agreement": "Same best class as float32 (% of inputs)",
        "other": "SQNR of the output (dB)",
    }[_kind(document)]


def quality(document: dict[str, Any], variant: dict[str, Any]) -> Quality | None:
    """None where it was not measured."""
    found = accuracy_of(variant)
    if not found:
        return None
    if found["problem"] and found["relative_error"] is None and not found["exact"]:
        return Quality(-math.inf, "none", f"its outputs cannot be compared ({printable(found['problem'])})", "poor")
    kind = _kind(document)
    judged = {"image": _pictures, "accuracy": _accuracy, "agreement": _agreement, "other": _other}[kind]
    result = judged(found, accuracy_of(document["variants"][0]) or {})
    perplexity = found["perplexity"]
    if result and perplexity is not None:
        return replace(result, text=f"{result.text}, perplexity {wording.plain(perplexity)}")
    return result


def _level(value: float, good: float, fair: float) -> Level:
    return "good" if value >= good else "fair" if value >= fair else "poor"


def _pictures(found: dict[str, Any], original: dict[str, Any]) -> Quality | None:
    if found["exact"]:
        return Quality(math.inf, "identical", "the same pictures as float32", "good")
    psnr = found["psnr_db"] or {}
    mean, worst = psnr.get("mean"), psnr.get("worst")
    if worst is None:
        return None
    shown = (
        f"PSNR {wording.decibels(mean)} (worst {worst:.1f})" if mean is not None else f"PSNR {worst:.1f} dB at worst"
    )
    text = shown.replace("-", wording.MINUS)
    return Quality(worst, wording.decibels(worst), text, _level(worst, _PSNR_GOOD, _PSNR_FAIR))


def _accuracy(found: dict[str, Any], original: dict[str, Any]) -> Quality | None:
    value, before = found["top1_accuracy"], original.get("top1_accuracy")
    if value is None or before is None:
        return None
    text = f"top-1 accuracy {wording.percent(value)} (float32 {wording.percent(before)})"
    level = _level(round(value - before, 9), -_POINTS_GOOD, -_POINTS_FAIR)
    return Quality(value * 100, wording.percent(value), text, level)


def _agreement(found: dict[str, Any], original: dict[str, Any]) -> Quality | None:
    value = found["top1_agreement"]
    if value is None:
        return None
    text = f"the same best class for {wording.percent(value)} of the inputs"
    return Quality(value * 100, wording.percent(value), text, _level(value, _AGREEMENT_GOOD, _AGREEMENT_FAIR))


def _other(found: dict[str, Any], original: dict[str, Any]) -> Quality | None:
    error = found["relative_error"]
    if found["exact"] or error == 0:
        return Quality(math.inf, "identical", "the same outputs as float32", "good")
    if error is None:
        return None
    sqnr = -20 * math.log10(error)
    text = f"relative error {wording.plain(error, 2)} ({wording.decibels(sqnr)})"
    return Quality(sqnr, wording.decibels(sqnr), text, _level(sqnr, _SQNR_GOOD, _SQNR_FAIR))


# The Pareto front


def dominated(document: dict[str, Any], variant: dict[str, Any]) -> bool:
    """Whether another variant is no larger, no less accurate and no slower, and better in size or accuracy.

    Speeds count as equal where they are within the noise that also counts as "as fast".
    """
    mine = _objectives(document, variant)
    if mine is None:
        return False
    for other in document["variants"]:
        theirs = _objectives(document, other)
        if other is variant or theirs is None:
            continue
        no_slower = theirs[2] <= mine[2] * (1 + _SAME_SPEED)
        if no_slower and theirs[0] <= mine[0] and theirs[1] >= mine[1] and theirs[:2] != mine[:2]:
            return True
    return False


def _objectives(document: dict[str, Any], variant: dict[str, Any]) -> tuple[float, float, float] | None:
    cost, found = _cost(variant), quality(document, variant)
    ratio = next((speed.ratio for speed in speeds(document, variant)), 1.0)
    return (cost, found.merit, ratio) if found and math.isfinite(cost) else None
