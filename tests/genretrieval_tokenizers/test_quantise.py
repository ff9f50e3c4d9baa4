from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from genretrieval_tokenizers import quantise
from genretrieval_tokenizers.quantise import ResidualEncoder, exact_codes, kmeans, nearest_codes


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def by_definition(encoder: ResidualEncoder, x_ND: NDArray[np.floating]) -> NDArray[np.int32]:
    """Level after level, in float64 throughout."""
    codes_NL = np.empty((len(x_ND), 0), np.int32)
    for level in encoder.levels:
        r_ND, _ = encoder.residuals(x_ND, codes_NL)
        codes_NL = np.column_stack([codes_NL, exact_codes(r_ND, level.codebook_KD, level.prices_K)])
    return codes_NL


def near_ties(codebook_KD: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Points halfway between two codes, off by nothing, by float32 roundings, and by a little more."""
    rng = np.random.default_rng(seed)
    a_ND, b_ND = (codebook_KD[rng.integers(0, len(codebook_KD), 400)].astype(np.float64) for _ in range(2))
    off_N1 = rng.choice([0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4], (400, 1)) * rng.choice([-1, 1], (400, 1))
    x_ND: NDArray[np.float64] = (a_ND + b_ND) / 2 + off_N1 * (b_ND - a_ND)
    return x_ND.astype(np.float32)


@given(
    x=hnp.arrays(np.float32, (5, 3), elements=st.integers(-9, 9).map(float)),
    codebook=hnp.arrays(np.float32, (4, 3), elements=st.integers(-9, 9).map(float)),
    prices=hnp.arrays(np.float64, 4, elements=st.integers(0, 9).map(float)),
)
def test_codes_agree_with_the_definition(x: np.ndarray, codebook: np.ndarray, prices: np.ndarray) -> None:
    oracle = [min(range(4), key=lambda k: (((v - codebook[k]) ** 2).sum() + prices[k], k)) for v in x]
    assert exact_codes(x, codebook, prices).tolist() == oracle
    assert nearest_codes(x, codebook, prices).tolist() == oracle


def test_a_tie_goes_to_the_lower_code() -> None:
    codebook = np.array([[9, 9], [1, 0], [1, 0], [-1, 0]], np.float32)
    assert nearest_codes(np.array([[0, 7], [3, 0]], np.float32), codebook).tolist() == [1, 1]


def test_a_lead_beyond_a_tie_wins_though_float32_does_not_see_it() -> None:
    # Distances 1 and (1 - 1e-8)^2: they differ by 2e-8, of squared lengths 0 + 1; a tie is 1e-9, a float32 step 6e-8.
    codebook = np.array([[1.0, 0], [0, 1 - 1e-8]])
    assert nearest_codes(np.zeros((1, 2)), codebook).tolist() == [1]
    codebook[1, 1] = 1 - 1e-10
    assert nearest_codes(np.zeros((1, 2)), codebook).tolist() == [0]


@pytest.mark.parametrize("normalize", [(False, False, False), (True, True, True), (True, False, False)])
@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1, 1e15])
def test_fast_codes_are_exact_codes(normalize: tuple[bool, ...], scale: float) -> None:
    below = 0.2 if any(normalize) else scale  # directions of 24 numbers are of this size
    sizes = [scale, 0.7 * below, 0.5 * below]
    codebooks = [vectors(40, 24, seed) * np.float32(size) for seed, size in enumerate(sizes)]
    encoder = ResidualEncoder(codebooks, normalize=normalize, prices_K=np.linspace(0, 0.3, 40))
    x = np.concatenate(
        [vectors(500, 24, 9) * np.float32(scale), near_ties(codebooks[0], 1), np.zeros((1, 24)), np.full((1, 24), 1e30)]
    )
    assert np.array_equal(encoder.encode(x), by_definition(encoder, x))


@pytest.mark.parametrize("normalize", [False, True])
def test_near_ties_below_the_first_level_are_decided_by_the_definition(normalize: bool) -> None:
    codebooks = [10 * vectors(8, 24), vectors(30, 24, 1)]
    codebooks[1] /= np.linalg.norm(codebooks[1], axis=1, keepdims=True)
    second = near_ties(codebooks[1], 2)
    x = codebooks[0][np.random.default_rng(3).integers(0, 8, len(second))] + second
    encoder = ResidualEncoder(codebooks, normalize=[normalize] * 2)
    assert np.array_equal(encoder.encode(x), by_definition(encoder, x))


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_that_are_codes_leave_nothing_and_still_get_exact_codes(normalize: bool) -> None:
    codebooks = [vectors(50, 24), vectors(30, 24, 1), vectors(30, 24, 2)]
    tiny = 1e-5 * vectors(50, 24, 3)
    x = np.concatenate([codebooks[0], codebooks[0] + tiny, codebooks[0] + codebooks[1][:1]])
    encoder = ResidualEncoder(codebooks, normalize=[normalize] * 3)
    assert np.array_equal(encoder.encode(x), by_definition(encoder, x))


def test_few_rows_of_ordinary_data_are_left_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the bounds are loose, and encoding is slow."""
    decided: list[int] = []
    decide = quantise._decide

    def counted(r_MD: NDArray[np.float64], *rest: Any) -> NDArray[np.int32]:
        decided.append(len(r_MD))
        return decide(r_MD, *rest)

    monkeypatch.setattr(quantise, "_decide", counted)
    codebooks = [vectors(256, 64, seed) * np.float32(0.8**seed) for seed in range(3)]
    for normalize in (False, True):
        ResidualEncoder(codebooks, normalize=[normalize] * 3).encode(vectors(1000, 64, 9))
    assert sum(decided) < 0.02 * 6000


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 2999), min_size=1, max_size=40), threads=st.sampled_from([1, 2, 3]))
def test_a_vector_gets_the_same_codes_whatever_stands_beside_it(rows: list[int], threads: int) -> None:
    codebooks = [vectors(20, seed=1), vectors(20, seed=2)]
    encoder = ResidualEncoder(codebooks, normalize=(True, True))
    x = np.concatenate([vectors(2600), near_ties(codebooks[0], 0)])  # more than a block
    assert np.array_equal(encoder.encode(x, threads)[rows], encoder.encode(x[rows]))


