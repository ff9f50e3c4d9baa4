"""Pull collaborative pairs together while codes are learned: the dual-tower InfoNCE loss of QuaSID and AdaSID.

QuaSID (arXiv 2603.00632) and AdaSID (arXiv 2604.23522), on Swing pairs; both towers are one shared encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from genretrieval.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Contrast:
    """Settings of the contrastive loss.

    Attributes:
        weight: weight of the loss at its full strength. QuaSID's paper: best near 0.1, bad at 0.5.
        temperature: what cosines are divided by. The paper gives none; 0.07 is a reproduction's.
        ramp_start: progress of training, in ``[0, 1]``, up to which the weight is 0.
        ramp_end: progress from which it is full, linear in between. With both 0 the weight is constant (QuaSID);
            AdaSID ramps it up, its schedule unpublished.

    Raises:
        DataError: a setting is out of range.
    """

    weight: float = 0.1
    temperature: float = 0.07
    ramp_start: float = 0.0
    ramp_end: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.temperature <= 0:
            raise DataError(
                f"weight {self.weight}, temperature {self.temperature}: the weight may not be negative and the "
                "temperature must be above 0, or pairs would be pushed apart"
            )
        check_ramp(self.ramp_start, self.ramp_end)

    def loss(
        self, trigger_BD: Tensor, target_BD: Tensor, trigger_items_B: Tensor, target_items_B: Tensor, progress: float
    ) -> Tensor:
        """Weighted mean over triggers of ``-log softmax`` of their own target among the batch's; a scalar.

        A target that is the same item as the trigger or as the trigger's own target is no negative.

        Args:
            trigger_BD: float ``[B, D]``, encoder outputs.
            target_BD: float ``[B, D]``, those of each trigger's target.
            trigger_items_B: int64 ``[B]``, which item a row is.
            target_items_B: int64 ``[B]``.
            progress: share of training that is over, in ``[0, 1]``.
        """
        import torch
        from torch.nn.functional import cross_entropy, normalize

        if not len(trigger_BD):
            return trigger_BD.sum()
        similarity_BB = normalize(trigger_BD, dim=1) @ normalize(target_BD, dim=1).T / self.temperature
        same_BB = (target_items_B[None] == target_items_B[:, None]) | (target_items_B[None] == trigger_items_B[:, None])
        own_B = torch.arange(len(trigger_BD), device=trigger_BD.device)
        false_negative_BB = same_BB & (own_B[None] != own_B[:, None])
        loss = cross_entropy(similarity_BB.masked_fill(false_negative_BB, -torch.inf), own_B)
        return self.weight * ramp(progress, self.ramp_start, self.ramp_end) * loss


def ramp(progress: float, start: float, end: float) -> float:
    """0 before `start`, 1 from `end` on, linear in between (AdaSID's progress τ); a step where they are equal."""
    if progress >= end:
        return 1.0
    return max(0.0, (progress - start) / (end - start))


def check_ramp(start: float, end: float) -> None:
    """Refuse a schedule that is none.

    Raises:
        DataError: not ``0 <= start <= end <= 1``.
    """
    if not 0 <= start <= end <= 1:
        raise DataError(f"a schedule from {start} to {end}: give shares of training with 0 <= start <= end <= 1")
