"""Recipes: one YAML file that says everything about a run but where the data lies."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from genretrieval.errors import RecipeError
from genretrieval.model.ranking import RankingConfig
from genretrieval.request import MAX_BEAM_WIDTH, MAX_HISTORY_EVENTS, MAX_TOP_K
from genretrieval.training.preference import RewardWeights
from genretrieval.training.preference_objective import PreferenceConfig
from genretrieval.training.ranking import RankingTrainingConfig
from genretrieval.training.self_distillation import SelfDistillationConfig
from genretrieval.training.trainer import TrainingConfig
from genretrieval_pipelines.baselines.sasrec import SasrecConfig
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.family import TokenizerConfig
from genretrieval_tokenizers.rq_kmeans import RqKMeansConfig

Tokenizer = Annotated[TokenizerConfig, Field(discriminator="method")]
FigureName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]  # it becomes part of a figure's dotted name
# Figures are of the first ten items, and an evaluation asks for as many items as beams.
BeamWidth = Annotated[int, Field(ge=10, le=min(MAX_TOP_K, MAX_BEAM_WIDTH))]
_MAX_SEED = 2_000_000_000  # faiss reads 31 bits, and a level adds its number
Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _WholeRecipe(_Section):
    @model_validator(mode="after")
    def _numbers_can_be_used(self) -> Self:
        if problems := list(_unusable_numbers(self.model_dump())):
            raise ValueError("; ".join(problems))
        return self


def _unusable_numbers(value: object, name: str = "") -> Iterator[str]:
    """What no setting of any section can be: YAML's .nan and .inf, and seeds that a library would refuse later."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unusable_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _unusable_numbers(inner, f"{name}.{place}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}; it must be a finite number"
    elif isinstance(value, int) and name.endswith("seed") and not 0 <= value <= _MAX_SEED:
        yield f"{name} is {value}; it must be in [0, {_MAX_SEED}]"


class GeneratorSection(_Section):
    """Sizes of the generator; the rest of its configuration follows from the data."""

    d_model: int = Field(default=128, ge=1)
    n_heads: int = Field(default=4, ge=1, description="Of which each is as wide as the others: they divide d_model.")
    d_ff: int = Field(default=512, ge=1)
    n_encoder_layers: int = Field(default=2, ge=1)
    n_decoder_layers: int = Field(default=2, ge=1)
    n_query_layers: int = Field(default=1, ge=1)
    n_experts: int = Field(default=0, ge=0, description="Of each feed-forward layer of the decoder; 0 keeps it dense.")
    experts_per_token: int = Field(default=2, ge=2, description="Together as wide as a dense layer.")
    max_history: int = Field(default=50, ge=1)
    max_past: int = Field(default=0, ge=0, description="Events before the history, exposures among them.")
    n_past_tokens: int = Field(default=8, ge=1, description="Tokens that each behaviour of the past is compressed to.")
    scenario: bool = Field(default=True, description="Tells the model which page or surface asks, where logs say it.")
    max_query_tokens: int = Field(default=16, ge=1)
    query_vocab_size: int = Field(default=4096, ge=1, description="At most; a small corpus has fewer tokens.")
    n_profile_buckets: int = Field(default=4096, ge=1)
    profile_tables: Literal["torch", "torchrec"] = Field(
        default="torch", description="What trains them; `make torchrec` installs the other. The numbers are equal."
    )
    dense_head: bool = Field(default=True, description="Item vectors beside codes; what the search found is re-ranked.")
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _sizes_fit_each_other(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of n_heads {self.n_heads}; change one of them")
        if self.n_experts and not (
            self.experts_per_token <= self.n_experts and self.d_ff % self.experts_per_token == 0
        ):
            raise ValueError(
                f"experts_per_token {self.experts_per_token} must divide d_ff {self.d_ff} and be at most n_experts "
                f"{self.n_experts}; 0 experts keep the layers dense"
            )
        return self

    @model_validator(mode="after")
    def _a_request_carries_what_is_read(self) -> Self:
        if self.max_history + self.max_past > MAX_HISTORY_EVENTS:
            raise ValueError(
                f"max_history {self.max_history} and max_past {self.max_past} are more than the {MAX_HISTORY_EVENTS} "
                "events that a request carries; lower one of them"
            )
        return self


SupervisedObjective = Literal["alignment", "cooccurrence", "next_item"]


class _Stage(_Section):
    """One stage of training; the generator goes on from where the stage before left it."""

    epochs: int | None = Field(default=None, ge=1, description="Passes over its data; by default as `training` says.")
    learning_rate: float | None = Field(default=None, gt=0, description="Its peak; by default as `training` says.")

    def schedule(self, training: TrainingConfig) -> TrainingConfig:
        """Settings of training, as this stage has them."""
        epochs = training.epochs if self.epochs is None else self.epochs
        rate = training.learning_rate if self.learning_rate is None else self.learning_rate
        return replace(training, epochs=epochs, learning_rate=rate)


class SupervisedStage(_Stage):
    """A stage that learns from what is in the logs.

    `alignment` teaches what items are called: titles, brands and categories are queries for their items.
    `cooccurrence` teaches what was taken for a query, whoever asked. `next_item` is what is served: a query, if any,
    from a visitor with a history. The first two need a shop with queries and are left out, with a note, elsewhere.
    """

    objective: SupervisedObjective
    scenario: str | None = Field(default=None, description="Of `next_item`: learns from this page or surface alone.")
    made_queries: float = Field(
        default=0.0, ge=0, le=1, description="Of `next_item`: share of what was taken without a query that gets one."
    )
    self_routing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the queries that ask for a reserved slot instead."
    )

    @model_validator(mode="after")
    def _made_queries_have_a_use(self) -> Self:
        if self.made_queries and self.objective != "next_item":
            raise ValueError(
                f"{self.objective} learns from queries as it is; leave made_queries out, or give it to next_item"
            )
        return self

    @model_validator(mode="after")
    def _scenario_has_a_use(self) -> Self:
        if self.scenario is not None and self.objective != "next_item":
            raise ValueError(
                f"{self.objective} learns from pairs of a query and an item, which no scenario tells apart; "
                "leave scenario out, or give it to next_item"
            )
        return self


