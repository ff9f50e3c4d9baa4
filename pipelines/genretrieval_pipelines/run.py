"""A whole run: logs to bundle, stage after stage, each resumable.

Everything a stage makes lies in the work folder under a name that hashes what it was made from. A run that was killed
goes on where it stopped; a changed recipe or changed logs redo what depends on them and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from accelerate import PartialState
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from genretrieval.bundle import (
    CATALOGUE,
    CODEBOOKS,
    CONFIG,
    GRAPH,
    ITEM_VECTORS,
    KEYWORDS,
    METRICS,
    MODEL_CARD,
    QUERY_TOKENIZER,
    WEIGHTS,
    Bundle,
    Manifest,
    check_output,
    load_bundle,
    write_bundle,
)
from genretrieval.errors import BundleError, DataError, InvalidInputError, RecipeError
from genretrieval.export import export_graph
from genretrieval.export.onnx import example_inputs, named_graph
from genretrieval.features import RequestFeatures
from genretrieval.figures import Figure
from genretrieval.histories import Split
from genretrieval.model import Generator
from genretrieval.retrieval import Backend, Retriever
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines import ablation, quality_report
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.draft import Draft, draft_bundle, reads, request_features
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_pipelines.evaluate import Answer, Answers, Evaluation, ask
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.stages import stage_inputs
from genretrieval_pipelines.tokenize import Tokenized, tokenize
from genretrieval_pipelines.train_generator import train_generator

OpenBackend = Callable[[Path], Backend]
NOT_MEASURED = (
    "Not measured: no user has three interactions, and no query is held out. The bundle can be served, but nothing is "
    "known of its quality"
)


def run(
    recipe: Recipe,
    data: Path,
    output: Path,
    work: Path,
    *,
    open_backend: OpenBackend,
    console: Console,
    evaluate: bool = True,
) -> dict[str, Figure]:
    """Run `recipe` on the logs in `data` and write a bundle to `output`.

    Args:
        recipe: all settings.
        data: a folder of house Parquet.
        output: the bundle; an older bundle there is replaced once the new one is complete.
        work: folder of intermediate results; give the same one again to resume.
        open_backend: opens an exported graph.
        console: progress and tables.
        evaluate: measure the bundle beside its baselines; without it nothing is known of its quality.

    Returns:
        Figures of the validation table; under torchrun, nothing in all processes but the first.

    Raises:
        BundleError: `output` is there and is no bundle.
        InvalidInputError: `data` or `work` lies in it.
        RecipeError: the recipe has an ablation, and several processes of torchrun run it.
    """
    check_output(output)
    for folder in (data, work):
        if folder.resolve().is_relative_to(output.resolve()):
            raise InvalidInputError(f"{folder} lies in {output}, which is replaced whole; choose another output folder")
    transformers_logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.cuda.is_available())
    if recipe.ablation is not None and processes.num_processes > 1:
        raise RecipeError(
            "the trainings of an ablation are not shared among the processes of torchrun, which would wait for each "
            "other for ever; start one process, with `ablation.jobs`, or take `ablation` out of the recipe"
        )
    work.mkdir(parents=True, exist_ok=True)
    with processes.main_process_first():
        # Under torchrun the first process prepares; the others then find everything in the work folder.
        with stage(console, "reading and checking logs"):
            shop = open_shop(data, work, console if processes.is_main_process else None)
        with stage(console, "embedding and tokenizing the catalogue"):
            tokenized = tokenize(recipe, shop, work)
        with stage(console, "preparing requests"):
            features = request_features(recipe, shop, tokenized.keywords)
    if processes.is_main_process:
        console.print(tokenized.report, style="dim", highlight=False, markup=False, soft_wrap=True)
    ablated = None
    if recipe.ablation is not None:
        ablated = ablation.without_impossible_rows(recipe, shop, console)
        # Before the bundle's own training, which is then read back: all are trained alike.
        ablation.train_cells(ablated, shop, work, console)
    draft = draft_bundle(recipe, shop, tokenized.ids, features)
    started = time.perf_counter()
    trained = train_generator(stage_inputs(recipe, shop, tokenized.ids, draft, work, console))
    console.print(f"training the generator: {time.perf_counter() - started:.1f} s", style="dim", highlight=False)
    if not processes.is_main_process:
        return {}
    evaluation = make_evaluation(recipe, shop, tokenized.ids, work, console)
    generator = trained.generator
    draft = trained.draft(draft)
    with write_bundle(output, draft.manifest) as folder:
        with stage(console, "exporting the retrieval graph"):
            graph = named_graph(generator)
            example = example_inputs(graph, max(1, len(features.profile_features)))
            export_graph(graph, example, folder / GRAPH)
        with stage(console, "evaluating on validation, beside the baselines"):
            retriever = Retriever(draft, open_backend(folder / GRAPH))
            asked = partial(_ask, retriever.retrieve, shop, recipe, tokenized.ids, console)
            quality = None
            if evaluate and len(shop.cases("validation")):
                quality = evaluation.report(
                    asked, "validation", seed=recipe.training.seed, beam_width=recipe.evaluation.beam_width
                )
        figures = quality_report.write(quality, work / "quality") if quality else {}
        _fill_bundle(folder, recipe, shop, tokenized, features, generator, draft, data, work, quality)
    load_bundle(output)
    if ablated is not None:
        found = ablation.ablate(ablated, shop, work, open_backend)
        (work / "quality").mkdir(exist_ok=True)
        (work / "quality" / ablation.MARKDOWN).write_text(ablation.markdown(found), "utf-8")
        ablation.print_tables(found, console)
        figures |= found.figures()
    if quality:
        quality_report.print_table(quality, console)
    else:
        console.print(NOT_MEASURED, style="yellow")
    return figures


@contextmanager
def stage(console: Console, name: str) -> Iterator[None]:
    """Say what is being done and how long it took."""
    started = time.perf_counter()
    with console.status(name) if console.is_terminal else nullcontext():
        yield
    console.print(f"{name}: {time.perf_counter() - started:.1f} s", style="dim", highlight=False)


def make_evaluation(recipe: Recipe, shop: Shop, ids: SemanticIds, work: Path, console: Console) -> Evaluation:
    """The quality table of a run."""
    texts = [part for part in recipe.embedding if part.reads_text]
    return Evaluation(
        shop,
        ids,
        dedup_level=recipe.collisions.method == "dedup",
        sasrec=recipe.evaluation.sasrec,
        text=texts[0] if texts else EmbeddingPart(name="hashing"),
        cache=work / "baselines",
        console=console,
    )


def _ask(answer: Answer, shop: Shop, recipe: Recipe, ids: SemanticIds, console: Console, cases: Cases) -> Answers:
    beams = recipe.evaluation.beam_width
    return ask(answer, shop, cases, ids, reads(recipe, shop), beams, console)


def _fill_bundle(
    folder: Path,
    recipe: Recipe,
    shop: Shop,
    tokenized: Tokenized,
    features: RequestFeatures,
    generator: Generator,
    draft: Draft,
    data: Path,
    work: Path,
    quality: quality_report.QualityReport | None,
) -> None:
    """Write everything but the graph and the manifest."""
    save_file({name: t.contiguous() for name, t in generator.state_dict().items()}, folder / WEIGHTS)
    generator.config.save_pretrained(folder)
    (folder / CODEBOOKS).write_bytes(tokenized.codebooks.read_bytes())
    draft.table.write_parquet(folder / CATALOGUE)
    if draft.vectors is not None:
        np.save(folder / ITEM_VECTORS, draft.vectors, allow_pickle=False)
    if features.query_tokenizer:
        (folder / QUERY_TOKENIZER).write_text(features.query_tokenizer, "utf-8")
    if features.keywords is not None:
        features.keywords.save(folder / KEYWORDS)
    # Whole paths: `evaluate` may be called from another folder.
    run_record = {
        "recipe": recipe.dump(),
        "data": str(data.resolve()),
        "logs_sha256": shop.fingerprint,
        "work": str(work.resolve()),
    }
    (folder / CONFIG).write_text(yaml.safe_dump(run_record, sort_keys=False), "utf-8")
    if quality:
        (folder / METRICS).write_bytes((work / "quality" / "metrics.json").read_bytes())
    (folder / MODEL_CARD).write_text(_model_card(shop, draft.manifest, generator, quality), "utf-8")


def _model_card(
    shop: Shop, manifest: Manifest, generator: Generator, quality: quality_report.QualityReport | None
) -> str:
    parameters = sum(p.numel() for p in generator.parameters())
    tables = "\n".join(
        f"| {name} | {rows.read:,} | {rows.kept:,} | {rows.quarantined:,} |"
        for name, rows in shop.logs.report.tables.items()
    )
    return f"""---
