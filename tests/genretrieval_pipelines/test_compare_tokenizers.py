from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from genretrieval_pipelines import compare_tokenizers
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.compare_tokenizers import METRICS, Grid, cell_metrics, compare, measure_cell
from genretrieval_pipelines.recipe import ComparisonRecipe
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

    monkeypatch.setattr(compare_tokenizers, "_in_processes", here)
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
    assert "seeds 0, 1" in text
    assert json.loads((tmp_path / "comparison.json").read_text("utf-8"))


def test_a_finished_cell_is_read_back(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_tokenizers.fit_cell(grid, "kmeans", 0)
    first = measure_cell(grid, "validation", "kmeans", 0)

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(compare_tokenizers, "_measure", fail)
    assert measure_cell(grid, "validation", "kmeans", 0) == first
    assert set(first) == set(METRICS)
    with pytest.raises(AssertionError, match="computed again"):
        measure_cell(grid, "test", "kmeans", 0)


def test_cell_metrics_by_hand() -> None:
    # Items 0 and 1 share their codes. Case 0 wants item 0 and gets item 1: no item-level hit, an SID-level one, of
    # which half counts. Case 1 wants item 2 in second place. Item 2 was never trained on.
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]], np.int32)
    ranked = np.full((2, 10), -1, np.int32)
    ranked[0, :2] = [1, 3]
    ranked[1, :2] = [3, 2]
    zeros = np.zeros(2, np.int64)
    cases = Cases(zeros, zeros, zeros, [None, None], np.array([0, 2], np.int32), np.array([0, 1, 2]))
    metrics = cell_metrics(ranked, cases, codes, np.array([5, 5, 0, 5]))
    assert metrics["recall10"] == 0.5
    assert metrics["ndcg10"] == pytest.approx(0.5 / np.log2(3))
    assert metrics["sid_recall10"] == 1.0
    assert metrics["corrected_recall10"] == 0.75
    assert metrics["cold_recall10"] == 1.0
    assert metrics["coverage10"] == 0.75
