"""The shape of the house: imports point down, plugins stand alone, heavy libraries wait until they are needed.

Each rule is a function from sources to faults, so that it is tried on planted violations too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a unit (a module or a folder of shrink/) imports what stands on a lower line, never what
# stands on its own line or above.
LAYERS = (
    ("errors",),
    ("metrics", "wasm"),
    ("codebooks", "entropy"),
    ("steps", "files", "progress", "registry"),
    ("model", "serve", "terminal"),
    ("coders",),
    ("container", "parts"),
    ("manifest",),
    ("formats", "quantizers"),
    ("recipe",),
    ("pipeline",),
    ("inspection", "networks"),
    ("split",),
    ("export",),
    ("site",),
    ("given",),
    ("calibrate",),
    ("bench",),
    ("__init__",),
    ("cli_calibrate", "cli_shared"),
    ("cli_bench", "cli_curve", "cli_export", "cli_quantize", "cli_split"),
    ("cli",),
    ("__main__",),
)
RANKS = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
PLUGIN_FOLDERS = ("formats", "quantizers", "export")

HEAVY = (
    "chainer",
    "flask",
    "h5py",
    "jinja2",
    "onnx",
    "onnxruntime",
    "PIL",
    "playwright",
    "scipy",
    "torch",
    "wasmtime",
    "webdnn",
)
# Modules that may import one of them at the top: nothing loads these before a file asks for them.
HEAVY_ALLOWED = {"h5py": "shrink/formats/_hdf5"}

# Distributions that bring other names than their own, or stand on one; onnx is built on google.protobuf.
IMPORT_NAMES = {
    "chainer": {"chainer", "onnx_chainer"},
    "flask": {"flask", "werkzeug"},
    "jinja2": {"jinja2", "markupsafe"},
    "onnx": {"onnx", "google"},
    "pillow": {"PIL"},
}

LINES_AT_MOST = 500
SOURCE_SUFFIXES = (".py", ".js", ".mjs", ".ts", ".c", ".h", ".html", ".css", ".toml")

Sources = Mapping[str, str]
"""Path from the repository root, with slashes -> text."""


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the file is enough to load it."""

    module: str
    line: int
    at_import: bool


def imports(path: str, text: str, known: frozenset[str]) -> list[Import]:
    """All imports of a file, those inside functions too, with relative ones resolved.

    `known` holds the dotted names of our own modules: `from shrink import files` imports shrink.files, but
    `from shrink.files import inside` imports shrink.files.
    """
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, path)
            if base == "__future__":
                return
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.append(Import(submodule if submodule in known else base, node.lineno, at_import))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            # Loads nothing, yet a type from above is an arrow up all the same.
            for child in ast.iter_child_nodes(node):
                visit(child, at_import and child in node.orelse)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, at_import and not inside)

    visit(ast.parse(text, path), True)
    return found


def absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = PurePosixPath(path).parent.parts
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def dotted(path: str) -> str:
    """`shrink/formats/__init__.py` -> `shrink.formats`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unit(module: str) -> str:
    """The unit of one of our modules: `shrink.formats.webdnn` -> `formats`, `shrink` -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def python(sources: Sources) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in sorted(sources.items()) if path.endswith(".py"))


def ours(sources: Sources) -> frozenset[str]:
    return frozenset(dotted(path) for path, _ in python(sources))


def is_plugin(module: str) -> bool:
    parts = module.split(".")
    return len(parts) > 2 and parts[1] in PLUGIN_FOLDERS and not parts[2].startswith("_")


def arrows_up(sources: Sources) -> list[str]:
    """Imports that do not point down, and units without a place in the layers."""
    faults = []
    for path, text in python(sources):
        importer = dotted(path)
        here = unit(importer)
        if here not in RANKS:
            faults.append(f"{path}: {here} has no place in LAYERS")
            continue
        for found in imports(path, text, ours(sources)):
            if found.module.split(".")[0] != "shrink":
                continue
            there = unit(found.module)
            if there not in RANKS:
                faults.append(f"{path}:{found.line}: imports {found.module}, which has no place in LAYERS")
            elif here != there and RANKS[there] >= RANKS[here]:
                faults.append(f"{path}:{found.line}: imports {found.module}, which does not stand below {here}")
            elif here == there and is_plugin(found.module) and found.module != importer:
                faults.append(f"{path}:{found.line}: imports the plugin {found.module}, its sibling")
    return faults


