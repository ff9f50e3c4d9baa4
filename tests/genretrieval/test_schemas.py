from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.schemas import INTERACTIONS, ITEMS, QRELS, ROW, USERS, Conformed, Problem, conform

NOON = datetime(2014, 7, 23, 12, 0, 0)
NOON_SECONDS = 1_406_116_800


def interactions(**columns: object) -> pl.LazyFrame:
    """A table of one user's clicks, valid but for `columns`."""
    n = len(next(iter(columns.values())))  # type: ignore[arg-type]
    valid = {
        "user_id": ["u"] * n,
        "item_id": ["i"] * n,
        "event": ["click"] * n,
        "history_index": list(range(n)),
    }
    return pl.LazyFrame(valid | columns)


def broken(conformed: Conformed, column: str) -> list[bool]:
    """Whether each row breaks some rule on `column`."""
    rules = [rule.broken.fill_null(False) for rule in conformed.rules if rule.column == column]
    return conformed.frame.select(pl.any_horizontal(rules).alias("broken")).collect()["broken"].to_list()


def warned(conformed: Conformed) -> dict[str, int]:
    """What is reported of how many rows."""
    counts = [
        conformed.frame.select(rule.broken.fill_null(False).sum()).collect().item() for rule in conformed.warnings
    ]
    pairs = zip(conformed.warnings, counts, strict=True)
    return {f"{rule.column} {rule.reason}": count for rule, count in pairs if count}


def fatal(conformed: Conformed) -> list[str]:
    return [str(problem) for problem in conformed.problems if problem.severity == "fatal"]


def test_columns_come_in_the_contracts_order_with_attributes_behind() -> None:
    conformed = conform(pl.LazyFrame({"colour": ["red"], "title": ["Cup"], "item_id": ["a"]}), ITEMS)

    assert not conformed.fatal
    assert conformed.columns == [
        *("item_id", "title", "description", "brand", "categories", "price", "parent_id", "in_stock"),
        "colour",
    ]
    row = conformed.frame.select(conformed.columns).collect().row(0, named=True)
    assert row["title"] == "Cup"
    assert row["colour"] == "red"
    assert row["price"] is None


def test_row_numbers_are_carried_along() -> None:
    frame = pl.LazyFrame({"item_id": ["a", "b"]}).with_row_index(ROW)

    conformed = conform(frame, ITEMS)

    assert conformed.frame.collect()[ROW].to_list() == [0, 1]
    assert ROW not in conformed.columns


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series([7, 8], dtype=pl.Int64),
        pl.Series([7, 8], dtype=pl.UInt8),
        pl.Series(["7", "8"], dtype=pl.Categorical),
        pl.Series(["7", "8"], dtype=pl.Enum(["7", "8"])),
    ],
)
def test_ids_are_read_as_text(ids: pl.Series) -> None:
    assert conform(pl.LazyFrame({"user_id": ids}), USERS).frame.collect()["user_id"].to_list() == ["7", "8"]


def test_float_ids_are_refused_because_they_may_have_lost_digits() -> None:
    conformed = conform(pl.LazyFrame({"user_id": [7.0]}), USERS)

    assert fatal(conformed) == [
        "users.parquet: user_id is Float64, which cannot be read as String (unique): cast it to whole numbers or text; "
        "floats lose digits of long ids"
    ]


def test_what_is_to_be_done_about_decimal_ids_is_said() -> None:
    (problem,) = fatal(conform(pl.LazyFrame({"user_id": pl.Series([7], dtype=pl.Decimal(10, 0))}), USERS))

    assert "cast it to whole numbers or text" in problem


@pytest.mark.parametrize(("column", "longest"), [("user_id", 512), ("item_id", 512), ("event", 64), ("scenario", 64)])
def test_what_no_request_may_hold_breaks_a_rule(column: str, longest: int) -> None:
    conformed = conform(interactions(**{column: ["鞋" * longest, "x" * (longest + 1)]}), INTERACTIONS)

    assert broken(conformed, column) == [False, True]


def test_longer_queries_are_cut_and_reported() -> None:
    conformed = conform(interactions(query=["鞋" * 2048, "x" * 2049, None]), INTERACTIONS)

    assert conformed.frame.collect()["query"].to_list() == ["鞋" * 2048, "x" * 2048, None]
    assert warned(conformed) == {"query is longer than 2,048 characters: cut": 1}
    assert broken(conformed, "query") == [False] * 3


