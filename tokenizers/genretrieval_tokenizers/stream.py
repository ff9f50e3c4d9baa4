"""Catalogues that do not fit into memory: fit on a sample, encode as a stream.

`EmbeddingShards` reads embeddings from Parquet files a batch at a time, `EmbeddingShards.sample` draws what a tokenizer
is fitted on, and `encode_shards` goes from the files to published IDs. Memory holds one batch of embeddings, and of all
items their codes and ids. Where faiss finds a GPU, fitting may use it; encoding never does, so that codes do not depend
on the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.publish import Published, check_unpublished, checked_ids, publish_codes
from genretrieval_tokenizers.storage import fingerprint
from genretrieval_tokenizers.tokenizer import Tokenizer, unusable_row

BATCH_ROWS = 65_536
"""Rows held as float32 at a time: 100 MB at 384 dimensions."""

_CODES = "codes.partial"
_PIECE_ROWS = 16_384  # decoded by Arrow at a time
_READ_BUFFER = 1 << 20  # without a buffer Arrow reads the whole column of a row group at once


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """Where a row group lies: in `file`, from its row `row` on, which is row `first` of all files."""

    file: Path
    index: int
    row: int
    first: int
    n_rows: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive values of one column; the first is row `row` of `file` and row `first` of all files."""

    file: Path
    row: int
    first: int
    values: pa.Array


