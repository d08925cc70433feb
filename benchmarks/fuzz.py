"""Mutated payloads of rans.1 and noise as trellis.1 into the compiled decoder, between marked bytes and with fuel.

    python -m benchmarks fuzz [--mutations 100000] [--seed 0]

Each must be refused or decode to its declared size; nothing may be written beside its place, read outside the memory or
run without end. One payload in 500, and all noise, is also given to the reference decoder, which must say the same.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from shrink.entropy import Damaged, Layout, reference
from shrink.errors import BadInput
from shrink.steps import Step, decode_bytes
from tests.rans_streams import Guarded, mutated, samples

_COMPARED = 500
_PAYLOADS_PER_TRELLIS = 10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    decoded, compared = _fuzz(options.mutations, options.seed)
    trellises = options.mutations // _PAYLOADS_PER_TRELLIS
    refused = _fuzz_trellis(trellises, options.seed)
    print(f"{options.mutations:,} mutations in {time.perf_counter() - start:.0f} s, seed {options.seed}: no harm")
    print(f"{decoded:,} decoded to something, the others were refused; {compared:,} compared with the reference")
    print(f"{trellises:,} trellises, {refused:,} of them refused: all as the reference")
    return 0


def _fuzz(mutations: int, seed: int) -> tuple[int, int]:
    """How many decoded, and how many were compared. Raises AssertionError or wasmtime.Trap for harm."""
    rng = np.random.default_rng(seed)
    known = list(samples())
    decoder = Guarded()
    decoded = compared = 0
    for number in range(mutations):
        payload, layout = known[int(rng.integers(len(known)))]
        harmed = mutated(rng, payload)
        said = decoder.decode(harmed, layout)
        decoded += isinstance(said, bytes)
        if number % _COMPARED == 0:
            compared += 1
            expected = _reference(harmed, layout)
            if said != expected:
                raise AssertionError(f"mutation {number}: the two decoders differ: {harmed.hex()}")
    return decoded, compared


def _fuzz_trellis(trellises: int, seed: int) -> int:
    """How many were refused. Raises AssertionError or wasmtime.Trap for harm."""
    rng = np.random.default_rng(seed)
    decoder = Guarded()
    refused = 0
    for number in range(trellises):
        rows, columns, width = (int(n) for n in rng.integers((0, 0, 1), (12, 70, 3)))
        # Of two bytes, a few codes are too large now and then.
        most = 128 if width == 1 else int(rng.choice([4, 16384, 16390]))
        codes = rng.integers(-most, most, rows * columns).astype(f"<i{width}").tobytes()
        params = {"rows": rows, "columns": columns, "head": 0, "width": width}
        expected: bytes | str
        try:
            expected = decode_bytes(codes, [Step("trellis.1", params)], 1 << 20, "").tobytes()
        except BadInput:
            expected = "a code is too large"
            refused += 1
        if decoder.trellis(codes, width, rows, columns) != expected:
            raise AssertionError(f"trellis {number}: the two decoders differ: {params}, {codes.hex()}")
    return refused


def _reference(payload: bytes, layout: Layout) -> bytes | str:
    try:
        return reference(np.frombuffer(payload, np.uint8), layout).tobytes()
    except Damaged as damage:
        return str(damage)
