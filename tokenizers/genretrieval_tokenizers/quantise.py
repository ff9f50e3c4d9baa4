"""Vectors to codes, fast and to the letter; and the k-means that makes codebooks.

A code is defined in float64, by `exact_codes`. `ResidualEncoder` finds the same codes with float32 matrix products: it
bounds their rounding, and where the best code leads by less than that bound, the definition decides between those
that may be best. So its answer depends neither on block size and thread count nor on the BLAS library.

Levels are scored from the vectors themselves. What level l quantises is ``R_l = x - N_0 c_0 - ... - N_{l-1} c_{l-1}``,
where ``c_j`` is the chosen row of codebook j and ``N_j`` the product of the lengths that residuals were divided by
before level j (1 without normalisation). So the scores of its codes ``c``, highest for the nearest, are

    R_l . c - N_l |c|^2 / 2  =  x . c - sum_j N_j (c_j . c) - N_l |c|^2 / 2

``c_j . c`` is a row of a table that is made once, and the length of ``R_{l+1}`` follows from that of ``R_l`` and the
chosen score: no residual is formed. (Tables of codebook products: Babenko and Lempitsky, "Additive quantization for
extreme vector compression", CVPR 2014.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from genretrieval.semantic_ids import Codes

Vectors = NDArray[np.floating]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

Start = Literal["progressive", "spherical", "random"]
"""Where k-means starts from; `kmeans` says more."""

TIE = 1e-9
"""Squared distances that differ by less than this share of the vectors' squared lengths tie: the lower code wins."""
VANISHED = 1e-6
"""A residual shorter than this share of what it is left over from is rounding: it has no direction to normalise."""

_SCORES_A_BLOCK = 2**18  # 1 MiB of float32, so that passes over them stay within a core's cache
_ROWS_A_BLOCK = 128  # at least: matrix products of fewer rows spend their time on packing
_GATHERED = 2**20  # float64 numbers held at a time where the definition decides
_PROGRESSIVE_STEPS = 20
_PROGRESSIVE_ITERATIONS = 10
_ROUNDING = float(np.finfo(np.float32).eps) / 2
_UNDERFLOW = float(np.finfo(np.float32).tiny)


def exact_codes(x_ND: Vectors, codebook_KD: Vectors, prices_K: Vectors | None = None) -> Codes:
    """What the code of a vector is: the nearest row of a codebook by Euclidean distance, int32 ``[N]``.

    Squared distances are float64 sums of squared differences, so they depend on nothing but vector and row. Those that
    differ by less than `TIE` of the squared lengths tie, and the lower code wins.

    Args:
        x_ND: finite ``[N, D]``.
        codebook_KD: finite ``[K, D]``.
        prices_K: added to the squared distances; none by default.
    """
    level = _Level.of(codebook_KD, prices_K)
    return _decide(x_ND.astype(np.float64), level, np.ones((len(x_ND), len(codebook_KD)), bool))


def nearest_codes(
    x_ND: Vectors, codebook_KD: Vectors, prices_K: Vectors | None = None, threads: int | None = None
) -> Codes:
    """`exact_codes`, fast: int32 ``[N]``. Many calls with one codebook are faster with a `ResidualEncoder`."""
    return ResidualEncoder((codebook_KD,), prices_K=prices_K).encode(x_ND, threads)[:, 0]


