"""What each part of a recipe is worth: the same training with one part changed, seed by seed.

Two tables. *Parts*: the recipe's supervised stages, trained with each change by itself, against the recipe as it is.
*Stages*: all stages of the recipe, each against the one before it. Seeds are paired, and a gain stands beside its
interval, what the training cost and how long a request takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from genretrieval.export import export_graph
from genretrieval.export.onnx import example_inputs, named_graph
from genretrieval.figures import Figure
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Backend, Retriever
from genretrieval_pipelines.cells import in_processes, on_one_thread
from genretrieval_pipelines.draft import Draft, StageResult, Trained, draft_bundle, reads, request_features
from genretrieval_pipelines.evaluate import requests
from genretrieval_pipelines.recipe import Recipe, SupervisedStage
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.stages import stage_inputs
from genretrieval_pipelines.tokenize import tokenize
from genretrieval_pipelines.train_generator import train_generator
from genretrieval_tokenizers.comparison import Gain, paired_gain

REFERENCE = "reference"
WHOLE = "whole"
MARKDOWN = "ablation.md"
_TIMED_REQUESTS = 50
_ROUNDS = 5
_TABLE_WIDTH = 160
_UNITS = {"recall10": "share of cases", "ndcg10": "share of cases", "utility": "of the best item's worth"}


@dataclass(frozen=True)
class Row:
    """One line of a table: equal settings, one value a seed.

    Attributes:
        name: of the change, or of the stage.
        results: one a seed.
        seconds: of training (on a CPU, of all cores together), mean of the seeds; of the stage alone in the table of
            stages.
        parameters: of the generator, in millions.
        latency_ms: median of single requests, this row's in turn with the others'; None where it is not measured.
        against: results of what it is compared with; None for the first.
    """

    name: str
    results: tuple[StageResult, ...]
    seconds: float
    parameters: float
    latency_ms: float | None = None
    against: tuple[StageResult, ...] | None = None

    def measured(self, metric: str) -> bool:
        """Whether there is such a metric: only a made shop knows `utility`."""
        return getattr(self.results[0], metric) is not None

    def values(self, metric: str) -> tuple[float, ...]:
        """`recall10`, `ndcg10` or `utility`, one a seed."""
        return tuple(getattr(result, metric) for result in self.results)

    def gain(self, metric: str) -> Gain | None:
        """Over what it is compared with; None for the first, and where that found nothing at all."""
        if self.against is None:
            return None
        reference = tuple(getattr(result, metric) for result in self.against)
        return paired_gain(self.values(metric), reference) if any(reference) else None


@dataclass(frozen=True)
class Ablation:
    """Both tables of a recipe.

    Attributes:
        parts: the reference, then every change.
        stages: in the order of training.
        seeds: of all rows.
        caption: data and protocol in a line.
    """

    parts: list[Row]
    stages: list[Row]
    seeds: list[int]
    caption: str

    def figures(self) -> dict[str, Figure]:
        """Every number by its dotted name; the spread of a metric is its lowest and highest seed."""
        found: dict[str, Figure] = {}
        for table, rows in (("part", self.parts), ("stage", self.stages)):
            for row in rows:
                key = f"ablation.{table}.{row.name}"
                for metric, unit in _UNITS.items():
                    if not row.measured(metric):
                        continue
                    values = row.values(metric)
                    found[f"{key}.{metric}"] = Figure(statistics.fmean(values), unit, (min(values), max(values)))
                    gain = row.gain(metric)
                    if gain is not None:
                        interval = None if gain.low is None or gain.high is None else (gain.low, gain.high)
                        found[f"{key}.{metric}_gain"] = Figure(gain.mean, "relative", interval)
                found[f"{key}.seconds"] = Figure(row.seconds, "s")
                if row.latency_ms is not None:
                    found[f"{key}.latency_ms"] = Figure(row.latency_ms, "ms")
        return found


def ablate(recipe: Recipe, shop: Shop, work: Path, open_backend: Callable[[Path], Backend]) -> Ablation:
    """Both tables, from what `train_cells` has trained; what is missing is trained here.

    Args:
        recipe: with an `ablation` section.
        shop: the logs.
        work: the folder of the run.
        open_backend: opens an exported graph, whose requests are timed.
    """
    assert recipe.ablation is not None
    seeds = recipe.ablation.seeds
    recipes = _recipes(recipe)
    in_turn = [REFERENCE, *recipe.ablation.rows]
    trained = {name: [_train(recipes[name], seed, shop, work) for seed in seeds] for name in in_turn}
    latencies = _latencies(trained, recipes, shop, work, open_backend)
    reference = tuple(model.stages[-1] for model, _ in trained[REFERENCE])
    parts = [
        Row(
            name,
            tuple(model.stages[-1] for model, _ in cells),
            statistics.fmean(sum(stage.seconds for stage in model.stages) for model, _ in cells),
            cells[0][0].generator.num_parameters() / 1e6,
            latencies[name],
            None if name == REFERENCE else reference,
        )
        for name, cells in trained.items()
    ]
    full = [_train(recipes[WHOLE], seed, shop, work)[0] for seed in seeds]
    caption = (
        f"{shop.name}, validation, up to {recipe.training.validation_users:,} cases, {len(seeds)} paired seeds, "
        f"beam {recipe.evaluation.beam_width}; 95 % t-intervals over seeds"
    )
    return Ablation(parts, _stage_rows(full), seeds, caption)


def without_impossible_rows(recipe: Recipe, shop: Shop, console: Console) -> Recipe:
    """The recipe with those rows of its ablation that the logs allow; the others are named on `console`."""
    assert recipe.ablation is not None
    known = [name for name in shop.histories.scenario_names if name is not None]
    rows = {}
    for name, change in recipe.ablation.rows.items():
        stages = recipe.changed(change).stages
        asked = {stage.scenario for stage in stages if isinstance(stage, SupervisedStage) and stage.scenario}
        if unknown := sorted(asked - set(known)):
            console.print(
                f"ablation, {name}: left out, as these logs have no scenario {', '.join(unknown)}; they have "
                f"{', '.join(known) or 'none'}",
                style="yellow",
                highlight=False,
                markup=False,
            )
        else:
            rows[name] = change
    return recipe.model_copy(update={"ablation": recipe.ablation.model_copy(update={"rows": rows})})


def train_cells(recipe: Recipe, shop: Shop, work: Path, console: Console) -> None:
    """Train every row with every seed, each on one thread, as many at a time as the ablation's `jobs`.

    The steps of a small model are too short to be shared by threads: as many trainings as there are cores take a
    fraction of the time of one after another on all cores. What has been trained before is not trained again.

    Raises:
        GenRetrievalError: a training could not be done; those that were are kept.
    """
    assert recipe.ablation is not None
    recipes = _recipes(recipe)
    for of_row in recipes.values():
        tokenize(of_row, shop, work)  # seeds share it, so it is there before they begin
    cells = [(name, seed) for name in recipes for seed in recipe.ablation.seeds]
    if recipe.ablation.jobs > 1 and not torch.cuda.is_available():
        in_processes(partial(_train_cell, recipes, shop.data, work), cells, recipe.ablation.jobs, "training", console)
        return
    for number, (name, seed) in enumerate(cells, 1):
        trained, _ = _train(recipes[name], seed, shop, work)
        line = f"training {number} of {len(cells)}: {name}, seed {seed}: {_reached(trained)}"
        console.print(line, style="dim", highlight=False, markup=False)


def _recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Of every row, in the order of training.

    The whole recipe takes longest, so it is first. The reference is its supervised stages: at the end it finds them
    trained, and earlier it would wait for them.
    """
    assert recipe.ablation is not None
    supervised = [stage for stage in recipe.stages if isinstance(stage, SupervisedStage)]
    base = recipe.model_copy(update={"stages": supervised, "ablation": None})
    rows = {name: base.changed(change) for name, change in recipe.ablation.rows.items()}
    return {WHOLE: recipe.model_copy(update={"ablation": None}), **rows, REFERENCE: base}