class SelfDistillationStage(_Stage):
    """`next_item` once more, now with the generator as its own teacher, told what no request says.

    Its `privileged` teacher reads keywords, which a shop without queries has no words for: the stage is left out there,
    with a note.
    """

    objective: Literal["self_distillation"]
    distillation: SelfDistillationConfig = SelfDistillationConfig()


class RankingModelStage(_Section):
    """Fits the two ranking models that preference stages behind it ask; the generator stays as it is."""

    objective: Literal["ranking_model"]
    model: RankingConfig = RankingConfig()
    training: RankingTrainingConfig = RankingTrainingConfig()


class PreferenceStage(_Stage):
    """Learns what is worth more: from lists graded by the logs, or from rewards of what the generator itself writes."""

    objective: Literal["preference"]
    epochs: int = Field(default=1, ge=1, description="Passes over the histories; each is judged at its end.")
    learning_rate: float = Field(default=2e-4, gt=0, description="Its peak.")
    preference: PreferenceConfig = PreferenceConfig()
    reward: RewardWeights = Field(default=RewardWeights(), description="Parts of the reward; none for listwise_dpo.")
    sync_every: int | None = Field(
        default=None, ge=1, description="Steps after which the reference is renewed; by default it is the start's."
    )
    max_kl: float | None = Field(
        default=None, gt=0, description="Stops when the policy is as many nats an item from its reference."
    )
    recall_tolerance: float = Field(default=0.0, ge=0, description="That validation Recall@10 may fall by.")

    @property
    def asks_ranking_model(self) -> bool:
        """Whether it is rewarded by a ranking model."""
        return self.preference.method != "listwise_dpo" and bool(self.reward.ctr or self.reward.relevance)

    def schedule(self, training: TrainingConfig) -> TrainingConfig:
        """Settings of training, as this stage has them: it is short, and a policy can go wrong within an epoch."""
        return replace(super().schedule(training), evaluate_every=1)


# Told apart by `objective`.
Stage = Annotated[
    SupervisedStage | SelfDistillationStage | RankingModelStage | PreferenceStage, Field(discriminator="objective")
]


class AblationSection(_Section):
    """Further trainings that say what each part of the recipe is worth; see `genretrieval_pipelines.ablation`."""

    seeds: Annotated[list[Seed], Field(min_length=2)] = Field(description="Each replaces `training.seed`.")
    jobs: int = Field(
        default=1, ge=1, description="Trainings at a time, each on one core; an accelerator has one at a time."
    )
    rows: dict[FigureName, dict[str, Any]] = Field(description="Changes of the recipe, each by itself, by section.")

    @model_validator(mode="after")
    def _no_row_takes_the_place_of_the_recipe(self) -> Self:
        if taken := {"reference", "whole"} & set(self.rows):
            raise ValueError(f"rows: {', '.join(sorted(taken))} is the recipe itself; give that row another name")
        return self

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} hold one twice, which is no further measurement; give distinct ones")
        return self


