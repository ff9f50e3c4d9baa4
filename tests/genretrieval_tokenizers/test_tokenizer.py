"""What every method owes its users alike; what is its own is tested beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_tokenizers.rk_fsq import RkFsq, RkFsqConfig
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.rq_opq import RqOpq, RqOpqConfig
from genretrieval_tokenizers.rq_vae import RqVae, RqVaeConfig
from genretrieval_tokenizers.tokenizer import Tokenizer

Fit = Callable[[NDArray[np.floating]], Tokenizer]


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


FIT: dict[str, Fit] = {
    "rq_kmeans": lambda x: RqKMeans.fit(x, RqKMeansConfig(codebook_sizes=(8, 8), iterations=3)),
    "rq_opq": lambda x: RqOpq.fit(x, RqOpqConfig(codebook_sizes=(8, 8), subvector_codes=8, iterations=3)),
    "rq_vae": lambda x: RqVae.fit(x, RqVaeConfig(codebook_sizes=(8, 8), latent_dim=4, hidden_sizes=(16,), epochs=2)),
    "rk_fsq": lambda x: RkFsq.fit(x, RkFsqConfig(codebook_sizes=(8, 8), n_bits=4, hidden=16, steps=5, iterations=3)),
}
FITTED = {method: fit(vectors()) for method, fit in FIT.items()}

methods = pytest.mark.parametrize("method", FIT)


@methods
def test_the_code_that_is_given_is_the_cheapest(method: str) -> None:
    x, tokenizer = vectors(500, seed=3), FITTED[method]
    costs = tokenizer.last_level_costs(x)
    assert costs.dtype == np.float32
    assert costs.shape == (500, tokenizer.codebook_sizes[-1])
    assert np.array_equal(costs.argmin(axis=1), tokenizer.encode(x)[:, -1])


@methods
def test_costs_of_a_vector_do_not_depend_on_what_stands_beside_it(method: str) -> None:
    x, tokenizer = vectors(700, seed=3), FITTED[method]
    rows = np.random.default_rng(0).permutation(700)[:50]
    costs = tokenizer.last_level_costs(x)
    assert np.array_equal(tokenizer.last_level_costs(x[rows]), costs[rows])
    assert np.array_equal(tokenizer.last_level_costs(x[9:10]), costs[9:10])


@methods
def test_further_levels_are_not_decoded(method: str) -> None:
    codes = FITTED[method].encode(vectors(5))
    numbered = np.column_stack([codes, np.full(5, 99, np.int32)])
    assert np.array_equal(FITTED[method].decode(numbered), FITTED[method].decode(codes))


@methods
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, method: str) -> None:
    tokenizer, x = FITTED[method], vectors(500, seed=3)
    tokenizer.save(tmp_path / "codebooks.safetensors")
    loaded = type(tokenizer).load(tmp_path / "codebooks.safetensors")  # type: ignore[attr-defined]
    loaded.save(tmp_path / "again.safetensors")
    assert loaded.config == tokenizer.config  # type: ignore[attr-defined]
    assert loaded.notes == tokenizer.notes
    assert np.array_equal(loaded.encode(x), tokenizer.encode(x))
    assert np.array_equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert np.array_equal(loaded.last_level_costs(x), tokenizer.last_level_costs(x))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "codebooks.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "codebooks.safetensors"]


@methods
def test_a_file_of_another_method_is_refused(tmp_path: Path, method: str) -> None:
    other = "rq_opq" if method == "rq_kmeans" else "rq_kmeans"
    FITTED[other].save(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=rf"'genretrieval\.{other}\.\d', not 'genretrieval\.{method}\.\d'"):
        type(FITTED[method]).load(tmp_path / "other.safetensors")  # type: ignore[attr-defined]


@methods
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((0, 4), np.float32), "shape"),
        (np.zeros((4, 0), np.float32), "shape"),
        (np.zeros(4, np.float32), "shape"),
        (np.array([[0, 1], [np.nan, 1]], np.float32), "item row 1 holds NaN"),
        (np.array([[0, np.inf]], np.float32), "item row 0 holds NaN or infinity"),
        (np.array([[0, 1], [2, 3e37]], np.float32), r"item row 1 is longer than 1e\+15.*divide all vectors"),
        (np.array([[0, 1], [2, 1e300]]), r"item row 1 is longer than"),
    ],
)
def test_bad_vectors_are_refused(method: str, x: NDArray[np.float32], match: str) -> None:
    with pytest.raises(DataError, match=match):
        FIT[method](x)


@methods
def test_vectors_of_other_dimensions_are_refused(method: str) -> None:
    for ask in (FITTED[method].encode, FITTED[method].last_level_costs):
        with pytest.raises(DataError, match="5 dimensions, the codebooks 6"):
            ask(vectors(3, dim=5))


@methods
def test_no_vectors_have_no_codes(method: str) -> None:
    tokenizer = FITTED[method]
    sizes = tokenizer.codebook_sizes
    assert tokenizer.encode(vectors(0)).shape == (0, len(sizes))
    assert tokenizer.decode(np.zeros((0, len(sizes)), np.int32)).shape == (0, 6)
    assert tokenizer.last_level_costs(vectors(0)).shape == (0, sizes[-1])
