from __future__ import annotations

import unicodedata
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary, normalise, without_words


def dictionary(*texts: str) -> KeywordDictionary:
    return KeywordDictionary(tuple(Keyword(text, AttributeType.MODIFIER) for text in texts))


def found(text: str, *keywords: str) -> list[str]:
    return [match.keyword.text for match in dictionary(*keywords).match(text)]


# --- matching


def test_a_match_says_where_it_stands() -> None:
    (match,) = dictionary("Lip Stick").match("Red  LIP stick!")
    assert match == (4, 13, Keyword("Lip Stick", AttributeType.MODIFIER), 0)
    assert normalise("Red  LIP stick!")[match.start : match.end] == "lip stick"


@pytest.mark.parametrize("text", ["CAFÉ", "cafe\u0301", "ｃａｆé", " Café\t", "cafe", "Cafés"])
def test_case_width_accents_and_plurals_make_no_difference(text: str) -> None:
    assert found(text, "café") == ["café"]


def test_folding_may_lengthen_a_text() -> None:
    assert found("Große Straße", "STRASSE") == ["STRASSE"]
    assert found("5㎏ Hanteln", "5kg") == ["5kg"]


@pytest.mark.parametrize("text", ["tired", "redden", "scared", "red2", "red_", "Żred"])
def test_a_keyword_is_not_found_inside_a_word(text: str) -> None:
    assert found(text, "red") == []


@pytest.mark.parametrize("text", ["red", "red-hot", "(red)", "red, blue", "non/red"])
def test_punctuation_ends_a_word(text: str) -> None:
    assert found(text, "red") == ["red"]


def test_decimals_are_one_word() -> None:
    assert found("1.7 oz", "7 oz") == []
    assert found("1,7 oz", "7 oz") == []
    assert found("No. 7 oz", "7 oz") == ["7 oz"]
    assert found("1.7 oz", "1.7 oz") == ["1.7 oz"]


def test_vowel_signs_belong_to_their_word() -> None:
    assert found("की", "क") == []
    assert found("लाल साड़ी", "साड़ी") == ["साड़ी"]


@pytest.mark.parametrize(
    ("text", "keyword"),
    [
        ("红色连衣裙", "连衣裙"),
        ("赤いワンピース", "ワンピース"),
        ("빨간 립스틱을", "립스틱"),
        ("ลิปสติกสีแดง", "สีแดง"),
        ("新款red裙", "red"),
    ],
)
def test_scripts_without_spaces_match_anywhere(text: str, keyword: str) -> None:
    assert found(text, keyword) == [keyword]


def test_latin_words_keep_their_ends_beside_han() -> None:
    assert found("新款redden裙", "red") == []


def test_a_term_inside_a_longer_match_is_dropped() -> None:
    keywords = ["lip", "red lipstick", "red", "lipstick"]
    assert found("red lipstick", *keywords) == ["red lipstick"]
    assert found("red lipstick in red", *keywords) == ["red lipstick", "red"]
    assert found("连衣裙", "裙", "连衣裙") == ["连衣裙"]


def test_a_term_inside_something_that_is_no_match_is_kept() -> None:
    # "red wine" would contain "red", but it ends inside of "winery".
    assert found("red winery", "red wine", "red") == ["red"]


def test_overlapping_matches_are_both_kept_from_left_to_right() -> None:
    assert found("red wine glass", "wine glass", "red wine") == ["red wine", "wine glass"]


def test_a_keyword_may_have_punctuation_of_its_own() -> None:
    assert found("L'Oréal Paris C++", "l'oréal", "c++") == ["l'oréal", "c++"]


def test_an_empty_dictionary_matches_nothing() -> None:
    assert KeywordDictionary().match_all(["red", ""]) == [[], []]


# --- against an oracle that looks at every span


def word_of_each_character(text: str) -> list[int]:
    """A number for each character, equal within a word; negative where characters stand alone."""
    words: list[int] = []
    for i, char in enumerate(text):
        decimal = char in ".," and i > 0 and text[i - 1].isdigit() and text[i + 1 : i + 2].isdigit()
        joined = decimal or (char.isalnum() and not "\u4e00" <= char <= "\u9fff")
        follows = bool(words) and words[-1] >= 0
        words.append((words[-1] if follows else i) if joined else -1)
    return words


def spans_by_brute_force(text: str, keywords: list[str]) -> list[tuple[int, int, str]]:
    words = word_of_each_character(text)
    cuts = {i for i in range(1, len(text)) if words[i] == words[i - 1] >= 0}
    spans = [
        (start, start + len(keyword), keyword)
        for keyword in keywords
        for start in range(len(text))
        if text.startswith(keyword, start) and not {start, start + len(keyword)} & cuts
    ]
    return sorted(
        span
        for span in spans
        if not any(other != span and other[0] <= span[0] <= span[1] <= other[1] for other in spans)
    )


TEXTS = st.text("ab1. 红色", max_size=12).map(normalise)
KEYWORDS = st.lists(st.text("ab1. 红色", max_size=4).map(normalise), unique=True).map(
    lambda texts: [text for text in texts if any(map(str.isalnum, text))]
)