class EvaluationSection(_Section):
    """How quality is measured; see docs/evaluation.md."""

    beam_width: BeamWidth = Field(default=50, description="Also the default of the served bundle.")
    sasrec: SasrecConfig = SasrecConfig()


class Recipe(_WholeRecipe):
    """A whole run: embeddings, tokenizer, collisions, generator, training, evaluation."""

    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)]
    tokenizer: Tokenizer = RqKMeansConfig()
    collisions: CollisionConfig = CollisionConfig()
    generator: GeneratorSection = GeneratorSection()
    training: TrainingConfig = TrainingConfig()
    stages: Annotated[list[Stage], Field(min_length=1)] = [SupervisedStage(objective="next_item")]
    evaluation: EvaluationSection = EvaluationSection()
    ablation: AblationSection | None = None

    @model_validator(mode="after")
    def _ablation_rows_are_recipes(self) -> Self:
        for name, change in (self.ablation.rows if self.ablation else {}).items():
            try:
                self.changed(change)
            except ValidationError as error:
                raise ValueError(f"ablation.rows.{name} makes no recipe: {_problems(error)}") from error
        return self

    def changed(self, change: dict[str, Any]) -> Recipe:
        """The recipe with other values in some of its sections, and without an ablation of its own.

        A section's keys are replaced one by one; `embedding` and `stages` are lists and are replaced whole.
        """
        content = self.model_dump(exclude={"ablation"})
        for section, values in change.items():
            old = content.get(section)
            content[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
        return Recipe.model_validate(content)

    @model_validator(mode="after")
    def _rewards_have_a_ranking_model(self) -> Self:
        for stage in self.stages:
            asks = isinstance(stage, PreferenceStage) and stage.asks_ranking_model
            if asks and self.ranking_model_before(stage) is None:
                raise ValueError(
                    "a preference stage is rewarded by a ranking model and there is none; put a stage "
                    "`objective: ranking_model` before it, or set reward.ctr and reward.relevance to 0"
                )
        return self

    @model_validator(mode="after")
    def _self_routing_has_slots(self) -> Self:
        routes = any(isinstance(stage, SupervisedStage) and stage.self_routing for stage in self.stages)
        if routes and self.tokenizer.method != "keyword_aligned":
            raise ValueError(
                f"a stage teaches self_routing and the tokenizer {self.tokenizer.method} has no reserved slots; leave "
                "self_routing out, or choose tokenizer.method keyword_aligned"
            )
        return self

    def ranking_model_before(self, stage: Stage) -> RankingModelStage | None:
        """The last stage before `stage` that fits ranking models."""
        before = self.stages[: next(number for number, other in enumerate(self.stages) if other is stage)]
        return next((other for other in reversed(before) if isinstance(other, RankingModelStage)), None)

    def dump(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data."""
        return self.model_dump(mode="json")


class PublishedGain(_Section):
    """What a paper printed for a method over the reference, relative (0.03 is 3 %), by the names of our metrics."""

    gains: dict[str, float]
    source: str


class Compared(_Section):
    """One tokenizer of a comparison."""

    tokenizer: Tokenizer
    collisions: CollisionConfig = CollisionConfig()
    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)] | None = Field(
        None, description="Its own vectors instead of those of the comparison."
    )
    reference: str | None = Field(
        None, description="The tokenizer that its gains are relative to; None for that of the comparison."
    )
    published: PublishedGain | None = None


class ComparisonEvaluation(_Section):
    """How the generators of a comparison are measured."""

    beam_width: BeamWidth = 50
    validation_users: int = Field(default=10_000, ge=1, description="A fixed sample; test is always measured whole.")


class ComparisonRecipe(_WholeRecipe):
    """Tokenizers side by side: the same generator and budget for all, the same embeddings but where one has its own.

    Seeds are paired: cells of equal seed share the order of the training data. They share initial weights only where
    their codebook sizes are equal, because the tables of codes are drawn first.
    """

    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)]
    reference: str = Field(description="The tokenizer that gains are relative to, unless one names another.")
    seeds: Annotated[list[Seed], Field(min_length=2)] = Field(description="Each replaces every other seed of a cell.")
    tokenizers: Annotated[dict[FigureName, Compared], Field(min_length=1)]
    generator: GeneratorSection = GeneratorSection()
    training: TrainingConfig = TrainingConfig()
    evaluation: ComparisonEvaluation = ComparisonEvaluation()
    sasrec: SasrecConfig = Field(SasrecConfig(), description="The SASRec baseline, where it is asked for.")

    @model_validator(mode="after")
    def _references_are_there(self) -> Self:
        for reference in (self.reference, *map(self.reference_of, self.tokenizers)):
            if reference not in self.tokenizers:
                raise ValueError(f"reference {reference!r} is none of the tokenizers {', '.join(self.tokenizers)}")
        return self

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {self.seeds} hold one twice; give distinct ones, as a repeated cell is no further measurement "
                "and would make every interval too narrow"
            )
        return self

    def reference_of(self, name: str) -> str:
        """The tokenizer that the gains of `name` are relative to."""
        return self.tokenizers[name].reference or self.reference

    def only(self, names: list[str]) -> ComparisonRecipe:
        """The same comparison of `names` alone, in that order, behind the references that they need.

        Raises:
            RecipeError: a name is unknown.
        """
        if unknown := [name for name in names if name not in self.tokenizers]:
            raise RecipeError(
                f"no tokenizer {', '.join(unknown)} in the comparison; it has {', '.join(self.tokenizers)}"
            )
        kept = list(dict.fromkeys(names or self.tokenizers))
        needed = {self.reference, *map(self.reference_of, kept)}
        while further := {self.reference_of(name) for name in needed} - needed:
            needed |= further
        kept = [name for name in self.tokenizers if name in needed - set(kept)] + kept
        return self.model_copy(update={"tokenizers": {name: self.tokenizers[name] for name in kept}})

    def with_generator(self, recipe: Recipe) -> ComparisonRecipe:
        """The same comparison by the generator and training of a run."""
        return self.model_copy(update={"generator": recipe.generator, "training": recipe.training})

    def cell(self, name: str, seed: int) -> Recipe:
        """The run of one tokenizer with one seed."""
        compared = self.tokenizers[name]
        return Recipe(
            embedding=compared.embedding or self.embedding,
            tokenizer=replace(compared.tokenizer, seed=seed),
            collisions=compared.collisions,
            generator=self.generator,
            training=replace(self.training, seed=seed),
        )


_AnyRecipe = TypeVar("_AnyRecipe", bound=BaseModel)


def load_recipe(path: Path) -> Recipe:
    """Read the recipe of a run; errors are those of `read_recipe`."""
    return read_recipe(path, Recipe)


def read_recipe(path: Path, kind: type[_AnyRecipe]) -> _AnyRecipe:
    """Read a recipe.

    Raises:
        RecipeError: the file is missing or not YAML, or a key is unknown, stands twice or has a value that it cannot
            have; the message names the key.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at {path}; `genretrieval run --help` lists the ones that are shipped") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path} is not UTF-8, first in line {line}; save it in that encoding") from error
    try:
        content = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_problems(error)}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, as YAML itself does; its base takes the last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        "while reading a section",
                        node.start_mark,
                        f"found the key {key.value!r} twice, of which one could count; take the other out",
                        key.start_mark,
                    )
                seen.add((key.tag, key.value))
        return node


def _problems(error: ValidationError) -> str:
    """Each key with what is wrong, and its value where that is short and not in the message."""
    problems = []
    for e in error.errors():
        given = f", not {e['input']!r}" if isinstance(e["input"], int | float) and "ctx" in e else ""
        problems.append(
            f"{'.'.join(map(str, e['loc'])) or 'the recipe'}: {e['msg'].removeprefix('Value error, ')}{given}"
        )
    return "; ".join(problems)


def content_hash(*parts: object) -> str:
    """Short hash of plain values; names the folder of a result so that a changed input never reuses it.

    Arrays are given as bytes or as a contiguous memoryview, which are hashed as they are; of anything else its `repr`.
    """
    digest = hashlib.sha256()
    for part in parts:
        raw = isinstance(part, bytes | memoryview)
        content = memoryview(part if isinstance(part, bytes | memoryview) else repr(part).encode())
        # With its kind and length in front, no part can be taken for another one or for two.
        digest.update(f"{'raw' if raw else 'repr'} {content.nbytes}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
