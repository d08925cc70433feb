"""Makes what the loader has from elsewhere: `python -m tests.web.build` writes into shrink/web

    codec.wasm      codec.c with Zstandard's sources, which come from the sdist of the locked zstandard
    zstd.LICENSE    Zstandard's licence, as its binary form asks for
    eightbit.js     the table of codebook.1

The compiler is zig's clang, the package ziglang. The network is used by pip only, which checks hashes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from shrink.steps import EIGHTBIT_TABLE
from tests import setup

WEB = setup.ROOT / "shrink" / "web"

# The wheel for Linux on x86-64; other machines' compilers give the same code, but their hashes are not listed here.
_COMPILER = "ziglang==0.13.0 --hash=sha256:3ce0c9f16547e5d61b32e0d226926e9a2552ef4b91fccf7ab5ea1a623a77824b\n"
# Every visitor downloads this. What the macros leave out are second versions of inner loops, which are no faster on
# weights: 20 kB becomes 12 kB (gzip), and a frame decodes at the same speed.
_COMPILE = (
    *("cc", "-c", "-target", "wasm32-wasi", "-mcpu=generic+bulk_memory", "-Os", "-w"),
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
    made_from = [source, _COMPILER, *_COMPILE, *_LINK, setup.locked("zstandard", setup.LOCK.read_text())]
    return hashlib.sha256("\n".join(made_from).encode()).digest()


def stamped(wasm: bytes) -> bytes:
    """With the stamp in a custom section, which nobody runs: id 0, its size, the length of its name, name, content."""
    content = b"\x06shrink" + stamp()
    return wasm + bytes([0, len(content)]) + content


def fetch(folder: Path, requirement: str, *options: str) -> None:
    (folder / "locked.txt").write_text(requirement)
    pip = [sys.executable, "-m", "pip", *options, "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "-r", folder / "locked.txt"], check=True)


def zstd_sources(folder: Path) -> None:
    """Zstandard's sources, taken out of the locked sdist into the folder."""
    zstandard = setup.locked("zstandard", setup.LOCK.read_text())
    fetch(folder, zstandard, "download", "--no-binary", "zstandard", "--dest", str(folder))
    (sdist,) = folder.glob("zstandard-*.tar.gz")
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            # zstandard-<version>/zstd/<file>: only plain files of that one folder, by their last name.
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and Path(member.name).parts[1:-1] == ("zstd",):
                (folder / Path(member.name).name).write_bytes(content.read())


def codec_wasm(folder: Path) -> bytes:
    fetch(folder, _COMPILER, "install", "--target", str(folder / "compiler"))
    zig = folder / "compiler" / "ziglang" / "zig"
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder / "cache"), "ZIG_LOCAL_CACHE_DIR": str(folder / "cache")}
    (folder / "codec.c").write_bytes((WEB / "codec.c").read_bytes())
    # Relative paths, so that no path of this machine gets into the file.
    for command in ([*_COMPILE, "-I.", "-o", "codec.o", "codec.c"], [*_LINK, "-o", "codec.wasm", "codec.o"]):
        subprocess.run([zig, *command], check=True, cwd=folder, env=env)
    return stamped((folder / "codec.wasm").read_bytes())


def main() -> None:
    (WEB / "eightbit.js").write_text(eightbit_js())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zstd_sources(folder)
        (WEB / "zstd.LICENSE").write_bytes((folder / "LICENSE").read_bytes())
        (WEB / "codec.wasm").write_bytes(codec_wasm(folder))


if __name__ == "__main__":
    main()
