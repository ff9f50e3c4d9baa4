from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from genretrieval.errors import DataError
from genretrieval_tokenizers.rq_kmeans import ParentCodebooks, RqKMeans, RqKMeansConfig, prices_by_auction

LastLevel = Literal["plain", "balanced", "per_parent"]
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


LAST_LEVELS = pytest.mark.parametrize("last_level", ["plain", "balanced", "per_parent"])


@LAST_LEVELS
@pytest.mark.parametrize("normalize", [False, True])
def test_encode_picks_the_cheapest_code(last_level: LastLevel, normalize: bool) -> None:
    tokenizer = RqKMeans.fit(vectors(), replace(SMALL, last_level=last_level, normalize_residuals=normalize))
    x = vectors(200, seed=1)
    costs = tokenizer.last_level_costs(x)
    assert costs.shape == (200, tokenizer.codebook_sizes[-1])
    assert np.array_equal(costs.argmin(axis=1), tokenizer.encode(x)[:, -1])


@LAST_LEVELS
def test_row_order_changes_no_code(last_level: LastLevel) -> None:
    tokenizer = RqKMeans.fit(vectors(), replace(SMALL, last_level=last_level))
    x = vectors(500, seed=2)
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(tokenizer.encode(x[order]), tokenizer.encode(x)[order])
    assert np.array_equal(tokenizer.last_level_costs(x[order]), tokenizer.last_level_costs(x)[order])


def test_prices_by_hand() -> None:
    # All four rows like code 0, by leads of 1, 2, 3 and 4. Two may stay: the price lies between the leads 2 and 3.
    costs = np.array([[0, 3.0], [0, 1], [0, 4], [0, 2]])
    assert prices_by_auction(costs, 2).tolist() == [2.5, 0]
    assert prices_by_auction(costs, 4).tolist() == [0, 0]


def test_a_raised_price_drives_rows_on_to_a_third_code() -> None:
    # Code 0 sends the row of lead 1 to code 1, which then is overfull itself, and sends it on to code 2.
    costs = np.array([[0.0, 1, 9], [0, 5, 9], [9, 0, 2]])
    prices = prices_by_auction(costs, 1)
    assert sorted((costs + prices).argmin(axis=1).tolist()) == [0, 1, 2]


def test_equal_rows_stay_together_whatever_the_price() -> None:
    costs = np.array([[0.0, 1]] * 3 + [[0, 2]])
    loads = np.bincount((costs + prices_by_auction(costs, 2)).argmin(axis=1))
    assert loads.max() == 3  # 4 without prices


def test_a_balanced_last_level_holds_what_it_may() -> None:
    # A heavy cluster, which k-means gives one code or few; an even share is 400 / 8 = 50, the capacity 1.1 times that.
    x = np.concatenate([0.05 * vectors(200), vectors(200, seed=1)]) + 5
    config = RqKMeansConfig(codebook_sizes=(2, 8), iterations=5)
    heaviest = {
        last_level: np.bincount(RqKMeans.fit(x, replace(config, last_level=last_level)).encode(x)[:, 1]).max()
        for last_level in ("plain", "balanced")
    }
    assert heaviest["plain"] > 60
    assert heaviest["balanced"] <= 55
    tokenizer = RqKMeans.fit(x, replace(config, last_level="balanced", capacity_slack=1.5))
    assert tokenizer.largest_load is not None
    assert tokenizer.largest_load <= 75
    assert f"the fullest code of the last level holds {tokenizer.largest_load} items" in tokenizer.notes[-1]


def per_parent_by_hand() -> RqKMeans:
    """Level 0 has (0, 0), (10, 0) and (0, 10); the first two were met in fitting, with two codes and with one."""
    parents = ParentCodebooks(
        keys_P=np.array([0, 1]),
        starts_Q=np.array([0, 2, 3, 6]),
        centroids_CD=np.array([[0, 1], [0, -1], [2, 0], [1, 0], [0, 3], [-1, 0]], np.float32),
    )
    config = RqKMeansConfig(codebook_sizes=(3, 3), normalize_residuals=False, last_level="per_parent")
    codebook = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    return RqKMeans(config, (codebook,), np.ones(1, np.float32), parents=parents)


def test_a_last_level_per_parent_by_hand() -> None:
    tokenizer = per_parent_by_hand()
    x = np.array([[1, -2], [9, 1], [0, 12]], np.float32)
    codes = tokenizer.encode(x)
    assert codes.tolist() == [[0, 1], [1, 0], [2, 1]]  # the last parent is new: the codes of all items together
    assert tokenizer.decode(codes).tolist() == [[0, -1], [12, 0], [0, 13]]
    # Residuals (1, -2), (-1, 1) and (0, 2).
    assert tokenizer.last_level_costs(x).tolist() == [[10, 2, np.inf], [10, np.inf, np.inf], [5, 1, 5]]
    assert tokenizer.codebook_sizes == (3, 3)
    assert tokenizer.notes == ("2 parents have 3 codes between them, 1 a single one",)


