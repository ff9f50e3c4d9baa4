"""KuaiSearch (Kuaishou e-commerce search, arXiv 2602.11518), as released."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from genretrieval.schemas import EXPOSURE
from genretrieval_pipelines.importers.reading import (
    Record,
    convert_file,
    find,
    identities,
    identity,
    require,
    text,
    whole,
)
from genretrieval_pipelines.importers.writing import LogWriter, Row

_SESSION_SPAN = 1 << 20
"""Places in a history that one session has room for: `history_index` = time_index * span + place."""

_NO_BRAND = ("无品牌", "UNKNOWN")
_NO_CATEGORY = ("UNKNOWN",)
_PROFILE = ("gender", "age_bucket", "fre_country", "fre_province", "fre_city")


def _names(*stems: str) -> list[str]:
    return [f"{stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet") for stem in stems]


def import_kuaisearch(source: Path, writer: LogWriter) -> list[str]:
    """Read items (or corpus) and recall, and where they are there users, rank and relevance.

    Files are ``.jsonl``, ``.jsonl.gz`` or ``.parquet``. A recall session becomes one request: exposures in
    the order shown, then clicks, then purchases, each with the query and the place it was shown at; and,
    where anything was clicked or purchased, one query with these items as its relevant ones. `time_index`
    is an order, not a time, so there are no timestamps. Of the rank file only the entrance of a session is
    used, as its scenario (held in memory, one entry a session): its clicks are those of the recall file,
    and its price has no stated unit. Relevance pairs have no item ids; they become ``relevance.parquet``.

    Raises:
        DataError: if items or recall are missing, or a file is damaged.
    """
    items = require(source, *_names("items", "corpus"))[0]
    recall = require(source, *_names("recall"))[0]
    writer.declare("items", "item_id", "title", "brand", "categories", "seller_id", "seller_name")
    convert_file(items, json.loads, _item, writer)
    for users in find(source, *_names("users")):
        writer.declare("users", "user_id", *_PROFILE)
        convert_file(users, json.loads, _user, writer)
    for relevance in find(source, *_names("relevance")):
        writer.declare("relevance", "query", "title", "grade")
        convert_file(relevance, json.loads, _relevance, writer)
    entrances = _entrances(source, writer)
    writer.declare(
        "interactions",
        *("user_id", "item_id", "event", "history_index", "query", "request_id", "rank_shown", "scenario"),
    )
    writer.declare("queries", "query_id", "query")
    writer.declare("qrels", "query_id", "item_id", "user_id", "label", "split")
    convert_file(recall, json.loads, lambda record: _session(record, entrances), writer)
    if not entrances:
        return []
    return [f"{len(entrances):,} sessions of the rank file are not in {recall.name}: left out"]


def _item(record: Record) -> Iterator[tuple[str, Row]]:
    levels = [text(record, f"category_level{level}_name", _NO_CATEGORY) for level in (1, 2, 3)]
    yield (
        "items",
        {
            "item_id": identity(record, "item_id"),
            "title": text(record, "item_title"),
            "brand": text(record, "brand_name", _NO_BRAND),
            "categories": [level for level in levels if level is not None],
            "seller_id": text(record, "seller_id"),
            "seller_name": text(record, "seller_name"),
        },
    )


def _user(record: Record) -> Iterator[tuple[str, Row]]:
    profile: Row = {name: text(record, name) for name in _PROFILE}
    yield "users", {"user_id": identity(record, "user_id")} | profile


def _relevance(record: Record) -> Iterator[tuple[str, Row]]:
    grade = whole(record, "label" if "label" in record else "score")
    yield "relevance", {"query": text(record, "query"), "title": text(record, "item_title"), "grade": grade}


def _entrances(source: Path, writer: LogWriter) -> dict[str, str | None]:
    """The entrance of every session of the rank file."""
    entrances: dict[str, str | None] = {}

    def note(record: Record) -> Iterator[tuple[str, Row]]:
        entrances[identity(record, "session_id")] = text(record, "search_entrance")
        yield from ()

    for rank in find(source, *_names("rank")):
        convert_file(rank, json.loads, note, writer)
    return entrances


def _session(record: Record, entrances: dict[str, str | None]) -> Iterator[tuple[str, Row]]:
    """Interactions, query and judgements of one session; its entrance is taken out of `entrances`."""
    user, session = identity(record, "user_id"), identity(record, "session_id")
    query, split, time_index = text(record, "query"), text(record, "split"), whole(record, "time_index")
    shown, clicked, purchased = (
        identities(record, f"{name}_item_ids") for name in ("impressed", "clicked", "purchased")
    )
    events = [(item, EXPOSURE) for item in shown]
    events += [(item, "click") for item in clicked] + [(item, "purchase") for item in purchased]
    if len(events) > _SESSION_SPAN or not 0 <= time_index < 2**63 // _SESSION_SPAN:
        raise ValueError(f"{len(events)} events at time_index {time_index} have no room in a history")
    ranks = {item: rank for rank, item in reversed(list(enumerate(shown)))}
    scenario = entrances.pop(session, None)
    common: Row = {"user_id": user, "query": query, "request_id": session, "scenario": scenario}
    for place, (item, event) in enumerate(events):
        # An item shown twice was exposed at both places; a click is put down to the first.
        rank = place if event == EXPOSURE else ranks.get(item)
        where: Row = {"history_index": time_index * _SESSION_SPAN + place, "rank_shown": rank}
        yield "interactions", common | where | {"item_id": item, "event": event}
    relevant = dict.fromkeys(clicked + purchased)
    if relevant:
        yield "queries", {"query_id": session, "query": query}
    for item in relevant:
        yield "qrels", {"query_id": session, "item_id": item, "user_id": user, "label": 1.0, "split": split}
