"""Reading released files line by line, and the fields of a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from genretrieval.errors import DataError
from genretrieval_pipelines.importers.writing import LogWriter, Row

Record = dict[str, object]
Convert = Callable[[Record], Iterable[tuple[str, Row]]]
"""Turns a record into rows of named tables; raises ValueError with the reason where it cannot."""

_BATCH_ROWS = 10_000


def find(source: Path, *patterns: str) -> list[Path]:
    """Files that match the first pattern for which `source` has any, in the order of their names."""
    for pattern in patterns:
        if files := sorted(path for path in source.glob(pattern) if path.is_file()):
            return files
    return []


def require(source: Path, *patterns: str) -> list[Path]:
    """Like `find`, but there must be one.

    Raises:
        DataError: naming what was looked for.
    """
    if files := find(source, *patterns):
        return files
    raise DataError(f"{source} holds none of {', '.join(patterns)}; download that file of the release into it")


def convert_file(path: Path, parse: Callable[[str], object], convert: Convert, writer: LogWriter) -> None:
    """Write what `convert` makes of every line of `path` that is not blank; lines that fail are set aside.

    Args:
        path: a text file, possibly gzipped, or a Parquet file, whose rows count as lines.
        parse: from a line to a record; raises ValueError. Not used for Parquet.
        convert: from a record to rows.
        writer: takes the rows.

    Raises:
        DataError: if the file is damaged, so that its lines cannot be read to the end.
    """
    writer.sources.add(path.name)
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        try:
            record = line if isinstance(line, dict) else parse(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}, not a record of named fields")
            rows = list(convert(record))
        except (ValueError, RecursionError) as error:
            writer.reject(path.name, number, str(error), _as_text(line))
            continue
        for table, row in rows:
            writer.add(table, row)


def _lines(path: Path) -> Iterator[bytes | Record]:
    try:
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for line in file:
                    yield line.strip()
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error


def _as_text(line: bytes | Record) -> str:
    return json.dumps(line) if isinstance(line, dict) else line.decode("utf-8", "backslashreplace")


def _encodable(value: str) -> str:
    """`value`, unless it holds half of a surrogate pair, which JSON can spell and Parquet cannot store."""
    value.encode("utf-8")
    return value


def identity(record: Record, name: str) -> str:
    """An id that must be there, as text."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{name} is {value!r}, not an id")
    return _encodable(str(value))


def identities(record: Record, name: str) -> list[str]:
    """A list of ids that must be there but may be empty."""
    values = record.get(name)
    if not isinstance(values, list):
        raise ValueError(f"{name} is {values!r}, not a list of ids")
    return [identity({name: value}, name) for value in values]


def text(record: Record, name: str, unknown: Sequence[str] = ()) -> str | None:
    """A text, None where it is absent, blank, or one of the source's words for unknown."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, list | dict):
        raise ValueError(f"{name} is {value!r}, not a text")
    stripped = _encodable(str(value)).strip()
    return stripped if stripped and stripped not in unknown else None


def number(record: Record, name: str) -> float | None:
    """A number, None where it is absent."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {value!r}, not a number")
    return float(value)


def whole(record: Record, name: str) -> int:
    """A whole number of 64 bits that must be there."""
    value = record.get(name)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value
