"""A headless Chromium for measuring, started anew where it was lost, and pages in it that never keep us waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shrink.errors import printable
from shrink.serve import Server

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, Error, Page, Playwright

__all__ = ["SOFTWARE", "WEBGPU", "Chromium", "Condition", "PageProblem", "Visit", "absence", "executable", "site"]

PAGE = Path(__file__).parent / "page"

# Everything that would make the browser call home is off.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)
WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
SOFTWARE = (*WEBGPU, "--use-webgpu-adapter=swiftshader")
_NO_GPU = ("--disable-gpu",)

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_INSTALL = "apt-get install chromium"
# For what only the browser itself does: opening and closing.
_CLOSING_S = 15.0
_LAUNCH_S = 60.0
_CRASH_TOLD_S = 0.5
_WORDS_AT_MOST = 400

_T = TypeVar("_T")


class PageProblem(Exception):
    """Why a page has no number to give, in words for the report."""


@dataclass(frozen=True)
class Condition:
    """A connection: bytes per second down and up, and what each answer waits for, in ms."""

    down: float
    up: float
    latency_ms: float


def executable(given: Path | None) -> Path | None:
    """The browser, None where there is none."""
    if given is not None:
        return given if given.is_file() and os.access(given, os.X_OK) else None
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    return None if found is None else Path(found)


def absence(given: Path | None) -> str | None:
    """Why nothing can be measured in a browser here; None where it can."""
    if find_spec("playwright") is None:
        return "Playwright is not installed (pip install 'shrink[bench]')"
    if executable(given) is None:
        return f"there is no browser at {printable(given)}" if given else f"Chromium is not installed ({_INSTALL})"
    return None


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """The address of an exported folder, served on this machine, with the page that measures beside the network."""
    with tempfile.TemporaryDirectory(prefix="shrink-bench-") as name:
        root = Path(name, "site")
        shutil.copytree(folder, root, copy_function=_link)
        for file in PAGE.iterdir():
            shutil.copyfile(file, root / file.name)
        server = Server(root)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def _link(source: str, target: str) -> None:
    """The same file at a second place, without its bytes being copied where that is possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Chromium:
    """One browser after the other: where one was lost, the next page opens in a new one.

    `patience_s` is how long a page may take for one answer.
    """

    def __init__(self, playwright: Playwright, path: Path, arguments: tuple[str, ...], patience_s: float):
        self._playwright = playwright
        self._path = path
        self._arguments = [*_ARGUMENTS, *(arguments or _NO_GPU)]
        self.patience_s = patience_s
        self._browser: Browser | None = None
        self._process: int | None = None
        # Processes whose memory was another page's.
        self._seen: set[int] = set()

    async def browser(self) -> Browser:
        """The running browser. Raises PageProblem where none can be started."""
        from playwright.async_api import Error

        if self._browser is None or not self._browser.is_connected():
            try:
                self._browser = await self._playwright.chromium.launch(
                    executable_path=self._path,
                    headless=True,
                    args=self._arguments,
                    timeout=_LAUNCH_S * 1000,
                    # Ctrl-C is ours: what was measured is kept first.
                    handle_sigint=False,
                )
                processes = await self._processes("browser")
            except Error as error:
                raise PageProblem(f"the browser does not start: {_first_line(error)}") from None
            self._process = next(iter(processes), None)
        return self._browser

    @property
    def current(self) -> Browser | None:
        """The browser that new pages open in, None where the next one starts another."""
        return self._browser if self._browser is not None and self._browser.is_connected() else None

    async def version(self) -> str:
        return f"Chromium {(await self.browser()).version}"

    async def context(self) -> BrowserContext:
        """A visitor who was never here: nothing is cached."""
        from playwright.async_api import Error

        browser = await self.browser()
        try:
            return await asyncio.wait_for(browser.new_context(), _LAUNCH_S)
        except (Error, asyncio.TimeoutError) as error:
            await self.close()
            raise PageProblem(f"the browser opens no page: {_first_line(error)}") from None

    async def open(
        self,
        url: str,
        condition: Condition | None = None,
        *,
        context: BrowserContext | None = None,
        longer_s: float = 0.0,
    ) -> Visit:
        """A page at this address, for a new visitor or for the one of `context`, with more patience by `longer_s`.

        Raises:
            PageProblem: it does not open.
        """
        visit = Visit(self, context or await self.context(), self.patience_s + longer_s)
        try:
            await visit.open(url, condition)
        except BaseException:
            await visit.close()
            raise
        return visit

    async def peak_memory(self) -> int | None:
        """The most bytes of memory that the process of the page which was opened last had; Linux tells."""
        peaks = {process: _peak(process) for process in await self._processes("renderer") - self._seen}
        known = {process: peak for process, peak in peaks.items() if peak is not None}
        if not known:
            return None
        # The other is one that the browser holds ready for the next page.
        process = max(known, key=lambda process: known[process])
        self._seen.add(process)
        return known[process]

    async def _processes(self, kind: str) -> set[int]:
        from playwright.async_api import Error

        if self._browser is None:
            return set()
        try:
            session = await self._browser.new_browser_cdp_session()
            found = await session.send("SystemInfo.getProcessInfo")
            await session.detach()
        except Error:
            return set()
        return {process["id"] for process in found["processInfo"] if process["type"] == kind}

    async def close(self) -> None:
        """End the browser, whatever state it is in."""
        browser, self._browser = self._browser, None
        if browser is None:
            return
        with contextlib.suppress(Exception):
            await asyncio.wait_for(browser.close(), _CLOSING_S)
            return
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.kill(self._process, signal.SIGKILL)


