"""RQ-VAE: an autoencoder whose latent vector is quantised level by level while it is learned.

TIGER (arXiv 2305.05065), trained so that it keeps its codes in use: standardised inputs, codebooks that start from
k-means and follow the encoder by moving averages, and dead codes revived. With a repulsion it is the tokenizer of
QuaSID (arXiv 2603.00632) or AdaSID (arXiv 2604.23522), with pairs and a contrastive loss the whole method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.adasid import AdaptiveRepulsion
from genretrieval_tokenizers.contrast import Contrast
from genretrieval_tokenizers.mlp import Mlp, trainable
from genretrieval_tokenizers.quantise import F32, F64, ResidualEncoder, lloyd, nearest_codes
from genretrieval_tokenizers.quasid import HammingRepulsion
from genretrieval_tokenizers.rq_kmeans import check_codebook_sizes, notes_on_sizes
from genretrieval_tokenizers.storage import Tensors, read_tokenizer, write_tokenizer
from genretrieval_tokenizers.tokenizer import BLOCK, checked_vectors

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "genretrieval.rq_vae.1"
_CONSTANT = 1e-6
"""A dimension that varies by less than this share of its mean is constant: float32 holds no more digits."""


@dataclass(frozen=True, slots=True)
class RqVaeConfig:
    """Settings of RQ-VAE, and of QuaSID and AdaSID, which add to its loss.

    Attributes:
        method: tag of this method in recipes.
        codebook_sizes: codes of each level wanted; a level gets as many as it has distinct vectors where that is fewer.
        scale: inputs are centred and divided by one standard deviation, that of all dimensions together (common), or
            each by its own (dimension). The latter makes every dimension equally important: of a text part of 384
            dimensions and a collaborative part of 64, both of length 1, hardly more than the text is then encoded.
        latent_dim: dimensions of the latent vector that is quantised.
        unit_latent: scale latent vectors to length 1. A repulsion and a contrastive loss act on directions while codes
            go by distance: without it, items can be turned apart near zero and still share their codes. With it
            collisions fall further, and so does what a generator makes of the IDs (docs/tokenizers.md), so it is off.
        hidden_sizes: widths of the encoder between input and latent vector; the decoder has them in reverse.
        epochs: passes over the items.
        batch_size: items a step; with pairs, each of them brings one of its Swing targets along.
        learning_rate: of AdamW, falling linearly to 0.
        weight_decay: of AdamW.
        commitment: weight of the loss that keeps the encoder near the codes it chose. It and the reconstruction loss
            are means over items and dimensions.
        ema_decay: what a code's moving averages keep at each step.
        revive_every: steps between revivals of dead codes; each takes the place of a random vector of the batch.
        revive_below: share of an even load under which a code counts as dead.
        revive_until: progress of training, in ``[0, 1]``, after which none is revived, so that codes can settle.
        kmeans_iterations: k-means iterations a codebook, at the start and, from where training left it, at the end.
        repulsion: pushes items apart whose codes coincide; None for none.
        contrast: pulls Swing pairs together; None for none.
        seed: start of the weights and of k-means, and order of the batches.

    Raises:
        DataError: a setting is out of range.
    """

    method: Literal["rq_vae"] = "rq_vae"
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    scale: Literal["common", "dimension"] = "common"
    latent_dim: int = 32
    unit_latent: bool = False
    hidden_sizes: tuple[int, ...] = (512, 256)
    epochs: int = 40
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    commitment: float = 0.25
    ema_decay: float = 0.99
    revive_every: int = 50
    revive_below: float = 0.1
    revive_until: float = 0.75
    kmeans_iterations: int = 10
    repulsion: HammingRepulsion | AdaptiveRepulsion | None = None
    contrast: Contrast | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_codebook_sizes(self.codebook_sizes)
        if self.scale not in ("common", "dimension"):
            raise DataError(f"scale is {self.scale!r}; choose common or dimension")
        if min((self.latent_dim, *self.hidden_sizes)) < 1:
            raise DataError(
                f"latent_dim {self.latent_dim}, hidden_sizes {self.hidden_sizes}: a layer needs at least one dimension"
            )
        counts = ("epochs", "batch_size", "revive_every", "kmeans_iterations")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise DataError(f"{', '.join(low)} must be at least 1; nothing would be learned")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.commitment < 0:
            raise DataError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}, commitment {self.commitment}: "
                "the first must be above 0, the others not below; training would go the wrong way"
            )
        if not (0 <= self.ema_decay < 1 and 0 <= self.revive_below < 1 and 0 <= self.revive_until <= 1):
            raise DataError(
                f"ema_decay {self.ema_decay}, revive_below {self.revive_below}, revive_until {self.revive_until}: they "
                "are shares; with 1 for either of the first two, codes would never move or never settle"
            )


@dataclass(frozen=True)
class RqVae:
    """A fitted RQ-VAE; it satisfies `Tokenizer`. A repulsion or contrast has done its work and is not read any more.

    Attributes:
        config: what it was fitted with.
        mean: float32 ``[dim]``, mean of the items.
        std: float32 ``[dim]``, what is divided by, as `RqVaeConfig.scale` says; 1 where a dimension is constant.
        encoder: standardised vector to latent vector.
        decoder: latent vector to standardised vector.
        codebooks: float32 ``[codebook size, latent_dim]`` a level.
    """

    config: RqVaeConfig
    mean: F32 = field(repr=False)
    std: F32 = field(repr=False)
    encoder: Mlp = field(repr=False)
    decoder: Mlp = field(repr=False)
    codebooks: tuple[F32, ...] = field(repr=False)

    @classmethod
    def fit(
        cls, x_ND: NDArray[np.floating], config: RqVaeConfig | None = None, pairs_P2: NDArray[np.integer] | None = None
    ) -> RqVae:
        """Learn encoder, codebooks and decoder, on the CPU.

        Every item is seen once an epoch. With pairs and a repulsion or contrast, an item that has Swing targets
        brings a random one along, so that a step of `batch_size` items holds up to as many pairs. Equal input, seed
        and number of threads give equal codebooks; the seeds of torch and NumPy are left as they are.

        Args:
            x_ND: float ``[N, dim]``.
            config: settings.
            pairs_P2: int ``[P, 2]``, rows of `x_ND` that belong together, a trigger and a target each
                (`genretrieval_tokenizers.swing`). The contrastive loss needs them; a repulsion uses them to spare
                items that belong together; otherwise they are not read.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty; there are no pairs where they are needed,
                or they are not of these items; or training diverged.
        """
        config = config or RqVaeConfig()
        x_ND = checked_vectors(x_ND)
        _check_pairs(pairs_P2, len(x_ND), config)
        mean_D, std_D = _mean_and_std(x_ND, config.scale)
        x_ND = (x_ND - mean_D) / std_D
        encoder, decoder, codebooks = _train(x_ND, config, pairs_P2)
        z_ND = _rounded_latent(encoder, x_ND)
        if not np.isfinite(z_ND).all():
            raise DataError(
                f"RQ-VAE diverged: with learning_rate {config.learning_rate} the latent vectors are no longer finite, "
                "and no ID could be computed; give a smaller learning_rate"
            )
        codebooks = tuple(_residual_kmeans(z_ND, config, codebooks))
        return cls(config, mean_D, std_D, encoder, decoder, codebooks)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return len(self.mean)

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report."""
        return notes_on_sizes(self.config.codebook_sizes, self.codebook_sizes)

    def encode(self, x_ND: NDArray[np.floating]) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``; `Tokenizer.encode` says more."""
        return self._levels.encode(self._latent(x_ND))

    def decode(self, codes_NL: Codes) -> F32:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read."""
        z_ND = np.zeros((len(codes_NL), self.config.latent_dim))
        for level, codebook_KD in enumerate(self.codebooks):
            z_ND += codebook_KD[codes_NL[:, level]]
        x_ND = _blockwise(self.decoder, z_ND) * self.std + self.mean
        return x_ND.astype(np.float32)

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> F32:
        """Squared latent distances to the codes of the last level; `Tokenizer.last_level_costs` says more."""
        return self._levels.last_level_costs(self._latent(x_ND))

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        tensors: Tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        tensors |= {"mean": self.mean, "std": self.std}
        tensors |= self.encoder.tensors("encoder") | self.decoder.tensors("decoder")
        write_tokenizer(path, _FORMAT, self.config, tensors)

    @classmethod
    def load(cls, path: Path) -> RqVae:
        """Read what `save` wrote; it encodes to the same IDs.

        Raises:
            DataError: the file is missing, damaged, or of another method.
        """
        settings, tensors = read_tokenizer(path, _FORMAT)
        config = TypeAdapter(RqVaeConfig).validate_python(settings)
        codebooks = tuple(tensors[f"codebook.{level}"] for level in range(len(config.codebook_sizes)))
        encoder = Mlp.stored(tensors, "encoder", unit=config.unit_latent)
        decoder = Mlp.stored(tensors, "decoder")
        return cls(config, tensors["mean"], tensors["std"], encoder, decoder, codebooks)

    @cached_property
    def _levels(self) -> ResidualEncoder:
        return ResidualEncoder(self.codebooks)

    def _latent(self, x_ND: NDArray[np.floating]) -> F64:
        """What the levels quantise, ``[N, latent_dim]``."""

        def encoded(rows_ND: F32) -> F64:
            return self.encoder((rows_ND.astype(np.float64) - self.mean) / self.std)

        return _blockwise(encoded, checked_vectors(x_ND, self.dim))


