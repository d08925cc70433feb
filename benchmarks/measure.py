"""Timing that can be trusted: interleaved rounds, medians, and ratios taken pair by pair."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other`: the median of the rounds' own ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Each piece of work once per round, A B C A B C, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(rounds + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


@dataclass(frozen=True)
class Run:
    """A whole process: wall seconds and the largest resident memory."""

    seconds: float
    peak_bytes: int


def process(arguments: Sequence[str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if child.returncode:
            raise RuntimeError(said.read().decode(errors="replace").strip().rsplit("\n", 1)[-1])
    return Run(seconds, usage.ru_maxrss * 1024)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import numpy as np

    from shrink.bench.machine import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }
