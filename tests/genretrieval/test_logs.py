from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genretrieval import logs
from genretrieval.errors import DataError
from genretrieval.histories import NO_QUERY, NO_TIME
from genretrieval.logs import PreparedLogs, load_prepared, open_tables, prepare_logs
from genretrieval.request import HistoryEvent, RetrieveRequest
from genretrieval.schemas import ROW

ITEMS = {"item_id": ["a", "b", "c"], "title": ["Cup", "Mug", "Jar"]}
CLICKS = {
    "user_id": ["v", "u", "u", "v"],
    "item_id": ["a", "b", "a", "c"],
    "event": ["click"] * 4,
    "timestamp": [10, 40, 20, 30],
}
QUERIES = {"query_id": [1, 2], "query": ["cup", "jar"]}
QRELS = {"query_id": [1, 2], "item_id": ["a", "c"]}


class Shop:
    """A folder of logs and the folder it is prepared into."""

    def __init__(self, folder: Path) -> None:
        self.data, self.output = folder / "data", folder / "prepared"
        self.data.mkdir()

    def write(self, **tables: dict[str, object] | pl.DataFrame) -> Shop:
        for name, columns in tables.items():
            pl.DataFrame(columns).write_parquet(self.data / f"{name}.parquet")
        return self

    def prepare(self) -> PreparedLogs:
        return prepare_logs(self.data, self.output)

    def quarantine(self, table: str) -> list[dict[str, object]]:
        return pl.read_parquet(self.output / "quarantine" / f"{table}.parquet").to_dicts()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def problems(prepared: PreparedLogs) -> list[tuple[str, str | None, str, int, tuple[int, ...]]]:
    return [(p.file, p.column, p.severity, p.rows, p.first_rows) for p in prepared.report.problems]


def interactions(n: int, **columns: list[object]) -> dict[str, object]:
    """`n` clicks of one user, valid but for `columns`."""
    valid: dict[str, object] = {"user_id": ["u"] * n, "item_id": ["a"] * n, "event": ["click"] * n}
    if not columns.keys() & {"timestamp", "history_index"}:
        valid["timestamp"] = list(range(n))
    return valid | columns


# What comes out of good logs


def test_histories_are_ordered_by_time(shop: Shop) -> None:
    prepared = shop.write(items=ITEMS, interactions=CLICKS).prepare()

    histories = prepared.histories()

    assert histories.user_ids == ["v", "u"]  # in the order of their first rows
    assert histories.offsets.tolist() == [0, 2, 4]
    assert histories.items.tolist() == [0, 2, 0, 1]
    assert histories.times.tolist() == [10, 30, 20, 40]
    assert histories.event_names == ("click",)
    assert histories.query_rows.tolist() == [NO_QUERY] * 4
    dtypes = [a.dtype for a in (histories.offsets, histories.items, histories.events, histories.times)]
    assert dtypes == [np.int64, np.int32, np.int16, np.int64]
    assert histories.query_rows.dtype == np.int32
    assert histories.order_rule == (
        "(timestamp, file order); 0 of 4 timed interactions share the second of the one before"
    )


def test_ties_in_time_keep_file_order_and_are_counted(shop: Shop) -> None:
    clicks = interactions(4, item_id=["c", "a", "b", "a"], timestamp=[5, 5, 5, 1])

    prepared = shop.write(items=ITEMS, interactions=clicks).prepare()

    assert prepared.histories().items.tolist() == [0, 2, 0, 1]
    assert prepared.report.order_rule.startswith("(timestamp, file order); 2 of 4 ")


def test_fractions_of_a_second_decide_the_order(shop: Shop) -> None:
    clicks = interactions(2, item_id=["b", "a"], timestamp=[5.75, 5.25])

    histories = shop.write(items=ITEMS, interactions=clicks).prepare().histories()

    assert histories.items.tolist() == [0, 1]
    assert histories.times.tolist() == [5, 5]


def test_history_index_comes_before_time(shop: Shop) -> None:
    clicks = interactions(3, item_id=["c", "b", "a"], history_index=[2, 1, 0], timestamp=[None, 7, None])

    prepared = shop.write(items=ITEMS, interactions=clicks).prepare()

    assert prepared.histories().items.tolist() == [0, 1, 2]
    assert prepared.histories().times.tolist() == [NO_TIME, 7, NO_TIME]
    assert prepared.report.order_rule.startswith("history_index; 0 of 1 timed ")


def test_rows_without_an_index_follow_those_with_one(shop: Shop) -> None:
    clicks = interactions(3, item_id=["c", "b", "a"], history_index=[None, 1, 0], timestamp=[9, None, None])

    prepared = shop.write(items=ITEMS, interactions=clicks).prepare()

    assert prepared.histories().items.tolist() == [0, 1, 2]
    assert prepared.report.order_rule.startswith("history_index where given, then (timestamp, file order)")


def test_exposures_are_kept_but_are_no_history(shop: Shop) -> None:
    rows = {
        "user_id": ["looker", "u", "u", "u"],
        "item_id": ["a", "a", "b", "b"],
        "event": ["exposure", "exposure", "exposure", "purchase"],
        "timestamp": [1, 2, 2, 3],
        "rank_shown": [0, 0, 1, 1],
        "request_id": [7, 8, 8, 8],
    }

    prepared = shop.write(items=ITEMS, interactions=rows).prepare()

    assert prepared.histories().user_ids == ["u"]
    assert prepared.histories().event_names == ("purchase",)
    assert prepared.users()["user_id"].to_list() == ["u", "looker"]  # row of a history = user row
    logged = prepared.interactions().collect()
    assert logged.schema == {
        "user_row": pl.Int32,
        "item_row": pl.Int32,
        "event": pl.String,
        "timestamp": pl.Int64,
        "query": pl.String,
        "request_id": pl.String,
        "rank_shown": pl.Int32,
        "scenario": pl.String,
        "value": pl.Float64,
    }
    assert logged["user_row"].to_list() == [0, 0, 0, 1]
    assert logged["rank_shown"].to_list() == [0, 1, 1, 0]
    assert logged["request_id"].to_list() == ["8", "8", "8", "7"]


def test_exposures_may_share_a_place_in_the_history(shop: Shop) -> None:
    rows = interactions(3, event=["exposure", "exposure", "click"], history_index=[0, 0, 0], timestamp=[1, 1, 1])

    assert problems(shop.write(items=ITEMS, interactions=rows).prepare()) == []


def test_exposures_that_no_past_can_hold_are_reported(shop: Shop) -> None:
    rows = interactions(3, event=["exposure", "exposure", "click"], history_index=[0, 1, 2], timestamp=[None, 1, None])

    prepared = shop.write(items=ITEMS, interactions=rows).prepare()

    assert problems(prepared) == [("interactions.parquet", "timestamp", "warning", 1, (0,))]
    assert len(prepared.exposures().items) == 1


def test_queries_are_deduplicated(shop: Shop) -> None:
    rows = interactions(4, query=["mug", None, "cup", "mug"])

    histories = shop.write(items=ITEMS, interactions=rows).prepare().histories()

    assert histories.queries == ["cup", "mug"]
    assert histories.query_rows.tolist() == [1, NO_QUERY, 0, 1]


def test_profiles_are_kept_and_users_without_one_are_allowed(shop: Shop) -> None:
    users = {"user_id": ["idle", "v"], "city": ["Oslo", "Rome"]}

    prepared = shop.write(items=ITEMS, interactions=CLICKS, users=users).prepare()

    assert prepared.users().rows() == [("v", "Rome"), ("u", None), ("idle", "Oslo")]
    assert prepared.histories().user_ids == ["v", "u"]


def test_items_keep_file_order_and_attributes(shop: Shop) -> None:
    items = ITEMS | {"item_id": [9, 8, 7], "colour": ["red", None, "blue"], "vector": [[1.0], [2.0], [3.0]]}

    table = shop.write(items=items).prepare().items()

    assert table["item_id"].to_list() == ["9", "8", "7"]
    assert table["colour"].to_list() == ["red", None, "blue"]
    assert table.schema["vector"] == pl.List(pl.Float32)


def test_items_alone_are_enough(shop: Shop) -> None:
    prepared = shop.write(items=ITEMS).prepare()

    histories = prepared.histories()

    assert histories.n_users == 0
    assert histories.offsets.tolist() == [0]
    assert histories.event_names == ()
    assert histories.order_rule == "no interactions"
    assert prepared.users().columns == ["user_id"]
    assert prepared.query_items() is None
    assert prepared.interactions().collect().height == 0


def test_an_empty_interactions_file_is_as_good_as_none(shop: Shop) -> None:
    empty = pl.DataFrame(CLICKS).clear()

    prepared = shop.write(items=ITEMS, interactions=empty).prepare()

    assert prepared.histories().n_users == 0
    assert prepared.report.tables["interactions"].read == 0


def test_queries_with_judgements_need_no_interactions(shop: Shop) -> None:
    qrels = QRELS | {"user_id": ["w", None], "label": [0, None], "split": ["test", None]}

    query_items = shop.write(items=ITEMS, queries=QUERIES, qrels=qrels).prepare().query_items()

    assert query_items is not None
    assert query_items.collect_schema() == {
        "query": pl.String,
        "item_row": pl.Int32,
        "user_row": pl.Int32,
        "label": pl.Float32,
        "split": pl.String,
    }
    assert query_items.collect().rows() == [("cup", 0, 0, 0.0, "test"), ("jar", 2, None, 1.0, None)]


