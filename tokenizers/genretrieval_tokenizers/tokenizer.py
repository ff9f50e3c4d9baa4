"""What every tokenizer offers, whichever method fitted it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes

BLOCK = 4096
"""Rows encoded at a time; blocks are padded to it, so that a row's codes never depend on its neighbours."""
LONGEST = 1e15
"""Length of a vector at most: sums of millions of its squares must be finite in float32, or faiss ends the process."""


class Codebooks(Protocol):
    """What codes mean, whatever they are made from; `genretrieval_tokenizers.publish` publishes codes of these."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        ...

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report."""
        ...

    def decode(self, codes_NL: Codes) -> NDArray[np.float32]:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read."""
        ...

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        ...


class Tokenizer(Codebooks, Protocol):
    """A fitted tokenizer: vectors to codes and back, in NumPy alone.

    Equal vectors get equal codes, whatever stands beside them, however many threads compute, and after saving and
    loading. Codes say nothing about collisions; `genretrieval_tokenizers.collisions` makes IDs of them.
    """

    def encode(self, x_ND: NDArray[np.floating]) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``.

        Raises:
            DataError: the vectors are not finite or have other dimensions than the tokenizer.
        """
        ...

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """What it would cost to give a vector each code of the last level, its other codes being as `encode` says.

        Squared distances in the space that the last level quantises, float32 ``[N, codebook_sizes[-1]]``, infinite
        where a code does not exist under these codes. `encode` picks the cheapest.
        """
        ...


def checked_vectors(x_ND: NDArray[np.floating], dim: int | None = None) -> NDArray[np.float32]:
    """`x_ND` as contiguous float32.

    Args:
        x_ND: float ``[N, D]``.
        dim: dimensions that the tokenizer was fitted with; None while fitting, when there must also be a row.

    Raises:
        DataError: it is no matrix, has other dimensions than `dim`, or a row holds a number that is not finite or is
            longer than `LONGEST`.
    """
    if x_ND.ndim != 2 or not x_ND.shape[1] or (dim is None and not len(x_ND)):
        raise DataError(f"embeddings have shape {x_ND.shape}; expected [n_items, dim] with items and dimensions")
    if dim is not None and x_ND.shape[1] != dim:
        raise DataError(
            f"embeddings have {x_ND.shape[1]} dimensions, the codebooks {dim}: they come from another embedding, and "
            "codes would mean nothing; embed the items with the recipe that the tokenizer was fitted with"
        )
    if unusable := unusable_row(x_ND):
        row, why = unusable
        raise DataError(f"the embedding of item row {row} {why}")
    return np.ascontiguousarray(x_ND, dtype=np.float32)


def unusable_row(x_ND: NDArray[np.floating]) -> tuple[int, str] | None:
    """The first row that cannot be quantised, and why; None without one."""
    with np.errstate(over="ignore", invalid="ignore"):
        square_N = np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64)
    if (square_N <= LONGEST**2).all():
        return None
    row = int(np.argmin(square_N <= LONGEST**2))
    if not np.isfinite(x_ND[row]).all():
        return row, "holds NaN or infinity: the item has no place among the others; compute its vector again"
    return (
        row,
        f"is longer than {LONGEST:g}, and float32 cannot hold sums of such squares; divide all vectors by one number",
    )
