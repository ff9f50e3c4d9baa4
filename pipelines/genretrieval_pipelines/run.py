"""A whole run: logs to bundle, stage after stage, each resumable.

Everything a stage makes lies in the work folder under a name that hashes what it was made from. A run that was killed
goes on where it stopped; a changed recipe or changed logs redo what depends on them and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
from rich.progress import Progress, TaskID
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.utils import logging as transformers_logging

from genretrieval import __version__
from genretrieval.bundle import (
    CATALOGUE,
    CODEBOOKS,
    CONFIG,
    GRAPH,
    ITEM_VECTORS,
    METRICS,
    MODEL_CARD,
    QUERY_TOKENIZER,
    WEIGHTS,
    Bundle,
    Manifest,
    load_bundle,
    write_bundle,
)
from genretrieval.catalogue import build_index
from genretrieval.errors import BundleError
from genretrieval.export import MINIMUM_ONNXRUNTIME, OPSET, GraphBackend, export_graph
from genretrieval.export.onnx import example_inputs, named_graph
from genretrieval.features import N_GAPS, RequestFeatures
from genretrieval.figures import Figure
from genretrieval.histories import LeaveOneOut, Split
from genretrieval.metrics import ndcg, recall
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.retrieval import Backend, Retriever
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.data import HistoryDataset, cut_windows
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.trainer import METRIC, train
from genretrieval_pipelines import quality_report
from genretrieval_pipelines.baselines.ranking import Ranked
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.embed import EmbeddingPart, item_texts
from genretrieval_pipelines.evaluate import Answer, Answers, Evaluation, Reads, ask, without_seen
from genretrieval_pipelines.queries import has_queries, made_queries, searched, train_query_tokenizer, with_query_pairs
from genretrieval_pipelines.recipe import Objective, Recipe, content_hash
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.tokenize import Tokenized, embed_shop, tokenize

OpenBackend = Callable[[Path], Backend]
Metric = Callable[[Ranked, NDArray[np.int32], NDArray[np.int64], int], NDArray[np.float64]]
VALIDATION_BEAMS = 20
# The first judges checkpoints: both scores are log-probabilities of the same item.
DENSE_WEIGHTS = (1.0, 0.0, 0.25, 0.5, 2.0, 4.0, 8.0)
DENSE_WEIGHT = "dense_weight"
NOT_MEASURED = (
    "Not measured: no user has three interactions, and no query is held out. The bundle can be served, but nothing is "
    "known of its quality"
)


@dataclass(frozen=True)
class Draft:
    """A bundle that is not written yet; a `Retriever` can answer from it."""

    manifest: Manifest
    request_features: RequestFeatures
    table: pl.DataFrame
    vectors: NDArray[np.float32] | None = None

    def item_vectors(self) -> NDArray[np.float32] | None:
        """Item vectors of a model that has them."""
        return self.vectors

    def features(self) -> RequestFeatures:
        """How requests are turned into model inputs."""
        return self.request_features

    def catalogue(self) -> pl.DataFrame:
        """Items in row order."""
        return self.table


def run(
    recipe: Recipe, data: Path, output: Path, work: Path, *, open_backend: OpenBackend, console: Console
) -> dict[str, Figure]:
    """Run `recipe` on the logs in `data` and write a bundle to `output`.

    Args:
        recipe: all settings.
        data: a folder of house Parquet.
        output: the bundle; an older bundle there is replaced once the new one is complete.
        work: folder of intermediate results; give the same one again to resume.
        open_backend: opens an exported graph.
        console: progress and tables.

    Returns:
        Figures of the validation table; under torchrun, nothing in all processes but the first.
    """
    work.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        # Under torchrun the first process prepares; the others then find everything in the work folder.
        with stage(console, "reading and checking logs"):
            shop = open_shop(data, work)
        with stage(console, "embedding and tokenizing the catalogue"):
            tokenized = tokenize(recipe, shop, work)
        with stage(console, "preparing requests"):
            features = request_features(recipe, shop)
    if processes.is_main_process:
        console.print(tokenized.report, style="dim", highlight=False, markup=False)
    draft = draft_bundle(recipe, shop, tokenized.ids, features)
    content = embed_shop(recipe.embedding, shop, work) if recipe.generator.dense_head else None
    started = time.perf_counter()
    trained = train_generator(recipe, shop, tokenized, draft, work, console, content)
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
            if len(shop.cases("validation")):
                quality = evaluation.report(
                    asked, "validation", seed=recipe.training.seed, beam_width=recipe.evaluation.beam_width
                )
        figures = quality_report.write(quality, work / "quality") if quality else {}
        _fill_bundle(folder, recipe, shop, tokenized, features, generator, draft, data, work, quality)
    load_bundle(output)
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


def request_features(recipe: Recipe, shop: Shop) -> RequestFeatures:
    """What the model reads of a request: the behaviours, profile columns and words of this shop."""
    sizes = recipe.generator
    tokenizer: Tokenizer | None = None
    if has_queries(shop.histories) or len(shop.pairs):
        corpus = [
            *item_texts(shop.items),
            *shop.histories.queries,
            *shop.pairs["query"].unique(maintain_order=True),
        ]
        tokenizer = train_query_tokenizer(corpus, sizes.query_vocab_size)
    profile = tuple(name for name in shop.users.columns if name != "user_id")
    return RequestFeatures(
        events=shop.histories.event_names,
        profile_features=profile,
        n_profile_buckets=sizes.n_profile_buckets if profile else 0,
        query_tokenizer=tokenizer.to_str() if tokenizer else "",
        max_query_tokens=sizes.max_query_tokens,
        scenarios=shop.histories.scenario_names if sizes.scenario else (),
    )


def reads(recipe: Recipe, shop: Shop) -> Reads:
    """What the generator of this recipe reads of a history."""
    past = recipe.generator.max_past
    return Reads(recipe.generator.max_history, past, shop.logs.exposures() if past else None)


def draft_bundle(recipe: Recipe, shop: Shop, ids: SemanticIds, features: RequestFeatures) -> Draft:
    """Manifest and catalogue of the bundle to be."""
    trained = LeaveOneOut(shop.histories).trained()
    popularity = np.bincount(shop.histories.items[trained], minlength=ids.n_items)
    table = shop.items.with_columns(
        pl.Series("semantic_id", ids.codes.tolist(), pl.List(pl.Int32)),
        pl.Series("popularity", popularity, pl.Int64),
    )
    manifest = Manifest(
        genretrieval_version=__version__,
        n_items=ids.n_items,
        codebook_sizes=ids.codebook_sizes,
        leaf_cap=recipe.collisions.cap,
        opset=OPSET,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        graph_inputs=(),
        events=features.events,
        profile_features=features.profile_features,
        n_profile_buckets=features.n_profile_buckets,
        scenarios=features.scenarios,
        max_history=recipe.generator.max_history,
        max_past=recipe.generator.max_past,
        max_query_tokens=features.max_query_tokens,
        reads_queries=bool(features.query_tokenizer),
        beam_width=recipe.evaluation.beam_width,
        exclude_seen=shop.exclude_seen,
    )
    return Draft(manifest, features, table)


@dataclass(frozen=True)
class Trained:
    """A generator and how much its dense head has to say.

    Attributes:
        generator: in evaluation mode.
        dense_weight: of the dense head's score beside the log-probability of the codes; 0 without one.
    """

    generator: Generator
    dense_weight: float

    def draft(self, draft: Draft) -> Draft:
        """The bundle to be, of this generator."""
        manifest = draft.manifest.model_copy(
            update={"graph_inputs": named_graph(self.generator).names, "dense_weight": self.dense_weight}
        )
        return Draft(manifest, draft.request_features, draft.table, item_vectors(self.generator))


@torch.inference_mode()
def item_vectors(generator: Generator) -> NDArray[np.float32] | None:
    """Float32 ``[n_items, 2, D]`` of a model with a dense head."""
    if generator.dense is None:
        return None
    vectors: NDArray[np.float32] = generator.dense.item_vectors().float().cpu().numpy()
    return vectors


def train_generator(
    recipe: Recipe,
    shop: Shop,
    tokenized: Tokenized,
    draft: Draft,
    work: Path,
    console: Console,
    content: NDArray[np.float32] | None,
) -> Trained:
    """Train the generator, or read it back if this very training has finished before.

    Args:
        recipe: all settings.
        shop: the logs.
        tokenized: the items' semantic IDs.
        draft: the bundle to be.
        work: where it is kept.
        console: progress.
        content: float32 ``[n_items, C]``, what item vectors are made from; None for a model without a dense head.
    """
    sizes, features, ids = recipe.generator, draft.request_features, tokenized.ids
    config = GeneratorConfig(
        codebook_sizes=ids.codebook_sizes,
        d_model=sizes.d_model,
        n_heads=sizes.n_heads,
        d_ff=sizes.d_ff,
        n_encoder_layers=sizes.n_encoder_layers,
        n_decoder_layers=sizes.n_decoder_layers,
        n_query_layers=sizes.n_query_layers,
        n_experts=sizes.n_experts,
        experts_per_token=sizes.experts_per_token,
        query_vocab_size=features.query_vocab_size,
        max_query_tokens=sizes.max_query_tokens,
        n_events=features.n_events,
        n_gaps=N_GAPS,
        n_profile_buckets=features.n_profile_buckets,
        n_items=0 if content is None else len(content),
        content_dim=0 if content is None else content.shape[1],
        n_scenarios=features.n_scenarios,
        n_past_tokens=sizes.n_past_tokens if sizes.max_past else 0,
        max_past=sizes.max_past,
        max_history=sizes.max_history,
        dropout=sizes.dropout,
    )
    histories = shop.histories
    key = content_hash(
        config.to_dict(),
        recipe.training,
        recipe.stages,
        features.query_tokenizer,
        features.profile_features,
        ids.codes.tobytes(),
        b"" if content is None else np.ascontiguousarray(content).data,
        histories.items.data,
        histories.offsets.data,
        histories.events.data,
        histories.times.data,
        histories.query_rows.data,
        shop.fingerprint if sizes.max_past or features.scenarios else "",
        histories.event_names,
        histories.queries,
        *(table.write_ipc(None).getvalue() for table in (shop.pairs, shop.users)),
    )
    folder = work / f"generator-{key}"
    finished = folder / "generator.safetensors"
    set_seed(recipe.training.seed)
    model = Generator(config)
    if model.dense is not None and content is not None:
        model.dense.set_content(torch.from_numpy(content))
    if finished.exists():
        with safe_open(finished, "pt") as file:
            dense_weight = float(file.metadata()[DENSE_WEIGHT])
        model.load_state_dict(load_file(finished))
        return Trained(model.eval(), dense_weight)
    index = build_index(ids, order=-draft.table["popularity"].to_numpy())
    validate = partial(validation_recall, shop, draft, ids, recipe)
    for number, stage_ in enumerate(recipe.stages):
        dataset = training_set(recipe, shop, ids, features, stage_.objective)
        if not len(dataset):
            console.print(f"stage {stage_.objective}: left out, as this shop has no queries", style="yellow")
            continue
        console.print(f"stage {stage_.objective}: {len(dataset):,} histories", style="dim", highlight=False)
        train(
            model,
            NextItemObjective(index, dataset.trained_items()),
            dataset,
            validate,
            stage_.config(recipe.training),
            folder / f"{number}-{stage_.objective}",
            callbacks=(TrainingProgress(console),),
        )
    dense_weight = choose_dense_weight(shop, draft, ids, recipe, model.eval()) if model.dense is not None else 0.0
    partial_file = folder / "generator.partial.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial_file, {DENSE_WEIGHT: repr(dense_weight)})
    os.replace(partial_file, finished)
    return Trained(model, dense_weight)


class TrainingProgress(TrainerCallback):
    """A rich progress bar on a terminal; one line an evaluation elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("training the generator", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move it."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Say how good it has become."""
        value = metrics[f"eval_{METRIC}"]
        line = f"epoch {state.epoch or 0:.0f} of {state.num_train_epochs}: validation Recall@10 {value:.4f}"
        self.console.print(line, style="dim", highlight=False)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Remove it."""
        self.bar.stop()


def training_set(
    recipe: Recipe, shop: Shop, ids: SemanticIds, features: RequestFeatures, objective: Objective = "next_item"
) -> HistoryDataset:
    """What a stage learns from.

    For `next_item`, windows over the training part of every history, and every training pair of a query and an item;
    for the others such pairs alone.
    """
    pairs = shop.pairs.filter(pl.col("split") == "train").select("query", "item_row")
    if objective == "alignment":
        held_out = shop.pairs.filter(pl.col("split") != "train")
        pairs = made_queries(shop.items).join(held_out.select("query"), on="query", how="anti", maintain_order="left")
    elif objective == "cooccurrence":
        pairs = pl.concat([pairs, searched(shop.histories)]).unique(maintain_order=True)
    if not features.query_tokenizer:
        pairs = pairs.clear()
    n_users = shop.histories.n_users
    histories = with_query_pairs(shop.histories, pairs)
    ends = np.concatenate([LeaveOneOut(shop.histories).train_ends(), histories.offsets[n_users + 1 :]])
    windows = cut_windows(histories.offsets, ends, recipe.generator.max_history)
    if objective != "next_item":
        windows = windows.of_users(n_users)
    profiles = np.zeros((histories.n_users, len(features.profile_features)), np.int64)
    if features.profile_features:
        anonymous = features.profile_ids({})
        profiles[:] = anonymous
        for user in range(n_users):
            profiles[user] = features.profile_ids(shop.profile(user))
    read = reads(recipe, shop)
    return HistoryDataset(histories, windows, ids, features, profiles, max_past=read.past, exposures=read.exposures)


def validation_recall(shop: Shop, draft: Draft, ids: SemanticIds, recipe: Recipe, model: Generator) -> float:
    """Recall@10 of a generator on a fixed sample of validation cases, by beam search in torch."""
    trained = Trained(model, DENSE_WEIGHTS[0] if model.dense is not None else 0.0)
    cases, answers = _validate(shop, draft, ids, recipe, trained, VALIDATION_BEAMS)
    return _mean_of(recall, shop, cases, answers.items)


def choose_dense_weight(shop: Shop, draft: Draft, ids: SemanticIds, recipe: Recipe, model: Generator) -> float:
    """The weight of the dense head, of `DENSE_WEIGHTS`, with the best NDCG@10 on the cases that judge checkpoints.

    The search is as wide as the one that is served: a narrower one leaves the dense head less to choose from. At equal
    NDCG@10 the earlier weight.
    """
    trained = Trained(model, DENSE_WEIGHTS[0])
    cases, answers = _validate(shop, draft, ids, recipe, trained, recipe.evaluation.beam_width)
    found = [_mean_of(ndcg, shop, cases, answers.reweighted(weight - DENSE_WEIGHTS[0])) for weight in DENSE_WEIGHTS]
    return DENSE_WEIGHTS[int(np.argmax(found))]


def _validate(
    shop: Shop, draft: Draft, ids: SemanticIds, recipe: Recipe, trained: Trained, beam_width: int
) -> tuple[Cases, Answers]:
    cases = shop.cases("validation")
    sample = np.random.default_rng(0).permutation(len(cases))[: recipe.training.validation_users]
    cases = cases.take(np.sort(sample))
    retriever = Retriever(trained.draft(draft), GraphBackend(named_graph(trained.generator)))
    return cases, ask(retriever.retrieve, shop, cases, ids, reads(recipe, shop), beam_width, Console(quiet=True))


def _mean_of(metric: Metric, shop: Shop, cases: Cases, ranked: Ranked) -> float:
    if not len(cases):
        return 0.0
    if shop.exclude_seen:
        ranked = without_seen(ranked, shop.histories, cases)
    return float(metric(ranked, cases.relevant, cases.relevant_offsets, 10).mean())


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
    run_record = {"recipe": recipe.dump(), "data": str(data), "work": str(work)}
    (folder / CONFIG).write_text(yaml.safe_dump(run_record, sort_keys=False), "utf-8")
    if quality:
        (folder / METRICS).write_bytes((work / "quality" / "metrics.json").read_bytes())
    (folder / MODEL_CARD).write_text(_model_card(shop, draft.manifest, generator, quality), "utf-8")


def _model_card(
    shop: Shop, manifest: Manifest, generator: Generator, quality: quality_report.QualityReport | None
) -> str:
    parameters = sum(p.numel() for p in generator.parameters())
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
        console: progress.

    Raises:
        BundleError: the logs it was trained on are gone and none were given.
    """
    record: dict[str, Any] = yaml.safe_load((bundle.path / CONFIG).read_text("utf-8"))
    recipe, work = Recipe.model_validate(record["recipe"]), Path(record["work"])
    data = data or Path(record["data"])
    if not data.is_dir():
        raise BundleError(f"the logs of this bundle are no longer at {data}; give them with --data")
    shop = open_shop(data, work)
    ids = catalogue_ids(bundle)
    evaluation = make_evaluation(recipe, shop, ids, work, console)
    asked = partial(_ask, answer, shop, recipe, ids, console)
    return evaluation.report(asked, split, seed=recipe.training.seed, beam_width=recipe.evaluation.beam_width)


def catalogue_ids(bundle: Bundle) -> SemanticIds:
    """Semantic IDs of a bundle's items, in row order."""
    codes: NDArray[np.int32] = np.asarray(bundle.catalogue()["semantic_id"].to_list(), np.int32)
    return SemanticIds(codes, bundle.manifest.codebook_sizes)


def work_folder(bundle: Bundle) -> Path:
    """Where the run that wrote a bundle kept its intermediate results."""
    return Path(yaml.safe_load((bundle.path / CONFIG).read_text("utf-8"))["work"])


def set_threads(n_threads: int | None) -> None:
    """Use `n_threads` cores for training; results are equal at equal thread count."""
    if n_threads:
        torch.set_num_threads(n_threads)
