"""Makes what is compiled or comes from elsewhere: `python -m tests.web.build` writes into shrink/web

    codec.wasm      codec.c with Zstandard's sources, those in the sdist of the locked zstandard
    rans.wasm       rans.c
    zstd.LICENSE    Zstandard's licence, as its binary form asks for
    eightbit.js     the table of codebook.1

and into shrink/coders, for Python only,

    encoder.wasm    encoder.c and feedback.c

The compiler is zig's clang, the package ziglang. Both come from `tests.setup.codec_tools`, on Linux on x86-64.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shrink.codebooks import EIGHTBIT_TABLE
from tests import setup

WEB = setup.ROOT / "shrink" / "web"

CODERS = setup.ROOT / "shrink" / "coders"

_CLANG = (
    *("cc", "-c", "-target", "wasm32-wasi", "-mcpu=generic+bulk_memory+simd128", "-w", "-I."),
    *("-fno-stack-protector", "-fvisibility=hidden", "-ffunction-sections"),
)
# With the stack first, an overflow traps instead of writing over data.
_LINK = ("wasm-ld", "--no-entry", "--gc-sections", "--strip-all", "--stack-first", "-z", "stack-size=65536")


@dataclass(frozen=True)
class Wasm:
    """A module: the file that is compiled first, what else is of ours in it, and how it is compiled."""

    path: Path
    sources: tuple[Path, ...]
    options: tuple[str, ...]
    zstd: bool = False


CODEC = Wasm(
    WEB / "codec.wasm",
    (WEB / "codec.c",),
    # Every visitor downloads this. What the macros leave out are second versions of inner loops, which are no faster on
    # weights: 20 kB becomes 12 kB (gzip), and a frame decodes at the same speed.
    (
        *("-Os", "-DNDEBUG", "-DZSTD_STRIP_ERROR_STRINGS", "-D_WASI_EMULATED_PROCESS_CLOCKS"),
        *("-DZSTD_FORCE_DECOMPRESS_SEQUENCES_SHORT", "-DHUF_FORCE_DECOMPRESS_X1", "-DZSTD_NO_INLINE"),
    ),
    zstd=True,
)
RANS = Wasm(WEB / "rans.wasm", (WEB / "rans.c", WEB / "rans.h"), ("-Os",))
ENCODER = Wasm(
    CODERS / "encoder.wasm", (CODERS / "encoder.c", CODERS / "feedback.c", WEB / "rans.h"), ("-O3", "-ffp-contract=off")
)
MODULES = (CODEC, RANS, ENCODER)


def eightbit_js() -> str:
    numbers = ",\n  ".join(map(repr, EIGHTBIT_TABLE[:128].tolist()))
    return f"""// Generated from shrink/steps.py by `python -m tests.web.build`.
const MAGNITUDES = [
  {numbers},
];

/** The 256 values of codebook.1's table "eightbit". */
export const EIGHTBIT = Float64Array.from([...MAGNITUDES, ...MAGNITUDES.map((m) => -m)]);
"""


def stamp(module: Wasm) -> bytes:
    """Stands for everything that a module is made from; the file carries it, so that a test sees when it is stale."""
    sources = [source.read_text() for source in module.sources]
    return hashlib.sha256("\n".join([*sources, *setup.codec_locks(), *_compile(module), *_LINK]).encode()).digest()


def _compile(module: Wasm) -> tuple[str, ...]:
    return (*_CLANG, *module.options)


def stamped(wasm: bytes, module: Wasm) -> bytes:
    """With the stamp in a custom section, which nobody runs: id 0, its size, the length of its name, name, content."""
    content = b"\x06shrink" + stamp(module)
    return wasm + bytes([0, len(content)]) + content


def built(module: Wasm) -> bytes:
    """What a module compiles to, with the tools that the set-up has brought."""
    zig = setup.CODEC_TOOLS / "compiler" / "ziglang" / "zig"
    others = (setup.CODEC_TOOLS / "zstd").glob("zstd*.[ch]") if module.zstd else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
        for source in (*module.sources, *others):
            (folder / source.name).write_bytes(source.read_bytes())
        # Relative paths, so that no path of this machine gets into the file.
        compiled, linked = "module.o", module.path.name
        first = module.sources[0].name
        for command in ([*_compile(module), "-o", compiled, first], [*_LINK, "-o", linked, compiled]):
            subprocess.run([zig, *command], check=True, cwd=folder, env=env)
        return stamped((folder / linked).read_bytes(), module)


def main() -> None:
    (WEB / "eightbit.js").write_text(eightbit_js())
    if not setup.codec_tools() or setup.codec_obstacle():
        sys.exit(f"nothing was compiled: {setup.codec_obstacle()}")
    (WEB / "zstd.LICENSE").write_bytes((setup.CODEC_TOOLS / "zstd" / "LICENSE").read_bytes())
    for module in MODULES:
        module.path.write_bytes(built(module))


if __name__ == "__main__":
    main()
