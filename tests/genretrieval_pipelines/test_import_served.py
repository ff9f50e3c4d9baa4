"""What servers logged becomes logs to train on: joined by token, completed by what was there before."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from genretrieval.bundle import CATALOGUE, GRAPH, Manifest, write_bundle
from genretrieval.errors import DataError, InvalidInputError
from genretrieval.logs import prepare_logs
from genretrieval.served_logs import EVENTS, EVENTS_FOLDER, SERVED, SERVED_FOLDER, UserKeys, write_table
from genretrieval_pipelines.importers import ImportReport, import_logs
from genretrieval_pipelines.importers.served import ServedOptions

KEYS = UserKeys(b"a secret of enough bytes")
START = 1_700_000_000


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(START + seconds, UTC)


def answer(token: str, items: str, user: str | None = None, time: float = 0, **fields: Any) -> dict[str, Any]:
    shown = [{"item_id": item, "rank": rank} for rank, item in enumerate(items)]
    key = None if user is None else KEYS.of(user)
    return {"attribution_token": token, "user_key": key, "time": at(time), "items": shown, **fields}


def profile(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def event(item: str, event: str, token: str | None = None, user: str | None = None, **fields: Any) -> dict[str, Any]:
    key = None if user is None else KEYS.of(user)
    row = {"item_id": item, "event": event, "attribution_token": token, "user_key": key, **fields}
    return {**row, "time": at(fields.get("time", 0)), "received": at(fields.get("received", 0))}


def write_logs(folder: Path, answers: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> Path:
    for kind, rows, schema in ((SERVED_FOLDER, answers, SERVED), (EVENTS_FOLDER, events, EVENTS)):
        for row in rows:
            write_table(folder / kind, pa.Table.from_pylist([row], schema), row["time"])
    return folder


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Logs of two users before there was a server."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    items = pl.DataFrame({"item_id": list("abcdef"), "title": [f"thing {item}" for item in "abcdef"]})
    items.write_parquet(folder / "items.parquet")
    pl.DataFrame(
        {
            "user_id": ["jane", "jane", "john"],
            "item_id": ["a", "b", "c"],
            "event": ["click"] * 3,
            "timestamp": [START - 30, START - 20, START - 10],
        }
    ).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"user_id": ["jane"], "age": [30]}).write_parquet(folder / "users.parquet")
    pl.DataFrame({"query_id": ["1"], "query": ["red"]}).write_parquet(folder / "queries.parquet")
    pl.DataFrame({"query_id": ["1"], "item_id": ["a"], "user_id": ["jane"]}).write_parquet(folder / "qrels.parquet")
    return folder


def imported(logs: Path, earlier: Path, output: Path) -> tuple[ImportReport, list[dict[str, Any]]]:
    report = import_logs("served", logs, output, ServedOptions(earlier=earlier, keys=KEYS))
    rows = pl.read_parquet(output / "interactions.parquet").with_columns(pl.col("timestamp").dt.epoch("s") - START)
    return report, rows.to_dicts()


def brief(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["event"], row["item_id"], row["request_id"], row["rank_shown"], row["query"], row["timestamp"])


def test_what_was_shown_and_taken_is_joined_by_its_token(tmp_path, earlier) -> None:
    logs = write_logs(
        tmp_path / "logs",
        [answer("t1", "abc", "jane", 0, query="red", scenario="search"), answer("t2", "de", "john", 5)],
        [
            event("b", "click", "t1", time=1, value=2.0),
            event("d", "exposure", "t2", "john", time=6),
            event("d", "purchase", "t2", "john", time=7),
            event("f", "click", "t2", time=8),
        ],
    )
    report, rows = imported(logs, earlier, tmp_path / "out")
    assert [brief(row) for row in rows if row["timestamp"] >= 0] == [
        # Of the first answer no exposure was recorded, so all of it was shown; of the second what was recorded.
        ("exposure", "a", "t1", 0, "red", 0),
        ("exposure", "b", "t1", 1, "red", 0),
        ("exposure", "c", "t1", 2, "red", 0),
        ("click", "b", "t1", 1, "red", 1),
        ("exposure", "d", "t2", 0, None, 6),
        ("purchase", "d", "t2", 0, None, 7),
        ("click", "f", "t2", None, None, 8),
    ]
    click = next(row for row in rows if row["event"] == "click" and row["item_id"] == "b" and row["request_id"])
    assert (click["user_id"], click["scenario"], click["value"]) == (KEYS.of("jane"), "search", 2.0)
    assert report.lines()[-3:] == [
        "answers: 2, to 2 users, and 0 to nobody, each of whom is a visitor of its own",
        "events: 4, of which 4 belong to a logged answer",
        "events: 1 are about an item that is not in their answer, and have no rank",
    ]


def test_events_that_cannot_be_joined_are_reported_and_none_is_lost(tmp_path, earlier) -> None:
    logs = write_logs(
        tmp_path / "logs",
        [answer("t1", "ab")],
        [
            event("a", "click", "t1", time=1),
            event("a", "click", "t1", time=1, received=2),  # sent again
            event("c", "click", "sampled-out", "jane", time=3),
            event("d", "purchase", None, "jane", time=4),
            event("e", "click", "sampled-out", time=5),
        ],
    )
    report, rows = imported(logs, earlier, tmp_path / "out")
    taken = [row for row in rows if row["timestamp"] >= 0 and row["event"] != "exposure"]
    assert [brief(row)[:3] for row in taken] == [
        ("click", "a", "t1"),
        ("click", "c", None),
        ("purchase", "d", None),
    ]
    assert [row["user_id"] for row in taken] == ["visit-t1", KEYS.of("jane"), KEYS.of("jane")]
    assert report.lines()[-5:] == [
        "events: 4, of which 1 belong to a logged answer",
        "events: 1 were sent more than once and count once",
        "events: 1 name an answer that is not in the log, and are interactions of their user alone",
        "events: 1 name no answer, and are interactions of their user alone",
        "events: 1 belong to no logged answer and no user: events.parquet in quarantine",
    ]
    (lost,) = pl.read_parquet(tmp_path / "out" / "quarantine" / "events.parquet").to_dicts()
    assert (lost["item_id"], lost["attribution_token"]) == ("e", "sampled-out")


def test_somebody_who_logs_in_takes_the_answer_along(tmp_path, earlier) -> None:
    logs = write_logs(tmp_path / "logs", [answer("t1", "a")], [event("a", "click", "t1", "jane", time=1)])
    _, rows = imported(logs, earlier, tmp_path / "out")
    assert {row["user_id"] for row in rows if row["timestamp"] >= 0} == {KEYS.of("jane")}


def test_users_of_earlier_logs_are_known_again_and_the_whole_is_clean(tmp_path, earlier) -> None:
    logs = write_logs(
        tmp_path / "logs",
        [
            answer("t1", "ab", "jane", 0, profile=profile(age="31")),
            answer("t2", "ab", "mary", 1, profile=profile(age="50", shoe="8")),
            answer("t3", "ab", "mary", 2, profile=profile(age="51")),
        ],
        [event("a", "click", "t1", time=1), event("b", "click", "t3", time=3)],
    )
    imported(logs, earlier, tmp_path / "out")
    prepared = prepare_logs(tmp_path / "out", tmp_path / "prepared")
    assert prepared.report.problems == []
    assert prepared.report.tables["interactions"].kept == 3 + 6 + 2
    histories = prepared.histories()
    ids = [prepared.items()["item_id"][row] for row in histories.items.tolist()]
    of_user = {user: ids[histories.offsets[n] : histories.offsets[n + 1]] for n, user in enumerate(histories.user_ids)}
    assert of_user == {KEYS.of("jane"): ["a", "b", "a"], KEYS.of("john"): ["c"], KEYS.of("mary"): ["b"]}
    # Profiles stay as they were; users that had none get the newest that requests came with.
    users = dict(prepared.users().select("user_id", "age").iter_rows())
    assert users == {KEYS.of("jane"): 30, KEYS.of("john"): None, KEYS.of("mary"): 51}
    judged = prepared.query_items()
    assert judged is not None
    assert prepared.users()["user_id"][judged.collect()["user_row"][0]] == KEYS.of("jane")


def test_without_earlier_logs_the_items_are_the_bundles(tmp_path) -> None:
    manifest = Manifest(
        genretrieval_version="0",
        n_items=2,
        codebook_sizes=(2,),
        opset=18,
        minimum_onnxruntime="1.20",
        graph_inputs=(),
        max_history=1,
        max_query_tokens=1,
        reads_queries=False,
        beam_width=1,
        exclude_seen=False,
    )
    table = pl.DataFrame({"item_id": ["a", "b"], "title": ["x", "y"], "semantic_id": [[0], [1]], "popularity": [1, 2]})
    with write_bundle(tmp_path / "bundle", manifest) as folder:
        table.write_parquet(folder / CATALOGUE)
        (folder / GRAPH).touch()
    logs = write_logs(
        tmp_path / "logs", [answer("t1", "ab", "u", profile=profile(age="9"))], [event("b", "click", "t1", time=1)]
    )
    import_logs("served", logs, tmp_path / "out", ServedOptions(bundle=tmp_path / "bundle"))
    prepared = prepare_logs(tmp_path / "out", tmp_path / "prepared")
    assert prepared.report.problems == []
    assert prepared.items()["title"].to_list() == ["x", "y"]
    assert "semantic_id" not in prepared.items().columns
    assert prepared.users().rows() == [(KEYS.of("u"), "9")]


def test_rows_of_earlier_logs_that_cannot_be_read_are_reported(tmp_path, earlier) -> None:
    table = pl.read_parquet(earlier / "interactions.parquet")
    table.with_columns(item_id=pl.when(pl.col("item_id") != "b").then("item_id")).write_parquet(
        earlier / "interactions.parquet"
    )
    logs = write_logs(tmp_path / "logs", [answer("t1", "a", "jane")], [])
    report, rows = imported(logs, earlier, tmp_path / "out")
    assert [row["item_id"] for row in rows] == ["a", "c", "a"]
    assert report.lines()[-1].startswith("interactions: 1 earlier rows cannot be read and were left out")


def test_files_of_an_older_server_lack_columns(tmp_path, earlier) -> None:
    logs = write_logs(tmp_path / "logs", [answer("t1", "ab", "jane")], [event("a", "click", "t1", time=1)])
    older = pa.Table.from_pylist([answer("t0", "c", "john", 2)], SERVED).drop_columns(["degraded", "scenario"])
    write_table(logs / SERVED_FOLDER, older, at(0))
    _, rows = imported(logs, earlier, tmp_path / "out")
    assert [row["request_id"] for row in rows if row["event"] == "exposure"] == ["t1", "t1", "t0"]


@pytest.mark.parametrize(
    "options",
    [{}, {"bundle": Path("b"), "earlier": Path("e"), "keys": KEYS}, {"earlier": Path("e")}],
)
def test_items_come_from_one_place_and_earlier_users_by_a_key(options) -> None:
    with pytest.raises(InvalidInputError, match="--merge"):
        ServedOptions(**options)


def test_what_is_no_log_is_refused(tmp_path, earlier) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(DataError, match="holds no served logs"):
        imported(tmp_path / "logs", earlier, tmp_path / "out")
    for format_, served in (("served", None), ("house", ServedOptions(bundle=earlier))):
        with pytest.raises(DataError, match="served"):
            import_logs(format_, earlier, tmp_path / "out", served)
