"""QuaSID's repulsion: items whose codes coincide are pushed apart, unless they belong together.

QuaSID (arXiv 2603.00632): Hamming-guided margin repulsion (HaMR) with conflict-aware valid-pair masking (CVPM). The
loss reads codes and continuous vectors alone, so any learned tokenizer can take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from genretrieval.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8
"""Added to the number of pairs, so that a mean over none is 0."""


class Repulsion(Protocol):
    """A loss on a batch that pushes items apart whose codes coincide."""

    def loss(self, codes_NL: Tensor, z_ND: Tensor, items_N: Tensor, partner_N: Tensor, progress: float) -> Tensor:
        """Strength of the conflicts in a batch, weighted; a scalar whose gradient reaches `z_ND` alone.

        Args:
            codes_NL: int64 ``[N, L]``, codes as they are now.
            z_ND: float ``[N, D]``, continuous outputs of the encoder; only their directions count.
            items_N: int64 ``[N]``, which item a row is; an item may stand in several rows.
            partner_N: int64 ``[N]``, batch row of the item that a row was drawn with as a pair, -1 for none.
            progress: share of training that is over, in ``[0, 1]``.
        """
        ...


@dataclass(frozen=True, slots=True)
class HammingRepulsion:
    """Repulsion by Hamming distance of the codes, QuaSID's HaMR.

    Defaults are the paper's best values for three levels; it reports harm from weights of 0.5 on.

    Attributes:
        kind: tag of this repulsion in recipes.
        margin_full: cosine distance that items with equal codes are pushed to.
        margin_partial: the same for items whose codes differ in at most `radius` levels; no more than `margin_full`.
        radius: levels in which partially colliding items may differ.
        weight_full: weight of the mean over fully colliding pairs.
        weight_partial: weight of the mean over partially colliding pairs.

    Raises:
        DataError: a setting is out of range.
    """

    kind: Literal["hamming"] = "hamming"
    margin_full: float = 0.8
    margin_partial: float = 0.5
    radius: int = 1
    weight_full: float = 0.2
    weight_partial: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.margin_partial <= self.margin_full <= 2:
            raise DataError(
                f"margin_partial {self.margin_partial}, margin_full {self.margin_full}: give cosine distances with "
                "0 <= margin_partial <= margin_full <= 2; a larger margin for lesser conflicts would invert the order"
            )
        if self.radius < 0 or self.weight_full < 0 or self.weight_partial < 0:
            raise DataError(
                f"radius {self.radius}, weight_full {self.weight_full}, weight_partial {self.weight_partial}: none may "
                "be negative; a negative weight would pull colliding items together"
            )

    def loss(self, codes_NL: Tensor, z_ND: Tensor, items_N: Tensor, partner_N: Tensor, progress: float) -> Tensor:
        """HaMR as `Repulsion.loss` says; `progress` is not read."""
        hamming_NN = (codes_NL[:, None] != codes_NL[None]).sum(dim=2)
        distance_NN = 1 - cosines(z_ND)
        valid_NN = valid_pairs(items_N, partner_N)
        full_NN = valid_NN & (hamming_NN == 0)
        partial_NN = valid_NN & (hamming_NN > 0) & (hamming_NN <= self.radius)
        return self.weight_full * mean_hinge(distance_NN[full_NN], self.margin_full) + (
            self.weight_partial * mean_hinge(distance_NN[partial_NN], self.margin_partial)
        )


def valid_pairs(items_N: Tensor, partner_N: Tensor) -> Tensor:
    """Pairs of rows that may be pushed apart (CVPM), bool ``[N, N]``, each pair once (above the diagonal).

    Left out are two rows of one item, and a row with its own partner: these ought to be close.

    Args:
        items_N: int64 ``[N]``, which item a row is.
        partner_N: int64 ``[N]``, batch row of its Swing partner, -1 for none.
    """
    import torch

    row_N = torch.arange(len(items_N), device=items_N.device)
    partners_NN = partner_N[:, None] == row_N[None]
    same_item_NN = items_N[:, None] == items_N[None]
    return (~(partners_NN | partners_NN.T | same_item_NN)).triu(1)


def cosines(z_ND: Tensor) -> Tensor:
    """Cosine of every pair of rows, float ``[N, N]``."""
    import torch

    e_ND = torch.nn.functional.normalize(z_ND, dim=1)
    return e_ND @ e_ND.T


def mean_hinge(distance_P: Tensor, margin: float) -> Tensor:
    """Mean of ``max(0, margin - distance)`` over pairs, 0 without any."""
    return (margin - distance_P).clamp_min(0).sum() / (len(distance_P) + _EPSILON)
