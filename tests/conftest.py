"""What every test stands on: fixed seeds, no network, and the fixtures for what a machine may lack."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("fast", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("slow", derandomize=True, deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


class NetworkRefused(RuntimeError):
    """A test reached for another machine. No OSError, so that code which expects a bad network cannot hide it."""


def is_this_machine(family: int, address: Any) -> bool:
    """Whether a socket address leads to this machine: a Unix socket, 127.0.0.0/8, ::1 or localhost."""
    if family == socket.AF_UNIX:
        return True
    if not isinstance(address, tuple) or not isinstance(address[0], str):
        return False
    if address[0] == "localhost":
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    def guard(method: str) -> Any:
        original = getattr(socket.socket, method)

        def guarded(self: socket.socket, *arguments: Any) -> Any:
            # The address comes last in each of the guarded methods.
            if not is_this_machine(self.family, arguments[-1]):
                raise NetworkRefused(f"tests stay on this machine: {method} to {arguments[-1]!r}")
            return original(self, *arguments)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        for method in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, method, guard(method))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT, and every command they start too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real trained models beside the repository."""
    folder = ROOT.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("../shared/models is not here")
    return folder


@pytest.fixture(scope="session")
def other_python() -> Path:
    """A Python of another version that has shrink and what it requires, and nothing else."""
    path = os.environ.get("SHRINK_OTHER_PYTHON", "")
    if not path:
        pytest.skip("no second Python version is here (SHRINK_OTHER_PYTHON is not set)")
    return Path(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say a failed check again down here, where a reader looks first, as it makes the whole run fail."""
    failed = os.environ.get("SHRINK_FAILED_CHECKS")
    if failed:
        terminalreporter.section("failed before the tests")
        terminalreporter.line(f"{failed} (shown at the top; the run fails)", red=True)
