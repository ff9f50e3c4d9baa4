"""Recipes: one YAML file that says everything about a run but where the data lies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genretrieval.errors import RecipeError
from genretrieval.training.trainer import TrainingConfig
from genretrieval_pipelines.baselines.sasrec import SasrecConfig
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_tokenizers.rq_kmeans import RqKMeansConfig


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
    """A whole run: embeddings, tokenizer, generator, training, evaluation."""

    embedding: Annotated[list[EmbeddingPart], Field(min_length=1)]
    tokenizer: RqKMeansConfig = RqKMeansConfig()
    generator: GeneratorSection = GeneratorSection()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationSection = EvaluationSection()

    def dump(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data."""
        return self.model_dump(mode="json")


def load_recipe(path: Path) -> Recipe:
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
        return Recipe.model_validate(content)
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
