"""Targets: folders with what a browser needs to run a network. Every public module of this folder is one;
listing the folder is the registry.

A target is a module with:

    NAME        what users call it, as in `--to webdnn`
    HOLDS       what a weight that the visitor downloads may be: any of "float32", "float16", "eightbit", "int8", "int4"
    export(network, folder, recipe, progress) -> Exported
                fills `folder`, which exists and is empty; the caller puts it in place when all went well.
                `recipe` quantizes what the visitor downloads; None leaves every weight as the network has it.
                It may take more keyword arguments: options of the command, by their names

`export` raises MissingDependency or UsageError where a tool is not installed, UsageError where the target cannot do
what is asked, BadInput where the network is at fault. It copies no page: it says in `Exported.page` what a page needs
to know, and the page beside the network is the same for all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from shrink.model import Model
from shrink.pipeline import Change
from shrink.progress import Progress
from shrink.recipe import Recipe
from shrink.registry import modules, named

__all__ = ["Exported", "Network", "Target", "all_targets", "by_name"]


@dataclass(frozen=True)
class Network:
    """A network with its weights.

    `model` has the ONNX graph; a weight that was given encoded stays encoded in it. `input_shapes` are those of the
    graph's inputs, in order. `chain` is the Chainer object, with decoded weights; None where it was an ONNX file.
    """

    title: str
    model: Model
    input_shapes: tuple[tuple[int, ...], ...]
    chain: Any = None


@dataclass(frozen=True)
class Exported:
    """What was written. `page` is JSON for the page: names and shapes of inputs and outputs, files, backends.

    `changes` say what quantizing did to each weight; `notes` are lines for the user.
    """

    page: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()


class Target(Protocol):
    NAME: str
    HOLDS: frozenset[str]

    def export(self, network: Network, folder: Path, recipe: Recipe | None, progress: Progress) -> Exported: ...


@cache
def all_targets() -> tuple[Target, ...]:
    return modules(__name__, __path__)


def by_name(name: str) -> Target:
    return named(all_targets(), name, "target")