def _train_cell(recipes: dict[str, Recipe], data: Path, work: Path, name: str, seed: int) -> str:
    """In a process of its own: train a row with a seed, and say what it reached."""
    PartialState(cpu=True)
    trained, _ = _train(recipes[name], seed, open_shop(data, work), work)
    return _reached(trained)


def _reached(trained: Trained) -> str:
    return f"NDCG@10 {trained.stages[-1].ndcg10:.4f}"


@on_one_thread()
def _train(recipe: Recipe, seed: int, shop: Shop, work: Path) -> tuple[Trained, Draft]:
    recipe = recipe.model_copy(update={"training": replace(recipe.training, seed=seed)})
    tokenized = tokenize(recipe, shop, work)
    draft = draft_bundle(recipe, shop, tokenized.ids, request_features(recipe, shop, tokenized.keywords))
    trained = train_generator(stage_inputs(recipe, shop, tokenized.ids, draft, work, Console(quiet=True)))
    return trained, trained.draft(draft)


def _stage_rows(models: Sequence[Trained]) -> list[Row]:
    """Every stage against the one before it."""
    by_stage = list(zip(*(model.stages for model in models), strict=True))
    names = [results[0].objective for results in by_stage]
    rows: list[Row] = []
    for number, results in enumerate(by_stage):
        repeated = names[:number].count(names[number])
        name = names[number] + (f"_{repeated + 1}" if repeated else "")
        seconds = statistics.fmean(result.seconds for result in results)
        parameters = models[0].generator.num_parameters() / 1e6
        before = by_stage[number - 1] if number else None
        rows.append(Row(name, results, seconds, parameters, None, before))
    return rows


