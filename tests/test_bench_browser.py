"""Networks measured in a real Chromium: the numbers, and what is said where there are none."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink import formats, site
from shrink import recipe as recipes
from shrink.bench import browser
from shrink.bench._page import Chromium, PageProblem, Visit, absence, executable
from shrink.bench._page import site as served
from shrink.bench.accuracy import compared, judged
from shrink.bench.browser import Found, as_json, measure
from shrink.bench.document import checked
from shrink.bench.native import Native
from shrink.bench.plan import ORIGINAL, BrowserOptions, Cell, Values, Variant
from shrink.errors import UsageError
from shrink.export import Network, onnxruntime_web
from shrink.progress import Progress, silent
from tests.pages import PACKAGE, generator, needs_package

needs_browser = pytest.mark.skipif(absence(None) is not None, reason=str(absence(None) or "there is a browser"))
SHAPE = (1, 20)
SAMPLES = tuple({"z": site.seeded_input(seed, 0, SHAPE, "float32")} for seed in range(2))
QUICK = BrowserOptions(backends=("wasm",), runs=3, seconds=0, cold_runs=1)
RUN = "async run(feeds) {"

Plant = Callable[[Path], None]


class Exports:
    """The sites of variants, made once; `plants` change copies of them, by the variant's name."""

    def __init__(self, folder: Path, plants: dict[str, Plant] | None = None):
        self.made = folder
        self.plants = plants or {}

    def folder(self, variant: Variant, backend: str, progress: Progress) -> Path:
        out = self.made / f"{variant.mode or 'float32'}-{backend}"
        if not out.exists():
            out.mkdir()
            recipe = recipes.from_flags(variant.mode, (), (), None, {}) if variant.mode else None
            page = onnxruntime_web.export(variant.network, out, recipe, progress, backend=backend, runtime=PACKAGE)
            site.add_page(out, onnxruntime_web.NAME, "generator", page)
        if variant.name not in self.plants:
            return out
        copy = self.made / f"planted-{variant.name}-{backend}-{id(self)}"
        if not copy.exists():
            shutil.copytree(out, copy)
            self.plants[variant.name](copy)
        return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sites")


@pytest.fixture(scope="module")
def network(folder: Path) -> Network:
    path = folder / "generator.onnx"
    onnx.save(generator(), path)
    return Network("generator", formats.sniff(path).read(path), (SHAPE,))


