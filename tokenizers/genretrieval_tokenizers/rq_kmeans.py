"""RQ-KMeans: k-means level by level, each level on what the levels above left over.

Residual quantisation (Chen, Guan and Wang, "Approximate nearest neighbor search by residual vector quantization",
Sensors 2010), as semantic-ID tokenizer in GRID (arXiv 2507.22224) and OneSearch (arXiv 2509.03236).

The last level can be more even than k-means makes it. OneSearch's way is k-means of its own under every parent, the
tuple of codes above ("per_parent"). The other one caps what a code may hold ("balanced"): every code of the last level
has a price, a vector takes the code of least squared distance plus price, and prices rise until no code is overfull.
They are the dual variables of the capacitated assignment problem, found by auction (Bertsekas, "The auction algorithm",
Annals of Operations Research 14, 1988), so unlike that assignment a code stays a function of the vector alone. Only the
last level: balancing all of them destroys the hierarchy (OneSearch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.quantise import F32, F64, ResidualEncoder, Start, kmeans, nearest_codes
from genretrieval_tokenizers.storage import Tensors, read_tokenizer, write_tokenizer
from genretrieval_tokenizers.tokenizer import BLOCK, checked_vectors

_FORMAT = "genretrieval.rq_kmeans.2"
_BALANCING_ROUNDS = 5
_AUCTION_ROUNDS = 1000
_SLACK = 1.1
_SMALLEST_STEP = 1e-8  # of a price, as a share of the costs: more than what counts as a tie
_COSTS_HELD = 2**25  # float64, 256 MiB


@dataclass(frozen=True, slots=True)
class RqKMeansConfig:
    """Settings of RQ-KMeans.

    Attributes:
        method: tag of these settings in a recipe.
        codebook_sizes: codes of each level wanted; a level gets as many as it has distinct vectors where that is
            fewer.
        normalize_residuals: scale what a level leaves over to length 1 before the next one. Long residuals otherwise
            draw most codes to themselves while one code near zero holds most items.
        last_level: "plain" is k-means as on the levels above; "balanced" caps what a code holds; "per_parent" is
            k-means of its own under every tuple of the codes above, and its codes mean something only below that.
        capacity_slack: balanced only: a code of the last level shall hold at most this many times its even share of
            the items. 1 is an even share for all; the lower, the further are codes from being the nearest ones.
        iterations: k-means iterations a level.
        max_points_per_centroid: vectors a code that k-means trains on; of more, a sample is drawn.
        seed: start of k-means.

    Raises:
        DataError: a setting is out of range, or `last_level` ignores it.
    """

    method: Literal["rq_kmeans"] = "rq_kmeans"
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    normalize_residuals: bool = True
    last_level: Literal["plain", "balanced", "per_parent"] = "plain"
    capacity_slack: float = _SLACK
    iterations: int = 25
    max_points_per_centroid: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_kmeans(self.codebook_sizes, self)
        if self.last_level not in ("plain", "balanced", "per_parent"):
            raise DataError(f"last_level is {self.last_level!r}; choose plain, balanced or per_parent")
        if self.last_level == "per_parent" and len(self.codebook_sizes) < 2:
            raise DataError(
                f"codebook_sizes {self.codebook_sizes}: a level per parent needs a level above it; give two sizes or "
                "more, or last_level: plain"
            )
        if not self.capacity_slack >= 1:
            raise DataError(
                f"capacity_slack is {self.capacity_slack}; give 1 or more, as with less there is not room for all items"
            )
        if self.capacity_slack != _SLACK and self.last_level != "balanced":
            raise DataError(
                f"capacity_slack is what a code of a balanced last level may hold, and last_level is "
                f"{self.last_level!r}; leave it out, or set last_level: balanced"
            )


@dataclass(frozen=True, slots=True)
class ParentCodebooks:
    """A last level of its own under every parent, the tuple of codes above it.

    Attributes:
        keys_P: int64 ``[P]``, ascending: the parents met in fitting, as one number each.
        starts_Q: int64 ``[P + 2]``, where in `centroids_CD` the codebook of each parent starts and, behind them, that
            of all items together, for parents that were not met; then its end.
        centroids_CD: float32 ``[C, D]``, codebook after codebook; none is empty.
    """

    keys_P: NDArray[np.int64]
    starts_Q: NDArray[np.int64]
    centroids_CD: F32

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Codes of each codebook, int64 ``[P + 1]``."""
        return np.diff(self.starts_Q)

    def find(self, keys_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which codebook parents have, int64 ``[N]``."""
        found_N = np.minimum(np.searchsorted(self.keys_P, keys_N), len(self.keys_P) - 1)
        return np.where(self.keys_P[found_N] == keys_N, found_N, len(self.keys_P))

    def codebook(self, number: int) -> F32:
        """One codebook, float32 ``[codes, D]``."""
        return self.centroids_CD[self.starts_Q[number] : self.starts_Q[number + 1]]


@dataclass(frozen=True)
class RqKMeans:
    """A fitted tokenizer.

    Attributes:
        config: what it was fitted with.
        codebooks: float32 ``[codes, dim]`` a level; without the last level where that is `parents`.
        scales: float32 ``[n_levels]``, mean length of what each level left over in fitting, by which the next one was
            divided; ones without `normalize_residuals`. Only `decode` needs them.
        prices_K: balanced only: float64 ``[codes of the last level]``, added to its squared distances.
        largest_load: balanced only: how many items of the fit the fullest code of the last level holds.
        parents: per_parent only: the last level.
    """

    config: RqKMeansConfig
    codebooks: tuple[F32, ...] = field(repr=False)
    scales: F32
    prices_K: F64 | None = field(default=None, repr=False)
    largest_load: int | None = None
    parents: ParentCodebooks | None = field(default=None, repr=False)

    @classmethod
    def fit(cls, x_ND: NDArray[np.floating], config: RqKMeansConfig | None = None) -> RqKMeans:
        """Learn the codebooks.

        A level with no more distinct vectors than codes takes these vectors as its codes, so a shop of twenty items
        passes with any setting; `notes` says where that happened. Equal input, seed and number of threads give equal
        codebooks.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty.
        """
        config = config or RqKMeansConfig()
        x_ND = checked_vectors(x_ND)
        sizes = config.codebook_sizes
        if config.last_level == "per_parent":
            above = fit_levels(x_ND, sizes[:-1], normalize=config.normalize_residuals, config=config)
            return cls(config, above.codebooks, above.scales, parents=_fit_parents(above, config))
        levels = fit_levels(x_ND, sizes, normalize=config.normalize_residuals, config=config)
        plain = cls(config, levels.codebooks, levels.scales)
        return plain if config.last_level == "plain" else _balanced(plain, x_ND)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        sizes = tuple(len(codebook) for codebook in self.codebooks)
        return sizes if self.parents is None else (*sizes, int(self.parents.sizes.max()))

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return int(self.codebooks[0].shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report; of a last level that is not plain, its shape."""
        notes = notes_on_sizes(self.config.codebook_sizes, self.codebook_sizes)
        if self.largest_load is not None:
            size = self.codebook_sizes[-1]
            notes += (
                f"the fullest code of the last level holds {self.largest_load} items; the capacity is "
                f"{self.config.capacity_slack:g} times an even share of {size} codes",
            )
        if self.parents is not None:
            sizes_P = self.parents.sizes[:-1]
            notes += (
                f"{len(sizes_P)} parents have {int(sizes_P.sum())} codes between them, "
                f"{int((sizes_P == 1).sum())} a single one",
            )
        return notes

    def encode(self, x_ND: NDArray[np.floating], threads: int | None = None) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``.

        The same vector gets the same codes whatever stands beside it. With a last level per parent, vectors under a
        parent that was not met in fitting take the nearest code of the last level of all items together.

        Args:
            x_ND: float ``[N, dim]``.
            threads: how many compute, one a core by default. They change no code.

        Raises:
            DataError: the vectors are not finite or have other dimensions than the codebooks.
        """
        x_ND = checked_vectors(x_ND, self.dim)
        codes_NL = self._encoder.encode(x_ND, threads)
        if self.parents is None:
            return codes_NL
        last_N = np.zeros(len(x_ND), np.int32)
        for rows, codebook_KD in self._under_parents(codes_NL):
            if len(codebook_KD) > 1:
                r_ND, _ = self._encoder.residuals(x_ND[rows], codes_NL[rows])
                last_N[rows] = nearest_codes(r_ND, codebook_KD, threads=1)
        return np.column_stack([codes_NL, last_N])

    def decode(self, codes_NL: Codes) -> F32:
        """The vectors that codes stand for, float32 ``[N, dim]``; further levels (a dedup level) are not read.

        Raises:
            DataError: a code does not exist under its parent.
        """
        if self.parents is None:
            return self._encoder.decode(codes_NL, self.scales)
        last_N = codes_NL[:, len(self.codebooks)]
        number_N = self.parents.find(self._parent_keys(codes_NL))
        if len(bad := np.flatnonzero(last_N >= self.parents.sizes[number_N])):
            raise DataError(
                f"{len(bad)} rows have a last code that does not exist under their parent, first row {bad[0]} with "
                f"codes {tuple(codes_NL[bad[0]].tolist())}: they come from another tokenizer, and would mean nothing "
                "here; load the one that gave them"
            )
        rest_ND = self.parents.centroids_CD[self.parents.starts_Q[number_N] + last_N]
        return self._encoder.decode(codes_NL, self.scales, rest_ND)

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> F32:
        """Squared distances to the codes of the last level, prices included; `Tokenizer.last_level_costs` says more.

        Raises:
            DataError: as `encode`.
        """
        x_ND = checked_vectors(x_ND, self.dim)
        if self.parents is None:
            return self._encoder.last_level_costs(x_ND)
        costs_NK = np.full((len(x_ND), self.codebook_sizes[-1]), np.inf, np.float32)
        codes_NL = self._encoder.encode(x_ND)
        for rows, codebook_KD in self._under_parents(codes_NL):
            r_ND, _ = self._encoder.residuals(x_ND[rows], codes_NL[rows])
            costs_NK[rows, : len(codebook_KD)] = ResidualEncoder((codebook_KD,)).last_level_costs(r_ND)
        return costs_NK

    def save(self, path: Path) -> None:
        """Write one safetensors file; it is whole or absent."""
        tensors: Tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        tensors["scales"] = self.scales
        if self.prices_K is not None:
            tensors |= {"prices": self.prices_K, "largest_load": np.array([self.largest_load])}
        if self.parents is not None:
            own = self.parents
            tensors |= {
                "parents.keys": own.keys_P,
                "parents.starts": own.starts_Q,
                "parents.centroids": own.centroids_CD,
            }
        write_tokenizer(path, _FORMAT, self.config, tensors)

    @classmethod
    def load(cls, path: Path) -> RqKMeans:
        """Read what `save` wrote; it encodes to the same codes.

        Raises:
            DataError: the file is missing, damaged, or of another tokenizer.
        """
        settings, tensors = read_tokenizer(path, _FORMAT)
        config = TypeAdapter(RqKMeansConfig).validate_python(settings)
        n_codebooks = len(config.codebook_sizes) - (config.last_level == "per_parent")
        codebooks = tuple(tensors[f"codebook.{level}"] for level in range(n_codebooks))
        match config.last_level:
            case "plain":
                return cls(config, codebooks, tensors["scales"])
            case "balanced":
                load = int(tensors["largest_load"].item())
                return cls(config, codebooks, tensors["scales"], prices_K=tensors["prices"], largest_load=load)
            case "per_parent":
                parents = ParentCodebooks(*(tensors[f"parents.{name}"] for name in ("keys", "starts", "centroids")))
                return cls(config, codebooks, tensors["scales"], parents=parents)

    @cached_property
    def _encoder(self) -> ResidualEncoder:
        normalize = [self.config.normalize_residuals] * len(self.codebooks)
        return ResidualEncoder(self.codebooks, normalize=normalize, prices_K=self.prices_K)

    def _parent_keys(self, codes_NL: Codes) -> NDArray[np.int64]:
        return _packed(codes_NL[:, : len(self.codebooks)], [len(codebook) for codebook in self.codebooks])

    def _under_parents(self, codes_NL: Codes) -> Iterator[tuple[NDArray[np.int64], F32]]:
        """Rows that share a last level, at most `BLOCK` at a time, with its codebook."""
        assert self.parents is not None
        number_N = self.parents.find(self._parent_keys(codes_NL))
        for rows in _groups(number_N):
            for start in range(0, len(rows), BLOCK):
                yield rows[start : start + BLOCK], self.parents.codebook(int(number_N[rows[0]]))


class KMeansConfig(Protocol):
    """What k-means reads of a method's settings; `RqKMeansConfig` explains them."""

    @property
    def iterations(self) -> int:
        """K-means iterations a level."""
        ...

    @property
    def max_points_per_centroid(self) -> int:
        """Vectors a code that k-means trains on."""
        ...

    @property
    def seed(self) -> int:
        """Start of k-means."""
        ...


@dataclass(frozen=True, slots=True)
class Levels:
    """Residual levels that were just fitted.

    Attributes:
        codebooks: float32 ``[codes, dim]`` a level.
        scales: float32 ``[n_levels]``, mean length of what each level left over; ones without normalisation.
        codes_NL: int32 ``[N, n_levels]`` of the vectors.
        left_ND: float32 ``[N, dim]``, what the last level left over, normalised where it is to be.
    """

    codebooks: tuple[F32, ...]
    scales: F32
    codes_NL: Codes
    left_ND: F32


def fit_levels(x_ND: F32, sizes: tuple[int, ...], config: KMeansConfig, *, normalize: bool) -> Levels:
    """K-means level by level, each level on what those above leave over.

    Args:
        x_ND: finite float32 ``[N, dim]``.
        sizes: codes of each level wanted.
        config: settings of k-means; level l starts from its seed + l.
        normalize: scale what a level leaves over to length 1.
    """
    codebooks: list[F32] = []
    scales, left_ND, codes_NL = [], x_ND, np.empty((len(x_ND), 0), np.int32)
    for level, size in enumerate(sizes):
        start = _start(level, normalize=normalize)
        codebooks.append(kmeans_codebook(left_ND, size, config, config.seed + level, start))
        encoder = ResidualEncoder(codebooks, normalize=[normalize] * len(codebooks))
        codes_NL = encoder.encode(x_ND)
        left_ND, length_N = encoder.left_over(x_ND, codes_NL)
        scales.append(length_N.mean())
    return Levels(tuple(codebooks), np.array(scales, np.float32), codes_NL, left_ND)


def notes_on_sizes(wanted: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[str, ...]:
    """A note on every level with fewer codes than wanted."""
    return tuple(
        f"level {level} has {size} codes instead of {asked}: there are no more distinct vectors"
        for level, (asked, size) in enumerate(zip(wanted, sizes, strict=True))
        if size < asked
    )


def check_codebook_sizes(codebook_sizes: tuple[int, ...]) -> None:
    """What all residual levels need.

    Raises:
        DataError: there is no level, or one without codes.
    """
    if not codebook_sizes or min(codebook_sizes) < 1:
        raise DataError(f"codebook_sizes {codebook_sizes}: give one size of at least 1 for each level")


def check_kmeans(codebook_sizes: tuple[int, ...], config: KMeansConfig) -> None:
    """Settings that all methods with residual k-means have.

    Raises:
        DataError: one is out of range.
    """
    check_codebook_sizes(codebook_sizes)
    if config.iterations < 1 or config.max_points_per_centroid < 1:
        raise DataError(
            f"iterations {config.iterations}, max_points_per_centroid {config.max_points_per_centroid}: give at least "
            "1 of each; without, nothing is learnt"
        )


def _start(level: int, *, normalize: bool) -> Start:
    """What k-means starts from.

    Normalised residuals differ in direction alone, and a progressive start on level 0 made more of Beauty's items
    collide at the same error. Without normalisation a progressive start lowered both.
    """
    if not normalize:
        return "progressive"
    return "spherical" if level else "random"


def kmeans_codebook(x_ND: F32, size: int, config: KMeansConfig, seed: int, start: Start) -> F32:
    """`kmeans` with a method's settings, float32 ``[at most size, D]``."""
    return kmeans(
        x_ND,
        size,
        start=start,
        iterations=config.iterations,
        max_points_per_centroid=config.max_points_per_centroid,
        seed=seed,
    )


def _fit_parents(above: Levels, config: RqKMeansConfig) -> ParentCodebooks:
    """K-means of the last level under every parent, and of all items together for parents that are met later."""
    size, seed = config.codebook_sizes[-1], config.seed + len(above.codebooks)
    keys_N = _packed(above.codes_NL, [len(codebook) for codebook in above.codebooks])
    groups = [*_groups(keys_N), np.arange(len(keys_N))]
    codebooks = [kmeans_codebook(above.left_ND[rows], size, config, seed, "random") for rows in groups]
    starts_Q = np.cumsum([0, *(len(codebook) for codebook in codebooks)])
    return ParentCodebooks(np.unique(keys_N), starts_Q, np.concatenate(codebooks))


def _balanced(plain: RqKMeans, x_ND: F32) -> RqKMeans:
    """Give the last level prices: alternately, prices for the centroids and centroids of what codes then hold.

    Capacities are those of a sample where there are more items than k-means trains on.
    """
    config = plain.config
    *above, last_KD = plain.codebooks
    left_ND, _ = plain._encoder.left_over(x_ND, plain.encode(x_ND)[:, :-1])
    at_most = min(config.max_points_per_centroid * len(last_KD), max(_COSTS_HELD // len(last_KD), len(last_KD)))
    if len(left_ND) > at_most:
        left_ND = left_ND[np.sort(np.random.default_rng(config.seed).choice(len(left_ND), at_most, replace=False))]
    capacity = math.ceil(config.capacity_slack * len(left_ND) / len(last_KD) - 1e-9)  # 1.1 * 400 is a hair above 440
    costs_NK = _squared_distances(left_ND, last_KD)
    for _ in range(_BALANCING_ROUNDS):
        held_N = (costs_NK + prices_by_auction(costs_NK, capacity)).argmin(axis=1)
        last_KD = _means(left_ND, held_N, last_KD)
        costs_NK = _squared_distances(left_ND, last_KD)
    prices_K = prices_by_auction(costs_NK, capacity)
    fitted = replace(plain, codebooks=(*above, last_KD), prices_K=prices_K, largest_load=0)
    codes_NL = fitted.encode(x_ND)
    _, length_N = fitted._encoder.left_over(x_ND, codes_NL)
    scales = np.array([*plain.scales[:-1], length_N.mean()], np.float32)
    return replace(fitted, scales=scales, largest_load=int(np.bincount(codes_NL[:, -1]).max()))


def prices_by_auction(costs_NK: F64, capacity: int) -> F64:
    """Prices, float64 ``[K]``, such that no code is the cheapest of more than `capacity` rows, as nearly as they can.

    Every code that is overfull raises its price until the excess goes elsewhere, and again while there is one. Equal
    rows move together, so of more than `capacity` of those one code stays overfull; then the prices that left the
    least are returned.

    Args:
        costs_NK: what each row would pay for each code, prices aside.
        capacity: rows a code; there are at least ``N / K``.
    """
    codes_N = costs_NK.argmin(axis=1)
    prices_K = np.zeros(costs_NK.shape[1])
    least, best_K = len(codes_N) + 1, prices_K
    smallest_step = _SMALLEST_STEP * float(np.abs(costs_NK).max())
    for _ in range(_AUCTION_ROUNDS):
        loads_K = np.bincount(codes_N, minlength=len(prices_K))
        if loads_K.max() < least:
            least, best_K = int(loads_K.max()), prices_K.copy()
        if least <= capacity:
            break
        over = np.flatnonzero(loads_K > capacity)
        rows = np.flatnonzero(loads_K[codes_N] > capacity)
        paid_MK = costs_NK[rows] + prices_K
        own = np.arange(len(rows)), codes_N[rows]
        lead_M = -paid_MK[own]
        paid_MK[own] = np.inf
        lead_M += paid_MK.min(axis=1)
        order = np.lexsort((lead_M, codes_N[rows]))
        # Of each overfull code: the lead of the last row that is to go, and of the first that is to stay.
        last = np.searchsorted(codes_N[rows][order], over) + loads_K[over] - capacity - 1
        going, staying = lead_M[order[last]], lead_M[order[last + 1]]
        prices_K[over] += np.maximum((going + staying) / 2, going + smallest_step)
        codes_N[rows] = (costs_NK[rows] + prices_K).argmin(axis=1)
    return best_K


def _squared_distances(x_ND: F32, codebook_KD: F32) -> F64:
    return ResidualEncoder((codebook_KD,)).last_level_costs(x_ND).astype(np.float64)


def _means(x_ND: F32, codes_N: NDArray[np.int64], empty_KD: F32) -> F32:
    """Mean vector of each code, float32 ``[K, D]``; that of `empty_KD` where a code holds nothing."""
    means_KD = empty_KD.copy()
    for rows in _groups(codes_N):
        means_KD[codes_N[rows[0]]] = x_ND[rows].mean(axis=0)
    return means_KD


def _groups(keys_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of each key, keys ascending."""
    order = np.argsort(keys_N, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys_N[order])) + 1) if len(order) else []


def _packed(codes_NL: Codes, sizes: list[int]) -> NDArray[np.int64]:
    """Tuples of codes as one number each, int64 ``[N]``; there is room for it, as no catalogue has 2**63 parents."""
    keys_N = np.zeros(len(codes_NL), np.int64)
    for level, size in enumerate(sizes):
        keys_N = keys_N * size + codes_NL[:, level]
    return keys_N