class EmaCodebook:
    """A codebook in training: each code follows the mean of the vectors that chose it."""

    def __init__(self, vectors_KD: Tensor, loads_K: Tensor, decay: float) -> None:
        """Start from vectors and from the number of vectors of a batch that each is expected to draw."""
        self.vectors_KD = vectors_KD
        self.loads_K = loads_K
        self.decay = decay

    def nearest(self, x_ND: Tensor) -> Tensor:
        """Codes, int64 ``[N]``. In float32: while training, a near-tie may fall either way."""
        return (self.vectors_KD.square().sum(dim=1) - 2 * x_ND @ self.vectors_KD.T).argmin(dim=1)

    def follow(self, x_ND: Tensor, codes_N: Tensor) -> None:
        """Move the codes towards the vectors that chose them."""
        import torch

        chosen_NK = torch.nn.functional.one_hot(codes_N, len(self.vectors_KD)).to(x_ND.dtype)
        count_K = chosen_NK.sum(dim=0)
        self.loads_K = self.decay * self.loads_K + (1 - self.decay) * count_K
        # Sum over count, both moving averages, written as a step: an unused code stays where it is.
        offset_KD = chosen_NK.T @ x_ND - count_K[:, None] * self.vectors_KD
        step_K = torch.where(count_K > 0, (1 - self.decay) / self.loads_K, 0)
        self.vectors_KD = self.vectors_KD + step_K[:, None] * offset_KD

    def revive(self, x_ND: Tensor, below: float) -> None:
        """Set codes with less than `below` of an even load to random vectors, with an even load."""
        import torch

        even = float(self.loads_K.mean())
        dead = torch.nonzero(self.loads_K < below * even).ravel()
        self.vectors_KD[dead] = x_ND[torch.randint(len(x_ND), (len(dead),))]
        self.loads_K[dead] = even


