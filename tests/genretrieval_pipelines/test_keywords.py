from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval.item_texts import item_fields
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_pipelines.embed.keywords import enhance, mine_keywords, mined_columns
from genretrieval_pipelines.embed.linear import Matrix

CATALOGUE = pl.DataFrame(
    {
        "item_id": list("abcdef"),
        "title": [
            "Rosa Creamy Lipstick XK-200, 3.4 Oz, Red",
            "Rosa Creamy Lipstick XK-200, 3.4 oz - Black",
            "Women's Velvet Scarf (3/4-Inch)",
            "Aqua garden hose for the garden",
            "新款 红色 连衣裙 500毫升",
            None,
        ],
        "brand": ["Rosa", "ROSA", None, "Aqua", "Unknown", " "],
        "categories": [["Beauty", "Lipsticks & Balms"], ["Beauty", "Lipsticks"], [], None, ["女装"], ["Garden"]],
        "main_color": ["Scarlet", None, None, "Teal", None, None],
        "occasions": [["Gala"], None, None, None, None, None],
        "occasion": [["Gala", "Ball"], ["gala"], None, None, None, None],
        "material": ["https://x/1", None, None, None, None, "y" * 41],
        "size": [1, 2, 3, 4, 5, 6],
        "color_id": ["c1", "c2", "c3", "c4", "c5", "c6"],
    }
)


def mined(items: pl.DataFrame = CATALOGUE, min_items: int = 2, max_keywords: int = 1000) -> dict[str, str]:
    found = mine_keywords(items, min_items=min_items, max_keywords=max_keywords)
    return {keyword.text: keyword.type.value for keyword in found.keywords}


# --- mining


def test_types_by_hand() -> None:
    assert mined() == {
        # words known everywhere, one title is enough
        "red": "Color",
        "black": "Color",
        "红色": "Color",
        "woman": "Audience",
        "velvet": "Material",
        "新款": "Marketing",
        # columns, one item is enough
        "rosa": "Brand",
        "aqua": "Brand",
        "lipstick": "Entity",
        "balm": "Entity",
        "女装": "Entity",
        "garden": "Entity",
        "scarlet": "Color",
        "teal": "Color",
        "gala": "Scene",
        "ball": "Scene",
        # titles, two are needed: "rosa creamy" would hide the brand, "3/4 inch" and "500 ml" stand in one
        "3.4 oz": "Specifications",
        "xk-200": "Model",
        "creamy": "Modifier",
    }


def test_what_one_title_says_is_enough_when_asked_for() -> None:
    found = mined(min_items=1)
    assert found["3/4 inch"] == found["500 ml"] == "Specifications"
    assert found["scarf"] == found["hose"] == "Modifier"
    assert found["连衣裙"] == "Modifier"
    assert "for the garden" not in found
    assert "hose for" not in found
    assert "the" not in found


def test_phrases_do_not_reach_across_punctuation() -> None:
    items = pl.DataFrame({"title": ["soft matte finish, long wear (travel-size)"] * 2})
    assert {text for text in mined(items) if " " in text} == {
        "soft matte",
        "matte finish",
        "soft matte finish",
        "long wear",
    }


def test_han_words_end_where_the_characters_beside_them_change() -> None:
    titles = ["显瘦连衣裙", "连衣裙加厚", "宽松连衣裙", "红色连衣裙", "加厚外套", "宽松加厚"]
    found = mined(pl.DataFrame({"title": titles}))
    # 连衣 always goes on with 裙; 红色 is known, and what holds it would hide it; 显瘦 stands in one title.
    assert found == {"红色": "Color", "连衣裙": "Modifier", "加厚": "Modifier", "宽松": "Modifier"}


def test_a_brand_in_two_scripts_is_two_words() -> None:
    items = pl.DataFrame({"title": ["a", "b"], "brand": ["香奈儿/Chanel", "其他/other"]})
    assert mined(items) == {"香奈儿": "Brand", "chanel": "Brand"}


def test_fields_begin_with_what_says_most_surely_what_an_item_is() -> None:
    fields = item_fields(CATALOGUE.select("item_id", "title", "brand", "categories"))
    assert fields[0][:3] == ("Rosa", "Lipsticks & Balms", "Rosa Creamy Lipstick XK-200, 3.4 Oz, Red")
    assert fields[0][3].endswith("Rosa. Beauty Lipsticks & Balms")
    assert fields[5] == (" ", "Garden", "", "Garden")
    assert item_fields(pl.DataFrame({"item_id": ["a"], "title": ["Hat"]})) == [("Hat", "Hat")]