@pytest.mark.parametrize("column", ["query", "request_id", "scenario"])
def test_a_blank_text_is_none_and_reported(column: str) -> None:
    conformed = conform(interactions(**{column: ["", " \t", None, "x"]}), INTERACTIONS)

    assert conformed.frame.collect()[column].to_list() == [None, None, None, "x"]
    assert warned(conformed) == {f"{column} is blank: read as null": 2}
    assert broken(conformed, column) == [False] * 4


def test_columns_of_any_name_but_our_own_are_attributes() -> None:
    frame = pl.LazyFrame({"item_id": ["a"], "__row": [7], "__unreadable_item_id": [True]}).with_row_index(ROW)

    conformed = conform(frame, ITEMS)

    row = conformed.frame.select(conformed.columns).collect().row(0, named=True)
    assert (row["__row"], row["__unreadable_item_id"]) == (7, True)
    assert broken(conformed, "item_id") == [False]


def test_null_and_empty_ids_break_a_rule() -> None:
    assert broken(conform(pl.LazyFrame({"item_id": ["a", None, "", "  "]}), ITEMS), "item_id") == [
        *(False, True, True, True)
    ]


def test_null_event_breaks_a_rule() -> None:
    assert broken(conform(interactions(event=["click", None]), INTERACTIONS), "event") == [False, True]


@pytest.mark.parametrize(
    ("timestamps", "dtype"),
    [
        ([NOON_SECONDS], pl.Int64),
        ([NOON_SECONDS], pl.Int32),
        ([NOON_SECONDS], pl.UInt64),
        ([float(NOON_SECONDS)], pl.Float64),
        ([NOON], pl.Datetime("ms")),
        ([NOON], pl.Datetime("ns")),
        ([NOON.replace(tzinfo=UTC)], pl.Datetime("us", "UTC")),
        ([NOON.replace(tzinfo=UTC)], pl.Datetime("us", "Asia/Shanghai")),
        (["2014-07-23 12:00:00"], pl.String),
        (["2014-07-23T12:00:00Z"], pl.String),
        (["2014-07-23T14:00:00+02:00"], pl.String),
        ([str(NOON_SECONDS)], pl.String),
    ],
)
def test_a_time_is_read_from_every_spelling(timestamps: list[object], dtype: pl.DataType) -> None:
    conformed = conform(interactions(timestamp=pl.Series(timestamps, dtype=dtype)), INTERACTIONS)

    assert not conformed.fatal
    assert conformed.frame.collect()["timestamp"].to_list() == [NOON]
    assert broken(conformed, "timestamp") == [False]


def test_a_date_is_its_midnight() -> None:
    conformed = conform(interactions(timestamp=[date(2014, 7, 23)]), INTERACTIONS)

    assert conformed.frame.collect()["timestamp"].to_list() == [datetime(2014, 7, 23)]


def test_fractions_of_a_second_are_kept_for_ordering() -> None:
    conformed = conform(interactions(timestamp=[NOON_SECONDS + 0.25]), INTERACTIONS)

    assert conformed.frame.collect()["timestamp"].to_list() == [NOON + timedelta(milliseconds=250)]


@pytest.mark.parametrize(
    "timestamps",
    [
        pl.Series([None, NOON_SECONDS * 1000]),  # milliseconds
        pl.Series([None, -1]),
        pl.Series([None, 2**63 - 1]),
        pl.Series([None, float("nan")]),
        pl.Series([None, float("inf")]),
        pl.Series([None, "yesterday"]),
        pl.Series([None, "2014-13-45"]),
        pl.Series([None, datetime(1969, 12, 31)]),
    ],
)
def test_what_is_no_time_is_not_guessed(timestamps: pl.Series) -> None:
    conformed = conform(interactions(timestamp=timestamps), INTERACTIONS)

    assert conformed.frame.collect()["timestamp"].to_list() == [None, None]
    assert broken(conformed, "timestamp") == [False, True]


@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=st.just(timezone(timedelta(hours=2)))))
def test_seconds_text_and_datetime_agree(moment: datetime) -> None:
    moment = moment.replace(microsecond=0)
    spellings = [
        [int(moment.timestamp())],
        [moment.timestamp()],
        [moment.isoformat()],
        [moment.astimezone(UTC)],
    ]

    read = [
        conform(interactions(timestamp=spelling), INTERACTIONS).frame.collect()["timestamp"][0]
        for spelling in spellings
    ]

    assert read == [moment.astimezone(UTC).replace(tzinfo=None)] * 4


