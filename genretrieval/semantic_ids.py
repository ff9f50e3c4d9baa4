"""Semantic IDs: the tuple of codes, one a level, that names an item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError

Codes = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SemanticIds:
    """The stored assignment of items to codes; row i belongs to item row i of the catalogue.

    The assignment is what a tokenizer published. It is never recomputed when it is loaded, because a
    recomputed code can differ in the last bit of a distance and would re-key an item that is already live.

    Attributes:
        codes: int32 ``[n_items, n_levels]``; ``codes[i, l]`` lies in ``[0, codebook_sizes[l])``.
        codebook_sizes: codes of each level; sizes may differ.

    Raises:
        DataError: if the shape, the dtype or a code does not fit `codebook_sizes`.
    """

    codes: Codes
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the contract once, here, so that nothing downstream has to."""
        if self.codes.ndim != 2 or self.codes.shape[1] != len(self.codebook_sizes):
            raise DataError(
                f"semantic IDs have shape {self.codes.shape}, but {len(self.codebook_sizes)} codebook sizes are given; "
                "expected [n_items, n_levels] with one size a level"
            )
        if self.codes.dtype != np.int32:
            raise DataError(f"semantic IDs must be int32, not {self.codes.dtype}")
        if len(self.codes) and (
            self.codes.min() < 0 or (self.codes.max(axis=0) >= np.asarray(self.codebook_sizes)).any()
        ):
            row, level = np.argwhere((self.codes < 0) | (self.codes >= np.asarray(self.codebook_sizes)))[0]
            raise DataError(
                f"item row {row} has code {self.codes[row, level]} at level {level}, outside its codebook of "
                f"{self.codebook_sizes[level]}; the codes belong to another tokenizer"
            )

    @property
    def n_items(self) -> int:
        """Items that have an ID."""
        return int(self.codes.shape[0])

    @property
    def n_levels(self) -> int:
        """Codes of an ID."""
        return len(self.codebook_sizes)

    @property
    def level_offsets(self) -> NDArray[np.int64]:
        """int64 ``[n_levels]``: where the codes of each level start when all codebooks are numbered in a row."""
        return np.concatenate([[0], np.cumsum(self.codebook_sizes)[:-1]]).astype(np.int64)
