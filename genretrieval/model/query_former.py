"""Query-Former: a long past compressed to a few learned tokens, behaviour by behaviour (OneMall, arXiv 2601.21770).

Each behaviour (click, cart, purchase, exposure, ...) has M learned queries that attend to the user's events of that
behaviour and to no others. The decoder's cross-attention then reads all tokens beside the history and the query, which
is where behaviours are fused. Their number does not depend on how long the past is, so a thousand events cost one
projection each.

Shape suffixes are explained in `genretrieval.model.layers`; N is events of the past, Z behaviours, M tokens of each and
R of all here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genretrieval.model.configuration import GeneratorConfig
from genretrieval.model.layers import HIDDEN, Attention, FeedForward, RMSNorm

N_AGES = 16


class QueryFormer(nn.Module):
    """``F_b = CrossAttn(Q_b, H_b, H_b)`` for every behaviour b, then a feed-forward layer."""

    behaviours_Z: Tensor
    age_of_N: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        c = config
        self.queries_RD = nn.Parameter(torch.empty(c.n_behaviours * c.n_past_tokens, c.d_model))
        self.n_past_tokens = c.n_past_tokens
        # How far back an event lies: one learned number for every head and power of the square root of two.
        self.max_past = c.max_past
        self.ages = nn.Embedding(N_AGES, c.n_heads)
        self.events_norm = RMSNorm(c.d_model)
        self.query_norm = RMSNorm(c.d_model)
        self.attention = Attention(c.d_model, c.n_heads)
        self.feed_forward_norm = RMSNorm(c.d_model)
        self.feed_forward = FeedForward(c.d_model, c.d_ff)
        self.norm = RMSNorm(c.d_model)
        self.dropout = nn.Dropout(c.dropout)
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """int64 ``[Z]``, the behaviours, and ``[max_past + 1]``, the age of an event so far back.

        The newest event is one back; ages are looked up so that no rounding tells torch and the exported graph apart.
        """
        back = [max(1, n) for n in range(self.max_past + 1)]
        return {
            "behaviours_Z": torch.arange(len(self.queries_RD) // self.n_past_tokens),
            "age_of_N": torch.tensor([min(N_AGES - 1, int(2 * math.log2(n) + 1e-9)) for n in back]),
        }

    def forward(self, x_BND: Tensor, events_BN: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Compress.

        Args:
            x_BND: embedded events, oldest first, padded on the right.
            events_BN: int64, the behaviour of each.
            mask_BN: bool, True where an event is real.

        Returns:
            Tokens float ``[B, R, D]`` and bool ``[B, R]``, False for the tokens of a behaviour that did not occur.
        """
        reads_BZN = (events_BN[:, None, :] == self.behaviours_Z[:, None]) & mask_BN[:, None, :]
        back_BN = mask_BN.sum(1, keepdim=True) - torch.arange(mask_BN.shape[1], device=mask_BN.device)
        age_BN = self.age_of_N[back_BN.clamp(min=0, max=self.max_past)]
        bias_BHZN = torch.where(reads_BZN[:, None], self.ages(age_BN).permute(0, 2, 1)[:, :, None], HIDDEN)
        # All tokens of a behaviour see the same events.
        bias_BHRN = bias_BHZN[:, :, :, None].expand(-1, -1, -1, self.n_past_tokens, -1).flatten(2, 3)
        queries_RD = self.query_norm(self.queries_RD)
        tokens_BRD = self.dropout(self.attention(queries_RD, self.events_norm(x_BND), bias_BHRN))
        tokens_BRD = tokens_BRD + self.dropout(self.feed_forward(self.feed_forward_norm(tokens_BRD)))
        occurred_BZ = reads_BZN.any(-1)
        return self.norm(tokens_BRD), occurred_BZ[..., None].expand(-1, -1, self.n_past_tokens).flatten(1)