class EmbeddingShards:
    """The embeddings of a catalogue in Parquet files.

    The embedding column is a list or fixed-size list of floats; float16 takes half the disk of float32. Rows count from
    0 over all files; those of a folder go by name.

    Attributes:
        files: the Parquet files, in order.
        column: name of the embedding column.
        id_column: name of the item id column, of strings or integers.
        n_items: rows of all files.
        dim: dimensions of the first row; all others must have as many.
    """

    def __init__(self, source: Path | Sequence[Path], column: str = "embedding", id_column: str = "item_id") -> None:
        """Open the files: reads their footers and one row.

        Args:
            source: a folder of ``*.parquet`` files, one file, or several in order.
            column: name of the embedding column.
            id_column: name of the item id column.

        Raises:
            DataError: there is no file or no row; a file is damaged or lacks a column; a column has the wrong type; or
                the first embedding is null or empty.
        """
        self.files = _files(source)
        self.column = column
        self.id_column = id_column
        self._groups = _row_groups(self.files, column, id_column)
        self.n_items = sum(group.n_rows for group in self._groups)
        if not self.n_items:
            raise DataError(f"{self.files[0]} and the files beside it hold no items")
        first = next(self._pieces(self._groups[:1], column, 1))
        if not (length := first.values[0].as_py()):
            raise DataError(f"{first.file}: {column} is null or empty in row 0; every item needs an embedding")
        self.dim = len(length)

    def batches(self, batch_rows: int = BATCH_ROWS, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """The embeddings from row `start` on, float32 ``[batch_rows, dim]``, the last batch shorter.

        Raises:
            DataError: a row is null, has other dimensions than the first one, or cannot be quantised (`unusable_row`);
                the message names the file and the row.
        """
        assert batch_rows > 0
        batch_BD = np.empty((min(batch_rows, self.n_items - start), self.dim), np.float32)
        filled = 0
        for piece in self._pieces([g for g in self._groups if g.first + g.n_rows > start], self.column):
            x_ND = self._vectors(piece)[max(0, start - piece.first) :]
            while len(x_ND):
                taken = x_ND[: len(batch_BD) - filled]
                batch_BD[filled : filled + len(taken)] = taken
                filled += len(taken)
                x_ND = x_ND[len(taken) :]
                if filled == len(batch_BD):
                    yield batch_BD
                    start, filled = start + filled, 0
                    batch_BD = np.empty((min(batch_rows, self.n_items - start), self.dim), np.float32)

    def ids(self, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Array]:
        """The item ids in order, as Arrow arrays of strings of at most `batch_rows`.

        Raises:
            DataError: an id is null; the message names the file and the row.
        """
        for piece in self._pieces(self._groups, self.id_column, batch_rows):
            if piece.values.null_count:
                row = piece.row + _first(piece.values.is_null())
                raise DataError(f"{piece.file}: {self.id_column} is null in row {row}; every item needs an id")
            yield piece.values.cast(pa.string())

    def sample(self, n: int, seed: int) -> NDArray[np.float32]:
        """Embeddings of `n` rows drawn without replacement, each row as likely as any other.

        One pass over the row groups that hold a drawn row. How the rows are cut into files and row groups has no
        influence on which are drawn.

        Args:
            n: rows wanted; all are given where there are no more.
            seed: equal seeds draw equal rows.

        Returns:
            float32 ``[min(n, n_items), dim]``, in the order of the files.

        Raises:
            DataError: `n` is less than 1, or as `batches`; what is wrong with numbers is found in drawn rows only.
        """
        if n < 1:
            raise DataError(f"a sample of {n} rows was asked for; a tokenizer is fitted on at least 1")
        n = min(n, self.n_items)
        rows_N = np.sort(np.random.default_rng(seed).choice(self.n_items, n, replace=False))
        x_ND = np.empty((n, self.dim), np.float32)
        filled = 0
        needed = [g for g in self._groups if len(_within(rows_N, g.first, g.n_rows))]
        for piece in self._pieces(needed, self.column):
            drawn = _within(rows_N, piece.first, len(piece.values)) - piece.first
            x_ND[filled : filled + len(drawn)] = self._vectors(piece, drawn)
            filled += len(drawn)
        return x_ND

    def _pieces(self, groups: Iterable[_RowGroup], column: str, piece_rows: int = _PIECE_ROWS) -> Iterator[_Piece]:
        """One column of some row groups. One thread and no readahead: memory stays that of a piece."""
        for path, groups_of_file in groupby(groups, key=attrgetter("file")):
            try:
                with pq.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
                    for group in groups_of_file:
                        offset = 0
                        for batch in file.iter_batches(
                            piece_rows, row_groups=[group.index], columns=[column], use_threads=False
                        ):
                            yield _Piece(path, group.row + offset, group.first + offset, batch.column(0))
                            offset += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from error

    def _vectors(self, piece: _Piece, rows_N: NDArray[np.int64] | None = None) -> NDArray[np.floating]:
        """Embeddings of a piece, or of some of its rows, in the type of the file, checked."""
        lists, where = piece.values, f"{piece.file}: {self.column}"
        if lists.null_count:
            row = piece.row + _first(lists.is_null())
            raise DataError(f"{where} is null in row {row}; every item needs an embedding")
        lengths_N = lists.value_lengths().to_numpy(zero_copy_only=False)
        if len(wrong := np.flatnonzero(lengths_N != self.dim)):
            raise DataError(
                f"{where} has {lengths_N[wrong[0]]} dimensions in row {piece.row + wrong[0]}, but {self.dim} in the "
                "first row of all; vectors of two embeddings cannot share a tokenizer, embed all items alike"
            )
        values = lists.flatten()
        if values.null_count:
            row = piece.row + _first(values.is_null()) // self.dim
            raise DataError(f"{where} holds a null in row {row}; write a number for every dimension")
        x_ND: NDArray[np.floating] = values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        rows_N = np.arange(len(x_ND)) if rows_N is None else rows_N
        x_ND = x_ND if len(rows_N) == len(x_ND) else x_ND[rows_N]
        if unusable := unusable_row(x_ND):
            row, why = unusable
            raise DataError(f"{where} in row {piece.row + rows_N[row]} {why}")
        return x_ND


def encode_shards(
    shards: EmbeddingShards,
    tokenizer: Tokenizer,
    collisions: CollisionConfig,
    output: Path,
    *,
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], object] | None = None,
) -> Published:
    """Give every item of the shards its semantic ID, for good: `publish.publish` for more items than fit into memory.

    Codes are kept in `output` as they are made. Calling this again after it was cut off goes on behind the last batch;
    with another tokenizer, or when a file has changed since, it starts over. The batch size changes no ID.

    Args:
        shards: embeddings and ids of the items, each item once.
        tokenizer: a fitted tokenizer.
        collisions: what becomes of items with equal codes. "reassign" is refused: it compares the embeddings of all
            items of a prefix, and they are never together in memory.
        output: folder to publish into; made where missing, must hold no published IDs.
        batch_rows: rows encoded at a time, held as float32.
        progress: called with the number of rows encoded so far, after each batch.

    Raises:
        DataError: as `EmbeddingShards.batches`, `EmbeddingShards.ids` and `publish.publish_codes`; the collision
            method is "reassign"; or the embeddings have other dimensions than the tokenizer.
    """
    # First all that could be refused after the long part.
    check_streamable(collisions)
    _check_dimensions(shards, tokenizer)
    check_unpublished(output)
    item_ids = checked_ids(pa.chunked_array(shards.ids()), shards.n_items)
    output.mkdir(parents=True, exist_ok=True)
    kept = _KeptCodes(output / _CODES, _identity(shards, tokenizer), len(tokenizer.codebook_sizes))
    for batch_BD in shards.batches(batch_rows, start=kept.n_rows):
        kept.append(tokenizer.encode(batch_BD))
        if progress:
            progress(kept.n_rows)
    published = publish_codes(output, tokenizer, collisions, item_ids, kept.read())
    kept.path.unlink()
    return published


