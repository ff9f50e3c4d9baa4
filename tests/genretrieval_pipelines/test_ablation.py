from __future__ import annotations

import io
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from genretrieval.errors import DataError, RecipeError
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import NamedGraph
from genretrieval_pipelines import ablation, cells
from genretrieval_pipelines.ablation import Ablation, Row, ablate, train_cells, without_impossible_rows
from genretrieval_pipelines.draft import StageResult, request_features
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.stages import training_set
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import tokenize

RECIPE = {
    "embedding": [{"name": "hashing", "dim": 32}, {"name": "collaborative", "dim": 16}],
    "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8, 8]},
    "generator": {
        "d_model": 16, "n_heads": 2, "d_ff": 32, "n_encoder_layers": 1, "n_decoder_layers": 1, "max_history": 10,
        "query_vocab_size": 300, "n_profile_buckets": 32,
    },
    "training": {"epochs": 1, "evaluate_every": 1, "validation_users": 20},
    "stages": [{"objective": "cooccurrence"}, {"objective": "next_item"}],
    "evaluation": {"beam_width": 10},
    "ablation": {
        "seeds": [0, 1],
        "rows": {
            "no_dense_head": {"generator": {"dense_head": False}},
            "search_alone": {"stages": [{"objective": "next_item", "scenario": "search"}]},
        },
    },
}  # fmt: skip


def result(recall10: float, ndcg10: float, seconds: float = 1.0) -> StageResult:
    by_scenario = {"home": recall10, "search": 2 * recall10}
    return StageResult("next_item", seconds, 1.0, recall10, ndcg10, by_scenario, 2 * ndcg10)


def test_a_row_compares_seed_by_seed() -> None:
    against = (result(0.2, 0.10), result(0.4, 0.20))
    row = Row("changed", (result(0.3, 0.11), result(0.5, 0.22)), 60.0, 1.5, 2.0, against)
    gain = row.gain("ndcg10")
    assert gain is not None
    # 0.01 and 0.02 over 0.10 and 0.20: on average 0.015 over 0.15.
    assert gain.mean == pytest.approx(0.1)
    found = Ablation([row], [], [0, 1], "a shop").figures()
    assert found["ablation.part.changed.recall10"].value == pytest.approx(0.4)
    assert found["ablation.part.changed.recall10"].spread == (0.3, 0.5)
    assert found["ablation.part.changed.ndcg10_gain"].value == pytest.approx(0.1)
    page = ablation.markdown(Ablation([row], [], [0, 1], "a shop"))
    assert "| changed | 0.4000 ± 0.1414 | 0.1650 ± 0.0778 | +10.0% [" in page
    assert "| true utility | gain | Recall@10, home | Recall@10, search |" in page
    assert found["ablation.part.changed.utility_gain"].value == pytest.approx(0.1)


def test_every_change_is_trained_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "shop"
    synthesize(data, ShopConfig(n_items=100, n_users=25, seed=3))
    graphs: dict[Path, NamedGraph] = {}
    monkeypatch.setattr(ablation, "export_graph", lambda graph, _, path: graphs.__setitem__(path, graph))
    recipe = Recipe.model_validate(RECIPE)
    shop, work = open_shop(data, tmp_path / "work"), tmp_path / "work"

    def run() -> Ablation:
        return ablate(recipe, shop, work, lambda path: GraphBackend(graphs[path]))

    found = run()
    assert [row.name for row in found.parts] == ["reference", "no_dense_head", "search_alone"]
    assert [row.name for row in found.stages] == ["cooccurrence", "next_item"]
    assert all(len(row.results) == 2 for row in [*found.parts, *found.stages])
    reference, headless, _ = found.parts
    assert headless.parameters < reference.parameters
    assert [r.dense_weight for r in headless.results] == [0.0, 0.0]
    # The reference is the recipe: its stages were read back, not trained again.
    assert reference.results == found.stages[-1].results
    assert reference.seconds == pytest.approx(sum(row.seconds for row in found.stages))
    assert set(reference.results[0].by_scenario) == {"home", "search"}
    assert all(row.latency_ms is not None and row.latency_ms > 0 for row in found.parts)
    again = run()
    assert [row.results for row in again.parts] == [row.results for row in found.parts]


