"""A bundle in int8 for CPUs, if it still finds what it found: `genretrieval export --precision int8`."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import GRAPH, MODEL_CARD, Bundle, load_bundle, write_bundle
from genretrieval.errors import BundleError
from genretrieval.export.quantise import quantise
from genretrieval.figures import Figure
from genretrieval.metrics import recall
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Backend, Leaves, Retriever
from genretrieval_pipelines.bench_decode import Contender, take_turns
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.draft import reads
from genretrieval_pipelines.evaluate import K, ask, requests, without_seen
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.run import OpenBackend, catalogue_ids, recorded_run
from genretrieval_pipelines.shop import Shop

BATCHES = (1, 8)
_ROUNDS = 25


def export_int8(
    bundle: Path,
    output: Path,
    *,
    data: Path | None,
    min_recall_ratio: float,
    open_backend: OpenBackend,
    console: Console,
) -> dict[str, Figure]:
    """Write `bundle` again with an int8 graph, after asking both graphs every case of validation.

    Args:
        bundle: a bundle in float32.
        output: the new bundle, whose manifest names the old one and what was measured.
        data: the logs; by default those that the bundle was trained on.
        min_recall_ratio: Recall@10 of the new graph over that of the old one, at least.
        open_backend: opens an exported graph.
        console: progress.

    Returns:
        Recall@10 of both and their ratio, the share of the first ten items that stay, and how much faster the graph is.

    Raises:
        BundleError: recall falls under the gate, or cannot be measured; nothing is written.
    """
    opened = load_bundle(bundle)
    if opened.manifest.precision != "fp32":
        raise BundleError(f"{bundle} is in {opened.manifest.precision} already; give the bundle that it was made from")
    recipe, shop, _ = recorded_run(opened, data)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / GRAPH
        n_products = quantise(bundle / GRAPH, graph)
        measured = _Measured.of(opened, graph, recipe, shop, open_backend, console)
        figures = measured.figures()
        ratio = figures["int8.recall10_ratio"].value
        if ratio < min_recall_ratio:
            raise BundleError(
                f"{output} was not written: Recall@10 falls from {measured.recall['fp32']:.4f} to "
                f"{measured.recall['int8']:.4f} in int8, {ratio:.3f} of what it was, and at least {min_recall_ratio:g} "
                "was asked for. Serve the bundle as it is"
            )
        _write(opened, output, graph, figures, n_products)
    return figures


@dataclass
class Recording:
    """Keeps what a graph was given last.

    Attributes:
        backend: runs the graph.
        inputs: of its last run.
    """

    backend: Backend
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch."""
        self.inputs = inputs
        return self.backend.run(inputs)


@dataclass(frozen=True)
class _Measured:
    """Both graphs on the same cases.

    Attributes:
        recall: Recall@10 by precision.
        kept: share of the first ten items of each case that are among the first ten of int8.
        ms: milliseconds a call, by precision and batch.
        nbytes: of the graphs, by precision.
    """

    recall: dict[str, float]
    kept: float
    ms: dict[str, Figure]
    nbytes: dict[str, int]

    @classmethod
    def of(
        cls, opened: Bundle, graph: Path, recipe: Recipe, shop: Shop, open_backend: OpenBackend, console: Console
    ) -> _Measured:
        cases = shop.cases("validation")
        if not len(cases):
            raise BundleError(
                f"{opened.path} cannot be measured, because no user of its logs has three interactions and no query is "
                "held out. Give other logs with --data"
            )
        backends = {"fp32": open_backend(opened.path / GRAPH), "int8": open_backend(graph)}
        answer = {name: _ranked(opened, backend, recipe, shop, cases, console) for name, backend in backends.items()}
        found = {name: recall(rows, cases.relevant, cases.relevant_offsets, K) for name, rows in answer.items()}
        if not found["fp32"].any():
            raise BundleError(f"{opened.path} finds none of the items that were held out, so int8 cannot lose any")
        pairs = zip(answer["fp32"], answer["int8"], strict=True)
        kept = [np.isin(before[:K], after[:K]).mean() for before, after in pairs]
        beams = recipe.evaluation.beam_width
        asked = list(requests(shop, cases.take(np.arange(min(len(cases), max(BATCHES)))), reads(recipe, shop), beams))
        return cls(
            recall={name: float(of_case.mean()) for name, of_case in found.items()},
            kept=float(np.mean(kept)),
            ms=_ms(opened, backends, asked),
            nbytes={"fp32": (opened.path / GRAPH).stat().st_size, "int8": graph.stat().st_size},
        )

    def figures(self) -> dict[str, Figure]:
        """By name; see `export_int8`."""
        return {
            "int8.recall10": Figure(self.recall["int8"], "share"),
            "fp32.recall10": Figure(self.recall["fp32"], "share"),
            "int8.recall10_ratio": Figure(self.recall["int8"] / self.recall["fp32"], "ratio"),
            "int8.kept10": Figure(self.kept, "share"),
            "int8.graph_bytes_ratio": Figure(self.nbytes["int8"] / self.nbytes["fp32"], "ratio"),
            **{
                f"int8.speedup.b{batch}": Figure(
                    self.ms[f"fp32.b{batch}"].value / self.ms[f"int8.b{batch}"].value, "ratio"
                )
                for batch in BATCHES
            },
        }


def _ranked(
    opened: Bundle, backend: Backend, recipe: Recipe, shop: Shop, cases: Cases, console: Console
) -> NDArray[np.int32]:
    """The items of each case as quality is measured, int32 ``[n_cases, beam_width]``."""
    answer = Retriever(opened, backend).retrieve
    beams = recipe.evaluation.beam_width
    ranked = ask(answer, shop, cases, catalogue_ids(opened), reads(recipe, shop), beams, console).items
    return without_seen(ranked, shop.histories, cases) if shop.exclude_seen else ranked


def _ms(opened: Bundle, backends: dict[str, Backend], asked: Sequence[RetrieveRequest]) -> dict[str, Figure]:
    """Milliseconds of the graphs alone, in turn."""
    recording = Recording(backends["fp32"])
    retriever = Retriever(opened, recording)
    contenders = []
    for batch in BATCHES:
        # A small shop has fewer cases than a batch has rows.
        retriever.retrieve([asked[row % len(asked)] for row in range(batch)])
        contenders += [
            Contender(f"{name}.b{batch}", partial(backend.run, recording.inputs)) for name, backend in backends.items()
        ]
    return take_turns(contenders, _ROUNDS)


def _write(opened: Bundle, output: Path, graph: Path, figures: dict[str, Figure], n_products: int) -> None:
    measured = {name: figure.value for name, figure in figures.items() if "recall10" in name}
    manifest = opened.manifest.model_copy(
        update={
            "uuid": str(uuid.uuid4()),
            "parent_uuid": opened.manifest.uuid,
            "created": datetime.now(UTC).replace(microsecond=0),
            "precision": "int8",
            "metrics": {**opened.manifest.metrics, **measured},
        }
    )
    told = (
        f"\n## Precision\n\nBundle `{manifest.version}` is `{opened.manifest.version}` with {n_products} matrix "
        f"products in int8, for CPUs. Recall@10 on validation: {measured['int8.recall10']:.4f}, "
        f"{measured['int8.recall10_ratio']:.4f} of what it was; the figures above are those of float32.\n"
    )
    with write_bundle(output, manifest) as folder:
        for name in opened.manifest.files:
            if name != GRAPH:
                shutil.copyfile(opened.path / name, folder / name)
        shutil.copyfile(graph, folder / GRAPH)
        with (folder / MODEL_CARD).open("a", encoding="utf-8") as card:
            card.write(told)
