"""Latency, memory and outputs of exported networks in a headless Chromium.

Every backend is measured in two ways. Cold: each time a visitor who was never here opens the page. Warm: the pages of
all variants lie open side by side and run in turn, A B C A B C, so that whatever else the machine does spoils all
alike; ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench import timing
from shrink.bench._page import SOFTWARE, WEBGPU, Chromium, Condition, PageProblem, Visit, absence, executable, site
from shrink.bench.document import CACHED
from shrink.bench.plan import ORIGINAL, BrowserOptions, Cell, Sites, Values, Variant
from shrink.errors import ShrinkError, printable
from shrink.manifest import MANIFEST
from shrink.progress import Progress, silent

if TYPE_CHECKING:
    from playwright.async_api import Playwright

__all__ = ["CELLS", "Found", "as_json", "measure"]

CELLS = {"wasm": ("wasm-1", "wasm"), "webgpu": ("webgpu",)}
"""What is measured where the user asks for a backend: WebAssembly with one thread, and with as many as it gets."""

# 4g as the tools of Chromium's developers have it, their "Fast 4G".
CONDITIONS = {"10mbit": Condition(10e6 / 8, 10e6 / 8, 40), "4g": Condition(8.1e6 / 8, 1.35e6 / 8, 165)}
_IN_WORDS = {
    None: "unthrottled",
    "10mbit": "10mbit: 10 Mbit/s, each answer waits 40 ms",
    "4g": "4g: 8.1 Mbit/s, each answer waits 165 ms",
    CACHED: f"{CACHED}: the second visit, with the weights in the browser's cache",
}
_STEPS = ("download", "decode", "compile", "first_run", "first_picture")
_MEMORY_HOW = {
    "process": "the most that the page's process had in memory (its resident set, as Linux counts)",
    "page": "what the page held after its first runs, as the browser counts",
}
_WITHOUT_GPU = "; what WebGPU holds is in another process and not counted"

_PATIENCE_S = 300.0
_MEMORY_PATIENCE_S = 10.0
# A network that takes seconds would take hours for the visits of all its variants.
_COLD_AT_MOST_S = 900.0
# What an open page takes, roughly, and how much of the memory that is free they may take together.
_PAGE_BYTES = 200e6
_COPIES_OF_WEIGHTS = 4
_SHARE_OF_MEMORY = 0.6
_MEMORY_BYTES = 4e9
_SOFTWARE = ("swiftshader", "llvmpipe", "lavapipe", "basic render", "software")


@dataclass(frozen=True)
class Found:
    """Which browser measured, as in the document, and what could not be measured: {"what", "why"} each."""

    browser: dict[str, Any] | None
    not_measured: tuple[dict[str, str], ...] = ()


@dataclass
class _Lane:
    """One variant on one backend, so far as it is measured."""

    variant: str
    backend: str
    network: str
    url: str = ""
    weights_bytes: int = 0
    stored_bytes: int = 0
    threads: int | None = None
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    memory: int | None = None
    memory_how: str | None = None
    cold: list[dict[str, float]] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    outputs: tuple[dict[str, NDArray[np.float32]], ...] = ()

    def cell(self) -> Cell:
        latency = {
            "threads": self.threads,
            "note": " ".join(self.notes) or None,
            "problem": self.problem,
            "memory_peak": self.memory,
            "memory_how": self.memory_how,
            "cold": {"network": self.network, **_medians(self.cold), "samples": list(self.cold)} if self.cold else None,
            "warm": timing.distribution(self.warm) | {"ratio": _ratio(self.ratios)} if self.warm else None,
        }
        return Cell(self.variant, self.backend, latency, self.outputs)


def _medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {step: round(statistics.median(sample[step] for sample in samples), 3) for step in _STEPS}


def _ratio(ratios: Sequence[float]) -> float | None:
    return round(statistics.median(ratios), 4) if ratios else None


def measure(
    variants: Sequence[Variant],
    samples: Sequence[Values],
    sites: Sites,
    options: BrowserOptions,
    on_cell: Callable[[Cell], None],
    progress: Progress = silent,
    *,
    on_browser: Callable[[dict[str, Any]], None] = lambda about: None,
    patience_s: float = _PATIENCE_S,
) -> Found:
    """Measure every variant on every backend; `samples` are what the networks are fed, the timed runs with the first.

    `on_cell` hears of a variant on a backend more than once, and what it hears last counts: whoever interrupts this
    keeps what has been measured. `on_browser` hears of the browser before its first number. What goes wrong in a page
    stands in its cell, and a page that gives no answer for `patience_s` is given up. Where there is no browser nothing
    is raised; the reasons are given back.
    """
    why = absence(options.chromium)
    path = executable(options.chromium)
    if why is not None or path is None:
        return Found(None, tuple({"what": cell, "why": why or ""} for name in options.backends for cell in CELLS[name]))
    if not options.backends or not variants:
        return Found(None)
    return asyncio.run(
        _Measuring(variants, samples, sites, options, on_cell, on_browser, progress, patience_s, path).all()
    )


@dataclass
class _Measuring:
    variants: Sequence[Variant]
    samples: Sequence[Values]
    sites: Sites
    options: BrowserOptions
    on_cell: Callable[[Cell], None]
    on_browser: Callable[[dict[str, Any]], None]
    progress: Progress
    patience_s: float
    path: Path

    async def all(self) -> Found:
        from playwright.async_api import async_playwright

        missing: list[dict[str, str]] = []
        about: dict[str, Any] = {"name": None, "adapter": None, "software_adapter": None}
        async with async_playwright() as playwright:
            arguments: dict[str, tuple[str, ...]] = {"wasm": ()}
            if "webgpu" in self.options.backends:
                try:
                    arguments["webgpu"], gpu = await self._graphics(playwright)
                    about |= gpu
                except PageProblem as problem:
                    missing.append({"what": "webgpu", "why": str(problem)})
            for backend in self.options.backends:
                if backend in arguments:
                    chromium = Chromium(playwright, self.path, arguments[backend], self.patience_s)
                    try:
                        about["name"] = await chromium.version()
                        self.on_browser(dict(about))
                        await self._backend(chromium, backend)
                    except PageProblem as problem:
                        missing += [{"what": cell, "why": str(problem)} for cell in CELLS[backend]]
                    finally:
                        await chromium.close()
        return Found(about if about["name"] else None, tuple(missing))

    async def _graphics(self, playwright: Playwright) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The arguments with which this browser has WebGPU, and what it runs on: hardware where there is any."""
        for arguments in (WEBGPU, SOFTWARE):
            chromium = Chromium(playwright, self.path, arguments, min(self.patience_s, 60.0))
            try:
                with tempfile.TemporaryDirectory() as empty, site(Path(empty)) as url:
                    visit = await chromium.open(f"{url}bench.html")
                    found = await visit.call("adapter")
                    await visit.close()
            finally:
                await chromium.close()
            if found is not None:
                name = _adapter_name(found)
                software = found["fallback"] or arguments == SOFTWARE or any(s in name.lower() for s in _SOFTWARE)
                return arguments, {"adapter": name, "software_adapter": bool(software)}
        raise PageProblem("this browser has no WebGPU, not even by software")

    async def _backend(self, chromium: Chromium, backend: str) -> None:
        with contextlib.ExitStack() as served:
            places = [self._served(served, variant, backend) for variant in self.variants]
            for cell in CELLS[backend]:
                lanes = [_lane(variant.name, cell, self.options.network, place) for variant, place in
                         zip(self.variants, places, strict=True)]  # fmt: skip
                try:
                    await _cold(lanes, chromium, self)
                    for lane in lanes:
                        self.on_cell(lane.cell())
                    await _warm(lanes, chromium, self)
                finally:
                    for lane in lanes:
                        if lane.cold or lane.problem:
                            self.on_cell(lane.cell())

    def _served(self, served: contextlib.ExitStack, variant: Variant, backend: str) -> _Place:
        try:
            folder = self.sites.folder(variant, backend, self.progress)
        except ShrinkError as error:
            return _Place(problem=f"it cannot be exported: {error}")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stored = sum(about["bytes"] for about in manifest["files"].values())
        return _Place(served.enter_context(site(folder)), manifest["float32_bytes"], stored)


