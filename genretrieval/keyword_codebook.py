"""Keyword codebooks: a text becomes one slot for each group of attribute types, by its keywords alone.

The keyword-aligned encoding of OneRetrieval (arXiv 2606.13533). Queries and items go through the same encoder, which is
a dictionary, an automaton and a table: it can run in a server, it never drifts, and a word that is given one of the
reserved slots later is read in queries as any other word is.

The codes of a level, one level a group::

    0                 empty: the text has no keyword of the group
    solo              one keyword each
    cluster           several keywords that mean alike
    reserved          no keyword yet; no item has one
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.keywords import AttributeType, KeywordDictionary

EMPTY = 0
"""The slot of a text without a keyword of the group."""

_FORMAT = "genretrieval.keyword_codebook.1"
_HEADER = "genretrieval"
_SCHEMA = {"keyword": pl.String(), "type": pl.String(), "weight": pl.Float64(), "slot": pl.Int32()}


def by_importance(dictionary: KeywordDictionary, fields: Sequence[str]) -> list[int]:
    """Rows of the keywords in some texts, the most important one first, each once.

    A keyword of an earlier text is more important than any of a later one; of one text it is the heavier one; of equal
    weights, the one that stands first.
    """
    found = (
        (number, -match.keyword.weight, match.start, match.row)
        for number, text in enumerate(fields)
        for match in dictionary.match(text)
    )
    return list(dict.fromkeys(row for *_, row in sorted(found)))


@dataclass(frozen=True)
class KeywordCodebook:
    """A dictionary, and the slot of each keyword in the codebook of its group.

    Attributes:
        dictionary: the keywords; of several in a text, the one of the highest weight stands for their group.
        groups: attribute types of each level; every type of the dictionary is in one of them.
        slots: int32 ``[n_keywords]``, slot of each keyword in the codebook of its group; never the empty slot, never a
            reserved one.
        sizes: codes of each level, empty and reserved slots included.
        reserved: reserved slots of each level, which are its last codes.

    Raises:
        DataError: these do not belong together.
    """

    dictionary: KeywordDictionary
    groups: tuple[tuple[AttributeType, ...], ...]
    slots: NDArray[np.int32] = field(repr=False)
    sizes: tuple[int, ...]
    reserved: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the contract once, here."""
        source = self.dictionary.source
        if not len(self.groups) == len(self.sizes) == len(self.reserved) or len(self.slots) != len(self.dictionary):
            raise DataError(
                f"{source} has {len(self.groups)} groups, {len(self.sizes)} sizes, {len(self.reserved)} numbers of "
                f"reserved slots, {len(self.dictionary)} keywords and {len(self.slots)} slots: they are of different "
                "codebooks; restore the file from a copy, or tokenize anew"
            )
        types = [type_ for group in self.groups for type_ in group]
        if len(set(types)) < len(types):
            raise DataError(f"{source} has an attribute type in two groups; a type has one level, keep one of them")
        if lost := sorted({keyword.type.value for keyword in self.dictionary.keywords} - set(types)):
            raise DataError(f"{source} has keywords of {', '.join(lost)}, which no group holds; tokenize anew")
        first_reserved = np.subtract(self.sizes, self.reserved)
        limits = first_reserved[self._levels]
        if len(bad := np.flatnonzero((self.slots <= EMPTY) | (self.slots >= limits))):
            row = int(bad[0])
            raise DataError(
                f"{source} gives {len(bad)} keywords a slot that no keyword can have, first "
                f"{self.dictionary.keywords[row].text!r} with slot {self.slots[row]}, where 1 to {limits[row] - 1} are "
                "the solo and cluster slots of its level; restore the file from a copy, or tokenize anew"
            )

    def __eq__(self, other: object) -> bool:
        """Equal codebooks encode every text equally."""
        return (
            isinstance(other, KeywordCodebook)
            and (self.dictionary, self.groups, self.sizes, self.reserved)
            == (other.dictionary, other.groups, other.sizes, other.reserved)
            and np.array_equal(self.slots, other.slots)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds an array

    @property
    def n_groups(self) -> int:
        """Levels of a semantic ID that are keyword slots: the first ones."""
        return len(self.groups)

    def group_of(self, type_: AttributeType) -> int:
        """Level of an attribute type.

        Raises:
            DataError: no group holds it.
        """
        if type_ not in self._level_of:
            known = ", ".join(known.value for known in self._level_of)
            raise DataError(f"no level of the keyword codebook holds {type_.value}; it has {known}")
        return self._level_of[type_]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Slots of a text, int32 ``[n_groups]``.

        The keyword of a group is the one of the highest weight; of equal weights, the one that stands first. Where
        the text has none, the slot is `EMPTY`.
        """
        return self.encode_fields((text,))

    def encode_fields(self, fields: Sequence[str]) -> NDArray[np.int32]:
        """Slots of something that is described by several texts, int32 ``[n_groups]``.

        Args:
            fields: texts, those first that say most surely what it is. The keyword of a group comes from the first
                text that has one.
        """
        slots = np.full(self.n_groups, EMPTY, np.int32)
        for row in reversed(by_importance(self.dictionary, fields)):  # the most important one is written last
            slots[self._levels[row]] = self.slots[row]
        return slots

    def words(self, level: int, code: int) -> str:
        """What a code stands for, to be read: a keyword, of a cluster the heaviest one; ``""`` for the empty slot."""
        first_reserved = self.sizes[level] - self.reserved[level]
        if code >= first_reserved:
            return f"(reserved {code - first_reserved + 1})"
        rows = self._members.get((level, code), [])
        if not rows:
            return ""
        text = self.dictionary.keywords[rows[0]].text
        return f"{text} and alike" if len(rows) > 1 else text

    def save(self, path: Path) -> None:
        """Write one Parquet file, which `KeywordDictionary.load` reads too; it is whole or absent."""
        rows = [
            (keyword.text, keyword.type.value, keyword.weight, slot)
            for keyword, slot in zip(self.dictionary.keywords, self.slots.tolist(), strict=True)
        ]
        header = {
            "format": _FORMAT,
            "groups": [[type_.value for type_ in group] for group in self.groups],
            "sizes": self.sizes,
            "reserved": self.reserved,
        }
        partial = path.with_name(path.name + ".partial")
        pl.DataFrame(rows, _SCHEMA, orient="row").write_parquet(partial, metadata={_HEADER: json.dumps(header)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> KeywordCodebook:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or a dictionary without slots.
        """
        dictionary = KeywordDictionary.load(path)
        try:
            header: dict[str, Any] = json.loads(pl.read_parquet_metadata(path)[_HEADER])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}, not {_FORMAT!r}")
            groups = tuple(tuple(AttributeType(type_) for type_ in group) for group in header["groups"])
            sizes, reserved = (tuple(int(n) for n in header[name]) for name in ("sizes", "reserved"))
            slots = pl.read_parquet(path, columns=["slot"])["slot"].cast(pl.Int32).to_numpy()
        except (OSError, KeyError, ValueError, TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{path} is no keyword codebook of this version ({error!r}); give the keywords.parquet of a bundle "
                "that was tokenized with method: keyword_aligned"
            ) from error
        return cls(dictionary, groups, slots, sizes, reserved)

    @cached_property
    def _level_of(self) -> dict[AttributeType, int]:
        return {type_: level for level, group in enumerate(self.groups) for type_ in group}

    @cached_property
    def _levels(self) -> NDArray[np.int64]:
        """Level of each keyword."""
        return np.array([self._level_of[keyword.type] for keyword in self.dictionary.keywords], np.int64)

    @cached_property
    def _members(self) -> dict[tuple[int, int], list[int]]:
        """Rows of the keywords in each slot, heaviest first."""
        members: dict[tuple[int, int], list[int]] = {}
        for row in np.argsort([-keyword.weight for keyword in self.dictionary.keywords], kind="stable").tolist():
            members.setdefault((int(self._levels[row]), int(self.slots[row])), []).append(row)
        return members
