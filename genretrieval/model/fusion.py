"""Item representations for a ranking model from an ID embedding and a semantic ID (COINS, arXiv 2510.12604).

An item that was met often is known by its ID embedding; one that was not is known by what it shares with others. The
residual codes (RQ) of a semantic ID are that shared part, and knowledge passes between the two in the direction that a
gate says. The codes of product quantisation on the residual (OPQ) are what tells an item from those it shares with.

Tensor names carry their shape: B items of a batch, D width, M codes of an item, P positives, N all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genretrieval.errors import DataError

Variant = Literal["id", "sid", "sum", "fusion"]
_SIMILAR_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class SidFusionConfig:
    """Settings of `SidFusion`; the defaults of the four numbers are the paper's.

    Attributes:
        variant: "fusion" is the method. The others are what it is measured against: "id" has the ID embedding alone,
            "sid" the sum of the codes' embeddings, "sum" both added, without gate or losses of their own.
        d_model: width of a representation.
        d_gate: width of the gate's hidden layer.
        transfer_weight: weight of the adaptive transfer loss (alpha 1).
        contrast_weight: weight of the contrastive loss (alpha 2).
        temperature: of the contrastive loss (tau).
        opq_weight: share of the OPQ part in the representation (lambda).

    Raises:
        DataError: a setting is out of range.
    """

    variant: Variant = "fusion"
    d_model: int = 32
    d_gate: int = 32
    transfer_weight: float = 0.01
    contrast_weight: float = 0.05
    temperature: float = 0.1
    opq_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.d_gate < 1:
            raise DataError(f"d_model {self.d_model}, d_gate {self.d_gate}: give widths of 1 or more")
        if self.temperature <= 0:
            raise DataError(f"temperature is {self.temperature}; cosines are divided by it, so give one above 0")
        if min(self.transfer_weight, self.contrast_weight, self.opq_weight) < 0:
            raise DataError(
                f"transfer_weight {self.transfer_weight}, contrast_weight {self.contrast_weight}, opq_weight "
                f"{self.opq_weight}: none may be negative; a negative weight would train away from what it is for"
            )


class Parts(NamedTuple):
    """What an item's representation is made of; float ``[..., D]`` each, the gate ``[..., 1]`` in (0, 1)."""

    item: Tensor
    shared: Tensor
    own: Tensor
    gate: Tensor


class SidFusion(nn.Module):
    """Representations of the items of one catalogue.

    With `I_id` the ID embedding, `I_RQ` the sum of the RQ codes' embeddings and `I_OPQ` that of the OPQ codes'::

        T_g = gate(C, U_p, X)
        I_c = T_g I_id + (1 - T_g) I_RQ
        I_f = I_c + lambda I_OPQ

    The paper leaves open how codes are fused. Residual codes stand for vectors that are added, and so do the parts of a
    product quantiser side by side, so their embeddings are added.
    """

    codes: Tensor

    def __init__(
        self, codes_NM: Tensor, codebook_sizes: Sequence[int], n_opq: int, n_context: int, config: SidFusionConfig
    ) -> None:
        """Draw embeddings and gate.

        Args:
            codes_NM: int64 ``[N, M]``, RQ codes and behind them OPQ codes.
            codebook_sizes: codes of each of the M levels.
            n_opq: how many of the levels are OPQ codes.
            n_context: numbers that `forward` is given beside each item.
            config: settings.

        Raises:
            DataError: there are no RQ or no OPQ codes, or sizes and codes have different numbers of levels.
        """
        super().__init__()
        n_levels = len(codebook_sizes)
        if codes_NM.shape[1] != n_levels or not 0 < n_opq < n_levels:
            raise DataError(
                f"codes of shape {tuple(codes_NM.shape)}, {n_levels} codebook sizes, {n_opq} OPQ codes: give a size "
                "for each level and codes of both kinds, as an RQ-OPQ tokenizer makes; both parts need one to stand on"
            )
        self.config = config
        self.n_rq = n_levels - n_opq
        starts = torch.tensor([0, *codebook_sizes[:-1]]).cumsum(0)
        self.register_buffer("codes", codes_NM + starts)
        self.id_embedding = nn.Embedding(len(codes_NM), config.d_model)
        self.code_embedding = nn.Embedding(sum(codebook_sizes), config.d_model)
        for embedding in (self.id_embedding, self.code_embedding):
            nn.init.normal_(embedding.weight, std=config.d_model**-0.5)
        self.gate = nn.Sequential(
            nn.Linear(n_context, config.d_gate), nn.ReLU(), nn.Linear(config.d_gate, 1), nn.Sigmoid()
        )

    def shared(self, items: Tensor) -> Tensor:
        """`I_RQ`, float ``[..., D]``, of item rows ``[...]``."""
        return self.code_embedding(self.codes[items][..., : self.n_rq]).sum(dim=-2)

    def own(self, items: Tensor) -> Tensor:
        """`I_OPQ`, float ``[..., D]``, of item rows ``[...]``."""
        return self.code_embedding(self.codes[items][..., self.n_rq :]).sum(dim=-2)

    def parts(self, items: Tensor, context: Tensor) -> Parts:
        """The parts of representations; arguments as of `forward`."""
        return Parts(self.id_embedding(items), self.shared(items), self.own(items), self.gate(context))

    def forward(self, items: Tensor, context: Tensor) -> Tensor:
        """`I_f`, or what the variant has in its place, float ``[..., D]``.

        Args:
            items: int64 ``[...]``, item rows.
            context: float ``[..., n_context]``, what the gate reads: C, U_p and X side by side. Only the variant
                "fusion" reads it.
        """
        match self.config.variant:
            case "id":
                return self.id_embedding(items)
            case "sid":
                return self.shared(items) + self.own(items)
            case "sum":
                return self.id_embedding(items) + self.shared(items) + self.own(items)
            case "fusion":
                return fuse(self.parts(items, context), self.config.opq_weight)

    def auxiliary_loss(self, items_B: Tensor, context_BC: Tensor, similar_BP: Tensor) -> Tensor:
        """What COINS adds to the ranking loss: ``alpha1 L_trans + alpha2 L_cont``; 0 for the other variants.

        Args:
            items_B: int64 ``[B]``, distinct item rows.
            context_BC: as of `forward`.
            similar_BP: int64 ``[B, P]``, the positives of each item, of `similar_items`.
        """
        if self.config.variant != "fusion":
            return self.code_embedding.weight.new_zeros(())
        parts = self.parts(items_B, context_BC)
        transfer = transfer_loss(parts.item, parts.shared, parts.gate[:, 0])
        related_BB = (similar_BP[:, None, :] == items_B[None, :, None]).any(dim=2) | (items_B[:, None] == items_B)
        contrast = info_nce(parts.own, self.own(similar_BP), related_BB, self.config.temperature)
        return self.config.transfer_weight * transfer + self.config.contrast_weight * contrast