@pytest.fixture
def one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebAssembly with one thread alone: what goes for it goes for the others."""
    monkeypatch.setitem(browser.CELLS, "wasm", ("wasm-1",))


def variants(network: Network, *names: str) -> list[Variant]:
    """The original, and after it ones that are the same, but for those that are called by their mode."""
    modes = ("eightbit", "int8")
    return [Variant(name, name if name in modes else None, Path("g.onnx"), network) for name in (ORIGINAL, *names)]


def measured(
    network: Network,
    sites: Exports,
    *names: str,
    options: BrowserOptions = QUICK,
    progress: Progress = silent,
    patience_s: float = 60,
) -> tuple[dict[tuple[str, str], Cell], Found]:
    cells: dict[tuple[str, str], Cell] = {}
    abouts: list[dict[str, Any]] = []
    found = measure(
        variants(network, *names),
        SAMPLES,
        sites,
        options,
        lambda cell: cells.update({(cell.variant, cell.backend): cell}),
        progress,
        on_browser=lambda about: None if cells else abouts.append(about),
        patience_s=patience_s,
    )
    # It is heard of before the first number.
    assert abouts[:1] == ([found.browser] if found.browser else [])
    return cells, found


def adapter_with(code: str) -> Plant:
    """A site whose adapter does this before every run."""

    def plant(folder: Path) -> None:
        script = folder / "shrink" / "runtimes" / "onnxruntime_web.js"
        text = script.read_text()
        assert text.count(RUN) == 1
        script.write_text(text.replace(RUN, f"{RUN} {code}"))

    return plant


# --- the numbers -----------------------------------------------------------------------------------------------


@needs_browser
@needs_package
def test_every_cell_has_what_the_document_holds(network: Network, folder: Path) -> None:
    options = BrowserOptions(backends=("wasm", "webgpu"), runs=3, seconds=0, cold_runs=2)
    told: list[tuple[str, int, int]] = []
    cells, found = measured(
        network, Exports(folder), "eightbit", options=options, progress=lambda *step: told.append(step)
    )
    assert set(cells) == {(name, cell) for name in (ORIGINAL, "eightbit") for cell in ("wasm-1", "wasm", "webgpu")}
    assert found.not_measured == ()
    assert found.browser is not None
    assert found.browser["name"].startswith("Chromium ")
    assert found.browser["adapter"]
    assert found.browser["software_adapter"] in (True, False)
    assert told
    assert all(0 <= done <= total for _, done, total in told)
    for (_, backend), cell in cells.items():
        latency = cell.latency
        assert latency["problem"] is None
        cold, warm = latency["cold"], latency["warm"]
        assert cold["network"] == "unthrottled"
        assert len(cold["samples"]) == 2
        for sample in cold["samples"]:
            parts = [sample[step] for step in ("download", "decode", "compile", "first_run")]
            assert min(parts) >= 0
            assert sample["first_run"] > 0 < sample["compile"]
            assert sum(parts) <= sample["first_picture"] + 0.01
        assert cold["download"] == pytest.approx(statistics.median(s["download"] for s in cold["samples"]), abs=1e-3)
        assert len(warm["samples"]) == 3
        assert warm["median"] == round(statistics.median(warm["samples"]), 3)
        assert min(warm["samples"]) > 0
        if sys.platform == "linux":
            assert 2e7 < latency["memory_peak"] < 2e9
        threads = 1 if backend == "wasm-1" else min(os.cpu_count() or 1, 8)
        assert latency["threads"] == threads
    for backend in ("wasm-1", "wasm", "webgpu"):
        one, other = (cells[name, backend].latency["warm"] for name in (ORIGINAL, "eightbit"))
        ratios = [b / a for a, b in zip(one["samples"], other["samples"], strict=True)]
        assert other["ratio"] == round(statistics.median(ratios), 4)
        assert one["ratio"] is None
    native = native_outputs(network)
    for backend in ("wasm-1", "wasm", "webgpu"):
        assert judge(native, cells[ORIGINAL, backend])["wrong"] is False
        # Eight bits lose something, and no backend may hide that.
        assert compared(native, cells["eightbit", backend].outputs)["max_error"] > 1e-4
    _check_document(cells, found)


def _check_document(cells: dict[tuple[str, str], Cell], found: Found) -> None:
    latency = {backend: cell.latency for (name, backend), cell in cells.items() if name == ORIGINAL}
    document: dict[str, Any] = {
        "shrink_bench": 1,
        "title": "generator",
        "created": "2026-11-21T07:00:00Z",
        "partial": False,
        "browser": found.browser,
        "variants": [{"name": ORIGINAL, "latency": latency}],
        "not_measured": list(found.not_measured),
    }
    assert checked(document)["variants"][0]["latency"] == latency


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_a_wrong_backend_is_named(network: Network, folder: Path, tmp_path: Path) -> None:
    model = generator()
    weights = next(i for i in model.graph.initializer if i.name == "c2/W")
    weights.raw_data = (np.frombuffer(weights.raw_data, "<f4") * np.float32(1.1)).tobytes()
    onnx.save(model, tmp_path / "other.onnx")
    other = Network("generator", formats.sniff(tmp_path / "other.onnx").read(tmp_path / "other.onnx"), (SHAPE,))

    class Wrong(Exports):
        def folder(self, variant: Variant, backend: str, progress: Progress) -> Path:
            return super().folder(Variant(variant.name, None, variant.file, other), backend, progress)

    cells, _ = measured(network, Wrong(tmp_path))
    native = native_outputs(network)
    assert judge(native, cells[ORIGINAL, "wasm-1"])["wrong"]
    assert judge(native_outputs(other), cells[ORIGINAL, "wasm-1"])["wrong"] is False


def native_outputs(network: Network) -> list[Values]:
    session = Native.of(network)
    return [session.run(sample) for sample in SAMPLES]


def judge(native: list[Values], cell: Cell) -> dict[str, Any]:
    return judged(compared(native, cell.outputs), native, cell.outputs, half=False)


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_a_slow_variant_is_reported_slower(network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = adapter_with("for (const end = performance.now() + 60; performance.now() < end; ) ;")
    order: list[str] = []
    call = Visit.call

    async def told(self: Visit, function: str, *arguments: Any) -> Any:
        if function == "run":
            assert self.page is not None
            order.append(self.page.url)
        return await call(self, function, *arguments)

    monkeypatch.setattr(Visit, "call", told)
    cells, _ = measured(network, Exports(folder, {"slow": slow}), "slow", "same")
    warm = {name: cells[name, "wasm-1"].latency["warm"] for name in (ORIGINAL, "slow", "same")}
    assert warm["slow"]["median"] >= 60
    assert warm["slow"]["ratio"] > 3 * warm["same"]["ratio"]
    assert cells["slow", "wasm-1"].latency["cold"]["first_run"] >= 60
    # Two rounds after the one in which the pages opened: A B C A B C.
    *_, a, b, c, d, e, f = order
    assert (a, b, c) == (d, e, f)
    assert len({a, b, c}) == 3


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_a_throttled_download_takes_the_time_of_its_bytes(network: Network, folder: Path) -> None:
    options = BrowserOptions(backends=("wasm",), network="10mbit", runs=1, seconds=0, cold_runs=1)
    cells, _ = measured(network, Exports(folder), options=options)
    runtime = next((folder / "float32-wasm" / "runtime").glob("*.wasm.gz")).stat().st_size
    cold = cells[ORIGINAL, "wasm-1"].latency["cold"]
    assert cold["download"] > 1000 * runtime / (10e6 / 8) * 0.9
    assert "10 Mbit/s" in cold["network"]
    assert "40 ms" in cold["network"]


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_a_second_visit_has_the_weights_from_the_cache(network: Network, folder: Path) -> None:
    asked = "performance.getEntriesByType('resource').some(({ name }) => name.endsWith('/weights.safetensors'))"

    async def visits(url: str) -> list[bool]:
        from playwright.async_api import async_playwright

        path = executable(None)
        assert path is not None
        async with async_playwright() as playwright:
            chromium = Chromium(playwright, path, (), 60)
            seen = []
            first = await chromium.open(f"{url}bench.html")
            await first.call("visit", [as_json(SAMPLES[0])])
            seen.append(await first.evaluate(asked))
            second = await chromium.open(f"{url}bench.html", context=await first.leave())
            await second.call("visit", [as_json(SAMPLES[0])])
            seen.append(await second.evaluate(asked))
            await chromium.close()
            return seen

    exported = Exports(folder).folder(variants(network)[0], "wasm", silent)
    with served(exported) as url:
        assert asyncio.run(visits(url)) == [True, False]
    options = BrowserOptions(backends=("wasm",), network="offline-cache", runs=1, seconds=0, cold_runs=1)
    cells, _ = measured(network, Exports(folder), options=options)
    cold = cells[ORIGINAL, "wasm-1"].latency["cold"]
    assert "second visit" in cold["network"]
    assert len(cold["samples"]) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------

LOST = {
    "throws": ("throw new Error('planted \\u202e fault');", "the page failed: Error: planted \\u202e fault"),
    "hangs": ("for (;;) ;", "no answer within"),
    "leaves": ("location.href = 'manifest.json'; await new Promise(() => {});", "the page failed: Execution context"),
    "takes all memory": (
        "const all = []; for (;;) all.push(new WebAssembly.Memory({ initial: 65536 }));",
        "the page failed: RangeError",
    ),
}


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_what_goes_wrong_stands_in_its_cell_and_the_rest_goes_on(network: Network, folder: Path) -> None:
    def refuse(folder: Path) -> None:
        raise UsageError("it has no graph")

    # A visit has a first run and one for each sample; the fourth, in a page that runs warm, fails.
    tires = adapter_with("globalThis.runs = (globalThis.runs ?? 0) + 1; if (runs > 3) throw new Error('the fourth');")
    plants = {"bare": refuse, "tires": tires, **{name: adapter_with(code) for name, (code, _) in LOST.items()}}
    cells, found = measured(network, Exports(folder, plants), *plants, "last", patience_s=15)
    assert found.not_measured == ()
    latency = {name: cells[name, "wasm-1"].latency for name in (ORIGINAL, *plants, "last")}
    for name, (_, words) in LOST.items():
        assert words in latency[name]["problem"], name
        assert latency[name]["cold"] is latency[name]["warm"] is None
        assert cells[name, "wasm-1"].outputs == ()
    for name in (ORIGINAL, "last"):
        assert latency[name]["problem"] is None
        assert len(latency[name]["warm"]["samples"]) == 3
    assert latency["bare"]["problem"] == "it cannot be exported: it has no graph"
    # What was measured before stays.
    assert latency["tires"]["problem"] == "the page failed: Error: the fourth"
    assert len(latency["tires"]["cold"]["samples"]) == 1
    assert len(cells["tires", "wasm-1"].outputs) == len(SAMPLES)


@needs_browser
@needs_package
def test_webgpu_that_is_not_there_is_not_measured_as_if_it_were(network: Network, folder: Path) -> None:
    def plant(folder: Path) -> None:
        script = folder / "shrink" / "runtimes" / "onnxruntime_web.js"
        text = script.read_text()
        assert "navigator.gpu?.requestAdapter()" in text
        script.write_text(text.replace("navigator.gpu?.requestAdapter()", "Promise.resolve(null)"))

    options = BrowserOptions(backends=("webgpu",), runs=1, seconds=0, cold_runs=1)
    cells, _ = measured(network, Exports(folder, {"none": plant}), "none", options=options)
    assert "runs on WebAssembly" in cells["none", "webgpu"].latency["problem"]
    assert cells["none", "webgpu"].latency["cold"] is None
    assert cells[ORIGINAL, "webgpu"].latency["problem"] is None


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("kind", "words"), [("renderer", "crashed, as it does"), ("browser", "the browser ended")], ids=["page", "browser"]
)
def test_a_process_that_dies_takes_one_cell_with_it(network: Network, folder: Path, kind: str, words: str) -> None:
    killed: list[int] = []

    def kill(name: str, done: int, total: int, /) -> None:
        if name.startswith("warm") and "round 3" in name and not killed:
            killed.append(process := max(_processes(kind), key=_resident))
            os.kill(process, signal.SIGKILL)

    options = BrowserOptions(backends=("wasm",), runs=6, seconds=0, cold_runs=1)
    cells, found = measured(network, Exports(folder), "a", "b", options=options, progress=kill)
    assert killed
    assert found.not_measured == ()
    lost = [cell for cell in cells.values() if cell.latency["problem"]]
    assert len(lost) == 1
    assert words in lost[0].latency["problem"]
    assert len(lost[0].latency["warm"]["samples"]) == 2
    for cell in cells.values():
        assert cell is lost[0] or len(cell.latency["warm"]["samples"]) == 6


def _processes(kind: str) -> list[int]:
    """Our Chromium's processes: those below this one."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    def is_ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    ours = {process: line for process, line in lines.items() if "--headless" in line or "--type=" in line}
    ours = {process: line for process, line in ours.items() if is_ours(process) and "chrom" in line}
    if kind == "browser":
        return [process for process, line in ours.items() if "--type=" not in line and "remote-debugging" in line]
    return [process for process, line in ours.items() if f"--type={kind}" in line]


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1])


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_a_page_that_runs_out_of_memory_is_said_to_crash(network: Network, folder: Path, tmp_path: Path) -> None:
    # With little memory for scripts, so that it is soon used up.
    small = tmp_path / "chromium"
    small.write_text(f'#!/bin/sh\nexec "{executable(None)}" --js-flags=--max-old-space-size=60 "$@"\n')
    small.chmod(0o755)
    options = BrowserOptions(backends=("wasm",), runs=1, seconds=0, cold_runs=1, chromium=small)
    greedy = adapter_with("const all = []; for (;;) all.push({ all });")
    cells, _ = measured(network, Exports(folder, {"greedy": greedy}), "greedy", options=options)
    assert "memory is used up" in cells["greedy", "wasm-1"].latency["problem"]
    assert cells[ORIGINAL, "wasm-1"].latency["problem"] is None


