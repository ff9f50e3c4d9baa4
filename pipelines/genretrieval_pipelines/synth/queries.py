"""What people type when they have an item in mind, and what the shop's search understands by it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genretrieval_pipelines.synth.products import Products
from genretrieval_pipelines.synth.words import Leaf

NAMES_NOTHING = -1
# Uniform numbers that decide one query: facet, which head, which attribute, word order.
LUCK = 4


class QueryBook:
    """Every query that can be typed in a shop, and its meaning.

    A query has a head (a word for a leaf or a category; none when only a brand is typed) and may name one brand
    or one attribute. Words that fit several leaves ("boots") mean all of them.

    Attributes:
        texts: the queries, all distinct.
        head: int64 ``[n_queries]``, rows of `head_leaves`.
        head_leaves: bool ``[n_heads, n_leaves]``, the leaves a head can mean.
        brand: int64 ``[n_queries]``, the brand a query names, -1 for none.
        attribute: int64 ``[n_queries]``, the attribute a query names, -1 for none.
    """

    def __init__(self, products: Products) -> None:
        self._products = products
        head_rows: dict[str, int] = {"": 0}
        fits = [(0, leaf_row) for leaf_row in range(len(products.leaves))]
        meanings: dict[str, tuple[int, int, int]] = {}
        for leaf_row, leaf in enumerate(products.leaves):
            members = products.leaf == leaf_row
            brands = np.unique(products.brand[members]).tolist()
            attributes = [row for row in np.unique(products.attributes[members]).tolist() if row]
            for head in sorted({*_heads(leaf), leaf.category, ""}):
                head_row = head_rows.setdefault(head, len(head_rows))
                fits.append((head_row, leaf_row))
                facets = [(NAMES_NOTHING, NAMES_NOTHING)] if head else []
                facets += [(brand, NAMES_NOTHING) for brand in brands]
                facets += [(NAMES_NOTHING, attribute) for attribute in attributes] if head else []
                for brand, attribute in facets:
                    for first in (True, False):
                        text = self._phrase(head, brand, attribute, first)
                        meanings.setdefault(text, (head_row, brand, attribute))
        self.texts = list(meanings)
        self._rows = {text: row for row, text in enumerate(self.texts)}
        self.head, self.brand, self.attribute = np.array(list(meanings.values()), np.int64).T.copy()
        self.head_leaves = np.zeros((len(head_rows), len(products.leaves)), np.bool_)
        self.head_leaves[tuple(np.array(fits).T)] = True

    def _phrase(self, head: str, brand: int, attribute: int, first: bool) -> str:
        """The words in the order people type them; `first`: the brand or attribute stands before the head."""
        if brand != NAMES_NOTHING:
            named = self._products.brands[brand].lower()
        elif attribute != NAMES_NOTHING:
            kind, named = self._products.attribute_values[attribute]
            if kind == "audience":
                return f"{named} {head}" if first else f"{head} for {named}"
        else:
            return head
        return f"{named} {head}".strip() if first else f"{head} {named}".strip()

    def verbalize(self, item: int, luck: NDArray[np.float64]) -> int:
        """The row of the query that a user types who has item row `item` in mind.

        Args:
            item: item row.
            luck: float64 ``[LUCK]``, uniform in [0, 1).
        """
        products = self._products
        leaf = products.leaves[products.leaf[item]]
        heads = _heads(leaf)
        head = heads[int(luck[1] * len(heads))]
        brand = attribute = NAMES_NOTHING
        named = products.attributes[item][products.attributes[item] > 0]
        if luck[0] < 0.22:
            brand = int(products.brand[item])
            head = head if luck[0] > 0.02 else ""
        elif luck[0] < 0.52 and len(named):
            attribute = int(named[int(luck[2] * len(named))])
        elif luck[0] > 0.96:
            head = leaf.category
        return self._rows[self._phrase(head, brand, attribute, first=bool(luck[3] < 0.7))]


def _heads(leaf: Leaf) -> list[str]:
    """The ways to name a leaf: singular and plural twice as often as the synonym and the last word alone."""
    return [leaf.noun, leaf.noun, leaf.plural, leaf.plural, leaf.synonym, leaf.plural.split()[-1]]
