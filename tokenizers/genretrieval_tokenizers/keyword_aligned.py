"""Keyword-aligned encoding: the first codes of an item are slots of the words that say what it is.

OneRetrieval (arXiv 2606.13533). Attribute types are merged into groups; of each group the most important keyword of an
item gives one code. `genretrieval.keyword_codebook` encodes, items and queries alike; here its groups and slots are
fitted, and what words leave open is described by residual k-means levels behind them, where these are asked for.

Groups. An item has one slot a group, so of two types merged it keeps one word, and what is lost is what the other one
would have said beside it. With X and Y the most important words of two types (or none), that is, on average over which
of the two stays,

    IL(X, Y) = 1/2 [H(X | Y) + H(Y | X)]

OneRetrieval takes the same measure of whether a type occurs at all; the two are equal where a type has a single word.
But types that nearly all items have, as product and brand, then lose nothing by merging: on Beauty its knee leaves 57 %
of the items with a path that another item has, with words it is 14 %. The pair that loses least is merged, again and
again, and the knee (the largest second difference of what merging costs) says where to stop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import TypeAdapter

from genretrieval.errors import DataError
from genretrieval.keyword_codebook import EMPTY, KeywordCodebook, by_importance
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.quantise import F32, ResidualEncoder, nearest_codes
from genretrieval_tokenizers.rq_kmeans import fit_levels, kmeans_codebook, notes_on_sizes
from genretrieval_tokenizers.storage import read_tokenizer, write_tokenizer
from genretrieval_tokenizers.tokenizer import checked_vectors

Fields = Sequence[Sequence[str]]
"""The texts of each item, those first that say most surely what it is; see `KeywordCodebook.encode_fields`."""

_FORMAT = "genretrieval.keyword_aligned.1"
_TYPES = tuple(AttributeType)


@dataclass(frozen=True, slots=True)
class KeywordAlignedConfig:
    """Settings of keyword-aligned encoding. How many groups there are, the data say.

    Attributes:
        method: tag of these settings in a recipe.
        solo_slots: keywords of a group that have a slot of their own, at most: those that most items have.
        cluster_slots: slots that the other keywords of a group share by meaning, at most.
        items_per_slot: items that a slot shall stand for: a keyword of fewer is not given one of its own, and there are
            no more clusters than so many items allow. A small shop thus gets fewer slots.
        reserved_slots: slots of a group that no item has, for words that come later.
        content_sizes: codes of residual k-means levels behind the keyword slots; none by default.
        iterations: k-means iterations.
        max_points_per_centroid: vectors a code that k-means trains on; of more, a sample is drawn.
        seed: start of k-means.

    Raises:
        DataError: a setting is out of range.
    """

    method: Literal["keyword_aligned"] = "keyword_aligned"
    solo_slots: int = 1024
    cluster_slots: int = 1024
    items_per_slot: int = 5
    reserved_slots: int = 10
    content_sizes: tuple[int, ...] = ()
    iterations: int = 25
    max_points_per_centroid: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"solo_slots": 0, "cluster_slots": 1, "items_per_slot": 1, "reserved_slots": 0}
        least |= {"iterations": 1, "max_points_per_centroid": 1}
        if low := [
            f"{name} is {getattr(self, name)}, at least {n}" for name, n in least.items() if getattr(self, name) < n
        ]:
            raise DataError(f"tokenizer: {'; '.join(low)} is needed")
        if any(size < 1 for size in self.content_sizes):
            raise DataError(f"content_sizes {self.content_sizes}: a level needs at least 1 code; give [] for no levels")


@dataclass(frozen=True)
class KeywordAligned:
    """A fitted keyword-aligned encoding.

    It offers what a `Tokenizer` does, but reads words beside vectors.

    Attributes:
        config: what it was fitted with.
        keywords: encodes the words.
        vectors: float32 ``[codes, dim]`` a level: what its codes add to the vector of an item. First the levels of
            `keywords`, then those of content.
    """

    config: KeywordAlignedConfig
    keywords: KeywordCodebook
    vectors: tuple[F32, ...] = field(repr=False)

    @classmethod
    def fit(
        cls,
        x_ND: NDArray[np.floating],
        fields: Fields,
        dictionary: KeywordDictionary,
        config: KeywordAlignedConfig | None = None,
    ) -> KeywordAligned:
        """Find the groups, give every keyword a slot, and learn what slots stand for.

        Equal input, seed and number of threads give equal codebooks.

        Args:
            x_ND: float ``[N, dim]``, vectors of the items.
            fields: their texts.
            dictionary: typed keywords; the heavier one of a text's is the more important.
            config: settings.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty; or no item has a keyword.
        """
        config = config or KeywordAlignedConfig()
        x_ND = checked_vectors(x_ND)
        found = _Found.of(dictionary, fields)
        if not found.carried.nnz:
            raise DataError(
                f"no item has a keyword: the {len(dictionary):,} of {dictionary.source} stand in none of "
                f"{len(fields):,} items. Give the shop's words in keywords.parquet, or choose method: rq_kmeans, which "
                "reads vectors alone"
            )
        groups = merge_types(found.words_NT, found.order_NT)
        keywords = _give_slots(dictionary, groups, found, x_ND, config)
        codes_NG = np.array([keywords.encode_fields(texts) for texts in fields], np.int32)
        means, left_ND = _slot_vectors(x_ND, codes_NG, keywords.sizes)
        content = fit_levels(left_ND, config.content_sizes, config, normalize=False)
        return cls(config, keywords, (*means, *content.codebooks))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        return tuple(len(vectors_KD) for vectors_KD in self.vectors)

    @property
    def reserved_slots(self) -> tuple[int, ...]:
        """Reserved codes of each level, the last ones."""
        return (*self.keywords.reserved, *[0] * len(self.config.content_sizes))

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return int(self.vectors[0].shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What each level holds, and what came out different from what was asked, for the report."""
        k = self.keywords
        held = [0] * k.n_groups
        for keyword in k.dictionary.keywords:
            held[k.group_of(keyword.type)] += 1
        levels = tuple(
            f"level {level} is of {', '.join(group)}: {held[level]:,} keywords in "
            f"{k.sizes[level] - k.reserved[level] - 1:,} slots, {k.reserved[level]} more reserved"
            for level, group in enumerate(k.groups)
        )
        return levels + notes_on_sizes(self.config.content_sizes, self.codebook_sizes[k.n_groups :])

    def encode(self, x_ND: NDArray[np.floating], fields: Fields) -> Codes:
        """Codes of items or queries, int32 ``[N, n_levels]``; each depends on its own vector and texts alone.

        Args:
            x_ND: float ``[N, dim]``; read by content levels alone.
            fields: texts of each row; of a query, the query.

        Raises:
            DataError: the vectors are not finite, have other dimensions than the codebooks, or are not one a text.
        """
        x_ND = checked_vectors(x_ND, self.dim)
        if len(fields) != len(x_ND):
            raise DataError(f"{len(fields)} texts for {len(x_ND)} vectors: they do not belong together")
        codes_NG = self._slots(fields)
        if not self.config.content_sizes:
            return codes_NG
        return np.column_stack([codes_NG, self._encoder.encode(self._left_over(x_ND, codes_NG))])

    def decode(self, codes_NL: Codes) -> F32:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read."""
        x_ND = np.zeros((len(codes_NL), self.dim), np.float32)
        for vectors_KD, codes_N in zip(self.vectors, codes_NL.T, strict=False):
            x_ND += vectors_KD[codes_N]
        return x_ND

    def last_level_costs(self, x_ND: NDArray[np.floating], fields: Fields) -> F32:
        """Squared distances to the codes of the last level; `Tokenizer.last_level_costs` says more.

        Raises:
            DataError: as `encode`; or there is no content level, and a slot of words cannot be moved.
        """
        if not self.config.content_sizes:
            raise DataError(
                "a code that stands for a word cannot be moved to a free one, it would say something else; set "
                "collisions.method: dedup or none, or give content_sizes"
            )
        left_ND = self._left_over(checked_vectors(x_ND, self.dim), self._slots(fields))
        return self._encoder.last_level_costs(left_ND)

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        k = self.keywords
        texts = [keyword.text.encode() for keyword in k.dictionary.keywords]
        level_of = {type_: level for level, group in enumerate(k.groups) for type_ in group}
        tensors: dict[str, NDArray[np.generic]] = {
            "keywords.text": np.frombuffer(b"".join(texts), np.uint8),
            "keywords.length": np.array([len(text) for text in texts], np.int64),
            "keywords.type": np.array([_TYPES.index(keyword.type) for keyword in k.dictionary.keywords], np.int64),
            "keywords.weight": np.array([keyword.weight for keyword in k.dictionary.keywords], np.float64),
            "keywords.slot": k.slots,
            "keywords.level_of_type": np.array([level_of.get(type_, -1) for type_ in _TYPES], np.int64),
            "keywords.reserved": np.array(k.reserved, np.int64),
        }
        levels = {f"vectors.{level}": vectors_KD for level, vectors_KD in enumerate(self.vectors)}
        write_tokenizer(path, _FORMAT, self.config, {**tensors, **levels})

    @classmethod
    def load(cls, path: Path) -> KeywordAligned:
        """Read what `save` wrote; it encodes to the same codes.

        Raises:
            DataError: the file is missing, damaged, or of another tokenizer.
        """
        settings, tensors = read_tokenizer(path, _FORMAT)
        config = TypeAdapter(KeywordAlignedConfig).validate_python(settings)
        of = {name: tensors[f"keywords.{name}"] for name in ("text", "length", "type", "weight", "slot", "reserved")}
        ends = np.cumsum(of["length"])[:-1]
        texts = [part.tobytes().decode() for part in np.split(of["text"], ends)] if len(of["length"]) else []
        rows = zip(texts, of["type"].tolist(), of["weight"].tolist(), strict=True)
        dictionary = KeywordDictionary(tuple(Keyword(text, _TYPES[type_], w) for text, type_, w in rows), path.name)
        reserved = tuple(of["reserved"].tolist())
        level_of_type = tensors["keywords.level_of_type"]
        groups = tuple(
            tuple(type_ for type_, own in zip(_TYPES, level_of_type, strict=True) if own == level)
            for level in range(len(reserved))
        )
        vectors = tuple(tensors[f"vectors.{level}"] for level in range(len(reserved) + len(config.content_sizes)))
        sizes = tuple(len(vectors_KD) for vectors_KD in vectors[: len(reserved)])
        return cls(config, KeywordCodebook(dictionary, groups, of["slot"], sizes, reserved), vectors)

    def _slots(self, fields: Fields) -> Codes:
        slots = [self.keywords.encode_fields(texts) for texts in fields]
        return np.array(slots, np.int32).reshape(len(slots), self.keywords.n_groups)

    def _left_over(self, x_ND: F32, codes_NG: Codes) -> F32:
        return x_ND - self.decode(codes_NG)

    @cached_property
    def _encoder(self) -> ResidualEncoder:
        return ResidualEncoder(self.vectors[self.keywords.n_groups :])


@dataclass(frozen=True)
class _Found:
    """The keywords of the items.

    Attributes:
        carried: bool ``[N, n_keywords]``, which keywords each item has.
        words_NT: int64 ``[N, 18]``, of each attribute type the most important one, counted from 1; 0 for none.
        order_NT: int64 ``[N, 18]``, how important it is beside those of the other types, 0 most.
    """

    carried: sp.csr_matrix
    words_NT: NDArray[np.int64]
    order_NT: NDArray[np.int64]

    @classmethod
    def of(cls, dictionary: KeywordDictionary, fields: Fields) -> _Found:
        types = [_TYPES.index(keyword.type) for keyword in dictionary.keywords]
        words_NT = np.zeros((len(fields), len(_TYPES)), np.int64)
        order_NT = np.zeros_like(words_NT)
        found = [by_importance(dictionary, texts) for texts in fields]
        for item, rows in enumerate(found):
            for order, row in enumerate(rows):
                if not words_NT[item, types[row]]:
                    words_NT[item, types[row]] = row + 1
                    order_NT[item, types[row]] = order
        columns = np.fromiter(itertools.chain.from_iterable(found), np.int64)
        ends = np.cumsum([0, *map(len, found)])
        ones = np.ones(len(columns), np.float32)
        return cls(sp.csr_matrix((ones, columns, ends), shape=(len(fields), len(types))), words_NT, order_NT)


def merge_types(
    words_NT: NDArray[np.int64], order_NT: NDArray[np.int64], types: Sequence[AttributeType] = _TYPES
) -> tuple[tuple[AttributeType, ...], ...]:
    """Groups of attribute types, by what merging loses; the module says how.

    Types that no item has stand in the group of least entropy, where a slot is free most often.

    Args:
        words_NT: int64 ``[N, T]``, the most important word of each type in each item; 0 for none.
        order_NT: int64 ``[N, T]``, its importance in the item, 0 most; a merged group has the more important word.
        types: their names.

    Returns:
        Groups, those of highest entropy first; their types as in `types`.
    """
    present = [t for t in range(len(types)) if words_NT[:, t].any()]
    groups: dict[tuple[int, ...], _Column] = {(t,): (words_NT[:, t], order_NT[:, t]) for t in present}
    levels, costs = [groups], [0.0, 0.0]
    loss: dict[frozenset[tuple[int, ...]], float] = {}
    while len(groups) > 1:
        pairs = [frozenset(pair) for pair in itertools.combinations(groups, 2)]
        for pair in pairs:
            if pair not in loss:
                loss[pair] = information_loss(*(groups[group][0] for group in pair))
        least = min(pairs, key=loss.__getitem__)
        costs.append(loss[least])
        joint = _merged(*(groups[group] for group in sorted(least)))
        groups = {group: column for group, column in groups.items() if group not in least}
        groups[tuple(sorted(itertools.chain(*least)))] = joint
        levels.append(groups)
    if len(levels) > 1:
        groups = levels[int(np.diff(costs, 2).argmax())]
    order = sorted(groups, key=lambda group: (-entropy(groups[group][0]), group))
    order[-1] = tuple(sorted({*order[-1], *range(len(types))} - set(itertools.chain(*order[:-1]))))
    return tuple(tuple(types[t] for t in group) for group in order)


def information_loss(x_N: NDArray[np.int64], y_N: NDArray[np.int64]) -> float:
    """Bits lost on average where one of two variables is kept: half of H(X | Y) + H(Y | X)."""
    joint_N = x_N * (int(y_N.max(initial=0)) + 1) + y_N
    return max(0.0, entropy(joint_N) - (entropy(x_N) + entropy(y_N)) / 2)


def entropy(x_N: NDArray[np.int64]) -> float:
    """Bits, of the values of a variable."""
    shares = np.unique(x_N, return_counts=True)[1] / len(x_N)
    return float(-(shares * np.log2(shares)).sum())


_Column = tuple[NDArray[np.int64], NDArray[np.int64]]


def _merged(one: _Column, other: _Column) -> _Column:
    """Of two groups the more important word in each item."""
    (words_N, order_N), (words2_N, order2_N) = one, other
    second = (words2_N > 0) & ((words_N == 0) | (order2_N < order_N))
    return np.where(second, words2_N, words_N), np.where(second, order2_N, order_N)


def _give_slots(
    dictionary: KeywordDictionary,
    groups: tuple[tuple[AttributeType, ...], ...],
    found: _Found,
    x_ND: F32,
    config: KeywordAlignedConfig,
) -> KeywordCodebook:
    """Solo slots for the words of most items, clusters for the others, and behind them those that are reserved."""
    n_items_K = np.asarray(found.carried.sum(axis=0)).ravel().astype(np.int64)
    level_of = {type_: level for level, group in enumerate(groups) for type_ in group}
    level_K = np.array([level_of[keyword.type] for keyword in dictionary.keywords], np.int64)
    slots, sizes = np.zeros(len(dictionary), np.int32), []
    for level in range(len(groups)):
        rows = np.flatnonzero(level_K == level)
        rows = rows[np.argsort(-n_items_K[rows], kind="stable")]
        n_solo = min(config.solo_slots, int((n_items_K[rows] >= config.items_per_slot).sum()))
        solo, tail = rows[:n_solo], rows[n_solo:]
        slots[solo] = EMPTY + 1 + np.arange(n_solo)
        n_clusters = 0
        if len(tail):
            carriers = int((found.carried[:, tail].getnnz(axis=1) > 0).sum())
            wanted = min(config.cluster_slots, max(1, carriers // config.items_per_slot))
            clusters_N = _clusters(found.carried[:, tail], n_items_K[tail], x_ND, wanted, config, config.seed + level)
            n_clusters = int(clusters_N.max()) + 1
            slots[tail] = EMPTY + 1 + n_solo + clusters_N
        sizes.append(1 + n_solo + n_clusters + config.reserved_slots)
    reserved = (config.reserved_slots,) * len(groups)
    return KeywordCodebook(dictionary, groups, slots, tuple(sizes), reserved)


def _clusters(
    carried: sp.csr_matrix,
    n_items_K: NDArray[np.int64],
    x_ND: F32,
    size: int,
    config: KeywordAlignedConfig,
    seed: int,
) -> NDArray[np.int64]:
    """Cluster of each keyword, int64 ``[K]``, from 0 without gaps: k-means over the mean vectors of their items."""
    means_KD = (carried.T @ x_ND) / np.maximum(n_items_K, 1)[:, None]
    means_KD = np.ascontiguousarray(means_KD, np.float32)
    codebook = kmeans_codebook(means_KD, size, config, seed, "random")
    return np.unique(nearest_codes(means_KD, codebook), return_inverse=True)[1].astype(np.int64)


def _slot_vectors(x_ND: F32, codes_NG: Codes, sizes: tuple[int, ...]) -> tuple[list[F32], F32]:
    """Level by level the mean of what the levels above leave over, zeros for slots without items; and the rest."""
    levels, left_ND = [], x_ND
    for codes_N, size in zip(codes_NG.T, sizes, strict=True):
        of_slot = sp.csr_matrix(
            (np.ones(len(codes_N), np.float32), (codes_N, np.arange(len(codes_N)))), (size, len(codes_N))
        )
        n_items_K = np.maximum(np.bincount(codes_N, minlength=size), 1)
        means_KD = ((of_slot @ left_ND) / n_items_K[:, None]).astype(np.float32)
        left_ND = left_ND - means_KD[codes_N]
        levels.append(means_KD)
    return levels, left_ND
