"""Tokenizers side by side: fitted, diagnosed, and on request judged by what a generator makes of their IDs.

A cell is one tokenizer with one seed, which replaces those of the tokenizer and of the generator. Cells of equal seed
are paired, though by little: they share the order of the training data, and initial weights only where their codebook
sizes are equal. Every cell is kept in the work folder under a name that hashes what it was made from and measured on; a
comparison that was stopped, by ``kill -9`` too, goes on with the cells that are missing. A cell computes on one thread,
so that its result does not depend on how many run beside it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.errors import DataError, InvalidInputError
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import named_graph
from genretrieval.figures import Figure
from genretrieval.histories import LeaveOneOut, Split
from genretrieval.metrics import SidGroups, catalogue_coverage, cohorts, ndcg, recall
from genretrieval.retrieval import Retriever
from genretrieval_pipelines.baselines.counts import Markov, Popularity, Transitions
from genretrieval_pipelines.baselines.ranking import Baseline
from genretrieval_pipelines.baselines.sasrec import Sasrec
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.cells import in_processes, on_one_thread
from genretrieval_pipelines.draft import draft_bundle, reads, request_features
from genretrieval_pipelines.evaluate import K, ask, without_seen
from genretrieval_pipelines.quality_report import counted_test_evaluations
from genretrieval_pipelines.recipe import ComparisonRecipe, content_hash
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.stages import stage_inputs
from genretrieval_pipelines.tokenize import (
    REPORT,
    Tokenized,
    embed_shop,
    pairs_for,
    publish_shop,
    read_report,
    tokenizer_folder,
)
from genretrieval_pipelines.train_generator import train_generator
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
    "long_tail_recall10",
    "invalid_rate",
)
_CELL_VERSION = 2  # raise it when a change would measure something else under the same name
_UNITS = {"coverage10": "share of items", "invalid_rate": "share of IDs"}


@dataclass(frozen=True)
class Fitted:
    """A cell's IDs are published, or cannot be.

    Attributes:
        collision_rate: share of items that share the codes they were encoded to.
        impossible: why the tokenizer cannot be fitted to these data; empty where it was.
    """

    collision_rate: float = 0.0
    impossible: str = ""

    def __str__(self) -> str:
        """For those who wait."""
        shared = f"{self.collision_rate:.1%} of items share their codes"
        return f"not possible: {self.impossible}" if self.impossible else shared


@dataclass(frozen=True)
class Measured:
    """What a cell's generator reached: of `METRICS` those that there are cases for."""

    metrics: dict[str, float]

    def __str__(self) -> str:
        """For those who wait."""
        return f"Recall@10 {self.metrics['recall10']:.4f}"


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

    def cells(self, seeds: list[int], without: Collection[str] = ()) -> Iterator[tuple[str, int]]:
        """Seed by seed, so that a comparison that is stopped early has whole seeds."""
        for seed in seeds:
            for name in self.recipe.tokenizers:
                if name not in without:
                    yield name, seed

    def shop(self) -> Shop:
        """The data."""
        return open_shop(self.data, self.work)

    def embeddings(self, name: str, shop: Shop) -> NDArray[np.float32]:
        """What a tokenizer quantises."""
        parts = self.recipe.tokenizers[name].embedding or self.recipe.embedding
        return embed_shop(parts, shop, self.work)

    def folder(self, name: str, seed: int, shop: Shop) -> Path:
        """Where the IDs of a cell are published."""
        cell, embeddings = self.recipe.cell(name, seed), self.embeddings(name, shop)
        return self.work / tokenizer_folder(cell.tokenizer, cell.collisions, embeddings, shop, cell.embedding)


