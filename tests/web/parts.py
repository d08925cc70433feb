"""Files in parts as `shrink split` makes them, in folders on the loader's server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from shrink.container import read
from tests.faulty_server import Answer, whole
from tests.test_loader import sri
from tests.web import Loader, Result

STEM = "gen.eightbit"
SECOND = f"{STEM}-00002-of-00003.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
WEB_PAGE = b"<!DOCTYPE html><title>Home</title>"


@dataclass(frozen=True)
class Split:
    """A file cut into shards as `shrink split` does it: each has a safetensors header of its own, which is skipped."""

    index: dict[str, Any]
    files: Mapping[str, bytes]

    @property
    def text(self) -> bytes:
        return json.dumps(self.index).encode()

    @property
    def names(self) -> list[str]:
        return list(self.files)

    @property
    def parts(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = self.index["shrink"]["parts"]
        return parts


def split(data: bytes, decoded: int, count: int = 3, stem: str = STEM) -> Split:
    files, parts = {}, []
    bounds = [len(data) * i // count for i in range(count + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds), 1):
        shard = save({"chunk": np.frombuffer(data[start:end], "u1")})
        name = f"{stem}-{number:05}-of-{count:05}.safetensors"
        files[name] = shard
        skip = len(shard) - (end - start)
        parts.append({"file": name, "bytes": len(shard), "skip": skip, "integrity": sri(shard)})
    said = {"version": 1, "file": f"{stem}.safetensors", "bytes": len(data), "decoded_bytes": decoded, "parts": parts}
    return Split({"metadata": {}, "weight_map": {}, "shrink": said}, files)


def raw_parts(data: bytes, limit: int, stem: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    files = {f"{stem}-{at:05}": data[at : at + limit] for at in range(0, len(data), limit)}
    return [{"file": name, "bytes": len(part), "integrity": sri(part)} for name, part in files.items()], files


def decoded_bytes(folder: Path, data: bytes) -> int:
    """As an index states them: float16 is float16 there."""
    path = folder / "whole.safetensors"
    path.write_bytes(data)
    return sum(entry.size * entry.dtype.itemsize for entry in read(path).entries)


@dataclass(frozen=True)
class Deployed:
    """A split file in a folder of its own on the server."""

    loader: Loader
    folder: str

    @property
    def url(self) -> str:
        return f"{self.folder}/{INDEX}"

    def put(self, name: str, *answers: Answer) -> None:
        self.loader.site.put(*answers, name=f"{self.folder}/{name}")

    def asked(self, name: str) -> list[dict[str, str]]:
        return self.loader.site.asked(f"{self.folder}/{name}")

    def all_asked(self) -> list[str]:
        paths = [path for path, _ in self.loader.site.requests if path.startswith(f"{self.folder}/")]
        return [path.removeprefix(f"{self.folder}/") for path in paths]

    def forget(self) -> None:
        self.loader.site.requests.clear()

    def cached(self) -> list[str]:
        return [url for url in self.loader.page.evaluate("cached()") if f"{self.folder}/" in url]


def deploy(loader: Loader, text: bytes, files: Mapping[str, bytes]) -> Deployed:
    loader.site.counter += 1
    deployed = Deployed(loader, f"/folder{loader.site.counter}")
    for name, data in files.items():
        deployed.put(name, whole(data))
    deployed.put(INDEX, whole(text))
    return deployed


def deploy_split(loader: Loader, cut_file: Split) -> Deployed:
    return deploy(loader, cut_file.text, cut_file.files)


def wait_until(loader: Loader, condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        loader.page.wait_for_timeout(20)
    pytest.fail("it did not come to that")


def progress_of(result: Result) -> list[int]:
    """What was told to be loaded: it never falls, and the total never changes."""
    loaded: list[int] = [event["loaded"] for event in result["progress"]]
    assert loaded == sorted(loaded)
    (total,) = {event["total"] for event in result["progress"]}
    assert loaded[-1] == total
    assert max(loaded[:-1]) < total
    return loaded
