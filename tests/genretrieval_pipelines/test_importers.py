from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import polars as pl
import pytest

from genretrieval.errors import DataError
from genretrieval.logs import prepare_logs
from genretrieval_pipelines.importers import IMPORTERS, Importer, ImportReport, import_logs, writing
from genretrieval_pipelines.importers.kuaisearch import _SESSION_SPAN
from genretrieval_pipelines.importers.reading import convert_file
from genretrieval_pipelines.importers.writing import LogWriter


def write_lines(path: Path, *lines: object) -> None:
    """Dicts as JSON, strings as they are; gzipped where the name says so."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def rejected(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "quarantine" / "lines.jsonl").read_text().splitlines()]


def table(output: Path, name: str) -> list[dict[str, object]]:
    return pl.read_parquet(output / f"{name}.parquet").to_dicts()


# Any format


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'csv'; there are house, amazon-2014, kuaisearch"):
        import_logs("csv", tmp_path, tmp_path / "out")


def test_a_missing_source_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        import_logs("house", tmp_path / "nowhere", tmp_path / "out")


def test_the_source_is_never_written_to(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the source itself"):
        import_logs("house", tmp_path, tmp_path)


def test_the_report_reads_as_lines() -> None:
    report = ImportReport("house", Path("out"), {"items": 1200}, {"meta.json": 2}, ["not read: README.md"])

    assert report.lines() == [
        "items: 1,200 rows",
        "meta.json: 2 lines could not be used",
        "not read: README.md",
    ]


def test_a_format_is_one_entry_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def three_items(source: Path, writer: LogWriter) -> list[str]:
        writer.declare("items", "item_id", "title")
        for item in "abc":
            writer.add("items", {"item_id": item})
        return []

    monkeypatch.setitem(IMPORTERS, "mine", three_items)
    monkeypatch.setattr(writing, "_BATCH_ROWS", 2)
    (tmp_path / "source").mkdir()

    report = import_logs("mine", tmp_path / "source", tmp_path / "out")

    assert report.rows == {"items": 3}
    assert [row["item_id"] for row in table(tmp_path / "out", "items")] == ["a", "b", "c"]
    assert not (tmp_path / "out" / "quarantine").exists()


def one_item(item: str) -> Importer:
    def write(source: Path, writer: LogWriter) -> list[str]:
        writer.declare("items", "item_id")
        writer.add("items", {"item_id": item})
        return []

    return write


def test_a_failed_import_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Path, writer: LogWriter) -> list[str]:
        writer.declare("items", "item_id")
        writer.add("items", {"item_id": "new"})
        raise DataError("the disk is full")

    monkeypatch.setitem(IMPORTERS, "old", one_item("old"))
    monkeypatch.setitem(IMPORTERS, "fails", fails)
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    import_logs("old", source, output)

    with pytest.raises(DataError, match="disk is full"):
        import_logs("fails", source, output)

    assert table(output, "items") == [{"item_id": "old"}]
    assert sorted(path.name for path in output.iterdir()) == [".genretrieval-imported", "items.parquet"]


@pytest.mark.parametrize("mark", [None, ".genretrieval-prepared"])
def test_the_logs_of_another_shop_are_left_alone(tmp_path: Path, mark: str | None) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    for folder in (source, output):
        folder.mkdir()
        pl.DataFrame({"item_id": [folder.name]}).write_parquet(folder / "items.parquet")
    if mark is not None:
        (output / mark).touch()
    (output / "quarantine").mkdir()
    (output / "quarantine" / "lines.jsonl").write_text("theirs")

    with pytest.raises(DataError, match=r"holds .*items\.parquet, .*nothing was touched"):
        import_logs("house", source, output)

    assert table(output, "items") == [{"item_id": "out"}]
    assert (output / "quarantine" / "lines.jsonl").read_text() == "theirs"


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": ["a"]}).write_parquet(tmp_path / "items.parquet")

    with pytest.raises(DataError, match="cannot be made a folder"):
        import_logs("house", tmp_path, tmp_path / "items.parquet")


def test_a_full_disk_is_named_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(IMPORTERS, "mine", one_item("a"))
    monkeypatch.setattr(LogWriter, "_flush", full)
    (tmp_path / "source").mkdir()

    with pytest.raises(DataError, match=f"the disk is full: {tmp_path / 'out'} had no room"):
        import_logs("mine", tmp_path / "source", tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == [".genretrieval-imported"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"item_id": "a"', "Expecting"),
        (b'["a"]', "is a list, not a record"),
        (b'{"item_id": "\xff"}', "can't decode"),
        (b'{"item_id": "\\ud800"}', "surrogates not allowed"),
        (b'{"title": "Cup"}', "item_id is None, not an id"),
        (b'{"item_id": true}', "item_id is True, not an id"),
        (b'{"item_id": "a", "item_title": ["Cup"]}', "not a text"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_line_that_cannot_be_used_is_set_aside_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "recall.jsonl")
    (source / "items.jsonl").write_bytes(b'{"item_id": 1}\n\n' + line + b'\n{"item_id": 2}')

    report = import_logs("kuaisearch", source, output)

    assert report.rows["items"] == 2
    assert report.rejected == {"items.jsonl": 1}
    (entry,) = rejected(output)
    assert (entry["file"], entry["line"]) == ("items.jsonl", 3)
    assert reason in str(entry["reason"])
    assert str(entry["text"])[:5] == line.decode(errors="replace")[:5]


def test_an_import_without_any_item_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "source" / "items.jsonl", "no JSON")
    write_lines(tmp_path / "source" / "recall.jsonl")

    with pytest.raises(DataError, match="no item could be read"):
        import_logs("kuaisearch", tmp_path / "source", tmp_path / "out")

    assert rejected(tmp_path / "out")[0]["text"] == "no JSON"
    assert not list((tmp_path / "out").glob("*.parquet*"))


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"item_id": 1}\n' * 1000)[:-10])

    with (
        LogWriter(tmp_path / "out") as writer,
        pytest.raises(DataError, match=r"items\.jsonl\.gz is damaged"),
    ):
        convert_file(path, json.loads, lambda record: [], writer)


# House


def test_house_copies_tables_as_they_are(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    (source / "interactions").mkdir(parents=True)
    items = pl.DataFrame({"item_id": [1, 2], "colour": ["red", "blue"]})
    items.write_parquet(source / "items.parquet")
    clicks = pl.DataFrame({"user_id": ["u"], "item_id": [1], "event": ["click"], "position": [0]})
    clicks.write_parquet(source / "interactions" / "0.parquet")
    pl.DataFrame({"query": ["cup"], "title": ["Cup"], "grade": [3]}).write_parquet(source / "relevance.parquet")
    (source / "README.md").write_text("about")
    output.mkdir()
    (output / ".genretrieval-imported").touch()
    clicks.write_parquet(output / "interactions.parquet")  # of an earlier import

    report = import_logs("house", source, output)

    assert report.rows == {"items": 2, "interactions": 1, "relevance": 1}
    assert report.notes == ["not read: README.md"]
    assert pl.read_parquet(output / "items.parquet").equals(items)
    assert sorted(path.name for path in output.iterdir()) == [
        ".genretrieval-imported",
        "interactions",
        "items.parquet",
        "relevance.parquet",
    ]
    assert prepare_logs(output, tmp_path / "prepared").histories().items.tolist() == [0]


def test_house_refuses_what_could_not_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    pl.DataFrame({"title": ["Cup"]}).write_parquet(tmp_path / "source" / "items.parquet")

    with pytest.raises(DataError, match="item_id is missing"):
        import_logs("house", tmp_path / "source", tmp_path / "out")


# Amazon 2014

REVIEWS = [
    {"reviewerID": "U1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1_400_000_000, "reviewText": "good"},
    {"reviewerID": "U1", "asin": "B2", "overall": 1.0, "unixReviewTime": 1_300_000_000},
]
META = [
    "{'asin': 'B1', 'title': \"Men's &amp; Cup\", 'price': 3.5, 'brand': 'Acme', 'categories': "
    "[['Home', 'Cups'], ['Home', 'Gifts &amp; More']], 'related': {'also_bought': ['B9']}}",
    "{'asin': 'B2'}",
    "{'asin': 'B3', 'title': 'Never reviewed'}",
]


def test_amazon_5_core(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "reviews_Beauty_5.json.gz", *REVIEWS)
    write_lines(source / "meta_Beauty.json.gz", *META)
    write_lines(source / "ratings_Beauty.csv", "U1,B1,5.0,1400000000")

    report = import_logs("amazon-2014", source, output)

    assert report.rows == {"interactions": 2, "items": 2}
    assert report.notes == ["1 items without a review in the 5-core left out", "not read: ratings_Beauty.csv"]
    assert table(output, "items")[0] == {
        "item_id": "B1",
        "title": "Men's & Cup",
        "description": None,
        "brand": "Acme",
        "categories": ["Home", "Cups", "Gifts & More"],
        "price": 3.5,
    }
    assert table(output, "interactions")[1] == {
        "user_id": "U1",
        "item_id": "B2",
        "event": "review",
        "timestamp": 1_300_000_000,
        "value": 1.0,
    }
    prepared = prepare_logs(output, tmp_path / "prepared")
    assert prepared.histories().items.tolist() == [1, 0]


def test_amazon_ratings_keep_every_item(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "ratings_Beauty.csv", "U1,B1,5.0,1400000000", "U2,B1,4.0", "U2,B7,4.0,today")
    write_lines(source / "meta_Beauty.json", *META)

    report = import_logs("amazon-2014", source, output)

    assert report.rows == {"interactions": 1, "items": 3}
    assert [(row["line"], row["reason"]) for row in rejected(output)] == [
        (2, "has 3 fields, not user,item,rating,timestamp"),
        (3, "unixReviewTime is 'today', not a whole number"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"asin": null}', "is no Python literal"),
        ("__import__('os')", "is no Python literal"),
        ("{'asin': 'B1'", "is no Python literal"),
        ("{'asin': 'B1', 'price': 'free'}", "could not convert"),
        ("{'asin': 'B1', 'categories': ['Home']}", "not a list of paths"),
        ("{'title': 'Cup'}", "asin is None"),
    ],
)
def test_amazon_metadata_that_cannot_be_used_is_set_aside(tmp_path: Path, line: str, reason: str) -> None:
    source = tmp_path / "source"
    write_lines(source / "reviews_Beauty_5.json", *REVIEWS)
    write_lines(source / "meta_Beauty.json", line, *META)

    report = import_logs("amazon-2014", source, tmp_path / "out")

    assert report.rows["items"] == 2
    (entry,) = rejected(tmp_path / "out")
    assert entry["line"] == 1
    assert reason in str(entry["reason"])


def test_amazon_names_the_file_it_looked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_lines(source / "meta_Beauty.json", *META)

    with pytest.raises(DataError, match=r"none of reviews_\*_5\.json, .* ratings_\*\.csv"):
        import_logs("amazon-2014", source, tmp_path / "out")
    (source / "meta_Beauty.json").rename(source / "reviews_Beauty.json")
    with pytest.raises(DataError, match=r"none of meta_\*\.json"):
        import_logs("amazon-2014", source, tmp_path / "out")


# KuaiSearch

KUAI_ITEMS = [
    {
        "item_id": item,
        "item_title": f"商品{item}",
        "brand_id": 1,
        "brand_name": "无品牌" if item == 1 else "金粟兰",
        "seller_id": 4,
        "seller_name": "店",
        "category_level1_id": 1,
        "category_level1_name": "女装",
        "category_level2_id": 0,
        "category_level2_name": "UNKNOWN",
        "category_level3_id": 0,
        "category_level3_name": "UNKNOWN",
    }
    for item in (1, 2, 3)
]
SESSION = {
    "user_id": 7,
    "session_id": 50,
    "impressed_item_ids": [3, 1, 99, 1],
    "clicked_item_ids": [1],
    "purchased_item_ids": [2, 1],
    "time_index": 10,
    "query": "裙子",
    "split": "train",
}
EARLIER = SESSION | {"session_id": 51, "time_index": 4, "clicked_item_ids": [], "purchased_item_ids": []}


@pytest.mark.parametrize(("items", "grade"), [("items", "score"), ("corpus", "label")])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_kuaisearch_in_every_spelling(tmp_path: Path, items: str, grade: str, suffix: str) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    tables = {
        items: KUAI_ITEMS,
        "recall": [SESSION],
        "users": [{"user_id": 7, "gender": "F", "age_bucket": "24-30", "fre_city": "松原"}],
        "rank": [
            {"session_id": 50, "search_entrance": "mall", "target_item_id": 1},
            {"session_id": 77, "search_entrance": "homepage", "target_item_id": 1},
        ],
        "relevance": [{"query": "裙子", "item_title": "长裙", "brand": "x", grade: 3}],
    }
    for name, rows in tables.items():
        if suffix == "parquet":
            pl.DataFrame(rows).write_parquet(source / f"{name}.parquet")
        else:
            write_lines(source / f"{name}.{suffix}", *rows)

    report = import_logs("kuaisearch", source, output)

    assert report.rows == {
        "items": 3,
        "users": 1,
        "relevance": 1,
        "interactions": 7,
        "queries": 1,
        "qrels": 2,
    }
    assert report.notes == [f"1 sessions of the rank file are not in recall.{suffix}: left out"]
    assert table(output, "items")[0] == {
        "item_id": "1",
        "title": "商品1",
        "brand": None,
        "categories": ["女装"],
        "seller_id": "4",
        "seller_name": "店",
    }
    assert table(output, "items")[1]["brand"] == "金粟兰"
    assert table(output, "users")[0]["fre_city"] == "松原"
    assert table(output, "relevance") == [{"query": "裙子", "title": "长裙", "grade": 3}]
    assert {row["scenario"] for row in table(output, "interactions")} == {"mall"}


def test_a_kuaisearch_session_becomes_one_request(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "items.jsonl", *KUAI_ITEMS)
    write_lines(source / "recall.jsonl", SESSION)

    import_logs("kuaisearch", source, output)

    rows = table(output, "interactions")
    base = 10 * _SESSION_SPAN
    assert [(r["event"], r["item_id"], r["rank_shown"], r["history_index"]) for r in rows] == [
        ("exposure", "3", 0, base),
        ("exposure", "1", 1, base + 1),
        ("exposure", "99", 2, base + 2),  # in no items file: for the preparation to judge
        ("exposure", "1", 3, base + 3),
        ("click", "1", 1, base + 4),
        ("purchase", "2", None, base + 5),  # neither shown nor clicked, as in the release
        ("purchase", "1", 1, base + 6),
    ]
    assert {(r["user_id"], r["request_id"], r["query"], r["scenario"]) for r in rows} == {("7", "50", "裙子", None)}
    assert table(output, "queries") == [{"query_id": "50", "query": "裙子"}]
    assert table(output, "qrels") == [
        {"query_id": "50", "item_id": item, "user_id": "7", "label": 1.0, "split": "train"} for item in "12"
    ]


def test_kuaisearch_sessions_are_ordered_by_time_index(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "items.jsonl", *KUAI_ITEMS)
    write_lines(source / "recall.jsonl", SESSION, EARLIER | {"clicked_item_ids": [3]})
    import_logs("kuaisearch", source, output)

    prepared = prepare_logs(output, tmp_path / "prepared")

    histories = prepared.histories()
    assert histories.items.tolist() == [2, 0, 1, 0]
    assert histories.event_names == ("click", "purchase")
    assert prepared.report.tables["interactions"].quarantined == 2  # item 99 was shown twice
    query_items = prepared.query_items()
    assert query_items is not None
    assert query_items.collect().select("query", "item_row").rows() == [("裙子", 0), ("裙子", 1), ("裙子", 2)]


def test_a_kuaisearch_session_without_clicks_asks_no_query(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "items.jsonl", *KUAI_ITEMS)
    write_lines(source / "recall.jsonl", EARLIER)

    report = import_logs("kuaisearch", source, output)

    assert report.rows == {"items": 3, "interactions": 4}
    assert table(output, "queries") == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"time_index": None}, "time_index is None, not a whole number"),
        ({"time_index": 2**60}, "have no room in a history"),
        ({"time_index": -1}, "have no room in a history"),
        ({"session_id": ""}, "session_id is '', not an id"),
        ({"clicked_item_ids": "1,2"}, "clicked_item_ids is '1,2', not a list of ids"),
        ({"purchased_item_ids": [1.5]}, "purchased_item_ids is 1.5, not an id"),
    ],
)
def test_a_kuaisearch_session_with_a_fault_is_set_aside_whole(
    tmp_path: Path, fault: dict[str, object], reason: str
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_lines(source / "items.jsonl", *KUAI_ITEMS)
    write_lines(source / "recall.jsonl", SESSION | fault, EARLIER)

    report = import_logs("kuaisearch", source, output)

    assert report.rows["interactions"] == 4
    assert reason in str(rejected(output)[0]["reason"])


def test_kuaisearch_names_the_file_it_looked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "source" / "recall.jsonl", SESSION)

    with pytest.raises(DataError, match=r"none of items\.jsonl, corpus\.jsonl, .*items\.parquet, corpus\.parquet"):
        import_logs("kuaisearch", tmp_path / "source", tmp_path / "out")


# Real rows


@pytest.fixture(scope="session")
def real_data() -> Path:
    if folder := os.environ.get("GENRETRIEVAL_DATA"):
        return Path(folder)
    reason = "GENRETRIEVAL_DATA is not set: the folder with the shared real data"
    if os.environ.get("REQUIRE_SHARED_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.data
@pytest.mark.parametrize("folder", [".", "raw"])
def test_kuaisearch_demo_rows(real_data: Path, tmp_path: Path, folder: str) -> None:
    report = import_logs("kuaisearch", real_data / "kuaisearch_demo" / folder, tmp_path / "out")

    assert report.rejected == {}
    assert report.rows == {
        "items": 200,
        "users": 200,
        "relevance": 200,
        "interactions": 26_032,
        "queries": 150,
        "qrels": 584,
    }
    grades = pl.read_parquet(tmp_path / "out" / "relevance.parquet")["grade"].value_counts(sort=False)
    assert dict(grades.iter_rows()) == {0: 17, 1: 40, 2: 76, 3: 67}
    rows = pl.read_parquet(tmp_path / "out" / "interactions.parquet")
    assert rows.filter(pl.col("event") == "exposure").height == 25_430
    # The demo's tables do not join, which the preparation must say rather than make a shop of the rest.
    with pytest.raises(DataError, match="does not fit together"):
        prepare_logs(tmp_path / "out", tmp_path / "prepared")
