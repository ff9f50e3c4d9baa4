"""Encoding vectors to codes, against faiss ``ResidualQuantizer`` with a beam of one.

Both sides have the same levels, are trained on the same sample, and encode the same vectors; both are greedy, so they
do the same work. The peer is given its table method (``use_beam_LUT``) where that is faster, and each side as many
threads as suit it best. Contenders take turns within one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray

from genretrieval.figures import Figure, machine
from genretrieval_pipelines.bench_decode import Contender, take_turns
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig

Vectors = NDArray[np.float32]

N_LEVELS = 3
CODE_BITS = 8
TRAINING_VECTORS = 20_000
N_CLUSTERS = 2_000
SPREAD_IN_CLUSTER = 0.8  # of the distance of cluster centres to their mean


def bench_tokenize(n: int = 100_000, dim: int = 384, rounds: int = 7, quick: bool = False) -> dict[str, Figure]:
    """Measure encoding of clustered vectors of length 1 with 3 levels of 256 codes.

    Args:
        n: vectors to encode; the first 20 000 of them train both sides.
        dim: their dimensions.
        rounds: how often each contender is timed.
        quick: at most 5 000 vectors and 2 rounds, for a smoke test.

    Returns:
        Figures by name. ``tokenize.encode_speedup_vs_faiss_rq`` is a ratio of median times, and its spread that of
        their 10th and 90th percentiles at their furthest apart; ``tokenize.error_ratio_vs_faiss_rq`` is ours over the
        peer's squared distance of all vectors to their reconstructions. The same under ``tokenize.normalized.`` with
        `normalize_residuals`, which the peer has not.
    """
    if quick:
        n, rounds = min(n, 5_000), min(rounds, 2)
    x_ND = clustered_vectors(n, dim)
    sample_ND = x_ND[:TRAINING_VECTORS]
    sizes = (2**CODE_BITS,) * N_LEVELS
    ours = {
        name: RqKMeans.fit(sample_ND, RqKMeansConfig(codebook_sizes=sizes, normalize_residuals=normalize))
        for name, normalize in (("", False), ("normalized.", True))
    }
    peer = trained_peer(sample_ND)
    cores = machine()["cores"]
    our_threads = {name: _fastest(_our_calls(tokenizer, x_ND, cores)) for name, tokenizer in ours.items()}
    peer_setting = _fastest(_peer_calls(peer, x_ND, cores))
    contenders = {"peer": _peer_calls(peer, x_ND, cores)[peer_setting]}
    contenders |= {name: _our_calls(tokenizer, x_ND, cores)[our_threads[name]] for name, tokenizer in ours.items()}
    times = take_turns([Contender(name, call) for name, call in contenders.items()], rounds)
    peer_error = squared_error(x_ND, peer.decode(peer.compute_codes(x_ND)))
    figures = {}
    for name, tokenizer in ours.items():
        error = squared_error(x_ND, tokenizer.decode(tokenizer.encode(x_ND)))
        figures[f"tokenize.{name}encode_speedup_vs_faiss_rq"] = _ratio(times["peer"], times[name])
        figures[f"tokenize.{name}error_ratio_vs_faiss_rq"] = Figure(error / peer_error, "ratio")
        figures[f"tokenize.{name}items_per_second"] = _rate(n, times[name])
        figures[f"tokenize.{name}threads"] = Figure(our_threads[name][0], "threads")
    figures["tokenize.faiss_rq.items_per_second"] = _rate(n, times["peer"])
    figures["tokenize.faiss_rq.threads"] = Figure(peer_setting[0], "threads")
    figures["tokenize.faiss_rq.use_beam_lut"] = Figure(peer_setting[1], "setting")
    return figures


def clustered_vectors(n: int, dim: int) -> Vectors:
    """Vectors of length 1 in many clusters, float32 ``[n, dim]``."""
    rng = np.random.default_rng(0)
    centres_CD = rng.standard_normal((N_CLUSTERS, dim), np.float32)
    x_ND = rng.standard_normal((n, dim), np.float32)
    x_ND *= SPREAD_IN_CLUSTER
    x_ND += centres_CD[rng.integers(0, N_CLUSTERS, n)]
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND


def trained_peer(x_ND: Vectors) -> faiss.ResidualQuantizer:
    """Faiss's residual quantiser, greedy in training and in encoding, all else as it comes."""
    peer = faiss.ResidualQuantizer(x_ND.shape[1], N_LEVELS, CODE_BITS)
    peer.max_beam_size = 1
    peer.cp.min_points_per_centroid = 1  # a quick run has fewer than faiss likes, and would print so
    peer.train(x_ND)
    return peer


def squared_error(x_ND: Vectors, near_ND: Vectors) -> float:
    """Squared distance of all vectors to their reconstructions."""
    return float(np.square(x_ND - near_ND).sum(dtype=np.float64))


Setting = tuple[int, int]
"""Threads, and faiss's ``use_beam_LUT``."""


def _our_calls(tokenizer: RqKMeans, x_ND: Vectors, cores: int) -> dict[Setting, Callable[[], object]]:
    return {(threads, 0): partial(tokenizer.encode, x_ND, threads) for threads in {1, cores}}


def _peer_calls(peer: faiss.ResidualQuantizer, x_ND: Vectors, cores: int) -> dict[Setting, Callable[[], object]]:
    def call(threads: int, table: int) -> object:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        peer.use_beam_LUT = table
        codes = peer.compute_codes(x_ND)
        faiss.omp_set_num_threads(before)
        return codes

    settings = [(threads, table) for threads in {1, cores} for table in (0, 1)]
    return {setting: partial(call, *setting) for setting in settings}


def _fastest(calls: Mapping[Setting, Callable[[], object]]) -> Setting:
    """The setting of least median time over three turns."""
    named = {str(setting): setting for setting in calls}
    times = take_turns([Contender(name, calls[setting]) for name, setting in named.items()], 3)
    return named[min(times, key=lambda name: times[name].value)]


def _rate(n: int, time: Figure) -> Figure:
    """Items a second, of a time in ms."""
    assert time.spread is not None
    low, high = time.spread
    return Figure(1e3 * n / time.value, "items/s", (1e3 * n / high, 1e3 * n / low))


def _ratio(over: Figure, under: Figure) -> Figure:
    assert over.spread is not None
    assert under.spread is not None
    return Figure(
        over.value / under.value, "ratio", (over.spread[0] / under.spread[1], over.spread[1] / under.spread[0])
    )
