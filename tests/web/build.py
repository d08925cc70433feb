"""Makes what the loader has from elsewhere: `python -m tests.web.build` writes into shrink/web

    codec.wasm      codec.c with Zstandard's sources, those in the sdist of the locked zstandard
    zstd.LICENSE    Zstandard's licence, as its binary form asks for
    eightbit.js     the table of codebook.1

The compiler is zig's clang, the package ziglang. Both come from `tests.setup.codec_tools`, on Linux on x86-64.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shrink.steps import EIGHTBIT_TABLE
from tests import setup

WEB = setup.ROOT / "shrink" / "web"

# Every visitor downloads this. What the macros leave out are second versions of inner loops, which are no faster on
# weights: 20 kB becomes 12 kB (gzip), and a frame decodes at the same speed.
_COMPILE = (
    *("cc", "-c", "-target", "wasm32-wasi", "-mcpu=generic+bulk_memory+simd128", "-Os", "-w"),
    *("-fno-stack-protector", "-fvisibility=hidden", "-ffunction-sections"),
    *("-DNDEBUG", "-DZSTD_STRIP_ERROR_STRINGS", "-D_WASI_EMULATED_PROCESS_CLOCKS"),
    *("-DZSTD_FORCE_DECOMPRESS_SEQUENCES_SHORT", "-DHUF_FORCE_DECOMPRESS_X1", "-DZSTD_NO_INLINE"),
)
# With the stack first, an overflow traps instead of writing over data.
_LINK = ("wasm-ld", "--no-entry", "--gc-sections", "--strip-all", "--stack-first", "-z", "stack-size=65536")


def eightbit_js() -> str:
    numbers = ",\n  ".join(map(repr, EIGHTBIT_TABLE[:128].tolist()))
    return f"""// Generated from shrink/steps.py by `python -m tests.web.build`.
const MAGNITUDES = [
  {numbers},
];

/** The 256 values of codebook.1's table "eightbit". */
export const EIGHTBIT = Float64Array.from([...MAGNITUDES, ...MAGNITUDES.map((m) => -m)]);
"""


def stamp() -> bytes:
    """Stands for everything that codec.wasm is made from; the file carries it, so that a test sees when it is stale."""
    source = (WEB / "codec.c").read_text()
    return hashlib.sha256("\n".join([source, *setup.codec_locks(), *_COMPILE, *_LINK]).encode()).digest()


def stamped(wasm: bytes) -> bytes:
    """With the stamp in a custom section, which nobody runs: id 0, its size, the length of its name, name, content."""
    content = b"\x06shrink" + stamp()
    return wasm + bytes([0, len(content)]) + content


def codec_wasm() -> bytes:
    """What codec.c compiles to, with the tools that the set-up has brought."""
    zig = setup.CODEC_TOOLS / "compiler" / "ziglang" / "zig"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
        for source in (WEB / "codec.c", *(setup.CODEC_TOOLS / "zstd").glob("zstd*.[ch]")):
            (folder / source.name).write_bytes(source.read_bytes())
        # Relative paths, so that no path of this machine gets into the file.
        for command in ([*_COMPILE, "-I.", "-o", "codec.o", "codec.c"], [*_LINK, "-o", "codec.wasm", "codec.o"]):
            subprocess.run([zig, *command], check=True, cwd=folder, env=env)
        return stamped((folder / "codec.wasm").read_bytes())


def main() -> None:
    (WEB / "eightbit.js").write_text(eightbit_js())
    if not setup.codec_tools() or setup.codec_obstacle():
        sys.exit(f"codec.wasm was not made: {setup.codec_obstacle()}")
    (WEB / "zstd.LICENSE").write_bytes((setup.CODEC_TOOLS / "zstd" / "LICENSE").read_bytes())
    (WEB / "codec.wasm").write_bytes(codec_wasm())


if __name__ == "__main__":
    main()
