"""AdaSID's repulsion: as QuaSID's, but similar items may share codes, and crowded codes are emptied first.

AdaSID (arXiv 2604.23522): semantic relaxation (SeAR), load-adaptive strength (LAS) and progress-adaptive rebalancing
(PAR). The paper publishes the form of each and no number: every default below is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from genretrieval.errors import DataError
from genretrieval_tokenizers.contrast import check_ramp, ramp
from genretrieval_tokenizers.quasid import cosines, valid_pairs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdaptiveRepulsion:
    """Repulsion by overlap depth, the number of levels in which two items have equal codes.

    What depends on the depth is given for depth 1 and for equal codes (full), and is linear in between, so that one
    setting serves any number of levels. All numbers are our choices; the paper has none. The thresholds were
    set by an RQ-VAE of 3 x 256 codes on Amazon Beauty 2014, in which items that share one code have a median cosine of
    0.3 (95th percentile 0.84), and items that share all codes one of 0.98.

    Attributes:
        kind: tag of this repulsion in recipes.
        weight: weight of the loss at the start of training. 0.2 is QuaSID's for full collisions.
        margin_one: cosine distance that items sharing one code are pushed to.
        margin_full: the same for items sharing all; no less than `margin_one`. 0.2 and 0.8 give 0.5, QuaSID's margin
            for partial collisions, at depth 2 of 3.
        relax_one: SeAR threshold: items sharing one code whose cosine is at least this are left alone.
        relax_full: the same for items sharing all codes; no less than `relax_one`.
        strength_min: LAS: factor of a pair whose kind of overlap is rare.
        strength_max: factor of a pair whose kind of overlap is as frequent as `load_max` or more.
        load_max: pairs in the batch with the same kind of overlap (equal codes in the same levels) that count as full
            load; it goes with the batch size.
        load_power: steepness, the power of the load's share; below 1 the factor rises early.
        start: PAR: progress of training, in ``[0, 1]``, from which the loss is faded down.
        end: progress from which it stays at its least weight.
        least: share of `weight` that is left then, in ``[0, 1]``.

    Raises:
        DataError: a setting is out of range.
    """

    kind: Literal["adaptive"] = "adaptive"
    weight: float = 0.2
    margin_one: float = 0.2
    margin_full: float = 0.8
    relax_one: float = 0.9
    relax_full: float = 0.98
    strength_min: float = 0.5
    strength_max: float = 2.0
    load_max: int = 100
    load_power: float = 0.5
    start: float = 0.2
    end: float = 0.8
    least: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.margin_one <= self.margin_full <= 2:
            raise DataError(
                f"margin_one {self.margin_one}, margin_full {self.margin_full}: give cosine distances with "
                "0 <= margin_one <= margin_full <= 2; a larger margin for lesser overlap would invert the order"
            )
        if not -1 <= self.relax_one <= self.relax_full:
            raise DataError(
                f"relax_one {self.relax_one}, relax_full {self.relax_full}: give cosines with -1 <= relax_one <= "
                "relax_full (above 1 none is relaxed); deeper overlap needs more similarity to be left alone"
            )
        if not 0 <= self.strength_min <= self.strength_max or self.load_max < 1 or self.load_power <= 0:
            raise DataError(
                f"strength_min {self.strength_min}, strength_max {self.strength_max}, load_max {self.load_max}, "
                f"load_power {self.load_power}: give 0 <= strength_min <= strength_max, load_max of at least 1 and a "
                "power above 0, or crowded codes would be pushed less than empty ones"
            )
        if self.weight < 0 or not 0 <= self.least <= 1:
            raise DataError(f"weight {self.weight}, least {self.least}: give a weight of 0 or more and a share of it")
        check_ramp(self.start, self.end)

    def loss(self, codes_NL: Tensor, z_ND: Tensor, items_N: Tensor, partner_N: Tensor, progress: float) -> Tensor:
        """Mean conflict of the valid pairs of each depth, added up over depths; as `Repulsion.loss` says.

        The paper writes one sum over pairs. Means, as in QuaSID, keep the strength independent of the batch size, and
        keep the many pairs that share one code from drowning the few that share all.
        """
        import torch

        equal_NNL = codes_NL[:, None] == codes_NL[None]
        overlap_NN = equal_NNL.any(dim=2) & valid_pairs(items_N, partner_N)
        cosine_P, equal_PL = cosines(z_ND)[overlap_NN], equal_NNL[overlap_NN]
        n_levels, overlap_P = equal_PL.shape[1], equal_PL.sum(dim=1)
        depth_P = (overlap_P - 1) / (n_levels - 1) if n_levels > 1 else overlap_P.float()  # 0 for one code, 1 for all
        margin_P = self.margin_one + (self.margin_full - self.margin_one) * depth_P
        relaxed_P = cosine_P >= self.relax_one + (self.relax_full - self.relax_one) * depth_P
        conflict_P = (margin_P - (1 - cosine_P)).clamp_min(0).masked_fill(relaxed_P, 0)
        n_alike_P = torch.bincount(overlap_P)[overlap_P]
        means = (self.strengths(equal_PL) * conflict_P / n_alike_P).sum()
        return self.weight_at(progress) * means

    def strengths(self, equal_PL: Tensor) -> Tensor:
        """LAS factor of each pair, float ``[P]``, from ``[P, L]`` flags of the levels in which its codes are equal."""
        import torch

        signature_P = (equal_PL * 2 ** torch.arange(equal_PL.shape[1], device=equal_PL.device)).sum(dim=1)
        count_P = torch.bincount(signature_P)[signature_P]
        load_P = (count_P / self.load_max).clamp_max(1) ** self.load_power
        return self.strength_min + (self.strength_max - self.strength_min) * load_P

    def weight_at(self, progress: float) -> float:
        """PAR: weight of the loss at a share of training in ``[0, 1]``."""
        return self.weight * (1 - (1 - self.least) * ramp(progress, self.start, self.end))