@dataclass(frozen=True)
class _Place:
    """Where a variant is served: its address, the bytes of its weights when decoded, and of all its files."""

    url: str = ""
    weights_bytes: int = 0
    stored_bytes: int = 0
    problem: str | None = None


def _lane(name: str, cell: str, network: str | None, place: _Place) -> _Lane:
    query = "?threads=1" if cell == "wasm-1" else ""
    url = f"{place.url}bench.html{query}"
    return _Lane(name, cell, _IN_WORDS[network], url, place.weights_bytes, place.stored_bytes, problem=place.problem)


def _adapter_name(found: dict[str, Any]) -> str:
    words = [str(found[key]) for key in ("vendor", "architecture", "device", "description") if found.get(key)]
    return printable(" ".join(dict.fromkeys(words))) or "an adapter without a name"


def as_json(sample: Values) -> list[list[str]]:
    """A sample for bench.js. Numbers for float16 travel as float32, truth values as bytes."""
    out = []
    for name, values in sample.items():
        values = np.asarray(values)
        values = values.astype(np.float32) if values.dtype == np.float16 else values
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        out.append([name, base64.b64encode(data).decode()])
    return out


# --- cold ------------------------------------------------------------------------------------------------------


async def _cold(lanes: Sequence[_Lane], chromium: Chromium, asked: _Measuring) -> None:
    """Every variant visited by one new visitor after the other; the first one also brings back the outputs."""
    whole = [lane for lane in lanes if lane.problem is None]
    with contextlib.suppress(PageProblem):
        # A browser's first page is slower than all later ones, whatever it shows.
        for lane in whole[:1]:
            await (await chromium.open(lane.url)).close()
    total = asked.options.cold_runs * len(lanes)
    start = time.monotonic()
    for number in range(asked.options.cold_runs):
        if number and time.monotonic() - start > _COLD_AT_MOST_S:
            for lane in lanes:
                lane.notes.append(f"Visited only {number} times, as it takes long.")
            return
        for position, lane in enumerate(lanes):
            asked.progress(
                f"{lane.variant} on {lane.backend}, visit {number + 1}", number * len(lanes) + position, total
            )
            if lane.problem is None:
                with _told(lane):
                    await _visited(lane, chromium, asked)


