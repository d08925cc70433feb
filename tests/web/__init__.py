"""The loader in a real browser: a page, what tests ask of it, and the server that it loads from."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shrink.container import read, write
from shrink.model import Entry, dtype_code
from tests.browser import chromium
from tests.faulty_server import Site, faulty_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
PAGE = "/tests/page.html"
WEB = HERE.parents[1] / "shrink" / "web"
# What a typed array is called, where it is not after NumPy's dtype.
ARRAYS = {"bool": "Uint8Array", "int64": "BigInt64Array", "uint64": "BigUint64Array"}

Result = dict[str, Any]


@dataclass(frozen=True)
class Loader:
    site: Site
    page: Page

    def load(self, path: str, **options: Any) -> Result:
        result: Result = self.page.evaluate("([url, options]) => attempt(url, options)", [path, options])
        assert "bug" not in result, result["bug"]
        return result

    def fails(self, path: str, **options: Any) -> str:
        """The code of the error that loading must end with."""
        result = self.load(path, **options)
        assert "error" in result, f"{path}: it loaded"
        code: str = result["error"]["code"]
        return code

    def fresh_page(self, script: str = "", path: str = PAGE) -> Loader:
        """Another page of the same site and browser, after a script has changed what that page has."""
        browser = self.page.context.browser
        assert browser
        page = browser.new_page()
        if script:
            page.add_init_script(script)
        open_page(page, self.site, path)
        return Loader(self.site, page)


@contextlib.contextmanager
def loader_in_chromium() -> Iterator[Loader]:
    with faulty_server({"/web/": WEB, "/tests/": HERE}) as site, chromium() as browser:
        page = browser.new_page()
        open_page(page, site)
        yield Loader(site, page)


def open_page(page: Page, site: Site, path: str = PAGE) -> None:
    page.goto(site.url + path)
    page.wait_for_selector("html[data-ready]", state="attached")


def container(folder: Path, entries: Iterable[Entry], level: int | None = None, graph: bytes | None = None) -> bytes:
    path = folder / "container.safetensors"
    write(entries, path, source="test", attributes={"note": "ノート"} if graph else {}, graph=graph, level=level)
    return path.read_bytes()


def in_python(folder: Path, data: bytes) -> list[Result]:
    """What the loader must give for a file, by the reference decoder."""
    path = folder / "reference.safetensors"
    path.write_bytes(data)
    expected = []
    for entry in read(path).entries:
        values = entry.array
        # Not every browser has arrays of float16.
        values = values.astype("f4") if values.dtype == np.float16 else values
        expected.append(facts(entry.name, values))
    return expected


def facts(name: str, values: np.ndarray[Any, Any]) -> Result:
    dtype = values.dtype
    return {
        "name": name,
        "array": ARRAYS.get(dtype.name, f"{dtype.name.capitalize()}Array"),
        "shape": list(values.shape),
        "dtype": dtype_code(dtype),
        "bytes": values.nbytes,
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "whole": True,
    }