def test_queries_without_judgements_are_reported_as_unused(shop: Shop) -> None:
    prepared = shop.write(items=ITEMS, queries=QUERIES).prepare()

    assert problems(prepared) == [("queries.parquet", None, "warning", 0, ())]
    assert prepared.query_items() is None


@pytest.mark.parametrize("folder", ["interactions", "interactions.parquet"])
def test_a_table_may_be_a_folder_of_shards(shop: Shop, folder: str) -> None:
    shop.write(items=ITEMS)
    (shop.data / folder).mkdir()
    clicks = pl.DataFrame(CLICKS)
    clicks[:1].write_parquet(shop.data / folder / "0.parquet")
    clicks[1:].write_parquet(shop.data / folder / "1.parquet")

    prepared = shop.prepare()

    assert prepared.histories().items.tolist() == [0, 2, 0, 1]
    assert prepared.report.ignored_files == []


def test_sorting_some_users_at_a_time_changes_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n = 300
    rows = {
        "user_id": rng.integers(0, 40, n),
        "item_id": rng.choice(list("abc"), n),
        "event": rng.choice(["exposure", "click"], n),
        "timestamp": rng.integers(0, 50, n),
    }
    whole = shop.write(items=ITEMS, interactions=rows).prepare()
    monkeypatch.setattr(logs, "_SORT_ROWS", 17)

    parts = prepare_logs(shop.data, shop.output.with_name("parts"))

    assert parts.interactions().collect().equals(whole.interactions().collect())
    assert parts.report == whole.report
    assert not (parts.folder / "sorting.partial").exists()


def test_files_that_are_no_table_are_named(shop: Shop) -> None:
    shop.write(items=ITEMS, interaction=CLICKS)
    (shop.data / "interactions.csv").touch()
    (shop.data / ".DS_Store").touch()

    report = shop.prepare().report

    assert report.ignored_files == ["interaction.parquet", "interactions.csv"]
    assert "not read: interaction.parquet, interactions.csv" in report.lines()


def test_what_spark_writes_beside_shards_is_passed_over(shop: Shop) -> None:
    folder = shop.write(items=ITEMS).data / "interactions.parquet"
    folder.mkdir()
    pl.DataFrame(CLICKS).write_parquet(folder / "part-0.parquet")
    for name in ("_SUCCESS", "_metadata", "._SUCCESS.crc", ".part-0.parquet.crc", "._part-0.parquet"):
        (folder / name).touch()

    assert len(shop.prepare().histories().items) == 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abc"), st.integers(0, 3)), max_size=12),
)
def test_the_order_is_that_of_a_stable_sort(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]]
) -> None:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    table = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}, orient="row")

    histories = shop.write(items=ITEMS, interactions=table.with_columns(event=pl.lit("click"))).prepare().histories()

    expected = {
        user: ["abc".index(i) for u, i, _ in sorted(rows, key=lambda r: r[2]) if u == user] for user, *_ in rows
    }
    found = {
        user: histories.items[histories.offsets[u] : histories.offsets[u + 1]].tolist()
        for u, user in enumerate(histories.user_ids)
    }
    assert found == expected
    assert list(found) == list(expected)


# What goes to quarantine


def test_null_ids_go_to_quarantine(shop: Shop) -> None:
    prepared = shop.write(items={"item_id": ["a", None, "b"], "title": ["Cup", "Lost", "Mug"]}).prepare()

    assert problems(prepared) == [("items.parquet", "item_id", "quarantined", 1, (1,))]
    assert shop.quarantine("items") == [
        {"row": 1, "item_id": None, "title": "Lost", "reason": "item_id is null or empty"}
    ]
    assert prepared.items()["item_id"].to_list() == ["a", "b"]


def test_of_duplicate_items_the_first_is_kept(shop: Shop) -> None:
    items = {"item_id": ["a", "b", "a", "c"], "title": ["first", "x", "second", "y"]}

    prepared = shop.write(items=items).prepare()

    assert problems(prepared) == [("items.parquet", "item_id", "quarantined", 1, (2,))]
    assert prepared.items()["title"].to_list() == ["first", "x", "y"]


