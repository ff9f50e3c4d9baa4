"""Keywords: the attribute words of a shop, and where they stand in a text.

OneSearch (arXiv 2509.03236) mixes the keywords of a text into its embedding; OneRetrieval (arXiv 2606.13533) gives
groups of attribute types a codebook each. Both start from what is here: a dictionary of typed words, and an
Aho-Corasick automaton (Aho and Corasick, "Efficient string matching", CACM 1975) that finds them in one pass.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import polars as pl
from ahocorasick_rs import AhoCorasick

from genretrieval.errors import DataError
from genretrieval.schemas import Problem


class AttributeType(StrEnum):
    """What a keyword says about an item: the 18 attribute types of OneSearch, in its order."""

    ENTITY = "Entity"
    MODIFIER = "Modifier"
    BRAND = "Brand"
    MATERIAL = "Material"
    STYLE = "Style"
    FUNCTION = "Function"
    LOCATION = "Location"
    AUDIENCE = "Audience"
    COLOR = "Color"
    SCENE = "Scene"
    SPECIFICATIONS = "Specifications"
    PRICE = "Price"
    MODEL = "Model"
    ANCHOR = "Anchor"
    SERIES = "Series"
    MARKETING = "Marketing"
    SEASON = "Season"
    PATTERN = "Pattern"


@dataclass(frozen=True, slots=True)
class Keyword:
    """An attribute word.

    Attributes:
        text: one or more words, as they are to be shown and embedded.
        type: what it says about an item.
        weight: how much it matters beside others, 0 or more; in a mined dictionary, the share of items that have it.
    """

    text: str
    type: AttributeType
    weight: float = 1.0


class Match(NamedTuple):
    """A keyword found: ``normalise(text)[start:end] == normalise(keyword.text)``; `row` is its in the dictionary."""

    start: int
    end: int
    keyword: Keyword
    row: int


# Scripts written without spaces between words. Hangul has spaces, but particles hang on its nouns.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao; Myanmar; Khmer
    "\u3005\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"  # iteration mark, zero; kana; Bopomofo; kana extensions
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"  # Han; Hangul; Han
)
# Vowel signs and points belong to the word they stand in, and `\w` leaves them out.
_COMBINING = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
_LETTER = rf"(?![{_UNSPACED}])[\w{_COMBINING}]"
_WORD = re.compile(rf"(?:{_LETTER}|(?<=\d)[.,](?=\d))+")
_EDGE = "\n"  # normalised text has no line breaks

# Elsewhere such marks make another letter: й is no accented и.
_ACCENTED = re.compile("(?<=[a-z\u03b1-\u03c9])[\u0300-\u036f]+")
# What the rules of `_singular` would miss, and words that only look like a plural.
_SINGULARS = {
    **{"feet": "foot", "teeth": "tooth", "mice": "mouse", "children": "child", "men": "man", "women": "woman"},
    **{"knives": "knife", "shelves": "shelf", "scarves": "scarf", "leaves": "leaf", "lenses": "lens", "buses": "bus"},
    **{f"{word}s": word for word in ("hoodie", "beanie", "onesie", "cookie", "brownie", "smoothie", "movie")},
    **{word: word for word in ("lens", "canvas", "christmas", "atlas", "series", "species")},
}
_PLURAL = re.compile(rf"(?<!{_LETTER})(?:[a-z]{{3,}}s|[a-z]+'s|feet|teeth|mice|children|(?:wo)?men)(?!{_LETTER})")
_UNITS = {
    "fl oz": r"fl\.? ?oz|fluid ounces?",
    "oz": "ozs?|ounces?",
    "ml": "mls?|millilit(?:er|re)s?|毫升",
    "l": "l|lit(?:er|re)s?",
    "mg": "mgs?|milligrams?|毫克",
    "kg": "kgs?|kilo(?:gram)?s?|千克|公斤",
    "g": "gm?s?|grams?|克(?!拉)",
    "lb": "lbs?|pounds?",
    "mm": "mm|millimet(?:er|re)s?|毫米",
    "cm": "cms?|centimet(?:er|re)s?|厘米",
    "m": "m|met(?:er|re)s?",
    "inch": "inch(?:es)?|英寸",
    "ft": "ft|foot|feet",
    "w": "w|watts?",
    "v": "v|volts?",
    "ct": "ct|counts?",
    "pack": "pk|packs?",
    "pc": "pcs?|pieces?",
}
_CANONICAL = tuple(_UNITS)
_NUMBER = r"\d+(?:[.,/]\d+)*"
_UNIT = re.compile(
    rf"(?<!{_LETTER})(?<![.,-])({_NUMBER}(?: ?x ?{_NUMBER}){{0,3}})[ -]?"  # a bound of sides is one of time
    rf"(?:{'|'.join(f'({spellings})' for spellings in _UNITS.values())})(?!{_LETTER})"
)


def normalise(text: str) -> str:
    """`text` in the form in which keywords are compared.

    NFKC, case-folded, single spaces and none at the ends; Latin and Greek letters without accents, English words in the
    singular and without a possessive 's, and one space and one spelling for the unit behind a number: "Crème, 50ML" is
    "creme, 50 ml", and "Women's Lipsticks" is "woman lipstick". Normalised text stays as it is.
    """
    if text.isascii():
        folded = " ".join(text.lower().split())
    else:
        folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
        plain = _ACCENTED.sub("", unicodedata.normalize("NFD", folded))
        folded = " ".join(unicodedata.normalize("NFKC", plain).split())  # folding can undo NFKC
    while (again := _PLURAL.sub(_singular, _UNIT.sub(_spelt, folded))) != folded:
        folded = again
    return folded


def _spelt(found: re.Match[str]) -> str:
    assert found.lastindex is not None
    return f"{found[1]} {_CANONICAL[found.lastindex - 2]}"


def _singular(found: re.Match[str]) -> str:
    word = found[0].removesuffix("'s")
    if word in _SINGULARS:
        return _SINGULARS[word]
    if word != found[0] or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes", "atoes")):
        return word[:-2]
    return word[:-1]


def with_edges(normalised: str) -> str:
    """Both ends of every word of a normalised text marked, by line breaks, of which it has none.

    A marked text contains a marked keyword exactly where the keyword stands and cuts no word, so an automaton need
    not report the many places inside of words only to have them taken out again.
    """
    return _WORD.sub(rf"{_EDGE}\g<0>{_EDGE}", normalised)


def without_words(text: str, words: Iterable[str]) -> str:
    """What is left of a text when keywords are taken out wherever they stand.

    Words apart from them are left as they were typed, which is the form that a model was trained on; where that cannot
    be told, as in scripts without spaces, all is normalised.
    """
    left = with_edges(normalise(text))
    for word in sorted(filter(None, map(normalise, words)), key=len, reverse=True):
        left = left.replace(with_edges(word), " ")
    still = left.split()
    typed: list[str] = []
    for part in text.split():
        said = normalise(part).split()
        if said and still[: len(said)] == said:
            typed.append(part)
            still = still[len(said) :]
    return " ".join(left.split() if still else typed)


@dataclass(frozen=True, slots=True)
class KeywordDictionary:
    """Keywords, and the automaton that finds them.

    No two keywords are equal after `normalise`: a word has one type, so that what it is matched as never depends on
    the order of the rows. An empty dictionary is allowed and matches nothing.

    Attributes:
        keywords: in the order given.
        source: where they come from, for messages.

    Raises:
        DataError: a keyword has no letter or digit, stands there twice, or has a weight that is negative or not
            finite; the message has the rows, counted from 0.
    """

    keywords: tuple[Keyword, ...] = ()
    source: str = field(default="keyword dictionary", compare=False)
    _automaton: AhoCorasick = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the keywords and build the automaton."""
        texts = [normalise(keyword.text) for keyword in self.keywords]
        _refuse([*_text_problems(self.source, texts), *_weight_problems(self.source, self.keywords)])
        object.__setattr__(self, "_automaton", AhoCorasick(map(with_edges, texts), store_patterns=False))

    def __len__(self) -> int:
        """Number of keywords."""
        return len(self.keywords)

    def match(self, text: str) -> list[Match]:
        """The keywords of a text, from left to right.

        Case and width make no difference. A keyword begins and ends at the ends of words; in scripts that are written
        without spaces it may stand anywhere; the digits of "1.7" are one word. A match inside a longer one is
        dropped; matches that overlap otherwise are both kept. Positions are those in ``normalise(text)``.
        """
        marked = with_edges(normalise(text))
        found = self._automaton.find_matches_as_indexes(marked, overlapping=True)
        matches = []
        covered = 0
        for row, start, end in sorted(found, key=_first_then_longest):
            if end > covered:
                covered = end
                edges = marked.count(_EDGE, 0, start)
                within = marked.count(_EDGE, start, end)
                matches.append(Match(start - edges, end - edges - within, self.keywords[row], row))
        return matches

    def match_all(self, texts: Iterable[str]) -> list[list[Match]]:
        """`match` of each text."""
        return [self.match(text) for text in texts]

    @classmethod
    def load(cls, path: Path) -> KeywordDictionary:
        """Read a Parquet file with the columns ``keyword``, ``type`` and, where wanted, ``weight``.

        A row without a weight has weight 1; other columns are not read.

        Raises:
            DataError: the file cannot be read, lacks a column, names an unknown type, or as the class says.
        """
        try:
            frame = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"keyword dictionary {path} cannot be read ({error}); give a Parquet file") from error
        if missing := [name for name in ("keyword", "type") if name not in frame.columns]:
            raise DataError(
                f"{path} has no column {' and no column '.join(map(repr, missing))}; a keyword dictionary has the "
                "columns keyword and type, and optionally weight"
            )
        weight = pl.col("weight") if "weight" in frame.columns else pl.lit(1.0)
        try:
            frame = frame.select(
                pl.col("keyword", "type").cast(pl.String).fill_null(""),
                weight.cast(pl.Float64).fill_null(1.0).alias("weight"),
            )
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{path}: keyword and type must be strings and weight a number ({error})") from error
        _refuse(_type_problems(path.name, frame["type"].to_list()))
        keywords = (Keyword(text, AttributeType(type_), weight) for text, type_, weight in frame.iter_rows())
        return cls(tuple(keywords), path.name)

    def save(self, path: Path) -> None:
        """Write the Parquet file that `load` reads; it is whole or absent."""
        rows = [(keyword.text, keyword.type.value, keyword.weight) for keyword in self.keywords]
        schema = {"keyword": pl.String(), "type": pl.String(), "weight": pl.Float64()}
        partial = path.with_name(path.name + ".partial")
        pl.DataFrame(rows, schema, orient="row").write_parquet(partial)
        os.replace(partial, path)