def test_a_code_that_a_parent_has_not_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 rows .* first row 1 with codes \(1, 1\)"):
        per_parent_by_hand().decode(np.array([[0, 1], [1, 1]], np.int32))


def test_parents_of_few_items_give_each_its_own_centroid() -> None:
    x = vectors(60)
    tokenizer = RqKMeans.fit(x, RqKMeansConfig(codebook_sizes=(8, 64), iterations=3, last_level="per_parent"))
    codes = tokenizer.encode(x)
    assert len(np.unique(codes, axis=0)) == 60
    assert tokenizer.parents is not None
    assert tokenizer.parents.sizes.tolist() == [*np.bincount(codes[:, 0]).tolist(), 60]


@LAST_LEVELS
@pytest.mark.parametrize("normalize", [False, True])
def test_a_saved_tokenizer_encodes_to_the_same_codes(tmp_path: Path, normalize: bool, last_level: LastLevel) -> None:
    tokenizer = RqKMeans.fit(vectors(), replace(SMALL, normalize_residuals=normalize, last_level=last_level))
    tokenizer.save(tmp_path / "codebooks.safetensors")
    loaded = RqKMeans.load(tmp_path / "codebooks.safetensors")
    x = vectors(500, seed=3)
    assert loaded.config == tokenizer.config
    assert loaded.notes == tokenizer.notes
    assert np.array_equal(loaded.encode(x), tokenizer.encode(x))
    assert np.array_equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert np.array_equal(loaded.last_level_costs(x), tokenizer.last_level_costs(x))
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
    with pytest.raises(DataError, match="no tokenizer'"):
        RqKMeans.load(other)


@LAST_LEVELS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [1, 2, 20, 257])
def test_shops_smaller_than_the_codebooks_pass(n: int, normalize: bool, last_level: LastLevel) -> None:
    x = vectors(n, dim=16)
    config = RqKMeansConfig(iterations=3, normalize_residuals=normalize, last_level=last_level)
    tokenizer = RqKMeans.fit(x, config)
    codes = tokenizer.encode(x)
    assert len(np.unique(codes, axis=0)) == n
    assert tokenizer.codebook_sizes[0] == min(n, 256)
    assert tokenizer.notes
    np.testing.assert_allclose(tokenizer.decode(codes), x, atol=1e-5 if n < 256 else 9)


@LAST_LEVELS
def test_items_that_are_all_alike_have_one_code_a_level(last_level: LastLevel) -> None:
    for x in (np.ones((5, 3), np.float32), np.zeros((5, 3), np.float32)):
        tokenizer = RqKMeans.fit(x, RqKMeansConfig(last_level=last_level))
        assert tokenizer.codebook_sizes == (1, 1, 1)
        assert tokenizer.encode(x).tolist() == [[0, 0, 0]] * 5


def test_more_codes_than_distinct_vectors_is_noted() -> None:
    tokenizer = RqKMeans.fit(np.repeat(vectors(3), 5, axis=0), SMALL)
    assert tokenizer.notes[0] == ("level 0 has 3 codes instead of 8: there are no more distinct vectors")


@LAST_LEVELS
def test_no_vectors_have_no_codes(last_level: LastLevel) -> None:
    tokenizer = RqKMeans.fit(vectors(), replace(SMALL, last_level=last_level))
    assert tokenizer.encode(vectors(0)).shape == (0, 2)
    assert tokenizer.decode(np.zeros((0, 2), np.int32)).shape == (0, 6)
    assert tokenizer.last_level_costs(vectors(0)).shape == (0, tokenizer.codebook_sizes[-1])


@pytest.mark.parametrize(
    "setting",
    [
        {"codebook_sizes": ()},
        {"codebook_sizes": (4, 0)},
        {"iterations": 0},
        {"max_points_per_centroid": 0},
        {"last_level": "even"},
        {"last_level": "per_parent", "codebook_sizes": (4,)},
        {"last_level": "balanced", "capacity_slack": 0.9},
        {"last_level": "balanced", "capacity_slack": float("nan")},
        {"capacity_slack": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(DataError):
        RqKMeansConfig(**setting)  # type: ignore[arg-type]


@LAST_LEVELS
@pytest.mark.parametrize("normalize", [False, True])
def test_fitting_prints_nothing(capfd: pytest.CaptureFixture[str], normalize: bool, last_level: LastLevel) -> None:
    RqKMeans.fit(vectors(30), replace(SMALL, normalize_residuals=normalize, last_level=last_level))
    assert capfd.readouterr() == ("", "")