def test_position_is_read_as_history_index() -> None:
    frame = interactions(position=[4, 5]).drop("history_index")

    assert conform(frame, INTERACTIONS).frame.collect()["history_index"].to_list() == [4, 5]


def test_a_column_and_its_alias_together_are_fatal() -> None:
    assert fatal(conform(interactions(position=[0]), INTERACTIONS)) == [
        "interactions.parquet: history_index is given twice, as history_index and position: remove one"
    ]


def test_an_order_is_needed() -> None:
    problems = fatal(conform(interactions(event=["click"]).drop("history_index"), INTERACTIONS))

    assert problems == [
        "interactions.parquet: timestamp is missing, and so is history_index: a history's order needs one of them"
    ]


def test_every_missing_column_is_named() -> None:
    problems = fatal(conform(pl.LazyFrame({"user": ["u"], "timestamp": [0]}), INTERACTIONS))

    assert [problem.split()[1] for problem in problems] == ["user_id", "item_id", "event"]
    assert "the file has user, timestamp" in problems[0]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("title", [1.5]),
        ("title", [["a"]]),
        ("price", ["3.50"]),
        ("in_stock", ["yes"]),
        ("categories", [[["a", "b"]]]),
    ],
)
def test_wrong_types_are_fatal(column: str, values: list[object]) -> None:
    (problem,) = conform(pl.LazyFrame({"item_id": ["a"], column: values}), ITEMS).problems

    assert problem.severity == "fatal"
    assert problem.column == column


@pytest.mark.parametrize("timestamp", [True, [1]])
def test_wrong_type_of_time_is_fatal(timestamp: object) -> None:
    assert conform(interactions(timestamp=[timestamp]), INTERACTIONS).fatal


def test_whole_numbers_are_read_from_whole_floats_alone() -> None:
    conformed = conform(interactions(rank_shown=[3.0, 3.5, float("nan"), None, 1e12]), INTERACTIONS)

    assert conformed.frame.collect()["rank_shown"].to_list() == [3, None, None, None, None]
    assert broken(conformed, "rank_shown") == [False, True, True, False, True]


def test_numbers_must_be_finite() -> None:
    conformed = conform(interactions(value=[1.0, float("nan"), float("-inf"), None]), INTERACTIONS)

    assert broken(conformed, "value") == [False, True, True, False]


def test_labels_are_read_from_small_integers() -> None:
    frame = pl.LazyFrame({"query_id": [1], "item_id": ["a"], "label": pl.Series([2], dtype=pl.Int8)})

    conformed = conform(frame, QRELS)

    assert conformed.frame.collect()["label"].to_list() == [2.0]
    assert conformed.frame.collect_schema()["label"] == pl.Float32


def test_one_category_is_a_list_of_one() -> None:
    conformed = conform(pl.LazyFrame({"item_id": ["a", "b"], "categories": ["Shoes", None]}), ITEMS)

    assert conformed.frame.collect()["categories"].to_list() == [["Shoes"], None]


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float64, 2)])
def test_embeddings_become_float32_and_must_be_finite(dtype: pl.DataType) -> None:
    vectors = pl.Series([[0.5, 1.0], [float("nan"), 1.0], None], dtype=dtype)

    conformed = conform(pl.LazyFrame({"item_id": ["a", "b", "c"], "image": vectors}), ITEMS)

    assert conformed.frame.collect_schema()["image"] == pl.List(pl.Float32)
    assert broken(conformed, "image") == [False, True, False]


def test_a_column_without_any_value_fits_every_type() -> None:
    nothing = pl.Series([None], dtype=pl.Null)

    conformed = conform(pl.LazyFrame({"item_id": ["a"], "title": nothing, "categories": nothing}), ITEMS)

    assert not conformed.fatal
    assert conformed.frame.collect_schema()["categories"] == pl.List(pl.String)


def test_columns_that_interactions_have_no_place_for_are_reported() -> None:
    conformed = conform(interactions(country=["NO"]), INTERACTIONS)

    assert "country" not in conformed.columns
    assert [(p.column, p.severity) for p in conformed.problems] == [("country", "warning")]


def test_a_problem_reads_as_one_line() -> None:
    problem = Problem(
        file="items.parquet",
        column="item_id",
        reason="is null",
        severity="quarantined",
        rows=1200,
        first_rows=(0, 7),
    )

    assert str(problem) == "items.parquet: item_id is null (1,200 rows quarantined, first 0, 7)"
