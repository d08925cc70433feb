"""The pix2pix U-Net's page whole, in parts and in stages, in Chromium: same output, seconds, peak memory.

    python -m benchmarks pages [--limit-mb 20] [--mode float32] [-o reports/pages.json]

54.4 M seeded weights; each form of the page is opened in a browser of its own, off a server that has no file over the
limit but for the whole one. Outputs are compared bit for bit. Memory is what the page's process had at most (VmHWM, of
which Chromium itself is some 150 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

from benchmarks.measure import machine
from shrink.serve import Server
from tests.browser import chromium

NETWORKS = Path(__file__).parent / "models" / "networks.py"
SHAPE = "1,3,256,256"
FORMS: dict[str, list[str]] = {
    "whole": [],
    "in parts": ["--max-mb"],
    "in stages": ["--cut", "--max-mb"],
    "in stages, sequential": ["--cut", "--sequential", "--max-mb"],
}
_WEIGHTS = """
import sys
import numpy as np
from shrink.networks.legacy import import_chainer
chainer = import_chainer()
from benchmarks.models.networks import UNet
np.random.seed(0)
chainer.serializers.save_npz(sys.argv[1], UNet())
"""
_OPEN = """async () => {
  const manifest = await (await fetch("manifest.json")).json();
  const { open } = await import(`./shrink/runtimes/${manifest.adapter}`);
  const { seededInput } = await import("./page.js");
  const start = performance.now();
  const network = await open(manifest, { base: new URL("./", location) });
  const feeds = {};
  for (const { name, shape } of manifest.inputs) {
    const count = shape.reduce((a, b) => a * b, 1);
    feeds[name] = seededInput(0, 0, count, new Float32Array(count));
  }
  const [output] = Object.values(await network.run(feeds));
  const first = performance.now() - start;
  const again = performance.now();
  await network.run(feeds);
  const figures = { first_ms: first, again_ms: performance.now() - again };
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", output.data));
  return { ...figures, sha256: [...hash].join(",") };
}"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pages", description=__doc__)
    parser.add_argument("--limit-mb", type=float, default=20.0)
    parser.add_argument("--mode", help="float32 where it is left out")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/pages.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "unet.npz"
        subprocess.run([sys.executable, "-c", _WEIGHTS, weights], check=True)
        try:
            rows = [_measured(form, _exported(folder, weights, form, options)) for form in FORMS]
        except pytest.skip.Exception as missing:
            print(f"not measured: {missing}")
            return 0
    same = len({row.pop("sha256") for row in rows}) == 1
    result = {"machine": machine(), "limit_mb": options.limit_mb, "mode": options.mode or "float32", "pages": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**result, "outputs_equal": same}, indent=1) + "\n")
    headers = ["page", "files", "largest MB", "first picture s", "again s", "peak MB"]
    table = [
        [
            row["form"],
            row["files"],
            f"{row['largest_bytes'] / 1e6:.1f}",
            f"{row['first_ms'] / 1e3:.1f}",
            f"{row['again_ms'] / 1e3:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    print(tabulate(table, headers, colalign=["left"] + ["right"] * 5, disable_numparse=True))
    print("\nOutputs: " + ("the same bit for bit" if same else "NOT the same"))
    return 0 if same else 1


def _exported(folder: Path, weights: Path, form: str, options: argparse.Namespace) -> Path:
    site = folder / form
    limit = [f"{options.limit_mb:g}"] if FORMS[form] else []
    mode = ["--mode", options.mode] if options.mode else []
    command = [
        sys.executable,
        "-m",
        "shrink",
        "export",
        f"{NETWORKS}:UNet",
        "--weights",
        str(weights),
        "--input",
        SHAPE,
    ]
    to = ["--to", "onnxruntime-web", *mode, *FORMS[form], *limit, "-o", str(site)]
    subprocess.run([*command, *to], check=True, stdout=subprocess.DEVNULL)
    return site


def _measured(form: str, site: Path) -> dict[str, Any]:
    sizes = [file.stat().st_size for file in site.rglob("*") if file.is_file()]
    server = Server(site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    others = _peaks().keys()
    try:
        with chromium() as browser:
            page = browser.new_page()
            page.goto(server.url + "manifest.json")
            found: dict[str, Any] = page.evaluate(_OPEN)
            peak = max(peak for process, peak in _peaks().items() if process not in others)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    found["sha256"] = hashlib.sha256(found["sha256"].encode()).hexdigest()
    return {"form": form, "files": len(sizes), "largest_bytes": max(sizes), "peak_bytes": peak, **found}


def _peaks() -> dict[str, int]:
    """The most memory, in bytes, that each process which shows a page has had, by its number."""
    peaks = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes():
                match = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
                peaks[process.name] = int(match[1]) * 1024 if match else 0
        except OSError:  # it has ended
            continue
    return peaks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
