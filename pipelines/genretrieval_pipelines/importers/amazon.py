"""Amazon reviews of 2014 (McAuley, UCSD; the set of P5, S3-Rec and TIGER), as released."""

from __future__ import annotations

import ast
import csv
import html
import json
from collections.abc import Iterator
from pathlib import Path

from genretrieval_pipelines.importers.reading import (
    Record,
    convert_file,
    identity,
    number,
    require,
    text,
    whole,
)
from genretrieval_pipelines.importers.writing import LogWriter, Row

_REVIEWS = ("reviews_*_5.json", "reviews_*_5.json.gz", "reviews_*.json", "reviews_*.json.gz")
_RATINGS = ("ratings_*.csv", "ratings_*.csv.gz")
_META = ("meta_*.json", "meta_*.json.gz")


def import_amazon_2014(source: Path, writer: LogWriter) -> list[str]:
    """Read ``reviews_*.json[.gz]`` or else ``ratings_*.csv``, and ``meta_*.json[.gz]``.

    A review is an interaction with event ``review``, its stars as value and day resolution in time: ties
    within a day are frequent and stay in file order. For a 5-core file (``reviews_*_5``) the items are
    those that were reviewed, as in the published protocol, and their ids are held in memory; otherwise all.
    HTML entities in texts are resolved. Category paths are joined into one list without repeats.

    Raises:
        DataError: if one of the files is missing or damaged.
    """
    meta = require(source, *_META)
    interactions = require(source, *_REVIEWS, *_RATINGS)
    by_reviews = interactions[0].name.startswith("reviews_")
    core = interactions[0].name.split(".")[0].endswith("_5")
    writer.declare("interactions", "user_id", "item_id", "event", "timestamp", "value")
    writer.declare("items", "item_id", "title", "description", "brand", "categories", "price")
    reviewed: set[str] = set()

    def review(record: Record) -> Iterator[tuple[str, Row]]:
        yield "interactions", _review(record)
        if core:
            reviewed.add(identity(record, "asin"))

    for path in interactions:
        convert_file(path, json.loads if by_reviews else _rating, review, writer)
    left_out = 0

    def item(record: Record) -> Iterator[tuple[str, Row]]:
        nonlocal left_out
        if core and identity(record, "asin") not in reviewed:
            left_out += 1
        else:
            yield "items", _item(record)

    for path in meta:
        convert_file(path, _literal, item, writer)
    return [f"{left_out:,} items without a review in the 5-core left out"] if left_out else []


def _rating(line: str) -> Record:
    """One line of the ratings: user, item, stars, time (the release of 2018 has item before user)."""
    fields = next(csv.reader([line]), [])
    if len(fields) != 4:
        raise ValueError(f"has {len(fields)} fields, not user,item,rating,timestamp")
    return dict(zip(("reviewerID", "asin", "overall", "unixReviewTime"), fields, strict=True))


def _review(record: Record) -> Row:
    return {
        "user_id": identity(record, "reviewerID"),
        "item_id": identity(record, "asin"),
        "event": "review",
        "timestamp": whole(record, "unixReviewTime"),
        "value": number(record, "overall"),
    }


def _literal(line: str) -> object:
    """A line of the metadata: a Python dict literal, not JSON."""
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("is no Python literal") from error


def _item(record: Record) -> Row:
    return {
        "item_id": identity(record, "asin"),
        "title": _unescaped(text(record, "title")),
        "description": _unescaped(text(record, "description")),
        "brand": _unescaped(text(record, "brand")),
        "categories": _categories(record),
        "price": number(record, "price"),
    }


def _unescaped(value: str | None) -> str | None:
    return None if value is None else html.unescape(value)


def _categories(record: Record) -> list[str] | None:
    """All names on all paths, each once, in order."""
    paths = record.get("categories")
    if paths is None:
        return None
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise ValueError(f"categories is {paths!r}, not a list of paths")
    names = (_unescaped(text({"categories": name}, "categories")) for path in paths for name in path)
    return list(dict.fromkeys(name for name in names if name is not None))
