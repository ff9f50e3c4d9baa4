"""The dense head: item vectors beside semantic IDs (LIGER, arXiv 2411.18814).

Semantic IDs say what alike items share; a vector of its own says what sets an item apart. The history is read by codes
and vectors, and what the beam search has written is re-ranked by the product of the user's and the item's vector.

An item vector is the sum of a projection of the item's content and of a learned part that starts at zero, so an item
that no one has met yet is placed by its content alone.

Shape suffixes are explained in `genretrieval.model.layers`; I is items and C the width of content here.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from genretrieval.model.configuration import GeneratorConfig


class DenseHead(nn.Module):
    """``v_i = W x_i + e_i`` with the content ``x_i`` of an item, given, and ``e_i``, learned.

    The content is an input and no weight: `set_content` gives it before training, and a bundle keeps the finished
    vectors instead.
    """

    content_IC: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.own_ID = nn.Parameter(torch.zeros(config.n_items, config.d_model))
        self.projection = nn.Linear(config.content_dim, config.d_model, bias=False)
        self.user = nn.Linear(config.d_model, config.d_model, bias=False)
        self.register_buffer("content_IC", torch.zeros(config.n_items, config.content_dim), persistent=False)

    def set_content(self, content_IC: Tensor) -> None:
        """Give every item its content: float ``[n_items, content_dim]``, scaled to length 1 here."""
        assert content_IC.shape == self.content_IC.shape, f"{content_IC.shape} is not {self.content_IC.shape}"
        self.content_IC.copy_(nn.functional.normalize(content_IC.float()))

    def item_vectors(self, rows_N: Tensor | None = None) -> Tensor:
        """Vectors of the items at `rows` (int64, of any shape), or of all: float ``[..., D]``."""
        if rows_N is None:
            return cast(Tensor, self.projection(self.content_IC) + self.own_ID)
        return cast(Tensor, self.projection(self.content_IC[rows_N]) + self.own_ID[rows_N])

    def user_vectors(self, states_XLD: Tensor) -> Tensor:
        """What item vectors are compared with, from the decoder's states: ``[..., L, D]`` to ``[..., D]``.

        It is read off the state before the first code, which has seen the history and the query.
        """
        return cast(Tensor, self.user(states_XLD[..., 0, :]))
