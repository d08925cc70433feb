"""The pix2pix U-Net's page whole, in parts and in stages, in Chromium: same output, seconds, peak memory.

    python -m benchmarks pages [--limit-mb 20] [--mode float32] [-o reports/pages.json]

54.4 M seeded weights; each form of the page is opened in a browser of its own, off a server that has no file over the
limit but for the whole one. Outputs are compared bit for bit. Memory is what the page's process had at most (VmHWM, of
which Chromium itself is some 150 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import Table, published
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
        rows = [_row(folder, weights, form, options) for form in FORMS]
    hashes = {row.pop("sha256") for row in rows if "sha256" in row}
    same = len(hashes) == 1 if hashes else None
    result = {"limit_mb": options.limit_mb, "mode": options.mode or "float32", "pages": rows, "outputs_equal": same}
    published(result, __doc__ or "", tables(result), options.output)
    return 1 if same is False else 0


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The table of a result; a page that was not measured says why."""
    rows = [
        [row["form"], row["not_measured"]]
        if "not_measured" in row
        else [
            row["form"],
            f"{row['files']}",
            f"{row['largest_bytes'] / 1e6:.1f}",
            f"{row['first_ms'] / 1e3:.1f}",
            f"{row['again_ms'] / 1e3:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in result["pages"]
    ]
    same = {True: ["Outputs: the same bit for bit."], False: ["Outputs: NOT the same."], None: []}
    headers = ["", "files", "largest MB", "first picture s", "again s", "peak MB"]
    title = f"{result['mode']}, at most {result['limit_mb']:g} MB a file"
    return [Table(title, headers, rows, same[result["outputs_equal"]])]


def _row(folder: Path, weights: Path, form: str, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return _measured(form, _exported(folder, weights, form, options))
    except pytest.skip.Exception as missing:
        return {"form": form, "not_measured": f"not measured: {missing}"}


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