@needs_browser
def test_a_crash_on_purpose_is_told_and_the_next_page_opens() -> None:
    async def crash() -> str:
        from playwright.async_api import async_playwright

        path = executable(None)
        assert path is not None
        async with async_playwright() as playwright:
            chromium = Chromium(playwright, path, (), 30)
            with pytest.raises(PageProblem) as caught:
                await chromium.open("chrome://crash")
            visit = await chromium.open("about:blank")
            assert await visit.evaluate("1 + 1") == 2
            await chromium.close()
            return str(caught.value)

    assert "crashed" in asyncio.run(crash())


@needs_browser
@needs_package
@pytest.mark.usefixtures("one_cell")
def test_an_interrupt_keeps_what_is_measured(network: Network, folder: Path) -> None:
    cells: dict[tuple[str, str], Cell] = {}

    def interrupt(name: str, done: int, total: int, /) -> None:
        if name.startswith("warm") and "round 3" in name:
            os.kill(os.getpid(), signal.SIGINT)

    options = BrowserOptions(backends=("wasm",), runs=1000, seconds=0, cold_runs=1)
    with pytest.raises(KeyboardInterrupt):
        measure(
            variants(network, "same"),
            SAMPLES,
            Exports(folder),
            options,
            lambda cell: cells.update({(cell.variant, cell.backend): cell}),
            interrupt,
        )
    assert set(cells) == {(ORIGINAL, "wasm-1"), ("same", "wasm-1")}
    for cell in cells.values():
        assert len(cell.outputs) == len(SAMPLES)
        assert len(cell.latency["cold"]["samples"]) == 1
        assert 2 <= len(cell.latency["warm"]["samples"]) < 1000
    assert _processes("browser") == []


