"""What the stages of a generator's training have in common: what they are given, what they learn from, the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from transformers import TrainerCallback

from genretrieval.catalogue import CatalogueIndex, build_index, reserved_paths
from genretrieval.errors import RecipeError
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import named_graph
from genretrieval.features import RequestFeatures
from genretrieval.histories import LeaveOneOut
from genretrieval.metrics import NOTHING, recall
from genretrieval.model import Generator
from genretrieval.retrieval import Retriever
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.data import HistoryDataset, cut_windows
from genretrieval.training.objectives import Objective
from genretrieval_pipelines.baselines.ranking import Ranked
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.draft import Draft, Trained, reads
from genretrieval_pipelines.evaluate import Answers, ask, without_seen
from genretrieval_pipelines.queries import has_queries, made_queries, searched, with_made_queries, with_query_pairs
from genretrieval_pipelines.recipe import (
    PreferenceStage,
    Recipe,
    SelfDistillationStage,
    SupervisedObjective,
    SupervisedStage,
)
from genretrieval_pipelines.shop import Shop
from genretrieval_pipelines.tokenize import embed_shop

Metric = Callable[[Ranked, NDArray[np.int32], NDArray[np.int64], int], NDArray[np.float64]]
VALIDATION_BEAMS = 20
# The weight of the dense head that judges checkpoints: both scores are log-probabilities of the same item.
JUDGING_DENSE_WEIGHT = 1.0


@dataclass(frozen=True)
class StageInputs:
    """What every stage of a run is given.

    Attributes:
        recipe: all settings.
        shop: the logs.
        ids: semantic IDs of its items.
        draft: the bundle to be.
        index: the catalogue that IDs are written in.
        content: float32 ``[n_items, C]``, what item vectors are made from; None for a model without a dense head.
        work: folder of the training's intermediate results; what is kept there is named by what it was made from.
        console: progress.
    """

    recipe: Recipe
    shop: Shop
    ids: SemanticIds
    draft: Draft
    index: CatalogueIndex
    content: NDArray[np.float32] | None
    work: Path
    console: Console


def stage_inputs(
    recipe: Recipe, shop: Shop, ids: SemanticIds, draft: Draft, work: Path, console: Console
) -> StageInputs:
    """Add the catalogue's index and, where there is a dense head, what items are made from."""
    reserved = reserved_paths(ids.codebook_sizes, draft.manifest.reserved_slots)
    index = build_index(ids, -draft.table["popularity"].to_numpy(), reserved)
    content = embed_shop(recipe.embedding, shop, work) if recipe.generator.dense_head else None
    return StageInputs(recipe, shop, ids, draft, index, content, work, console)


@dataclass(frozen=True)
class StageRun:
    """One stage, ready to be trained by `genretrieval.training.trainer.train`.

    Attributes:
        objective: loss of a batch.
        dataset: what is learnt from.
        validate: how good a checkpoint is; the best is kept.
        callbacks: hooks of the Hugging Face trainer.
        judged_by: what `validate` measures.
    """

    objective: Objective
    dataset: HistoryDataset
    validate: Callable[[Generator], float]
    callbacks: tuple[TrainerCallback, ...] = ()
    judged_by: str = "validation Recall@10"