def _train(x_ND: F32, config: RqVaeConfig, pairs_P2: NDArray[np.integer] | None) -> tuple[Mlp, Mlp, tuple[F32, ...]]:
    """Encoder, decoder and codebooks after `config.epochs` passes over standardised items."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        widths = (x_ND.shape[1], *config.hidden_sizes, config.latent_dim)
        encoder, decoder = trainable(widths), trainable(widths[::-1])
        levels = _start(_rounded_latent(Mlp.trained(encoder, unit=config.unit_latent), x_ND), config)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        items = torch.from_numpy(x_ND)
        n_steps = config.epochs * -(-len(x_ND) // config.batch_size)
        for step, (rows_N, partner_N) in enumerate(_batches(len(x_ND), config, pairs_P2)):
            progress = step / n_steps
            z_ND = encoder(items[rows_N])
            if config.unit_latent:
                z_ND = torch.nn.functional.normalize(z_ND, dim=1)
            codes_NL, residuals, quantised_ND, commitment = _quantise_in_training(z_ND, levels)
            decoded = decoder(z_ND + (quantised_ND - z_ND).detach())  # straight-through: the gradient skips the codes
            loss = (decoded - items[rows_N]).square().mean() + config.commitment * commitment
            if config.repulsion:
                loss = loss + config.repulsion.loss(codes_NL, z_ND, rows_N, partner_N, progress)
            if config.contrast:
                loss = loss + _contrast(config.contrast, z_ND, rows_N, partner_N, progress)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            revive = (step + 1) % config.revive_every == 0 and progress < config.revive_until
            for level, residual_ND, codes_N in zip(levels, residuals, codes_NL.T, strict=True):
                level.follow(residual_ND, codes_N)
                if revive:
                    level.revive(residual_ND, config.revive_below)
        return (
            Mlp.trained(encoder, unit=config.unit_latent),
            Mlp.trained(decoder),
            tuple(level.vectors_KD.numpy() for level in levels),
        )


def _quantise_in_training(z_ND: Tensor, levels: list[EmaCodebook]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Codes, each level's input, the sum of the codes' vectors, and the commitment loss summed over levels."""
    import torch

    codes, residuals, quantised_ND, commitment = [], [], torch.zeros_like(z_ND), z_ND.new_zeros(())
    for level in levels:
        residuals.append((z_ND - quantised_ND).detach())
        codes.append(level.nearest(residuals[-1]))
        quantised_ND = quantised_ND + level.vectors_KD[codes[-1]]
        commitment = commitment + (z_ND - quantised_ND).square().mean()
    return torch.stack(codes, dim=1), residuals, quantised_ND, commitment


