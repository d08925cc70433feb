"""Which quantizers for which tensor: from modes, globs and a TOML file to one decision per tensor.

A recipe file says the same as the flags, per tensor:

    mode = "eightbit"                 # for tensors that no rule names

    [[rule]]
    tensors = "conv1/*"               # a glob; * matches / too
    mode = "keep"

    [[rule]]
    tensors = ["fc6/W", "fc7/W"]
    mode = "prune,int8"
    sparsity = 0.8
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shrink.errors import BadInput, UsageError, printable
from shrink.files import read_all
from shrink.model import Entry
from shrink.quantizers import Kept, Quantizer, by_mode, parameters_of

__all__ = ["Decision", "Recipe", "Rule", "from_flags", "read", "wants"]

Decision = tuple[Quantizer, ...] | Kept
"""What happens to a tensor: quantizers, one after another, or the reason why it stays."""

KEEP = "keep"
_RECIPE_AT_MOST = 1_000_000


@dataclass(frozen=True)
class Rule:
    """Tensors whose name fits one of the globs get these quantizers, one after another; none of them: kept."""

    globs: tuple[str, ...]
    quantizers: tuple[Quantizer, ...]
    said_by: str

    def fits(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.globs)


@dataclass(frozen=True)
class Recipe:
    """Rules for named tensors, and the quantizers for the other weights, by shape; None where those are kept."""

    rules: tuple[Rule, ...]
    default: tuple[Quantizer, ...] | None

    @property
    def stores(self) -> frozenset[str]:
        """What the results may be: "float32", "float16", "eightbit", "int8", "int4"."""
        chains = [rule.quantizers for rule in self.rules] + ([self.default] if self.default else [])
        return frozenset(chain[-1].stores for chain in chains if chain)


def from_flags(
    mode: str | None,
    include: Iterable[str],
    exclude: Iterable[str],
    recipe: Recipe | None,
    parameters: Mapping[str, Any],
) -> Recipe:
    """A recipe from --mode, --include, --exclude and a recipe file.

    Raises:
        UsageError: nothing to do, an unknown mode, or a parameter that no mode takes.
    """
    include, exclude = _globs(include), _globs(exclude)
    if parameters and mode is None:
        raise UsageError(f"{sorted(parameters)[0]} belongs to a mode", hint="add --mode, or say it in the recipe")
    chain = _chain(mode, parameters) if mode is not None else (recipe.default if recipe else None)
    if chain is None and not (recipe and recipe.rules):
        raise UsageError("nothing says how to quantize", hint="give --mode or --recipe")
    rules = list(recipe.rules) if recipe else []
    rules += [Rule((glob,), (), f"--exclude {glob}") for glob in exclude]
    if include:
        if chain is None:
            raise UsageError("--include says which tensors, but not how", hint="add --mode")
        rules += [Rule((glob,), chain, f"--include {glob}") for glob in include]
    return Recipe(tuple(rules), None if include else chain)


def _globs(globs: Iterable[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def read(path: Path) -> Recipe:
    """A recipe file.

    Raises:
        BadInput: not TOML, or something in it that a recipe does not have.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover
        import tomli as tomllib
    try:
        data = tomllib.loads(read_all(path, at_most=_RECIPE_AT_MOST).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"not valid TOML: {error}", file=path) from None
    try:
        default = data.pop("mode", None)
        tables = data.pop("rule", [])
        if data and default is None:
            raise UsageError(f"unknown key {sorted(data)[0]!r}", hint="a recipe has mode and [[rule]]")
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise UsageError("rule is not a list of tables", hint="write [[rule]]")
        rules = tuple(_rule(number, dict(table)) for number, table in enumerate(tables, 1))
        return Recipe(rules, None if default is None else _chain(default, data))
    except UsageError as error:
        raise BadInput(error.message, file=path, hint=error.hint) from None


def _rule(number: int, table: dict[str, Any]) -> Rule:
    globs = table.pop("tensors", None)
    mode = table.pop("mode", None)
    globs = [globs] if isinstance(globs, str) else globs
    if not isinstance(globs, list) or not globs or not all(isinstance(g, str) for g in globs):
        raise UsageError(f"rule {number} has no tensors", hint='tensors = "conv*/W"')
    if mode is None:
        raise UsageError(f"rule {number} has no mode", hint='mode = "eightbit"')
    return Rule(tuple(globs), _chain(mode, table), f"rule {number} ({', '.join(globs)})")


def _chain(mode: Any, parameters: Mapping[str, Any]) -> tuple[Quantizer, ...]:
    """The quantizers of a mode such as `prune,eightbit`; each parameter goes to the modes that know it."""
    if not isinstance(mode, str):
        raise UsageError(f"mode is text, not {mode!r}")
    if mode == KEEP:
        return ()
    names = [name.strip() for name in mode.split(",")]
    plain = [by_mode(name) for name in names]
    known = [parameters_of(q) for q in plain]
    for key in parameters:
        if not any(key in fields for fields in known):
            raise UsageError(f"mode {mode!r} has no parameter {key!r}")
    return tuple(
        by_mode(name, **{k: v for k, v in parameters.items() if k in fields})
        for name, fields in zip(names, known, strict=True)
    )


def wants(recipe: Recipe, tensors: Iterable[Entry], *, flat: bool, every: bool, fewest: int) -> dict[str, Decision]:
    """What happens to each tensor: its quantizers, or why it is kept.

    `flat`: the format knows no shapes, so size alone tells a weight from a bias. `every`: the output can hold
    coded tensors only, so all of them are coded. Where no rule says more, tensors of `fewest` weights are coded.

    Raises:
        UsageError: two rules disagree about a tensor, or a rule fits none.
    """
    decisions: dict[str, Decision] = {}
    unused = {rule.said_by for rule in recipe.rules}
    for tensor in tensors:
        fitting = [rule for rule in recipe.rules if rule.fits(tensor.name)]
        unused -= {rule.said_by for rule in fitting}
        for rule in fitting[1:]:
            if rule.quantizers != fitting[0].quantizers:
                raise UsageError(
                    f"{fitting[0].said_by} and {rule.said_by} disagree about tensor {printable(tensor.name)}",
                    hint="make the globs narrower",
                )
        if tensor.dtype.kind != "f":
            decisions[tensor.name] = Kept(f"{tensor.dtype} values, not weights")
        elif not tensor.size:
            decisions[tensor.name] = Kept("empty")
        elif fitting:
            decisions[tensor.name] = fitting[0].quantizers or Kept(f"by {fitting[0].said_by}", asked=True)
        elif not recipe.default:
            decisions[tensor.name] = Kept("no rule names it", asked=True)
        else:
            decisions[tensor.name] = _default(tensor, recipe.default, flat, every, fewest)
    if unused:
        raise UsageError(
            f"{sorted(unused)[0]} fits no tensor", hint="`shrink inspect` lists the names; * matches / too"
        )
    return decisions


def _default(tensor: Entry, chain: tuple[Quantizer, ...], flat: bool, every: bool, fewest: int) -> Decision:
    if not flat and sum(n > 1 for n in tensor.shape) < 2:
        reason = "one number per channel (a bias or batch-norm value)" if tensor.size > 1 else "a single number"
    elif tensor.size < fewest:
        reason = f"only {tensor.size} values"
    else:
        return chain
    # What must be coded is coded, but not pruned as well.
    return chain[-1:] if every else Kept(reason)