def test_a_bad_row_does_not_hide_a_good_one_with_its_id(shop: Shop) -> None:
    items = {
        "item_id": ["a", "a", "b", "c"],
        "title": ["bad", "good", "x", "y"],
        "price": [float("nan"), 1, 1, 1],
    }

    prepared = shop.write(items=items).prepare()

    assert problems(prepared) == [("items.parquet", "price", "quarantined", 1, (0,))]
    assert prepared.items()["title"].to_list() == ["good", "x", "y"]


@pytest.mark.parametrize(
    ("columns", "column", "reason"),
    [
        ({"item_id": ["a", "zzz", "b"]}, "item_id", "is not in items.parquet"),
        ({"item_id": ["a", None, "b"]}, "item_id", "is null or empty"),
        ({"user_id": ["u", "", "u"]}, "user_id", "is null or empty"),
        ({"event": ["click", None, "click"]}, "event", "is null or empty"),
        ({"timestamp": ["1", "soon", "3"]}, "timestamp", "is no time between 1970 and 9999"),
        ({"timestamp": [1, 1_406_116_800_000, 3]}, "timestamp", "divide milliseconds by 1000"),
        ({"timestamp": [1, None, 3]}, "timestamp", "is null, and so is history_index"),
        ({"value": [1.0, float("inf"), None]}, "value", "is NaN or infinite"),
        ({"rank_shown": [1.0, 1.5, None]}, "rank_shown", "cannot be read as Int32"),
        ({"history_index": [0, 0, 1]}, "history_index", "stood in an earlier row of the same user"),
    ],
)
def test_bad_interactions_go_to_quarantine(
    shop: Shop, columns: dict[str, list[object]], column: str, reason: str
) -> None:
    prepared = shop.write(items=ITEMS, interactions=interactions(3, **columns)).prepare()

    assert problems(prepared) == [("interactions.parquet", column, "quarantined", 1, (1,))]
    (row,) = shop.quarantine("interactions")
    assert row["row"] == 1
    assert reason in str(row["reason"])
    assert row[column] == columns[column][1]
    assert prepared.report.tables["interactions"].model_dump() == {"read": 3, "kept": 2, "quarantined": 1}
    assert len(prepared.histories().items) == 2


def test_a_row_with_two_faults_is_one_row_with_two_reasons(shop: Shop) -> None:
    clicks = interactions(3, item_id=["a", "zzz", "b"], event=["click", None, "click"])

    prepared = shop.write(items=ITEMS, interactions=clicks).prepare()

    (row,) = shop.quarantine("interactions")
    assert row["reason"] == "event is null or empty; item_id is not in items.parquet"
    assert len(prepared.report.problems) == 2
    assert prepared.report.tables["interactions"].quarantined == 1


def test_users_of_other_users_places_do_not_clash(shop: Shop) -> None:
    clicks = interactions(2, user_id=["u", "v"], history_index=[0, 0])

    assert problems(shop.write(items=ITEMS, interactions=clicks).prepare()) == []


def test_duplicate_and_null_users_go_to_quarantine(shop: Shop) -> None:
    users = {"user_id": ["u", "u", None, "v", "w"], "city": ["Oslo", "Rome", "Bern", "Bonn", "Kiel"]}

    prepared = shop.write(items=ITEMS, users=users).prepare()

    assert prepared.users().rows() == [("u", "Oslo"), ("v", "Bonn"), ("w", "Kiel")]
    assert [row["row"] for row in shop.quarantine("users")] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "column", "reason"),
    [
        ({"query_id": [1, 99, 2]}, "query_id", "is not in queries.parquet"),
        ({"item_id": ["a", "zzz", "c"]}, "item_id", "is not in items.parquet"),
        ({"label": [1.0, float("nan"), 0.0]}, "label", "is NaN or infinite"),
        ({"split": ["train", "dev", None]}, "split", "is none of train, validation, test"),
    ],
)
def test_bad_judgements_go_to_quarantine(
    shop: Shop, columns: dict[str, list[object]], column: str, reason: str
) -> None:
    qrels = {"query_id": [1, 1, 2], "item_id": ["a", "b", "c"]} | columns

    prepared = shop.write(items=ITEMS, queries=QUERIES, qrels=qrels).prepare()

    assert problems(prepared) == [("qrels.parquet", column, "quarantined", 1, (1,))]
    assert reason in str(shop.quarantine("qrels")[0]["reason"])
    query_items = prepared.query_items()
    assert query_items is not None
    assert query_items.collect()["item_row"].to_list() == [0, 2]


def test_duplicate_and_empty_queries_go_to_quarantine(shop: Shop) -> None:
    queries = {"query_id": [1, 1, 2, 3, 4], "query": ["cup", "mug", " ", "jar", "pot"]}

    prepared = shop.write(items=ITEMS, queries=queries, qrels=QRELS | {"query_id": [1, 3]}).prepare()

    assert [row["row"] for row in shop.quarantine("queries")] == [1, 2]
    query_items = prepared.query_items()
    assert query_items is not None
    assert query_items.collect()["query"].to_list() == ["cup", "jar"]


