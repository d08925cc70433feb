"""The network that a command is given: an ONNX file, or a Chainer network as FILE.py:NAME with its weights."""

from __future__ import annotations

from pathlib import Path

from shrink import formats, site
from shrink.errors import UsageError, printable
from shrink.export import Network
from shrink.networks import chainer

__all__ = ["network", "network_of"]


def network(model: str, weights: Path | None, inputs: tuple[str, ...]) -> tuple[Network, list[str]]:
    """The network, and what there is to say about it. `inputs` are shapes, as `shrink.site.input_shapes` takes them.

    FILE.py is run, as if the user had; a file of weights never is.

    Raises:
        UsageError: arguments that do not belong together, or that do not fit the network.
        BadInput: a file or network that cannot be used.
        OutputError: a file is missing or cannot be read.
        MissingDependency: what reads it, or Chainer, is not installed.
    """
    if not chainer.is_network(model):
        if weights is not None:
            raise UsageError("--weights belongs to a network in Python, FILE.py:NAME", file=model)
        path = Path(model)
        loaded = formats.sniff(path).read(path)
        return Network(_title(path), loaded, site.input_shapes(loaded, inputs)), []
    if weights is None:
        raise UsageError("a network in Python needs --weights", file=model)
    if not inputs:
        raise UsageError("a network in Python needs --input, the shape of what it takes", file=model)
    for text in inputs:
        if "=" in text:
            raise UsageError(
                f"--input {printable(text)}: inputs of a network in Python have no names",
                file=model,
                hint="give the shapes alone, in the order of its arguments",
            )
    shapes = tuple(site.parse_shape(text) for text in inputs)
    snapshot = formats.sniff(weights).read(weights)
    chain = chainer.load(model, snapshot)
    graph, max_error = chainer.to_onnx(chain, shapes, snapshot)
    name = printable(model.rpartition(".py:")[2].partition("(")[0])
    return Network(name, graph, shapes, chain), [f"As ONNX it differs from Chainer by at most {max_error:.3g}."]


def network_of(model: Path, spec: str | None, inputs: tuple[str, ...]) -> tuple[Network, list[str]]:
    """The network that a file of weights belongs to: itself where it has a graph, else the Chainer network `spec`,
    whose inputs are guessed where none are given.

    Raises: as `network`.
    """
    if spec is None:
        return network(str(model), None, inputs)
    if not chainer.is_network(spec):
        raise UsageError(f"{printable(spec)} does not name a network", hint="FILE.py:NAME or FILE.py:NAME(100)")
    if inputs:
        return network(spec, model, inputs)
    snapshot = formats.sniff(model).read(model)
    shape = chainer.guessed_input(chainer.load(spec, snapshot))
    if shape is None:
        raise UsageError(
            "what the network takes cannot be told from it", file=spec, hint="say it with --input 1,3,64,64"
        )
    text = ",".join(map(str, shape))
    found, notes = network(spec, model, (text,))
    return found, [*notes, f"It was run on inputs of {text}: say --input if it is used on others."]


def _title(model: Path) -> str:
    return printable(model.name.removesuffix(model.suffix) or model.resolve().name)