def training_set(
    recipe: Recipe,
    shop: Shop,
    ids: SemanticIds,
    features: RequestFeatures,
    objective: SupervisedObjective = "next_item",
    scenario: str | None = None,
    made: float = 0.0,
) -> HistoryDataset:
    """What a stage learns from.

    For `next_item`, windows over the training part of every history, and every training pair of a query and an item;
    for the others such pairs alone.

    Args:
        recipe: all settings.
        shop: the logs.
        ids: semantic IDs of its items.
        features: what the model reads of a request.
        objective: of the stage.
        scenario: of `next_item`, the only page or surface that is learnt from.
        made: of `next_item`, share of the interactions without a query that get one, made of what their item is called.

    Raises:
        RecipeError: the logs have no such scenario.
    """
    if scenario is not None and scenario not in features.scenarios:
        raise RecipeError(
            f"a stage learns from scenario {scenario!r} alone, the model reads {list(features.scenarios)}; name"
            " one of them, with generator.scenario true, or leave it out"
        )
    pairs = shop.pairs.filter(pl.col("split") == "train").select("query", "item_row")
    held_out = shop.pairs.filter(pl.col("split") != "train")
    named = made_queries(shop.items).join(held_out.select("query"), on="query", how="anti", maintain_order="left")
    if objective == "alignment":
        pairs = named
    elif objective == "cooccurrence":
        pairs = pl.concat([pairs, searched(shop.histories)]).unique(maintain_order=True)
    if not features.query_tokenizer:
        pairs = pairs.clear()
    n_users = shop.histories.n_users
    histories = shop.histories
    if made and features.query_tokenizer:
        histories = with_made_queries(histories, named, made, recipe.training.seed)
    histories = with_query_pairs(histories, pairs)
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
    return HistoryDataset(
        histories,
        windows,
        ids,
        features,
        profiles,
        max_past=read.past,
        exposures=read.exposures,
        scenario=scenario if objective == "next_item" else None,
    )


def nothing_to_learn(inputs: StageInputs, stage: SupervisedStage | SelfDistillationStage | PreferenceStage) -> str:
    """Why a stage finds nothing to learn from in these logs, as a clause."""
    shop, judged = inputs.shop, inputs.shop.logs.query_items()
    if isinstance(stage, SupervisedStage) and stage.scenario is not None:
        return f"no interaction that is trained on has the scenario {stage.scenario!r}"
    if stage.objective == "alignment" and not len(made_queries(shop.items)):
        return "items have neither titles, brands nor categories"
    if len(shop.pairs):
        made = "" if judged is not None else ", made of what items are called,"
        queries = f"every query{made} is held out for validation or test"
    elif judged is not None:
        queries = "no qrels row has a label above 0"
    elif has_queries(shop.histories):
        queries = "what was taken for a query is held out for validation or test"
    else:
        queries = "this shop has no queries"
    return queries if len(shop.histories.items) else f"there are no interactions, and {queries}"


def validation_recall(inputs: StageInputs, model: Generator) -> float:
    """Recall@10 of a generator on a fixed sample of validation cases, by beam search in torch."""
    trained = Trained(model, JUDGING_DENSE_WEIGHT if model.dense is not None else 0.0)
    cases, answers = validate(inputs, trained, VALIDATION_BEAMS)
    return mean_at_10(recall, inputs.shop, cases, answers.items)


def validate(inputs: StageInputs, trained: Trained, beam_width: int) -> tuple[Cases, Answers]:
    """What a generator answers to the validation cases that judge it: a fixed sample.

    Raises:
        RecipeError: it writes nothing at all, as only one with scores that are no numbers does.
    """
    recipe, shop = inputs.recipe, inputs.shop
    cases = shop.cases("validation")
    sample = np.random.default_rng(0).permutation(len(cases))[: recipe.training.validation_users]
    cases = cases.take(np.sort(sample))
    retriever = Retriever(trained.draft(inputs.draft), GraphBackend(named_graph(trained.generator)))
    read = reads(recipe, shop)
    answers = ask(retriever.retrieve, shop, cases, inputs.ids, read, beam_width, Console(quiet=True))
    if len(cases) and (answers.items == NOTHING).all():
        raise RecipeError(
            "the scores of what the generator writes are not finite: the training has diverged; lower learning_rate"
        )
    return cases, answers


def mean_at_10(metric: Metric, shop: Shop, cases: Cases, ranked: Ranked) -> float:
    """Mean of a metric at 10 as quality tables have it, items seen before left out where the shop is of that kind."""
    if not len(cases):
        return 0.0
    if shop.exclude_seen:
        ranked = without_seen(ranked, shop.histories, cases)
    return float(metric(ranked, cases.relevant, cases.relevant_offsets, 10).mean())