def test_columns_called_like_those_of_the_quarantine_survive_in_it(shop: Shop) -> None:
    items = {"item_id": ["a", None, "b"], "title": ["x"] * 3, "reason": ["gift"] * 3, "row": [7] * 3}

    shop.write(items=items).prepare()

    (row,) = shop.quarantine("items")
    assert row["reason"] == "item_id is null or empty"
    assert row["row"] == 1
    assert (row["reason_original"], row["row_original"]) == ("gift", 7)


def test_many_bad_rows_are_counted_and_the_first_are_named(shop: Shop) -> None:
    clicks = interactions(20, event=[None] * 9 + ["click"] * 11)

    (problem,) = shop.write(items=ITEMS, interactions=clicks).prepare().report.problems

    assert str(problem) == ("interactions.parquet: event is null or empty (9 rows quarantined, first 0, 1, 2, 3, 4)")


# What is kept but reported


def test_items_without_any_text_are_kept_and_reported(shop: Shop) -> None:
    items = {
        "item_id": ["a", "b", "c", "d"],
        "title": [None, " ", None, None],
        "categories": [["Cups"], [], None, None],
        "short_text": [None, None, "a jar", None],
    }

    prepared = shop.write(items=items).prepare()

    assert problems(prepared) == [("items.parquet", "title", "warning", 2, (1, 3))]
    assert len(prepared.items()) == 4


def test_an_index_that_contradicts_time_is_kept_and_reported(shop: Shop) -> None:
    clicks = interactions(3, item_id=["a", "b", "c"], history_index=[0, 1, 2], timestamp=[5, 9, 7])

    prepared = shop.write(items=ITEMS, interactions=clicks).prepare()

    assert problems(prepared) == [("interactions.parquet", "history_index", "warning", 1, (2,))]
    assert prepared.histories().items.tolist() == [0, 1, 2]


def test_blank_queries_are_no_searches(shop: Shop) -> None:
    rows = interactions(4, query=["", "cup", "  ", None], scenario=["", "home", " ", None])

    prepared = shop.write(items=ITEMS, interactions=rows).prepare()

    assert prepared.histories().queries == ["cup"]
    assert prepared.histories().query_rows.tolist() == [NO_QUERY, 0, NO_QUERY, NO_QUERY]
    assert prepared.histories().scenario_names == ("home",)
    assert problems(prepared) == [
        ("interactions.parquet", "query", "warning", 2, (0, 2)),
        ("interactions.parquet", "scenario", "warning", 2, (0, 2)),
    ]


def test_every_row_that_is_kept_fits_into_a_request(shop: Shop) -> None:
    long = {"query": "q" * 9000, "user_id": "u" * 513, "event": "e" * 65, "scenario": "s" * 65}
    rows = interactions(10) | {name: ["x"] * 6 + [None] * 4 for name in ("query", "scenario")}
    for row, (name, value) in enumerate(long.items()):
        rows[name] = [value if i == row else old for i, old in enumerate(rows[name])]
    items = ITEMS | {"item_id": ["a", "b", "c" * 513]}

    prepared = shop.write(items=items, interactions=rows).prepare()

    assert problems(prepared) == [
        ("items.parquet", "item_id", "quarantined", 1, (2,)),
        ("interactions.parquet", "user_id", "quarantined", 1, (1,)),
        ("interactions.parquet", "event", "quarantined", 1, (2,)),
        ("interactions.parquet", "scenario", "quarantined", 1, (3,)),
        ("interactions.parquet", "query", "warning", 1, (0,)),
    ]
    logged = prepared.interactions().collect()
    for row in logged.iter_rows(named=True):
        event = HistoryEvent(item_id=prepared.items()["item_id"][row["item_row"]], event=row["event"])
        RetrieveRequest(query=row["query"], scenario=row["scenario"], history=[event])
    assert logged["query"].str.len_chars().max() == 2048


def test_longer_queries_of_judgements_are_cut_and_reported(shop: Shop) -> None:
    queries = {"query_id": [1, 2], "query": ["q" * 9000, "jar"]}

    prepared = shop.write(items=ITEMS, queries=queries, qrels=QRELS).prepare()

    assert problems(prepared) == [("queries.parquet", "query", "warning", 1, (0,))]
    query_items = prepared.query_items()
    assert query_items is not None
    assert query_items.collect()["query"].str.len_chars().to_list() == [2048, 3]


# What ends the preparation


