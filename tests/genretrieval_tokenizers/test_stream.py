from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.publish import open_published, publish
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.stream import EmbeddingShards, encode_shards

DIM = 6
DEDUP = CollisionConfig()


def vectors(n: int = 100, seed: int = 0) -> NDArray[np.float16]:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float16)


def lists(x: NDArray[np.floating], kind: str = "list") -> pa.Array:
    offsets, values = np.arange(0, x.size + 1, x.shape[1]), pa.array(x.reshape(-1))
    if kind == "list":
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    if kind == "large_list":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    return pa.FixedSizeListArray.from_arrays(values, x.shape[1])


def write(
    folder: Path, x: NDArray[np.floating], cuts: Sequence[int] = (), kind: str = "list", rows_of_group: int = 7
) -> Path:
    """Shards of the rows between `cuts`, in row groups of seven."""
    folder.mkdir(exist_ok=True)
    bounds = [0, *cuts, len(x)]
    for shard, (start, stop) in enumerate(pairwise(bounds)):
        ids = pa.array([f"i{row}" for row in range(start, stop)], pa.string())
        table = pa.table({"item_id": ids, "embedding": lists(x[start:stop], kind)})
        pq.write_table(table, folder / f"part-{shard}.parquet", row_group_size=rows_of_group)
    return folder


def write_columns(folder: Path, item_id: pa.Array, embedding: pa.Array) -> Path:
    """Twenty good rows in one shard, then these in another."""
    write(folder, vectors(20))
    pq.write_table(pa.table({"item_id": item_id, "embedding": embedding}), folder / "part-1.parquet", row_group_size=2)
    return folder


# --- reading ---


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batches_are_the_rows_in_order(tmp_path: Path, kind: str, dtype: type[np.floating]) -> None:
    x = vectors(40).astype(dtype)
    shards = EmbeddingShards(write(tmp_path / "e", x, cuts=(11, 12), kind=kind))
    assert (shards.n_items, shards.dim, len(shards.files)) == (40, DIM, 3)
    batches = list(shards.batches(16))
    assert [batch.shape for batch in batches] == [(16, DIM), (16, DIM), (8, DIM)]
    assert all(batch.dtype == np.float32 for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), x.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(batch_rows=st.integers(1, 50), start=st.integers(0, 40))
def test_batches_from_any_row_in_any_size(
    tmp_path_factory: pytest.TempPathFactory, batch_rows: int, start: int
) -> None:
    x = vectors(40)
    shards = EmbeddingShards(write(tmp_path_factory.getbasetemp() / "any", x, cuts=(11, 12, 12)))
    batches = list(shards.batches(batch_rows, start))
    assert [len(batch) for batch in batches[:-1]] == [batch_rows] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, DIM)), *batches]), x[start:])


def test_dictionary_and_integer_ids_are_texts(tmp_path: Path) -> None:
    write_columns(tmp_path / "e", pa.array([5, 6]), lists(vectors(2)))
    ids = pa.array([f"i{row}" for row in range(20)]).dictionary_encode()
    pq.write_table(pa.table({"item_id": ids, "embedding": lists(vectors(20))}), tmp_path / "e" / "part-0.parquet")
    found = [text for ids in EmbeddingShards(tmp_path / "e").ids(8) for text in ids.to_pylist()]
    assert found == [f"i{row}" for row in range(20)] + ["5", "6"]


# --- sampling ---


def test_sample_is_some_of_the_rows_each_once_and_the_same_for_a_seed(tmp_path: Path) -> None:
    x = vectors(100)
    shards = EmbeddingShards(write(tmp_path / "e", x, cuts=(30, 31)))
    rows = {row.tobytes(): number for number, row in enumerate(x.astype(np.float32))}
    sample = shards.sample(20, seed=3)
    drawn = [rows[row.tobytes()] for row in sample]
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn)
    np.testing.assert_array_equal(sample, shards.sample(20, seed=3))
    assert not np.array_equal(sample, shards.sample(20, seed=4))


def test_sample_does_not_depend_on_files_and_row_groups(tmp_path: Path) -> None:
    one = EmbeddingShards(write(tmp_path / "one", vectors(), rows_of_group=100))
    many = EmbeddingShards(write(tmp_path / "many", vectors(), cuts=(1, 50), rows_of_group=3))
    np.testing.assert_array_equal(one.sample(15, seed=0), many.sample(15, seed=0))


def test_sample_of_more_than_all_is_all(tmp_path: Path) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", vectors()))
    np.testing.assert_array_equal(shards.sample(10**6, seed=0), vectors().astype(np.float32))


def test_every_row_is_as_likely_to_be_drawn(tmp_path: Path) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", np.arange(8, dtype=np.float16)[:, None], cuts=(3,)))
    drawn = np.concatenate([shards.sample(2, seed).ravel().astype(int) for seed in range(200)])
    # 400 draws over 8 rows: 50 each, standard deviation sqrt(200 * 1/4 * 3/4) = 6.1; five of them are 31.
    assert np.abs(np.bincount(drawn, minlength=8) - 50).max() < 31