def compare(
    grid: Grid,
    output: Path,
    *,
    downstream: bool,
    split: Split,
    jobs: int,
    console: Console,
    sasrec: bool = False,
) -> dict[str, Figure]:
    """Fit every tokenizer, print and write the comparison.

    A tokenizer that cannot be fitted to these data is a row that says why; the others are compared.

    Args:
        grid: what to compare, on what.
        output: folder for comparison.md, comparison.json and the plots.
        downstream: train a generator for every tokenizer and seed too. Without it the first seed alone is fitted.
        split: what the generators are measured on.
        jobs: cells computed at a time, each on one thread.
        console: progress; the page itself goes to standard output.
        sasrec: train the SASRec baseline too.

    Returns:
        Figures by dotted name, ``tokenize.<tokenizer>.<figure>``.

    Raises:
        InvalidInputError: `split` is test or SASRec is asked for, and no generator is to be measured beside it.
        DataError: there is no case to measure, or no tokenizer can be fitted.
    """
    if not downstream and (split == "test" or sasrec):
        option = "--sasrec" if sasrec else "--split test"
        raise InvalidInputError(f"{option} is about measuring generators, and none is trained; add --downstream")
    evaluations = counted_test_evaluations(output / "comparison.json") + (split == "test")
    grid.work.mkdir(parents=True, exist_ok=True)
    shop, recipe = grid.shop(), grid.recipe
    cases = measured_cases(recipe, shop, split)
    if downstream and not len(cases):
        raise DataError(
            f"{shop.name} has no {split} case, so no generator can be measured; give interactions with users of at "
            f"least {LeaveOneOut(shop.histories).min_length}, or judged queries of that split, or leave out "
            "--downstream for diagnostics alone"
        )
    seeds = recipe.seeds if downstream else recipe.seeds[:1]
    impossible = _prepare(grid, shop)
    fitted = in_processes(partial(fit_cell, grid), list(grid.cells(seeds, impossible)), jobs, "tokenizer", console)
    impossible |= {name: cell.impossible for (name, _), cell in fitted.items() if cell.impossible}
    names = [name for name in recipe.tokenizers if name not in impossible]
    if not names:
        raise DataError(
            "no tokenizer can be fitted to these data: "
            + "; ".join(f"{name}: {why}" for name, why in impossible.items())
        )
    rows: dict[str, DownstreamRow] = {}
    baselines: dict[str, dict[str, float]] = {}
    if downstream:
        baselines = _baseline_rows(grid, shop, cases, split, sasrec, console)
        cells = list(grid.cells(seeds, impossible))
        measured = in_processes(partial(measure_cell, grid, split), cells, jobs, "generator", console)
        rows = {name: _downstream_row(recipe, name, measured) for name in names}
    folders = {name: grid.folder(name, seeds[0], shop) for name in names}
    comparison = Comparison(
        rows={name: read_report(folder) for name, folder in folders.items()},
        downstream=rows or None,
        reference=recipe.reference,
        seeds=tuple(seeds),
        protocol=_protocol(recipe, shop, split, len(cases)),
        impossible=impossible,
        own_vectors=tuple(name for name in names if recipe.tokenizers[name].embedding),
        baselines=baselines,
        test_evaluations=evaluations,
    )
    drawn = grid.embeddings(recipe.reference if recipe.reference in names else names[0], shop)
    comparison.write(output, {name: open_published(folder).ids.codes for name, folder in folders.items()}, drawn)
    print(comparison.to_markdown())
    return _figures(comparison)


def _prepare(grid: Grid, shop: Shop) -> dict[str, str]:
    """Compute once what all processes read; returns why that was not possible, by name of the tokenizer."""
    impossible: dict[str, str] = {}
    for name in grid.recipe.tokenizers:
        try:
            grid.embeddings(name, shop)
            pairs_for(grid.recipe.tokenizers[name].tokenizer, shop, grid.work)
        except DataError as error:
            impossible[name] = str(error)
    return impossible


@on_one_thread()
def fit_cell(grid: Grid, name: str, seed: int) -> Fitted:
    """Publish the IDs of a cell where they are not yet."""
    shop = grid.shop()
    cell = grid.recipe.cell(name, seed)
    try:
        folder = grid.folder(name, seed, shop)
        if not (folder / REPORT).exists():
            publish_shop(folder, cell.tokenizer, cell.collisions, cell.embedding, shop, grid.work)
    except DataError as error:
        return Fitted(impossible=str(error))
    return Fitted(read_report(folder).collision_rate_before_dedup)


