"""`python3 -m tests`: sets everything up, checks style and types, runs all tests.

Arguments go on to pytest, as in `python3 -m tests -k container`. The exit code is pytest's; where that is 0 and
a check failed, it is 1; a run that is stopped gives 130 or 143. Everything installed goes into this folder,
Debian packages excepted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import setup

CHECKED = ("shrink", "tests", "benchmarks")


def static_checks(python: Path, folders: list[str]) -> dict[str, list[str]]:
    """The checks that run before the tests, by the name shown when one fails."""
    tool = [str(python), "-m"]
    return {
        "ruff check": [*tool, "ruff", "check", "--quiet", "--output-format=concise", "."],
        "ruff format": [*tool, "ruff", "format", "--check", "--quiet", "--output-format=concise", "."],
        "mypy": [*tool, "mypy", "--strict", "--no-error-summary", *folders],
    }


def exit_code(pytest_code: int, failed: list[str]) -> int:
    return pytest_code or (1 if failed else 0)


def run(command: list[str], env: dict[str, str]) -> int:
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reaches the child too; it says what it has to say and ends by itself.
            process.wait()
            raise
        except SystemExit:
            # A SIGTERM reaches only us.
            process.terminate()
            raise


def main(arguments: list[str]) -> int:
    os.chdir(setup.ROOT)
    try:
        ready = setup.prepare()
    except setup.SetupFailed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    env = {**os.environ, **ready.env}
    failed = list(ready.failed)
    for name, command in static_checks(ready.python, [f for f in CHECKED if Path(f).is_dir()]).items():
        code = run(command, env)
        print(f"{name}: {'ok' if code == 0 else 'FAILED'}", flush=True)
        if code != 0:
            failed.append(name)
    if failed:
        env["SHRINK_FAILED_CHECKS"] = ", ".join(failed)
    code = run([str(ready.python), "-m", "pytest", *arguments], env)
    # A signal's number is negative; the shell spells it 128 + n.
    return exit_code(code if code >= 0 else 128 - code, failed)


if __name__ == "__main__":
    if sys.version_info < setup.OLDEST:
        sys.exit(f"shrink needs Python {setup.dotted(setup.OLDEST)} or newer; this is {sys.version.split()[0]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
