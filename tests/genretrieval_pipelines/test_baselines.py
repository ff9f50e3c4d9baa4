from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genretrieval import metrics
from genretrieval.errors import DataError, InvalidInputError, RecipeError
from genretrieval.histories import NO_QUERY, NO_TIME, Histories, LeaveOneOut
from genretrieval.metrics import NOTHING
from genretrieval_pipelines.baselines.blend import blend, choose_weight
from genretrieval_pipelines.baselines.counts import Markov, Popularity, PopularityPerQuery, training_queries
from genretrieval_pipelines.baselines.ranking import CHUNK, top_items
from genretrieval_pipelines.baselines.sasrec import Sasrec, SasrecConfig, batches, windows
from genretrieval_pipelines.baselines.search import BM25, DenseRetrieval, tokenize
from genretrieval_pipelines.cases import Cases, leave_one_out_cases, query_cases


def histories(*sequences: list[int], queries: list[list[str | None]] | None = None) -> Histories:
    flat = [item for sequence in sequences for item in sequence]
    asked = [query for row in queries for query in row] if queries else [None] * len(flat)
    known = sorted({query for query in asked if query is not None})
    return Histories(
        user_ids=[f"u{i}" for i in range(len(sequences))],
        offsets=np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64),
        items=np.array(flat, np.int32),
        events=np.zeros(len(flat), np.int16),
        times=np.full(len(flat), NO_TIME, np.int64),
        query_rows=np.array([NO_QUERY if q is None else known.index(q) for q in asked], np.int32),
        event_names=("purchase",),
        queries=known,
        order_rule="as given",
    )


def no_history(queries: list[str | None]) -> Cases:
    n = len(queries)
    zeros = np.zeros(n, np.int64)
    return Cases(np.full(n, -1, np.int64), zeros, zeros, queries, [None] * n, np.zeros(n, np.int32), np.arange(n + 1))


# Training parts: [0 1 2], [0 1], [1 2], [3 3]; the first three have a validation and a test item after it.
SHOP = histories([0, 1, 2, 3, 0], [0, 1, 2, 4], [1, 2, 4, 0], [3, 3])
N_ITEMS = 6
TRAIN_ENDS = LeaveOneOut(SHOP).train_ends()


class TestTopItems:
    def test_ties_go_to_the_lower_row_and_infinity_is_nothing(self) -> None:
        scores = np.array([[1.0, 3.0, 3.0, -np.inf], [0.0, -0.0, -1.0, -2.0]], np.float32)
        assert top_items(scores, 4).tolist() == [[1, 2, 0, NOTHING], [0, 1, 2, 3]]
        assert top_items(scores, 6)[0].tolist() == [1, 2, 0, NOTHING, NOTHING, NOTHING]

    def test_k_below_one(self) -> None:
        with pytest.raises(InvalidInputError, match="k is 0"):
            top_items(np.zeros((1, 3), np.float32), 0)

    @given(
        hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-3, 3, width=32)),
        st.integers(1, 9),
    )
    def test_against_a_stable_sort(self, scores: np.ndarray, k: int) -> None:
        kept = min(k, scores.shape[1])
        assert np.array_equal(top_items(scores, k)[:, :kept], np.argsort(-scores, axis=1, kind="stable")[:, :kept])