@on_one_thread()
def measure_cell(grid: Grid, split: Split, name: str, seed: int) -> Measured:
    """Train the generator of a cell and measure it; both are kept."""
    shop = grid.shop()
    folder = grid.folder(name, seed, shop)
    recipe = grid.recipe
    training = recipe.cell(name, seed).training
    key = content_hash(
        _CELL_VERSION,
        METRICS,
        shop.fingerprint,
        folder.name,
        recipe.generator,
        training,
        recipe.evaluation,
        split,
    )
    kept = grid.work / f"cell-{key}.json"
    if not kept.exists():
        figures = _measure(grid, shop, Tokenized.read(folder), name, seed, split)
        unfinished = kept.with_suffix(".partial")
        unfinished.write_text(json.dumps({"tokenizer": name, "seed": seed, "split": split, **figures}), "utf-8")
        unfinished.replace(kept)
    content: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return Measured({metric: float(content[metric]) for metric in METRICS if metric in content})


def measured_cases(recipe: ComparisonRecipe, shop: Shop, split: Split) -> Cases:
    """What every generator and every baseline is measured on: all of test, of validation a fixed sample."""
    cases = shop.cases(split)
    if split == "test":
        return cases
    sample = np.random.default_rng(0).permutation(len(cases))[: recipe.evaluation.validation_users]
    return cases.take(np.sort(sample))


def _measure(grid: Grid, shop: Shop, tokenized: Tokenized, name: str, seed: int, split: Split) -> dict[str, float]:
    recipe, quiet = grid.recipe.cell(name, seed), Console(quiet=True)
    draft = draft_bundle(recipe, shop, tokenized.ids, request_features(recipe, shop, tokenized.keywords))
    trained = train_generator(stage_inputs(recipe, shop, tokenized.ids, draft, grid.work, quiet))
    cases = measured_cases(grid.recipe, shop, split)
    retriever = Retriever(trained.draft(draft), GraphBackend(named_graph(trained.generator)))
    beams, ids = grid.recipe.evaluation.beam_width, tokenized.ids
    answers = ask(retriever.retrieve, shop, cases, ids, reads(recipe, shop), beams, quiet)
    ranked = without_seen(answers.items, shop.histories, cases) if shop.exclude_seen else answers.items
    described = ids.codes[:, :-1] if recipe.collisions.method == "dedup" else ids.codes
    return {
        **item_metrics(ranked, cases, draft.table["popularity"].to_numpy()),
        **sid_metrics(ranked, cases, described),
        "invalid_rate": answers.invalid,
    }


def item_metrics(ranked: NDArray[np.int32], cases: Cases, train_counts: NDArray[np.int64]) -> dict[str, float]:
    """Figures of a ranking, item by item; a cohort without a case has none.

    Args:
        ranked: int32 ``[n_cases, at least 10]``, item rows.
        cases: what would have been right.
        train_counts: int64 ``[n_items]``, training interactions of each item.
    """
    relevant, offsets = cases.relevant, cases.relevant_offsets
    recall10 = recall(ranked, relevant, offsets, 10)
    parts = cohorts(relevant, offsets, train_counts)
    return {
        "recall5": float(recall(ranked, relevant, offsets, 5).mean()),
        "ndcg5": float(ndcg(ranked, relevant, offsets, 5).mean()),
        "recall10": float(recall10.mean()),
        "ndcg10": float(ndcg(ranked, relevant, offsets, 10).mean()),
        "coverage10": catalogue_coverage(ranked, len(train_counts), 10),
        **{
            f"{name}_recall10": float(recall10[parts[name]].mean())
            for name in ("cold", "long_tail")
            if parts[name].any()
        },
    }


