"""Residual k-means with a binary FSQ as last level, the tokenizer of OneMall (arXiv 2601.21770).

The first levels are those of `genretrieval_tokenizers.rq_kmeans`. On what they leave over, a small network finds a few
numbers whose signs say the most about it, and the signs are the code: finite scalar quantisation (Mentzer et al.,
"Finite scalar quantization: VQ-VAE made simple", ICLR 2024, arXiv 2309.15505) with two values a number. There is no
codebook that could be used unevenly, and what the network keeps of a residual need not be near any centroid: fewer
items share an ID than with a third level of k-means, at a somewhat larger reconstruction error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.adasid import AdaptiveRepulsion
from genretrieval_tokenizers.mlp import Mlp, trainable
from genretrieval_tokenizers.quantise import F32, F64, VANISHED, ResidualEncoder, over_blocks
from genretrieval_tokenizers.quasid import HammingRepulsion
from genretrieval_tokenizers.rq_kmeans import check_kmeans, fit_levels, notes_on_sizes
from genretrieval_tokenizers.storage import Tensors, read_tokenizer, write_tokenizer
from genretrieval_tokenizers.tokenizer import checked_vectors

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "genretrieval.rk_fsq.1"
# Far above the rounding of a float64 sum of some hundred terms, far below what separates two items.
_TIE = 1e-9
_MOST_BITS = 14
# Shares below count as none: the entropy's slope is infinite at 0.
_UNUSED = 1e-9
_WELL_USED = 0.95
_ROWS_A_BLOCK = 256

Float = TypeVar("Float", np.float32, np.float64)


@dataclass(frozen=True, slots=True)
class RkFsqConfig:
    """Settings of residual k-means with an FSQ last level.

    Attributes:
        method: names the method in a recipe.
        codebook_sizes: codes of the k-means levels, the FSQ level left out; OneMall has (4096, 4096).
        n_bits: bits of the FSQ level, which has ``2**n_bits`` codes; OneMall has 12.
        normalize_residuals: scale what a level leaves over to length 1, as in `RqKMeansConfig`; the network then
            reads directions.
        hidden: width of the hidden layer of the encoder and of the decoder.
        steps: training steps of the two networks.
        batch_size: residuals a step, drawn with replacement.
        learning_rate: Adam's.
        balance: weight of the loss that asks for codes used evenly, `balance_loss`. Wide residuals use their codes
            without it; where residuals are long in few directions it brings more bits into use.
        repulsion: drives apart items whose codes coincide, None for not at all. Codes of all levels are compared,
            distances are those of the tanh outputs.
        iterations: k-means iterations a level.
        max_points_per_centroid: vectors a code that k-means trains on; of more, a sample is drawn.
        seed: start of k-means, initial weights and batches.

    Raises:
        DataError: a setting is out of range.
    """

    method: Literal["rk_fsq"] = "rk_fsq"
    codebook_sizes: tuple[int, ...] = (256, 256)
    n_bits: int = 8
    normalize_residuals: bool = True
    hidden: int = 256
    steps: int = 500
    batch_size: int = 1024
    learning_rate: float = 1e-3
    balance: float = 1.0
    repulsion: HammingRepulsion | AdaptiveRepulsion | None = None
    iterations: int = 25
    max_points_per_centroid: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_kmeans(self.codebook_sizes, self)
        if not 1 <= self.n_bits <= _MOST_BITS:
            raise DataError(
                f"n_bits is {self.n_bits}; give 1 to {_MOST_BITS}. The generator has an output for each of the "
                "2**n_bits codes, so more would make it larger than the rest of the model"
            )
        if min(self.hidden, self.steps, self.batch_size) < 1:
            raise DataError(
                f"hidden {self.hidden}, steps {self.steps}, batch_size {self.batch_size}: give at least 1 of each; "
                "without, nothing is learnt"
            )
        if self.learning_rate <= 0 or self.balance < 0:
            raise DataError(
                f"learning_rate {self.learning_rate}, balance {self.balance}: give a rate above 0 and a weight of 0 or "
                "more; a negative one would train the network away from what it is for"
            )


@dataclass(frozen=True)
class RkFsq:
    """A fitted tokenizer.

    Attributes:
        config: what it was fitted with.
        codebooks: float32 ``[codes, dim]`` of each k-means level.
        scales: float32, mean length of what each k-means level left over in fitting, by which it was divided; ones
            without `normalize_residuals`. Only `decode` needs them.
        mean_D: float32 ``[dim]``, mean residual in fitting.
        spread: root mean square distance of a residual's coordinates from `mean_D` in fitting. One number for all
            dimensions, so that standardising keeps which residuals are near each other. 0 where the residuals were all
            alike: then every vector gets one code, and all that it adds to the k-means levels is `mean_D`.
        network: from standardised residuals to `n_bits` numbers.
        residuals_KD: float32 ``[2**n_bits, dim]``, what the decoder network made of each code. It has done its work.
        n_used: codes of the last level that some vector had in fitting.
    """

    config: RkFsqConfig
    codebooks: tuple[F32, ...] = field(repr=False)
    scales: F32
    mean_D: F32 = field(repr=False)
    spread: float
    network: Mlp = field(repr=False)
    residuals_KD: F32 = field(repr=False)
    n_used: int = 0

    @classmethod
    def fit(cls, x_ND: NDArray[np.floating], config: RkFsqConfig | None = None) -> RkFsq:
        """Learn the k-means levels, then the FSQ level on what they leave over.

        Any number of vectors passes. Where they are fewer than the codes of a k-means level, or all equal, nothing may
        be left over, and the FSQ level gives all the same code; `notes` says so. Equal input, seed and number of
        threads give an equal tokenizer.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty.
        """
        config = config or RkFsqConfig()
        x_ND = checked_vectors(x_ND)
        levels = fit_levels(x_ND, config.codebook_sizes, config, normalize=config.normalize_residuals)
        mean_D = levels.left_ND.mean(axis=0)
        spread = _spread(levels.left_ND, mean_D)
        network, decoded_KD = _train(_standardised(levels.left_ND, mean_D, spread), levels.codes_NL, config)
        residuals_KD = mean_D + np.float32(spread) * decoded_KD
        fitted = cls(config, levels.codebooks, levels.scales, mean_D, spread, network, residuals_KD)
        return replace(fitted, n_used=len(np.unique(fitted.encode(x_ND)[:, -1])))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level, the FSQ level last."""
        return (*(len(codebook) for codebook in self.codebooks), len(self.residuals_KD))

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return int(self.residuals_KD.shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report."""
        *sizes, last = self.codebook_sizes
        notes = notes_on_sizes(self.config.codebook_sizes, tuple(sizes))
        if self.n_used < _WELL_USED * last:
            notes += (f"level {len(sizes)} used {self.n_used} of {last} codes in fitting",)
        return notes

    def encode(self, x_ND: NDArray[np.floating], threads: int | None = None) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``.

        Bit b of the last code, worth ``2**b``, is on where number b of the network is positive. The network computes in
        float64, and a number within 1e-9 of zero counts as off: at a tie the lower code.

        Args:
            x_ND: float ``[N, dim]``.
            threads: how many compute, one a core by default. They change no code.

        Raises:
            DataError: the vectors are not finite or have other dimensions than the codebooks.
        """
        x_ND = checked_vectors(x_ND, self.dim)
        codes_NL = self._levels.encode(x_ND, threads)
        on_NB = self._outputs(x_ND, codes_NL, threads) > 0
        return np.column_stack([codes_NL, on_NB @ (1 << np.arange(self.config.n_bits, dtype=np.int32))])

    def decode(self, codes_NL: Codes) -> F32:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read."""
        return self._levels.decode(codes_NL, self.scales, self.residuals_KD[codes_NL[:, len(self.codebooks)]])

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> F32:
        """Squared distance of the network's tanh outputs to each code's corner, float32 ``[N, 2**n_bits]``.

        The corner of a code has 1 for every bit that is on and -1 for the others.

        Raises:
            DataError: as `encode`.
        """
        x_ND = checked_vectors(x_ND, self.dim)
        z_NB = np.tanh(self._outputs(x_ND, self._levels.encode(x_ND)))
        return ResidualEncoder((_corners(self.config.n_bits),)).last_level_costs(z_NB)

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        tensors: Tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        tensors |= _turned(self.network).tensors("network")
        tensors |= {"scales": self.scales, "mean": self.mean_D, "residuals": self.residuals_KD}
        tensors |= {"spread": np.array([self.spread]), "n_used": np.array([self.n_used])}
        write_tokenizer(path, _FORMAT, self.config, tensors)

    @classmethod
    def load(cls, path: Path) -> RkFsq:
        """Read what `save` wrote; it encodes to the same codes.

        Raises:
            DataError: the file is missing, damaged, or of another tokenizer.
        """
        settings, tensors = read_tokenizer(path, _FORMAT)
        config = TypeAdapter(RkFsqConfig).validate_python(settings)
        return cls(
            config,
            tuple(tensors[f"codebook.{level}"] for level in range(len(config.codebook_sizes))),
            tensors["scales"],
            tensors["mean"],
            tensors["spread"].item(),
            _turned(Mlp.stored(tensors, "network")),
            tensors["residuals"],
            tensors["n_used"].item(),
        )

    @cached_property
    def _levels(self) -> ResidualEncoder:
        return ResidualEncoder(self.codebooks, normalize=[self.config.normalize_residuals] * len(self.codebooks))

    def _outputs(self, x_ND: F32, codes_NL: Codes, threads: int | None = None) -> F64:
        """Outputs of the network before tanh, float64 ``[N, n_bits]``; those that are ties are zero."""
        outputs_NB = np.empty((len(x_ND), self.config.n_bits))

        def work(blocks: Iterator[slice]) -> None:
            # Always as many rows: the shape of a matrix product decides how it rounds.
            padded_ND = np.zeros((_ROWS_A_BLOCK, self.dim))
            for rows in blocks:
                residual_ND, _ = self._levels.residuals(x_ND[rows], codes_NL[rows])
                padded_ND[: len(residual_ND)] = _standardised(residual_ND, self.mean_D, self.spread)
                outputs_NB[rows] = self.network(padded_ND)[: len(residual_ND)]

        over_blocks(len(x_ND), _ROWS_A_BLOCK, work, threads)
        outputs_NB[np.abs(outputs_NB) <= _TIE] = 0
        return outputs_NB


def _spread(residual_ND: F32, mean_D: F32) -> float:
    """Root mean square distance of coordinates from their mean; 0 where that is rounding noise."""
    spread = float(np.sqrt(np.square(residual_ND - mean_D).mean()))
    return spread if spread > VANISHED * float(np.sqrt(np.square(residual_ND).mean())) else 0.0


def _standardised(residual_ND: NDArray[Float], mean_D: F32, spread: float) -> NDArray[Float]:
    """Residuals as the network takes them, of the same dtype."""
    return (residual_ND - mean_D) * residual_ND.dtype.type(1 / spread if spread else 0)


def straight_through_signs(z: Tensor) -> Tensor:
    """1 where `z` is positive and -1 elsewhere; the gradient passes as if nothing had been rounded."""
    signs = (z > 0).to(z.dtype) * 2 - 1
    return z + (signs - z).detach()


def balance_loss(z_NB: Tensor) -> Tensor:
    """How far a batch is from using all codes evenly: 1 minus the entropy of its mean code distribution over ``ln K``.

    An output z is on with probability ``(1 + z) / 2``, so a row has a distribution over the ``K = 2**n_bits`` codes
    and a gradient. 0 where all codes are equally likely, 1 where all rows have one code for certain. This is the
    half of the entropy penalty of lookup-free quantisation (Yu et al., arXiv 2310.05737) that asks for all codes to be
    used, scaled to a share.

    Args:
        z_NB: tanh outputs, float ``[N, n_bits]``.
    """
    import torch

    share_NK = torch.ones_like(z_NB[:, :1])
    for on_N1 in (1 + z_NB.T[:, :, None]) / 2:  # from the lowest bit up
        share_NK = torch.cat([share_NK * (1 - on_N1), share_NK * on_N1], dim=1)
    share_K = share_NK.mean(dim=0).clamp_min(_UNUSED)
    entropy: Tensor = torch.special.entr(share_K).sum()
    return 1 - entropy / math.log(len(share_K))


def _train(x_ND: F32, coarse_NL: Codes, config: RkFsqConfig) -> tuple[Mlp, F32]:
    """The trained encoder, and what the decoder makes of each code, float32 ``[2**n_bits, dim]``."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        widths = (x_ND.shape[1], config.hidden, config.n_bits)
        encoder, decoder = trainable(widths), trainable(widths[::-1])
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=config.learning_rate)
        for step in range(config.steps):
            rows_N = torch.randint(len(x_ND), (config.batch_size,))
            batch_ND = torch.from_numpy(x_ND[rows_N.numpy()])
            z_NB = torch.tanh(encoder(batch_ND))
            loss = (decoder(straight_through_signs(z_NB)) - batch_ND).square().mean()
            loss = loss + config.balance * balance_loss(z_NB)
            if config.repulsion is not None:
                codes_NL = _with_last_code(torch.from_numpy(coarse_NL[rows_N.numpy()]), z_NB)
                no_partner_N = torch.full_like(rows_N, -1)
                progress = step / config.steps
                loss = loss + config.repulsion.loss(codes_NL, z_NB, rows_N, no_partner_N, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            decoded_KD = decoder(torch.from_numpy(_corners(config.n_bits))).numpy()
    return Mlp.trained(encoder), decoded_KD


def _with_last_code(coarse_NL: Tensor, z_NB: Tensor) -> Tensor:
    """Codes of all levels, int64 ``[N, n_levels]``."""
    import torch

    last_N = ((z_NB > 0).long() * (1 << torch.arange(z_NB.shape[1]))).sum(dim=1)
    return torch.cat([coarse_NL.long(), last_N[:, None]], dim=1)


def _turned(network: Mlp) -> Mlp:
    """Weights ``[in, out]`` instead of ``[out, in]``, or back: this format's files hold them so."""
    return replace(network, weights=tuple(np.ascontiguousarray(weight.T) for weight in network.weights))


def _corners(n_bits: int) -> F32:
    """Corner of every code, 1 for a bit that is on and -1 for the others, float32 ``[2**n_bits, n_bits]``."""
    on_KB = np.arange(2**n_bits)[:, None] >> np.arange(n_bits) & 1
    return (2 * on_KB - 1).astype(np.float32)