@pytest.mark.parametrize("beside", [(), ("part-1.parquet",)])
@pytest.mark.parametrize(
    "place", ["interactions/date=2024-01-01/part-0.parquet", "interactions/part-0.parquet/x.parquet"]
)
def test_shards_in_folders_of_folders_are_fatal(shop: Shop, place: str, beside: tuple[str, ...]) -> None:
    nested = shop.write(items=ITEMS).data / place
    nested.parent.mkdir(parents=True)
    pl.DataFrame(CLICKS).write_parquet(nested)
    for name in beside:
        pl.DataFrame(CLICKS).write_parquet(shop.data / "interactions" / name)

    with pytest.raises(
        DataError,
        match=r"interactions: may hold .parquet files alone, .* it holds (date=2024-01-01|part-0.parquet): flatten it",
    ):
        shop.prepare()


@pytest.mark.parametrize("name", [None, "0.csv", "_SUCCESS"])
def test_a_folder_of_a_table_without_a_shard_is_fatal(shop: Shop, name: str | None) -> None:
    folder = shop.write(items=ITEMS).data / "interactions"
    folder.mkdir()
    if name is not None:
        (folder / name).touch()

    with pytest.raises(
        DataError, match=r"interactions: may hold .*, and must hold one; it holds (none|0\.csv): flatten it"
    ):
        shop.prepare()


@pytest.mark.parametrize("column", ["event", "scenario"])
def test_what_is_no_kind_of_page_or_behaviour_is_refused(shop: Shop, column: str) -> None:
    few = interactions(1000) | {column: [f"/page/{i:04}" for i in range(1000)]}
    many = interactions(1001) | {column: [f"/page/{i:04}" for i in range(1001)]}
    assert len(shop.write(items=ITEMS, interactions=few).prepare().histories().items) == 1000

    with pytest.raises(DataError, match=f"{column} has 1,001 values, such as '/page/0000', .*; at most 1,000 are read"):
        shop.write(items=ITEMS, interactions=many).prepare()
    with pytest.raises(DataError, match="never finished"):
        load_prepared(shop.output)


def test_columns_called_like_our_own_are_fatal(shop: Shop) -> None:
    with pytest.raises(DataError, match=f"users.parquet: {ROW} is a name that this program uses itself"):
        shop.write(items=ITEMS | {"__row": [7] * 3}, users={"user_id": ["u"], ROW: [0]}).prepare()


