from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import save_file

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig, nearest_codes, number_duplicates

SMALL = RqKMeansConfig(codebook_sizes=(8, 8), iterations=5)


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


TOKENIZER = RqKMeans.fit(vectors(), SMALL)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives faiss its thread count back."""
    before = faiss.omp_get_max_threads()
    yield
    faiss.omp_set_num_threads(before)


@given(
    x=hnp.arrays(np.float32, (5, 3), elements=st.integers(-9, 9).map(float)),
    codebook=hnp.arrays(np.float32, (4, 3), elements=st.integers(-9, 9).map(float)),
)
def test_nearest_code_agrees_with_the_definition(x: np.ndarray, codebook: np.ndarray) -> None:
    oracle = [min(range(4), key=lambda k: (((v - codebook[k]) ** 2).sum(), k)) for v in x]
    assert nearest_codes(x, codebook).tolist() == oracle


def test_a_tie_goes_to_the_lower_code() -> None:
    codebook = np.array([[9, 9], [1, 0], [1, 0], [-1, 0]], np.float32)
    assert nearest_codes(np.array([[0, 7], [3, 0]], np.float32), codebook).tolist() == [1, 1]


def test_codes_of_two_levels_by_hand() -> None:
    codebooks = (np.array([[0, 0], [10, 0]], np.float32), np.array([[0, 1], [0, -1]], np.float32))
    config = RqKMeansConfig(codebook_sizes=(2, 2), normalize_residuals=False)
    tokenizer = RqKMeans(config, codebooks, np.ones(2, np.float32))
    codes = tokenizer.encode(np.array([[1, 2], [9, 1], [11, -3]], np.float32))
    assert codes.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert tokenizer.decode(codes).tolist() == [[0, 1], [10, 1], [10, -1]]


def test_normalised_residuals_by_hand() -> None:
    # What level 0 leaves over is (0, 4) and (0, -2): directions (0, 1) and (0, -1), mean length 3.
    codebooks = (np.array([[0, 0], [10, 0]], np.float32), np.array([[0, 1], [0, -1]], np.float32))
    tokenizer = RqKMeans(RqKMeansConfig(codebook_sizes=(2, 2)), codebooks, np.array([3, 0], np.float32))
    codes = tokenizer.encode(np.array([[0, 4], [10, -2]], np.float32))
    assert codes.tolist() == [[0, 0], [1, 1]]
    assert tokenizer.decode(codes).tolist() == [[0, 3], [10, -3]]


@pytest.mark.parametrize("normalize", [False, True])
def test_each_level_lowers_the_error(normalize: bool) -> None:
    x = vectors(600)
    errors = []
    for levels in (1, 2, 3):
        config = RqKMeansConfig(codebook_sizes=(8,) * levels, normalize_residuals=normalize)
        tokenizer = RqKMeans.fit(x, config)
        errors.append(float(((x - tokenizer.decode(tokenizer.encode(x))) ** 2).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_normalised_residuals_spread_the_codes_of_wide_vectors() -> None:
    """The fault the default is against: k-means on wide residuals leaves one code with most of the items."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 200))[rng.integers(0, 20, 1500)] + rng.standard_normal((1500, 200)) * rng.gamma(
        0.5, 1, (1500, 1)
    )
    config = RqKMeansConfig(codebook_sizes=(32, 32))
    heaviest = [
        np.bincount(RqKMeans.fit(x, replace(config, normalize_residuals=on)).encode(x)[:, 1]).max()
        for on in (False, True)
    ]
    assert heaviest[1] < heaviest[0] / 2


def test_fitting_twice_gives_the_same_codebooks() -> None:
    first, second = RqKMeans.fit(vectors(), SMALL), RqKMeans.fit(vectors(), SMALL)
    for a, b in zip(first.codebooks, second.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)
    other = RqKMeans.fit(vectors(), replace(SMALL, seed=1))
    assert not np.array_equal(first.codebooks[0], other.codebooks[0])


