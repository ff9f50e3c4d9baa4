from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds
from genretrieval_tokenizers.report import PAIRED_ITEMS, TokenizerReport, gini, qualified_collision_rate, report

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
    assert (figures.cur_l1, figures.cur_total, figures.min_perplexity, figures.mean_top1_load) == (1, 1, 1, 1)


def test_utilisation_and_independent_coding_by_hand() -> None:
    figures = report(IDS)
    assert figures.icr == pytest.approx(2 / 5)  # (0, 1) and (1, 1) are of one item each
    assert figures.cur_l1 == pytest.approx(2 / 4)
    assert figures.cur_l1_l2 == pytest.approx(3 / 8)
    assert figures.cur_total == pytest.approx(3 / 8)  # the dedup level does not count
    assert figures.group_sizes == {1: 2, 3: 1}
    # Loads 4, 1 and 3, 2 of the describing levels.
    assert figures.mean_top1_load == pytest.approx((4 / 5 + 3 / 5) / 2)
    assert figures.min_perplexity == pytest.approx(2**0.721928, rel=1e-5)
    assert figures.mean_perplexity == pytest.approx((2**0.721928 + 2**0.970951) / 2, rel=1e-5)


def test_three_levels_have_a_utilisation_of_two_and_of_all() -> None:
    # Codes used: 0, 1 of 3; pairs (0, 0), (0, 1), (1, 0) of 6; four tuples of 12.
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]], np.int32)
    figures = report(SemanticIds(codes, (3, 2, 2)), dedup_level=False)
    assert (figures.cur_l1, figures.cur_l1_l2, figures.cur_total) == (2 / 3, 3 / 6, 4 / 12)
    assert figures.icr == 1


def test_entropy_of_ids_in_both_units() -> None:
    # Groups of 3, 1, 1 of 5 items: 0.6 * log2(5/3) + 2 * 0.2 * log2(5) = 0.442179 + 0.928771 bits.
    figures = report(IDS)
    assert figures.sid_entropy_bits == pytest.approx(1.370951, abs=1e-6)
    assert figures.sid_entropy_nats == pytest.approx(0.950271, abs=1e-6)
    every = report(SemanticIds(np.arange(12101, dtype=np.int32)[:, None], (12101,)), dedup_level=False)
    assert every.sid_entropy_nats == pytest.approx(9.401, abs=1e-3)  # ln 12101, beside QuaSID's 9.39 on these items


def test_what_was_encoded_before_reassignment_counts_as_before() -> None:
    encoded = np.array([[0, 0], [0, 0], [1, 1], [0, 0]], np.int32)
    ids = SemanticIds(np.array([[0, 0], [0, 1], [1, 1], [0, 2]], np.int32), (2, 3))
    figures = report(ids, dedup_level=False, encoded=encoded)
    assert figures.collision_rate_before_dedup == pytest.approx(3 / 4)
    assert figures.collision_rate == 0
    assert figures.moved == 2
    assert figures.icr == 1
    with pytest.raises(DataError, match="do not belong together"):
        report(ids, dedup_level=True, encoded=encoded)


def test_qualified_collisions_are_the_unlike_pairs() -> None:
    # Three items of (0, 0): 0 and 1 have cosine 0.8, 2 is at right angles to 0 and has cosine 0.6 to 1; 3 is alone.
    codes = np.array([[0, 0], [0, 0], [0, 0], [0, 1]], np.int32)
    x = np.array([[5, 0], [4, 3], [0, 2], [1, 1]], np.float32)
    assert qualified_collision_rate(codes, x, 0.7) == pytest.approx(2 / 3)
    assert qualified_collision_rate(codes, x, 0.5) == pytest.approx(1 / 3)
    assert qualified_collision_rate(codes, x, -1) == 0
    assert qualified_collision_rate(codes[2:], x[2:], 0.7) is None
    figures = report(SemanticIds(codes, (1, 2)), x, dedup_level=False, similarity_threshold=0.7)
    assert figures.qualified_collision_rate == pytest.approx(2 / 3)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=15), st.integers(0, 9))
def test_qualified_collisions_agree_with_all_pairs(codes: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((len(codes), 3)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] < 0.3 for i in range(len(codes)) for j in range(i) if codes[i] == codes[j]]
    found = qualified_collision_rate(np.array(codes, np.int32)[:, None], x, 0.3)
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_pairs_of_a_large_group_are_sampled_and_weigh_as_all_of_it() -> None:
    # 1000 items that are all alike make 499,500 pairs; a group of two unlike items adds one.
    codes = np.array([[0]] * 1000 + [[1]] * 2, np.int32)
    x = np.concatenate([np.ones((1000, 2)), [[1, 0], [0, 1]]]).astype(np.float32)
    assert len(codes) > PAIRED_ITEMS
    assert qualified_collision_rate(codes, x, 0.5) == pytest.approx(1 / 499_501)


def test_zeros_are_like_nothing() -> None:
    assert qualified_collision_rate(np.zeros((2, 1), np.int32), np.zeros((2, 3), np.float32), 0.5) == 1


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


def test_a_threshold_without_embeddings_is_refused() -> None:
    with pytest.raises(DataError, match="similarity_threshold compares embeddings"):
        report(IDS, similarity_threshold=0.5)


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
    assert "| sid_entropy_nats | 0.9503 |" in text
    assert "| 1 | 2 |\n| 3-4 | 1 |" in text
    assert loaded["group_sizes"] == {"1": 2, "3": 1}
    assert text.endswith("Note: level 0 has 4 codes instead of 256.\n")


def test_a_report_reads_back_as_it_was_written() -> None:
    x = np.ones((5, 2), np.float32)
    figures = report(IDS, x, x, similarity_threshold=0.5, fit_seconds=1.5, notes=("a", "b"))
    assert TokenizerReport.from_json(figures.to_json()) == figures


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"levels": 3}', '{"levels": [], "group_sizes": {}, "notes": []}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no tokenizer report"):
        TokenizerReport.from_json(text)
