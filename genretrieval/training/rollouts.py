"""Rollouts: what the generator itself would write for a request, the experience that it learns preferences from.

Shape suffixes: N requests, G rollouts each, L levels; the rest as in `genretrieval.model.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from genretrieval.catalogue import CatalogueIndex, graph_inputs, mask_inputs
from genretrieval.model import Generator
from genretrieval.model.generator import Context
from genretrieval.model.search import CLOSED, BeamSearch, IndexTensors


@dataclass(frozen=True)
class Rollouts:
    """The most probable semantic IDs of each request, best first; nothing here carries a gradient.

    Attributes:
        items_NG: int64, item rows; of items that share a semantic ID the one that is listed first; -1 where a beam
            ended short.
        codes_NGL: int64, semantic IDs; any where a beam ended short.
        logp_NGL: float32, log-probability of each code among those that exist under its prefix; 0 where a beam ended
            short.
        mask_NG: bool, which rollouts are there: fewer than G where the catalogue has fewer semantic IDs.
    """

    items_NG: Tensor
    codes_NGL: Tensor
    logp_NGL: Tensor
    mask_NG: Tensor


class RolloutSearch(nn.Module):
    """Constrained beam search by the current weights.

    The search is the one that is served. It fuses a copy of the decoder's weights at every call, which costs less than
    one of its steps.

    Args:
        index: the catalogue.
        n_rollouts: G, rollouts of a request.
    """

    codes_XL: Tensor
    first_item_X: Tensor

    def __init__(self, index: CatalogueIndex, n_rollouts: int) -> None:
        super().__init__()
        assert n_rollouts >= 1
        self.n_rollouts = n_rollouts
        self.levels = range(index.n_levels)
        for name, array in graph_inputs(index).items():
            self.register_buffer(name, torch.from_numpy(array))
        self.register_buffer("codes_XL", torch.from_numpy(index.leaf_codes(np.arange(index.n_leaves))).long())
        # A keyword leaf has no item and stays closed.
        first = index.leaf_items[np.minimum(index.leaf_starts()[:-1], index.n_items - 1)]
        self.register_buffer("first_item_X", torch.from_numpy(first).long())
        every = index.allowed_nodes(index.allowed_leaves(np.ones(index.n_items, bool)))
        for name, allowed in mask_inputs([every]).items():
            self.register_buffer(name, torch.from_numpy(allowed))

    @torch.no_grad()
    def forward(self, model: Generator, context: Context) -> Rollouts:
        """Search for N requests.

        Args:
            model: whose current weights search; its dropout is no part of a search.
            context: what its `ContextEncoder` made of the requests, in evaluation mode if there is to be no dropout.
        """
        c = model.config
        search = BeamSearch(
            model.decoder, model.context.codes.weight, model.head.weight, c.codebook_sizes, c.level_offsets
        )
        device = context.memory_BSD.device
        tokens, starts, slots, allowed = (
            [self.get_buffer(f"{kind}_{level}") for level in self.levels]
            for kind in ("token", "child_start", "slot", "allowed")
        )
        index = IndexTensors(
            tokens,
            starts,
            slots,
            allowed,
            torch.zeros(len(context.memory_BSD), dtype=torch.long, device=device),
        )
        # What is drawn must not depend on the rounding of bf16.
        with torch.autocast(device.type, enabled=False):
            found = search(
                context.memory_BSD.float(),
                context.mask_BS,
                context.start_BD.float(),
                torch.arange(self.n_rollouts, device=device),
                index,
            )
        mask_NG = found.scores_BK > CLOSED / 2
        leaves_NG = found.leaves_BK.where(mask_NG, 0)
        return Rollouts(
            self.first_item_X[leaves_NG].where(mask_NG, -1),
            self.codes_XL[leaves_NG],
            found.level_scores_BKL.where(mask_NG[..., None], 0),
            mask_NG,
        )
