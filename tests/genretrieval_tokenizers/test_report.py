from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds
from genretrieval_tokenizers.report import gini, report

# Tuples (0, 0) three times, (0, 1) and (1, 1) once; the last level numbers the items of a tuple.
IDS = SemanticIds(np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 2]], np.int32), codebook_sizes=(4, 2, 4))


def test_groups_by_hand() -> None:
    figures = report(IDS)
    assert figures.n_items == 5
    assert figures.distinct == 5
    assert figures.collision_rate_before_dedup == pytest.approx(3 / 5)
    assert figures.collision_rate == 0
    assert figures.largest_group == 3
    assert figures.reconstruction_error is None


def test_levels_by_hand() -> None:
    first, second, dedup = report(IDS).levels
    assert (first.codebook_size, first.used) == (4, 2)
    assert first.entropy == pytest.approx(-0.8 * math.log2(0.8) - 0.2 * math.log2(0.2))
    assert first.perplexity == pytest.approx(2**first.entropy)
    # Loads 0, 0, 1, 4: sum of (2i - n - 1) * load = 1 * 1 + 3 * 4 = 13, over n * total = 20.
    assert first.gini == pytest.approx(13 / 20)
    assert second.used == 2
    assert dedup.used == 3


def test_without_a_dedup_level_every_level_describes() -> None:
    ids = SemanticIds(IDS.codes[:, :2].copy(), (4, 2))
    figures = report(ids, dedup_level=False)
    assert figures.collision_rate_before_dedup == figures.collision_rate == pytest.approx(3 / 5)
    assert figures.distinct == 3
    assert figures.largest_group == 3


def test_a_dedup_level_alone_puts_all_items_in_one_group() -> None:
    figures = report(SemanticIds(np.array([[0], [1]], np.int32), (2,)))
    assert figures.largest_group == 2
    assert figures.collision_rate_before_dedup == 1
    assert figures.collision_rate == 0


def test_reconstruction_error_is_relative_to_the_squared_length() -> None:
    x = np.array([[3.0, 4.0], [0, 0], [0, 0], [0, 0], [0, 5.0]], np.float32)
    near = x.copy()
    near[0, 0] = 4.0
    assert report(IDS, x, near).reconstruction_error == pytest.approx(1 / 50)
    assert report(IDS, x * 0, x * 0).reconstruction_error == 0


def test_one_item_is_all_in_one_code() -> None:
    figures = report(SemanticIds(np.zeros((1, 2), np.int32), (1, 1)))
    assert [level.entropy for level in figures.levels] == [0, 0]
    assert [level.perplexity for level in figures.levels] == [1, 1]
    assert figures.collision_rate_before_dedup == 0
    assert "-0.0000" not in figures.to_markdown()


@pytest.mark.parametrize(
    ("x", "near", "match"),
    [
        (np.zeros((5, 2)), None, "both"),
        (np.zeros((4, 2)), np.zeros((4, 2)), "belong together"),
        (np.zeros((5, 2)), np.zeros((5, 3)), "belong together"),
    ],
)
def test_matrices_that_do_not_belong_are_refused(x: np.ndarray, near: np.ndarray | None, match: str) -> None:
    with pytest.raises(DataError, match=match):
        report(IDS, x, near)


def test_no_items_is_an_error() -> None:
    with pytest.raises(DataError, match="no items"):
        report(SemanticIds(np.zeros((0, 2), np.int32), (2, 2)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_gini_is_the_mean_absolute_difference(loads: list[int]) -> None:
    n, total = len(loads), sum(loads)
    oracle = sum(abs(a - b) for a in loads for b in loads) / (2 * n * total) if total else 0.0
    assert gini(np.array(loads)) == pytest.approx(oracle)


def test_json_and_markdown_carry_every_figure() -> None:
    figures = report(IDS, notes=("level 0 has 4 codes instead of 256",))
    loaded = json.loads(figures.to_json())
    assert loaded["distinct"] == 5
    assert loaded["levels"][0]["used"] == 2
    text = figures.to_markdown()
    assert "| collision_rate_before_dedup | 0.6000 |" in text
    assert "| reconstruction_error | - |" in text
    assert "| 2 (dedup) | 4 | 3 |" in text
    assert text.endswith("Note: level 0 has 4 codes instead of 256.\n")