library_name: genretrieval
tags: [generative-retrieval, semantic-id]
---
# Generative retriever for {shop.name}

Bundle `{manifest.version}`, written by genretrieval {manifest.genretrieval_version}. It generates the semantic IDs of
{manifest.n_items:,} items with {parameters / 1e6:.1f} M parameters; codebooks {manifest.codebook_sizes}. It reads
{"queries and " if manifest.reads_queries else ""}histories of up to {manifest.max_history} interactions with the
behaviours {", ".join(manifest.events) or "none"}.

Serve it: `genretrieval serve --bundle FOLDER`. It can return the items of its catalogue and no others.

## Data
| | rows read | used | in quarantine |
|---|---:|---:|---:|
{tables}

## Quality
{quality_report.markdown(quality) if quality else NOT_MEASURED}
"""


def evaluate_bundle(
    bundle: Bundle, data: Path | None, split: Split, answer: Answer, console: Console
) -> quality_report.QualityReport:
    """Measure a bundle as it stands, by `answer`, beside the baselines of its run.

    Args:
        bundle: what to measure.
        data: the logs; by default those it was trained on.
        split: validation, or test, which is counted.
        answer: offline retrieval, or the client of a live server.
        console: progress, and whether the logs are those it was trained on.

    Raises:
        BundleError: the logs it was trained on are gone and none were given.
        DataError: the logs have other items than the bundle.
    """
    recipe, shop, work = recorded_run(bundle, data, console)
    ids = catalogue_ids(bundle, shop.items)
    evaluation = make_evaluation(recipe, shop, ids, work, console)
    asked = partial(_ask, answer, shop, recipe, ids, console)
    return evaluation.report(asked, split, seed=recipe.training.seed, beam_width=recipe.evaluation.beam_width)


def recorded_run(bundle: Bundle, data: Path | None = None, console: Console | None = None) -> tuple[Recipe, Shop, Path]:
    """The recipe that a bundle came from, its logs, and the folder of its intermediate results.

    Args:
        bundle: a bundle that a run wrote.
        data: the logs; by default those it was trained on.
        console: is told what the logs hold, and whether they are those that the bundle was trained on.

    Raises:
        BundleError: no run wrote it, or the logs it was trained on are gone and none were given.
        DataError: the logs have other items than the bundle.
    """
    if CONFIG not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no {CONFIG}: no run wrote it, so there is nothing to measure it by")
    record: dict[str, Any] = yaml.safe_load((bundle.path / CONFIG).read_text("utf-8"))
    recipe, work = Recipe.model_validate(record["recipe"]), Path(record["work"])
    data = data or Path(record["data"])
    if not data.is_dir():
        raise BundleError(f"the logs of this bundle are no longer at {data}; give them with --data")
    shop = open_shop(data, work, console)
    _check_items(bundle, shop)
    # Bundles of before this was recorded say nothing.
    if console is not None and record.get("logs_sha256", shop.fingerprint) != shop.fingerprint:
        console.print(
            f"the logs in {data} are not those that {bundle.path} was trained on: cases may be among what it has "
            "learnt, and figures are not comparable with those of its run",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return recipe, shop, work


def _check_items(bundle: Bundle, shop: Shop) -> None:
    """Refuse to measure a bundle by the logs of another catalogue."""
    own, given = bundle.catalogue()["item_id"], shop.items["item_id"]
    problems = [
        f"{len(items):,} items {where} (first {', '.join(items.head(3))})"
        for where, items in (
            ("of the logs are not in the bundle", given.filter(~given.is_in(own.implode()))),
            ("of the bundle are not in the logs", own.filter(~own.is_in(given.implode()))),
        )
        if len(items)
    ]
    if problems:
        raise DataError(
            f"{shop.data} and {bundle.path} have different catalogues: {' and '.join(problems)}. The bundle answers "
            "with its own items and its baselines with all of the logs', so they cannot be compared; give logs of its "
            "items with --data, or run the recipe on these"
        )


def catalogue_ids(bundle: Bundle, items: pl.DataFrame | None = None) -> SemanticIds:
    """Semantic IDs of a bundle's items, in its row order or, where `items` are given, in theirs."""
    table = bundle.catalogue().select("item_id", "semantic_id")
    if items is not None:
        table = items.select("item_id").join(table, on="item_id", how="left", maintain_order="left")
    codes: NDArray[np.int32] = np.asarray(table["semantic_id"].to_list(), np.int32)
    return SemanticIds(codes, bundle.manifest.codebook_sizes)


def work_folder(bundle: Bundle) -> Path:
    """Where the run that wrote a bundle kept its intermediate results."""
    return Path(yaml.safe_load((bundle.path / CONFIG).read_text("utf-8"))["work"])


def set_threads(n_threads: int | None) -> None:
    """Use `n_threads` cores for training; results are equal at equal thread count."""
    if n_threads:
        torch.set_num_threads(n_threads)
