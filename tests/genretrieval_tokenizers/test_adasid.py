from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genretrieval.errors import DataError
from genretrieval_tokenizers.adasid import AdaptiveRepulsion
from genretrieval_tokenizers.quasid import HammingRepulsion

# Cosines: 0-1 0.6, 0-2 0.96, 1-2 0.8.
Z = torch.tensor([[1.0, 0], [0.6, 0.8], [0.96, 0.28]])
ALIKE = torch.ones(3, 2, dtype=torch.long)
ITEMS, ALONE = torch.arange(3), torch.full((3,), -1)
# Weight and every factor 1, nothing relaxed.
PLAIN = AdaptiveRepulsion(weight=1, strength_min=1, strength_max=1, relax_one=1.1, relax_full=1.1)


def loss(repulsion: AdaptiveRepulsion, codes: torch.Tensor, progress: float = 0) -> float:
    return float(repulsion.loss(codes, Z, ITEMS, ALONE, progress))


def test_similar_items_may_share_codes() -> None:
    # Margin 0.8, distances 0.4, 0.04, 0.2: conflicts 0.4, 0.76, 0.6. A threshold of 0.95 lets 0 and 2 be.
    assert loss(PLAIN, ALIKE) == pytest.approx((0.4 + 0.76 + 0.6) / 3)
    assert loss(replace(PLAIN, relax_one=0.9, relax_full=0.95), ALIKE) == pytest.approx((0.4 + 0.6) / 3)


def test_margins_and_thresholds_follow_the_depth() -> None:
    # Rows 0 and 2 share one code of three (margin 0.2), 1 and 2 two (margin 0.5), 0 and 1 none.
    codes = torch.tensor([[1, 8, 9], [0, 2, 3], [1, 2, 3]])
    # Conflicts 0.2 - 0.04 and 0.5 - 0.2, a mean for each depth.
    assert loss(PLAIN, codes) == pytest.approx(0.16 + 0.3)
    # Thresholds 0.95, 0.975, 1 relax the first; 0.7, 0.8, 0.9 both.
    assert loss(replace(PLAIN, relax_one=0.95, relax_full=1), codes) == pytest.approx(0.3)
    assert loss(replace(PLAIN, relax_one=0.7, relax_full=0.9), codes) == 0


def test_one_level_has_full_collisions_alone() -> None:
    assert loss(PLAIN, ALIKE[:, :1]) == pytest.approx((0.4 + 0.76 + 0.6) / 3)


def test_strength_grows_with_the_load_up_to_its_cap() -> None:
    repulsion = AdaptiveRepulsion(strength_min=0.5, strength_max=2, load_max=4, load_power=0.5)
    kinds = [[True, False], [False, True], [True, True]]
    equal = torch.tensor([kind for kind, count in zip(kinds, (1, 4, 9), strict=True) for _ in range(count)])
    # One of 4 is a load of 1/4, to the power of 0.5 1/2: 0.5 + 1.5 / 2. Four and nine are full load.
    assert repulsion.strengths(equal).tolist() == pytest.approx([1.25] + [2.0] * 13)


def test_strength_multiplies_the_conflict() -> None:
    # Three pairs with equal codes of a full load of 12: 0.5 + 1.5 * (3 / 12)^0.5 = 1.25.
    repulsion = replace(PLAIN, strength_min=0.5, strength_max=2, load_max=12, load_power=0.5)
    assert loss(repulsion, ALIKE) == pytest.approx(1.25 * 1.76 / 3)


@pytest.mark.parametrize(("progress", "share"), [(0, 1), (0.2, 1), (0.5, 0.55), (0.8, 0.1), (1, 0.1)])
def test_the_weight_fades_with_progress(progress: float, share: float) -> None:
    repulsion = replace(PLAIN, start=0.2, end=0.8, least=0.1)
    assert repulsion.weight_at(progress) == pytest.approx(share)
    assert loss(repulsion, ALIKE, progress) == pytest.approx(share * 1.76 / 3)


def test_pairs_that_belong_together_neither_conflict_nor_count() -> None:
    # 0 and 2 are a pair. What is left are two pairs: 0.5 + 1.5 * (2 / 8)^0.5 = 1.25.
    repulsion = replace(PLAIN, strength_min=0.5, strength_max=2, load_max=8, load_power=0.5)
    partner = torch.tensor([2, -1, 0])
    assert float(repulsion.loss(ALIKE, Z, ITEMS, partner, 0)) == pytest.approx(1.25 * (0.4 + 0.6) / 2)


def test_neutral_settings_are_the_full_collisions_of_quasid() -> None:
    hamming = HammingRepulsion(weight_full=1)
    assert loss(PLAIN, ALIKE) == pytest.approx(float(hamming.loss(ALIKE, Z, ITEMS, ALONE, 0)))


def test_no_overlap_costs_nothing_and_moves_nothing() -> None:
    z = Z.clone().requires_grad_()
    codes = torch.arange(6).reshape(3, 2)
    AdaptiveRepulsion().loss(codes, z, ITEMS, ALONE, 0).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize(
    "setting",
    [
        {"margin_one": 0.9},
        {"margin_full": 3},
        {"relax_one": 0.99},
        {"strength_min": 3},
        {"load_max": 0},
        {"load_power": 0},
        {"weight": -1},
        {"least": 2},
        {"start": 0.9},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(DataError):
        AdaptiveRepulsion(**setting)  # type: ignore[arg-type]
