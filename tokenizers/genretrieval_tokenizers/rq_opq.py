"""RQ-OPQ: residual k-means levels, then an optimised product quantiser on what they leave over.

The tokenizer of OneSearch (arXiv 2509.03236). Optimised product quantisation (Ge, He, Ke and Sun, CVPR 2013) rotates
what is left, cuts it into sub-vectors and gives each a codebook of its own.

A row ``c`` of the codebook of sub-vector m stands for the vector ``A_m^T c``, where ``A_m`` are the rows of the
rotation that make the sub-vector; and ``|A_m r - c|^2`` and ``|r - A_m^T c|^2`` differ by the same for all ``c``,
because ``A_m`` is orthonormal. So the sub-vectors are kept as further residual levels, whose codebooks are orthogonal
to each other: one encoder serves them all, and nothing is rotated after fitting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.quantise import F32, ResidualEncoder, one_thread, span
from genretrieval_tokenizers.rq_kmeans import check_kmeans, fit_levels, kmeans_codebook, notes_on_sizes
from genretrieval_tokenizers.storage import read_tokenizer, write_tokenizer
from genretrieval_tokenizers.tokenizer import checked_vectors

_FORMAT = "genretrieval.rq_opq.1"
_ROTATION_ROUNDS = 10  # more did not lower the error on Beauty


@dataclass(frozen=True, slots=True)
class RqOpqConfig:
    """Settings of RQ-OPQ.

    Attributes:
        method: tag of these settings in a recipe.
        codebook_sizes: codes of each residual level wanted; the OPQ levels come behind them. The default is for
            thousands of items; OneSearch has (4096, 1024, 512) for a large catalogue.
        n_subvectors: OPQ levels. OneSearch found 2 best and more to hurt.
        subvector_codes: codes of each OPQ level wanted.
        normalize_residuals: scale what a residual level leaves over to length 1 before the next one: fewer collisions
            at the same error.
        iterations: k-means iterations a level.
        max_points_per_centroid: vectors a code that k-means trains on; of more, a sample is drawn.
        seed: start of k-means.

    Raises:
        DataError: a setting is out of range.
    """

    method: Literal["rq_opq"] = "rq_opq"
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    n_subvectors: int = 2
    subvector_codes: int = 256
    normalize_residuals: bool = True
    iterations: int = 25
    max_points_per_centroid: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_kmeans(self.codebook_sizes, self)
        if self.n_subvectors < 1 or self.subvector_codes < 1:
            raise DataError(
                f"n_subvectors {self.n_subvectors}, subvector_codes {self.subvector_codes}: give at least 1 of each, "
                "or choose method: rq_kmeans to go without"
            )


@dataclass(frozen=True)
class RqOpq:
    """A fitted tokenizer.

    Attributes:
        config: what it was fitted with.
        codebooks: float32 ``[codes, dim]`` a level, those of the sub-vectors turned back to where the vectors are.
        scales: float32 ``[n_levels]``, mean length of what each residual level left over in fitting, by which the next
            one was divided; ones for the OPQ levels, and without `normalize_residuals`. Only `decode` needs them.
    """

    config: RqOpqConfig
    codebooks: tuple[F32, ...] = field(repr=False)
    scales: F32

    @classmethod
    def fit(cls, x_ND: NDArray[np.floating], config: RqOpqConfig | None = None) -> RqOpq:
        """Learn the codebooks.

        Give it items, or items and queries together, one below the other: then queries, too, have codes that fit them,
        as OneSearch does it. A level with no more distinct vectors than codes takes these as its codes; `notes` says
        where that happened. Equal input, seed and number of threads give equal codebooks.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty.
        """
        config = config or RqOpqConfig()
        x_ND = checked_vectors(x_ND)
        levels = fit_levels(x_ND, config.codebook_sizes, config, normalize=config.normalize_residuals)
        subvectors = _fit_opq(levels.left_ND, config)
        scales = np.concatenate([levels.scales, np.ones(len(subvectors), np.float32)])
        return cls(config, (*levels.codebooks, *subvectors), scales)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level, the OPQ levels last."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return int(self.codebooks[0].shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report."""
        wanted = (*self.config.codebook_sizes, *[self.config.subvector_codes] * self.config.n_subvectors)
        return notes_on_sizes(wanted, self.codebook_sizes)

    def encode(self, x_ND: NDArray[np.floating], threads: int | None = None) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``. The same vector gets the same codes whatever stands beside it.

        Args:
            x_ND: float ``[N, dim]``, items or queries.
            threads: how many compute, one a core by default. They change no code.

        Raises:
            DataError: the vectors are not finite or have other dimensions than the codebooks.
        """
        return self._encoder.encode(checked_vectors(x_ND, self.dim), threads)

    def decode(self, codes_NL: Codes) -> F32:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read."""
        return self._encoder.decode(codes_NL, self.scales)

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> F32:
        """Squared distances to the codes of the last sub-vector; `Tokenizer.last_level_costs` says more.

        Raises:
            DataError: as `encode`.
        """
        return self._encoder.last_level_costs(checked_vectors(x_ND, self.dim))

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        codebooks = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        write_tokenizer(path, _FORMAT, self.config, {**codebooks, "scales": self.scales})

    @classmethod
    def load(cls, path: Path) -> RqOpq:
        """Read what `save` wrote; it encodes to the same codes.

        Raises:
            DataError: the file is missing, damaged, or of another tokenizer.
        """
        settings, tensors = read_tokenizer(path, _FORMAT)
        config = TypeAdapter(RqOpqConfig).validate_python(settings)
        n_levels = len(config.codebook_sizes) + config.n_subvectors
        return cls(config, tuple(tensors[f"codebook.{level}"] for level in range(n_levels)), tensors["scales"])

    @cached_property
    def _encoder(self) -> ResidualEncoder:
        n_residual = len(self.config.codebook_sizes)
        normalize = [self.config.normalize_residuals and level < n_residual for level in range(len(self.codebooks))]
        return ResidualEncoder(self.codebooks, normalize=normalize)


