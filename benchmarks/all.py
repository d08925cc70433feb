"""Every suite, one after the other: size, speed, decode, split, pages, latency.

    python -m benchmarks all

About half an hour on two cores, and 4 GB of memory. A suite that fails is said, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib
import traceback

SUITES = ("size", "calibrated", "speed", "decode", "split", "pages", "latency")


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__).parse_args(arguments)
    failed = []
    for name in SUITES:
        print(f"== {name}\n", flush=True)
        try:
            code = importlib.import_module(f"benchmarks.{name}").main([])
        except (Exception, SystemExit):
            traceback.print_exc()
            code = 1
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0
