"""`python -m benchmarks NAME [arguments]` runs one suite; without a name it lists them."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent


def suites() -> dict[str, str]:
    """Name and first line of every module with a `main`: listing the folder is the registry.

    Read, not imported: quickstart must run where nothing is installed yet.
    """
    found = {}
    for path in sorted(_FOLDER.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    known = suites()
    if not arguments or arguments[0] not in known:
        print("usage: python -m benchmarks NAME [arguments]\n")
        for name, line in known.items():
            print(f"  {name:12} {line}")
        return 0 if not arguments else 2
    code: int = importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
