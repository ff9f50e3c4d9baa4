"""Losses of the generator, one class each."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from genretrieval.catalogue import CatalogueIndex
from genretrieval.model import Generator


class Objective(Protocol):
    """A loss over a batch that `genretrieval.training.data.collate` made."""

    def __call__(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        """Scalar loss."""
        ...


class NextItemObjective(nn.Module):
    """Cross-entropy of the next item's codes, each softmax taken over the codes that exist under the true prefix.

    With ``z`` the logits of level l and ``C(c_<l)`` the children of the prefix in the catalogue index, the loss of a
    target is ``sum_l -log( exp z[c_l] / sum_{c in C(c_<l)} exp z[c] ) / L``. The model spends nothing on IDs that do
    not exist, and training and search share one probability.
    """

    item_nodes: Tensor

    def __init__(self, index: CatalogueIndex) -> None:
        """Copy the index to tensors; they move with the module."""
        super().__init__()
        self.register_buffer("item_nodes", torch.from_numpy(index.item_nodes()))
        self.codebook_sizes = index.codebook_sizes
        self.max_children = index.max_children
        for level in range(index.n_levels):
            self.register_buffer(f"token_{level}", torch.from_numpy(index.tokens[level]))
            self.register_buffer(f"child_start_{level}", torch.from_numpy(index.child_starts[level]))

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
        states_NLD = self.decode(model, batch)[learn]
        return self.loss(model, states_NLD, batch["target_items"][learn], batch["target_codes"][learn])

    def decode(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        """Decoder states of all targets, float ``[B, T, L, D]``."""
        states = model.context.history(
            batch["history_codes"],
            batch["history_events"],
            batch["history_gaps"],
            batch["history_mask"],
            batch["profile"],
        )
        return model.decode_targets(
            batch["target_codes"], states, batch["query_rows"], batch["query_tokens"], batch["query_mask"]
        )

    def loss(self, model: Generator, states_NLD: Tensor, items_N: Tensor, codes_NL: Tensor) -> Tensor:
        """Mean loss of N targets from the decoder's states before each of their codes."""
        losses = []
        for level in range(len(self.codebook_sizes)):
            logits = model.level_logits(states_NLD[:, level], level).float()
            logits = logits.masked_fill(~self.existing_codes(items_N, level), float("-inf"))
            losses.append(nn.functional.cross_entropy(logits, codes_NL[:, level]))
        return torch.stack(losses).mean()
