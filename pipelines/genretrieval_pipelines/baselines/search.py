"""Baselines for queries: BM25 over item texts, and cosine between query and item embeddings."""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import InvalidInputError
from genretrieval.histories import Histories
from genretrieval_pipelines.baselines.ranking import Baseline, Scores
from genretrieval_pipelines.cases import Cases

# Scripts written without spaces between words: Thai, Lao, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"([{_UNSPACED}]+)|[^\W{_UNSPACED}]+")


def tokenize(text: str) -> list[str]:
    """Words in lower case; runs of a script without spaces become overlapping pairs of characters.

    Character pairs are the usual stand-in for a word segmenter and need no dictionary.
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.casefold()):
        word, unspaced = match.group(), match.group(1)
        tokens.extend([word[i : i + 2] for i in range(len(word) - 1)] if unspaced and len(word) > 1 else [word])
    return tokens


class BM25(Baseline):
    """BM25 as Lucene weighs it (k1 1.5, b .75); an item without a word of the query is not returned."""

    name = "BM25"

    def __init__(self, index: bm25s.BM25 | None, n_items: int) -> None:
        """Takes a filled index, or None where no text holds a word."""
        self.index = index
        self.n_items = n_items

    @classmethod
    def fit(cls, texts: Sequence[str]) -> BM25:
        """Index the text of every item row."""
        tokens = [tokenize(text) for text in texts]
        if not any(tokens):
            return cls(None, len(texts))
        index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        index.index(tokens, show_progress=False)
        return cls(index, len(texts))

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """BM25 of the query; ``-inf`` without a common word, hence for every item where there is no query."""
        scores = np.full((len(cases), self.n_items), -np.inf, np.float32)
        for row, query in enumerate(cases.queries):
            known = [t for t in tokenize(query or "") if self.index is not None and t in self.index.vocab_dict]
            if known and self.index is not None:
                found = self.index.get_scores(known)
                scores[row] = np.where(found > 0, found, -np.inf)
        return scores


class DenseRetrieval(Baseline):
    """Cosine between the embedding of the query and of every item."""

    name = "dense retrieval"

    def __init__(
        self, items: NDArray[np.float32], queries: Sequence[str], query_embeddings: NDArray[np.float32]
    ) -> None:
        """Takes embeddings of one model for items and distinct queries.

        Args:
            items: float32 ``[n_items, dim]``.
            queries: the queries that will be asked.
            query_embeddings: float32 ``[n_queries, dim]``, one a query.

        Raises:
            InvalidInputError: if the shapes do not belong together.
        """
        if query_embeddings.shape != (len(queries), items.shape[1]):
            raise InvalidInputError(
                f"query embeddings have shape {query_embeddings.shape}, "
                f"expected ({len(queries)}, {items.shape[1]}): one a query, of the items' model"
            )
        self.items = _unit(items)
        self.query_embeddings = _unit(query_embeddings)
        self.query_rows = {query: row for row, query in enumerate(queries)}
        self.n_items = len(items)

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """Cosines; ``-inf`` for every item where there is no query.

        Raises:
            InvalidInputError: if a query was given no embedding.
        """
        scores = np.full((len(cases), self.n_items), -np.inf, np.float32)
        asked = [(row, query) for row, query in enumerate(cases.queries) if query is not None]
        for _, query in asked:
            if query not in self.query_rows:
                raise InvalidInputError(
                    f"no embedding was given for the query {query!r}; embed all queries of the cases"
                )
        at = np.array([row for row, _ in asked], np.int64)
        scores[at] = self.query_embeddings[[self.query_rows[query] for _, query in asked]] @ self.items.T
        return scores


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
