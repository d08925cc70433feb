"""The files of a network in stages, made beside where they will be, tried out, and put in place.

<name>-stage-1-of-3.onnx …                       a model each
<name>-stage-2-of-3-00001-of-00002.data …        its weights, where a stage cannot be brought below the limit
<name>.stages.json                               how to chain them; written last

In the folder of a page, whose visitors may have old ones in their caches, <name> is followed by a hash but in the last.

{"version": 1,
 "inputs": [{"name", "dtype", "shape"}, …],      what the network takes, in the shapes it was planned for
 "outputs": [the same],
 "stages": [{"file", "bytes", "integrity", "data": [{"file", "bytes", "integrity"}, …], left out where there is none,
             "inputs": [name, …], "outputs": [name, …],
             "drop": [names of tensors that nothing needs when this stage has run]}, …]}
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shrink import parts
from shrink.errors import BoundNotMet, ShrinkError, UsageError
from shrink.files import Scratch, atomic_file, file_size, holds, io_errors, is_taken, put
from shrink.formats import onnx as onnx_format
from shrink.formats._onnx_proto import NAMED_DTYPES, Reader
from shrink.model import Model
from shrink.progress import Progress
from shrink.split import RENAMED, File, Plan, is_web
from shrink.split import _onnx_graph as onnx_data
from shrink.split._chain import Link, compared
from shrink.split._onnx_wire import Span
from shrink.split._stages import Graph, graph_inputs
from shrink.terminal import in_words

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["SUFFIX", "StageFiles"]

SUFFIX = ".stages.json"
VERSION = 1
_BLOCK = 1 << 20
# As where ONNX weights go to files of their own: what is smaller stays in the graph, if that then fits.
_LEAST_BYTES = (1024, 128)


class Stage(Protocol):
    """What is asked of a stage here; see `shrink.split.cut`."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def initializers(self) -> tuple[str, ...]: ...
    @property
    def nodes(self) -> tuple[int, ...]: ...
    @property
    def crossing_bytes(self) -> int: ...


@dataclass(frozen=True)
class _Made:
    """Files that lie ready: the index, its parts, and for each stage its files, the model first."""

    index: bytes
    index_parts: Sequence[tuple[str, bytes]]
    stages: Sequence[Sequence[parts.Part]]

    @property
    def files(self) -> list[parts.Part]:
        return [part for stage in self.stages for part in stage]


