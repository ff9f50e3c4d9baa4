from __future__ import annotations

import numpy as np
import torch

from genretrieval_tokenizers.mlp import Mlp, trainable


def test_outputs_by_hand() -> None:
    # (1, 2) -> (1 + 2, 1 - 2) -> past the ReLU (3, 0) -> 2 * 3 - 0 + 1.
    weights = np.array([[1, 1], [1, -1]], np.float32), np.array([[2, -1]], np.float32)
    mlp = Mlp(weights, (np.zeros(2, np.float32), np.ones(1, np.float32)))
    assert mlp(np.array([[1.0, 2.0]])).tolist() == [[7]]


def test_a_unit_network_gives_directions_and_leaves_nothing_as_it_is() -> None:
    mlp = Mlp((np.eye(2, dtype=np.float32),), (np.zeros(2, np.float32),), unit=True)
    assert mlp(np.array([[3.0, -4.0], [0, 0]])).tolist() == [[0.6, -0.8], [0, 0]]


def test_numpy_runs_what_torch_trained() -> None:
    layers = trainable((5, 7, 3, 2))
    x = np.random.default_rng(0).standard_normal((20, 5))
    with torch.no_grad():
        expected = layers.double()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Mlp.trained(layers.float())(x), expected, rtol=1e-12, atol=1e-12)


def test_training_on_leaves_a_network_that_was_taken_as_it_was() -> None:
    layers = trainable((2, 2))
    taken = Mlp.trained(layers)
    before = taken.weights[0].copy()
    with torch.no_grad():
        next(layers.parameters()).add_(1)
    assert np.array_equal(taken.weights[0], before)


def test_a_stored_network_is_found_among_others() -> None:
    one, two = Mlp.trained(trainable((3, 4, 2)), unit=True), Mlp.trained(trainable((2, 3)))
    tensors = one.tensors("encoder") | two.tensors("decoder")
    x = np.random.default_rng(0).standard_normal((4, 3))
    assert np.array_equal(Mlp.stored(tensors, "encoder", unit=True)(x), one(x))
    assert len(Mlp.stored(tensors, "decoder").weights) == 1
