"""Losses of the generator, one class each."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genretrieval.catalogue import CatalogueIndex
from genretrieval.model import Generator
from genretrieval.model.generator import Decoded
from genretrieval.training.full_softmax import full_softmax_loss
from genretrieval.training.self_routing import SelfRouting

MAX_SOFTMAX_ITEMS = 50_000


class Objective(Protocol):
    """A loss over a batch that `genretrieval.training.data.collate` made."""

    def __call__(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        """Scalar loss."""
        ...


class Candidates(NamedTuple):
    """Items of a dense softmax.

    Attributes:
        rows: int64 ``[M]``, item rows, sorted.
        ranked: float ``[M, E]``, what they are ranked by.
        bias: float ``[M]``, logarithm of how many items each stands for.
    """

    rows: Tensor
    ranked: Tensor
    bias: Tensor

    def places(self, items: Tensor) -> Tensor:
        """Positions of `items` in `rows`. What is not among them, as padding may be, gets some."""
        return torch.searchsorted(self.rows, items.contiguous()).clamp(max=len(self.rows) - 1)


class NextItemObjective(nn.Module):
    """Cross-entropy of the next item's codes, each softmax taken over the codes that exist under the true prefix.

    With ``z`` the logits of level l and ``C(c_<l)`` the children of the prefix in the catalogue index, the loss of a
    target is ``sum_l -log( exp z[c_l] / sum_{c in C(c_<l)} exp z[c] ) / L``. The model spends nothing on IDs that do
    not exist, and training and search share one probability.

    A model with a dense head adds, for the user vector ``u`` and item vectors ``v`` (LIGER, arXiv 2411.18814),

        ``dense_weight * -log( exp(u . v_target) / sum_i exp(u . v_i) )``,

    the sum running over the items that occur in training: as a mere negative, an item that no one has met yet would be
    learnt to be what nobody takes. In a catalogue of over `MAX_SOFTMAX_ITEMS` items it is estimated: from the batch's
    own items and a uniform sample of the others, which count for as many as they stand for.

    Args:
        index: the catalogue.
        trained_items: int64, rows of the items that occur in training, sorted; read for a dense head.
        dense_weight: of the dense head's loss.
        routing: gives some queries a reserved slot to write; None where nothing is to be bound.
    """

    item_nodes: Tensor
    trained_items: Tensor
    trained_bias_I: Tensor

    def __init__(
        self,
        index: CatalogueIndex,
        trained_items: NDArray[np.int64] | None = None,
        dense_weight: float = 1.0,
        routing: SelfRouting | None = None,
    ) -> None:
        super().__init__()
        self.routing = routing
        trained = np.arange(index.n_items) if trained_items is None else trained_items
        bias = np.full(index.n_items, -np.inf, np.float32)
        bias[trained] = 0.0
        self.register_buffer("trained_items", torch.from_numpy(trained.astype(np.int64)))
        self.register_buffer("trained_bias_I", torch.from_numpy(bias))
        self.dense_weight = dense_weight
        # Keyword leaves are targets like items, behind them.
        paths = np.concatenate([index.item_nodes(), index.paths(index.keyword_leaves)])
        self.register_buffer("item_nodes", torch.from_numpy(paths))
        self.codebook_sizes = index.codebook_sizes
        self.max_children = index.max_children
        for level in range(index.n_levels):
            self.register_buffer(f"token_{level}", torch.from_numpy(index.tokens[level]).long())
            self.register_buffer(f"child_start_{level}", torch.from_numpy(index.child_starts[level]).long())

    def existing_codes(self, items_N: Tensor, level: int) -> Tensor:
        """Bool ``[N, V]``: codes of `level` that some item has under the prefix of each of `items_N`."""
        token, start = getattr(self, f"token_{level}"), getattr(self, f"child_start_{level}")
        parent = self.item_nodes[items_N, level - 1] if level else torch.zeros_like(items_N)
        slots = torch.arange(self.max_children[level], device=items_N.device)
        # Slots past the last child repeat it, which marks it once more.
        child = torch.minimum(start[parent][:, None] + slots, start[parent + 1][:, None] - 1)
        exists = torch.zeros(len(items_N), self.codebook_sizes[level], dtype=torch.bool, device=items_N.device)
        return exists.scatter_(1, token[child], True)

    def forward(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over the targets that ``batch["learn"]`` marks."""
        learn = batch["learn"]
        candidates = self.candidates(model, batch) if model.dense is not None else None
        if self.routing is not None:
            batch = self.routing(self.with_vectors(model, batch))
        items_N = batch["target_items"][learn]
        decoded = self.decode(model, batch)
        states_NLD = decoded.states_BTLD[learn]
        loss = self.loss(model, states_NLD, items_N, batch["target_codes"][learn])
        if candidates is None or model.dense is None:
            return loss
        user_ND = model.dense.user_vectors(states_NLD[:, 0], decoded.seen_BTE[learn])
        if self.routing is not None:
            # A keyword leaf has no vector.
            is_item = items_N < len(self.trained_bias_I)
            user_ND, items_N = user_ND[is_item], items_N[is_item]
            if not len(items_N):
                # Of nothing there is no mean; the parameters still take part, as data-parallel wrappers expect.
                return loss + 0.0 * (user_ND.sum() + candidates.ranked.sum())
        dense = full_softmax_loss(user_ND, candidates.ranked, candidates.places(items_N), candidates.bias)
        return loss + self.dense_weight * dense

    def candidates(self, model: Generator, batch: dict[str, Tensor]) -> Candidates:
        """The items that a batch's dense softmax runs over; its targets are among them."""
        assert model.dense is not None
        n_items, n_trained = len(self.trained_bias_I), len(self.trained_items)
        if n_items <= MAX_SOFTMAX_ITEMS:
            rows = torch.arange(n_items, device=self.trained_items.device)
            return Candidates(rows, model.dense.rank(), self.trained_bias_I)
        own = torch.unique(batch["target_items"])
        drawn = self.trained_items[torch.randint(n_trained, (MAX_SOFTMAX_ITEMS,), device=own.device)]
        rows, places = torch.unique(torch.cat([own, drawn]), return_inverse=True)
        is_own = torch.zeros_like(rows, dtype=torch.bool).index_fill_(0, places[: len(own)], True)
        left = n_trained - int((self.trained_bias_I[own] == 0).sum())
        stand_for = max(1.0, left / max(1, int((~is_own).sum())))
        bias = self.trained_bias_I[rows] + torch.where(is_own, 0.0, math.log(stand_for))
        return Candidates(rows, model.dense.rank(rows), bias)

    def decode(self, model: Generator, batch: dict[str, Tensor]) -> Decoded:
        """Teacher-force all targets."""
        return model.decode_targets(self.with_vectors(model, batch))

    @staticmethod
    def with_vectors(model: Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the item vectors that a model with a dense head reads, ``history_vectors`` and the past's."""
        if model.dense is None or "history_vectors" in batch:
            return batch
        batch = {**batch, "history_vectors": model.dense.read(batch["target_items"][:, :-1])}
        if "past_items" in batch:
            batch["past_vectors"] = model.dense.read(batch["past_items"])
        return batch

    def loss(self, model: Generator, states_NLD: Tensor, items_N: Tensor, codes_NL: Tensor) -> Tensor:
        """Mean loss of N targets from the decoder's states before each of their codes."""
        logits = self.existing_logits(model, states_NLD, items_N)
        losses = [nn.functional.cross_entropy(z_NV, codes_NL[:, level]) for level, z_NV in enumerate(logits)]
        return torch.stack(losses).mean()

    def existing_logits(self, model: Generator, states_NLD: Tensor, items_N: Tensor) -> list[Tensor]:
        """Float32 ``[N, V]`` of each level: scores of its codes, -inf for those that do not exist under the prefix."""
        found = []
        for level in range(len(self.codebook_sizes)):
            logits_NV = model.level_logits(states_NLD[:, level], level).float()
            found.append(logits_NV.masked_fill(~self.existing_codes(items_N, level), float("-inf")))
        return found