def _contrast(contrast: Contrast, z_ND: Tensor, items_N: Tensor, partner_N: Tensor, progress: float) -> Tensor:
    """Contrastive loss over the pairs of a batch; a target stands below its trigger."""
    import torch

    trigger_B = torch.nonzero(partner_N > torch.arange(len(partner_N))).ravel()
    target_B = partner_N[trigger_B]
    return contrast.loss(z_ND[trigger_B], z_ND[target_B], items_N[trigger_B], items_N[target_B], progress)


def _batches(n: int, config: RqVaeConfig, pairs_P2: NDArray[np.integer] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Item rows and partners of each step: a new order every epoch, targets drawn anew."""
    import torch

    offsets, targets = None, None
    if pairs_P2 is not None and (config.repulsion or config.contrast):
        by_trigger_P2 = pairs_P2[np.argsort(pairs_P2[:, 0], kind="stable")].astype(np.int64)
        offsets = torch.from_numpy(np.searchsorted(by_trigger_P2[:, 0], np.arange(n + 1)))
        targets = torch.from_numpy(by_trigger_P2[:, 1])
    for _ in range(config.epochs):
        order_N = torch.randperm(n)
        for start in range(0, n, config.batch_size):
            rows_B = order_N[start : start + config.batch_size]
            if offsets is None or targets is None:
                yield rows_B, torch.full_like(rows_B, -1)
                continue
            n_targets_B = offsets[rows_B + 1] - offsets[rows_B]
            drawn_B = offsets[rows_B] + (torch.rand(len(rows_B)) * n_targets_B).long()
            trigger_P = torch.nonzero(n_targets_B).ravel()
            target_P = len(rows_B) + torch.arange(len(trigger_P))
            rows_N = torch.cat([rows_B, targets[drawn_B[trigger_P]]])
            partner_N = torch.full_like(rows_N, -1)
            partner_N[trigger_P], partner_N[target_P] = target_P, trigger_P
            yield rows_N, partner_N


def _start(z_ND: F32, config: RqVaeConfig) -> list[EmaCodebook]:
    """Codebooks from k-means on the latent vectors of the untrained encoder."""
    import torch

    return [
        EmaCodebook(
            torch.from_numpy(codebook_KD.copy()),
            torch.full((len(codebook_KD),), min(config.batch_size, len(z_ND)) / len(codebook_KD)),
            config.ema_decay,
        )
        for codebook_KD in _residual_kmeans(z_ND, config)
    ]


def _residual_kmeans(z_ND: F32, config: RqVaeConfig, start: Sequence[F32] | None = None) -> list[F32]:
    """Codebooks of latent vectors, level after level; k-means sets out from `start` where it is given."""
    residual_ND, codebooks = z_ND, []
    for level, size in enumerate(config.codebook_sizes):
        codebook_KD = _kmeans(residual_ND, size, config, level, start[level] if start else None)
        residual_ND = residual_ND - codebook_KD[nearest_codes(residual_ND, codebook_KD)]
        codebooks.append(codebook_KD)
    return codebooks


def _kmeans(x_ND: F32, size: int, config: RqVaeConfig, level: int, start_KD: F32 | None) -> F32:
    """Codebook of a level, float32 ``[at most size, D]``: the distinct ones, ascending, where these are few."""
    distinct_KD = np.unique(x_ND, axis=0)
    if len(distinct_KD) <= size:
        return distinct_KD
    # A level that started from fewer vectors than codes has too few to go on from.
    start_KD = start_KD if start_KD is not None and len(start_KD) == size else None
    return lloyd(x_ND, size, start_KD=start_KD, niter=config.kmeans_iterations, seed=config.seed + level)


def _rounded_latent(encoder: Mlp, x_ND: F32) -> F32:
    """Latent vectors of standardised items: float64 rounded to float32, so that those of equal items are equal."""
    return _blockwise(lambda rows_ND: encoder(rows_ND.astype(np.float64)), x_ND).astype(np.float32)


def _blockwise(step: Callable[[NDArray[Any]], F64], x_ND: NDArray[Any]) -> F64:
    """`step` on blocks of `BLOCK` rows, the last one padded with zeros."""
    out = []
    for start in range(0, max(len(x_ND), 1), BLOCK):
        rows_ND = x_ND[start : start + BLOCK]
        block_ND = np.zeros((BLOCK, x_ND.shape[1]), x_ND.dtype)
        block_ND[: len(rows_ND)] = rows_ND
        out.append(step(block_ND)[: len(rows_ND)])
    return np.concatenate(out)


def _mean_and_std(x_ND: F32, scale: str) -> tuple[F32, F32]:
    """What is subtracted from each dimension, and by what it is divided: 1 where it does not vary."""
    mean_D, std_D = x_ND.mean(axis=0, dtype=np.float64), x_ND.std(axis=0, dtype=np.float64)
    varies_D = std_D > _CONSTANT * np.abs(mean_D)
    if scale == "common" and varies_D.any():
        std_D = np.full_like(std_D, np.sqrt(np.square(std_D[varies_D]).mean()))
    return mean_D.astype(np.float32), np.where(varies_D, std_D, 1).astype(np.float32)


def _check_pairs(pairs_P2: NDArray[np.integer] | None, n_items: int, config: RqVaeConfig) -> None:
    if pairs_P2 is None or not len(pairs_P2):
        if config.contrast:
            raise DataError(
                "the contrastive loss of RQ-VAE pulls pairs of items together, and there are none: give pairs "
                "(`genretrieval_tokenizers.swing` makes them of training histories), or set contrast to null; without "
                "it, collaborative signal reaches the IDs through the embeddings alone"
            )
    elif pairs_P2.ndim != 2 or pairs_P2.shape[1] != 2 or pairs_P2.min() < 0 or pairs_P2.max() >= n_items:
        raise DataError(
            f"pairs have shape {pairs_P2.shape} and rows from {pairs_P2.min()} to {pairs_P2.max()}; expected [P, 2] "
            f"with rows of the {n_items} items that are fitted: pairs of other items would teach wrong neighbours"
        )
