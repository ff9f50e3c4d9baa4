"""Transformer layers in the T5 form (Raffel et al. 2020): pre-norm RMSNorm, no biases, relative position bias.

One form serves our model and a Hugging Face T5 whose weights are copied in (`genretrieval.export.t5`), so that the
retrieval graph is compared with its peer on the same weights.

Tensor names carry their shape: B batch, S context positions, T targets of a history, L levels, Q query tokens,
K beams, D model width, H heads, E head width, F feed-forward width, V codes of a level, C children looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from genretrieval.model.moe import MixtureOfExperts

# Added to the scores of keys that are masked. Finite also in bfloat16, where the least float32 becomes -inf: a query
# without a word would then be attended to by weights of 0 / 0.
HIDDEN = -1e30
# What an expert without tokens gains in a step; scores lie in (0, 1).
BALANCE_RATE = 1e-3


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in float32."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number for every head and bucket of distances."""

    lookup: Tensor

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_buckets, n_heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.register_buffer("lookup", self.buckets(), persistent=False)

    def buckets(self) -> Tensor:
        """int64 ``[2 * max_distance + 1]``: the bucket of every distance, from ``-max_distance`` on."""
        distance = torch.arange(-self.max_distance, self.max_distance + 1)
        n_buckets = self.embedding.num_embeddings
        return _bucket(distance, n_buckets, self.max_distance, bidirectional=self.bidirectional)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Bias ``[1, H, n_queries, n_keys]`` for two vectors of integer positions."""
        distance = key_positions[None, :] - query_positions[:, None]
        distance = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return self.embedding(self.lookup[distance]).permute(2, 0, 1)[None]


def _bucket(distance: Tensor, n_buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Exact buckets for near distances, logarithmic ones beyond; `distance` is key position minus query position."""
    bucket = torch.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        bucket = bucket + (distance > 0) * n_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = n_buckets // 2
    scale = (n_buckets - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return bucket + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class Attention(nn.Module):
    """Multi-head attention without the factor 1/sqrt(E), which T5 leaves to the weights."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def split(self, x_BSD: Tensor) -> Tensor:
        """``[..., S, D]`` to ``[..., H, S, E]``."""
        return x_BSD.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)

    def forward(self, x_BSD: Tensor, context_BSD: Tensor, bias_BHSS: Tensor) -> Tensor:
        """Attend from `x` to `context`; `bias` is added to the scores and is `HIDDEN` where a key is masked.

        The products and the softmax are written out: on CPU the backward pass of the fused bf16 kernel is several
        times slower.
        """
        q = self.split(self.query(x_BSD))
        k = self.split(self.key(context_BSD))
        v = self.split(self.value(context_BSD))
        scores = q @ k.transpose(-1, -2) + bias_BHSS.to(q.dtype)
        return self.output(self.merge(scores.softmax(-1) @ v))

    @staticmethod
    def merge(x_BHSE: Tensor) -> Tensor:
        """``[..., H, S, E]`` to ``[..., S, D]``."""
        return x_BHSE.transpose(-3, -2).flatten(-2)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_ff, bias=False)
        self.outer = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self.outer(self.inner(x).relu())


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each on a normalised input and added to it."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model)
        self.attention = Attention(d_model, n_heads)
        self.feed_forward_norm = RMSNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, bias_BHSS: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        normed = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.dropout(self.attention(normed, normed, bias_BHSS))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class Encoder(nn.Module):
    """A stack of `EncoderLayer` under one relative position bias, causal or not."""

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float,
        n_position_buckets: int,
        max_distance: int,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.bias = RelativeBias(n_heads, n_position_buckets, max_distance, bidirectional=not causal)
        layers = nn.ModuleList(EncoderLayer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.layers = cast("Sequence[EncoderLayer]", layers)
        self.norm = RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Encode.

        Args:
            x_BSD: embedded context.
            mask_BS: bool, True where a position is real. Padding stands on the right.

        Returns:
            Float ``[B, S, D]``; what stands at padded positions means nothing.
        """
        positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        bias_BHSS = self.bias(positions, positions)
        if self.causal:
            # Padding stands on the right, so a real position never sees it.
            bias_BHSS = bias_BHSS.masked_fill(positions[None, :] > positions[:, None], HIDDEN)
        else:
            bias_BHSS = bias_BHSS.masked_fill(~mask_BS[:, None, None, :], HIDDEN)
        x_BSD = self.dropout(x_BSD)
        for layer in self.layers:
            x_BSD = layer(x_BSD, bias_BHSS)
        return self.dropout(self.norm(x_BSD))


class Queries(NamedTuple):
    """Encoded queries of some of the targets of a batch.

    Attributes:
        rows_N: int64, the target of each query, flat: ``b * T + t``.
        states_NQD: encoded tokens.
        mask_NQ: bool, which tokens are real.
    """

    rows_N: Tensor
    states_NQD: Tensor
    mask_NQ: Tensor

    def place(self, x_NX: Tensor, shape: tuple[int, int]) -> Tensor:
        """``[N, ...]`` to ``[B, T, ...]``, zeros for targets without a query."""
        empty = x_NX.new_zeros(shape[0] * shape[1], *x_NX.shape[1:])
        return empty.index_copy(0, self.rows_N, x_NX).unflatten(0, shape)

    def joined(self, other: Queries, shape: tuple[int, int]) -> Queries:
        """These and, behind them, `other`: one for every target of ``(B, T)``, masked where neither has anything."""
        both = (self, other)
        states = torch.cat([queries.place(queries.states_NQD, shape).flatten(0, 1) for queries in both], 1)
        mask = torch.cat([queries.place(queries.mask_NQ, shape).flatten(0, 1) for queries in both], 1)
        return Queries(torch.arange(len(states), device=states.device), states, mask)


class Experts(NamedTuple):
    """A sparse mixture in place of each feed-forward layer of a decoder.

    Attributes:
        n_experts: experts to choose from, each ``d_ff // per_token`` wide: a token costs what a dense layer costs it.
        per_token: experts that work on a token.
    """

    n_experts: int
    per_token: int


class DecoderLayer(nn.Module):
    """Self-attention over the codes written so far, cross-attention to the context, feed-forward."""

    feed_forward: FeedForward | MixtureOfExperts

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, experts: Experts | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model)
        self.attention = Attention(d_model, n_heads)
        self.cross_norm = RMSNorm(d_model)
        self.cross = Attention(d_model, n_heads)
        self.feed_forward_norm = RMSNorm(d_model)
        if experts is None:
            self.feed_forward = FeedForward(d_model, d_ff)
        else:
            width = d_ff // experts.per_token
            self.feed_forward = MixtureOfExperts(d_model, width, *experts, balance_rate=BALANCE_RATE)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTLD: Tensor,
        bias_HLL: Tensor,
        memory_BSD: Tensor,
        memory_bias_BHTS: Tensor,
        queries: Queries | None,
        counted_BT: Tensor | None,
    ) -> Tensor:
        """``[B, T, L, D]`` to ``[B, T, L, D]``; the other shapes as in `Decoder.forward`, masks as biases."""
        normed = self.attention_norm(x_BTLD)
        x_BTLD = x_BTLD + self.dropout(self.attention(normed, normed, bias_HLL))
        normed = self.cross_norm(x_BTLD)
        crossed = _cross(self.cross, normed, memory_BSD, memory_bias_BHTS, queries)
        x_BTLD = x_BTLD + self.dropout(crossed)
        normed = self.feed_forward_norm(x_BTLD)
        if counted_BT is None or isinstance(self.feed_forward, FeedForward):
            return x_BTLD + self.dropout(self.feed_forward(normed))
        counted_BTL = counted_BT[:, :, None].expand(normed.shape[:-1])
        return x_BTLD + self.dropout(self.feed_forward(normed, counted_BTL))