def _first_then_longest(found: tuple[int, int, int]) -> tuple[int, int]:
    _, start, end = found
    return start, -end


def _text_problems(source: str, texts: Sequence[str]) -> Iterator[Problem]:
    empty = {row for row, text in enumerate(texts) if not any(map(str.isalnum, text))}
    yield from _problem(source, "keyword", "has no letter or digit; it cannot be a word, remove it", sorted(empty))
    first: dict[str, int] = {}
    again = [row for row, text in enumerate(texts) if first.setdefault(text, row) != row and row not in empty]
    if again:
        twice = texts[again[0]]
        reason = f"stands there twice, {twice!r} first in row {first[twice]}; a word has one type, keep one of them"
        yield from _problem(source, "keyword", reason, again)


def _weight_problems(source: str, keywords: Sequence[Keyword]) -> Iterator[Problem]:
    bad = [row for row, keyword in enumerate(keywords) if not 0 <= keyword.weight < math.inf]
    yield from _problem(source, "weight", "is negative or not finite", bad)


def _type_problems(source: str, types: Sequence[str]) -> list[Problem]:
    known = [type_.value for type_ in AttributeType]
    unknown = [row for row, type_ in enumerate(types) if type_ not in known]
    if not unknown:
        return []
    reason = f"is no attribute type, {types[unknown[0]]!r} first; use one of {', '.join(known)}"
    return list(_problem(source, "type", reason, unknown))


def _problem(source: str, column: str, reason: str, rows: list[int]) -> Iterator[Problem]:
    if rows:
        yield Problem(
            file=source, column=column, reason=reason, severity="fatal", rows=len(rows), first_rows=tuple(rows[:5])
        )


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise DataError("\n".join(map(str, problems)))