@dataclass(frozen=True)
class StageFiles:
    source: Path
    limit: int
    folder: Path
    model: Model
    graph: Graph
    stages: Sequence[Stage]
    protos: Sequence[ModelProto]

    @property
    def stem(self) -> str:
        return self.source.name.removesuffix(onnx_format.SUFFIX)

    @property
    def index(self) -> Path:
        return self.folder / f"{self.stem}{SUFFIX}"

    def plan(self, notes: Sequence[str], *, force: bool, dry_run: bool) -> Plan:
        """Make all files in a folder of their own, which goes with the plan, and compare what they compute.

        Raises:
            UsageError: other stages are there, and no `force`.
            BoundNotMet: a stage cannot be brought below the limit.
        """
        # A name that is too long is better heard of by where the file would be.
        is_taken(self.folder / f"{self.stem}-stage-1-of-{len(self.protos)}{onnx_format.SUFFIX}")
        work = Scratch(self.folder, dry_run=dry_run)
        with io_errors(work.path.parent):
            work.path.mkdir()
        made = self._make(work.path, "")
        web = is_web(self.folder)
        if web:
            made = self._make(work.path, parts.mark(made.index))
        same = {part.file for part in made.files if parts.is_there(self.folder, part)}
        same |= {name for name, data in made.index_parts if holds(self.folder / name, data)}
        names = {part.file for part in made.files} | {name for name, _ in made.index_parts}
        if is_taken(self.index):
            if holds(self.index, made.index) and same == names:
                done = (*notes, "it is cut exactly so already: nothing is written")
                return Plan(self.source, self.folder, self.limit, self._listed(made), done, lambda progress: None)
            if not force:
                raise UsageError("exists already", file=self.index, hint="--force replaces it")
        if not web and any(is_taken(self.folder / name) for name in names - same):
            made = self._make(work.path, parts.mark(made.index))
            notes = (*notes, RENAMED)
        notes = (
            *notes,
            *self._notes(made),
            compared(self.model, self.graph, work.path, _chain(work.path, made, self.stages)),
        )

        def write(progress: Progress) -> None:
            self._write(work, made, progress)

        return Plan(self.source, self.folder, self.limit, self._listed(made), tuple(notes), write)

    # --- making

    def _make(self, folder: Path, mark: str) -> _Made:
        made = []
        for number, proto in enumerate(self.protos, 1):
            stem = f"{self.stem}{mark}-stage-{number}-of-{len(self.protos)}"
            made.append(self._make_stage(folder, stem, proto))
        text = parts.as_bytes(self._index(made))
        top, index_parts = parts.fit_index(text, f"{self.stem}{mark}.stages", self.limit)
        return _Made(top, index_parts, made)

    def _make_stage(self, folder: Path, stem: str, proto: ModelProto) -> list[parts.Part]:
        path = folder / f"{stem}{onnx_format.SUFFIX}"
        reader = Reader(self.source)
        held = {slot.external_data[0].value for slot in proto.graph.initializer if reader.storage(slot) == "external"}
        tensors = tuple(tensor for tensor in self.model.tensors if tensor.name in held)
        skeleton = proto.SerializeToString(deterministic=True)
        onnx_format.write(Model(tensors, self.model.source, graph=skeleton), tensors, path, None)
        data = list(_move_out(path, stem, self.limit)) if file_size(path) > self.limit else []
        if file_size(path) > self.limit:
            raise BoundNotMet(
                f"a stage that cannot be divided is {file_size(path)} bytes even without its weights, "
                f"over the limit of {self.limit}",
                file=self.source,
                hint=f"the smallest limit that works is about {file_size(path)} bytes",
            )
        return [_described(file) for file in (path, *data)]

    def _index(self, made: Sequence[Sequence[parts.Part]]) -> dict[str, Any]:
        proto = self.graph.proto
        entries = []
        for number, (stage, files) in enumerate(zip(self.stages, made, strict=True)):
            later = {name for other in self.stages[number + 1 :] for name in other.inputs}
            entry = files[0].as_json()
            if len(files) > 1:
                entry["data"] = [part.as_json() for part in files[1:]]
            gone = (*stage.inputs, *stage.outputs)
            entry |= {"inputs": list(stage.inputs), "outputs": list(stage.outputs)}
            entry["drop"] = [n for n in dict.fromkeys(gone) if n not in later and n not in self.graph.outputs]
            entries.append(entry)
        inputs = [
            {"name": info.name, "dtype": _dtype(info), "shape": list(self.graph.input_shapes[info.name])}
            for info in graph_inputs(proto)
        ]
        outputs = [
            {"name": info.name, "dtype": _dtype(info), "shape": _shape(self.graph, info.name)}
            for info in proto.graph.output
        ]
        return {"version": VERSION, "inputs": inputs, "outputs": outputs, "stages": entries}

    # --- saying

    def _notes(self, made: _Made) -> Iterator[str]:
        if len(self.stages) == 1:
            yield (
                "one stage holds all of it: there is nothing to cut"
                if len(made.stages[0]) == 1
                else ("it cannot be cut without a runtime computing other bits; its weights lie in files of their own")
            )
            return
        crossing = [in_words(stage.crossing_bytes) for stage in self.stages[:-1]]
        yield f"{len(self.stages)} stages; between them wait {', '.join(crossing)} of tensors"
        for number, files in enumerate(made.stages, 1):
            if len(files) > 1:
                yield f"stage {number} cannot be cut smaller: its weights lie in {len(files) - 1} files beside it"

    def _listed(self, made: _Made) -> tuple[File, ...]:
        listed = []
        for number, (stage, files) in enumerate(zip(self.stages, made.stages, strict=True)):
            crossing = ""
            if number < len(self.stages) - 1:
                later = {name for other in self.stages[number + 1 :] for name in other.inputs}
                kept = {n for other in self.stages[: number + 1] for n in other.outputs if n in later}
                kept -= set(self.graph.outputs)
                crossing = (
                    f", hands on {len(kept)} tensor{'s' if len(kept) != 1 else ''} ({in_words(stage.crossing_bytes)})"
                )
            words = f"{len(stage.nodes)} nodes, {len(stage.initializers)} weights{crossing}"
            listed.append(File(files[0].file, files[0].size_bytes, words))
            listed += [File(part.file, part.size_bytes, f"weights of stage {number + 1}") for part in files[1:]]
        listed += [File(name, len(data), "part of the index") for name, data in made.index_parts]
        return (*listed, File(self.index.name, len(made.index), "index of the stages"))

    # --- writing

    def _write(self, work: Scratch, made: _Made, progress: Progress) -> None:
        old = _names_of_old(self.index, self.stem)
        total, done = sum(part.size_bytes for part in made.files), 0
        with io_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in made.files:
                progress(part.file, done, total)
                _move(work.path / part.file, self.folder / part.file)
                done += part.size_bytes
        for name, data in made.index_parts:
            put(self.folder / name, data)
        put(self.index, made.index)
        for name in old - {part.file for part in made.files} - {name for name, _ in made.index_parts}:
            # What is left of an old set is in nobody's way.
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        shutil.rmtree(work.path, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open(source, "rb") as file, atomic_file(target) as out:
            shutil.copyfileobj(file, out)


def _move_out(path: Path, stem: str, limit: int) -> list[Path]:
    """Move the weights of a model into data files beside it, as many as it takes."""
    for least_bytes in _LEAST_BYTES:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            graph = onnx_data.Graph(whole, path, least_bytes)
            weights = graph.keep_whole(limit)
            files = onnx_data.arrange(weights, limit)
            named = list(zip(parts.numbered(stem, len(files), ".data"), files, strict=True))
            small = graph.with_data_in(named)
            if len(small) > limit and least_bytes != _LEAST_BYTES[-1]:
                continue
            for name, pieces in named:
                with atomic_file(path.with_name(name)) as out:
                    for piece in pieces:
                        out.write(bytes(piece.offset - out.tell()))
                        _copy(weights[piece.weight].values, piece.start, piece.size_bytes, whole, out)
        put(path, small)
        return [path.with_name(name) for name, _ in named]
    return []


def _copy(values: Span | bytes, start: int, size: int, whole: mmap.mmap, out: Any) -> None:
    if isinstance(values, bytes):
        out.write(values[start : start + size])
        return
    for at in range(values.start + start, values.start + start + size, _BLOCK):
        out.write(whole[at : min(at + _BLOCK, values.start + start + size)])


def _described(path: Path) -> parts.Part:
    with io_errors(path), open(path, "rb") as file:
        return parts.describe(path.name, file, file_size(path))


def _chain(folder: Path, made: _Made, stages: Sequence[Stage]) -> list[Link]:
    return [
        Link(folder / files[0].file, stage.inputs, stage.outputs)
        for files, stage in zip(made.stages, stages, strict=True)
    ]


def _dtype(info: ValueInfoProto) -> str:
    known = NAMED_DTYPES.get(info.type.tensor_type.elem_type)
    return known.name if known is not None else "other"


def _shape(graph: Graph, name: str) -> list[int] | None:
    known = graph.shapes.get(name)
    return list(known) if known is not None else None


def _names_of_old(index: Path, stem: str) -> frozenset[str]:
    """The files of the set that is replaced, as far as its index can be read and the names are like ours."""
    try:
        content, lay_in = parts.read_json(index)
        entries = [part for stage in content["stages"] for part in (stage, *stage.get("data", []))]
        names = {str(entry["file"]) for entry in entries} | {part.file for part in lay_in}
    except (ShrinkError, KeyError, TypeError, AttributeError):
        return frozenset()
    stages = r"-stage-\d+-of-\d+(\.onnx|-\d{5,}-of-\d{5,}\.data)"
    indexes = r"\.stages-index\d?-\d{5,}-of-\d{5,}\.json"
    ours = re.compile(rf"{re.escape(stem)}(-[0-9a-f]{{8}})?({stages}|{indexes})")
    return frozenset(name for name in names if ours.fullmatch(name))