def fuse(parts: Parts, opq_weight: float) -> Tensor:
    """``I_f = T_g I_id + (1 - T_g) I_RQ + lambda I_OPQ``, float ``[..., D]``."""
    return parts.gate * parts.item + (1 - parts.gate) * parts.shared + opq_weight * parts.own


def transfer_loss(item_BD: Tensor, shared_BD: Tensor, gate_B: Tensor) -> Tensor:
    """Adaptive transfer loss of COINS, mean over items.

    ``L_trans = T_g KL(sg(I_id) || I_RQ) + (1 - T_g) KL(I_id || sg(I_RQ))`` with softmaxes of the representations. Both
    divergences have the same value, so the gate alters no value and gets no gradient from here: it says who learns.
    Near 1 the shared part is drawn to the ID embedding of an item that is well known, near 0 the ID embedding to the
    shared part.

    Args:
        item_BD: `I_id`, float ``[B, D]``.
        shared_BD: `I_RQ`, float ``[B, D]``.
        gate_B: `T_g`, float ``[B]`` in ``[0, 1]``.
    """
    to_shared_B = _divergence(item_BD.detach(), shared_BD)
    to_item_B = _divergence(item_BD, shared_BD.detach())
    return (gate_B * to_shared_B + (1 - gate_B) * to_item_B).mean()


def info_nce(anchor_BD: Tensor, positive_BPD: Tensor, related_BB: Tensor, temperature: float) -> Tensor:
    """InfoNCE with several positives, mean over anchors and positives.

    Of one positive p of anchor b, with cosines s: ``-log(exp(s_bp / tau) / (exp(s_bp / tau) + sum_n exp(s_bn / tau)))``
    over the other anchors n that are not related to b.

    Args:
        anchor_BD: float ``[B, D]``.
        positive_BPD: float ``[B, P, D]``.
        related_BB: bool ``[B, B]``, anchors that are no negatives of each other; an anchor is related to itself.
        temperature: tau.
    """
    anchor_BD, positive_BPD = (nn.functional.normalize(x, dim=-1) for x in (anchor_BD, positive_BPD))
    positive_BP = (positive_BPD @ anchor_BD[:, :, None])[..., 0] / temperature
    others_BB = (anchor_BD @ anchor_BD.T / temperature).masked_fill(related_BB, -torch.inf)
    negatives_B = others_BB.logsumexp(dim=1, keepdim=True)
    return (torch.logaddexp(positive_BP, negatives_B) - positive_BP).mean()


def similar_items(codes_NM: Tensor, distances: Sequence[Tensor], k: int = 10) -> Tensor:
    """The `k` items nearest to each by their OPQ codes, int64 ``[N, k]``, nearest first, the item itself left out.

    Codes of the same values alone would tie nearly everywhere, so how far two codes of a level are apart counts:
    symmetric distances of product quantisation (Jegou et al., TPAMI 2011, section III-A).

    Args:
        codes_NM: int64 ``[N, M]``, OPQ codes.
        distances: of each level, float ``[K, K]`` squared distances of its codes.
        k: items wanted.

    Raises:
        DataError: there are not `k` other items.
    """
    n = len(codes_NM)
    if not 0 < k < n:
        raise DataError(f"{k} similar items of each asked for among {n}; give fewer than there are items, at least 1")
    nearest = []
    for start in range(0, n, _SIMILAR_BLOCK):
        rows = torch.arange(start, min(start + _SIMILAR_BLOCK, n))
        distance_BN = sum(
            (table[codes[rows]][:, codes] for table, codes in zip(distances, codes_NM.T, strict=True)),
            start=torch.zeros(()),
        )
        distance_BN[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(distance_BN.topk(k, largest=False).indices)
    return torch.cat(nearest)


def _divergence(p_BD: Tensor, q_BD: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) in nats, float ``[B]``."""
    log_p, log_q = p_BD.log_softmax(dim=-1), q_BD.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