class ResidualEncoder:
    """Codes of residual levels.

    Args:
        codebooks: finite ``[K_l, D]`` a level.
        normalize: of each level, whether what it leaves over is scaled to length 1 before the next; none by default.
        prices_K: float ``[K]``, added to the squared distances of the last level; none by default.
    """

    def __init__(
        self,
        codebooks: Sequence[Vectors],
        *,
        normalize: Sequence[bool] | None = None,
        prices_K: Vectors | None = None,
    ) -> None:
        self.normalize = tuple(normalize or [False] * len(codebooks))
        assert len(self.normalize) == len(codebooks)
        # Whether a level's scale can be other than 1.
        self._scaled = [any(self.normalize[:number]) for number in range(len(codebooks))]
        self.levels = [_Level.of(codebook) for codebook in codebooks[:-1]] + [_Level.of(codebooks[-1], prices_K)]
        self._tables = [[self._table(j, level) for j in range(level)] for level in range(len(codebooks))]
        # Rounding of a sum of D products and the few additions after it, as a share of the summands' lengths
        # (Higham, "Accuracy and stability of numerical algorithms", section 3.1), whatever the order of summation.
        self._gamma = 1.01 * (codebooks[0].shape[1] + 4 * len(codebooks) + 16) * _ROUNDING
        self._underflow = (codebooks[0].shape[1] + 16) * _UNDERFLOW
        self._largest = max(level.size for level in self.levels)
        self._block = max(_ROWS_A_BLOCK, _SCORES_A_BLOCK // self._largest)

    def encode(self, x_ND: Vectors, threads: int | None = None) -> Codes:
        """Codes, int32 ``[N, n_levels]``: level after level the `exact_codes` of `residuals`.

        Args:
            x_ND: finite ``[N, D]``.
            threads: how many compute, one a core by default. They change no code.
        """
        return self._first_codes(x_ND, len(self.levels), threads)

    def _first_codes(self, x_ND: Vectors, n_levels: int, threads: int | None = None) -> Codes:
        """Codes of the first levels, int32 ``[N, n_levels]``."""
        codes_NL = np.empty((len(x_ND), n_levels), np.int32)

        def work(blocks: Iterator[slice]) -> None:
            buffers = np.empty((2, min(self._block, len(x_ND)) * self._largest), np.float32)
            with np.errstate(all="ignore"):  # what overflows compares with nothing: the definition decides
                for rows in blocks:
                    self._encode(x_ND[rows], codes_NL[rows], 0, buffers)

        over_blocks(len(x_ND), self._block, work, threads)
        return codes_NL

    def residuals(self, x_ND: Vectors, codes_NL: Codes, first: int = 0) -> tuple[F64, F64]:
        """What codes leave over.

        Args:
            x_ND: ``[N, D]``, which level `first` quantises.
            codes_NL: int32 ``[N, any]``, codes of the levels from 0 on; those from `first` on are read.
            first: level.

        Returns:
            float64 ``[N, D]``, and the length ``[N]`` that the last of these levels divided it by, 0 where nothing was
            left; ones where it does not normalise.
        """
        r_ND = x_ND.astype(np.float64)
        length_N = np.ones(len(r_ND))
        for level in range(first, codes_NL.shape[1]):
            before_N = _lengths(r_ND) if self.normalize[level] else length_N
            r_ND -= self.levels[level].codebook_KD[codes_NL[:, level]]
            length_N = np.ones(len(r_ND))
            if self.normalize[level]:
                length_N = _lengths(r_ND)
                length_N[length_N <= VANISHED * before_N] = 0
                r_ND *= np.divide(1, length_N, out=np.zeros_like(length_N), where=length_N > 0)[:, None]
        return r_ND, length_N

    def last_level_costs(self, x_ND: Vectors) -> F32:
        """Cost of each code of the last level, the others being as `encode` says, float32 ``[N, K]``.

        It is the squared distance of what the levels above leave over, plus the price.

        Args:
            x_ND: finite ``[N, D]``.
        """
        last = self.levels[-1]
        above_NL = self._first_codes(x_ND, len(self.levels) - 1)
        squared_K = np.square(last.codebook_KD).sum(axis=1) + last.prices_K
        costs_NK = np.empty((len(x_ND), last.size), np.float32)

        def work(blocks: Iterator[slice]) -> None:
            # Always as many rows: the shape of a matrix product decides how it rounds.
            padded_ND = np.zeros((_ROWS_A_BLOCK, x_ND.shape[1]))
            for rows in blocks:
                r_ND, _ = self.residuals(x_ND[rows], above_NL[rows])
                padded_ND[: len(r_ND)] = r_ND
                products_NK = (padded_ND @ last.codebook_KD.T)[: len(r_ND)]
                costs_NK[rows] = np.square(r_ND).sum(axis=1)[:, None] - 2 * products_NK + squared_K

        over_blocks(len(x_ND), _ROWS_A_BLOCK, work)
        np.maximum(costs_NK, 0, out=costs_NK)
        return costs_NK

    def left_over(self, x_ND: Vectors, codes_NL: Codes) -> tuple[F32, F64]:
        """`residuals` of many rows, block by block: float32 ``[N, D]`` and float64 ``[N]``."""
        r_ND, length_N = np.empty(x_ND.shape, np.float32), np.empty(len(x_ND))

        def work(blocks: Iterator[slice]) -> None:
            for rows in blocks:
                r_ND[rows], length_N[rows] = self.residuals(x_ND[rows], codes_NL[rows])

        over_blocks(len(x_ND), self._block, work)
        return r_ND, length_N

    def decode(self, codes_NL: Codes, scales: Sequence[float] | F32, rest_ND: F32 | None = None) -> F32:
        """The vectors that codes stand for, float32 ``[N, D]``.

        Args:
            codes_NL: int32 ``[N, at least n_levels]``; further columns are not read.
            scales: what each level divided what it left over by; what is below it is multiplied by that again.
            rest_ND: float32 ``[N, D]``, what the last level left over; zero by default.
        """
        x_ND = (
            np.zeros((len(codes_NL), self.levels[0].codebook_KD.shape[1]), np.float32) if rest_ND is None else rest_ND
        )
        for number in reversed(range(len(self.levels))):
            chosen_ND = self.levels[number].codebook_KD[codes_NL[:, number]].astype(np.float32)
            x_ND = chosen_ND + np.float32(scales[number]) * x_ND
        return x_ND

    def _encode(self, x_ND: Vectors, codes_NL: Codes, first: int, buffers: F32) -> None:
        """Write the codes from level `first` on, as many as `codes_NL` has, where `x_ND` is what `first` quantises."""
        x32_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
        row_N = np.arange(len(x_ND))
        state = _Rows.of(x32_ND, self._gamma, self._underflow)
        vanished = []
        n_levels = codes_NL.shape[1]
        for number in range(first, n_levels):
            level = self.levels[number]
            scores_NK = self._scores(x32_ND, codes_NL, state, first, number, buffers)
            best_N = scores_NK.argmax(axis=1)
            top_N = scores_NK[row_N, best_N].astype(np.float64)
            scores_NK[row_N, best_N] = -np.inf
            error_N = self._error(state, first, number)
            margin_N = 2 * error_N + self._tie(state, first, number)
            if len(near := np.flatnonzero(~(top_N - scores_NK.max(axis=1) > margin_N))):
                scores_NK[near, best_N[near]] = top_N[near]
                candidates = ~(scores_NK[near] < (top_N - margin_N)[near, None])
                r_ND, _ = self.residuals(x_ND[near], codes_NL[near, :number], first)
                best_N[near] = _decide(r_ND, level, candidates)
                top_N[near] = scores_NK[near, best_N[near]]
            codes_NL[:, number] = best_N
            if number + 1 < n_levels:
                vanished.append(state.leave(top_N, error_N, normalize=self.normalize[number]))
        # The level furthest up comes last: below it, a vanished row was carried along with meaningless numbers.
        for number, rows in reversed(list(enumerate(vanished, first + 1))):
            if len(rows):
                r_ND, _ = self.residuals(x_ND[rows], codes_NL[rows, :number], first)
                codes = codes_NL[rows]
                self._encode(r_ND, codes, number, buffers)
                codes_NL[rows] = codes

    def _scores(self, x_ND: F32, codes_NL: Codes, state: _Rows, first: int, number: int, buffers: F32) -> F32:
        """Scores of a level's codes, float32 ``[N, K]``, in the first of `buffers`."""
        level = self.levels[number]
        views: list[F32] = [flat[: len(x_ND) * level.size].reshape(len(x_ND), level.size) for flat in buffers]
        scores_NK, taken_NK = views
        np.matmul(x_ND, level.columns_DK, out=scores_NK)
        for j in range(first, number):
            np.take(self._tables[number][j], codes_NL[:, j], axis=0, out=taken_NK, mode="clip")
            if self._scaled[j] and j > first:
                taken_NK *= state.scales[j - first].astype(np.float32)[:, None]
            scores_NK -= taken_NK
        if number == first:
            scores_NK -= level.offsets_K
        elif self._scaled[number]:
            np.multiply(state.scales[number - first].astype(np.float32)[:, None], level.offsets_K, out=taken_NK)
            scores_NK -= taken_NK
        return scores_NK

    def _error(self, state: _Rows, first: int, number: int) -> F64:
        """How far a score can be from its true value, float64 ``[N]``."""
        level = self.levels[number]
        weights = [above.longest * level.longest for above in self.levels[first:number]] + [level.largest_offset]
        size_N = state.length_N * level.longest + sum(w * n for w, n in zip(weights, state.scales, strict=True))
        carried_N = sum(w * n for w, n in zip(weights, state.scale_errors, strict=True))
        error_N: F64 = self._gamma * size_N + carried_N + self._underflow * (1 + sum(state.scales))
        return error_N

    def _tie(self, state: _Rows, first: int, number: int) -> F64:
        """More than the lead of a score over one that `exact_codes` takes for a tie, float64 ``[N]``."""
        length_N = np.maximum(state.length_N, 1) if self._scaled[number] else state.length_N
        reach_N = length_N + sum(level.longest for level in self.levels[first:number])
        tie_N: F64 = TIE * state.scales[-1] * (reach_N**2 + self.levels[number].longest ** 2)
        return tie_N

    def _table(self, j: int, number: int) -> F32:
        """What a choice at level `j` takes from the scores of a later level, float32 ``[K_j, K]``."""
        table = self.levels[j].codebook_KD @ self.levels[number].codebook_KD.T
        if not self._scaled[number] and j + 1 == number:
            table += self.levels[number].offsets_K  # equal for all rows: taken along, it costs no pass of its own
        return table.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Level:
    """A codebook, prepared.

    Attributes:
        codebook_KD: float64 ``[K, D]``.
        prices_K: float64 ``[K]``, added to squared distances.
        columns_DK: float32 ``[D, K]``.
        offsets_K: float32 ``[K]``, half of squared length and price.
        longest: largest length of a row.
        largest_offset: in absolute value.
    """

    codebook_KD: F64
    prices_K: F64
    columns_DK: F32
    offsets_K: F32
    longest: float
    largest_offset: float

    @classmethod
    def of(cls, codebook_KD: Vectors, prices_K: Vectors | None = None) -> _Level:
        codebook = codebook_KD.astype(np.float64)
        prices = np.zeros(len(codebook)) if prices_K is None else prices_K.astype(np.float64)
        squared_K = np.square(codebook).sum(axis=1)
        offsets_K = (squared_K + prices) / 2
        return cls(
            codebook,
            prices,
            np.ascontiguousarray(codebook.T, dtype=np.float32),
            offsets_K.astype(np.float32),
            float(np.sqrt(squared_K.max())),
            float(np.abs(offsets_K).max()),
        )

    @property
    def size(self) -> int:
        return len(self.codebook_KD)


@dataclass(slots=True)
class _Rows:
    """What is known of a block's rows while levels pass, float64 ``[N]`` each.

    Attributes:
        length_N: of the vectors.
        squared_N: squared length of what is left by now.
        squared_error_N: how far that can be from its true value.
        scales: N_j of each level so far.
        scale_errors: how far these can be from their true values.
    """

    length_N: F64
    squared_N: F64
    squared_error_N: F64
    scales: list[F64] = field(default_factory=list)
    scale_errors: list[F64] = field(default_factory=list)

    @classmethod
    def of(cls, x_ND: F32, gamma: float, underflow: float) -> _Rows:
        squared_N = np.einsum("nd,nd->n", x_ND, x_ND).astype(np.float64)
        error_N = gamma * squared_N + underflow
        nothing = np.zeros(len(x_ND))
        return cls(np.sqrt(squared_N + error_N), squared_N, error_N, [nothing + 1], [nothing])

    def leave(self, score_N: F64, error_N: F64, *, normalize: bool) -> NDArray[np.intp]:
        """Go on to what the codes of these scores leave over.

        Returns:
            Rows of which so little is left that rounding may be a good part of it.
        """
        scale_N, scale_error_N = self.scales[-1], self.scale_errors[-1]
        self.squared_error_N += 2 * (scale_N * error_N + scale_error_N * (np.abs(score_N) + error_N))
        self.squared_N -= 2 * scale_N * score_N
        vanished = np.flatnonzero(~(self.squared_N > 4 * self.squared_error_N))
        if normalize:
            self.squared_N[vanished], self.squared_error_N[vanished] = 1, 0
            scale_N = np.sqrt(self.squared_N)
            scale_error_N = self.squared_error_N / scale_N
        self.scales.append(scale_N)
        self.scale_errors.append(scale_error_N)
        return vanished


def _decide(r_MD: F64, level: _Level, candidates_MK: NDArray[np.bool_]) -> Codes:
    """`exact_codes` where only the candidates can be nearest."""
    row_P, code_P = candidates_MK.nonzero()
    distance_P = np.empty(len(row_P))
    step = max(1, _GATHERED // r_MD.shape[1])
    for start in range(0, len(row_P), step):
        pairs = slice(start, start + step)
        difference_PD = r_MD[row_P[pairs]] - level.codebook_KD[code_P[pairs]]
        distance_P[pairs] = np.square(difference_PD).sum(axis=1)
    distance_P += level.prices_K[code_P]
    row_M = np.arange(len(r_MD))
    least_M = np.minimum.reduceat(distance_P, np.searchsorted(row_P, row_M)) if len(row_P) else np.empty(0)
    tie_M = TIE * (np.square(r_MD).sum(axis=1) + level.longest**2)
    tied_Q = np.flatnonzero(distance_P <= (least_M + tie_M)[row_P])
    return code_P[tied_Q[np.searchsorted(row_P[tied_Q], row_M)]].astype(np.int32)


def _lengths(x_ND: F64) -> F64:
    length_N: F64 = np.sqrt(np.square(x_ND).sum(axis=1))
    return length_N


def kmeans(
    x_ND: F32,
    size: int,
    *,
    start: Start,
    iterations: int,
    max_points_per_centroid: int,
    seed: int,
) -> F32:
    """Codebook of k-means, float32 ``[at most size, D]``; where there are no more distinct vectors, it is these.

    Args:
        x_ND: float32 ``[N, D]``; of more than `max_points_per_centroid` a code, a sample is drawn.
        size: codes.
        start: where the iterations start from. "progressive": k-means on ever more principal components
            (faiss's `ProgressiveDimClustering`), which where vectors lie in many small clusters leaves less error than
            starting from "random" ones. "spherical": k-means by direction, for vectors that differ in nothing else.
        iterations: of k-means itself.
        max_points_per_centroid: vectors a code.
        seed: of the sample and the start.
    """
    distinct = _first_distinct(x_ND, size + 1)
    if len(distinct) <= size:
        return x_ND[distinct]
    if len(x_ND) > size * max_points_per_centroid:
        drawn = np.random.default_rng(seed).choice(len(x_ND), size * max_points_per_centroid, replace=False)
        x_ND = x_ND[np.sort(drawn)]
    if start == "progressive" and len(x_ND) < x_ND.shape[1]:
        span_DN = span(x_ND)
        settings = {"iterations": iterations, "max_points_per_centroid": max_points_per_centroid, "seed": seed}
        return kmeans(x_ND @ span_DN, size, start=start, **settings) @ span_DN.T
    gpu = faiss.get_num_gpus() > 0
    fit = partial(lloyd, x_ND, size, seed=seed, max_points_per_centroid=max_points_per_centroid, gpu=gpu)
    start_KD = None
    if start == "spherical":
        start_KD = fit(niter=iterations, spherical=True)
    elif start == "progressive":
        start_KD = fit(niter=_PROGRESSIVE_ITERATIONS, progressive_dim_steps=_PROGRESSIVE_STEPS)
    return fit(start_KD=start_KD, niter=iterations)


def lloyd(x_ND: F32, size: int, *, start_KD: F32 | None = None, **settings: Any) -> F32:
    """Codebook of faiss's k-means, float32 ``[size, D]``.

    Args:
        x_ND: float32 ``[N, D]``, no fewer than codes.
        size: codes.
        start_KD: float32 ``[size, D]``, where the iterations start from; random vectors by default.
        settings: of `faiss.Kmeans`.
    """
    # Below 39 vectors a code faiss prints a warning; few items are no fault.
    clusters = faiss.Kmeans(x_ND.shape[1], size, min_points_per_centroid=1, **settings)
    clusters.train(x_ND, init_centroids=start_KD)
    assert clusters.centroids is not None
    return clusters.centroids


def span(x_ND: F32) -> F32:
    """Orthonormal columns, float32 ``[D, N]``: the space in which fewer vectors than dimensions lie.

    faiss's principal components are as many as dimensions; of fewer vectors it refuses them, or ends the process.
    """
    basis: F32 = np.linalg.qr(x_ND.T)[0]
    return basis


def _first_distinct(x_ND: F32, at_most: int) -> list[int]:
    """Rows whose vector differs from all before them; stops when there are `at_most`."""
    first: dict[bytes, int] = {}
    for row, vector in enumerate(x_ND):
        first.setdefault((vector + 0.0).tobytes(), row)  # + 0.0: -0 and 0 are one number, but not the same bytes
        if len(first) == at_most:
            break
    return list(first.values())


def over_blocks(n: int, block: int, work: Callable[[Iterator[slice]], None], threads: int | None = None) -> None:
    """Cut `n` rows into blocks and let threads work them off.

    BLAS gets one thread meanwhile: threads of its own for each of ours would be more than there are cores.

    Args:
        n: rows.
        block: rows of a block; the last one has what remains.
        work: called once a thread with the blocks, of which every thread takes the next when it is free.
        threads: one a core by default.
    """
    slices = [slice(start, min(start + block, n)) for start in range(0, n, block)]
    workers = min(threads or _cores(), len(slices))
    queue = iter(slices)  # a list's iterator gives each of its items once, to threads too
    with _libraries().limit(limits=1, user_api="blas"):
        if workers < 2:
            work(queue)
            return
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work, queue) for _ in range(workers)]:
                done.result()


def one_thread() -> AbstractContextManager[object]:
    """Within it BLAS and OpenMP, of faiss too, have one thread."""
    context: AbstractContextManager[object] = _libraries().limit(limits=1)
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
