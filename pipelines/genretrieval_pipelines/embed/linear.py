"""The linear algebra that embeddings share: row normalisation and the truncated SVD of a sparse matrix."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def unit_rows(x_ND: NDArray[np.floating]) -> Matrix:
    """Rows scaled to length 1 (float32); rows of zeros stay zeros.

    First by a power of two, which is exact, to numbers whose squares float32 can hold.
    """
    _, exponent = np.frexp(np.abs(x_ND).max(axis=1, keepdims=True, initial=0))
    x_ND = np.ldexp(x_ND, -exponent)
    length = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return (x_ND / np.where(length > 0, length, 1)).astype(np.float32)


def truncated_svd(x: sp.csr_matrix, dim: int) -> tuple[Matrix, Matrix, Matrix]:
    """The leading singular triplets of a sparse matrix, by randomised subspace iteration.

    Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithm 4.4. The
    random start is fixed and every pair of singular vectors has its sign set, so equal input gives equal
    output.

    Args:
        x: sparse float32 ``[n, m]``.
        dim: triplets wanted.

    Returns:
        ``(u [n, k], s [k], v [m, k])`` with s descending. k is below `dim` where the matrix has a lower rank.
    """
    if x.shape[1] < x.shape[0]:  # QR and the sign rule work on the shorter side
        v, s, u = truncated_svd(x.T.tocsr(), dim)
        return u, s, v
    filled = np.flatnonzero(np.bincount(x.indices, minlength=x.shape[1]))
    filled_only, n = x[:, filled], x.shape[0]
    transposed = filled_only.T.tocsr()
    width = min(dim + _OVERSAMPLING, n, len(filled))
    start = np.random.default_rng(0).standard_normal((len(filled), width), dtype=np.float32)
    left, _ = np.linalg.qr(filled_only @ start)
    for _ in range(_POWER_ITERATIONS):
        left, _ = np.linalg.qr(filled_only @ (transposed @ left))
    right = (transposed @ left).astype(np.float64)
    squares, rotation = np.linalg.eigh(right.T @ right)
    kept = np.flatnonzero(squares > 1e-10 * squares.max(initial=0))[::-1][:dim]
    s, rotation = np.sqrt(squares[kept]), rotation[:, kept]
    u = left @ rotation
    rotation = rotation * np.sign(np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0))
    v = np.zeros((x.shape[1], len(kept)), np.float32)
    v[filled] = right @ (rotation / s)
    return (left @ rotation).astype(np.float32), s.astype(np.float32), v
