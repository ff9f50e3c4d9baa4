"""The dense head: item vectors beside semantic IDs (LIGER, arXiv 2411.18814).

Semantic IDs say what alike items share; vectors of its own say what sets an item apart. An item is read by one where
it stands in a history, and ranked by another, which is compared with the user's vector to order anew what the beam
search has written. Two, because what follows an item is not what is like it: with one for both, recall and NDCG are
lower. Each has two parts:

- what the whole history says: a projection of the item's content and a learned part that starts at zero, so that an
  item that no one has met yet is placed by its content alone;
- what the last item alone says: a factor of the item that is left and one of the item that is taken next, which meet
  without a Transformer between them (FPMC, Rendle et al. 2010). Which item follows which is remembered there; an
  encoder that has to generalise forgets it.

Shape suffixes are explained in `genretrieval.model.layers`; I is items, C the width of content and E = 2 D here.
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
        self.leaving_ID = nn.Parameter(torch.empty(config.n_items, config.d_model))
        self.taking_ID = nn.Parameter(torch.zeros(config.n_items, config.d_model))
        self.user = nn.Linear(config.d_model, config.d_model, bias=False)
        self.history = nn.Linear(config.d_model, config.d_model, bias=False)
        self.gate = nn.Linear(config.d_model, 1, bias=False)
        self.register_buffer("content_IC", torch.zeros(config.n_items, config.content_dim), persistent=False)

    def set_content(self, content_IC: Tensor) -> None:
        """Give every item its content: float ``[n_items, content_dim]``, scaled to length 1 here."""
        assert content_IC.shape == self.content_IC.shape, f"{content_IC.shape} is not {self.content_IC.shape}"
        self.content_IC.copy_(nn.functional.normalize(content_IC.float()))

    def read(self, rows_N: Tensor | None = None) -> Tensor:
        """What items at `rows` (int64, of any shape), or all, are read by in a history: float ``[..., E]``."""
        return self._joined(self.reading, self.leaving_ID, rows_N)

    def rank(self, rows_N: Tensor | None = None) -> Tensor:
        """What they are ranked by: float ``[..., E]``."""
        return self._joined(self.ranking, self.taking_ID, rows_N)

    def _joined(self, vectors: ItemVectors, factors_ID: Tensor, rows_N: Tensor | None) -> Tensor:
        factors = factors_ID if rows_N is None else factors_ID[rows_N]
        return torch.cat([vectors(self.content_IC, rows_N), factors], -1)

    def item_vectors(self) -> Tensor:
        """Float ``[n_items, 2, E]``: what every item is read by, and what it is ranked by."""
        return torch.stack([self.read(), self.rank()], 1)

    def user_vectors(self, states_XD: Tensor, seen_XE: Tensor) -> Tensor:
        """What item vectors are compared with: ``[..., E]``.

        The decoder has read the query, the encoder is nearer to the items of the history; each adds its part. How much
        the last item counts, the decoder says: little where somebody searches for something else.

        Args:
            states_XD: the decoder's states before the first code.
            seen_XE: see `seen`.
        """
        return self.joined(torch.cat([self.user(states_XD), self.gate(states_XD)], -1), seen_XE)

    def joined(self, decoded_XF: Tensor, seen_XE: Tensor) -> Tensor:
        """The same, of `user` and `gate` of the decoder's states, side by side: ``[..., D + 1]``."""
        said, gate = decoded_XF[..., :-1], decoded_XF[..., -1:]
        encoded, left = seen_XE.split(said.shape[-1], -1)
        return torch.cat([said + self.history(encoded), 2 * gate.sigmoid() * left], -1)

    @staticmethod
    def seen(states_BSD: Tensor, vectors_BSE: Tensor) -> Tensor:
        """What `user_vectors` reads of every prefix of a history: the encoder's state, and what its last item left.

        Args:
            states_BSD: float ``[B, 1 + S, D]``, the first of them before any item.
            vectors_BSE: float ``[B, S, E]``, what the items are read by.

        Returns:
            Float ``[B, 1 + S, E]``.
        """
        left_BSD = nn.functional.pad(vectors_BSE[..., states_BSD.shape[-1] :], (0, 0, 1, 0))
        return torch.cat([states_BSD, left_BSD], -1)
