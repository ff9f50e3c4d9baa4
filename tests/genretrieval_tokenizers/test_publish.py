from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.publish import append, open_published, publish, publish_codes
from genretrieval_tokenizers.storage import write_tokenizer

NONE, DEDUP, REASSIGN = (CollisionConfig(method=method) for method in ("none", "dedup", "reassign"))
METHODS = pytest.mark.parametrize("config", [NONE, DEDUP, REASSIGN], ids=lambda config: config.method)


@dataclass(frozen=True)
class _Settings:
    seed: int = 0


@dataclass(frozen=True)
class Grid:
    """The smallest tokenizer: coordinates 0 and 1 of a vector, each to the nearest whole number."""

    codebook_sizes: tuple[int, ...] = (4, 8)
    seed: int = 0
    dim: int = 2
    notes: tuple[str, ...] = ()

    def encode(self, x_ND: NDArray[np.floating]) -> Codes:
        return np.clip(np.rint(x_ND), 0, np.array(self.codebook_sizes) - 1).astype(np.int32)

    def decode(self, codes_NL: Codes) -> NDArray[np.float32]:
        return codes_NL[:, :2].astype(np.float32)

    def last_level_costs(self, x_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        return ((x_ND[:, 1:] - np.arange(self.codebook_sizes[-1])) ** 2).astype(np.float32)

    def save(self, path: Path) -> None:
        write_tokenizer(path, "genretrieval.grid.1", _Settings(self.seed), {"sizes": np.array(self.codebook_sizes)})


def names(start: int, stop: int) -> list[str]:
    return [f"item-{row}" for row in range(start, stop)]


def vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    """Each prefix has 8 last codes, so reassignment has room for 20 items."""
    rng = np.random.default_rng(seed)
    return np.column_stack([np.arange(n) % 4, rng.uniform(0, 7, n)]).astype(np.float32)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@METHODS
def test_what_is_published_is_what_is_opened(tmp_path: Path, config: CollisionConfig) -> None:
    published = publish(tmp_path / "shop", Grid(), config, names(0, 20), vectors(20))
    opened = open_published(tmp_path / "shop")
    assert opened.item_ids.to_pylist() == names(0, 20)
    assert np.array_equal(opened.ids.codes, published.ids.codes)
    assert opened.ids.codebook_sizes == published.ids.codebook_sizes
    assert (opened.collisions, opened.fingerprint) == (config, published.fingerprint)
    assert (opened.moved, opened.added_cost) == (published.moved, published.added_cost)
    assert (opened.moved > 0) == (config.method == "reassign")
    assert files(tmp_path / "shop") == ["codebooks.safetensors", "published.json", "semantic_ids.parquet"]


def test_others_can_read_the_ids(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), CollisionConfig(headroom=1), ["a", "b"], np.array([[1, 5], [1, 5]], np.float32))
    table = pq.read_table(tmp_path / "semantic_ids.parquet")
    assert table.schema.field("semantic_id").type == pa.list_(pa.int32())
    assert table.to_pylist() == [
        {"item_id": "a", "semantic_id": [1, 5, 0]},
        {"item_id": "b", "semantic_id": [1, 5, 1]},
    ]
    manifest = json.loads((tmp_path / "published.json").read_text())
    assert manifest["codebook_sizes"] == [4, 8, 3]
    assert manifest["n_items"] == 2


@METHODS
def test_appending_never_moves_an_id(tmp_path: Path, config: CollisionConfig) -> None:
    x = vectors(26)
    before = publish(tmp_path, Grid(), config, names(0, 20), x[:20])
    after = append(tmp_path, Grid(), names(20, 26), x[20:])
    opened = open_published(tmp_path)
    assert np.array_equal(opened.ids.codes[:20], before.ids.codes)
    assert np.array_equal(opened.ids.codes, after.ids.codes)
    assert opened.item_ids.to_pylist() == names(0, 26)
    assert opened.ids.codebook_sizes == before.ids.codebook_sizes
    if config is not NONE:
        assert len({tuple(row) for row in opened.ids.codes.tolist()}) == 26


def test_the_price_of_reassigning_is_kept_over_appends(tmp_path: Path) -> None:
    # Two items at (0, 3): one moves to code 2 or 4, distance 1, mean 1/2. Then one more at (0, 3) pays 1 as well.
    at = np.array([[0, 3]], np.float32)
    assert publish(tmp_path, Grid(), REASSIGN, ["a", "b"], np.repeat(at, 2, axis=0)).added_cost == pytest.approx(1 / 2)
    append(tmp_path, Grid(), ["c"], at)
    opened = open_published(tmp_path)
    assert opened.moved == 2
    assert opened.added_cost == pytest.approx(2 / 3)


@METHODS
def test_an_item_published_before_keeps_its_id_and_that_is_said(tmp_path: Path, config: CollisionConfig) -> None:
    x = np.array([[0, 0], [1, 1], [2, 2]], np.float32)
    before = publish(tmp_path, Grid(), config, ["a", "b", "c"], x)
    # "b" comes with another embedding, "c" with the one it had.
    after = append(tmp_path, Grid(), ["b", "new", "c"], np.array([[3, 3], [0, 5], [2, 2]], np.float32))
    assert after.item_ids.to_pylist() == ["a", "b", "c", "new"]
    assert np.array_equal(after.ids.codes[:3], before.ids.codes)
    assert after.notes[0].startswith("2 of 3 items are published already and keep their IDs; 1 of them would get other")


