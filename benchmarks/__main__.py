"""`python -m benchmarks NAME [arguments]` runs one suite; without a name it lists them."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(arguments: list[str]) -> int:
    # A suite is a module with a `main`; listing the folder is the registry.
    suites = {
        m.name: importlib.import_module(f"benchmarks.{m.name}")
        for m in pkgutil.iter_modules(benchmarks.__path__)
        if not m.name.startswith("_")
    }
    runnable = {name: module for name, module in suites.items() if hasattr(module, "main")}
    if not arguments or arguments[0] not in runnable:
        print("usage: python -m benchmarks NAME [arguments]\n")
        for name, module in sorted(runnable.items()):
            print(f"  {name:12} {(module.__doc__ or '').splitlines()[0]}")
        return 0 if not arguments else 2
    code: int = runnable[arguments[0]].main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
