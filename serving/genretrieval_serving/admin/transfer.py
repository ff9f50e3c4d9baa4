"""Resources as files: JSON Lines, and CSV for spreadsheets. What is exported and imported again is the same.

A spreadsheet runs a cell that begins with one of ``= + - @``, a tab or a carriage return as a formula. Such cells get
a ``'`` in front when they are written, and lose it when they are read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from genretrieval.errors import RequestError
from genretrieval_serving.admin.messages import FIELDS, NEW, NewResource, fields_of
from genretrieval_serving.admin.resources import Kind, Resource
from genretrieval_serving.messages import MAX_BODY_BYTES, request_error

# Columns whose cells are text as it stands; all others hold JSON.
_TEXT = frozenset({"id", "text", "type", "kind", "note", "bundle", "valid_from", "valid_until"})
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")
# A cell may hold the ids of a whole binding; the module's own limit is 128 KiB.
csv.field_size_limit(MAX_BODY_BYTES)


class FileFormat(StrEnum):
    """How resources stand in a file."""

    JSONL = "jsonl"
    CSV = "csv"


def write(kind: Kind, resources: Iterable[Resource], file_format: FileFormat) -> str:
    """Ids and fields of resources, one a line; what the server adds to them is left out."""
    rows = [
        {"id": resource.id, **fields_of(kind, resource).model_dump(mode="json", exclude_none=True)}
        for resource in resources
    ]
    if file_format is FileFormat.JSONL:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, _columns(kind))
    writer.writeheader()
    writer.writerows({column: _cell(column, value) for column, value in row.items()} for row in rows)
    return file.getvalue()


def read(kind: Kind, content: bytes, file_format: FileFormat) -> list[NewResource]:
    """What `write` wrote, or somebody by hand.

    Raises:
        RequestError: a line cannot be read; the message has its number.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"byte {error.start} is no UTF-8; save the file as UTF-8") from error
    rows = _json_rows(text) if file_format is FileFormat.JSONL else _csv_rows(kind, text)
    return [_resource(kind, line, row) for line, row in rows]


def _resource(kind: Kind, line: int, row: dict[str, Any]) -> NewResource:
    try:
        return NEW[kind].model_validate(row)
    except ValidationError as error:
        raise RequestError(f"line {line}: {request_error(error.errors())}") from error


def _json_rows(text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    # Not `splitlines`: JSON strings may hold its other line ends as they are.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        row = _json(content, f"line {line}")
        if not isinstance(row, dict):
            raise RequestError(f"line {line}: expected a JSON object, got {content[:40]!r}")
        yield line, row


def _csv_rows(kind: Kind, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = _columns(kind)
    try:
        if unknown := [column for column in reader.fieldnames or () if column not in columns]:
            raise RequestError(f"line 1: no column {', '.join(map(repr, unknown))}; {kind} have {', '.join(columns)}")
        for cells in reader:
            if None in cells:
                raise RequestError(f"line {reader.line_num}: more cells than the header has columns")
            yield (
                reader.line_num,
                {column: _value(column, cell, reader.line_num) for column, cell in cells.items() if cell},
            )
    except csv.Error as error:
        raise RequestError(f"line {reader.line_num}: {error}") from error


def _columns(kind: Kind) -> list[str]:
    return ["id", *FIELDS[kind].model_fields]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    cell = str(value) if column in _TEXT else json.dumps(value, ensure_ascii=False)
    return "'" + cell if _FORMULA.match(cell) else cell


def _value(column: str, cell: str, line: int) -> Any:
    if _ESCAPED.match(cell):
        cell = cell[1:]
    return cell if column in _TEXT else _json(cell, f"line {line}, column {column}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: no JSON: {error}") from error