class TestCounts:
    def test_popularity_counts_training_alone(self) -> None:
        popularity = Popularity.fit(SHOP, TRAIN_ENDS, N_ITEMS)
        assert popularity.counts.tolist() == [2, 3, 2, 2, 0, 0]
        ranked = popularity.rank(SHOP, leave_one_out_cases(SHOP, "validation"), 3, exclude_seen=False)
        assert ranked.tolist() == [[1, 0, 2]] * 3

    def test_exclude_seen_removes_the_whole_history(self) -> None:
        popularity = Popularity.fit(SHOP, TRAIN_ENDS, N_ITEMS)
        ranked = popularity.rank(SHOP, leave_one_out_cases(SHOP, "test"), N_ITEMS, exclude_seen=True)
        assert ranked[0].tolist() == [4, 5, NOTHING, NOTHING, NOTHING, NOTHING]
        assert ranked[1].tolist() == [3, 4, 5, NOTHING, NOTHING, NOTHING]

    def test_markov_training_transitions(self) -> None:
        markov = Markov.fit(SHOP, N_ITEMS, transitions="training")
        # 0>1 twice, 1>2 twice, 3>3 once; no step leads from one user to the next.
        assert markov.transitions.sum() == 5
        assert markov.transitions[[0], [1]].tolist() == [2.0]
        validation = leave_one_out_cases(SHOP, "validation")  # last items 2, 1, 2
        assert markov.rank(SHOP, validation, 2, exclude_seen=False).tolist() == [[1, 0], [2, 1], [1, 0]]

    def test_markov_with_validation_transitions_says_so_and_refuses_validation(self) -> None:
        markov = Markov.fit(SHOP, N_ITEMS, transitions="training + validation")
        assert "training + validation" in markov.name
        assert markov.transitions.sum() == 8
        assert markov.popularity.counts.tolist() == [2, 3, 3, 3, 1, 0]
        test = leave_one_out_cases(SHOP, "test")  # last items 3, 2, 4: 3>3; 2>3 and 2>4; 4 leads nowhere
        assert markov.rank(SHOP, test, 2, exclude_seen=False).tolist() == [[3, 1], [3, 4], [1, 2]]
        with pytest.raises(InvalidInputError, match="the very targets"):
            markov.rank(SHOP, leave_one_out_cases(SHOP, "validation"), 2, exclude_seen=False)

    def test_markov_without_a_history_is_popularity(self) -> None:
        markov = Markov.fit(SHOP, N_ITEMS, transitions="training")
        assert markov.rank(SHOP, no_history([None]), 3, exclude_seen=True).tolist() == [[1, 0, 2]]

    def test_popularity_per_query(self) -> None:
        per_query = PopularityPerQuery.fit(["tea", "tea", "cup", "tea"], np.array([2, 2, 1, 0], np.int32), 4)
        ranked = per_query.rank(SHOP, no_history(["tea", "never asked", None]), 3, exclude_seen=False)
        assert ranked.tolist() == [[2, 0, 1], [2, 0, 1], [2, 0, 1]]
        assert per_query.rank(SHOP, no_history(["cup"]), 2, exclude_seen=False).tolist() == [[1, 2]]

    def test_training_queries_stop_before_validation(self) -> None:
        log = histories([0, 1, 2, 3], queries=[["a", None, "b", "c"]])
        queries, items = training_queries(log, LeaveOneOut(log).train_ends())
        assert queries == ["a"]
        assert items.tolist() == [0]

    def test_chunks_join_seamlessly(self) -> None:
        many = histories(*[[i % 5, (i + 1) % 5, (i + 2) % 5, (i + 3) % 5] for i in range(CHUNK + 7)])
        markov = Markov.fit(many, 5, transitions="training")
        cases = leave_one_out_cases(many, "test")
        ranked = markov.rank(many, cases, 3, exclude_seen=False)
        assert len(ranked) == CHUNK + 7
        alone = markov.rank(many, cases.take(np.array([CHUNK + 3])), 3, exclude_seen=False)
        assert ranked[CHUNK + 3].tolist() == alone[0].tolist()