def test_residuals_by_hand() -> None:
    # (3, 5) - (0, 1) = (3, 4), of length 5; (0.6, 0.8) - (0.6, 0) = (0, 0.8).
    codebooks = [np.array([[0.0, 1.0]]), np.array([[0.6, 0.0]])]
    r, length = ResidualEncoder(codebooks, normalize=(True, False)).residuals(
        np.array([[3, 5]], np.float32), np.zeros((1, 2), np.int32)
    )
    np.testing.assert_allclose(r, [[0, 0.8]], atol=1e-15)
    assert length.tolist() == [1]
    _, length = ResidualEncoder(codebooks, normalize=(True, True)).residuals(
        np.array([[3, 5]], np.float32), np.zeros((1, 1), np.int32)
    )
    assert length.tolist() == [5]


def test_costs_by_hand_and_row_by_row() -> None:
    # Level 0 leaves (0, 2) of (1, 2): squared distances 4 - 4 + 1 and 4 + 9, the second with a price of 0.5.
    encoder = ResidualEncoder([np.array([[1.0, 0]]), np.array([[0, 1.0], [3, 2]])], prices_K=np.array([0, 0.5]))
    assert encoder.last_level_costs(np.array([[1, 2]], np.float32)).tolist() == [[1, 9.5]]
    many = ResidualEncoder([vectors(5), vectors(7, seed=1)])
    x = vectors(300, seed=2)
    assert np.array_equal(
        many.last_level_costs(x)[::7], np.concatenate([many.last_level_costs(v[None]) for v in x[::7]])
    )
    assert np.array_equal(many.last_level_costs(x).argmin(axis=1), many.encode(x)[:, -1])


def test_nothing_to_encode_is_no_error() -> None:
    encoder = ResidualEncoder([vectors(5), vectors(7)])
    assert encoder.encode(vectors(0)).shape == (0, 2)
    assert encoder.last_level_costs(vectors(0)).shape == (0, 7)


def test_a_fault_in_a_thread_is_not_swallowed() -> None:
    def work(blocks: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        quantise.over_blocks(10, 1, work, threads=2)


def test_every_row_is_worked_on_once() -> None:
    done: list[slice] = []
    quantise.over_blocks(10, 3, done.extend, threads=3)
    bounds = sorted((rows.start, rows.stop) for rows in done)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 10
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


@pytest.mark.parametrize("start", ["progressive", "spherical", "random"])
def test_kmeans_finds_the_clusters(start: quantise.Start) -> None:
    # Two far clusters of ten: their means are the codebook.
    x = np.repeat(np.array([[20, 0, 0], [0, 20, 0]], np.float32), 10, axis=0) + 0.1 * vectors(20, 3)
    found = kmeans(x, 2, start=start, iterations=5, max_points_per_centroid=1000, seed=1)
    means = x.reshape(2, 10, 3).mean(axis=1)
    assert sorted(map(tuple, np.round(found, 4).tolist())) == sorted(map(tuple, np.round(means, 4).tolist()))


@pytest.mark.parametrize("start", ["progressive", "spherical", "random"])
def test_fewer_vectors_than_dimensions(start: quantise.Start) -> None:
    x = np.pad(vectors(30, 4), ((0, 0), (0, 36)))
    found = kmeans(x, 8, start=start, iterations=5, max_points_per_centroid=1000, seed=0)
    assert found.shape == (8, 40)
    np.testing.assert_allclose(found[:, 4:], 0, atol=1e-5)
    assert ((x - found[nearest_codes(x, found)]) ** 2).sum() < 0.5 * (x**2).sum()


def test_a_progressive_start_leaves_less_error_in_many_small_clusters() -> None:
    rng = np.random.default_rng(0)
    x = (vectors(200, 32, 1)[rng.integers(0, 200, 1000)] + 0.5 * vectors(1000, 32, 2)).astype(np.float32)

    def error(start: quantise.Start) -> float:
        codebook = kmeans(x, 16, start=start, iterations=10, max_points_per_centroid=1000, seed=0)
        return float(((x - codebook[nearest_codes(x, codebook)]) ** 2).sum())

    assert error("progressive") < error("random")


def test_a_sample_trains_a_codebook_of_many_vectors() -> None:
    first = kmeans(vectors(500), 4, start="random", iterations=2, max_points_per_centroid=10, seed=0)
    again = kmeans(vectors(500), 4, start="random", iterations=2, max_points_per_centroid=10, seed=0)
    assert first.shape == (4, 6)
    assert np.array_equal(first, again)


def test_no_more_distinct_vectors_than_codes_are_the_codebook() -> None:
    x = np.array([[1, 0], [0.0, 2], [1, 0], [-0.0, 2]], np.float32)
    assert kmeans(x, 3, start="random", iterations=2, max_points_per_centroid=9, seed=0).tolist() == [[1, 0], [0, 2]]
