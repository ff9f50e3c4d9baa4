from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from threadpoolctl import threadpool_limits

from genretrieval.errors import DataError
from genretrieval_tokenizers.adasid import AdaptiveRepulsion
from genretrieval_tokenizers.contrast import Contrast
from genretrieval_tokenizers.mlp import Mlp
from genretrieval_tokenizers.quasid import HammingRepulsion
from genretrieval_tokenizers.rq_vae import EmaCodebook, RqVae, RqVaeConfig, _quantise_in_training
from genretrieval_tokenizers.tokenizer import Tokenizer

SMALL = RqVaeConfig(
    unit_latent=True,
    codebook_sizes=(8, 8),
    latent_dim=4,
    hidden_sizes=(16,),
    epochs=10,
    batch_size=100,
    learning_rate=3e-3,
)
PAIRS = np.arange(200, dtype=np.int32).reshape(100, 2)
QUASID = replace(SMALL, repulsion=HammingRepulsion(), contrast=Contrast())


def vectors(n: int = 300, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


TOKENIZER = RqVae.fit(vectors(), SMALL)


def hand_made(*, unit: bool) -> RqVae:
    """Encoder max(0, x), decoder z, one level of codes on the axes and a second one around."""
    identity, nothing = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    codebooks = np.array([[4, 0], [0, 4]], np.float32), np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    return RqVae(
        RqVaeConfig(codebook_sizes=(2, 3), latent_dim=2, hidden_sizes=(2,), unit_latent=unit),
        np.array([10, 0], np.float32),
        np.array([1, 2], np.float32),
        Mlp((identity, identity), (nothing, nothing), unit),
        Mlp((identity, identity), (nothing, nothing)),
        codebooks,
    )


def test_codes_by_hand() -> None:
    # Standardised (5, -3) and (0, 5), past the ReLU (5, 0) and (0, 5); what level 0 leaves is (1, 0) and (0, 1).
    tokenizer = hand_made(unit=False)
    x = np.array([[15, -6], [10, 10]], np.float32)
    assert tokenizer.encode(x).tolist() == [[0, 0], [1, 1]]
    # (4, 0) + (1, 0) and (0, 4) + (0, 1), back by std and mean.
    assert tokenizer.decode(tokenizer.encode(x)).tolist() == [[15, 0], [10, 10]]
    # Squared distances of (1, 0) to (1, 0), (0, 1), (0, -1), and of (0, 1).
    assert tokenizer.last_level_costs(x).tolist() == [[0, 2, 2], [2, 0, 4]]


def test_a_unit_latent_keeps_the_direction_alone() -> None:
    # (5, 0) becomes (1, 0); less (4, 0), (-3, 0) is as far from (0, 1) as from (0, -1): the lower code.
    assert hand_made(unit=True).encode(np.array([[15, -6]], np.float32)).tolist() == [[0, 1]]
    # Nothing has no direction: (0, 0) less (4, 0), the lower of two equally near.
    assert hand_made(unit=True).encode(np.array([[10, 0]], np.float32)).tolist() == [[0, 1]]


def test_a_code_follows_the_mean_of_what_chose_it() -> None:
    codebook = EmaCodebook(torch.tensor([[0.0], [9.0]]), torch.tensor([2.0, 2.0]), decay=0.5)
    x = torch.tensor([[4.0], [1.0]])
    codes = codebook.nearest(x)
    assert codes.tolist() == [0, 0]
    codebook.follow(x, codes)
    # Moving averages: load 0.5 * 2 + 0.5 * 2 = 2, sum 0.5 * 0 + 0.5 * (4 + 1) = 2.5. The unused code stays.
    assert codebook.vectors_KD.tolist() == [[1.25], [9.0]]
    assert codebook.loads_K.tolist() == [2.0, 1.0]


def test_a_code_that_hardly_anything_chooses_is_revived() -> None:
    codebook = EmaCodebook(torch.tensor([[0.0], [99.0]]), torch.tensor([10.0, 0.5]), decay=0.9)
    x = torch.tensor([[2.0], [2.0]])
    codebook.revive(x, below=0.05)  # an even load is 5.25: 0.5 is more than a twentieth of it
    assert codebook.vectors_KD.tolist() == [[0.0], [99.0]]
    codebook.revive(x, below=0.1)
    assert codebook.vectors_KD.tolist() == [[0.0], [2.0]]
    assert codebook.loads_K.tolist() == [10.0, 5.25]
    assert codebook.nearest(x).tolist() == [1, 1]


def test_codes_residuals_and_commitment_by_hand() -> None:
    # z = (3, 4). Level 0 offers (2, 4) and (9, 9): code 0 leaves (1, 0). Level 1 offers (0, 2), (1, 1): code 1 leaves
    # (0, -1). Mean squares: level 0 (1 + 0) / 2 = .5, level 1 (0 + 1) / 2 = .5; the commitment is their sum, 1. Its
    # gradient at z is 2 (what level 0 leaves + what level 1 leaves) / 2 = (1, 0) + (0, -1).
    levels = [
        EmaCodebook(torch.tensor([[2.0, 4.0], [9.0, 9.0]]), torch.ones(2), decay=0.9),
        EmaCodebook(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.ones(2), decay=0.9),
    ]
    z = torch.tensor([[3.0, 4.0]], requires_grad=True)
    codes, residuals, quantised, commitment = _quantise_in_training(z, levels)
    assert codes.tolist() == [[0, 1]]
    assert [residual.tolist() for residual in residuals] == [[[3.0, 4.0]], [[1.0, 0.0]]]
    assert quantised.tolist() == [[3.0, 5.0]]
    assert commitment.item() == 1.0
    commitment.backward()
    assert z.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("unit", [False, True])
def test_every_code_is_used(unit: bool) -> None:
    x = np.repeat(vectors(30, 8), 20, axis=0) + 0.2 * vectors(600, 8, seed=1)
    tokenizer = RqVae.fit(x, replace(SMALL, codebook_sizes=(32, 32), unit_latent=unit))
    assert [len(np.unique(level)) for level in tokenizer.encode(x).T] == [32, 32]


def test_codes_stand_for_their_vectors() -> None:
    x = np.repeat(vectors(8, 8), 40, axis=0) + 0.1 * vectors(320, 8, seed=1)
    tokenizer = RqVae.fit(x, replace(SMALL, epochs=100))
    error = np.square(x - tokenizer.decode(tokenizer.encode(x))).sum() / np.square(x - x.mean(axis=0)).sum()
    assert error < 0.2
    assert tokenizer.codebook_sizes == (8, 8)
    assert tokenizer.dim == 8


@pytest.mark.parametrize("repulsion", [HammingRepulsion(), AdaptiveRepulsion(weight=0.5)])
def test_repulsion_lowers_collisions(repulsion: HammingRepulsion | AdaptiveRepulsion) -> None:
    """Most items lie close together and a few far away: left alone, the codes go to the few."""
    x = np.concatenate([1 + 0.2 * vectors(200, 8), 3 * vectors(40, 8, seed=1)])
    config = replace(SMALL, codebook_sizes=(16, 16), hidden_sizes=(32,), epochs=60, batch_size=120)
    pairs = []
    for settings in (config, replace(config, repulsion=repulsion)):
        codes = RqVae.fit(x, settings).encode(x)
        pairs.append(np.triu((codes[:, None] == codes[None]).all(axis=2), 1).sum())
    assert pairs[1] < pairs[0] / 1.5


@pytest.mark.parametrize("repulsion", [HammingRepulsion(weight_full=1.0), AdaptiveRepulsion(weight=1.0)])
def test_repulsion_raises_the_entropy_of_ids(repulsion: HammingRepulsion | AdaptiveRepulsion) -> None:
    """Twins close to the origin share their codes; items far away draw most codes to themselves."""
    twins = np.repeat(vectors(60, 8), 2, axis=0) + 0.1 * vectors(120, 8, seed=1)
    x = np.concatenate([0.3 * twins, 3 * vectors(40, 8, seed=2)])
    config = replace(SMALL, codebook_sizes=(16, 16), hidden_sizes=(32,), epochs=60, batch_size=160)
    entropies = []
    for settings in (config, replace(config, repulsion=repulsion)):
        share = np.unique(RqVae.fit(x, settings).encode(x), axis=0, return_counts=True)[1] / len(x)
        entropies.append(-(share * np.log(share)).sum())
    assert entropies[1] > entropies[0] + 0.05


def test_contrast_pulls_pairs_together() -> None:
    """Pairs that the vectors know nothing of share their first code more often."""
    x, config = vectors(200), replace(SMALL, epochs=80)
    shares = []
    for settings in (config, replace(config, contrast=Contrast(weight=0.5))):
        codes = RqVae.fit(x, settings, PAIRS).encode(x)
        shares.append((codes[PAIRS[:, 0], 0] == codes[PAIRS[:, 1], 0]).mean())
    assert shares[1] > shares[0] + 0.05


def test_without_a_loss_that_reads_them_pairs_change_nothing() -> None:
    x = vectors()
    assert np.array_equal(RqVae.fit(x, SMALL, PAIRS).encode(x), TOKENIZER.encode(x))


def test_the_order_of_pairs_changes_nothing_but_their_draw() -> None:
    x = vectors()
    by_target = PAIRS[np.random.default_rng(0).permutation(len(PAIRS))]
    first, second = RqVae.fit(x, QUASID, PAIRS), RqVae.fit(x, QUASID, by_target)
    assert np.array_equal(first.encode(x), second.encode(x))  # one target each: the draw is the same


@pytest.mark.parametrize("config", [SMALL, QUASID])
def test_fitting_twice_gives_the_same_tokenizer(config: RqVaeConfig) -> None:
    torch.manual_seed(1)
    x, first = vectors(), RqVae.fit(vectors(), config, PAIRS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = RqVae.fit(vectors(), config, PAIRS)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(first.encode(x), second.encode(x))
    assert np.array_equal(first.codebooks[0], second.codebooks[0])
    other = RqVae.fit(vectors(), replace(config, seed=1), PAIRS)
    assert not np.array_equal(first.encode(x), other.encode(x))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_vector_gets_the_same_codes_whatever_stands_beside_it(n_threads: int) -> None:
    x = vectors(5000, seed=2)  # more than a block
    codes = TOKENIZER.encode(x)
    rows = np.random.default_rng(0).permutation(5000)
    with threadpool_limits(n_threads):
        assert np.array_equal(TOKENIZER.encode(x[rows]), codes[rows])
        assert np.array_equal(TOKENIZER.encode(x[4990:]), codes[4990:])
        assert np.array_equal(TOKENIZER.encode(x[7:8]), codes[7:8])


@pytest.mark.parametrize(
    "config", [SMALL, replace(QUASID, unit_latent=False), replace(QUASID, repulsion=AdaptiveRepulsion(weight=0.3))]
)
def test_a_saved_tokenizer_encodes_to_the_same_ids(tmp_path: Path, config: RqVaeConfig) -> None:
    tokenizer: Tokenizer = RqVae.fit(vectors(), config, PAIRS)
    tokenizer.save(tmp_path / "codebooks.safetensors")
    loaded = RqVae.load(tmp_path / "codebooks.safetensors")
    x = vectors(500, seed=3)
    assert loaded.config == config
    assert np.array_equal(loaded.encode(x), tokenizer.encode(x))
    assert np.array_equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert np.array_equal(loaded.last_level_costs(x), tokenizer.last_level_costs(x))
    assert [file.name for file in tmp_path.iterdir()] == ["codebooks.safetensors"]


def test_a_recipe_tells_repulsions_apart_by_kind() -> None:
    adapter = TypeAdapter(RqVaeConfig)
    hamming = adapter.validate_python({"repulsion": {"kind": "hamming", "radius": 2}})
    adaptive = adapter.validate_python({"repulsion": {"kind": "adaptive"}, "contrast": {"weight": 0.2}})
    assert hamming.repulsion == HammingRepulsion(radius=2)
    assert adaptive.repulsion == AdaptiveRepulsion()
    assert adaptive.contrast == Contrast(weight=0.2)


def test_a_common_scale_keeps_the_parts_in_proportion() -> None:
    # Variances 1, 9 and none: the common one is the mean of those that vary, 5.
    x = np.array([[1, 3, 7], [-1, -3, 7]], np.float32)
    config = replace(SMALL, epochs=1)
    assert RqVae.fit(x, config).std == pytest.approx([5**0.5, 5**0.5, 1])
    assert RqVae.fit(x, replace(config, scale="dimension")).std == pytest.approx([1, 3, 1])
    assert RqVae.fit(x, config).mean.tolist() == [0, 0, 7]


def test_a_dimension_that_is_constant_up_to_rounding_is_not_blown_up() -> None:
    x = vectors(50)
    x[:, 2] = np.float32(1000) + 1e-4 * x[:, 1]
    assert RqVae.fit(x, replace(SMALL, epochs=1, scale="dimension")).std[2] == 1


@pytest.mark.parametrize("n", [1, 2, 7])
def test_shops_smaller_than_the_codebooks_pass(n: int) -> None:
    x = vectors(n, dim=16)
    tokenizer = RqVae.fit(x, replace(SMALL, repulsion=HammingRepulsion()))
    assert tokenizer.codebook_sizes == (n, 1)
    assert len(np.unique(tokenizer.encode(x), axis=0)) == n
    assert tokenizer.notes[0] == f"level 0 has {n} codes instead of 8: there are no more distinct vectors"


def test_items_that_are_all_alike_share_their_codes() -> None:
    for x in (np.ones((5, 3), np.float32), np.zeros((5, 3), np.float32)):
        tokenizer = RqVae.fit(x, SMALL)
        assert tokenizer.encode(x).tolist() == [[0, 0]] * 5
        assert tokenizer.decode(tokenizer.encode(x)) == pytest.approx(x, abs=1)


@pytest.mark.parametrize("pairs", [None, np.zeros((0, 2), np.int32)])
def test_contrast_without_pairs_says_what_to_do(pairs: np.ndarray | None) -> None:
    with pytest.raises(DataError, match=r"give pairs .*swing.* or set contrast to null"):
        RqVae.fit(vectors(), QUASID, pairs)


@pytest.mark.parametrize("pairs", [[[0, 300]], [[-1, 0]], [[0, 1, 2]]])
def test_pairs_of_other_items_are_refused(pairs: list[list[int]]) -> None:
    with pytest.raises(DataError, match="rows of the 300 items"):
        RqVae.fit(vectors(), QUASID, np.array(pairs, np.int32))


def test_training_that_diverges_is_an_error() -> None:
    with pytest.raises(DataError, match="smaller learning_rate"):
        RqVae.fit(vectors(), replace(SMALL, learning_rate=1e30, unit_latent=False))


@pytest.mark.parametrize(
    "setting",
    [
        {"codebook_sizes": ()},
        {"codebook_sizes": (4, 0)},
        {"scale": "row"},
        {"latent_dim": 0},
        {"hidden_sizes": (0,)},
        {"epochs": 0},
        {"batch_size": 0},
        {"revive_every": 0},
        {"kmeans_iterations": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"commitment": -1.0},
        {"ema_decay": 1.0},
        {"revive_below": 1.0},
        {"revive_until": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        RqVaeConfig(**setting)


def test_fitting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    RqVae.fit(vectors(30), replace(SMALL, epochs=1))
    assert capfd.readouterr() == ("", "")