@contextlib.contextmanager
def _told(lane: _Lane) -> Iterator[None]:
    """What goes wrong stands in the cell."""
    try:
        yield
    except PageProblem as problem:
        lane.problem = str(problem)


async def _visited(lane: _Lane, chromium: Chromium, asked: _Measuring) -> None:
    network = asked.options.network
    # Later visits bring back no outputs.
    samples = [as_json(sample) for sample in (asked.samples[:1] if lane.outputs else asked.samples)]
    if network == CACHED:
        first = await chromium.open(lane.url)
        try:
            await first.call("visit", samples[:1])
            context = await first.leave()
        except BaseException:
            await first.close()
            raise
        visit = await chromium.open(lane.url, context=context)
    else:
        condition = CONDITIONS.get(network or "")
        longer = 2 * lane.stored_bytes / condition.down if condition else 0.0
        visit = await chromium.open(lane.url, condition, longer_s=longer)
    try:
        about = await visit.call("visit", samples)
        _check_backend(lane, about)
        lane.threads = about["threads"]
        lane.cold.append({step: round(about["steps"][step], 3) for step in _STEPS})
        if not lane.outputs:
            lane.outputs = tuple([_outputs(await visit.call("outputs", i)) for i in range(len(samples))])
        await _remember(lane, visit, chromium)
    finally:
        await visit.close()


def _check_backend(lane: _Lane, about: dict[str, Any]) -> None:
    """A network that runs elsewhere must not be taken for one that runs here."""
    if not lane.backend.startswith(about["backend"]):
        raise PageProblem(printable(about["note"]) or f"it ran on {printable(about['backend'])}")