@given(TEXTS, KEYWORDS)
def test_matches_are_those_of_the_oracle(text: str, keywords: list[str]) -> None:
    matches = [(match.start, match.end, match.keyword.text) for match in dictionary(*keywords).match(text)]
    assert matches == spans_by_brute_force(text, keywords)
    in_other_order = dictionary(*reversed(keywords)).match(text)
    assert matches == [(match.start, match.end, match.keyword.text) for match in in_other_order]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Crème Brûlée, Ångström, ά", "creme brulee, angstrom, α"),
        ("йод, が, पानी, 빨간", "йод, が, पानी, 빨간"),  # marks that make another letter or a syllable stay
        ("Women's Dresses & Boxes", "woman dress & box"),
        ("Kiehl’s ladies' batteries, brushes, hoodies, feet", "kiehl lady' battery, brush, hoodie, foot"),
        ("Paris glass lens bus Christmas series", "paris glass lens bus christmas series"),
        ("100ML, 3.4 Ounces, 1 fl. oz., 2-Inch", "100 ml, 3.4 oz, 1 fl oz., 2 inch"),
        ("2 x 3CM 12pcs 5㎏", "2 x 3 cm 12 pc 5 kg"),
        ("大瓶500毫升装 3克拉", "大瓶500 ml装 3克拉"),
        ("xk-200g 4th m&m ml", "xk-200g 4th m&m ml"),  # no number with a unit
    ],
)
def test_one_spelling_for_one_meaning(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text() | st.text("aeisy'’ 5xgml.-é克毫升oz"))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFKC", once)


# --- files and faults


def test_a_dictionary_is_read_as_it_was_written(tmp_path: Path) -> None:
    keywords = (Keyword("Red", AttributeType.COLOR, 0.25), Keyword("连衣裙", AttributeType.ENTITY))
    KeywordDictionary(keywords).save(tmp_path / "k.parquet")
    assert KeywordDictionary.load(tmp_path / "k.parquet").keywords == keywords
    assert [file.name for file in tmp_path.iterdir()] == ["k.parquet"]


def load(tmp_path: Path, **columns: list[object]) -> KeywordDictionary:
    pl.DataFrame(columns).write_parquet(tmp_path / "k.parquet")
    return KeywordDictionary.load(tmp_path / "k.parquet")


def test_a_weight_may_be_missing(tmp_path: Path) -> None:
    assert load(tmp_path, keyword=["red"], type=["Color"]).keywords[0].weight == 1
    assert load(tmp_path, keyword=["red"], type=["Color"], weight=[None]).keywords[0].weight == 1


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (
            {"keyword": ["a", "b", "c"], "type": ["Color", "Colour", None]},
            r"'Colour' first.*Entity.*2 rows, first 1, 2",
        ),
        ({"keyword": ["a", None, " ", "&"], "type": ["Color"] * 4}, r"no letter or digit.*3 rows, first 1, 2, 3"),
        ({"keyword": ["Red", "b", "ＲＥＤ"], "type": ["Color"] * 3}, r"twice, 'red' first in row 0.*1 row, first 2"),
        ({"keyword": ["a", "b"], "type": ["Color"] * 2, "weight": [1.0, -1.0]}, r"weight is negative.*1 row, first 1"),
        ({"keyword": ["a"], "type": ["Color"], "weight": [float("nan")]}, "not finite"),
        ({"keyword": ["a"], "type": ["Color"], "weight": ["much"]}, "weight a number"),
        ({"keyword": ["a"], "kind": ["Color"]}, "no column 'type'"),
    ],
)
def test_bad_dictionaries_are_refused(tmp_path: Path, columns: dict[str, list[object]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        load(tmp_path, **columns)


def test_all_faults_of_the_words_are_named_at_once() -> None:
    with pytest.raises(DataError, match=r"letter or digit.*\n.*twice"):
        dictionary("a", "!", "A")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "k.parquet").write_text("keyword,type")
    with pytest.raises(DataError, match=r"k\.parquet cannot be read"):
        KeywordDictionary.load(tmp_path / "k.parquet")
    with pytest.raises(DataError, match=r"none\.parquet cannot be read"):
        KeywordDictionary.load(tmp_path / "none.parquet")


def test_there_are_18_attribute_types() -> None:
    assert len(AttributeType) == 18


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("New Labubu  toys", ["labubu"], "New toys"),
        ("labubu", ["labubu"], ""),
        ("labubu and labubu-like", ["labubu"], "and - like"),
        ("jason natural soap", ["jason", "jason natural"], "soap"),
        ("红色拉布布玩具", ["拉布布"], "红色 玩具"),
        ("a relabubu", ["labubu"], "a relabubu"),
        ("Red Toys", [""], "Red Toys"),
        ("Jason Natural women's soaps", ["jason natural"], "women's soaps"),
    ],
)
def test_keywords_are_taken_out_as_whole_words(text: str, words: list[str], left: str) -> None:
    assert without_words(text, words) == left
