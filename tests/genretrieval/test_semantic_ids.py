from __future__ import annotations

import numpy as np
import pytest

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds


def test_shape_and_offsets_by_hand() -> None:
    ids = SemanticIds(np.array([[0, 4, 1], [2, 0, 0]], np.int32), (3, 5, 2))
    assert (ids.n_items, ids.n_levels) == (2, 3)
    assert ids.level_offsets.tolist() == [0, 3, 8]


def test_no_items_is_legal() -> None:
    assert SemanticIds(np.empty((0, 2), np.int32), (3, 3)).n_items == 0


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (np.zeros((2, 3), np.int32), (4, 4), "2 codebook sizes"),
        (np.zeros(2, np.int32), (4,), "shape"),
        (np.zeros((2, 2), np.int64), (4, 4), "int32, not int64"),
        (np.array([[0, 0], [0, 4]], np.int32), (4, 4), "item row 1 has code 4 at level 1"),
        (np.array([[0, 0], [-1, 0]], np.int32), (4, 4), "item row 1 has code -1 at level 0"),
    ],
)
def test_what_does_not_fit_is_refused(codes: np.ndarray, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SemanticIds(codes, sizes)