def _outputs(given: Iterable[tuple[str, list[int], str]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.frombuffer(base64.b64decode(text), "<f4").reshape(dims) for name, dims, text in given}


async def _remember(lane: _Lane, visit: Visit, chromium: Chromium) -> None:
    peak, how = await chromium.peak_memory(), "process"
    if peak is None:
        with contextlib.suppress(PageProblem, asyncio.TimeoutError):
            peak, how = await asyncio.wait_for(visit.call("memory"), _MEMORY_PATIENCE_S), "page"
    if peak is not None:
        lane.memory = max(peak, lane.memory or 0)
        lane.memory_how = _MEMORY_HOW[how] + (_WITHOUT_GPU if lane.backend == "webgpu" else "")


# --- warm ------------------------------------------------------------------------------------------------------


async def _warm(lanes: Sequence[_Lane], chromium: Chromium, asked: _Measuring) -> None:
    """All variants in turn, round after round, in groups of pages that fit into memory together."""
    for group in _groups([lane for lane in lanes if lane.problem is None], _free_bytes() * _SHARE_OF_MEMORY):
        await _Rounds(group, chromium, asked).run()


def _groups(lanes: Sequence[_Lane], room_bytes: float) -> list[list[_Lane]]:
    """The lanes in groups, each with the original in it, as it is what the others are compared with."""
    originals = [lane for lane in lanes if lane.variant == ORIGINAL]
    others = [lane for lane in lanes if lane.variant != ORIGINAL]
    need = max((_PAGE_BYTES + _COPIES_OF_WEIGHTS * lane.weights_bytes for lane in lanes), default=_PAGE_BYTES)
    size = max(1, int(room_bytes // need) - len(originals))
    return [[*originals, *others[i : i + size]] for i in range(0, max(len(others), len(originals)), size)]


def _free_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return _MEMORY_BYTES


class _Rounds:
    """Pages that are open side by side, and run in turn."""

    def __init__(self, lanes: Sequence[_Lane], chromium: Chromium, asked: _Measuring):
        self.lanes = lanes
        self.chromium = chromium
        self.asked = asked
        self.visits: dict[str, Visit] = {}

    async def run(self) -> None:
        try:
            options, rounds = self.asked.options, 0
            # The pages open in the first round, and the time that takes is not theirs.
            start = math.inf
            while self._going():
                spent = max(0.0, time.monotonic() - start)
                if timing.is_enough(rounds, spent, options):
                    return
                if timing.is_too_long(rounds, spent, options):
                    for lane in self._going():
                        lane.notes.append(f"Only {rounds} warm runs, as they take long.")
                    return
                share = timing.share(rounds, spent, options)
                where = self.lanes[0].backend
                self.asked.progress(f"warm runs on {where}, round {rounds + 1}", int(1000 * share), 1000)
                await self._round()
                rounds += 1
                start = min(start, time.monotonic())
        finally:
            for visit in self.visits.values():
                await visit.close()

    def _going(self) -> list[_Lane]:
        return [lane for lane in self.lanes if lane.problem is None]

    async def _round(self) -> None:
        taken: dict[str, float] = {}
        for lane in self._going():
            with _told(lane):
                visit = await self._visit(lane)
                # The page may have been opened in this very round: its first runs are not warm.
                taken[lane.variant] = round(await visit.call("run", 0), 4)
            if lane.problem is not None:
                await self._lost(lane)
        for lane in self.lanes:
            if lane.variant in taken:
                lane.warm.append(taken[lane.variant])
                if lane.variant != ORIGINAL and taken.get(ORIGINAL):
                    lane.ratios.append(taken[lane.variant] / taken[ORIGINAL])

    async def _visit(self, lane: _Lane) -> Visit:
        """The page of a lane, opened and run a few times where it is not open."""
        known = self.visits.get(lane.variant)
        if known is not None:
            return known
        visit = self.visits[lane.variant] = await self.chromium.open(lane.url)
        about = await visit.call("visit", [as_json(self.asked.samples[0])])
        _check_backend(lane, about)
        lane.threads = about["threads"]
        for _ in range(timing.WARM_UP):
            await visit.call("run", 0)
        return visit

    async def _lost(self, lane: _Lane) -> None:
        """Close a page that failed. Where the browser went with it, the others open again in a new one."""
        visit = self.visits.pop(lane.variant, None)
        if visit is not None:
            await visit.close()
        if self.chromium.current is None:
            for other in self.visits.values():
                await other.close()
            self.visits.clear()