class Visit:
    """One page, open. What goes wrong in it comes out as PageProblem."""

    def __init__(self, chromium: Chromium, context: BrowserContext, patience_s: float):
        self._chromium = chromium
        self._patience_s = patience_s
        self.context = context
        self.page: Page | None = None
        self._crash = asyncio.Event()
        self._errors: list[str] = []

    async def open(self, url: str, condition: Condition | None) -> None:
        page = self.page = await self._answer(self.context.new_page())
        page.on("crash", lambda _: self._crash.set())
        page.on("pageerror", lambda error: self._errors.append(str(error)))
        page.set_default_timeout(self._patience_s * 1000)
        if condition is not None:
            session = await self._answer(self.context.new_cdp_session(page))
            await self._answer(
                session.send(
                    "Network.emulateNetworkConditions",
                    {
                        "offline": False,
                        "latency": condition.latency_ms,
                        "downloadThroughput": condition.down,
                        "uploadThroughput": condition.up,
                    },
                )
            )
        await self._answer(page.goto(url))

    async def call(self, function: str, *arguments: Any) -> Any:
        """What a function of bench.js gives. Raises PageProblem."""
        return await self.evaluate("([name, given]) => bench[name](...given)", [function, list(arguments)])

    async def evaluate(self, script: str, argument: Any = None) -> Any:
        """What a script gives in the page. Raises PageProblem."""
        if self.page is None:
            raise PageProblem("the page was never opened")
        return await self._answer(self.page.evaluate(script, argument))

    async def _answer(self, answer: Awaitable[_T]) -> _T:
        from playwright.async_api import Error

        try:
            return await asyncio.wait_for(answer, self._patience_s)
        except asyncio.TimeoutError:
            raise PageProblem(f"the page gave no answer within {self._patience_s:.0f} s{self._said()}") from None
        except Error as error:
            raise PageProblem(await self._why(error)) from None

    async def _why(self, error: Error) -> str:
        # What a crash breaks may be heard of before the crash itself.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._crash.wait(), _CRASH_TOLD_S)
        browser = self.context.browser
        if browser is None or not browser.is_connected():
            return "the browser ended while it was measured"
        if self._crash.is_set() or "crashed" in _first_line(error):
            return "the page crashed, as it does when its memory is used up"
        if "has been closed" in _first_line(error):
            return "the page was closed while it was measured"
        return f"the page failed: {_first_line(error)}"

    def _said(self) -> str:
        return f"; it says: {printable(self._errors[0])}" if self._errors else ""

    async def leave(self) -> BrowserContext:
        """Close the page. The visitor, who may come back, is given."""
        if self.page is not None:
            await self._answer(self.page.close())
        return self.context

    async def close(self) -> None:
        """Forget the page and its visitor; a browser that does not manage that is ended."""
        try:
            await asyncio.wait_for(self.context.close(), _CLOSING_S)
        except Exception:
            if self.context.browser is self._chromium.current:
                await self._chromium.close()


def _first_line(error: BaseException) -> str:
    """An error without what Playwright puts before and after it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    head, colon, rest = line.partition(": ")
    ours = colon and head.partition(".")[0] in ("Page", "BrowserType", "Browser", "BrowserContext")
    return printable(rest if ours else line, at_most=_WORDS_AT_MOST)


def _peak(process: int) -> int | None:
    """The largest resident set that a process had, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    except (OSError, ValueError):
        return None