class Decoder(nn.Module):
    """A stack of `DecoderLayer` that writes one code after another.

    Training sees all T targets of a history at once: target t attends to the context up to its own position and to
    its own query, nothing else, which is what the same target would see alone.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float,
        n_position_buckets: int,
        max_distance: int,
        experts: Experts | None = None,
    ) -> None:
        super().__init__()
        self.bias = RelativeBias(n_heads, n_position_buckets, max_distance, bidirectional=False)
        layers = nn.ModuleList(DecoderLayer(d_model, n_heads, d_ff, dropout, experts) for _ in range(n_layers))
        self.layers = cast("Sequence[DecoderLayer]", layers)
        self.norm = RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTLD: Tensor,
        memory_BSD: Tensor,
        memory_mask_BTS: Tensor,
        queries: Queries | None = None,
        counted_BT: Tensor | None = None,
    ) -> Tensor:
        """Decode every target of every row.

        Args:
            x_BTLD: embedded codes, shifted right (position 0 is the start of a semantic ID).
            memory_BSD: encoded context.
            memory_mask_BTS: bool, which context positions each target may see.
            queries: encoded queries of the targets that were asked for with one.
            counted_BT: bool, targets that experts are balanced by; all by default.

        Returns:
            Float ``[B, T, L, D]``.
        """
        n_levels = x_BTLD.shape[2]
        positions = torch.arange(n_levels, device=x_BTLD.device)
        bias = self.bias(positions, positions)
        bias = bias.masked_fill(positions[None, :] > positions[:, None], HIDDEN)
        memory_bias = torch.where(memory_mask_BTS, 0.0, HIDDEN).repeat_interleave(n_levels, 1)[:, None]
        x_BTLD = self.dropout(x_BTLD)
        for layer in self.layers:
            x_BTLD = layer(x_BTLD, bias, memory_BSD, memory_bias, queries, counted_BT)
        return self.dropout(self.norm(x_BTLD))


def _cross(
    attention: Attention, x_BTLD: Tensor, memory_BSD: Tensor, memory_bias: Tensor, queries: Queries | None
) -> Tensor:
    """Cross-attention over the shared context and, in one softmax with it, each target's own query."""
    n_rows, n_targets, n_levels = x_BTLD.shape[:3]
    q = attention.split(attention.query(x_BTLD.flatten(1, 2)))
    k = attention.split(attention.key(memory_BSD))
    v = attention.split(attention.value(memory_BSD))
    scores = q @ k.transpose(-1, -2) + memory_bias.to(q.dtype)
    if queries is None:
        mixed = attention.merge(scores.softmax(-1) @ v)
        return attention.output(mixed).unflatten(1, (n_targets, n_levels))
    n_memory = memory_BSD.shape[1]
    shape = (n_rows, n_targets)
    q_own = q.unflatten(2, (n_targets, n_levels)).transpose(1, 2)  # [B, T, H, L, E]
    k_own = attention.split(queries.place(attention.key(queries.states_NQD), shape))
    v_own = attention.split(queries.place(attention.value(queries.states_NQD), shape))
    own_bias = torch.where(queries.place(queries.mask_NQ, shape), 0.0, HIDDEN)[:, :, None, None, :]
    own = q_own @ k_own.transpose(-1, -2) + own_bias.to(q.dtype)
    weights = torch.cat([scores, own.transpose(1, 2).flatten(2, 3)], -1).softmax(-1)
    own_weights = weights[..., n_memory:].unflatten(2, (n_targets, n_levels)).transpose(1, 2)
    mixed_own = (own_weights @ v_own).transpose(1, 2).flatten(2, 3)
    mixed = attention.merge(weights[..., :n_memory] @ v + mixed_own)
    return attention.output(mixed).unflatten(1, (n_targets, n_levels))
