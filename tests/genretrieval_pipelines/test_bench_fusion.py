from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genretrieval.errors import DataError
from genretrieval.figures import lines
from genretrieval.histories import Histories
from genretrieval.model.fusion import SidFusionConfig, Variant
from genretrieval_pipelines import bench_fusion as bench
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_tokenizers.rq_opq import RqOpq, RqOpqConfig

QUICK = bench.FusionBenchConfig(
    split="validation", n_seeds=2, epochs=1, batch_size=64, max_history=4, n_eval_negatives=5, n_similar=2
)


def histories(sequences: list[list[int]]) -> Histories:
    lengths = [len(sequence) for sequence in sequences]
    n = sum(lengths)
    return Histories(
        user_ids=[f"u{i}" for i in range(len(sequences))],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(sequences).astype(np.int32),
        events=np.zeros(n, np.int16),
        times=np.full(n, -1, np.int64),
        query_rows=np.full(n, -1, np.int32),
        event_names=("click",),
        queries=[],
        order_rule="as given",
    )


def two_tastes() -> tuple[Histories, bench.Sids]:
    """Items 0-19 and 20-39 are two kinds; a user takes one kind. Items 18, 19, 38 and 39 are validation targets only.

    The first code is the kind; items with code 0 and 1 of the last level are 10 of each kind.
    """
    rng = np.random.default_rng(0)
    sequences = []
    for user in range(120):
        kind = 20 * (user % 2)
        sequences.append([*(kind + rng.integers(0, 18, 8)), kind + rng.integers(18, 20), kind])
    item = np.arange(40)
    codes = torch.from_numpy(np.column_stack([item // 20, item % 2]))
    return histories(sequences), bench.Sids(codes, (2, 2), 1, torch.from_numpy((item[:, None] + [2, 4]) % 40))


def test_auc_by_hand() -> None:
    # Target 3 is above 1 and 2, target 2 above 1 and level with 2: 2 + 1.5 of 4 pairs.
    assert bench.auc(np.array([3.0, 2.0]), np.array([2.0, 1.0])) == 3.5 / 4


def test_gauc_by_hand() -> None:
    # First user: above one of two. Second: level with the only valid one. Third: nothing to compare with.
    targets = np.array([1.0, 5.0, 0.0])
    negatives = np.array([[0.0, 2.0], [5.0, 0.0], [1.0, 1.0]])
    valid = np.array([[True, True], [True, False], [False, False]])
    assert bench.gauc(targets, negatives, valid) == (0.5 + 0.5) / 2


def test_a_history_is_the_nearest_items_before_a_position() -> None:
    examples = bench.Examples.of(histories([[1, 2, 3, 4, 5], [6, 7, 8, 9]]), 10, replace(QUICK, max_history=3))
    items, there = examples.history(np.array([2, 6, 8]))
    assert there.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert items[there].tolist() == [2, 1, 6, 8, 7, 6]


def test_validation_and_test_items_are_not_trained_on() -> None:
    examples = bench.Examples.of(histories([[1, 2, 3, 4, 5], [6, 7, 8, 9], [0, 1]]), 10, QUICK)
    assert examples.items[examples.train_positions].tolist() == [2, 3, 7, 1]
    assert examples.items[examples.eval_positions].tolist() == [4, 8]
    assert examples.counts_N.tolist() == [1, 2, 1, 1, 0, 0, 1, 1, 0, 0]


def test_negatives_are_of_the_cohort_and_not_of_the_user() -> None:
    logs, _ = two_tastes()
    examples = bench.Examples.of(logs, 40, QUICK)
    everything, unseen = examples.cohorts[""], examples.cohorts["cold_"]
    assert len(everything.cases_B) == len(unseen.cases_B) == 120  # all targets are unseen ones
    assert (examples.counts_N[everything.negatives_BC] > 0).all()
    assert set(unseen.negatives_BC.ravel()) == {18, 19, 38, 39}
    for cohort in (everything, unseen):
        for case, negatives, valid in zip(cohort.cases_B, cohort.negatives_BC, cohort.valid_BC, strict=True):
            taken = set(logs.items[logs.offsets[case] : logs.offsets[case + 1]].tolist())
            assert valid.tolist() == [int(item) not in taken for item in negatives]


def test_similar_items_are_those_whose_opq_codes_stand_near() -> None:
    codebooks = (np.zeros((1, 1), np.float32), np.array([[0], [3], [4]], np.float32))
    config = RqOpqConfig(codebook_sizes=(1,), n_subvectors=1, normalize_residuals=False)
    tokenizer = RqOpq(config, codebooks, np.ones(2, np.float32))
    sids = bench.Sids.of(tokenizer, np.array([[4], [0], [3], [4.2]], np.float32), n_similar=1)
    assert sids.codes_NM[:, -1].tolist() == [2, 0, 1, 2]
    # 0 is 9 from 3; equal codes are 0 apart; 3 is 1 from both items at 4.
    assert sids.similar_NP[[1, 0, 3]].tolist() == [[2], [3], [0]]
    assert sids.similar_NP[2].item() in (0, 3)


@pytest.mark.parametrize(("variant", "knows"), [("id", False), ("sid", True), ("fusion", True)])
def test_codes_know_cold_items(variant: Variant, knows: bool) -> None:
    """The property that the method exists for: an item that no one has taken is placed by what it shares.

    At best 5/6: of the three others that no one has taken, two are of the other kind, one is as good as the target.
    """
    logs, sids = two_tastes()
    config = replace(QUICK, epochs=12, learning_rate=0.01)
    examples = bench.Examples.of(logs, 40, config)
    figures = bench.evaluate(bench.train(examples, sids, SidFusionConfig(variant), config, seed=1), examples)
    assert (figures["cold_gauc"] > 0.75) == knows


def test_equal_seeds_train_equal_models() -> None:
    logs, sids = two_tastes()
    examples = bench.Examples.of(logs, 40, QUICK)
    state = torch.get_rng_state()
    first, again, other = (
        bench.evaluate(bench.train(examples, sids, SidFusionConfig(), QUICK, seed), examples) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert torch.equal(state, torch.get_rng_state())


def test_figures_of_a_demo_shop(tmp_path: Path) -> None:
    synthesize(tmp_path / "shop", ShopConfig(n_items=60, n_users=40, mean_history=20.0, median_history=10.0))
    figures = bench.bench_fusion(
        tmp_path / "shop",
        tmp_path / "work",
        embeddings=(EmbeddingPart(name="hashing"),),
        tokenizer=RqOpqConfig(codebook_sizes=(4, 4), n_subvectors=2),
        config=QUICK,
    )
    assert lines(figures)
    for variant in bench.VARIANTS:
        for name in ("auc", "gauc", "sparse_auc", "sparse_gauc"):
            figure = figures[f"fusion.{variant}.{name}"]
            assert figure.spread is not None
            assert 0 <= figure.spread[0] <= figure.value <= figure.spread[1] <= 1
    assert 0 < figures["fusion.sparse_cases"].value <= figures["fusion.cases"].value
    gain = figures["fusion.fusion.auc_over_id"].value
    assert gain == pytest.approx(figures["fusion.fusion.auc"].value - figures["fusion.id.auc"].value)


def test_a_cohort_without_cases_has_no_figures() -> None:
    logs, sids = two_tastes()
    config = replace(QUICK, n_seeds=1)
    seen = histories([[*logs.items[a : b - 2], 0, 20] for a, b in zip(logs.offsets, logs.offsets[1:], strict=False)])
    figures = bench.measure(bench.Examples.of(seen, 40, config), sids, config)
    assert figures["fusion.cold_cases"].value == 0
    assert "fusion.fusion.cold_auc" not in figures
    assert "fusion.fusion.auc" in figures


def test_a_shop_without_histories_is_refused() -> None:
    with pytest.raises(DataError, match="no user has two interactions before validation"):
        bench.Examples.of(histories([[1, 2, 3], [4]]), 5, QUICK)


@pytest.mark.parametrize("setting", [{"n_seeds": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"sparse_below": 0}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(DataError):
        bench.FusionBenchConfig(**setting)  # type: ignore[arg-type]