def heavy_at_import(sources: Sources) -> list[str]:
    """Heavy libraries that are loaded by importing one of our modules."""
    return [
        f"{path}:{found.line}: imports {found.module} at module level"
        for path, text in python(sources)
        for found in imports(path, text, ours(sources))
        if found.at_import
        and (library := found.module.split(".")[0]) in HEAVY
        and not (library in HEAVY_ALLOWED and path.startswith(HEAVY_ALLOWED[library]))
    ]


def forbidden_words(sources: Sources) -> list[str]:
    """`print` outside cli.py, `assert`, and modules that are called after nothing."""
    faults = []
    for path, text in python(sources):
        if {"utils", "util"} & set(dotted(path).split(".")):
            faults.append(f"{path}: a module is named after what it holds")
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, ast.Assert):
                faults.append(f"{path}:{node.lineno}: assert")
            elif isinstance(node, ast.Name) and node.id == "print" and path != "shrink/cli.py":
                faults.append(f"{path}:{node.lineno}: print")
    return faults


def long_files(sources: Sources) -> list[str]:
    return [
        f"{path}: {lines} lines, at most {LINES_AT_MOST}"
        for path, text in sorted(sources.items())
        if (lines := len(text.splitlines())) > LINES_AT_MOST
    ]


def unmatched(formats: set[str], samples: set[str]) -> list[str]:
    """Formats without sample models, and the other way round."""
    return [f"shrink/formats/{name}.py has no tests/samples/{name}.py" for name in sorted(formats - samples)] + [
        f"tests/samples/{name}.py has no shrink/formats/{name}.py" for name in sorted(samples - formats)
    ]


def import_names(requirement: str) -> set[str]:
    name = Requirement(requirement).name.lower()
    return IMPORT_NAMES.get(name, {name.replace("-", "_")})


def dependency_faults(sources: Sources, required: list[str], extras: list[str]) -> list[str]:
    """Required distributions that nothing imports, and imports that nothing declares."""
    used = {
        found.module.split(".")[0]: f"{path}:{found.line}"
        for path, text in python(sources)
        for found in imports(path, text, ours(sources))
    }
    declared = {name for requirement in required + extras for name in import_names(requirement)}
    third_party = set(used) - set(sys.stdlib_module_names) - {"shrink"}
    return [f"pyproject.toml: nothing imports {r}" for r in required if not import_names(r) & set(used)] + [
        f"{used[name]}: {name} is not declared in pyproject.toml" for name in sorted(third_party - declared)
    ]


# The rules, on planted violations


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        ("shrink/errors.py", "from shrink.model import Tensor", "does not stand below errors"),
        ("shrink/errors.py", "import shrink.model", "does not stand below errors"),
        ("shrink/errors.py", "from . import model", "does not stand below errors"),
        ("shrink/model.py", "def f():\n    from shrink import container", "does not stand below model"),
        ("shrink/model.py", "if TYPE_CHECKING:\n    from shrink.container import x", "does not stand below model"),
        ("shrink/model.py", "from shrink import __version__", "imports shrink, which does not stand below"),
        ("shrink/steps.py", "import shrink.files", "does not stand below steps"),
        ("shrink/formats/a.py", "from shrink.quantizers.c import x", "does not stand below formats"),
        ("shrink/formats/a.py", "from shrink.formats.b import x", "imports the plugin shrink.formats.b"),
        ("shrink/formats/a.py", "from .b import x", "imports the plugin shrink.formats.b"),
        ("shrink/formats/a.py", "from . import b", "imports the plugin shrink.formats.b"),
        ("shrink/formats/_x.py", "from shrink.formats import b", "imports the plugin shrink.formats.b"),
        ("shrink/formats/__init__.py", "from shrink.formats import b", "imports the plugin shrink.formats.b"),
        ("shrink/split/a.py", "from ..export import x", "does not stand below split"),
        ("shrink/__init__.py", "import shrink.cli", "does not stand below __init__"),
        ("shrink/model.py", "import shrink.extra", "shrink.extra, which has no place in LAYERS"),
        ("shrink/extra.py", "", "extra has no place in LAYERS"),
    ],
)
def test_an_arrow_up_is_found(path: str, line: str, fault: str) -> None:
    house = dict.fromkeys(
        ("shrink/model.py", "shrink/container.py", "shrink/formats/b.py", "shrink/export/__init__.py"), ""
    )
    (found,) = arrows_up({**house, path: line})
    assert found.startswith(path)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("shrink/model.py", "from __future__ import annotations\nimport json\nfrom shrink.errors import x"),
        ("shrink/formats/a.py", "from shrink.formats._x import y\nfrom . import _x\nfrom shrink.formats import Format"),
        ("shrink/coders/a.py", "from shrink.coders.b import y"),
        ("shrink/cli.py", "import shrink\nfrom shrink import model"),
        ("shrink/__main__.py", "from .errors import x"),
    ],
)
def test_an_arrow_down_is_fine(path: str, line: str) -> None:
    house = dict.fromkeys(("shrink/__init__.py", "shrink/model.py", "shrink/formats/_x.py", "shrink/coders/b.py"), "")
    assert arrows_up({**house, path: line}) == []