def sid_metrics(ranked: NDArray[np.int32], cases: Cases, codes_NL: NDArray[np.int32]) -> dict[str, float]:
    """Figures of a ranking, SID by SID.

    ``corrected_recall10`` is CCE (arXiv 2605.25330): each relevant item whose SID is hit counts one over the number of
    items that share this SID, the chance to show the right one of them.

    Args:
        ranked: int32 ``[n_cases, at least 10]``, item rows.
        cases: what would have been right.
        codes_NL: int32 ``[n_items, n_levels]``, codes without a dedup level.
    """
    offsets, groups = cases.relevant_offsets, SidGroups.from_codes(codes_NL)
    sids, wanted = groups.ranked(ranked)[:, :10], groups.relevant(cases.relevant)
    n_relevant = np.diff(offsets)
    case = np.repeat(np.arange(len(cases)), n_relevant)
    sharing = np.bincount(groups.of_item, minlength=groups.n_sids)
    credit = (sids[case] == wanted[:, None]).any(axis=1) / sharing[wanted]
    return {
        "sid_recall10": float(recall(sids, wanted, offsets, 10).mean()),
        "corrected_recall10": float((np.bincount(case, credit, len(cases)) / n_relevant).mean()),
    }


def _baseline_rows(
    grid: Grid, shop: Shop, cases: Cases, split: Split, sasrec: bool, console: Console
) -> dict[str, dict[str, float]]:
    """What rankings that need no IDs reach on the same cases; none for a shop without histories."""
    histories, n_items = shop.histories, len(shop.items)
    if not len(LeaveOneOut(histories).targets(split)[0]):
        return {}
    popularity = Popularity.fit(histories, LeaveOneOut(histories).train_ends(), n_items)
    baselines: dict[str, Baseline] = {
        "popularity": popularity,
        "markov": Markov.fit(histories, n_items, transitions=_transitions(split)),
    }
    if sasrec:
        cache = grid.work / "baselines"
        baselines["sasrec"] = Sasrec.fit(histories, n_items, config=grid.recipe.sasrec, cache=cache, console=console)
    return {
        name: item_metrics(baseline.rank(histories, cases, K, exclude_seen=shop.exclude_seen), cases, popularity.counts)
        for name, baseline in baselines.items()
    }


def _transitions(split: Split) -> Transitions:
    return "training + validation" if split == "test" else "training"


def _downstream_row(recipe: ComparisonRecipe, name: str, measured: dict[tuple[str, int], Measured]) -> DownstreamRow:
    cells = [measured[name, seed].metrics for seed in recipe.seeds]
    compared = recipe.tokenizers[name]
    return DownstreamRow(
        {metric: tuple(cell[metric] for cell in cells) for metric in METRICS if metric in cells[0]},
        compared.reference,
        compared.published.gains if compared.published else None,
        compared.published.source if compared.published else "",
    )


def _protocol(recipe: ComparisonRecipe, shop: Shop, split: Split, n_cases: int) -> str:
    sizes, training = recipe.generator, recipe.training
    sample = f" of {len(shop.cases(split)):,}, a fixed sample" if n_cases < len(shop.cases(split)) else ""
    return (
        f"{shop.name}, {split} split, {n_cases:,} cases{sample}; {len(shop.items):,} items ranked; seen items "
        f"{'removed' if shop.exclude_seen else 'kept'}; order: {shop.histories.order_rule}; beam "
        f"{recipe.evaluation.beam_width}; generator of width {sizes.d_model}, {sizes.n_encoder_layers} + "
        f"{sizes.n_decoder_layers} layers, {training.epochs} epochs; Markov counted {_transitions(split)} transitions"
    )


def _figures(comparison: Comparison) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, measured in comparison.rows.items():
        figures[f"tokenize.{name}.collision_rate"] = Figure(measured.collision_rate_before_dedup, "share of items")
        figures[f"tokenize.{name}.icr"] = Figure(measured.icr, "share of items")
        figures[f"tokenize.{name}.sid_entropy"] = Figure(measured.sid_entropy_bits, "bits")
    for name, row in (comparison.downstream or {}).items():
        for metric, values in row.metrics.items():
            spread = (min(values), max(values))
            figures[f"tokenize.{name}.{metric}"] = Figure(float(np.mean(values)), _UNITS.get(metric, "share"), spread)
        if (gain := comparison.gain(name, "recall10")) and gain.low is not None and gain.high is not None:
            figures[f"tokenize.{name}.recall10_gain"] = Figure(gain.mean, "relative", (gain.low, gain.high))
    for name, values_of in comparison.baselines.items():
        for metric, value in values_of.items():
            figures[f"tokenize.baseline.{name}.{metric}"] = Figure(value, _UNITS.get(metric, "share"))
    return figures
