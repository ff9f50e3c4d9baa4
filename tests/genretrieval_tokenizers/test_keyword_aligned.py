from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_tokenizers.collisions import CollisionConfig, resolve
from genretrieval_tokenizers.family import load_codebooks, load_tokenizer
from genretrieval_tokenizers.keyword_aligned import (
    KeywordAligned,
    KeywordAlignedConfig,
    entropy,
    information_loss,
    merge_types,
)
from genretrieval_tokenizers.publish import append_encoded, open_published, publish_codes

T = AttributeType


# --- groups


def column(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_information_loss_by_hand() -> None:
    # Presence of two types in 8 items: X in 4, Y in the first 2 of these.
    x, y = column(1, 1, 1, 1, 0, 0, 0, 0), column(1, 1, 0, 0, 0, 0, 0, 0)
    assert entropy(x) == pytest.approx(1)
    assert entropy(y) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    # H(Y | X) = 1/2 (one bit where X is there); H(X | Y) = 3/4 H(1/3), as of the 6 items without Y 2 have X.
    third = np.log2(3) / 3 + 2 / 3 * np.log2(3 / 2)
    assert information_loss(x, y) == pytest.approx(0.5 * (0.5 + 0.75 * third))
    assert information_loss(x, x) == 0
    assert information_loss(x, 1 - x) == 0  # one says all of the other
    independent = column(1, 1, 0, 0, 1, 1, 0, 0)
    assert information_loss(x, independent) == pytest.approx(1)


def test_types_are_merged_by_hand_up_to_the_knee() -> None:
    # Color and Pattern: hardly ever there. Entity and Brand: always there, and each says nothing of the other.
    entity = np.tile([1, 2, 3, 4], 16)
    brand = np.repeat([5, 6, 7, 8], 16)
    color, pattern = np.zeros(64, np.int64), np.zeros(64, np.int64)
    color[:2], pattern[2:4] = 9, 10
    words = np.column_stack([entity, brand, color, pattern])
    order = np.tile([0, 1, 2, 3], (64, 1))
    groups = merge_types(words, order, [T.ENTITY, T.BRAND, T.COLOR, T.PATTERN])
    assert groups == ((T.ENTITY,), (T.BRAND,), (T.COLOR, T.PATTERN))


def test_types_that_never_occur_join_the_group_with_the_most_room() -> None:
    words = np.column_stack([np.zeros(8, np.int64), np.arange(1, 9), column(0, 0, 0, 0, 0, 0, 0, 9)])
    groups = merge_types(words, np.zeros_like(words), [T.SEASON, T.ENTITY, T.COLOR])
    assert groups == ((T.ENTITY,), (T.SEASON, T.COLOR))


def test_one_type_is_one_group() -> None:
    words = np.array([[1], [2]])
    assert merge_types(words, np.zeros_like(words), [T.BRAND]) == ((T.BRAND,),)


# --- slots


def shop(n_items: int = 200, seed: int = 0) -> tuple[NDArray[np.float32], list[tuple[str, ...]], KeywordDictionary]:
    """Items of 4 products and 12 brands, two of three with a colour; vectors that say the same, and a little more."""
    rng = np.random.default_rng(seed)
    product, brand, color = rng.integers(4, size=n_items), rng.integers(12, size=n_items), rng.integers(3, size=n_items)
    colors = ("", "red", "blue")
    fields = [
        (f"brand{b:02}", f"product{p}", f"brand{b:02} product{p} {colors[c]}")
        for p, b, c in zip(product, brand, color, strict=True)
    ]
    centres = rng.standard_normal((4 + 12 + 3, 8))
    x = centres[product] + centres[4 + brand] + centres[16 + color] + 0.1 * rng.standard_normal((n_items, 8))
    words = [Keyword(f"product{p}", T.ENTITY) for p in range(4)] + [Keyword(f"brand{b:02}", T.BRAND) for b in range(12)]
    words += [Keyword("red", T.COLOR), Keyword("blue", T.COLOR), Keyword("never seen", T.STYLE)]
    return x.astype(np.float32), fields, KeywordDictionary(tuple(words), "words")


def fitted(**config: Any) -> KeywordAligned:
    x, fields, dictionary = shop()
    return KeywordAligned.fit(x, fields, dictionary, KeywordAlignedConfig(**config))


def test_head_words_have_slots_of_their_own_and_the_others_share() -> None:
    kae = fitted(solo_slots=6, cluster_slots=3, reserved_slots=2)
    k = kae.keywords
    level = k.group_of(T.BRAND)
    slots = [k.encode(f"brand{b:02}")[level] for b in range(12)]
    n_items = [sum(fields[0] == f"brand{b:02}" for fields in shop()[1]) for b in range(12)]
    solo = np.argsort(np.negative(n_items), kind="stable")[:6]
    assert sorted(slots[b] for b in solo) == [1, 2, 3, 4, 5, 6]
    assert {slots[b] for b in range(12)} - {1, 2, 3, 4, 5, 6} == {7, 8, 9}
    assert k.sizes[level] == 1 + 6 + 3 + 2
    assert k.reserved == (2,) * k.n_groups == kae.reserved_slots


def test_a_small_shop_has_fewer_slots() -> None:
    few = fitted(items_per_slot=1000)
    assert all(size == 1 + 1 + 10 for size in few.keywords.sizes)  # all words of a group share one
    assert fitted().keywords.sizes[fitted().keywords.group_of(T.BRAND)] == 1 + 12 + 10


def test_content_levels_describe_what_words_leave_open() -> None:
    x, fields, _ = shop()
    words, content = fitted(), fitted(content_sizes=(16,))
    assert content.codebook_sizes == (*words.codebook_sizes, 16)
    assert content.reserved_slots == (*words.reserved_slots, 0)
    np.testing.assert_array_equal(content.encode(x, fields)[:, :-1], words.encode(x, fields))

    def error(kae: KeywordAligned) -> float:
        return float(np.square(x - kae.decode(kae.encode(x, fields))).sum() / np.square(x).sum())

    assert error(content) < error(words) < 0.2
    costs = content.last_level_costs(x, fields)
    np.testing.assert_array_equal(costs.argmin(axis=1), content.encode(x, fields)[:, -1])
    with pytest.raises(DataError, match=r"stands for a word cannot be moved.*content_sizes"):
        words.last_level_costs(x, fields)


def test_queries_and_items_are_encoded_alike_and_alone() -> None:
    x, fields, _ = shop()
    kae = fitted(content_sizes=(8,))
    codes = kae.encode(x, fields)
    rows = np.random.default_rng(1).permutation(len(x))[:20]
    np.testing.assert_array_equal(kae.encode(x[rows], [fields[row] for row in rows]), codes[rows])
    np.testing.assert_array_equal(kae.encode(x[:1], [(fields[0][-1],)])[0], codes[0])
    further = np.column_stack([codes, np.full(len(codes), 99, np.int32)])
    np.testing.assert_array_equal(kae.decode(further), kae.decode(codes))


def test_equal_input_and_seed_give_equal_codebooks(tmp_path: Path) -> None:
    for name in ("one", "other"):
        fitted(solo_slots=3, cluster_slots=3, content_sizes=(8,)).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_saved_encoding_is_the_same(tmp_path: Path) -> None:
    x, fields, _ = shop(seed=5)
    kae = fitted(solo_slots=3, cluster_slots=3, content_sizes=(8,))
    kae.save(tmp_path / "codebooks.safetensors")
    loaded = load_codebooks(tmp_path / "codebooks.safetensors")
    assert isinstance(loaded, KeywordAligned)
    assert (loaded.config, loaded.keywords, loaded.notes) == (kae.config, kae.keywords, kae.notes)
    np.testing.assert_array_equal(loaded.encode(x, fields), kae.encode(x, fields))
    np.testing.assert_array_equal(loaded.decode(loaded.encode(x, fields)), kae.decode(kae.encode(x, fields)))
    with pytest.raises(DataError, match="reads the words of items, and here are vectors alone"):
        load_tokenizer(tmp_path / "codebooks.safetensors")


KAE = fitted(solo_slots=3, cluster_slots=3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["product1", "brand03", "RED", "Blues", "never seen", "hat"]), max_size=5).map(" ".join)
    | st.text(),
    st.integers(0, 5),
)
def test_appending_moves_no_published_id_and_gives_no_reserved_code(
    tmp_path_factory: pytest.TempPathFactory, text: str, n_new: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    x, fields, _ = shop(30, seed=2)
    ids = [str(item) for item in range(30)]
    publish_codes(folder, KAE, CollisionConfig(), ids, KAE.encode(x, fields))
    new = [(text,)] * n_new
    codes = KAE.encode(np.zeros((n_new, KAE.dim), np.float32), new)
    before = open_published(folder).ids.codes
    after = append_encoded(folder, KAE, [f"new{row}" for row in range(n_new)], codes).ids.codes
    np.testing.assert_array_equal(after[:30], before)
    np.testing.assert_array_equal(open_published(folder).ids.codes, after)
    assert (after[:, :-1] < np.subtract(KAE.codebook_sizes, KAE.reserved_slots)).all()
    assert len(np.unique(after, axis=0)) == len(after)


def test_collisions_can_be_reassigned_on_a_content_level() -> None:
    x, fields, _ = shop(40)
    kae = KeywordAligned.fit(x, fields, shop()[2], KeywordAlignedConfig(content_sizes=(16,)))
    codes = kae.encode(x, fields)

    def costs(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return kae.last_level_costs(x[rows], [fields[row] for row in rows])

    resolved = resolve(codes, kae.codebook_sizes, CollisionConfig("reassign"), costs)
    assert len(np.unique(resolved.ids.codes, axis=0)) == 40


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"items_per_slot": 0}, "items_per_slot is 0, at least 1"),
        ({"solo_slots": -1, "reserved_slots": -1}, "solo_slots is -1, at least 0; reserved_slots is -1, at least 0"),
        ({"content_sizes": (8, 0)}, r"content_sizes \(8, 0\)"),
    ],
)
def test_settings_out_of_range_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        KeywordAlignedConfig(**config)


def test_a_shop_without_keywords_is_refused() -> None:
    x, fields, _ = shop()
    with pytest.raises(DataError, match=r"the 1 of words stand in none of 200 items.*keywords\.parquet"):
        KeywordAligned.fit(x, fields, KeywordDictionary((Keyword("hat", T.ENTITY),), "words"))
    with pytest.raises(DataError, match="199 texts for 200 vectors"):
        fitted().encode(x, fields[1:])