def _latencies(
    trained: dict[str, list[tuple[Trained, Draft]]],
    recipes: dict[str, Recipe],
    shop: Shop,
    work: Path,
    open_backend: Callable[[Path], Backend],
) -> dict[str, float]:
    """Median milliseconds of a single request to the exported graph of every row, the rows in turn."""
    asked: dict[str, tuple[Retriever, list[RetrieveRequest]]] = {}
    cases = shop.cases("validation")
    cases = cases.take(np.unique(np.linspace(0, len(cases) - 1, _TIMED_REQUESTS).astype(np.int64)))
    for name, cells in trained.items():
        model, draft = cells[0]
        graph = named_graph(model.generator)
        path = work / "ablation" / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        export_graph(graph, example_inputs(graph, max(1, len(draft.request_features.profile_features))), path)
        recipe = recipes[name]
        sent = list(requests(shop, cases, reads(recipe, shop), recipe.evaluation.beam_width))
        asked[name] = (Retriever(draft, open_backend(path)), sent)
    times: dict[str, list[float]] = {name: [] for name in asked}
    for retriever, sent in asked.values():
        retriever.retrieve(sent[:1])
    for _ in range(_ROUNDS):
        for name, (retriever, sent) in asked.items():
            for request in sent:
                started = time.perf_counter()
                retriever.retrieve([request])
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(of_row) for name, of_row in times.items()}


def print_tables(ablation: Ablation, console: Console) -> None:
    """Both tables, on `console`; as Markdown where it is too narrow for their columns, as files and pipes are."""
    if console.width < _TABLE_WIDTH:
        console.print(markdown(ablation), highlight=False, markup=False, soft_wrap=True)
        return
    for title, rows in _tables(ablation):
        table = Table(title=title, caption=ablation.caption)
        for number, column in enumerate(_header(rows)):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)


def markdown(ablation: Ablation) -> str:
    """Both tables, for a page."""
    pages = []
    for title, rows in _tables(ablation):
        header = _header(rows)
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *map(_cells, rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        pages.append(f"### {title}\n\n{ablation.caption}\n\n{body}\n")
    return "\n".join(pages)


def _tables(ablation: Ablation) -> list[tuple[str, list[Row]]]:
    tables = [("Parts, each changed by itself", ablation.parts), ("Stages, each over the one before", ablation.stages)]
    return [(title, rows) for title, rows in tables if rows]


def _scenarios(row: Row) -> list[str]:
    return sorted({name for result in row.results for name in result.by_scenario})


def _header(rows: list[Row]) -> list[str]:
    utility = ["true utility", "gain"] if rows[0].measured("utility") else []
    scenarios = [f"Recall@10, {name}" for name in _scenarios(rows[0])]
    return ["", "Recall@10", "NDCG@10", "gain", *utility, *scenarios, "training, s", "parameters, M", "request, ms"]


def _cells(row: Row) -> list[str]:
    utility = [_spread(row.values("utility")), _gain(row.gain("utility"))] if row.measured("utility") else []
    by_scenario = [
        f"{statistics.fmean(result.by_scenario[name] for result in row.results):.4f}" for name in _scenarios(row)
    ]
    return [
        row.name,
        _spread(row.values("recall10")),
        _spread(row.values("ndcg10")),
        _gain(row.gain("ndcg10")),
        *utility,
        *by_scenario,
        f"{row.seconds:.0f}",
        f"{row.parameters:.2f}",
        "" if row.latency_ms is None else f"{row.latency_ms:.1f}",
    ]


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain.low is None or gain.high is None else f" [{gain.low:+.1%}, {gain.high:+.1%}]"
    return f"{gain.mean:+.1%}{interval}"


def _spread(values: tuple[float, ...]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"
