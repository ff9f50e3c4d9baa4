from __future__ import annotations

import pytest
import torch

from genretrieval.errors import DataError
from genretrieval_tokenizers.quasid import HammingRepulsion, valid_pairs

# Cosine distances: 0-1 0, 0-2 1, 1-2 1, 0-3 0.4, 1-3 0.4, 2-3 0.2. Rows 0 to 2 have equal codes, row 3 differs in one.
Z = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 4]])
CODES = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 0]])
ITEMS = torch.arange(4)
ALONE = torch.full((4,), -1)


def test_full_and_partial_collisions_by_hand() -> None:
    # Full, margin 0.8: 0.8 + 0 + 0 over 3 pairs. Partial, margin 0.5: 0.1 + 0.1 + 0.3 over 3 pairs.
    # 0.2 * 0.8 / 3 + 0.1 * 0.5 / 3 = 0.07.
    assert float(HammingRepulsion().loss(CODES, Z, ITEMS, ALONE, 0)) == pytest.approx(0.07)
    full_only = HammingRepulsion(weight_partial=0)
    assert float(full_only.loss(CODES, Z, ITEMS, ALONE, 0)) == pytest.approx(0.16 / 3)


def test_the_radius_says_what_collides_partially() -> None:
    codes = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 0, 0]])  # row 3 differs in two levels
    assert float(HammingRepulsion(weight_full=0).loss(codes, Z, ITEMS, ALONE, 0)) == 0
    wider = HammingRepulsion(weight_full=0, radius=2)
    assert float(wider.loss(codes, Z, ITEMS, ALONE, 0)) == pytest.approx(0.05 / 3)


def test_valid_pairs_leave_out_the_own_target_and_the_same_item() -> None:
    # Row 1 is the target of row 0; rows 0 and 2 are one item. Each pair stands once.
    valid = valid_pairs(torch.tensor([7, 8, 7, 9]), torch.tensor([1, 0, -1, -1]))
    assert valid.nonzero().tolist() == [[0, 3], [1, 2], [1, 3], [2, 3]]
    # It suffices that one of the two names the other.
    assert torch.equal(valid, valid_pairs(torch.tensor([7, 8, 7, 9]), torch.tensor([-1, 0, -1, -1])))


def test_items_that_belong_together_are_not_pushed_apart() -> None:
    # Rows 0 and 1 are a pair: what is left of full collisions are distances of 1, beyond the margin.
    full_only = HammingRepulsion(weight_partial=0)
    assert float(full_only.loss(CODES, Z, ITEMS, torch.tensor([1, 0, -1, -1]), 0)) == 0
    assert float(full_only.loss(CODES, Z, torch.tensor([0, 0, 2, 3]), ALONE, 0)) == 0


def test_no_collision_costs_nothing_and_moves_nothing() -> None:
    z = Z.clone().requires_grad_()
    codes = torch.arange(12).reshape(4, 3)
    HammingRepulsion().loss(codes, z, ITEMS, ALONE, 0).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert not z.grad.any()


def test_following_the_gradient_parts_colliding_items() -> None:
    z = torch.tensor([[1.0, 0.1], [1, -0.1]], requires_grad=True)
    for _ in range(200):
        loss = HammingRepulsion().loss(CODES[:2], z, ITEMS[:2], ALONE[:2], 0)
        z = (z - 0.1 * torch.autograd.grad(loss, z)[0]).detach().requires_grad_()
    cosine = torch.cosine_similarity(z[0], z[1], dim=0)
    assert float(cosine.detach()) == pytest.approx(1 - 0.8, abs=0.05)


@pytest.mark.parametrize(
    "setting",
    [
        {"margin_partial": 0.9},
        {"margin_full": 2.5},
        {"margin_partial": -0.1},
        {"radius": -1},
        {"weight_full": -0.1},
        {"weight_partial": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(DataError):
        HammingRepulsion(**setting)  # type: ignore[arg-type]
