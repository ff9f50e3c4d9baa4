from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval.keyword_codebook import KeywordCodebook, by_importance
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary

T = AttributeType
WORDS = (
    Keyword("lipstick", T.ENTITY, 0.2),
    Keyword("balm", T.ENTITY, 0.1),
    Keyword("crème", T.ENTITY, 0.1),
    Keyword("Rosa", T.BRAND, 0.5),
    Keyword("50 ml", T.SPECIFICATIONS, 0.3),
    Keyword("口红", T.ENTITY, 0.2),
    Keyword("red", T.COLOR, 0.4),
)
CODEBOOK = KeywordCodebook(
    KeywordDictionary(WORDS),
    groups=((T.ENTITY,), (T.BRAND, T.COLOR), (T.SPECIFICATIONS, T.SEASON)),
    slots=np.array([1, 2, 2, 1, 1, 3, 2], np.int32),
    sizes=(6, 5, 2),
    reserved=(2, 2, 0),
)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("", [0, 0, 0]),
        ("a hat", [0, 0, 0]),
        ("red lipstick", [1, 2, 0]),
        ("Rosa lipstick, red", [1, 1, 0]),  # of one group the heavier word
        ("lipstick and balm", [1, 0, 0]),
        ("balm 口红 lipstick", [3, 0, 0]),  # of equal weights the first
        ("creme", [2, 0, 0]),
        ("大瓶口红50ML装", [3, 0, 1]),
    ],
)
def test_slots_by_hand(text: str, slots: list[int]) -> None:
    encoded = CODEBOOK.encode(text)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == slots


@pytest.mark.parametrize(
    "text", ["ROSA LIPSTICKS", "ｒｏｓａ　ｌｉｐｓｔｉｃｋ", "Rosa's  lipstick", "rósa lipstick", "lipsticks by rosa"]
)
def test_case_width_accents_plurals_and_order_make_no_difference(text: str) -> None:
    np.testing.assert_array_equal(CODEBOOK.encode(text), CODEBOOK.encode("Rosa lipstick"))


@pytest.mark.parametrize("text", ["50ml", "50 ML", "50-ml", "50 Milliliters", "50毫升"])
def test_units_make_no_difference(text: str) -> None:
    assert CODEBOOK.encode(text).tolist() == [0, 0, 1]


def test_an_earlier_text_decides() -> None:
    assert CODEBOOK.encode_fields(("balm", "Rosa lipstick", "red")).tolist() == [2, 1, 0]
    assert CODEBOOK.encode_fields(()).tolist() == [0, 0, 0]
    assert by_importance(CODEBOOK.dictionary, ("balm", "red lipstick balm")) == [1, 6, 0]


def test_codes_can_be_read() -> None:
    assert [CODEBOOK.words(0, code) for code in range(6)] == [
        "",
        "lipstick",
        "balm and alike",
        "口红",
        "(reserved 1)",
        "(reserved 2)",
    ]
    assert (CODEBOOK.n_groups, CODEBOOK.group_of(T.COLOR), CODEBOOK.group_of(T.SEASON)) == (3, 1, 2)
    with pytest.raises(DataError, match=r"holds Style; it has Entity, Brand, Color, Specifications, Season"):
        CODEBOOK.group_of(T.STYLE)


TEXTS = st.lists(st.sampled_from([*(word.text for word in WORDS), "hat", "12", "装"]), max_size=6)


@given(TEXTS, st.randoms(use_true_random=False))
def test_what_weighs_differently_may_stand_anywhere(words: list[str], random: Any) -> None:
    distinct = replace(
        CODEBOOK,
        dictionary=KeywordDictionary(tuple(replace(word, weight=1.0 + row) for row, word in enumerate(WORDS))),
    )
    shuffled = random.sample(words, len(words))
    np.testing.assert_array_equal(distinct.encode(" , ".join(words)), distinct.encode(" , ".join(shuffled)))


@given(st.text() | TEXTS.map(" ".join))
def test_no_text_has_a_reserved_code_and_case_makes_no_difference(text: str) -> None:
    slots = CODEBOOK.encode(text)
    assert (slots >= 0).all()
    assert (slots < np.subtract(CODEBOOK.sizes, CODEBOOK.reserved)).all()
    np.testing.assert_array_equal(slots, CODEBOOK.encode(text.casefold()))


@given(TEXTS)
def test_what_is_saved_encodes_the_same(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "keywords.parquet"
    if not path.exists():
        CODEBOOK.save(path)
    loaded = KeywordCodebook.load(path)
    assert loaded == CODEBOOK
    np.testing.assert_array_equal(loaded.encode(" ".join(words)), CODEBOOK.encode(" ".join(words)))
    assert KeywordDictionary.load(path) == CODEBOOK.dictionary


def test_an_empty_dictionary_has_empty_slots_and_reserved_ones(tmp_path: Path) -> None:
    empty = KeywordCodebook(KeywordDictionary(), ((T.BRAND,),), np.zeros(0, np.int32), (3,), (2,))
    empty.save(tmp_path / "k.parquet")
    assert KeywordCodebook.load(tmp_path / "k.parquet") == empty
    assert empty.encode("red").tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (6, 5)}, "3 groups, 2 sizes"),
        ({"slots": np.ones(6, np.int32)}, "7 keywords and 6 slots"),
        ({"groups": ((T.ENTITY,), (T.BRAND, T.COLOR), (T.SPECIFICATIONS, T.BRAND))}, "type in two groups"),
        ({"groups": ((T.ENTITY,), (T.BRAND,), (T.SPECIFICATIONS,))}, "keywords of Color, which no group holds"),
        ({"slots": np.array([1, 2, 2, 1, 1, 4, 2], np.int32)}, r"'口红' with slot 4, where 1 to 3"),
        ({"slots": np.array([0, 2, 2, 1, 1, 3, 2], np.int32)}, r"'lipstick' with slot 0"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(CODEBOOK, **changes)


def test_a_file_without_slots_is_named(tmp_path: Path) -> None:
    CODEBOOK.dictionary.save(tmp_path / "k.parquet")
    with pytest.raises(DataError, match=r"k\.parquet is no keyword codebook"):
        KeywordCodebook.load(tmp_path / "k.parquet")
    pl.DataFrame({"keyword": ["a"], "type": ["Brand"]}).write_parquet(
        tmp_path / "k.parquet", metadata={"genretrieval": '{"format": "of the future"}'}
    )
    with pytest.raises(DataError, match="of the future"):
        KeywordCodebook.load(tmp_path / "k.parquet")
