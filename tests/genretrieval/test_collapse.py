from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genretrieval.catalogue import build_index
from genretrieval.collapse import CollapseValues
from genretrieval.errors import RequestError
from genretrieval.item_ids import ItemIds
from genretrieval.semantic_ids import SemanticIds
from genretrieval.servable import Catalogue


@pytest.fixture
def values() -> CollapseValues:
    names = ["a", "b", "c", "d"]
    table = pl.DataFrame(
        {
            "item_id": names,
            "popularity": [0] * 4,
            "parent_id": ["p", None, "p", "q"],
            "categories": [["shoes", "red"], [], ["shoes"], None],
            "size": [1.5, 2.0, 1.5, None],
        }
    )
    ids = SemanticIds(np.arange(4, dtype=np.int32)[:, None], (4,))
    return CollapseValues(Catalogue(table, ids, build_index(ids), ItemIds(names)))


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("parent_id", [["a", "c"], ["d"]]),
        ("categories", [["a", "c"]]),
        ("category", [["a", "c"]]),
        ("size", [["a", "c"], ["b"]]),
    ],
)
def test_items_of_one_value_have_one_number(values, attribute, groups) -> None:
    found = values.of(attribute, np.arange(4))
    named: dict[int, list[str]] = {}
    for name, value in zip("abcd", found.tolist(), strict=True):
        if value >= 0:
            named.setdefault(value, []).append(name)
    assert sorted(named.values()) == groups
    assert set(found[found < 0].tolist()) <= {-1}
    assert values.of(attribute, np.asarray([2])).tolist() == [found[2]]


@pytest.mark.parametrize("attribute", ["colour", "popularity", "item_id"])
def test_what_is_no_attribute_is_refused(values, attribute) -> None:
    message = f"collapse_by unknown attribute '{attribute}'; the catalogue has categories, parent_id, size"
    with pytest.raises(RequestError, match=message):
        values.column(attribute)
    with pytest.raises(RequestError, match=message):
        values.of(attribute, np.arange(2))
