"""The small networks of learned tokenizers: torch trains them, NumPy runs them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from genretrieval_tokenizers.quantise import F32, F64
from genretrieval_tokenizers.storage import Tensors

if TYPE_CHECKING:
    from torch.nn import Module, Sequential


@dataclass(frozen=True, slots=True)
class Mlp:
    """Linear layers with ReLU between them.

    Attributes:
        weights: float32 ``[out, in]`` a layer.
        biases: float32 ``[out]`` a layer.
        unit: outputs are scaled to length 1; one of length 0 stays as it is.
    """

    weights: tuple[F32, ...]
    biases: tuple[F32, ...]
    unit: bool = False

    def __call__(self, x_ND: F64) -> F64:
        """Outputs in float64, ``[N, D]`` with the width of the last layer.

        How they round depends on the number of rows; where equal rows are to have equal outputs, give always as many.
        """
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x_ND = (np.maximum(x_ND, 0) if layer else x_ND) @ weight.T.astype(np.float64) + bias
        if not self.unit:
            return x_ND
        length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
        return x_ND / np.where(length_N1 > 0, length_N1, 1)

    @classmethod
    def trained(cls, layers: Sequential, *, unit: bool = False) -> Mlp:
        """What training made of `trainable` layers."""
        from torch.nn import Linear

        linear = [layer for layer in layers if isinstance(layer, Linear)]
        return cls(
            tuple(layer.weight.detach().numpy().copy() for layer in linear),
            tuple(layer.bias.detach().numpy().copy() for layer in linear),
            unit,
        )

    @classmethod
    def stored(cls, tensors: Tensors, name: str, *, unit: bool = False) -> Mlp:
        """The network whose `tensors` were stored under a name."""
        n_layers = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in tensors)
        return cls(
            tuple(tensors[f"{name}.{layer}.weight"] for layer in range(n_layers)),
            tuple(tensors[f"{name}.{layer}.bias"] for layer in range(n_layers)),
            unit,
        )

    def tensors(self, name: str) -> Tensors:
        """Weights and biases for a file, as ``name.layer.weight`` and ``name.layer.bias``; `unit` is not among them."""
        weights = {f"{name}.{layer}.weight": weight for layer, weight in enumerate(self.weights)}
        return weights | {f"{name}.{layer}.bias": bias for layer, bias in enumerate(self.biases)}


def trainable(widths: tuple[int, ...]) -> Sequential:
    """An `Mlp` for torch to train, with torch's initial weights.

    Args:
        widths: of the inputs, of each hidden layer, and of the outputs.
    """
    from torch.nn import Linear, ReLU, Sequential

    layers: list[Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [ReLU()] * bool(layers) + [Linear(width_in, width_out)]
    return Sequential(*layers)
