"""What a stage is kept under, what is measured again, and what stops a training with words."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from genretrieval.errors import RecipeError
from genretrieval.model import Generator
from genretrieval_pipelines import train_generator
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.stages import StageInputs, stage_inputs, validation_recall
from genretrieval_pipelines.tokenize import tokenize

N_ITEMS, N_USERS = 40, 20
VECTORS = np.random.default_rng(0).normal(size=(N_ITEMS, 6)).tolist()
TITLES = [f"{['red', 'blue', 'green', 'black'][row % 4]} {['shoe', 'bag'][row // 4 % 2]}" for row in range(N_ITEMS)]


def recipe_of(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "embedding": [{"name": "column:vector"}],
        "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8], "iterations": 5},
        "generator": {
            "d_model": 16,
            "n_heads": 2,
            "d_ff": 16,
            "n_encoder_layers": 1,
            "n_decoder_layers": 1,
            "query_vocab_size": 100,
            "scenario": False,
        },
        "training": {"epochs": 1, "targets_per_batch": 128},
        "stages": [{"objective": "next_item"}],
        "evaluation": {"beam_width": 10},
    }
    return Recipe.model_validate(settings | changes)


def write(folder: Path, **tables: dict[str, Any]) -> Path:
    folder.mkdir()
    items = {"item_id": [f"i{row}" for row in range(N_ITEMS)], "title": TITLES, "vector": VECTORS}
    for name, columns in {"items": items, **tables}.items():
        pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
    return folder


def log(shown: int = 0) -> dict[str, list[Any]]:
    """Six clicks of every user, half of them with a query, each beside an exposure of an item `shown` places on."""
    rows = np.arange(N_USERS * 6)
    clicked = np.random.default_rng(1).integers(0, N_ITEMS, len(rows))
    return {
        "user_id": [f"u{row // 6}" for row in rows.repeat(2)],
        "item_id": [f"i{(item + by) % N_ITEMS}" for item in clicked for by in (shown, 0)],
        "event": ["exposure", "click"] * len(rows),
        "timestamp": [1_700_000_000 + 60 * row for row in rows.repeat(2)],
        "query": [TITLES[item] if row % 2 else None for row, item in zip(rows, clicked, strict=True) for _ in (0, 1)],
        "request_id": [f"r{row}" for row in rows.repeat(2)],
    }


def inputs_of(recipe: Recipe, data: Path, work: Path, console: Console | None = None) -> StageInputs:
    shop = open_shop(data, work)
    ids = tokenize(recipe, shop, work).ids
    draft = draft_bundle(recipe, shop, ids, request_features(recipe, shop))
    return stage_inputs(recipe, shop, ids, draft, work, console or Console(quiet=True))


@pytest.mark.parametrize("what", ["what was shown", "what items are called"])
def test_logs_that_changed_in_what_only_a_stage_reads_are_other_logs(tmp_path: Path, what: str) -> None:
    before = write(tmp_path / "before", interactions=log(1))
    if what == "what was shown":
        after = write(tmp_path / "after", interactions=log(2))
    else:
        items = pl.read_parquet(before / "items.parquet").to_dict(as_series=False)
        after = write(tmp_path / "after", items=items | {"title": TITLES[::-1]}, interactions=log(1))
    # All else that the weights depend on is equal.
    one, two = (inputs_of(recipe_of(), data, tmp_path / f"{data.name}.work") for data in (before, after))
    assert np.array_equal(one.ids.codes, two.ids.codes)
    assert np.array_equal(one.shop.histories.items, two.shop.histories.items)
    assert one.draft.request_features == two.draft.request_features
    config = train_generator.generator_config(one)
    assert train_generator.inputs_key(one, config) != train_generator.inputs_key(two, config)
    assert train_generator.inputs_key(one, config) == train_generator.inputs_key(
        inputs_of(recipe_of(), before, tmp_path / "again"), config
    )


def test_a_wider_search_is_measured_and_nothing_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, work = write(tmp_path / "shop", interactions=log()), tmp_path / "work"
    first = train_generator.train_generator(inputs_of(recipe_of(), data, work))
    widths: list[int] = []
    validate = train_generator.validate

    def counting(inputs: StageInputs, trained: Any, beam_width: int) -> Any:
        widths.append(beam_width)
        return validate(inputs, trained, beam_width)

    monkeypatch.setattr(train_generator, "validate", counting)
    monkeypatch.setattr(train_generator, "train", lambda *_, **__: pytest.fail("trained again"))
    wide = recipe_of(evaluation={"beam_width": 20})
    second = train_generator.train_generator(inputs_of(wide, data, work))
    assert widths == [20]
    assert second.stages[0].seconds == first.stages[0].seconds
    assert train_generator.train_generator(inputs_of(wide, data, work)).stages == second.stages
    assert train_generator.train_generator(inputs_of(recipe_of(), data, work)).stages == first.stages
    assert widths == [20]


QUERY = {"query_id": ["q"], "query": ["red"]}


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"items": {"item_id": ["a", "b"], "title": ["same", "same"]}}, "every query, made of .*, is held out"),
        ({"queries": QUERY, "qrels": {"query_id": ["q"], "item_id": ["i0"], "label": [0]}}, "no qrels row has a label"),
        ({"queries": QUERY, "qrels": {"query_id": ["q"], "item_id": ["i0"], "split": ["test"]}}, "every query is held"),
    ],
    ids=["one title", "no relevant item", "only test"],
)
def test_why_there_is_nothing_to_learn(tmp_path: Path, tables: dict[str, Any], reason: str) -> None:
    tokenizer = {"method": "rq_kmeans", "codebook_sizes": [2, 2]}
    recipe = recipe_of(embedding=[{"name": "hashing", "dim": 8}], tokenizer=tokenizer)
    told = StringIO()
    inputs = inputs_of(recipe, write(tmp_path / "shop", **tables), tmp_path / "work", Console(file=told, width=80))
    message = rf"\(next_item: there are no interactions, and {reason}.*; give interactions"
    with pytest.raises(RecipeError, match=message):
        train_generator.train_generator(inputs)
    assert "stage next_item: left out, as there are no interactions, and " in told.getvalue()


def test_a_stage_that_the_recipe_lacks_is_named_and_why_another_has_nothing(tmp_path: Path) -> None:
    interactions = {name: column for name, column in log().items() if name != "query"}
    recipe = recipe_of(stages=[{"objective": "cooccurrence"}])
    inputs = inputs_of(recipe, write(tmp_path / "shop", interactions=interactions), tmp_path / "work")
    with pytest.raises(RecipeError, match=r"\(cooccurrence: this shop has no queries\); add next_item to `stages`"):
        train_generator.train_generator(inputs)


@pytest.mark.parametrize("rate", [1e10, 1e30])
def test_a_training_that_diverges_stops_and_names_its_stage(tmp_path: Path, rate: float) -> None:
    recipe = recipe_of(stages=[{"objective": "next_item", "learning_rate": rate, "epochs": 10}])
    inputs = inputs_of(recipe, write(tmp_path / "shop", interactions=log()), tmp_path / "work")
    with pytest.raises(RecipeError, match=r"stage next_item: .*diverged; lower learning_rate"):
        train_generator.train_generator(inputs)


def test_scores_that_are_no_numbers_are_no_recall_of_zero(tmp_path: Path) -> None:
    """As the last step before a judgement may leave them, whose loss was still finite."""
    inputs = inputs_of(recipe_of(), write(tmp_path / "shop", interactions=log()), tmp_path / "work")
    model = Generator(train_generator.generator_config(inputs)).eval()
    assert 0 <= validation_recall(inputs, model) <= 1
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(RecipeError, match=r"scores of what the generator writes are not finite.*lower learning_rate"):
        validation_recall(inputs, model)