def test_without_a_browser_the_reason_is_given(network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright")
    options = BrowserOptions(chromium=folder / "no-such-browser")
    cells, found = measured(network, Exports(folder), options=options)
    assert cells == {}
    assert found.browser is None
    assert [missing["what"] for missing in found.not_measured] == ["wasm-1", "wasm", "webgpu"]
    assert all("no-such-browser" in missing["why"] for missing in found.not_measured)

    monkeypatch.setenv("PATH", "")
    assert "Chromium is not installed" in measured(network, Exports(folder))[1].not_measured[0]["why"]

    monkeypatch.setitem(sys.modules, "playwright", None)
    assert "Playwright is not installed" in measured(network, Exports(folder))[1].not_measured[0]["why"]


@needs_package
def test_a_browser_that_does_not_start_is_a_reason_too(network: Network, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    options = BrowserOptions(backends=("wasm", "webgpu"), chromium=broken)
    cells, found = measured(network, Exports(folder), options=options)
    assert cells == {}
    assert found.browser is None
    assert {missing["what"] for missing in found.not_measured} == {"wasm-1", "wasm", "webgpu"}
    assert all("does not start" in missing["why"] for missing in found.not_measured)


# --- the parts -------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 10**9), st.floats(0, 1e11), st.booleans())
def test_groups_have_every_variant_once_beside_the_original(n: int, size: int, room: float, original: bool) -> None:
    names = [*([ORIGINAL] if original else []), *(f"v{i}" for i in range(n))]
    lanes = [browser._Lane(name, "wasm", "", weights_bytes=size) for name in names]
    groups = browser._groups(lanes, room)
    seen = [lane.variant for group in groups for lane in group if lane.variant != ORIGINAL]
    assert seen == [name for name in names if name != ORIGINAL]
    assert all((group[0].variant == ORIGINAL) == original for group in groups)
    assert bool(groups) == bool(names)
    # A pair is needed for a ratio, however little memory there is.
    need = 200e6 + 4 * size
    assert all(len(group) <= max(2, room / need) for group in groups)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([[1, -2.5]], "f4"), "<f4"),
        (np.array([1, 2.5], ">f8"), "<f8"),
        (np.array([[0.5]], "f2"), "<f4"),
        (np.array([True, False]), "?"),
        (np.arange(6, dtype="i8").reshape(2, 3).T, "<i8"),
        (np.array(3, "i4"), "<i4"),
    ],
)
def test_samples_travel_as_little_endian_bytes_in_order(values: NDArray[Any], dtype: str) -> None:
    import base64

    ((name, text),) = as_json({"x": values})
    assert name == "x"
    assert np.frombuffer(base64.b64decode(text), dtype).tolist() == values.reshape(-1).tolist()
