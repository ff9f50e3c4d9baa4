"""Writing a log folder row by row, in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, object]

_BATCH_ROWS = 50_000
_STRING, _FLOAT, _WHOLE = pa.string(), pa.float64(), pa.int64()

SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "items": {
        "item_id": _STRING,
        "title": _STRING,
        "description": _STRING,
        "brand": _STRING,
        "categories": pa.list_(_STRING),
        "price": _FLOAT,
        "seller_id": _STRING,
        "seller_name": _STRING,
    },
    "interactions": {
        "user_id": _STRING,
        "item_id": _STRING,
        "event": _STRING,
        "timestamp": _WHOLE,
        "history_index": _WHOLE,
        "query": _STRING,
        "request_id": _STRING,
        "rank_shown": pa.int32(),
        "scenario": _STRING,
        "value": _FLOAT,
    },
    "users": {
        "user_id": _STRING,
        "gender": _STRING,
        "age_bucket": _STRING,
        "fre_country": _STRING,
        "fre_province": _STRING,
        "fre_city": _STRING,
    },
    "queries": {"query_id": _STRING, "query": _STRING},
    "qrels": {
        "query_id": _STRING,
        "item_id": _STRING,
        "user_id": _STRING,
        "label": pa.float32(),
        "split": _STRING,
    },
    "relevance": {"query": _STRING, "title": _STRING, "grade": pa.int32()},
}
"""Every table and column that an importer may write."""


class LogWriter:
    """The tables of one import, and the lines that could not be used.

    Tables are written under temporary names and appear together when the ``with`` block ends without error.

    Attributes:
        output: the log folder.
        rows: rows written so far of each table.
        rejected: lines set aside so far of each source file.
        quarantine: the file of those lines, one JSON object each: file, line (from 1), reason, text.
        sources: names of the source files that were read.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.rows: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.sources: set[str] = set()
        self.quarantine = output / "quarantine" / "lines.jsonl"
        self._buffers: dict[str, list[Row]] = {}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._targets: dict[Path, Path] = {}  # temporary name -> final name

    def __enter__(self) -> Self:
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        self._rejects = self.quarantine.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rejects.close()
        if not self.rejected:
            self.quarantine.unlink()
            if not any(self.quarantine.parent.iterdir()):
                self.quarantine.parent.rmdir()
        end = self._discard
        try:
            self._close(flush=kind is None)
            if kind is None:
                end = self._publish
        finally:
            end()

    def declare(self, table: str, *columns: str) -> None:
        """Say which columns of `SCHEMAS` a table will have; its file is written even without rows."""
        schema = pa.schema([(column, SCHEMAS[table][column]) for column in columns])
        self._buffers[table] = []
        self._writers[table] = pq.ParquetWriter(self._partial(f"{table}.parquet"), schema, compression="zstd")

    def add(self, table: str, row: Row) -> None:
        """Write one row; keys that are absent become null."""
        buffer = self._buffers[table]
        buffer.append(row)
        self.rows[table] += 1
        if len(buffer) >= _BATCH_ROWS:
            self._flush(table)

    def copy(self, table: str, source: Path, rows: int) -> None:
        """Take a table over as it is, a file or a folder of shards."""
        self.sources.add(source.name)
        self.rows[table] = rows
        partial = self._partial(source.name)
        if source.is_dir():
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)

    def write(self, table: str, frame: pl.LazyFrame) -> None:
        """Write a table as a whole."""
        partial = self._partial(f"{table}.parquet")
        frame.sink_parquet(partial)
        self.rows[table] = pl.scan_parquet(partial).select(pl.len()).collect().item()

    def reject(self, file: str, line: int, reason: str, text: str) -> None:
        """Set a line aside."""
        self.rejected[file] += 1
        entry = {"file": file, "line": line, "reason": reason, "text": text}
        self._rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _close(self, *, flush: bool) -> None:
        try:
            if flush:
                for table in self._buffers:
                    self._flush(table)
        finally:
            for writer in self._writers.values():
                writer.close()

    def _flush(self, table: str) -> None:
        if self._buffers[table]:
            writer = self._writers[table]
            writer.write_table(pa.Table.from_pylist(self._buffers[table], schema=writer.schema))
            self._buffers[table] = []

    def _partial(self, name: str) -> Path:
        """The temporary name of a file or folder that will be called `name`; nothing is there yet."""
        partial = self.output / f"{name}.partial"
        _remove(partial)
        self._targets[partial] = self.output / name
        return partial

    def _discard(self) -> None:
        for partial in self._targets:
            _remove(partial)

    def _publish(self) -> None:
        for table in SCHEMAS:
            _remove(self.output / f"{table}.parquet")
            _remove(self.output / table)
        for partial, target in self._targets.items():
            partial.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
