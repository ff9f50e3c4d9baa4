from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_tokenizers import rq_opq
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.rq_opq import RqOpq, RqOpqConfig

SMALL = RqOpqConfig(codebook_sizes=(4, 4), subvector_codes=16, iterations=5)


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def test_codes_of_two_sub_vectors_by_hand() -> None:
    # One residual level; the sub-vectors are the diagonals (1, 1) and (1, -1), each with the codes -1 and 1 on it.
    level = np.array([[0, 0], [10, 0]], np.float32)
    diagonals = [np.array([[-1, -1], [1, 1]], np.float32), np.array([[-1, 1], [1, -1]], np.float32)]
    config = RqOpqConfig(codebook_sizes=(2,), normalize_residuals=False)
    tokenizer = RqOpq(config, (level, *diagonals), np.ones(3, np.float32))
    # (12.5, -0.5) leaves (2.5, -0.5) = 1 (1, 1) + 1.5 (1, -1); (-3, 0) is -1.5 of both.
    codes = tokenizer.encode(np.array([[12.5, -0.5], [-3, 0]], np.float32))
    assert codes.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert tokenizer.decode(codes).tolist() == [[12, 0], [-2, 0]]


@pytest.mark.parametrize("normalize", [False, True])
def test_codebooks_of_sub_vectors_are_orthogonal(normalize: bool) -> None:
    """So the code of a sub-vector is the nearest one in it, whatever the other sub-vector's code is."""
    tokenizer = RqOpq.fit(vectors(), replace(SMALL, normalize_residuals=normalize))
    *_, a_KD, b_KD = tokenizer.codebooks
    np.testing.assert_allclose(a_KD @ b_KD.T, 0, atol=1e-5)
    assert np.linalg.matrix_rank(a_KD) == np.linalg.matrix_rank(b_KD) == 3


def test_rotating_lowers_the_error() -> None:
    # Two dimensions that go together stand in different sub-vectors until they are rotated.
    x = np.repeat(vectors(2000, 2), 2, axis=1)[:, [0, 2, 1, 3]] + 0.01 * vectors(2000, 4, seed=1)
    config = replace(SMALL, codebook_sizes=(1,), normalize_residuals=False)

    def error(tokenizer: RqOpq) -> float:
        return float(((x - tokenizer.decode(tokenizer.encode(x))) ** 2).sum())

    learned = error(RqOpq.fit(x, config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rq_opq, "_rotation", lambda r_ND, config: np.eye(r_ND.shape[1], dtype=np.float32))
        assert learned < 0.7 * error(RqOpq.fit(x, config))


@pytest.mark.parametrize("n", [20, 31, 40])
def test_a_shop_of_fewer_items_than_its_vectors_have_dimensions(n: int) -> None:
    # faiss ends the process where it is asked for more principal components than there are vectors.
    x = vectors(n, 41)
    tokenizer = RqOpq.fit(x, SMALL)
    *_, a_KD, b_KD = tokenizer.codebooks
    np.testing.assert_allclose(a_KD @ b_KD.T, 0, atol=1e-4)
    assert ((x - tokenizer.decode(tokenizer.encode(x))) ** 2).sum() < 0.5 * (x**2).sum()


def test_opq_levels_lower_the_error_of_the_residual_levels() -> None:
    x = vectors(600)
    plain = RqKMeans.fit(x, RqKMeansConfig(codebook_sizes=(4, 4), iterations=5))
    both = RqOpq.fit(x, SMALL)
    errors = [float(((x - t.decode(t.encode(x))) ** 2).sum()) for t in (plain, both)]
    assert errors[1] < errors[0] / 2
    assert both.codebook_sizes == (4, 4, 16, 16)
    assert np.array_equal(both.encode(x)[:, :2], plain.encode(x))


def test_queries_fitted_together_with_items_are_told_apart() -> None:
    items, queries = vectors(300), vectors(40, seed=1) + 20
    alone, together = RqOpq.fit(items, SMALL), RqOpq.fit(np.concatenate([items, queries]), SMALL)
    distinct = [len(np.unique(tokenizer.encode(queries), axis=0)) for tokenizer in (alone, together)]
    assert distinct[1] > distinct[0]


def test_fitting_twice_gives_the_same_codebooks() -> None:
    first, second = RqOpq.fit(vectors(), SMALL), RqOpq.fit(vectors(), SMALL)
    for a, b in zip(first.codebooks, second.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)
    other = RqOpq.fit(vectors(), replace(SMALL, seed=1))
    assert not np.array_equal(first.codebooks[-1], other.codebooks[-1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_vector_gets_the_same_codes_whatever_stands_beside_it(threads: int) -> None:
    tokenizer = RqOpq.fit(vectors(), SMALL)
    x = vectors(3000, seed=1)
    rows = np.random.default_rng(0).permutation(3000)[:100]
    assert np.array_equal(tokenizer.encode(x[rows]), tokenizer.encode(x, threads)[rows])


@pytest.mark.parametrize("n_subvectors", [1, 2, 4])
def test_dimensions_that_sub_vectors_do_not_divide_pass(n_subvectors: int) -> None:
    tokenizer = RqOpq.fit(vectors(dim=7), replace(SMALL, n_subvectors=n_subvectors))
    assert tokenizer.codebook_sizes == (4, 4, *[16] * n_subvectors)


@pytest.mark.parametrize("n", [1, 2, 12, 15])
def test_small_shops_pass(n: int) -> None:
    x = vectors(n)
    tokenizer = RqOpq.fit(x, SMALL)
    assert tokenizer.notes
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(x)), x, atol=1e-5 if n <= 4 else 9)


def test_items_that_are_all_alike_have_one_code_a_level() -> None:
    x = np.ones((30, 4), np.float32)
    tokenizer = RqOpq.fit(x, SMALL)
    assert tokenizer.codebook_sizes == (1, 1, 1, 1)
    assert tokenizer.notes[-1] == "level 3 has 1 codes instead of 16: there are no more distinct vectors"


@pytest.mark.parametrize("n", [1, 2, 300])
def test_fewer_dimensions_than_sub_vectors_leave_the_last_ones_a_single_code(n: int) -> None:
    # The hashed words of a single item, or of equal ones, have one dimension.
    x = vectors(n, dim=1)
    tokenizer = RqOpq.fit(x, SMALL)
    assert tokenizer.codebook_sizes[-1] == 1
    assert tokenizer.notes[-1] == "level 3 has 1 codes instead of 16: there are no more distinct vectors"
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(x)), x, atol=1e-5 if n <= 4 else 9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="n_subvectors 0"):
        RqOpqConfig(n_subvectors=0)
    with pytest.raises(DataError, match="codebook_sizes"):
        RqOpqConfig(codebook_sizes=())


def test_fitting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    RqOpq.fit(vectors(30), SMALL)
    assert capfd.readouterr() == ("", "")
