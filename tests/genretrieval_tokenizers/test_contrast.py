from __future__ import annotations

import pytest
import torch

from genretrieval.errors import DataError
from genretrieval_tokenizers.contrast import Contrast, ramp

# Two triggers, each with a target of its own direction: cosines [[1, 0], [0, 1]]. Lengths do not count.
TRIGGERS, TARGETS = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 5]])
PLAIN = Contrast(weight=1, temperature=1)


def loss(contrast: Contrast, trigger_items: list[int], target_items: list[int], progress: float = 0) -> float:
    items = torch.tensor(trigger_items), torch.tensor(target_items)
    return float(contrast.loss(TRIGGERS, TARGETS, *items, progress))


def test_info_nce_by_hand() -> None:
    # Each trigger: -log(e^1 / (e^1 + e^0)) = log(1 + 1/e) = 0.31326.
    assert loss(PLAIN, [0, 1], [2, 3]) == pytest.approx(0.31326, abs=1e-5)
    # Temperature 0.5 doubles the logits: log(1 + 1/e^2) = 0.12693; a tenth of it.
    assert loss(Contrast(weight=0.1, temperature=0.5), [0, 1], [2, 3]) == pytest.approx(0.012693, abs=1e-6)


def test_another_copy_of_the_own_target_is_no_negative() -> None:
    assert loss(PLAIN, [0, 1], [2, 2]) == pytest.approx(0)  # nothing is left to compare with


def test_the_trigger_itself_is_no_negative() -> None:
    # Item 0 is the trigger of row 0 and the target of row 1: only row 1 has a negative. 0.31326 / 2.
    assert loss(PLAIN, [0, 1], [2, 0]) == pytest.approx(0.15663, abs=1e-5)


def test_no_pairs_cost_nothing() -> None:
    nothing = torch.zeros(0, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    PLAIN.loss(nothing, nothing, none, none, 0).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("progress", "share"), [(0, 0), (0.2, 0), (0.5, 0.5), (0.8, 1), (1, 1)])
def test_ramp(progress: float, share: float) -> None:
    assert ramp(progress, 0.2, 0.8) == pytest.approx(share)
    ramped = Contrast(weight=1, temperature=1, ramp_start=0.2, ramp_end=0.8)
    assert loss(ramped, [0, 1], [2, 3], progress) == pytest.approx(0.31326 * share, abs=1e-5)


def test_without_a_ramp_the_weight_is_constant() -> None:
    assert ramp(0, 0, 0) == ramp(1, 0, 0) == 1


@pytest.mark.parametrize(
    "setting", [{"weight": -1.0}, {"temperature": 0.0}, {"ramp_start": 0.5}, {"ramp_end": 1.5}, {"ramp_start": -0.1}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(DataError):
        Contrast(**setting)