def test_sample_reads_only_row_groups_that_hold_a_drawn_row(tmp_path: Path) -> None:
    # A group of NaN is read by a full sample, and not by one that draws no row of it.
    x = vectors(100).astype(np.float32)
    x[50:] = np.nan
    shards = EmbeddingShards(write(tmp_path / "e", x, rows_of_group=1))
    seed = next(s for s in range(50) if (np.random.default_rng(s).choice(100, 2, replace=False) < 50).all())
    assert np.isfinite(shards.sample(2, seed)).all()
    with pytest.raises(DataError, match=r"part-0.parquet: embedding in row 50 holds NaN or infinity"):
        shards.sample(100, seed)


def test_an_empty_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample of 0 rows"):
        EmbeddingShards(write(tmp_path / "e", vectors())).sample(0, seed=0)


# --- bad input ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0] * DIM, [1.0] * DIM, [0.0, np.nan, 0, 0, 0, 0]], "in row 2 holds NaN or infinity"),
        ([[1.0] * DIM, [0.0, np.inf, 0, 0, 0, 0]], "in row 1 holds NaN or infinity"),
        ([[1.0] * DIM, [3e37, 0, 0, 0, 0, 0]], r"in row 1 is longer than 1e\+15.*divide all vectors"),
        ([[1.0] * DIM, [1.0] * DIM, [1.0] * 5], "has 5 dimensions in row 2, but 6 in the first row"),
        ([[1.0] * DIM, [1.0] * DIM, [1.0] * DIM, None], "is null in row 3"),
        ([[1.0] * DIM, [1.0] * 5 + [None]], "holds a null in row 1"),
    ],
)
def test_a_bad_embedding_is_named_by_file_and_row(tmp_path: Path, bad: list[list[float]], message: str) -> None:
    ids = pa.array([f"x{row}" for row in range(len(bad))])
    shards = EmbeddingShards(write_columns(tmp_path / "e", ids, pa.array(bad, pa.list_(pa.float32()))))
    with pytest.raises(DataError, match=rf"part-1.parquet: embedding {message}"):
        list(shards.batches(4))


def test_a_null_in_a_fixed_size_list_is_named(tmp_path: Path) -> None:
    bad = pa.array([[1.0] * DIM, [1.0] * DIM, None], pa.list_(pa.float32(), DIM))
    shards = EmbeddingShards(write_columns(tmp_path / "e", pa.array(["a", "b", "c"]), bad))
    with pytest.raises(DataError, match=r"part-1.parquet: embedding is null in row 2"):
        list(shards.batches(4))


def test_a_null_id_is_named_by_file_and_row(tmp_path: Path) -> None:
    shards = EmbeddingShards(write_columns(tmp_path / "e", pa.array(["a", "b", "c", None]), lists(vectors(4))))
    with pytest.raises(DataError, match=r"part-1.parquet: item_id is null in row 3"):
        list(shards.ids(4))


def test_a_folder_without_files_or_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.parquet"):
        EmbeddingShards(tmp_path)
    with pytest.raises(DataError, match="hold no items"):
        EmbeddingShards(write(tmp_path / "e", vectors(0)))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        EmbeddingShards(tmp_path)


def test_columns_that_are_not_there_or_of_another_type_are_named(tmp_path: Path) -> None:
    write(tmp_path / "e", vectors())
    with pytest.raises(DataError, match="has no column 'vector', only item_id, embedding"):
        EmbeddingShards(tmp_path / "e", column="vector")
    with pytest.raises(DataError, match="item_id is string, not a list of floats"):
        EmbeddingShards(tmp_path / "e", column="item_id", id_column="embedding")
    with pytest.raises(DataError, match="embedding is list<element: halffloat>, not a string or integer"):
        EmbeddingShards(tmp_path / "e", id_column="embedding")


# --- encoding ---


def tokenizer(seed: int = 0) -> RqKMeans:
    return RqKMeans.fit(vectors(), RqKMeansConfig(codebook_sizes=(4, 4), iterations=3, seed=seed))


class Killed(Exception):
    pass


class Watched:
    """A tokenizer that counts the rows it encodes, and is killed when they become more than `lives`."""

    def __init__(self, of: RqKMeans, lives: int = 10**9) -> None:
        self.of, self.lives, self.encoded = of, lives, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.of, name)

    def encode(self, x_ND: NDArray[np.floating]) -> Codes:
        if self.encoded + len(x_ND) > self.lives:
            raise Killed
        self.encoded += len(x_ND)
        return self.of.encode(x_ND)


def assert_like_publishing_from_memory(folder: Path, x: NDArray[np.floating], of: RqKMeans) -> None:
    expected = publish(folder / "memory", of, DEDUP, [f"i{row}" for row in range(len(x))], x)
    found = open_published(folder / "stream")
    np.testing.assert_array_equal(found.ids.codes, expected.ids.codes)
    assert found.ids.codebook_sizes == expected.ids.codebook_sizes
    assert found.item_ids.equals(expected.item_ids)
    assert sorted(path.name for path in (folder / "stream").iterdir()) == [
        "codebooks.safetensors",
        "published.json",
        "semantic_ids.parquet",
    ]