@pytest.mark.usefixtures("threads")
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 4999), min_size=1, max_size=40), n_threads=st.sampled_from([1, 2]))
def test_a_vector_gets_the_same_codes_whatever_stands_beside_it(rows: list[int], n_threads: int) -> None:
    faiss.omp_set_num_threads(n_threads)
    x = vectors(5000)  # more than a block
    assert np.array_equal(TOKENIZER.encode(x)[rows], TOKENIZER.encode(x[rows]))


def test_dedup_numbers_items_of_a_tuple_in_row_order() -> None:
    x = np.repeat(vectors(4), [1, 3, 1, 2], axis=0)
    ids = RqKMeans.fit(x, SMALL).assign(x)
    assert ids.codes[:, -1].tolist() == [0, 0, 1, 2, 0, 0, 1]
    assert ids.codebook_sizes[-1] == 3 + SMALL.dedup_headroom
    assert len(np.unique(ids.codes, axis=0)) == 7


def test_without_collisions_or_headroom_the_dedup_level_has_one_code() -> None:
    x = vectors(8)
    ids = RqKMeans.fit(x, replace(SMALL, dedup_headroom=0)).assign(x)
    assert ids.codebook_sizes[-1] == 1


def test_without_a_dedup_level_items_share_ids() -> None:
    x = np.repeat(vectors(4), 2, axis=0)
    tokenizer = RqKMeans.fit(x, replace(SMALL, dedup_level=False))
    ids = tokenizer.assign(x)
    assert ids.n_levels == 2
    assert np.array_equal(ids.codes[0], ids.codes[1])
    assert tokenizer.append(ids, x[:3]).n_items == 11


@given(
    hnp.arrays(np.int32, st.tuples(st.integers(0, 12), st.just(2)), elements=st.integers(0, 1)),
    st.integers(0, 12),
)
def test_numbering_in_two_steps_is_numbering_at_once(codes: np.ndarray, split: int) -> None:
    split = min(split, len(codes))
    at_once = number_duplicates(codes)
    seen: dict[tuple[int, ...], int] = {}
    for row, number in zip(codes.tolist(), at_once.tolist(), strict=True):
        assert number == seen.get(tuple(row), 0)
        seen[tuple(row)] = number + 1
    published = np.column_stack([codes[:split], at_once[:split]])
    assert number_duplicates(codes[split:], published).tolist() == at_once[split:].tolist()


def test_the_number_of_a_deleted_item_is_not_given_again() -> None:
    published = np.array([[5, 0], [5, 2]], np.int32)  # (5, 1) was deleted
    assert number_duplicates(np.array([[5], [6]], np.int32), published).tolist() == [3, 0]


def test_published_ids_never_move() -> None:
    ids = TOKENIZER.assign(vectors())
    extended = TOKENIZER.append(ids, vectors(50, seed=1))
    assert np.array_equal(extended.codes[:300], ids.codes)
    assert extended.codebook_sizes == ids.codebook_sizes
    assert len(np.unique(extended.codes, axis=0)) == 350


def test_appending_one_by_one_is_appending_at_once() -> None:
    ids = TOKENIZER.assign(vectors())
    new = vectors(6, seed=1)
    step = ids
    for row in range(6):
        step = TOKENIZER.append(step, new[row : row + 1])
    assert np.array_equal(step.codes, TOKENIZER.append(ids, new).codes)


def test_a_full_dedup_level_is_an_error_that_says_what_it_costs() -> None:
    x = vectors(20)
    tokenizer = RqKMeans.fit(x, replace(SMALL, dedup_headroom=1))
    ids = tokenizer.assign(x)
    with pytest.raises(DataError, match=r"larger dedup_headroom.*newly trained generator"):
        tokenizer.append(ids, np.repeat(x[:1], ids.codebook_sizes[-1] + 1, axis=0))


