"""A bundle that is not written yet: what a run knows before, and right after, its generator is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from genretrieval import __version__
from genretrieval.bundle import Manifest
from genretrieval.export import MINIMUM_ONNXRUNTIME, OPSET
from genretrieval.export.onnx import named_graph
from genretrieval.features import RequestFeatures
from genretrieval.histories import LeaveOneOut
from genretrieval.item_texts import item_texts
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.model import Generator
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines.evaluate import Reads
from genretrieval_pipelines.queries import has_queries, train_query_tokenizer
from genretrieval_pipelines.recipe import Recipe, SupervisedStage
from genretrieval_pipelines.shop import Shop


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


@dataclass(frozen=True, slots=True)
class StageResult:
    """What came of one stage of training.

    Attributes:
        objective: its name in the recipe.
        seconds: it took, from where this process took it up: of all cores together on a CPU, else of the wall.
        dense_weight: with the best NDCG@10.
        recall10: on the validation cases that judge checkpoints, with that weight.
        ndcg10: on the same.
        by_scenario: Recall@10 on those of each page or surface, where there are several.
        utility: what the first ten items are truly worth, where a made shop knows it; see `evaluate.utility`.
    """

    objective: str
    seconds: float
    dense_weight: float
    recall10: float
    ndcg10: float
    by_scenario: dict[str, float] = field(default_factory=dict)
    utility: float | None = None


@dataclass(frozen=True)
class Trained:
    """A generator and how much its dense head has to say.

    Attributes:
        generator: in evaluation mode.
        dense_weight: of the dense head's score beside the log-probability of the codes; 0 without one.
        stages: what came of each stage.
    """

    generator: Generator
    dense_weight: float
    stages: tuple[StageResult, ...] = ()

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
        reserved_slots=_reserved_slots(features.keywords, ids.n_levels),
        dedup_level=recipe.collisions.method == "dedup",
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


def _reserved_slots(keywords: KeywordCodebook | None, n_levels: int) -> tuple[int, ...]:
    """Of each level; the levels behind the keyword slots have none."""
    return (*keywords.reserved, *[0] * (n_levels - keywords.n_groups)) if keywords else ()


def request_features(recipe: Recipe, shop: Shop, keywords: KeywordCodebook | None = None) -> RequestFeatures:
    """What the model reads of a request: the behaviours, profile columns and words of this shop.

    Args:
        recipe: sizes.
        shop: the data.
        keywords: slots of words, where semantic IDs begin with them (`Tokenized.keywords`).
    """
    sizes = recipe.generator
    tokenizer: Tokenizer | None = None
    made = any(isinstance(stage, SupervisedStage) and stage.made_queries for stage in recipe.stages)
    if has_queries(shop.histories) or len(shop.pairs) or made:
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
        keywords=keywords,
    )


def reads(recipe: Recipe, shop: Shop) -> Reads:
    """What the generator of this recipe reads of a history."""
    past = recipe.generator.max_past
    return Reads(recipe.generator.max_history, past, shop.logs.exposures() if past else None)