def test_trainings_side_by_side_are_those_of_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "shop"
    synthesize(data, ShopConfig(n_items=100, n_users=25, seed=3))
    graphs: dict[Path, NamedGraph] = {}
    monkeypatch.setattr(ablation, "export_graph", lambda graph, _, path: graphs.__setitem__(path, graph))
    found = []
    for jobs in (1, 2):
        section = {"seeds": [0, 1], "rows": {"narrow": {"generator": {"d_ff": 16}}}, "jobs": jobs}
        work = tmp_path / str(jobs)
        recipe = Recipe.model_validate({**RECIPE, "ablation": section})
        told, shop = io.StringIO(), open_shop(data, work)
        train_cells(recipe, shop, work, Console(file=told, width=200))
        assert "training 6 of 6: " in told.getvalue()
        kept = len(list(work.glob("next_item-*/generator.safetensors")))
        made = ablate(recipe, shop, work, lambda path: GraphBackend(graphs[path]))
        assert len(list(work.glob("next_item-*/generator.safetensors"))) == kept == 4
        found.append([[replace(result, seconds=0.0) for result in row.results] for row in (*made.parts, *made.stages)])
    assert found[0] == found[1]


def test_rows_of_scenarios_that_the_logs_do_not_have_are_left_out(tmp_path: Path) -> None:
    synthesize(tmp_path / "shop", ShopConfig(n_items=100, n_users=25, seed=3))
    rows = {"cart": {"stages": [{"objective": "next_item", "scenario": "cart"}]}, **RECIPE["ablation"]["rows"]}  # type: ignore[index]
    recipe = Recipe.model_validate({**RECIPE, "ablation": {"seeds": [0, 1], "rows": rows}})
    told = io.StringIO()
    left = without_impossible_rows(
        recipe, open_shop(tmp_path / "shop", tmp_path / "work"), Console(file=told, width=200)
    )
    assert left.ablation is not None
    assert list(left.ablation.rows) == ["no_dense_head", "search_alone"]
    assert "ablation, cart: left out, as these logs have no scenario cart; they have home, search" in told.getvalue()


def test_a_training_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A thread in place of processes, which take seconds to start.
    monkeypatch.setattr(cells, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    data, work = tmp_path / "shop", tmp_path / "work"
    synthesize(data, ShopConfig(n_items=100, n_users=25, seed=3))
    recipe = Recipe.model_validate({**RECIPE, "ablation": {"seeds": [0, 1], "rows": {}, "jobs": 2}})
    shop = open_shop(data, work)
    (data / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"(?s)training of whole, seed [01]: .*items\.parquet"):
        train_cells(recipe, shop, work, Console(quiet=True))


def test_a_stage_of_one_scenario_predicts_nothing_else(tmp_path: Path) -> None:
    synthesize(tmp_path / "shop", ShopConfig(n_items=100, n_users=25, seed=3))
    recipe = Recipe.model_validate(RECIPE)
    shop = open_shop(tmp_path / "shop", tmp_path)
    ids, features = tokenize(recipe, shop, tmp_path).ids, request_features(recipe, shop)
    counts = {}
    for scenario in (None, "home", "search"):
        dataset = training_set(recipe, shop, ids, features, "next_item", scenario)
        entries = [dataset[row] for row in range(len(dataset))]
        assert all(entry["learn"].any() for entry in entries)
        if scenario is not None:
            known = features.scenario_id(scenario)
            assert all((entry["scenarios"][entry["learn"]] == known).all() for entry in entries)
        counts[scenario] = sum(int(entry["learn"].sum()) for entry in entries)
    assert counts[None] == counts["home"] + counts["search"]
    with pytest.raises(RecipeError, match=r"'cart'.*home.*search"):
        training_set(recipe, shop, ids, features, "next_item", "cart")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "hold one twice"),
        ({"rows": {"odd": {"generator": {"n_expert": 2}}}}, r"ablation\.rows\.odd.*n_expert"),
        ({"rows": {"reference": {"generator": {"n_experts": 2}}}}, "reference is the recipe itself"),
        ({"rows": {"odd": {"stages": [{"objective": "alignment", "scenario": "home"}]}}}, "no scenario tells apart"),
    ],
)
def test_a_wrong_ablation_is_told_before_anything_is_trained(change: dict[str, object], message: str) -> None:
    recipe = {**RECIPE, "ablation": {**RECIPE["ablation"], **change}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Recipe.model_validate(recipe)


def test_spread_is_the_deviation_over_seeds() -> None:
    row = Row("x", (result(0.1, 0.1), result(0.3, 0.3)), 1.0, 1.0)
    assert statistics.stdev(row.values("recall10")) == pytest.approx(0.1414, abs=1e-4)
    assert row.gain("recall10") is None
