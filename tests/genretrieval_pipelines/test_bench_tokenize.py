from __future__ import annotations

import numpy as np
import pytest

from genretrieval.figures import Figure, lines
from genretrieval_pipelines import bench_tokenize as bench


def test_figures_have_stable_names_and_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CODE_BITS", 4)
    figures = bench.bench_tokenize(n=600, dim=8, rounds=1, quick=True)
    for name in ("encode_speedup_vs_faiss_rq", "error_ratio_vs_faiss_rq", "items_per_second"):
        assert figures[f"tokenize.{name}"].value > 0
        assert figures[f"tokenize.normalized.{name}"].value > 0
    # Both are k-means on residuals: far apart, one of them would not be what it is called.
    assert figures["tokenize.error_ratio_vs_faiss_rq"].value == pytest.approx(1, abs=0.1)
    assert len(lines(figures)) == len(figures)


def test_a_ratio_spreads_from_the_worst_case_to_the_best() -> None:
    over, under = Figure(6, "ms", (5, 8)), Figure(3, "ms", (2, 4))
    assert bench._ratio(over, under) == Figure(2, "ratio", (1.25, 4))


def test_a_rate_is_items_over_time() -> None:
    assert bench._rate(100, Figure(50, "ms", (40, 80))) == Figure(2000, "items/s", (1250, 2500))


def test_vectors_are_of_length_one_and_in_clusters() -> None:
    x = bench.clustered_vectors(300, 64)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)
    # Of 2000 clusters, some of 300 vectors share one: nearer than any two of unrelated directions in 64 dimensions.
    cosines = x @ x.T - 2 * np.eye(300)
    assert cosines.max() > 0.5 > np.median(cosines.max(axis=1))


def test_the_peer_is_greedy() -> None:
    peer = bench.trained_peer(bench.clustered_vectors(600, 8))
    assert peer.max_beam_size == 1
    assert peer.compute_codes(bench.clustered_vectors(7, 8)).shape == (7, 3)