class _KeptCodes:
    """Codes of the rows encoded so far, in a file that survives the process.

    The file is the identity of what is encoded, then int32 codes row by row. Rows are appended whole batches at a time;
    what a killed process wrote of a row is cut off.
    """

    def __init__(self, path: Path, identity: bytes, n_levels: int) -> None:
        self.path = path
        self._n_levels = n_levels
        self._header = len(identity)
        try:
            with path.open("rb") as file:
                ours = file.read(len(identity)) == identity
        except FileNotFoundError:
            ours = False
        if ours:
            self.n_rows = (path.stat().st_size - self._header) // self._row_bytes
            os.truncate(path, self._header + self.n_rows * self._row_bytes)
        else:
            self.n_rows = 0
            path.write_bytes(identity)

    @property
    def _row_bytes(self) -> int:
        return self._n_levels * np.dtype(np.int32).itemsize

    def append(self, codes_BL: Codes) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(codes_BL, np.int32).data)
        self.n_rows += len(codes_BL)

    def read(self) -> Codes:
        """All of them, int32 ``[n_rows, n_levels]``."""
        return np.fromfile(self.path, np.int32, offset=self._header).reshape(-1, self._n_levels)


def _identity(shards: EmbeddingShards, tokenizer: Tokenizer) -> bytes:
    """32 bytes that differ where codes would: by tokenizer, column, and name, size and time of any file."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "tokenizer"
        tokenizer.save(saved)
        made_by = fingerprint(saved)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards.files]
    return hashlib.sha256(json.dumps([made_by, shards.column, files]).encode()).digest()


def check_streamable(collisions: CollisionConfig) -> None:
    """Refuse what cannot be done without all embeddings together in memory.

    Raises:
        DataError: last codes are to be reassigned.
    """
    if collisions.method == "reassign":
        raise DataError(
            "collisions.method is 'reassign', which compares the embeddings of all items of a prefix; as a stream they "
            "are never together in memory. Set collisions.method: dedup or none, or publish from memory"
        )


def _check_dimensions(shards: EmbeddingShards, tokenizer: Tokenizer) -> None:
    if shards.dim != tokenizer.dim:
        raise DataError(
            f"{shards.files[0]}: {shards.column} has {shards.dim} dimensions, the tokenizer {tokenizer.dim}: they come "
            "from another embedding; embed the items with the recipe that the tokenizer was fitted with"
        )


def _files(source: Path | Sequence[Path]) -> tuple[Path, ...]:
    if not isinstance(source, Path):
        files = tuple(source)
    elif source.is_dir():
        files = tuple(sorted(source.glob("*.parquet")))
    else:
        files = (source,)
    if not files:
        raise DataError(f"{source} holds no *.parquet file; give the folder of the embeddings")
    return files


def _row_groups(files: Iterable[Path], column: str, id_column: str) -> list[_RowGroup]:
    """The row groups of all files that hold rows, after a look at the columns' types."""
    expected = ((column, _is_embedding, "a list of floats"), (id_column, _is_id, "a string or integer"))
    groups: list[_RowGroup] = []
    first = 0
    for path in files:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        schema = metadata.schema.to_arrow_schema()
        for name, fits, wanted in expected:
            if name not in schema.names:
                raise DataError(f"{path} has no column {name!r}, only {', '.join(schema.names)}; name the right one")
            if not fits(schema.field(name).type):
                raise DataError(f"{path}: {name} is {schema.field(name).type}, not {wanted}; name another column")
        row = 0
        for index in range(metadata.num_row_groups):
            n_rows = metadata.row_group(index).num_rows
            if n_rows:
                groups.append(_RowGroup(path, index, row, first, n_rows))
            row, first = row + n_rows, first + n_rows
    return groups


def _is_embedding(type_: pa.DataType) -> bool:
    lists = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return bool(lists and pa.types.is_floating(type_.value_type))


def _is_id(type_: pa.DataType) -> bool:
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_integer(type_))


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as Parquet ({error}); write it again")


def _first(is_so: pa.BooleanArray | NDArray[np.bool_]) -> int:
    """Position of the first True."""
    return int(np.argmax(np.asarray(is_so)))


def _within(sorted_N: NDArray[np.int64], first: int, n: int) -> NDArray[np.int64]:
    """Those of `sorted_N` in ``[first, first + n)``."""
    low, high = np.searchsorted(sorted_N, [first, first + n])
    return sorted_N[low:high]