def test_ids_of_another_tokenizer_are_refused() -> None:
    foreign = SemanticIds(np.zeros((1, 3), np.int32), (8, 9, 17))
    with pytest.raises(DataError, match="not from it"):
        TOKENIZER.append(foreign, vectors(1))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_saved_tokenizer_encodes_to_the_same_ids(tmp_path: Path, normalize: bool) -> None:
    tokenizer = RqKMeans.fit(vectors(), replace(SMALL, normalize_residuals=normalize))
    tokenizer.save(tmp_path / "codebooks.safetensors")
    loaded = RqKMeans.load(tmp_path / "codebooks.safetensors")
    x = vectors(500, seed=3)
    assert loaded.config == tokenizer.config
    assert np.array_equal(loaded.assign(x).codes, tokenizer.assign(x).codes)
    assert np.array_equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert [file.name for file in tmp_path.iterdir()] == ["codebooks.safetensors"]


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        RqKMeans.load(tmp_path / "missing.safetensors")
    whole = tmp_path / "whole.safetensors"
    TOKENIZER.save(whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        RqKMeans.load(cut)
    other = tmp_path / "other.safetensors"
    save_file({"codebook.0": np.zeros((1, 1), np.float32)}, other)
    with pytest.raises(DataError, match="no tokenizer"):
        RqKMeans.load(other)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [1, 2, 20, 257])
def test_shops_smaller_than_the_codebooks_pass(n: int, normalize: bool) -> None:
    x = vectors(n, dim=16)
    tokenizer = RqKMeans.fit(x, RqKMeansConfig(iterations=3, normalize_residuals=normalize))
    ids = tokenizer.assign(x)
    assert len(np.unique(ids.codes, axis=0)) == n
    assert ids.codebook_sizes[0] == min(n, 256)
    assert bool(tokenizer.notes) == (n < 256 or ids.codebook_sizes[1] < 256)
    np.testing.assert_allclose(tokenizer.decode(ids.codes), x, atol=1e-5 if n < 256 else 9)


def test_items_that_are_all_alike_differ_in_the_dedup_level_alone() -> None:
    for x in (np.ones((5, 3), np.float32), np.zeros((5, 3), np.float32)):
        ids = RqKMeans.fit(x).assign(x)
        assert ids.codebook_sizes[:3] == (1, 1, 1)
        assert ids.codes[:, -1].tolist() == [0, 1, 2, 3, 4]


def test_more_codes_than_distinct_vectors_is_noted() -> None:
    tokenizer = RqKMeans.fit(np.repeat(vectors(3), 5, axis=0), SMALL)
    assert tokenizer.notes[0] == ("level 0 has 3 codes instead of 8: there are no more distinct vectors")


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((0, 4), np.float32), "shape"),
        (np.zeros((4, 0), np.float32), "shape"),
        (np.zeros(4, np.float32), "shape"),
        (np.array([[0, 1], [np.nan, 1]], np.float32), "of 1 items hold NaN.*row 1"),
        (np.array([[0, np.inf]], np.float32), "infinities"),
    ],
)
def test_bad_vectors_are_refused(x: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match):
        RqKMeans.fit(x, SMALL)


def test_vectors_of_other_dimensions_are_refused() -> None:
    with pytest.raises(DataError, match="5 dimensions, the codebooks 6"):
        TOKENIZER.encode(vectors(3, dim=5))


def test_no_new_items_append_nothing() -> None:
    ids = TOKENIZER.assign(vectors())
    assert np.array_equal(TOKENIZER.append(ids, vectors(0)).codes, ids.codes)


@pytest.mark.parametrize(
    "setting",
    [
        {"codebook_sizes": ()},
        {"codebook_sizes": (4, 0)},
        {"iterations": 0},
        {"max_points_per_centroid": 0},
        {"dedup_headroom": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(DataError):
        RqKMeansConfig(**setting)  # type: ignore[arg-type]


def test_fitting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    RqKMeans.fit(vectors(30), SMALL)
    assert capfd.readouterr() == ("", "")
