from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genretrieval.errors import DataError
from genretrieval.model.fusion import (
    Parts,
    SidFusion,
    SidFusionConfig,
    Variant,
    fuse,
    info_nce,
    similar_items,
    transfer_loss,
)

CODES = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 1, 1], [1, 1, 1]])


def model(variant: Variant = "fusion", **settings: float) -> SidFusion:
    torch.manual_seed(0)
    return SidFusion(CODES, (2, 2, 2), n_opq=1, n_context=3, config=SidFusionConfig(variant, 4, **settings))  # type: ignore[arg-type]


def test_the_fused_sum_by_hand() -> None:
    # A quarter of (4, 0), three quarters of (0, 8), half of (2, 2).
    parts = Parts(torch.tensor([4.0, 0]), torch.tensor([0.0, 8]), torch.tensor([2.0, 2]), torch.tensor([0.25]))
    assert fuse(parts, 0.5).tolist() == [2, 7]


def transfer(gate: float) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss and gradients for softmaxes p = (3/4, 1/4) of the ID embedding and q = (1/2, 1/2) of the shared part."""
    item = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    shared = torch.zeros(1, 2, requires_grad=True)
    gate_B = torch.tensor([gate], requires_grad=True)
    loss = transfer_loss(item, shared, gate_B)
    loss.backward()  # type: ignore[no-untyped-call]
    assert item.grad is not None
    assert shared.grad is not None
    assert gate_B.grad is not None
    return loss.item(), item.grad, shared.grad, gate_B.grad


# KL(p || q) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812. Its slope by the second logits is q - p = (-1/4, 1/4); by the
# first p (ln(p/q) - KL), that is 3/4 (0.405465 - 0.130812) = 0.205990 and its negative.
@pytest.mark.parametrize(
    ("gate", "item_slope", "shared_slope"),
    [(1.0, 0.0, -0.25), (0.0, 0.205990, 0.0), (0.25, 0.75 * 0.205990, 0.25 * -0.25)],
)
def test_transfer_by_hand(gate: float, item_slope: float, shared_slope: float) -> None:
    loss, item, shared, gate_slope = transfer(gate)
    assert loss == pytest.approx(0.130812, abs=1e-6)
    assert item[0].tolist() == pytest.approx([item_slope, -item_slope], abs=1e-6)
    assert shared[0].tolist() == pytest.approx([shared_slope, -shared_slope], abs=1e-6)
    assert gate_slope.item() == pytest.approx(0, abs=1e-7)


def test_equal_representations_have_nothing_to_transfer() -> None:
    x = torch.randn(3, 5)
    assert transfer_loss(x, x + 2.0, torch.full((3,), 0.3)).item() == pytest.approx(0, abs=1e-6)


def test_info_nce_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0], [0, 5]])
    unrelated = torch.eye(2, dtype=torch.bool)
    # Cosine 1 with the positive and 0 with the other anchor: ln(1 + e^(-1/tau)).
    same = torch.tensor([[[2.0, 0]], [[0, 3]]])
    assert info_nce(anchors, same, unrelated, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert info_nce(anchors, same, unrelated, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    # A second positive at cosine 0, as far as the negative: ln 2. The mean of both.
    both = torch.tensor([[[2.0, 0], [0, 1]], [[0, 3], [1, 0]]])
    assert info_nce(anchors, both, unrelated, 1.0).item() == pytest.approx(
        (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    )


def test_related_items_are_no_negatives() -> None:
    anchors = torch.randn(2, 4, requires_grad=True)
    loss = info_nce(anchors, torch.randn(2, 3, 4), torch.ones(2, 2, dtype=torch.bool), 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()


def test_similar_items_by_hand() -> None:
    # Codes of two levels at places 0, 1, 3 on a line each; squared distances add up.
    table = torch.tensor([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]])
    codes = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 2], [1, 2]])
    # From (0, 0): 1, 9, 9 and 10. From (1, 2): (0, 2) at 1, (1, 0) at 9, (0, 0) at 10, (2, 0) at 4 + 9.
    similar = similar_items(codes, [table, table], 1)
    assert similar[0].tolist() == [1]
    assert similar_items(codes, [table, table], 4)[4].tolist() == [3, 1, 0, 2]
    assert similar_items(codes[:, :1], [table], 1)[0].tolist() == [3]  # equal codes are nearest, not the item itself


def test_too_few_items_for_the_similar_ones_are_refused() -> None:
    with pytest.raises(DataError, match="10 similar items of each asked for among 4"):
        similar_items(CODES[:, 2:], [torch.zeros(2, 2)])


def test_items_of_one_semantic_id_share_all_but_the_id() -> None:
    parts = model().parts(torch.tensor([2, 3]), torch.zeros(2, 3))
    assert torch.equal(parts.shared[0], parts.shared[1])
    assert torch.equal(parts.own[0], parts.own[1])
    assert not torch.equal(parts.item[0], parts.item[1])


def test_levels_have_codes_of_their_own() -> None:
    fusion = model()
    with torch.no_grad():
        fusion.code_embedding.weight.copy_(torch.arange(6.0)[:, None].expand(6, 4))
    # Item 0 has codes 0, 0 and 1 of levels that start at 0, 2 and 4.
    assert fusion.shared(torch.tensor(0)).tolist() == [2] * 4
    assert fusion.own(torch.tensor(0)).tolist() == [5] * 4


def test_variants_add_what_they_say() -> None:
    items, context = torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 2, 3)
    fusion = model()
    parts = fusion.parts(items, context)
    assert torch.equal(model("id")(items, context), parts.item)
    assert torch.equal(model("sid")(items, context), parts.shared + parts.own)
    assert torch.equal(model("sum")(items, context), parts.item + parts.shared + parts.own)
    assert torch.equal(fusion(items, context), fuse(parts, 0.5))


@pytest.mark.parametrize("variant", ["id", "sid", "sum"])
def test_plain_variants_have_no_loss_of_their_own(variant: Variant) -> None:
    items = torch.tensor([0, 1])
    assert model(variant).auxiliary_loss(items, torch.zeros(2, 3), torch.tensor([[2], [3]])).item() == 0


def test_auxiliary_losses_are_weighted() -> None:
    items, context, similar = torch.tensor([0, 1, 2]), torch.randn(3, 3), torch.tensor([[3], [0], [3]])

    def loss(transfer_weight: float, contrast_weight: float) -> float:
        fusion = model(transfer_weight=transfer_weight, contrast_weight=contrast_weight)
        return float(fusion.auxiliary_loss(items, context, similar).detach())

    assert loss(0.0, 0.0) == 0
    assert loss(0.01, 0.05) == pytest.approx(0.01 * loss(1.0, 0.0) + 0.05 * loss(0.0, 1.0))


def test_contrast_brings_similar_items_together() -> None:
    fusion = model(transfer_weight=0.0)
    items, similar = torch.tensor([0, 1]), torch.tensor([[2], [2]])
    fusion.auxiliary_loss(items, torch.zeros(2, 3), similar).backward()  # type: ignore[no-untyped-call]
    slopes = fusion.code_embedding.weight.grad
    assert slopes is not None
    assert (slopes[:4] == 0).all()  # RQ codes have no part in it
    assert (slopes[4:] != 0).any()


def test_the_gate_is_a_share() -> None:
    gate = model().parts(torch.tensor([0, 1]), torch.randn(2, 3) * 100).gate
    assert gate.shape == (2, 1)
    assert ((gate >= 0) & (gate <= 1)).all()


@pytest.mark.parametrize(("sizes", "n_opq"), [((2, 2), 1), ((2, 2, 2), 0), ((2, 2, 2), 3)])
def test_codes_that_are_not_of_both_kinds_are_refused(sizes: tuple[int, ...], n_opq: int) -> None:
    with pytest.raises(DataError, match="codes of both kinds"):
        SidFusion(CODES, sizes, n_opq=n_opq, n_context=1, config=SidFusionConfig())


@pytest.mark.parametrize(
    "setting", [{"d_model": 0}, {"d_gate": 0}, {"temperature": 0.0}, {"transfer_weight": -1.0}, {"opq_weight": -0.1}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(DataError):
        SidFusionConfig(**setting)  # type: ignore[arg-type]