def test_weight_is_the_share_of_items() -> None:
    weights = {keyword.text: keyword.weight for keyword in mine_keywords(CATALOGUE, min_items=2).keywords}
    assert weights["rosa"] == 2 / 6
    assert weights["gala"] == 2 / 6  # an item that lists it twice counts once
    assert weights["红色"] == 1 / 6


def test_the_most_frequent_stay_and_row_order_makes_no_difference() -> None:
    everything = mine_keywords(CATALOGUE, min_items=2).keywords
    assert mine_keywords(CATALOGUE.reverse(), min_items=2).keywords == everything
    assert mine_keywords(CATALOGUE, min_items=2, max_keywords=3).keywords == everything[:3]
    assert [keyword.weight for keyword in everything] == sorted((k.weight for k in everything), reverse=True)


def test_of_many_titles_some_are_read() -> None:
    items = pl.DataFrame({"title": ["alpha", "beta", "gamma", "delta", "omega"]})
    found = mine_keywords(items, min_items=1, max_titles=3).keywords
    assert [keyword.text for keyword in found] == ["alpha", "gamma", "omega"]


def test_a_catalogue_without_words_has_no_keywords() -> None:
    assert len(mine_keywords(pl.DataFrame({"item_id": ["a"], "price": [1.0]}))) == 0
    assert len(mine_keywords(CATALOGUE[:0])) == 0


@given(st.lists(st.text(), min_size=1, max_size=6))
def test_any_text_can_be_mined(titles: list[str]) -> None:
    items = pl.DataFrame({"title": titles, "brand": titles, "categories": [[title] for title in titles]})
    found = mine_keywords(items, min_items=1)
    found.match_all(titles)


@pytest.mark.parametrize("setting", ["min_items", "max_keywords", "max_titles"])
def test_settings_below_one_are_refused(setting: str) -> None:
    with pytest.raises(DataError, match=f"{setting} 0"):
        mine_keywords(CATALOGUE, **{setting: 0})


# --- enhancement

VECTORS = {"red": [1.0, 0.0], "hose": [0.0, 1.0]}
DICTIONARY = KeywordDictionary(tuple(Keyword(text, AttributeType.MODIFIER) for text in (*VECTORS, "unused")))


def embed(texts: Sequence[str]) -> Matrix:
    return np.array([VECTORS[text] for text in texts], np.float32)


def test_enhancement_by_hand() -> None:
    x = np.array([[0, 1], [0, 1], [0.6, 0.8], [0, 0]], np.float32)
    out = enhance(x, ["Red", "red hose, red", "green", "hose"], DICTIONARY, embed)
    # (0, 1)/2 + (1, 0)/2 is (1/2, 1/2), to length 1 (0.7071, 0.7071).
    np.testing.assert_allclose(out[0], [0.70710678, 0.70710678], rtol=1e-6)
    # Two keywords, "red" once: their mean is (1/2, 1/2), so (1/4, 3/4) of length sqrt(10)/4.
    np.testing.assert_allclose(out[1], [0.31622777, 0.94868330], rtol=1e-6)
    np.testing.assert_array_equal(out[2], x[2])
    np.testing.assert_allclose(out[3], [0, 1])
    assert out.dtype == np.float32


def test_texts_without_keywords_need_no_embedder() -> None:
    def never(texts: Sequence[str]) -> Matrix:
        raise AssertionError

    x = np.array([[0.6, 0.8]], np.float32)
    np.testing.assert_array_equal(enhance(x, ["green"], DICTIONARY, never), x)
    np.testing.assert_array_equal(enhance(x, ["red"], KeywordDictionary(), never), x)


def test_matches_of_one_text_at_a_time_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_at_once(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(KeywordDictionary, "match_all", all_at_once)
    x = np.array([[0, 1]], np.float32)
    np.testing.assert_allclose(enhance(x, ["hose"], DICTIONARY, embed), [[0, 1]])


def test_mining_reads_the_columns_that_it_names() -> None:
    read = CATALOGUE.select(mined_columns(CATALOGUE))
    assert set(CATALOGUE.columns) - set(read.columns) == {"item_id", "occasions", "size", "color_id"}
    assert mine_keywords(read, min_items=2) == mine_keywords(CATALOGUE, min_items=2)


def test_a_text_has_one_vector_whatever_stands_beside_it() -> None:
    x = np.array([[0, 1], [1, 0]], np.float32)
    together = enhance(x, ["red", "hose"], DICTIONARY, embed)
    alone = [enhance(x[i : i + 1], [text], DICTIONARY, embed)[0] for i, text in enumerate(["red", "hose"])]
    np.testing.assert_array_equal(together, alone)