def test_a_full_disk_is_no_damaged_file(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise pl.exceptions.ComputeError(f"{os.strerror(errno.ENOSPC)} (os error 28)")

    shop.write(items=ITEMS)
    with monkeypatch.context() as patched:
        patched.setattr(pl.LazyFrame, "sink_parquet", full)
        with pytest.raises(DataError, match="the disk is full"):
            shop.prepare()

    assert len(shop.prepare().items()) == 3


@pytest.mark.parametrize("output", ["data/items.parquet", "data/items.parquet/below"])
def test_an_output_that_cannot_be_a_folder_is_refused(shop: Shop, output: str) -> None:
    shop.write(items=ITEMS)

    with pytest.raises(DataError, match=r"cannot be made a folder to write to \(.+\); choose another"):
        prepare_logs(shop.data, shop.data.parent / output)


# Into which folder


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mark", [None, ".genretrieval-imported", ".genretrieval-synthetic"])
def test_the_logs_of_another_shop_are_left_alone(shop: Shop, tmp_path: Path, mark: str | None) -> None:
    shop.write(items=ITEMS)
    (tmp_path / "other").mkdir()
    other = Shop(tmp_path / "other").write(items=ITEMS, interactions=CLICKS, users={"user_id": ["u"]}).data
    if mark is not None:
        (other / mark).touch()
    before = held(other)

    with pytest.raises(DataError, match=r"holds .*interactions\.parquet, .*nothing was touched\. Choose a folder"):
        prepare_logs(shop.data, other)

    assert held(other) == before


def test_somebody_elses_report_is_left_alone(shop: Shop) -> None:
    shop.write(items=ITEMS)
    shop.output.mkdir()
    (shop.output / "report.json").write_text("{}")
    (shop.output / "items.parquet").touch()

    with pytest.raises(DataError, match="nothing was touched"):
        shop.prepare()

    assert held(shop.output) == {"report.json": b"{}", "items.parquet": b""}


def test_a_preparation_that_was_killed_is_made_anew(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    shop.write(items=ITEMS, interactions=CLICKS)
    with monkeypatch.context() as patched:
        patched.setattr(logs, "_sort_by_users", killed)
        with pytest.raises(KeyboardInterrupt):
            shop.prepare()
    assert not (shop.output / "report.json").exists()

    assert len(shop.prepare().histories().items) == 4


@pytest.mark.parametrize("finished", [True, False])
def test_what_an_earlier_version_prepared_is_made_anew(shop: Shop, finished: bool) -> None:
    prepared = shop.write(items=ITEMS, interactions=CLICKS).prepare()
    for name in (".genretrieval-prepared", ".lock"):
        (shop.output / name).unlink()
    earlier = prepared.report.model_copy(update={"format_version": 1, "inputs_sha256": "0" * 64})
    (shop.output / "report.json").write_text(earlier.model_dump_json())
    if not finished:
        (shop.output / "report.json").unlink()
        (shop.output / "sorting.partial").mkdir()

    assert shop.prepare() == prepared
    assert load_prepared(shop.output) == prepared


def test_of_two_runs_at_once_one_prepares_and_the_other_waits(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write(items=ITEMS, interactions=CLICKS)
    inside: list[int] = []
    both_inside = threading.Barrier(2)
    run = logs._Preparation.run

    def slowly(preparation: logs._Preparation) -> PreparedLogs:
        inside.append(threading.get_ident())
        with suppress(threading.BrokenBarrierError):  # alone: goes on after a moment
            both_inside.wait(0.5)
        return run(preparation)

    monkeypatch.setattr(logs._Preparation, "run", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: shop.prepare(), range(2))

    assert first == second
    assert len(inside) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no folder"):
        prepare_logs(tmp_path / "nowhere", tmp_path / "out")


def test_a_missing_items_file_is_named(shop: Shop) -> None:
    with pytest.raises(DataError, match=r"items\.parquet: is missing"):
        shop.write(interactions=CLICKS).prepare()


def test_every_fatal_problem_is_listed_and_nothing_is_written(shop: Shop) -> None:
    shop.write(items={"title": ["Cup"]}, interactions=CLICKS | {"event": [1.5] * 4}, qrels=QRELS)
    (shop.data / "users.parquet").write_text("no Parquet")

    with pytest.raises(DataError) as caught:
        shop.prepare()

    message = str(caught.value)
    assert "items.parquet: item_id is missing" in message
    assert "interactions.parquet: event is Float64" in message
    assert "users.parquet: cannot be read as Parquet" in message
    assert "queries.parquet: is missing, but qrels.parquet refers to its query_id" in message
    assert not shop.output.exists()


def test_an_empty_items_file_is_fatal(shop: Shop) -> None:
    with pytest.raises(DataError, match=r"items\.parquet: has no rows"):
        shop.write(items=pl.DataFrame(ITEMS).clear()).prepare()


def test_a_truncated_file_is_fatal(shop: Shop) -> None:
    shop.write(items=ITEMS)
    path = shop.data / "items.parquet"
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match=r"items\.parquet: cannot be read as Parquet"):
        shop.prepare()


def test_a_file_damaged_inside_is_fatal_and_leaves_the_folder_unfinished(shop: Shop) -> None:
    shop.write(items=ITEMS)
    path = shop.data / "items.parquet"
    path.write_bytes(path.read_bytes()[:4] + b"\0" * 60 + path.read_bytes()[64:])

    with pytest.raises(DataError, match="damaged inside"):
        shop.prepare()
    with pytest.raises(DataError, match="never finished"):
        load_prepared(shop.output)


def test_shards_must_be_alike(shop: Shop) -> None:
    (shop.data / "items").mkdir()
    pl.DataFrame(ITEMS).write_parquet(shop.data / "items" / "0.parquet")
    pl.DataFrame({"item_id": [1]}).write_parquet(shop.data / "items" / "1.parquet")

    with pytest.raises(DataError, match=r"items/1\.parquet: has other columns or types than .* items/0\.parquet"):
        shop.prepare()


def test_a_table_that_is_there_twice_is_fatal(shop: Shop) -> None:
    shop.write(items=ITEMS)
    (shop.data / "items").mkdir()
    pl.DataFrame(ITEMS).write_parquet(shop.data / "items" / "0.parquet")

    with pytest.raises(DataError, match=r"items\.parquet: is there twice"):
        shop.prepare()


def test_a_table_that_is_mostly_wrong_is_refused(shop: Shop) -> None:
    clicks = interactions(3, item_id=["a", "x", "y"])

    with pytest.raises(DataError, match=r"2 of 3 rows are wrong") as caught:
        shop.write(items=ITEMS, interactions=clicks).prepare()

    assert "item_id is not in items.parquet (2 rows quarantined, first 1, 2)" in str(caught.value)
    assert [row["item_id"] for row in shop.quarantine("interactions")] == ["x", "y"]
    with pytest.raises(DataError, match="never finished"):
        load_prepared(shop.output)


def test_half_a_table_may_be_wrong(shop: Shop) -> None:
    clicks = interactions(2, item_id=["a", "x"])

    assert len(shop.write(items=ITEMS, interactions=clicks).prepare().histories().items) == 1


def test_logs_are_not_prepared_onto_themselves(shop: Shop) -> None:
    shop.write(items=ITEMS)

    with pytest.raises(DataError, match="the folder of the logs themselves"):
        prepare_logs(shop.data, shop.data)


# Preparing again


def test_unchanged_logs_are_not_prepared_twice(shop: Shop) -> None:
    shop.write(items=ITEMS, interactions=CLICKS).prepare()
    before = (shop.output / "items.parquet").stat().st_mtime_ns

    again = shop.write(items=ITEMS, interactions=CLICKS).prepare()

    assert (shop.output / "items.parquet").stat().st_mtime_ns == before
    assert again == load_prepared(shop.output)


def test_changed_logs_leave_nothing_of_the_earlier_ones(shop: Shop) -> None:
    bad = {"item_id": ["a", None, "b"], "title": ["x"] * 3}
    shop.write(items=bad, queries=QUERIES, qrels={"query_id": [1], "item_id": ["a"]}).prepare()
    for name in ("queries", "qrels"):
        (shop.data / f"{name}.parquet").unlink()

    prepared = shop.write(items=ITEMS).prepare()

    assert prepared.query_items() is None
    assert sorted(path.name for path in shop.output.iterdir()) == [
        *(".genretrieval-prepared", ".lock", "interactions.parquet", "items.parquet", "report.json", "users.parquet")
    ]


def test_a_report_of_another_version_is_refused(shop: Shop) -> None:
    shop.write(items=ITEMS).prepare()
    path = shop.output / "report.json"
    report = json.loads(path.read_text())

    path.write_text(json.dumps(report | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        load_prepared(shop.output)
    path.write_text("{}")
    with pytest.raises(DataError, match="not a report of this version"):
        load_prepared(shop.output)


def test_the_report_reads_as_lines(shop: Shop) -> None:
    lines = shop.write(items=ITEMS, interactions=interactions(2, item_id=["a", "x"])).prepare().report.lines()

    assert lines == [
        "items: 3 rows",
        "interactions: 1 rows, 1 in quarantine",
        "order: (timestamp, file order); 0 of 1 timed interactions share the second of the one before",
        "interactions.parquet: item_id is not in items.parquet (1 row quarantined, first 1)",
    ]


def test_opening_tables_reads_no_rows_but_names_the_columns(shop: Shop) -> None:
    tables = open_tables(shop.write(items=ITEMS, interactions=CLICKS).data)

    assert list(tables) == ["items", "interactions"]


# Real logs


@pytest.fixture(scope="session")
def real_data() -> Path:
    if folder := os.environ.get("GENRETRIEVAL_DATA"):
        return Path(folder)
    reason = "GENRETRIEVAL_DATA is not set: the folder with the shared real data"
    if os.environ.get("REQUIRE_SHARED_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.data
def test_beauty(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "amazon_beauty_2014"

    prepared = prepare_logs(source, tmp_path / "beauty")
    histories = prepared.histories()

    assert (histories.n_users, len(prepared.items()), len(histories.items)) == (22_363, 12_101, 198_502)
    assert prepared.report.problems == []
    assert prepared.report.order_rule.startswith("history_index; ")
    raw = pl.read_parquet(source / "interactions.parquet").sort("user_id", "position")
    expected = {user: items for user, items in raw.group_by("user_id").agg("item_id").iter_rows()}  # noqa: C416
    item_ids = prepared.items()["item_id"].to_list()
    for row in range(0, histories.n_users, 97):
        items = histories.items[histories.offsets[row] : histories.offsets[row + 1]]
        assert [item_ids[item] for item in items] == expected[histories.user_ids[row]]


@pytest.mark.data
def test_cellphones(real_data: Path, tmp_path: Path) -> None:
    prepared = prepare_logs(real_data / "amazon_cellphones_2014", tmp_path / "cellphones")

    query_items = prepared.query_items()
    assert query_items is not None
    splits = dict(query_items.group_by("split").len().collect().iter_rows())
    assert splits == {"train": 174_087, "test": 667}
    assert prepared.items()["title"].is_null().all()
    assert [p for p in prepared.report.problems if p.severity == "quarantined"] == []
    assert prepared.histories().n_users == 27_879
    assert len(prepared.users()) == 27_909  # 30 users are known from the judgements alone
    assert (prepared.histories().times == NO_TIME).all()
