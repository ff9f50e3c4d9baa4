from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import threadpoolctl
import torch
from rich.console import Console

from genretrieval.errors import DataError, InvalidInputError
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines import compare_tokenizers
from genretrieval_pipelines import train_generator as train_module
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.compare_tokenizers import (
    METRICS,
    Fitted,
    Grid,
    compare,
    fit_cell,
    item_metrics,
    measure_cell,
    measured_cases,
    sid_metrics,
)
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.recipe import ComparisonRecipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.stages import stage_inputs
from genretrieval_pipelines.synth import ShopConfig, synthesize

QUIET = Console(quiet=True)
KMEANS = {"method": "rq_kmeans", "codebook_sizes": [8, 8]}
RECIPE = ComparisonRecipe.model_validate(
    {
        "embedding": [{"name": "hashing", "dim": 16}],
        "reference": "kmeans",
        "seeds": [0, 1],
        "tokenizers": {
            "kmeans": {"tokenizer": KMEANS},
            "leaves": {
                "tokenizer": KMEANS,
                "collisions": {"method": "none"},
                "published": {"gains": {"recall10": 0.1}, "source": "a paper"},
            },
        },
        "generator": {
            "d_model": 16,
            "n_heads": 2,
            "d_ff": 16,
            "n_encoder_layers": 1,
            "n_decoder_layers": 1,
            "max_history": 5,
            "query_vocab_size": 300,
            "n_profile_buckets": 8,
        },
        "training": {"epochs": 1, "evaluate_every": 1, "validation_users": 5},
        "evaluation": {"beam_width": 10, "validation_users": 20},
        "sasrec": {"dim": 8, "n_layers": 1, "max_epochs": 1, "validation_users": 5},
    }
)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, ShopConfig(n_items=100, n_users=25, seed=3))
    return Grid(RECIPE, folder, tmp_path_factory.mktemp("work"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Compute cells here; the list tells which."""
    computed: list[tuple[str, int]] = []

    def here(work, cells, jobs, what, console):  # type: ignore[no-untyped-def]
        computed.extend(cells)
        return {cell: work(*cell) for cell in cells}

    monkeypatch.setattr(compare_tokenizers, "in_processes", here)
    return computed


def test_diagnostics_alone_train_nothing(grid: Grid, tmp_path: Path, in_this_process: list[tuple[str, int]]) -> None:
    figures = compare(grid, tmp_path, downstream=False, split="validation", jobs=1, console=QUIET)
    assert in_this_process == [("kmeans", 0), ("leaves", 0)]
    assert 0 <= figures["tokenize.kmeans.collision_rate"].value <= 1
    assert "tokenize.kmeans.recall10" not in figures
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".png"}


def test_downstream_pairs_seeds_and_stands_beside_the_paper(
    grid: Grid, tmp_path: Path, in_this_process: list[tuple[str, int]]
) -> None:
    figures = compare(grid, tmp_path, downstream=True, split="validation", jobs=1, console=QUIET)
    low, high = figures["tokenize.leaves.recall10_gain"].spread or (0, 0)
    assert low <= figures["tokenize.leaves.recall10_gain"].value <= high
    text = (tmp_path / "comparison.md").read_text("utf-8")
    assert "a paper" in text
    assert "Seeds: 0, 1." in text
    assert "validation split, 20 cases of 25, a fixed sample" in text
    assert "baseline: popularity" in text
    assert figures["tokenize.baseline.markov.recall10"].spread is None
    assert "tokenize.baseline.sasrec.recall10" not in figures
    assert figures["tokenize.leaves.invalid_rate"].value == 0
    assert json.loads((tmp_path / "comparison.json").read_text("utf-8"))["test_evaluations"] == 0


def test_the_page_is_printed_unwrapped(
    grid: Grid, tmp_path: Path, in_this_process: object, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(grid, tmp_path, downstream=False, split="validation", jobs=1, console=QUIET)
    lines = (tmp_path / "comparison.md").read_text("utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert max(map(len, table)) > 120
    assert set(table) <= set(capsys.readouterr().out.splitlines())


def test_looks_at_test_are_counted(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(work: Callable[[str, int], Any], cells: list[tuple[str, int]], *_: object) -> dict[tuple[str, int], Any]:
        return {cell: work(*cell) for cell in cells}

    monkeypatch.setattr(compare_tokenizers, "in_processes", here)
    monkeypatch.setattr(compare_tokenizers, "_measure", lambda *_: {"recall10": 0.5})
    monkeypatch.setattr(compare_tokenizers, "_CELL_VERSION", "stub")
    for count in (1, 2):
        compare(grid, tmp_path, downstream=True, split="test", jobs=1, console=QUIET)
        assert json.loads((tmp_path / "comparison.json").read_text("utf-8"))["test_evaluations"] == count
        assert f"to this folder so far: {count}." in (tmp_path / "comparison.md").read_text("utf-8")


@pytest.mark.parametrize("options", [{"split": "test"}, {"split": "validation", "sasrec": True}])
def test_what_needs_generators_is_refused_without(grid: Grid, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="add --downstream"):
        compare(grid, tmp_path, downstream=False, jobs=1, console=QUIET, **options)


def test_sasrec_where_asked_for(grid: Grid) -> None:
    shop = grid.shop()
    cases = measured_cases(grid.recipe, shop, "validation")
    rows = compare_tokenizers._baseline_rows(grid, shop, cases, "validation", True, QUIET)
    assert list(rows) == ["popularity", "markov", "sasrec"]
    assert {"recall5", "ndcg10", "coverage10"} <= set(rows["sasrec"])


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a cell is computed instead of read back."""

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(compare_tokenizers, "_measure", fail)


def test_a_finished_cell_is_read_back(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_cell(grid, "kmeans", 0)
    first = measure_cell(grid, "validation", "kmeans", 0)
    monkeypatch.setattr(compare_tokenizers, "_measure", None)
    assert measure_cell(grid, "validation", "kmeans", 0) == first
    assert set(first.metrics) <= set(METRICS)


def computes(grid: Grid, split: Any = "validation") -> bool:
    """Whether the cell of the first tokenizer and seed has to be computed."""
    try:
        measure_cell(grid, split, "kmeans", 0)
    except AssertionError:
        return True
    return False


def test_a_cell_is_measured_anew_on_anything_else(
    grid: Grid, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_cell(grid, "kmeans", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_tokenizers, "_measure", lambda *_: dict.fromkeys(METRICS, 0.5))
        measure_cell(grid, "validation", "kmeans", 0)
    assert not computes(grid)
    assert computes(grid, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_tokenizers, "METRICS", (*METRICS, "recall100"))
        assert computes(grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_tokenizers, "_CELL_VERSION", 99)
        assert computes(grid)
    # The last interaction of every user is held out: the tokenizer never reads it, the measurement does.
    shutil.copytree(grid.data, tmp_path / "shop")
    table = pl.read_parquet(tmp_path / "shop" / "interactions.parquet")
    last = pl.int_range(pl.len()) == pl.len() - 1
    other = pl.col("item_id").reverse().first()
    changed = table.with_columns(pl.when(last.over("user_id")).then(other).otherwise("item_id").alias("item_id"))
    changed.write_parquet(tmp_path / "shop" / "interactions.parquet")
    monkeypatch.setattr(compare_tokenizers, "tokenizer_folder", lambda *_: "tokenizer-same")
    shutil.copytree(next(grid.work.glob("tokenizer-*")), grid.work / "tokenizer-same")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_tokenizers, "_measure", lambda *_: dict.fromkeys(METRICS, 0.5))
        measure_cell(grid, "validation", "kmeans", 0)
    assert not computes(grid)
    assert computes(replace(grid, data=tmp_path / "shop"))
    open_shop(grid.data, grid.work)  # the work folder is the other tests' too


def test_what_a_comparison_cannot_measure_is_told_before_anything_is_fitted(
    tmp_path: Path, in_this_process: list[tuple[str, int]]
) -> None:
    synthesize(tmp_path / "shop", ShopConfig(n_items=100, n_users=25, seed=3))
    interactions = tmp_path / "shop" / "interactions.parquet"
    pl.read_parquet(interactions).head(3).write_parquet(interactions)
    grid = Grid(RECIPE, tmp_path / "shop", tmp_path / "work")
    shop = grid.shop()
    with pytest.MonkeyPatch.context() as patch:
        nothing = replace(shop, pairs=shop.pairs.clear())
        patch.setattr(Grid, "shop", lambda _: nothing)
        with pytest.raises(DataError, match=r"no validation case.*at least 3, or judged queries"):
            compare(grid, tmp_path / "page", downstream=True, split="validation", jobs=1, console=QUIET)
    assert not in_this_process


def test_a_tokenizer_that_cannot_be_fitted_costs_no_other_one(
    grid: Grid, tmp_path: Path, in_this_process: list[tuple[str, int]]
) -> None:
    column = [{"name": "column:nothing"}]
    content = RECIPE.model_dump() | {"tokenizers": {**RECIPE.model_dump()["tokenizers"]}}
    content["tokenizers"]["absent"] = {"tokenizer": KMEANS, "embedding": column, "reference": "absent"}
    broken = replace(grid, recipe=ComparisonRecipe.model_validate(content))
    figures = compare(broken, tmp_path, downstream=False, split="validation", jobs=1, console=QUIET)
    assert "tokenize.kmeans.icr" in figures
    assert "| absent | not possible: " in (tmp_path / "comparison.md").read_text("utf-8")
    assert ("absent", 0) not in in_this_process


def test_what_fails_while_fitting_is_a_row_and_no_tokenizer_at_all_an_error(
    grid: Grid, tmp_path: Path, in_this_process: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: object) -> None:
        raise DataError("too few items")

    monkeypatch.setattr(compare_tokenizers, "publish_shop", publish)
    empty = replace(grid, recipe=RECIPE.model_copy(update={"seeds": [7, 8]}))
    assert fit_cell(empty, "kmeans", 7) == Fitted(impossible="too few items")
    with pytest.raises(DataError, match=r"no tokenizer can be fitted.*kmeans: too few items; leaves: too few"):
        compare(empty, tmp_path, downstream=False, split="validation", jobs=1, console=QUIET)


def test_real_processes(grid: Grid, capfd: pytest.CaptureFixture[str]) -> None:
    cells = [("kmeans", 0), ("leaves", 0)]
    for cell in cells:
        fit_cell(grid, *cell)
    for kept in grid.work.glob("cell-*.json"):
        kept.unlink()
    for generator in grid.work.glob("generator-*"):
        shutil.rmtree(generator)
    log = io.StringIO()
    done = compare_tokenizers.in_processes(
        partial(measure_cell, grid, "validation"), cells, 2, "generator", Console(file=log, width=200)
    )
    assert set(done) == set(cells)
    assert "generator 2 of 2" in log.getvalue()
    assert "Writing model shards" not in capfd.readouterr().err


def test_a_cell_has_one_thread_and_leaves_the_others_theirs(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def look(*_: object) -> dict[str, float]:
        used.extend([torch.get_num_threads(), *(library["num_threads"] for library in threadpoolctl.threadpool_info())])
        return {"recall10": 0.0}

    fit_cell(grid, "kmeans", 0)
    monkeypatch.setattr(compare_tokenizers, "_measure", look)
    monkeypatch.setattr(compare_tokenizers, "_CELL_VERSION", "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_cell(grid, "validation", "kmeans", 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(used) == {1}


# --- the generator of a cell


def trained(
    shop: Shop, codes: np.ndarray, sizes: tuple[int, ...], work: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, ...]:
    """Codebook sizes of the generator that `train_generator` returns; none is trained."""
    monkeypatch.setattr(train_module, "train", lambda *args, **_: args[5].mkdir(parents=True, exist_ok=True))
    recipe, ids = RECIPE.cell("kmeans", 0), SemanticIds(codes, sizes)
    draft = draft_bundle(recipe, shop, ids, request_features(recipe, shop))
    trained = train_module.train_generator(stage_inputs(recipe, shop, ids, draft, work, QUIET))
    return tuple(trained.generator.config.codebook_sizes)


def test_a_generator_is_read_back_for_the_very_same_inputs_alone(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = grid.shop()
    codes = np.stack([np.arange(100) // 10, np.arange(100) % 10], axis=1).astype(np.int32)
    histories = shop.histories
    others = [
        replace(shop, histories=replace(histories, times=histories.times + 3600)),
        replace(shop, histories=replace(histories, events=(histories.events + 1) % len(histories.event_names))),
        replace(shop, histories=replace(histories, queries=histories.queries[::-1])),
    ]
    assert trained(shop, codes, (10, 16), tmp_path, monkeypatch) == (10, 16)
    assert trained(shop, codes, (10, 16), tmp_path, monkeypatch) == (10, 16)
    assert sum(path.is_dir() for path in tmp_path.glob("next_item-*")) == 1
    # More headroom in a dedup level: equal codes, a larger table.
    assert trained(shop, codes, (10, 32), tmp_path, monkeypatch) == (10, 32)
    for number, other in enumerate(others):
        trained(other, codes, (10, 16), tmp_path, monkeypatch)
        assert sum(path.is_dir() for path in tmp_path.glob("next_item-*")) == number + 3


def cases_of(*relevant: list[int]) -> Cases:
    zeros = np.zeros(len(relevant), np.int64)
    offsets = np.cumsum([0, *map(len, relevant)])
    return Cases(
        zeros,
        zeros,
        zeros,
        [None] * len(relevant),
        [None] * len(relevant),
        np.concatenate(relevant).astype(np.int32),
        offsets,
    )


def lists(*ranked: list[int]) -> np.ndarray:
    return np.array([[*row, *[-1] * (10 - len(row))] for row in ranked], np.int32)


def test_metrics_by_hand() -> None:
    # Items 0 and 1 share their codes. Case 0 wants item 0 and gets item 1: no item-level hit, an SID-level one, of
    # which half counts. Case 1 wants item 2 in second place. Item 2 was never trained on.
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]], np.int32)
    ranked, cases = lists([1, 3], [3, 2]), cases_of([0], [2])
    by_item = item_metrics(ranked, cases, np.array([5, 5, 0, 5]))
    assert by_item["recall10"] == 0.5
    assert by_item["ndcg10"] == pytest.approx(0.5 / np.log2(3))
    assert by_item["cold_recall10"] == 1.0
    assert by_item["coverage10"] == 0.75
    assert sid_metrics(ranked, cases, codes) == {"sid_recall10": 1.0, "corrected_recall10": 0.75}


def test_corrected_recall_of_several_relevant_items() -> None:
    # Items 0 and 1 share codes, 2 and 3 have their own. Case 0 wants 0, 2 and 3 and gets 1 and 2: half of a hit for 0,
    # a whole one for 2, none for 3, of three. Case 1 wants 3, which comes first.
    codes = np.array([[0], [0], [1], [2]], np.int32)
    figures = sid_metrics(lists([1, 2], [3]), cases_of([0, 2, 3], [3]), codes)
    assert figures["corrected_recall10"] == pytest.approx((1.5 / 3 + 1) / 2)
    assert figures["sid_recall10"] == pytest.approx((2 / 3 + 1) / 2)


def test_cohorts_without_a_case_have_no_figure() -> None:
    # 100 interactions: item 0 has 90, the others together 10, so they are the long tail. Nothing is cold.
    counts = np.array([90, 5, 5])
    figures = item_metrics(lists([1], [2]), cases_of([1], [0]), counts)
    assert "cold_recall10" not in figures
    assert figures["long_tail_recall10"] == 1.0
    assert "long_tail_recall10" not in item_metrics(lists([1], [2]), cases_of([0], [0]), counts)