class TestSearch:
    def test_words_and_scripts_without_spaces(self) -> None:
        assert tokenize("Red-Wine GLASS, 2x") == ["red", "wine", "glass", "2x"]
        assert tokenize("红葡萄酒 glass") == ["红葡", "葡萄", "萄酒", "glass"]
        assert tokenize("茶") == ["茶"]
        assert tokenize("") == []

    def test_bm25_ranks_what_shares_words_and_nothing_else(self) -> None:
        bm25 = BM25.fit(["green tea", "green tea cup for green tea lovers and friends", "red cup", "红葡萄酒"])
        cases = no_history(["tea", "葡萄", "unheard of", None, "RED cup"])
        ranked = bm25.rank(SHOP, cases, 3, exclude_seen=False)
        assert ranked[:4].tolist() == [[0, 1, -1], [3, -1, -1], [-1, -1, -1], [-1, -1, -1]]
        assert ranked[4].tolist() == [2, 1, -1]

    def test_bm25_by_hand(self) -> None:
        bm25 = BM25.fit(["tea", "tea cup", "cup cup cup"])
        idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
        lengths = np.array([1.0, 2.0])
        expected = idf / (1 + 1.5 * (1 - 0.75 + 0.75 * lengths / 2.0))
        assert bm25.scores(SHOP, no_history(["tea"]))[0, :2] == pytest.approx(expected, rel=1e-5)

    def test_bm25_of_a_catalogue_without_words(self) -> None:
        assert BM25.fit(["", "!"]).rank(SHOP, no_history(["tea"]), 1, exclude_seen=False).tolist() == [[NOTHING]]

    def test_dense_retrieval_is_the_cosine(self) -> None:
        items = np.array([[10.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
        dense = DenseRetrieval(items, ["up"], np.array([[0.0, 3.0]], np.float32))
        assert dense.scores(SHOP, no_history(["up"]))[0] == pytest.approx([0.0, 2**-0.5, 0.0])
        assert dense.rank(SHOP, no_history([None]), 1, exclude_seen=False).tolist() == [[NOTHING]]
        with pytest.raises(InvalidInputError, match="no embedding was given for the query 'down'"):
            dense.scores(SHOP, no_history(["down"]))
        with pytest.raises(InvalidInputError, match=r"expected \(2, 2\)"):
            DenseRetrieval(items, ["up", "down"], np.zeros((1, 2), np.float32))

    def test_search_cases_are_ranked_too(self) -> None:
        cases = query_cases(pl.DataFrame({"query": ["tea", "tea"], "item_row": [0, 1]}))
        ranked = BM25.fit(["tea", "green tea", "cup"]).rank(SHOP, cases, 2, exclude_seen=True)
        assert metrics.recall(ranked, cases.relevant, cases.relevant_offsets, 2).tolist() == [1.0]


class TestBlend:
    ours = np.array([[1, 2, 3], [4, NOTHING, NOTHING]], np.int32)
    other = np.array([[3, 5, 1], [6, 4, 0]], np.int32)

    def test_reciprocal_rank_fusion_by_hand(self) -> None:
        # Case 0: items 1 and 3 tie (places 1 and 3 of the two lists), then 2 and 5 (one second place each).
        assert blend([self.ours, self.other], [0.5, 0.5], 4).tolist() == [[1, 3, 2, 5], [4, 6, 0, NOTHING]]

    def test_all_weight_on_one_list_is_that_list(self) -> None:
        assert blend([self.ours, self.other], [1.0, 0.0], 3).tolist() == self.ours.tolist()
        assert blend([self.ours, self.other], [0.0, 1.0], 3).tolist() == self.other.tolist()

    def test_weights_are_checked(self) -> None:
        with pytest.raises(InvalidInputError, match="one weight >= 0 a list"):
            blend([self.ours], [0.5, 0.5], 3)
        with pytest.raises(InvalidInputError, match="one weight >= 0 a list"):
            blend([self.ours], [-1.0], 3)

    def test_the_weight_that_finds_the_targets_wins(self) -> None:
        cases = no_history([None, None])
        right, wrong = np.array([[0], [0]], np.int32), np.array([[9], [9]], np.int32)
        assert choose_weight(right, wrong, cases, k=1) == 0.0
        assert choose_weight(wrong, right, cases, k=1) == 0.5  # a tie in worth goes to the lower item row


class TestSasrec:
    small = SasrecConfig(dim=16, dropout=0.1, max_history=6, batch_positions=64, max_epochs=12, validation_users=50)

    @staticmethod
    def cycle(n_users: int = 60, n_items: int = 8) -> Histories:
        """Every item is followed by the next one: a sequence model can know the target."""
        return histories(*[[(u + step) % n_items for step in range(4 + u % 9)] for u in range(n_users)])

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"max_epochs": 0}, r"sasrec\.max_epochs is 0; it must be above 0"),
            ({"n_heads": 0}, r"sasrec\.n_heads is 0"),
            ({"dim": 8, "n_heads": 3}, r"sasrec\.dim 8 is no multiple of sasrec\.n_heads 3"),
            ({"dropout": 1.5}, r"sasrec\.dropout is 1\.5"),
            ({"weight_decay": -1.0}, r"sasrec\.weight_decay is -1\.0"),
        ],
    )
    def test_settings_that_nothing_can_be_trained_with_are_refused(self, wrong: dict[str, Any], match: str) -> None:
        with pytest.raises(RecipeError, match=match):
            SasrecConfig(**wrong)

    def test_windows_predict_each_item_once(self) -> None:
        sequence = np.arange(9, dtype=np.int32)
        pieces = windows([sequence, sequence[:1], sequence[:2]], 3)
        assert [p.tolist() for p in pieces] == [[5, 6, 7, 8], [2, 3, 4, 5], [0, 1, 2], [0, 1]]

    def test_batches_hold_every_piece_once_within_the_budget(self) -> None:
        pieces = windows([np.arange(n, dtype=np.int32) for n in (2, 9, 4, 4, 3, 7)], 8)
        held = []
        for items, lengths in batches(pieces, 12, np.random.default_rng(0)):
            assert (items.shape[1] - 1) * len(items) <= 12
            held += [items[row, :length].tolist() for row, length in enumerate(lengths.tolist())]
        assert sorted(held) == sorted(piece.tolist() for piece in pieces)

    def test_learns_what_follows_and_runs_again_equally(self) -> None:
        log = self.cycle()
        sasrec = Sasrec.fit(log, 8, config=self.small)
        cases = leave_one_out_cases(log, "test")
        ranked = sasrec.rank(log, cases, 1, exclude_seen=False)
        assert metrics.recall(ranked, cases.relevant, cases.relevant_offsets, 1).mean() > 0.95
        again = Sasrec.fit(log, 8, config=self.small)
        assert np.array_equal(sasrec.scores(log, cases), again.scores(log, cases))

    def test_scores_are_log_probabilities_whatever_the_company(self) -> None:
        log = self.cycle()
        sasrec = Sasrec.fit(log, 8, config=SasrecConfig(dim=16, max_history=6, max_epochs=1))
        cases = leave_one_out_cases(log, "test")
        scores = sasrec.scores(log, cases)
        assert np.exp(scores).sum(axis=1) == pytest.approx(np.ones(len(cases)), abs=1e-4)
        alone = sasrec.scores(log, cases.take(np.array([17])))
        assert alone[0] == pytest.approx(scores[17], abs=2e-2)  # bfloat16 products of other shapes

    def test_an_empty_history_gets_popularity(self) -> None:
        log = self.cycle()
        sasrec = Sasrec.fit(log, 8, config=SasrecConfig(dim=16, max_history=6, max_epochs=1))
        assert sasrec.scores(log, no_history([None]))[0].tolist() == sasrec.popularity.counts.tolist()

    def test_a_finished_run_is_read_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log, config = self.cycle(), SasrecConfig(dim=16, max_history=6, max_epochs=1)
        first = Sasrec.fit(log, 8, config=config, cache=tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
        other = Sasrec.fit(log, 8, config=SasrecConfig(dim=16, max_history=6, max_epochs=1, seed=1), cache=tmp_path)
        assert other.log["config"]["seed"] == 1

        def fail(*_: object) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr("genretrieval_pipelines.baselines.sasrec.train", fail)
        second = Sasrec.fit(log, 8, config=config, cache=tmp_path)
        cases = leave_one_out_cases(log, "test")
        assert second.log == first.log
        assert np.array_equal(first.scores(log, cases), second.scores(log, cases))

    def test_training_leaves_the_global_generator_alone(self) -> None:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        Sasrec.fit(self.cycle(20), 8, config=SasrecConfig(dim=16, max_history=6, max_epochs=1))
        assert torch.equal(before, torch.get_rng_state())

    def test_too_little_to_learn_from(self) -> None:
        with pytest.raises(DataError, match="nothing to train on"):
            Sasrec.fit(histories([0, 1, 2]), 3, config=self.small)
        with pytest.raises(DataError, match="no validation item"):
            Sasrec.fit(histories([0, 1]), 3, config=self.small)


@pytest.mark.data
def test_markov_and_popularity_reach_their_published_floor_on_beauty() -> None:
    """Leave-one-out in the published tie order, all users, whole catalogue."""
    folder = os.environ.get("GENRETRIEVAL_DATA")
    if not folder:
        if os.environ.get("REQUIRE_SHARED_DATA") == "1":
            pytest.fail("REQUIRE_SHARED_DATA=1, but GENRETRIEVAL_DATA names no folder")
        pytest.skip("GENRETRIEVAL_DATA names no folder with the real data")
    source = Path(folder) / "amazon_beauty_2014"
    rows = {item: row for row, item in enumerate(pl.read_parquet(source / "items.parquet")["item_id"])}
    log = pl.read_parquet(source / "interactions.parquet").sort("user_id", "position")
    log = log.with_columns(pl.col("item_id").replace_strict(rows, return_dtype=pl.Int32).alias("row"))
    beauty = histories(*log.group_by("user_id", maintain_order=True).agg("row")["row"].to_list())
    cases = leave_one_out_cases(beauty, "test")

    def recall10(ranked: np.ndarray) -> float:
        return float(metrics.recall(ranked, cases.relevant, cases.relevant_offsets, 10).mean())

    ends = LeaveOneOut(beauty).train_ends()
    assert recall10(Popularity.fit(beauty, ends, len(rows)).rank(beauty, cases, 10, exclude_seen=True)) == (
        pytest.approx(0.0115, abs=0.0003)
    )
    for transitions, expected in (("training", 0.0668), ("training + validation", 0.0752)):
        markov = Markov.fit(beauty, len(rows), transitions=transitions)
        assert recall10(markov.rank(beauty, cases, 10, exclude_seen=True)) == pytest.approx(expected, abs=0.0008)
