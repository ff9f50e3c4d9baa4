"""Recipes: one YAML file that says everything about a run but where the data lies."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from genretrieval.errors import RecipeError
from genretrieval.training.trainer import TrainingConfig
from genretrieval_pipelines.baselines.sasrec import SasrecConfig
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.family import TokenizerConfig
from genretrieval_tokenizers.rq_kmeans import RqKMeansConfig

Tokenizer = Annotated[TokenizerConfig, Field(discriminator="method")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GeneratorSection(_Section):
    """Sizes of the generator; the rest of its configuration follows from the data."""

    d_model: int = 128
    n_heads: int = 4
    d_ff: int = 512
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    n_query_layers: int = 1
    max_history: int = 50
    max_query_tokens: int = 16
    query_vocab_size: int = Field(default=4096, description="At most; a small corpus has fewer tokens.")
    n_profile_buckets: int = 4096
    dropout: float = 0.2


class EvaluationSection(_Section):
    """How quality is measured; see docs/evaluation.md."""

    beam_width: int = Field(default=50, description="Also the default of the served bundle.")
    sasrec: SasrecConfig = SasrecConfig()


class Recipe(_Section):
    """A whole run: embeddings, tokenizer, collisions, generator, training, evaluation."""

    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)]
    tokenizer: Tokenizer = RqKMeansConfig()
    collisions: CollisionConfig = CollisionConfig()
    generator: GeneratorSection = GeneratorSection()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationSection = EvaluationSection()

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
    published: PublishedGain | None = None


class ComparisonEvaluation(_Section):
    """How the generators of a comparison are measured."""

    beam_width: int = Field(default=50, ge=10)
    validation_users: int = Field(default=10_000, ge=1, description="A fixed sample; test is always measured whole.")


class ComparisonRecipe(_Section):
    """Tokenizers side by side: the same embeddings, generator and budget for all, seeds paired."""

    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)]
    reference: str = Field(description="The tokenizer that gains are relative to.")
    seeds: Annotated[list[int], Field(min_length=2)] = Field(description="Each replaces every other seed of a cell.")
    tokenizers: Annotated[dict[str, Compared], Field(min_length=1)]
    generator: GeneratorSection = GeneratorSection()
    training: TrainingConfig = TrainingConfig()
    evaluation: ComparisonEvaluation = ComparisonEvaluation()

    @model_validator(mode="after")
    def _reference_is_there(self) -> Self:
        if self.reference not in self.tokenizers:
            raise ValueError(f"reference {self.reference!r} is none of the tokenizers {', '.join(self.tokenizers)}")
        return self

    def only(self, names: list[str]) -> ComparisonRecipe:
        """The same comparison of `names` alone; the first stands in for a reference that is not among them.

        Raises:
            RecipeError: a name is unknown.
        """
        if unknown := [name for name in names if name not in self.tokenizers]:
            raise RecipeError(
                f"no tokenizer {', '.join(unknown)} in the comparison; it has {', '.join(self.tokenizers)}"
            )
        kept = {name: self.tokenizers[name] for name in names or self.tokenizers}
        reference = self.reference if self.reference in kept else next(iter(kept))
        return self.model_copy(update={"tokenizers": kept, "reference": reference})

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
        RecipeError: the file is missing or not YAML, or a key is unknown or has a value that it cannot have; the
            message names the key.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at {path}; `genretrieval run --help` lists the ones that are shipped") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{path}: {problems}") from error


def content_hash(*parts: object) -> str:
    """Short hash of plain values; names the folder of a result so that a changed input never reuses it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