def _fit_opq(r_ND: F32, config: RqOpqConfig) -> list[F32]:
    """Codebook of each sub-vector, float32 ``[codes, dim]``, not in the sub-vector's space but in that of `r_ND`."""
    codebooks = []
    for number, axes_SD in enumerate(np.array_split(_rotation(r_ND, config), config.n_subvectors)):
        if not len(axes_SD):  # a single item, or equal ones, may be embedded in fewer dimensions than sub-vectors
            codebooks.append(np.zeros((1, r_ND.shape[1]), np.float32))
            continue
        seed = config.seed + len(config.codebook_sizes) + number
        codebook_KS = kmeans_codebook(r_ND @ axes_SD.T, config.subvector_codes, config, seed, "random")
        codebooks.append(codebook_KS @ axes_SD)
    return codebooks


def _rotation(r_ND: F32, config: RqOpqConfig) -> F32:
    """Orthonormal rows, float32 ``[R, dim]``, R being the largest multiple of `n_subvectors` in `dim`.

    It is learned with as many codes as whole bits can name; of fewer vectors there is nothing to learn, and it cuts
    them as they are. Fewer vectors than dimensions are rotated in the space that they lie in. Of fewer dimensions than
    sub-vectors each is a sub-vector, and the last sub-vectors have none.
    """
    if r_ND.shape[1] < config.n_subvectors:
        return np.eye(r_ND.shape[1], dtype=np.float32)
    rotated = r_ND.shape[1] // config.n_subvectors * config.n_subvectors
    bits = max(1, (config.subvector_codes - 1).bit_length())
    if len(r_ND) < 2**bits:
        return np.eye(rotated, r_ND.shape[1], dtype=np.float32)
    if len(r_ND) < r_ND.shape[1]:
        span_DN = span(r_ND)
        return _rotation(r_ND @ span_DN, config) @ span_DN.T
    opq = faiss.OPQMatrix(r_ND.shape[1], config.n_subvectors, rotated)
    quantiser = faiss.ProductQuantizer(rotated, config.n_subvectors, bits)
    quantiser.cp.min_points_per_centroid = 1  # below 39 faiss prints a warning; few items are no fault
    quantiser.cp.seed = config.seed
    opq.pq = quantiser
    opq.niter = _ROTATION_ROUNDS
    with one_thread():  # its many small decompositions only lose to threads
        opq.train(r_ND)
    axes_RD: F32 = faiss.vector_to_array(opq.A).reshape(rotated, r_ND.shape[1])
    return axes_RD
