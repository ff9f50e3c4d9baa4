"""Item embeddings from what users interacted with one after another."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_pipelines.embed.linear import Matrix, truncated_svd, unit_rows

CONTEXT_WINDOW = 5
DEFAULT_DIM = 64

_log = logging.getLogger(__name__)


def collaborative_embeddings(sequences: Iterable[NDArray[np.int32]], n_items: int, dim: int = DEFAULT_DIM) -> Matrix:
    """PPMI-SVD of co-occurrence: items that users meet near each other get near vectors.

    Two items at distance d in one sequence, d at most `CONTEXT_WINDOW` to either side, count 1/d. The counts
    become positive pointwise mutual information, log(p(i, j) / (p(i) p(j))) where that is above zero: no
    shift (one "negative sample" in the words of Levy and Goldberg, "Neural word embedding as implicit matrix
    factorization", NeurIPS 2014) and no smoothing of the context's frequency. The vectors are U sqrt(S) of
    its truncated SVD, to length 1.

    Args:
        sequences: item rows of each user in history order. Training sequences only: a held-out item in here
            would leak its neighbours into the semantic IDs.
        n_items: rows of the catalogue.
        dim: dimensions at most.

    Returns:
        float32 ``[n_items, k]``, k at most `dim`; zeros for items that never stand beside another one. Where
        no item does, k is 0 and a warning is logged.

    Raises:
        DataError: a sequence names an item row outside the catalogue.
    """
    ppmi = _ppmi(_cooccurrence(list(sequences), n_items))
    if not ppmi.nnz:
        _log.warning(
            "no user has two different items in the training part of the history: the collaborative "
            "embedding is empty, and semantic IDs follow the other embeddings alone"
        )
        return np.zeros((n_items, 0), np.float32)
    u, s, _ = truncated_svd(ppmi, dim)
    return unit_rows(u * np.sqrt(s))


def _cooccurrence(sequences: list[NDArray[np.int32]], n_items: int) -> sp.csr_matrix:
    """Symmetric float32 ``[n_items, n_items]`` of 1/distance counts; an item beside itself does not count."""
    items = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    if len(items) and (items.min() < 0 or items.max() >= n_items):
        raise DataError(
            f"a history names item row {items.max() if items.min() >= 0 else items.min()}, but the item "
            f"table has {n_items} rows; histories and items must come from the same prepared folder"
        )
    owner = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    counts = sp.csr_matrix((n_items, n_items), dtype=np.float32)
    for distance in range(1, CONTEXT_WINDOW + 1):
        left, right = items[:-distance], items[distance:]
        near = (owner[:-distance] == owner[distance:]) & (left != right)
        weights = np.full(int(near.sum()), 1 / distance, np.float32)
        counts = counts + sp.csr_matrix((weights, (left[near], right[near])), shape=counts.shape)
    return (counts + counts.T).tocsr()


def _ppmi(counts: sp.csr_matrix) -> sp.csr_matrix:
    """max(0, log(p(i, j) / (p(i) p(j)))) of a symmetric count matrix."""
    pairs = counts.tocoo()
    of_item = np.asarray(counts.sum(axis=1), np.float64).ravel()
    information = np.log(pairs.data * of_item.sum() / (of_item[pairs.row] * of_item[pairs.col]))
    kept = information > 0
    return sp.csr_matrix((information[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), shape=counts.shape)
