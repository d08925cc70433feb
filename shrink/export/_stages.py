"""An exported network cut into stages, so that no file is over a limit and a page can run one stage at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrink import container
from shrink.files import atomic_file
from shrink.split.cut import Stage, cut, examine, stage_models

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["in_stages"]

# What a weight takes in the header of its container, besides its name.
_HEADER_BYTES = 512


def in_stages(
    proto: ModelProto,
    shapes: Sequence[tuple[int, ...]],
    weights: Path,
    sizes: Mapping[str, int],
    external: Mapping[str, Mapping[str, Any]],
    limit: int,
    source: Path,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the stages of a network beside `weights`, the container that holds all of its weights and goes.

    `sizes` and `external` are what that takes in bytes and where the graph has it, by name. Gives what a page must know
    of each stage, in running order, and notes for the user.

    Raises:
        BadInput: a graph that cannot be run.
        UsageError: an input's shape is open.
    """
    graph = examine(proto, source, shapes)
    names = {about["location"]: name for name, about in external.items()}
    held = {
        tensor.name: names[tensor.external_data[0].value]
        for tensor in proto.graph.initializer
        if tensor.data_location == tensor.EXTERNAL
    }
    costs = {slot: sizes[name] + _HEADER_BYTES + len(name.encode()) for slot, name in held.items()}
    stages = cut(graph, costs, limit)
    entries = {entry.name: entry for entry in container.read(weights).entries}
    described = []
    for number, (stage, model) in enumerate(zip(stages, stage_models(graph, stages), strict=True), 1):
        own = [held[slot] for slot in stage.initializers if slot in held]
        files = {"model": f"model-{number}.onnx", "weights": f"weights-{number}.safetensors"}
        with atomic_file(weights.with_name(files["model"])) as out:
            out.write(model.SerializeToString(deterministic=True))
        # They are packed already.
        container.write(
            (entries[name] for name in own),
            weights.with_name(files["weights"]),
            source="onnx",
            attributes={},
            graph=None,
            level=None,
        )
        described.append(
            {
                **files,
                "external": {name: external[name] for name in own},
                "inputs": list(stage.inputs),
                "outputs": list(stage.outputs),
                "drop": _dropped(stages, number - 1),
            }
        )
    weights.unlink()
    return described, _notes(stages, limit)


def _dropped(stages: Sequence[Stage], number: int) -> list[str]:
    """What a stage is the last to need, of what it takes and gives."""
    later = {name for stage in stages[number + 1 :] for name in stage.inputs}
    return sorted({*stages[number].inputs, *stages[number].outputs} - later)


def _notes(stages: Sequence[Stage], limit: int) -> list[str]:
    if len(stages) == 1:
        return ["The network is one stage: it fits, or cannot be cut."]
    crossing = ", ".join(f"{stage.crossing_bytes / 1e6:.3g}" for stage in stages[:-1])
    notes = [f"{len(stages)} stages; kept from one to the next: {crossing} MB."]
    large = [str(number) for number, stage in enumerate(stages, 1) if stage.size_bytes > limit]
    if large:
        notes.append(f"Over the limit by itself, and in parts therefore: stage {', '.join(large)}.")
    return notes