@pytest.mark.parametrize(("cuts", "batch_rows"), [((), 1000), ((30, 31), 7), ((50,), 1)])
def test_a_stream_publishes_what_memory_does(tmp_path: Path, cuts: tuple[int, ...], batch_rows: int) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", vectors(), cuts))
    returned = encode_shards(shards, tokenizer(), DEDUP, tmp_path / "stream", batch_rows=batch_rows)
    assert_like_publishing_from_memory(tmp_path, vectors(), tokenizer())
    np.testing.assert_array_equal(returned.ids.codes, open_published(tmp_path / "stream").ids.codes)


def test_items_share_ids_where_that_is_asked_for(tmp_path: Path) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", vectors()))
    ids = encode_shards(shards, tokenizer(), CollisionConfig(method="none"), tmp_path / "stream").ids
    np.testing.assert_array_equal(ids.codes, tokenizer().encode(vectors()))


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[int] = []
    shards = EmbeddingShards(write(tmp_path / "e", vectors(), cuts=(50,)))
    encode_shards(shards, tokenizer(), DEDUP, tmp_path / "stream", batch_rows=40, progress=seen.append)
    assert seen == [40, 80, 100]


@pytest.fixture
def cut_off(tmp_path: Path) -> Path:
    """A folder whose encoding was killed after 60 of 100 rows, in the middle of the second shard."""
    shards = EmbeddingShards(write(tmp_path / "e", vectors(), cuts=(50,)))
    with pytest.raises(Killed):
        encode_shards(shards, Watched(tokenizer(), lives=60), DEDUP, tmp_path / "stream", batch_rows=20)
    return tmp_path


def test_a_killed_encoding_has_published_nothing(cut_off: Path) -> None:
    with pytest.raises(DataError, match="never finished"):
        open_published(cut_off / "stream")


def test_a_killed_encoding_goes_on_where_it_was(cut_off: Path) -> None:
    watched = Watched(tokenizer())
    encode_shards(EmbeddingShards(cut_off / "e"), watched, DEDUP, cut_off / "stream", batch_rows=33)
    assert watched.encoded == 40
    assert_like_publishing_from_memory(cut_off, vectors(), tokenizer())


def test_half_a_row_of_a_killed_encoding_is_made_again(cut_off: Path) -> None:
    with (cut_off / "stream" / "codes.partial").open("r+b") as file:
        file.truncate(32 + 60 * 8 - 3)  # 32 bytes of header, 8 a row of two int32
    watched = Watched(tokenizer())
    encode_shards(EmbeddingShards(cut_off / "e"), watched, DEDUP, cut_off / "stream")
    assert watched.encoded == 41
    assert_like_publishing_from_memory(cut_off, vectors(), tokenizer())


def test_codes_of_another_tokenizer_are_not_taken_up(cut_off: Path) -> None:
    watched = Watched(tokenizer(seed=1))
    encode_shards(EmbeddingShards(cut_off / "e"), watched, DEDUP, cut_off / "stream")
    assert watched.encoded == 100
    assert_like_publishing_from_memory(cut_off, vectors(), tokenizer(seed=1))


def test_codes_of_files_that_have_changed_are_not_taken_up(cut_off: Path) -> None:
    watched = Watched(tokenizer())
    shards = EmbeddingShards(write(cut_off / "e", vectors(seed=5), cuts=(50,)))
    encode_shards(shards, watched, DEDUP, cut_off / "stream")
    assert watched.encoded == 100
    assert_like_publishing_from_memory(cut_off, vectors(seed=5), tokenizer())


@pytest.mark.parametrize(
    ("collisions", "dim", "message"),
    [
        (CollisionConfig(method="reassign"), DIM, "never together in memory"),
        (DEDUP, DIM + 1, f"embedding has {DIM + 1} dimensions, the tokenizer {DIM}"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_encoding(
    tmp_path: Path, collisions: CollisionConfig, dim: int, message: str
) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", np.ones((3, dim), np.float16)))
    with pytest.raises(DataError, match=message):
        encode_shards(shards, tokenizer(), collisions, tmp_path / "stream")
    assert not (tmp_path / "stream").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", None, "c"], r"part-1.parquet: item_id is null in row 1"),
        (["a", "b", "a"], r"1 item ids occur more than once, first 'a'"),
    ],
)
def test_missing_and_repeated_ids_are_found_before_encoding(
    tmp_path: Path, ids: list[str | None], message: str
) -> None:
    shards = EmbeddingShards(write_columns(tmp_path / "e", pa.array(ids), lists(vectors(3))))
    watched = Watched(tokenizer())
    with pytest.raises(DataError, match=message):
        encode_shards(shards, watched, DEDUP, tmp_path / "stream")
    assert watched.encoded == 0


def test_published_ids_are_not_written_over(tmp_path: Path) -> None:
    shards = EmbeddingShards(write(tmp_path / "e", vectors()))
    encode_shards(shards, tokenizer(), DEDUP, tmp_path / "stream")
    watched = Watched(tokenizer(seed=1))
    with pytest.raises(DataError, match="would re-key"):
        encode_shards(shards, watched, DEDUP, tmp_path / "stream")
    assert watched.encoded == 0
