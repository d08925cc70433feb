"""The order in which a benchmark is measured, and how its document grows."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shrink.bench import accuracy, browser, peers, server, size, variants
from shrink.bench.document import VARIANT_CHARACTERS, VERSION, WHAT_CHARACTERS, WHY_CHARACTERS, cut
from shrink.bench.drawing import BUDGET_BYTES, drawn
from shrink.bench.machine import machine
from shrink.bench.plan import BACKENDS, NETWORKS, ORIGINAL, Cell, OnDocument, Plan, Variant
from shrink.bench.samples import Samples, inputs_of, samples
from shrink.errors import MissingDependency, ShrinkError, UsageError, printable
from shrink.metrics import kind_of
from shrink.model import DTYPES
from shrink.progress import Progress, silent

__all__ = ["measure"]

# What a browser is fed beside its timed runs; accuracy over a large data set is measured natively.
_BROWSER_SAMPLES = 32
# With the original, no more than a document may hold.
_VARIANTS_AT_MOST = 63


def measure(plan: Plan, on_document: OnDocument = lambda document: None, progress: Progress = silent) -> dict[str, Any]:
    """The document of a benchmark, whole. `on_document` hears of it after every finished part, marked as partial.

    So whoever interrupts this keeps what has been measured. What cannot be measured stands in the document with the
    reason; only what makes every number impossible is raised.

    Raises:
        UsageError: a mode, backend or file that makes no sense.
        BadInput: a network, variant or data that cannot be used.
        MissingDependency: onnx, onnxruntime or brotli is not installed.
    """
    _check(plan)
    with tempfile.TemporaryDirectory(prefix="shrink-bench-") as folder:
        return _Benchmark(plan, Path(folder), on_document, progress).run()


def _check(plan: Plan) -> None:
    """Refuse what makes no sense before anything is measured. Raises UsageError."""
    for mode in plan.modes:
        variants.recipe_of(mode)
        if len(mode) > VARIANT_CHARACTERS:
            raise UsageError(f"a mode has more than {VARIANT_CHARACTERS} characters")
    if len(plan.files or plan.modes) > _VARIANTS_AT_MOST:
        raise UsageError(f"more than {_VARIANTS_AT_MOST} variants")
    if len(set(plan.modes)) < len(plan.modes):
        raise UsageError("a mode is named twice")
    for backend in plan.browser.backends:
        if backend not in BACKENDS:
            raise UsageError(f"there is no backend {printable(backend)!r}", hint="known: " + ", ".join(BACKENDS))
    if plan.browser.network not in (None, *NETWORKS):
        raise UsageError(
            f"there is no network {printable(plan.browser.network)!r}", hint="known: " + ", ".join(NETWORKS)
        )


class _Benchmark:
    """One benchmark on its way: the document so far, and what its parts are measured from."""

    def __init__(self, plan: Plan, folder: Path, on_document: OnDocument, progress: Progress):
        self.plan, self.folder, self.on_document, self.progress = plan, folder, on_document, progress
        self.sites = variants.ExportedSites(folder / "sites", plan.runtime)
        self.native: dict[str, accuracy.Outputs] = {}
        self.half = False
        self.peak: float | None = None
        self.document: dict[str, Any] = {
            "shrink_bench": VERSION,
            "title": plan.network.title,
            "created": plan.created,
            "partial": True,
            "command": plan.command,
            "machine": machine(),
            "browser": None,
            "model": None,
            "inputs": None,
            "variants": [],
            "peers": None,
            "server": None,
            "not_measured": [],
            "checks": [],
        }

    def run(self) -> dict[str, Any]:
        first = variants.original(self.plan.network, self.folder, self.progress)
        self.half = any(t.dtype == DTYPES["F16"] for t in first.network.model.tensors)
        names = variants.names_of(self.plan.files)
        on_disk = [variants.from_file(first, n, p) for n, p in zip(names, self.plan.files, strict=True)]
        inputs = inputs_of(first.network)
        given = samples(inputs, self.plan.inputs)
        reference = accuracy.Reference(first, given.values, self.progress)
        given = self._usable(given, reference.outputs)
        self.peak = accuracy.peak(reference.outputs)
        self.document["model"] = {
            "file": self.plan.source,
            "weights": size.weights_of(first),
            "inputs": [{"name": cut(i.name), "dtype": i.dtype, "shape": list(i.shape)} for i in inputs],
            "outputs": [
                {
                    "name": cut(name),
                    "shape": list(values.shape),
                    "kind": kind_of(values.shape),
                    # The network is judged by its first output.
                    "peak": None if number else self.peak,
                }
                for number, (name, values) in enumerate(reference.outputs[0].items())
            ],
        }
        count, labels = len(given.values), given.labels is not None
        self.document["inputs"] = {"source": given.source, "count": count, "labels": labels}
        found = []
        for variant in (first, *on_disk, *self._by_modes(first)):
            found.append(variant)
            self._natively(variant, reference, given)
        self._peers(first)
        self._in_the_browser(found, given)
        if self.plan.browser.server:
            self._server(reference, given)
        self._under_brotli(found)
        self.document["partial"] = False
        return copy.deepcopy(self.document)

    def _told(self) -> None:
        # A copy: what the listener keeps must not change under its hands.
        self.on_document(copy.deepcopy(self.document))

    def _missing(self, what: str, why: object) -> None:
        entry = {"what": cut(what, WHAT_CHARACTERS), "why": cut(str(why), WHY_CHARACTERS)}
        if entry not in self.document["not_measured"]:
            self.document["not_measured"].append(entry)

    def _usable(self, given: Samples, outputs: accuracy.Outputs) -> Samples:
        """The samples, without labels where these say nothing of the outputs."""
        why = None if given.labels is None else accuracy.unusable(outputs, given.labels)
        if why is None:
            return given
        self._missing("what the labels say", why)
        return dataclasses.replace(given, labels=None)

    def _by_modes(self, first: Variant) -> Iterator[Variant]:
        """The variants of the modes, each made when it is its turn; one that does not go leaves its reason."""
        for mode in () if self.plan.files else self.plan.modes:
            try:
                yield variants.by_mode(first, mode, self.folder, self.progress)
            except ShrinkError as error:
                self._missing(mode, error)

    def _natively(self, variant: Variant, reference: accuracy.Reference, given: Samples) -> None:
        """All that needs no browser: sizes, outputs, layers, pictures."""
        is_first = variant.name == ORIGINAL
        entry: dict[str, Any] = {
            "name": variant.name,
            "mode": variant.mode,
            "file": str(variant.file) if variant.file.parent != self.folder else None,
            "size": None,
            "sqnr_db": None,
            "accuracy": {},
            "pictures": None,
            "layers": None,
            "latency": {},
        }
        self.document["variants"].append(entry)
        try:
            backends = self.plan.browser.backends or BACKENDS[:1]
            measured = size.sizes(
                variant,
                self.sites,
                backends,
                self.progress,
                weights_count=self.document["model"]["weights"],
                slow=self.plan.slow,
            )
        except MissingDependency:
            raise
        except ShrinkError as error:
            self._missing(f"{variant.name}: sizes", error)
        else:
            entry["size"] = measured.size
            for what, why in measured.missing:
                self._missing(what, why)
        self._told()
        try:
            outputs = reference.outputs if is_first else reference.of(variant, self.progress)
        except ShrinkError as error:
            self._missing(f"{variant.name}: outputs", error)
            return
        self.native[variant.name] = outputs
        entry["accuracy"]["native"] = figures = accuracy.compared(reference.outputs, outputs, given.labels, self.peak)
        if figures["psnr_db"] is not None:
            name = next(iter(reference.outputs[0]))
            entry["pictures"] = drawn(
                [sample[name] for sample in reference.outputs],
                [sample[name] for sample in outputs],
                figures["psnr_db"]["samples"],
                BUDGET_BYTES // max(1, len(self.plan.files or self.plan.modes)),
            )
        if not is_first:
            entry["sqnr_db"] = peers.sqnr_db(reference.first, variant)
            self._layers(variant, reference, entry)
        self._told()

    def _under_brotli(self, found: Sequence[Variant]) -> None:
        """Last of all: it takes minutes, and who does not wait for it has everything else."""
        asked = (self.plan.browser.backends or BACKENDS)[0]
        for variant, entry in zip(found, self.document["variants"], strict=True):
            if entry["size"] is None:
                continue
            # The weights are the same for all: any that it could be exported for will do.
            backend = next(iter(entry["size"]["first_visit"]), asked)
            count, why = None, ""
            try:
                count, why = size.under_brotli(variant, self.sites, backend, self.progress, slow=self.plan.slow)
            except MissingDependency:
                raise
            except ShrinkError as error:
                why = str(error)
            entry["size"]["wire_brotli"] = count
            if why:
                self._missing(f"{variant.name}: weights under brotli 11", why)
            self._told()

    def _layers(self, variant: Variant, reference: accuracy.Reference, entry: dict[str, Any]) -> None:
        seconds = float("inf") if self.plan.slow else accuracy.SECONDS_AT_MOST
        found = accuracy.layers(reference, variant, self.progress, seconds=seconds)
        if found is None:
            self._missing(f"{variant.name}: layers", "it has a graph of its own")
            return
        entry["layers"] = found.rows
        if found.why:
            self._missing(f"{variant.name}: the output with only one layer changed", found.why)

    def _peers(self, first: Variant) -> None:
        self.document["peers"], missing = peers.peers(first, self.progress)
        for what, why in missing:
            self._missing(what, why)
        self._told()

    def _in_the_browser(self, found: Sequence[Variant], given: Samples) -> None:
        for backend in BACKENDS:
            if backend not in self.plan.browser.backends:
                self._missing(backend, "it was left out, with --backends")
        if not self.plan.browser.backends:
            return
        shown = given.values[:_BROWSER_SAMPLES]
        if len(shown) < len(given.values):
            self._missing(
                f"accuracy in the browser on all {len(given.values)} inputs", f"it is that of the first {len(shown)}"
            )
        labels = None if given.labels is None else given.labels[: len(shown)]
        measured = browser.measure(
            found,
            shown,
            self.sites,
            self.plan.browser,
            lambda cell: self._cell(cell, labels),
            self.progress,
            on_browser=lambda about: self.document.__setitem__("browser", about),
        )
        self.document["browser"] = measured.browser
        for entry in measured.not_measured:
            self._missing(entry["what"], entry["why"])

    def _cell(self, cell: Cell, labels: Any) -> None:
        entry = next(v for v in self.document["variants"] if v["name"] == cell.variant)
        entry["latency"][cell.backend] = cell.latency
        if cell.outputs:
            entry["accuracy"][cell.backend] = self._judged(cell.variant, cell.outputs, labels)
        self._told()

    def _judged(self, name: str, outputs: Sequence[Mapping[str, Any]], labels: Any) -> dict[str, Any] | None:
        count = len(outputs)
        if name not in self.native:
            return None
        figures = accuracy.compared(self.native[ORIGINAL][:count], outputs, labels, self.peak)
        return accuracy.judged(figures, self.native[name][:count], outputs, half=self.half)

    def _server(self, reference: accuracy.Reference, given: Samples) -> None:
        try:
            self.document["server"] = server.measure(reference.run, given.values[0], self.plan.browser, self.progress)
        except ShrinkError as error:
            self._missing("the server", error)
        self._told()
