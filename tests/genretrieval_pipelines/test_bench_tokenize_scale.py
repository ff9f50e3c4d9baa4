from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genretrieval.figures import lines
from genretrieval_pipelines import bench_tokenize_scale as bench
from genretrieval_tokenizers.publish import open_published
from genretrieval_tokenizers.stream import EmbeddingShards


def test_made_embeddings_are_unit_vectors_with_clusters(tmp_path: Path) -> None:
    shards = EmbeddingShards(bench.make_shards(tmp_path, 3_000, 16, shard_rows=2_000))
    (x,) = shards.batches()
    assert [path.name for path in shards.files] == ["part-00000.parquet", "part-00001.parquet"]
    assert (shards.n_items, shards.dim) == (3_000, 16)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=2e-3)  # float16 has 11 bits
    assert [ids for batch in shards.ids() for ids in batch.to_pylist()][::2999] == ["item-000000000", "item-000002999"]
    assert len(np.unique(x, axis=0)) == 3_000
    # Of 1,000 clusters three items each: the next neighbour is nearer than two thirds of the mean distance.
    distance = np.sqrt(np.maximum(2 - 2 * x @ x.T, 0)) + 9 * np.eye(3_000)
    assert np.median(distance.min(axis=1)) < distance.mean() * 2 / 3


def test_made_embeddings_are_kept_and_cut_off_ones_made_again(tmp_path: Path) -> None:
    folder = bench.make_shards(tmp_path, 300, 8, shard_rows=200)
    first, second = sorted(folder.iterdir())
    content, made = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    bench.make_shards(tmp_path, 300, 8, shard_rows=200)
    assert second.read_bytes() == content
    assert first.stat().st_mtime_ns == made


def test_every_item_is_published_by_a_process_of_its_own(tmp_path: Path) -> None:
    figures = bench.bench_tokenize_scale(2_000, 8, folder=tmp_path, sample_items=500, threads=1)
    assert open_published(tmp_path / "bench-ids-2000x8").ids.n_items == 2_000
    assert [line.split(":")[0] for line in lines(figures)] == [
        "tokenize.scale.items",
        "tokenize.scale.minutes",
        "tokenize.scale.fit_minutes",
        "tokenize.scale.peak_gib",
        "tokenize.scale.items_per_second",
        "tokenize.scale.collision_rate",
    ]
    assert 0.01 < figures["tokenize.scale.peak_gib"].value < 4
    assert figures["tokenize.scale.fit_minutes"].value < figures["tokenize.scale.minutes"].value


def test_a_failed_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(bench.ScaleBenchError, match="exit code 1"):
        bench._in_child(bench.Job(str(tmp_path), str(tmp_path / "published"), 10, 1))
