from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_tokenizers.adasid import AdaptiveRepulsion
from genretrieval_tokenizers.mlp import Mlp
from genretrieval_tokenizers.quasid import HammingRepulsion
from genretrieval_tokenizers.rk_fsq import RkFsq, RkFsqConfig, balance_loss, straight_through_signs
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.tokenizer import Tokenizer

SMALL = RkFsqConfig(codebook_sizes=(8, 8), n_bits=4, hidden=16, steps=60, batch_size=128, iterations=5)


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


FITTED = RkFsq.fit(vectors(), SMALL)


def by_hand() -> RkFsq:
    """One k-means level with codes (0, 0) and (10, 0); the network passes the residual on as it is."""
    config = RkFsqConfig(codebook_sizes=(2,), n_bits=2, normalize_residuals=False)
    codebook = np.array([[0, 0], [10, 0]], np.float32)
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]], np.float32)
    zero = np.zeros(2, np.float32)
    identity = Mlp((np.eye(2, dtype=np.float32),), (zero,))
    return RkFsq(config, (codebook,), np.ones(1, np.float32), zero, 1.0, identity, corners, n_used=4)


def test_it_is_a_tokenizer() -> None:
    tokenizer: Tokenizer = FITTED
    assert tokenizer.codebook_sizes == (8, 8, 16)
    assert tokenizer.dim == 6
    assert tokenizer.encode(vectors(3)).dtype == np.int32


def test_codes_by_hand() -> None:
    # Residuals (2, -1), (-3, 4) and (-2, -2): signs + -, - + and - -, bits 1 and 2.
    codes = by_hand().encode(np.array([[2, -1], [7, 4], [-2, -2]], np.float32))
    assert codes.tolist() == [[0, 1], [1, 2], [0, 0]]
    assert by_hand().decode(codes).tolist() == [[1, -1], [9, 1], [-1, -1]]


def test_an_output_at_zero_is_the_lower_code() -> None:
    x = np.array([[1e-10, 1], [-1e-10, 1], [0, 1], [1e-6, 1]], np.float32)
    assert by_hand().encode(x)[:, 1].tolist() == [2, 2, 2, 3]


def test_costs_by_hand() -> None:
    # tanh(ln 3) = (9 - 1) / (9 + 1) = 0.8, tanh(ln 2) = (4 - 1) / (4 + 1) = 0.6; corners are (-,-) (+,-) (-,+) (+,+).
    x = np.array([[np.log(3), np.log(2)]], np.float32)
    expected = [1.8**2 + 1.6**2, 0.2**2 + 1.6**2, 1.8**2 + 0.4**2, 0.2**2 + 0.4**2]
    np.testing.assert_allclose(by_hand().last_level_costs(x), [expected], rtol=1e-6)


