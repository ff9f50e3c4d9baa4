"""Tokenizers side by side: fitted, diagnosed, and on request judged by what a generator makes of their IDs.

A cell is one tokenizer with one seed: the seed replaces those of the tokenizer and of the generator, so cells of equal
seed are paired. Every cell is kept in the work folder under a name that hashes what it was made from; a comparison that
was stopped, by ``kill -9`` too, goes on with the cells that are missing. A cell computes on one thread, so that its
result does not depend on how many run beside it.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import CODEBOOKS
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import named_graph
from genretrieval.figures import Figure
from genretrieval.histories import Split
from genretrieval.metrics import SidGroups, catalogue_coverage, cohorts, ndcg, recall
from genretrieval.model import Generator
from genretrieval.retrieval import Retriever
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.evaluate import ask, without_seen
from genretrieval_pipelines.recipe import ComparisonRecipe, content_hash
from genretrieval_pipelines.run import Draft, draft_bundle, request_features, set_threads, train_generator
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.tokenize import (
    REPORT,
    Tokenized,
    embed_shop,
    pairs_for,
    publish_shop,
    read_report,
    tokenizer_folder,
    usable_parts,
    usable_tokenizer,
)
from genretrieval_tokenizers.comparison import Comparison, DownstreamRow
from genretrieval_tokenizers.publish import open_published

METRICS = (
    "recall5",
    "ndcg5",
    "recall10",
    "ndcg10",
    "sid_recall10",
    "corrected_recall10",
    "coverage10",
    "cold_recall10",
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Grid:
    """What every cell of a comparison is made from; small enough to be sent to another process.

    Attributes:
        recipe: all settings.
        data: the logs.
        work: folder of everything that is kept.
    """

    recipe: ComparisonRecipe
    data: Path
    work: Path

    def cells(self, seeds: list[int]) -> Iterator[tuple[str, int]]:
        """Seed by seed, so that a comparison that is stopped early has whole seeds."""
        for seed in seeds:
            for name in self.recipe.tokenizers:
                yield name, seed

    def shop(self) -> Shop:
        """The data."""
        return open_shop(self.data, self.work)

    def embeddings(self, name: str, shop: Shop) -> NDArray[np.float32]:
        """What a tokenizer quantises."""
        parts = self.recipe.tokenizers[name].embedding or self.recipe.embedding
        return embed_shop(usable_parts(parts, shop), shop, self.work)

    def folder(self, name: str, seed: int, shop: Shop) -> Path:
        """Where the IDs of a cell are published."""
        cell, embeddings = self.recipe.cell(name, seed), self.embeddings(name, shop)
        return self.work / tokenizer_folder(usable_tokenizer(cell.tokenizer, shop), cell.collisions, embeddings, shop)


def compare(
    grid: Grid, output: Path, *, downstream: bool, split: Split, jobs: int, console: Console
) -> dict[str, Figure]:
    """Fit every tokenizer, print and write the comparison.

    Args:
        grid: what to compare, on what.
        output: folder for comparison.md, comparison.json and the plots.
        downstream: train a generator for every tokenizer and seed too. Without it the first seed alone is fitted.
        split: what the generators are measured on.
        jobs: cells computed at a time, each on one thread.
        console: progress.

    Returns:
        Figures by dotted name, ``tokenize.<tokenizer>.<figure>``.
    """
    grid.work.mkdir(parents=True, exist_ok=True)
    shop = grid.shop()
    seeds = grid.recipe.seeds if downstream else grid.recipe.seeds[:1]
    for name in grid.recipe.tokenizers:  # computed once here, read by all processes
        grid.embeddings(name, shop)
        pairs_for(grid.recipe.cell(name, seeds[0]).tokenizer, shop, grid.work)
    _in_processes(partial(fit_cell, grid), list(grid.cells(seeds)), jobs, "tokenizer", console)
    rows: dict[str, DownstreamRow] = {}
    if downstream:
        measured = _in_processes(
            partial(measure_cell, grid, split), list(grid.cells(seeds)), jobs, "generator", console
        )
        rows = {name: _downstream_row(grid.recipe, name, measured) for name in grid.recipe.tokenizers}
    folders = {name: grid.folder(name, seeds[0], shop) for name in grid.recipe.tokenizers}
    comparison = Comparison(
        rows={name: read_report(folder) for name, folder in folders.items()},
        downstream=rows or None,
        reference=grid.recipe.reference,
        seeds=tuple(seeds),
        protocol=_protocol(grid.recipe, shop, split, seeds),
    )
    drawn = grid.embeddings(grid.recipe.reference, shop)
    comparison.write(output, {name: open_published(folder).ids.codes for name, folder in folders.items()}, drawn)
    console.print(comparison.to_markdown(), highlight=False, markup=False)
    return _figures(comparison)


def fit_cell(grid: Grid, name: str, seed: int) -> str:
    """Publish the IDs of a cell where they are not yet; returns what there is to say of it."""
    set_threads(1)
    shop = grid.shop()
    folder = grid.folder(name, seed, shop)
    cell = grid.recipe.cell(name, seed)
    config = usable_tokenizer(cell.tokenizer, shop)
    if not (folder / REPORT).exists():
        publish_shop(folder, config, cell.collisions, usable_parts(cell.embedding, shop), shop, grid.work)
    measured = read_report(folder)
    return f"{measured.collision_rate_before_dedup:.1%} of items share their codes"


def measure_cell(grid: Grid, split: Split, name: str, seed: int) -> dict[str, float]:
    """Train the generator of a cell and measure it; both are kept."""
    set_threads(1)
    shop = grid.shop()
    folder = grid.folder(name, seed, shop)
    ids, recipe = open_published(folder).ids, grid.recipe
    key = content_hash(folder.name, recipe.generator, recipe.cell(name, seed).training, recipe.evaluation, split)
    kept = grid.work / f"cell-{key}.json"
    if not kept.exists():
        figures = _measure(grid, shop, Tokenized(ids, folder / CODEBOOKS, ""), name, seed, split)
        unfinished = kept.with_suffix(".partial")
        unfinished.write_text(json.dumps({"tokenizer": name, "seed": seed, "split": split, **figures}), "utf-8")
        unfinished.replace(kept)
    content: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return {metric: float(content[metric]) for metric in METRICS}


def _measure(grid: Grid, shop: Shop, tokenized: Tokenized, name: str, seed: int, split: Split) -> dict[str, float]:
    recipe, quiet = grid.recipe.cell(name, seed), Console(quiet=True)
    features = request_features(recipe, shop)
    draft = draft_bundle(recipe, shop, tokenized.ids, features)
    generator = train_generator(recipe, shop, tokenized, draft, grid.work, quiet)
    cases = shop.cases(split)
    if split == "validation":
        sample = np.random.default_rng(0).permutation(len(cases))[: grid.recipe.evaluation.validation_users]
        cases = cases.take(np.sort(sample))
    retriever = _retriever(generator, draft)
    beams, ids = grid.recipe.evaluation.beam_width, tokenized.ids
    ranked = ask(retriever.retrieve, shop, cases, ids, recipe.generator.max_history, beams, quiet).items
    if shop.exclude_seen:
        ranked = without_seen(ranked, shop.histories, cases)
    described = ids.codes[:, :-1] if recipe.collisions.method == "dedup" else ids.codes
    return cell_metrics(ranked, cases, described, draft.table["popularity"].to_numpy())


def _retriever(generator: Generator, draft: Draft) -> Retriever:
    graph = named_graph(generator)
    manifest = draft.manifest.model_copy(update={"graph_inputs": graph.names})
    return Retriever(Draft(manifest, draft.request_features, draft.table), GraphBackend(graph))


def cell_metrics(
    ranked: NDArray[np.int32], cases: Cases, codes_NL: NDArray[np.int32], train_counts: NDArray[np.int64]
) -> dict[str, float]:
    """Figures of a cell, item by item and SID by SID.

    ``corrected_recall10`` is CCE (arXiv 2605.25330): an SID-level hit counts one over the number of items that share
    the SID, the chance to show the right one of them.

    Args:
        ranked: int32 ``[n_cases, beam]``, item rows.
        cases: what would have been right.
        codes_NL: codes without a dedup level.
        train_counts: int64 ``[n_items]``, training interactions of each item.
    """
    relevant, offsets = cases.relevant, cases.relevant_offsets
    groups = SidGroups.from_codes(codes_NL)
    sids, sid_relevant = groups.ranked(ranked), groups.relevant(relevant)
    sid_recall = recall(sids, sid_relevant, offsets, 10)
    sharing = np.bincount(groups.of_item, minlength=groups.n_sids)[sid_relevant[offsets[:-1]]]
    item_recall = recall(ranked, relevant, offsets, 10)
    cold = cohorts(relevant, offsets, train_counts)["cold"]
    return {
        "recall5": float(recall(ranked, relevant, offsets, 5).mean()),
        "ndcg5": float(ndcg(ranked, relevant, offsets, 5).mean()),
        "recall10": float(item_recall.mean()),
        "ndcg10": float(ndcg(ranked, relevant, offsets, 10).mean()),
        "sid_recall10": float(sid_recall.mean()),
        "corrected_recall10": float((sid_recall / sharing).mean()),
        "coverage10": catalogue_coverage(ranked, len(codes_NL), 10),
        "cold_recall10": float(item_recall[cold].mean()) if cold.any() else 0.0,
    }


def _in_processes(
    work: Callable[[str, int], _T], cells: list[tuple[str, int]], jobs: int, what: str, console: Console
) -> dict[tuple[str, int], _T]:
    """`work` of every cell, `jobs` at a time; fresh processes, because torch and faiss do not survive a fork."""
    done: dict[tuple[str, int], _T] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, *cell): cell for cell in cells}
        for future in as_completed(futures):
            name, seed = cell = futures[future]
            done[cell] = result = future.result()
            shown = result if isinstance(result, str) else f"Recall@10 {result['recall10']:.4f}"  # type: ignore[index]
            line = f"{what} {len(done)} of {len(cells)}: {name}, seed {seed}: {shown}"
            console.print(line, style="dim", highlight=False)
    return done


def _downstream_row(
    recipe: ComparisonRecipe, name: str, measured: dict[tuple[str, int], dict[str, float]]
) -> DownstreamRow:
    metrics = {metric: tuple(measured[name, seed][metric] for seed in recipe.seeds) for metric in METRICS}
    published = recipe.tokenizers[name].published
    return DownstreamRow(metrics, published.gains if published else None, published.source if published else "")


def _protocol(recipe: ComparisonRecipe, shop: Shop, split: Split, seeds: list[int]) -> str:
    sizes, training = recipe.generator, recipe.training
    users = f"{recipe.evaluation.validation_users:,} users at most" if split == "validation" else "all users"
    return (
        f"{shop.name}, {split} split, {users}; {len(shop.items):,} items ranked; seen items "
        f"{'removed' if shop.exclude_seen else 'kept'}; order: {shop.histories.order_rule}; beam "
        f"{recipe.evaluation.beam_width}; generator of width {sizes.d_model}, {sizes.n_encoder_layers} + "
        f"{sizes.n_decoder_layers} layers, {training.epochs} epochs; seeds {', '.join(map(str, seeds))}"
    )


def _figures(comparison: Comparison) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, measured in comparison.rows.items():
        figures[f"tokenize.{name}.collision_rate"] = Figure(measured.collision_rate_before_dedup, "share of items")
        figures[f"tokenize.{name}.icr"] = Figure(measured.icr, "share of items")
        figures[f"tokenize.{name}.sid_entropy"] = Figure(measured.sid_entropy_bits, "bits")
    for name, row in (comparison.downstream or {}).items():
        for metric, values in row.metrics.items():
            figures[f"tokenize.{name}.{metric}"] = Figure(float(np.mean(values)), "share", (min(values), max(values)))
        if (gain := comparison.gain(name, "recall10")) and gain.low is not None and gain.high is not None:
            figures[f"tokenize.{name}.recall10_gain"] = Figure(gain.mean, "relative", (gain.low, gain.high))
    return figures
