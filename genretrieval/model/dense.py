"""The dense head: item vectors beside semantic IDs (LIGER, arXiv 2411.18814).

Semantic IDs say what alike items share; vectors of its own say what sets an item apart. An item has two: one is read
where the item stands in a history, the other is compared with the user's vector to rank anew what the beam search has
written. Two, because what follows an item is not what is like it: with one for both, recall and NDCG are lower.

A vector is the sum of a projection of the item's content and of a learned part that starts at zero, so an item that no
one has met yet is placed by its content alone.

Shape suffixes are explained in `genretrieval.model.layers`; I is items and C the width of content here.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from genretrieval.model.configuration import GeneratorConfig


class ItemVectors(nn.Module):
    """``v_i = W x_i + e_i`` with the content ``x_i`` of an item, given, and ``e_i``, learned."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.own_ID = nn.Parameter(torch.zeros(config.n_items, config.d_model))
        self.projection = nn.Linear(config.content_dim, config.d_model, bias=False)

    def forward(self, content_IC: Tensor, rows_N: Tensor | None = None) -> Tensor:
        """Vectors of the items at `rows` (int64, of any shape), or of all: float ``[..., D]``."""
        if rows_N is None:
            return cast(Tensor, self.projection(content_IC) + self.own_ID)
        return cast(Tensor, self.projection(content_IC[rows_N]) + self.own_ID[rows_N])


class DenseHead(nn.Module):
    """Vectors that items are read by and ranked by, and what they are compared with.

    The content is an input and no weight: `set_content` gives it before training, and a bundle keeps the finished
    vectors instead.
    """

    content_IC: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.reading, self.ranking = ItemVectors(config), ItemVectors(config)
        self.user = nn.Linear(config.d_model, config.d_model, bias=False)
        self.history = nn.Linear(config.d_model, config.d_model, bias=False)
        self.register_buffer("content_IC", torch.zeros(config.n_items, config.content_dim), persistent=False)

    def set_content(self, content_IC: Tensor) -> None:
        """Give every item its content: float ``[n_items, content_dim]``, scaled to length 1 here."""
        assert content_IC.shape == self.content_IC.shape, f"{content_IC.shape} is not {self.content_IC.shape}"
        self.content_IC.copy_(nn.functional.normalize(content_IC.float()))

    def read(self, rows_N: Tensor | None = None) -> Tensor:
        """What items at `rows` (int64, of any shape), or all, are read by in a history: float ``[..., D]``."""
        return cast(Tensor, self.reading(self.content_IC, rows_N))

    def rank(self, rows_N: Tensor | None = None) -> Tensor:
        """What they are ranked by: float ``[..., D]``."""
        return cast(Tensor, self.ranking(self.content_IC, rows_N))

    def item_vectors(self) -> Tensor:
        """Float ``[n_items, 2, D]``: what every item is read by, and what it is ranked by."""
        return torch.stack([self.read(), self.rank()], 1)

    def user_vectors(self, states_XD: Tensor, seen_XD: Tensor) -> Tensor:
        """What item vectors are compared with: ``[..., D]``.

        The decoder has read the query, the encoder is nearer to the items of the history; each adds its part.

        Args:
            states_XD: the decoder's states before the first code.
            seen_XD: the encoder's states after the history.
        """
        return cast(Tensor, self.user(states_XD) + self.history(seen_XD))
