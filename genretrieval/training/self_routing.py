"""Self-routing: what is read as a reserved slot is written as that slot, whatever word stands behind it.

A reserved slot has no item in training, so nothing else would teach the way from it to itself (OneRetrieval, arXiv
2606.13533, adds such samples to its last stage). Here queries of a batch are turned into what a query with a bound
keyword will look like: the slot in front, a word of arbitrary tokens, with or without the words that were there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genretrieval.catalogue import CatalogueIndex, reserved_paths

_WORD_TOKENS = 4  # of a made word, at most


class SelfRouting(nn.Module):
    """Gives some queries of a batch a reserved slot, and their targets its keyword leaf.

    Args:
        index: the catalogue; keyword leaf r counts as item row ``n_items + r``.
        reserved_slots: reserved slots of each level.
        query_vocab_size: tokens of a query; the numbers of slots lie behind them.
        share: of the queries, in (0, 1).
    """

    paths_RL: Tensor
    tokens_R: Tensor
    group_starts_R: Tensor
    group_ends_R: Tensor

    def __init__(
        self, index: CatalogueIndex, reserved_slots: tuple[int, ...], query_vocab_size: int, share: float
    ) -> None:
        super().__init__()
        self.n_items = index.n_items
        self.query_vocab_size = query_vocab_size
        self.share = share
        paths = torch.from_numpy(reserved_paths(index.codebook_sizes, reserved_slots)).long()
        levels, slots = paths.argmax(1), paths.amax(1)
        sizes = torch.tensor(index.codebook_sizes)
        starts = query_vocab_size + (sizes.cumsum(0) - sizes)[levels]
        self.register_buffer("paths_RL", paths)
        self.register_buffer("tokens_R", starts + slots)
        self.register_buffer("group_starts_R", starts)
        self.register_buffer("group_ends_R", starts + sizes[levels])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of which `share` of the queries, drawn anew each time, ask for a reserved slot.

        Changes ``query_tokens``, ``query_mask``, ``target_items`` and ``target_codes``; what histories are read by is
        not touched.
        """
        rows_N, tokens_NQ, mask_NQ = batch["query_rows"], batch["query_tokens"], batch["query_mask"]
        n, device = len(rows_N), rows_N.device
        chosen_N = torch.rand(n, device=device) < self.share
        if not chosen_N.any():
            return batch
        slots_N = torch.randint(len(self.tokens_R), (n,), device=device)
        # Half of them keep their words, and lose the slot whose place is taken.
        alone_N1 = (torch.rand(n, device=device) < 0.5)[:, None]
        replaced_NQ = (tokens_NQ >= self.group_starts_R[slots_N, None]) & (tokens_NQ < self.group_ends_R[slots_N, None])
        kept_NQ = mask_NQ & ~(chosen_N[:, None] & (alone_N1 | replaced_NQ))
        word_NW = torch.randint(1, self.query_vocab_size, (n, _WORD_TOKENS), device=device)
        length_N = torch.randint(1, _WORD_TOKENS + 1, (n,), device=device)
        spoken_NW = chosen_N[:, None] & (torch.arange(_WORD_TOKENS, device=device) < length_N[:, None])
        items_BT, codes_BTL = batch["target_items"].clone(), batch["target_codes"].clone()
        items_BT.view(-1)[rows_N[chosen_N]] = self.n_items + slots_N[chosen_N]
        codes_BTL.view(-1, codes_BTL.shape[-1])[rows_N[chosen_N]] = self.paths_RL[slots_N[chosen_N]]
        return {
            **batch,
            "query_tokens": torch.cat([self.tokens_R[slots_N, None], tokens_NQ, word_NW], 1),
            "query_mask": torch.cat([chosen_N[:, None], kept_NQ, spoken_NW], 1),
            "target_items": items_BT,
            "target_codes": codes_BTL,
        }
