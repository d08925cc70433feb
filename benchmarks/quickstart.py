"""From a trained snapshot to a picture in a real browser, in one command on a fresh clone.

    python3 -m benchmarks quickstart [-o FOLDER]

Sets up `.venv` where it is missing, quantizes the sample network (a generator of digits) to eightbit, exports it and
the original for the web, opens a page with both in headless Chromium, and leaves the page and a screenshot of it in
FOLDER (quickstart/ unless said otherwise).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "benchmarks" / "models"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks quickstart", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("quickstart"))
    options = parser.parse_args(arguments)
    python = ROOT / ".venv" / "bin" / "python"
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        from tests import setup

        try:
            python = setup.prepare().python
        except setup.SetupFailed as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
        return subprocess.call([str(python), "-m", "benchmarks", "quickstart", *arguments])
    return _run(options.output)


def _run(folder: Path) -> int:
    # Only now is there anything to import.
    from shrink.serve import Server

    snapshot, small, site = folder / "gen.npz", folder / "gen.eightbit.safetensors", folder / "site"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODELS / "sliders", site)
    shutil.copy(MODELS / "cdcgan.npz", snapshot)
    network = f"{MODELS / 'networks.py'}:Generator"
    to_the_web = ["--input", "1,110", "--to", "onnxruntime-web", "-o"]
    for command in (
        ["quantize", snapshot, "--mode", "eightbit", "-o", small],
        ["export", network, "--weights", small, *to_the_web, site / "eightbit"],
        ["export", network, "--weights", snapshot, *to_the_web, site / "float32"],
    ):
        words = list(map(str, command))
        print("\n$ shrink", *(os.path.relpath(w) if os.path.isabs(w) else w for w in words), flush=True)
        code = subprocess.call([sys.executable, "-m", "shrink", *words])
        if code:
            return code
    browser = shutil.which("chromium")
    if browser is None:
        print(f"\nChromium is not installed, so the page was not opened. To see it: shrink serve {site}")
        return 0
    server = Server(site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        print(f"\nOpening {server.url} in Chromium …", flush=True)
        for line in _visited(server.url, browser, folder / "page.png"):
            print(f"  {line}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    print(f"\nPicture: {folder / 'page.png'}    To see the page yourself: shrink serve {site}")
    return 0


def _visited(url: str, browser: str, picture: Path) -> list[str]:
    """Open the page, wait until the network has run, keep a screenshot; what the page says of itself, line by line."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        try:
            page = chromium.new_page(viewport={"width": 900, "height": 700})
            page.goto(url)
            # The page shows its pictures when both are drawn; its error line is the other way to end.
            page.locator("#result:not([hidden]), #error:not([hidden])").first.wait_for()
            page.screenshot(path=picture, full_page=True)
            if page.is_visible("#error"):
                raise RuntimeError(page.inner_text("#error"))
            return page.locator("h1, #status, figcaption, #difference").all_inner_texts()
        finally:
            chromium.close()