@pytest.mark.parametrize(
    "line",
    [
        "import onnx",
        "import onnx.numpy_helper as h",
        "from scipy import cluster",
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "class A:\n    import h5py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import onnx",
    ],
)
def test_a_heavy_library_at_module_level_is_found(line: str) -> None:
    (found,) = heavy_at_import({"shrink/model.py": line})
    assert "at module level" in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("shrink/model.py", "def f():\n    import onnx"),
        ("shrink/model.py", "class A:\n    async def f(self):\n        import onnx"),
        ("shrink/model.py", "if TYPE_CHECKING:\n    import onnx"),
        ("shrink/model.py", "import onnxish"),
        ("shrink/formats/_hdf5.py", "import h5py"),
    ],
)
def test_a_heavy_library_elsewhere_is_fine(path: str, line: str) -> None:
    assert heavy_at_import({path: line}) == []


def test_forbidden_words_are_found() -> None:
    assert forbidden_words({"shrink/a.py": "x = 1\nprint(x)"}) == ["shrink/a.py:2: print"]
    assert forbidden_words({"shrink/a.py": "say = print"}) == ["shrink/a.py:1: print"]
    assert forbidden_words({"shrink/a.py": "def f(x):\n    assert x"}) == ["shrink/a.py:2: assert"]
    assert len(forbidden_words({"shrink/utils.py": "", "shrink/utils/__init__.py": "", "shrink/a.py": ""})) == 2
    assert forbidden_words({"shrink/cli.py": "print(1)", "shrink/a.py": "x.print()  # assert print"}) == []


def test_long_files_are_found() -> None:
    assert long_files({"shrink/a.c": "\n" * 500, "shrink/b.js": "\n" * 501}) == ["shrink/b.js: 501 lines, at most 500"]


def test_unmatched_samples_are_found() -> None:
    assert unmatched({"a"}, {"a"}) == []
    assert unmatched({"a", "b"}, {"a", "c"}) == [
        "shrink/formats/b.py has no tests/samples/b.py",
        "tests/samples/c.py has no shrink/formats/c.py",
    ]


def test_dependency_faults_are_found() -> None:
    source = {"shrink/a.py": "import json\nfrom numpy import array\ndef f():\n    import onnx_chainer, onnx.helper"}
    assert dependency_faults(source, ["numpy>=1.26"], ["onnx>=1.16", "chainer==7.8.1"]) == []
    assert dependency_faults(source, ["numpy>=1.26", "tabulate>=0.9"], ["onnx", "chainer"]) == [
        "pyproject.toml: nothing imports tabulate>=0.9"
    ]
    (fault,) = dependency_faults(source, ["numpy"], ["chainer"])
    assert fault == "shrink/a.py:4: onnx is not declared in pyproject.toml"


# The rules, on the house


@pytest.fixture(scope="module")
def sources() -> Sources:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "shrink").rglob("*"))
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    }


def public_modules(folder: Path) -> set[str]:
    return {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}


def test_imports_point_down(sources: Sources) -> None:
    assert "shrink/model.py" in sources
    assert arrows_up(sources) == []


def test_heavy_libraries_wait(sources: Sources) -> None:
    assert heavy_at_import(sources) == []


def test_no_forbidden_words(sources: Sources) -> None:
    assert forbidden_words(sources) == []


def test_no_long_files(sources: Sources) -> None:
    assert long_files(sources) == []


def test_every_format_has_samples() -> None:
    formats = public_modules(ROOT / "shrink" / "formats")
    assert "chainer_npz" in formats
    assert unmatched(formats, public_modules(ROOT / "tests" / "samples")) == []


def test_dependencies_are_used_and_declared(sources: Sources) -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for requirements in project["optional-dependencies"].values() for r in requirements]
    assert dependency_faults(sources, project["dependencies"], extras) == []


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, shrink.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"shrink", "numpy"} <= loaded
    assert loaded.isdisjoint(HEAVY)