def test_gradients_pass_the_rounding() -> None:
    z = torch.tensor([0.3, 0.0, -0.2], requires_grad=True)
    rounded = straight_through_signs(z)
    (rounded * torch.tensor([2.0, 3.0, 4.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert rounded.tolist() == [1, -1, -1]
    assert z.grad is not None
    assert z.grad.tolist() == [2, 3, 4]


def test_balance_by_hand() -> None:
    assert balance_loss(torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])).item() == pytest.approx(0)
    assert balance_loss(torch.tensor([[0.0, 0]])).item() == pytest.approx(0)
    assert balance_loss(torch.tensor([[1.0, -1]])).item() == pytest.approx(1)
    # Off with 1/4, on with 3/4: 2 - 3/4 log2(3) = 0.811278 bits of 1.
    assert balance_loss(torch.tensor([[0.5]])).item() == pytest.approx(1 - 0.811278)


def test_balance_has_a_gradient_where_outputs_are_saturated() -> None:
    z = torch.tensor([[1.0, -1.0], [1.0, 0.5]], requires_grad=True)
    balance_loss(z).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad[1, 0] > 0  # against the bit that is always on


def test_balance_brings_bits_into_use() -> None:
    """Residuals of one large and many small directions: reconstruction alone spends the bits on the large one."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((600, 8)) * [10, 1, 1, 1, 1, 1, 1, 1]).astype(np.float32)
    config = replace(SMALL, codebook_sizes=(1,), n_bits=5, normalize_residuals=False, hidden=64, steps=300)
    plain, balanced = (RkFsq.fit(x, replace(config, balance=weight)) for weight in (0.0, 1.0))
    assert plain.notes
    assert balanced.n_used > plain.n_used + 5


def test_the_last_level_lowers_the_error_and_the_collisions() -> None:
    x = vectors(600)
    fitted = RkFsq.fit(x, replace(SMALL, steps=200))
    coarse = RqKMeans.fit(x, RqKMeansConfig(codebook_sizes=(8, 8), iterations=5))
    error = np.square(x - fitted.decode(fitted.encode(x))).sum()
    assert error < np.square(x - coarse.decode(coarse.encode(x))).sum()
    assert len(np.unique(fitted.encode(x), axis=0)) > 3 * len(np.unique(coarse.encode(x), axis=0))


@pytest.mark.parametrize("repulsion", [HammingRepulsion(), AdaptiveRepulsion()])
def test_repulsion_parts_items_of_one_id(repulsion: HammingRepulsion | AdaptiveRepulsion) -> None:
    x = vectors(600)
    config = replace(SMALL, codebook_sizes=(4, 4), n_bits=6, steps=150)
    plain, repelled = (RkFsq.fit(x, replace(config, repulsion=r)) for r in (None, replace(repulsion)))
    distinct = [len(np.unique(fitted.encode(x), axis=0)) for fitted in (plain, repelled)]
    assert distinct[1] > distinct[0]


def test_fitting_twice_gives_the_same_tokenizer() -> None:
    state = torch.get_rng_state()
    again = RkFsq.fit(vectors(), SMALL)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(again.residuals_KD, FITTED.residuals_KD)
    assert np.array_equal(again.encode(vectors()), FITTED.encode(vectors()))
    other = RkFsq.fit(vectors(), replace(SMALL, seed=1))
    assert not np.array_equal(other.residuals_KD, FITTED.residuals_KD)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(0, 999), min_size=1, max_size=40), threads=st.sampled_from([1, 2]))
def test_a_vector_gets_the_same_codes_whatever_stands_beside_it(rows: list[int], threads: int) -> None:
    x = vectors(1000)  # more than a block
    assert np.array_equal(FITTED.encode(x, threads)[rows], FITTED.encode(x[rows]))


@pytest.mark.parametrize("repulsion", [None, HammingRepulsion(margin_full=0.7), AdaptiveRepulsion(weight=0.3)])
def test_a_saved_tokenizer_encodes_to_the_same_codes(
    tmp_path: Path, repulsion: HammingRepulsion | AdaptiveRepulsion | None
) -> None:
    fitted = RkFsq.fit(vectors(), replace(SMALL, repulsion=repulsion, steps=2))
    fitted.save(tmp_path / "codebooks.safetensors")
    loaded = RkFsq.load(tmp_path / "codebooks.safetensors")
    x = vectors(500, seed=3)
    assert loaded.config == fitted.config
    assert loaded.notes == fitted.notes
    assert np.array_equal(loaded.encode(x), fitted.encode(x))
    assert np.array_equal(loaded.decode(loaded.encode(x)), fitted.decode(fitted.encode(x)))
    assert np.array_equal(loaded.last_level_costs(x), fitted.last_level_costs(x))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_shops_smaller_than_the_codebooks_pass(n: int, normalize: bool) -> None:
    x = vectors(n, dim=16)
    fitted = RkFsq.fit(x, replace(SMALL, codebook_sizes=(32, 8), normalize_residuals=normalize))
    codes = fitted.encode(x)
    assert codes[:, 0].tolist() == list(range(n))
    assert len(np.unique(codes[:, 2])) == 1  # nothing is left over
    assert fitted.notes[-1] == "level 2 used 1 of 16 codes in fitting"
    np.testing.assert_allclose(fitted.decode(codes), x, atol=1e-5)


def test_items_that_are_all_alike_have_one_id() -> None:
    for x in (np.full((5, 3), 0.1, np.float32), np.zeros((5, 3), np.float32)):
        fitted = RkFsq.fit(x, SMALL)
        assert len(np.unique(fitted.encode(x), axis=0)) == 1
        np.testing.assert_allclose(fitted.decode(fitted.encode(x)), x, atol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"codebook_sizes": ()},
        {"codebook_sizes": (4, 0)},
        {"n_bits": 0},
        {"n_bits": 15},
        {"hidden": 0},
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"balance": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(DataError):
        RkFsqConfig(**setting)  # type: ignore[arg-type]