@pytest.mark.parametrize("tokenizer", [Grid(seed=1), Grid(codebook_sizes=(4, 9))])
def test_a_changed_tokenizer_is_refused_with_the_consequence(tmp_path: Path, tokenizer: Grid) -> None:
    publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    content = (tmp_path / "semantic_ids.parquet").read_bytes()
    with pytest.raises(DataError, match=r"would re-key every published ID: 5 items.*train the generator anew"):
        append(tmp_path, tokenizer, ["new"], vectors(1))
    assert (tmp_path / "semantic_ids.parquet").read_bytes() == content


def test_a_changed_codebook_file_is_refused_with_the_consequence(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    Grid(seed=1).save(tmp_path / "codebooks.safetensors")
    with pytest.raises(DataError, match=r"codebooks.safetensors is not.*would re-key every published ID"):
        open_published(tmp_path)
    with pytest.raises(DataError, match="would re-key every published ID"):
        append(tmp_path, Grid(seed=1), ["new"], vectors(1))
    (tmp_path / "codebooks.safetensors").unlink()
    with pytest.raises(DataError, match="no item can be added"):
        open_published(tmp_path)


def test_publishing_over_published_ids_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    with pytest.raises(DataError, match="would re-key every published ID"):
        publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))


def fail_at_rename(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The process dies as `target` is about to appear."""
    rename: Callable[..., None] = os.replace

    def replace(source: Path, destination: Path) -> None:
        if Path(destination).name == target:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("target", ["codebooks.safetensors", "semantic_ids.parquet", "published.json"])
def test_publishing_that_was_cut_off_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with monkeypatch.context() as patch:
        fail_at_rename(patch, target)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    with pytest.raises(DataError, match="never finished"):
        open_published(tmp_path)
    publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    assert open_published(tmp_path).ids.n_items == 5
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("target", ["semantic_ids.parquet", "published.json"])
def test_an_append_that_was_cut_off_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    before = publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    with monkeypatch.context() as patch:
        fail_at_rename(patch, target)
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path, Grid(), names(5, 9), vectors(4))
    opened = open_published(tmp_path)
    assert opened.item_ids.to_pylist() == names(0, 5)
    assert np.array_equal(opened.ids.codes, before.ids.codes)
    again = append(tmp_path, Grid(), names(7, 9), vectors(2))  # other items than those that were cut off
    assert open_published(tmp_path).item_ids.to_pylist() == [*names(0, 5), *names(7, 9)]
    assert np.array_equal(open_published(tmp_path).ids.codes, again.ids.codes)


def test_an_append_that_finds_no_room_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), CollisionConfig(headroom=0), ["a"], vectors(1))
    with pytest.raises(DataError, match="no free code"):
        append(tmp_path, Grid(), ["b"], vectors(1))
    assert open_published(tmp_path).item_ids.to_pylist() == ["a"]


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), DEDUP, ["a"], vectors(1))
    written = (tmp_path / "published.json").stat().st_mtime_ns
    assert append(tmp_path, Grid(), ["a"], vectors(1)).ids.n_items == 1
    assert append(tmp_path, Grid(), [], vectors(0)).ids.n_items == 1
    assert (tmp_path / "published.json").stat().st_mtime_ns == written


def test_codes_that_came_as_a_stream_publish_the_same(tmp_path: Path) -> None:
    x = vectors(20)
    whole = publish(tmp_path / "a", Grid(), REASSIGN, names(0, 20), x)
    ids = pa.chunked_array([names(0, 7), names(7, 20)])
    streamed = publish_codes(
        tmp_path / "b", Grid(), REASSIGN, ids, Grid().encode(x), lambda rows: Grid().last_level_costs(x[rows])
    )
    assert np.array_equal(whole.ids.codes, streamed.ids.codes)
    name = "semantic_ids.parquet"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("item_ids", "match"),
    [
        (["a", "b", "a"], "1 item ids occur more than once, first 'a'"),
        (["a", None, "b"], "1 item ids are missing"),
        (["a", "b"], "2 item ids for 3 embeddings"),
        ([1, 2, 3], "must be strings"),
    ],
)
def test_item_ids_that_name_no_single_item_are_refused(tmp_path: Path, item_ids: list[str], match: str) -> None:
    with pytest.raises(DataError, match=match):
        publish(tmp_path, Grid(), DEDUP, item_ids, vectors(3))
    assert files(tmp_path) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), DEDUP, names(0, 5), vectors(5))
    manifest, ids = tmp_path / "published.json", tmp_path / "semantic_ids.parquet"
    whole = manifest.read_text(), ids.read_bytes()
    for text, match in [
        ("{", "damaged"),
        ("[]", "not of this version"),
        (whole[0].replace("n_items", "items"), "damaged"),
        (whole[0].replace('"n_items": 5', '"n_items": 6'), "does not hold the 6 IDs"),
    ]:
        manifest.write_text(text)
        with pytest.raises(DataError, match=match):
            open_published(tmp_path)
    manifest.write_text(whole[0])
    ids.write_bytes(whole[1][:-20])
    with pytest.raises(DataError, match=r"semantic_ids.parquet cannot be read"):
        open_published(tmp_path)
    pq.write_table(pa.table({"item_id": names(0, 5), "semantic_id": [[0, 0, 0]] * 4 + [[0]]}), ids)
    with pytest.raises(DataError, match="does not hold"):
        open_published(tmp_path)


def test_a_shop_without_items(tmp_path: Path) -> None:
    publish(tmp_path, Grid(), DEDUP, [], vectors(0))
    assert open_published(tmp_path).ids.n_items == 0
    append(tmp_path, Grid(), ["a"], vectors(1))
    assert open_published(tmp_path).ids.n_items == 1
