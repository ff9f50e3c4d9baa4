"""Self-distillation as a stage of a recipe, on a tiny shop."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from genretrieval.errors import RecipeError
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.model.generator import request_tensors
from genretrieval_pipelines import train_generator
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.recipe import Recipe, load_recipe
from genretrieval_pipelines.self_distillation import privileged_tokens, privileged_words
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.stages import StageInputs, stage_inputs
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import tokenize

N_ITEMS = 120


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "embedding": [{"name": "hashing", "dim": 32}],
            "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8, 8]},
            "generator": {
                "d_model": 16,
                "n_heads": 2,
                "d_ff": 32,
                "n_encoder_layers": 1,
                "n_decoder_layers": 1,
                "max_history": 10,
                "query_vocab_size": 300,
                "n_profile_buckets": 32,
            },
            "training": {"epochs": 1, "evaluate_every": 1, "validation_users": 10, "targets_per_batch": 64},
            "stages": [{"objective": "next_item"}, *stages],
            "evaluation": {"beam_width": 10, "sasrec": {"dim": 16, "max_epochs": 1}},
        }
    )


def stage_of(**distillation: Any) -> dict[str, Any]:
    return {"objective": "self_distillation", "distillation": distillation}


def inputs_of(recipe: Recipe, data: Path, work: Path, console: Console | None = None) -> StageInputs:
    shop = open_shop(data, work)
    ids = tokenize(recipe, shop, work).ids
    draft = draft_bundle(recipe, shop, ids, request_features(recipe, shop))
    return stage_inputs(recipe, shop, ids, draft, work, console or Console(quiet=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, ShopConfig(n_items=N_ITEMS, n_users=20, seed=3, median_history=8, mean_history=12))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, so that what is trained once is read back."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.parametrize("teacher", ["privileged", "sibling", "hindsight"])
def test_a_recipe_with_the_stage_trains_is_read_back_and_asks_for_nothing_more(
    demo_shop: Path, work: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    plain = train_generator.train_generator(inputs_of(recipe_of(), demo_shop, work))
    before = {name: tensor.clone() for name, tensor in plain.generator.state_dict().items()}
    recipe = recipe_of(stage_of(teacher=teacher, rollouts=3))
    trained = train_generator.train_generator(inputs_of(recipe, demo_shop, work))
    assert [result.objective for result in trained.stages] == ["next_item", "self_distillation"]
    kept = trained.generator.state_dict()
    assert kept.keys() == before.keys()
    assert not torch.equal(kept["head.weight"], before["head.weight"])
    assert request_tensors(trained.generator.config) == request_tensors(plain.generator.config)

    monkeypatch.setattr(train_generator, "train", lambda *_, **__: pytest.fail("trained again"))
    again = train_generator.train_generator(inputs_of(recipe, demo_shop, work))
    assert again.stages == trained.stages
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.generator.state_dict().items())


def test_a_killed_stage_ends_with_the_same_weights(demo_shop: Path, work: Path, tmp_path: Path) -> None:
    recipe = recipe_of({**stage_of(teacher="hindsight", rollouts=3), "epochs": 2})
    whole = train_generator.train_generator(inputs_of(recipe, demo_shop, work))
    kept = {name: tensor.clone() for name, tensor in whole.generator.state_dict().items()}

    def stop_in_the_second_epoch(_: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.num_train_epochs == 2 and state.epoch > 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_generator.TrainingProgress, "on_step_end", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train_generator.train_generator(inputs_of(recipe, demo_shop, tmp_path))
    assert list(tmp_path.glob("self_distillation-*/checkpoint-*"))
    resumed = train_generator.train_generator(inputs_of(recipe, demo_shop, tmp_path))
    assert all(torch.equal(kept[name], tensor) for name, tensor in resumed.generator.state_dict().items())


def test_the_teacher_is_told_what_kind_of_item_it_is_and_no_more(demo_shop: Path, work: Path) -> None:
    words = {
        "lamp": AttributeType.ENTITY,
        "acme": AttributeType.BRAND,
        "red": AttributeType.COLOR,
        "lamp oil": AttributeType.ENTITY,
    }
    dictionary = KeywordDictionary(tuple(Keyword(text, kind) for text, kind in words.items()))
    assert privileged_words(dictionary, ["Red Acme lamp. Acme lamp oil.", "red"]) == ["acme lamp lamp oil", ""]

    inputs = inputs_of(recipe_of(), demo_shop, work)
    tokens_IW = privileged_tokens(inputs)
    assert tokens_IW.dtype == torch.int64
    assert len(tokens_IW) == N_ITEMS
    assert (tokens_IW[:, 0] != 0).float().mean() > 0.9
    # Several items share what is told of them.
    assert len(torch.unique(tokens_IW, dim=0)) < N_ITEMS / 2


def test_a_shop_without_queries_has_no_privileged_words(demo_shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "items.parquet").write_bytes((demo_shop / "items.parquet").read_bytes())
    interactions = pl.read_parquet(demo_shop / "interactions.parquet").drop("query", "scenario")
    interactions.write_parquet(data / "interactions.parquet")
    console = Console(record=True, width=200, file=StringIO())
    recipe = recipe_of(stage_of(teacher="privileged"), stage_of(teacher="sibling", rollouts=2))
    trained = train_generator.train_generator(inputs_of(recipe, data, tmp_path / "work", console))
    assert [result.objective for result in trained.stages] == ["next_item", "self_distillation"]
    assert "stage self_distillation: left out" in console.export_text()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (stage_of(teacher="oracle"), r"distillation\.teacher"),
        (stage_of(weight=-1.0), "weight is -1.0"),
        (stage_of(kl_weight=1.0), r"distillation\.kl_weight"),
        ({**stage_of(), "scenario": "home"}, r"scenario"),
        ({**stage_of(), "epochs": 0}, r"epochs"),
    ],
)
def test_a_wrong_stage_is_refused(tmp_path: Path, stage: dict[str, Any], message: str) -> None:
    content = recipe_of().dump()
    content["stages"].append(stage)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
