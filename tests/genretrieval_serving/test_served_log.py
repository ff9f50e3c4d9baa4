"""What is answered and sent back ends in files: whole ones, of nobody by name, and not in anybody's way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from structlog.testing import capture_logs

from genretrieval import served_logs
from genretrieval.errors import DataError, InvalidInputError, OverloadedError, RequestError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.served_logs import (
    EVENTS,
    EVENTS_FOLDER,
    KEY_VARIABLE,
    PARTIAL,
    SERVED,
    SERVED_FOLDER,
    UserKeys,
    forget_user,
    log_files,
    remove_before,
    unfinished,
    write_table,
)
from genretrieval_serving import served_log
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.client import Client
from genretrieval_serving.messages import MAX_EVENTS, FeedbackEvent
from genretrieval_serving.observability import Metrics
from genretrieval_serving.served_log import LogSettings, ServedLog, forget

KEYS = UserKeys(b"a secret of enough bytes")
USER = "jane.doe@shop.example"
CLICK = FeedbackEvent(item_id="item-1", event="click", attribution_token="t", user_id=USER)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    schema = {SERVED_FOLDER: SERVED, EVENTS_FOLDER: EVENTS}[kind]
    tables = [pq.read_table(path) for path in log_files(folder / kind)]
    assert all(table.schema.equals(schema) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def counted(metrics: Metrics, name: str) -> dict[str, float]:
    (family,) = getattr(metrics, name).collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_answer_is_logged_as_it_was_read_and_given(start, tmp_path, example) -> None:
    settings = LogSettings(tmp_path / "logs", keys=KEYS)
    request = example.model_copy(update={"user_id": USER})
    began = datetime.now(UTC) - timedelta(seconds=1)
    with start(served_log=settings, histories="memory") as running, Client(running.grpc) as client:
        client.record_events([{"user_id": USER, "item_id": "item-7", "event": "click", "timestamp": 5}])
        answer = client.retrieve(request)
        nobody = client.retrieve(top_k=1)
        direct = running.retriever.retrieve([nobody_request := RetrieveRequest(top_k=1)])[0]
        assert client.retrieve(nobody_request).items == direct.items
    logged = {row["attribution_token"]: row for row in rows(settings.folder, SERVED_FOLDER)}
    assert len(logged) == 3
    row = logged[answer.attribution_token]
    assert row["user_key"] == KEYS.of(USER)
    assert logged[nobody.attribution_token]["user_key"] is None
    assert began <= row["time"] <= datetime.now(UTC)
    # Of what is stored and sent, what the catalogue has, in the order in which it was read.
    assert [(e["item_id"], e["event"], e["timestamp"]) for e in row["history_read"]] == [
        ("item-7", "click", 5),
        ("item-1", "purchase", 1_700_000_000),
        ("item-9", "", None),
    ]
    assert [(item["item_id"], item["rank"]) for item in row["items"]] == [
        (item.item_id, rank) for rank, item in enumerate(answer.items)
    ]
    assert row["items"][0]["score"] == pytest.approx(answer.items[0].score)
    assert row["items"][0]["semantic_id"] == answer.items[0].semantic_id
    assert (row["query"], row["query_read"], row["scenario"]) == ("red shoes", "red shoes", "home")
    assert row["profile"] == [{"name": "age", "value": "30"}, {"name": "country", "value": "NL"}]
    assert json.loads(row["filters"])["attributes"] == {"brand": ["umbra", "acme"], "category": ["shoes"]}
    assert (row["exclude_item_ids"], row["exclude_history"]) == (["item-2", "unknown"], "purchased")
    assert (row["top_k"], row["beam_width"], row["arm"]) == (4, 20, "primary")
    assert (row["bundle_version"], row["revision"], row["catalogue_revision"]) == (answer.bundle_version, 0, 0)
    assert row["degraded"] == answer.degraded
    (event,) = rows(settings.folder, EVENTS_FOLDER)
    assert (event["user_key"], event["time"]) == (KEYS.of(USER), datetime.fromtimestamp(5, UTC))


def test_every_answer_has_a_token_that_says_nothing_of_its_request(running) -> None:
    with Client(running.http) as client:
        tokens = [client.retrieve(user_id=USER).attribution_token for _ in range(3)]
    assert len({token.split(".")[-1] for token in tokens}) == 3
    assert len({token.rpartition(".")[0] for token in tokens}) == 1
    assert max(map(len, tokens)) < 64


EVENT = {"item_id": "item-1", "event": "purchase", "attribution_token": "t", "timestamp": 9, "value": 2.5}


def test_events_are_the_same_by_either_transport(start, tmp_path) -> None:
    for transport in ("http", "grpc"):
        settings = LogSettings(tmp_path / transport, keys=KEYS)
        with start(served_log=settings) as running, Client(getattr(running, transport)) as client:
            answer = client.record_events([EVENT, FeedbackEvent(item_id="x", event="click", user_id=USER)])
            assert (answer.accepted, answer.degraded) == (2, [])
        purchase, click = rows(settings.folder, EVENTS_FOLDER)
        assert purchase.pop("received") >= click["time"]
        assert purchase == {
            "attribution_token": "t",
            "user_key": None,
            "item_id": "item-1",
            "event": "purchase",
            "time": datetime.fromtimestamp(9, UTC),
            "value": 2.5,
        }
        assert (click["user_key"], click["attribution_token"], click["value"]) == (KEYS.of(USER), None, None)
        # An event without a time has that of its arrival.
        assert click["time"] == click["received"]
        metrics = running.server.service.metrics
        assert counted(metrics, "events") == {"accepted": 2, "written": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": ""}, "events.0.item_id"),
        ({"event": ""}, "events.0.event"),
        ({"attribution_token": None}, "events.0: Value error, needs an attribution_token or a user_id"),
        ({"attribution_token": "x" * 257}, "events.0.attribution_token"),
        ({"timestamp": 1_700_000_000_000}, "events.0.timestamp"),
        ({"value": float("inf")}, "events.0.value"),
    ],
)
def test_what_is_no_event_is_refused_by_both_alike(start, tmp_path, changes, message) -> None:
    fields = {name: value for name, value in {**EVENT, **changes}.items() if value is not None}
    with start(served_log=LogSettings(tmp_path)) as running, grpc.insecure_channel(running.grpc_address) as channel:
        body = json.dumps({"events": [fields]}).replace("Infinity", "1e999")
        answer = httpx.post(f"{running.http}/v1/events", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith(message)
        with pytest.raises(grpc.RpcError) as caught:
            stubs.RetrievalServiceStub(channel).RecordEvents(
                pb.RecordEventsRequest(events=[pb.FeedbackEvent(**fields)]), timeout=10
            )
        assert caught.value.details() == answer.json()["detail"]
    assert rows(tmp_path, EVENTS_FOLDER) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/events", r'{"events": [{"item_id": "i", "event": "click", "user_id": "\ud800"}]}'),
        ("/v1/retrieve:batch", r'{"requests": [{"profile": {"country": "\ud800"}}]}'),
    ],
)
def test_half_a_character_is_refused_at_the_door(start, tmp_path, path, body) -> None:
    """JSON can spell it, and nothing that is written can hold it."""
    with start(served_log=LogSettings(tmp_path)) as running:
        answer = httpx.post(f"{running.http}{path}", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["reason"]) == (400, "REQUEST")


@pytest.mark.parametrize("n", [0, MAX_EVENTS + 1])
def test_the_number_of_events_is_limited(start, tmp_path, n) -> None:
    with start(served_log=LogSettings(tmp_path)) as running:
        for url in (running.http, running.grpc):
            with Client(url) as client, pytest.raises(RequestError, match="events"):
                client.record_events([EVENT] * n)


def test_a_server_that_keeps_no_events_says_so(running) -> None:
    with Client(running.grpc) as client, pytest.raises(RequestError, match="keeps no events"):
        client.record_events([EVENT])


def test_of_the_sampled_users_all_is_logged_and_of_others_nothing(start, tmp_path) -> None:
    settings = LogSettings(tmp_path, sample=0.5, keys=KEYS)
    requests = [RetrieveRequest(user_id=f"u{n % 20}", top_k=1) for n in range(60)]
    with start(served_log=settings) as running, Client(running.grpc) as client:
        for batch in (requests[:30], requests[30:]):
            client.batch_retrieve(batch)
    users = [row["user_key"] for row in rows(tmp_path, SERVED_FOLDER)]
    assert 4 <= len(set(users)) <= 16
    assert all(users.count(user) == 3 for user in users)


def bytes_of(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def test_no_users_id_is_in_any_file_or_log(bundle_path, tmp_path) -> None:
    """Of a real server, whose log is all that it prints; uncompressed, a plain id would be found."""
    code = (
        "import sys; from pathlib import Path; import pyarrow.parquet as pq; write = pq.write_table\n"
        "pq.write_table = lambda table, file, **_: write(table, file, compression='none', use_dictionary=False)\n"
        "from genretrieval.cli import main; main()"
    )
    arguments = ["serve", "--bundle", str(bundle_path), "--http-port", "0", "--grpc-port", "0", "--log-level", "debug"]
    arguments += ["--log-folder", str(tmp_path / "logs"), "--histories", "redis://127.0.0.1:1/0"]
    secret = "0123456789abcdef" * 2
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=log,
            stderr=log,
            env={**os.environ, KEY_VARIABLE: secret},
        )
        try:
            eventually(lambda: '"ready"' in (tmp_path / "server.log").read_text())
            ready = next(
                json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines() if '"ready"' in line
            )
            for url in (ready["http"], ready["grpc"]):
                with Client(url) as client:
                    token = client.retrieve(user_id=USER, top_k=2).attribution_token
                    client.record_events([CLICK.model_copy(update={"attribution_token": token})])
                    with pytest.raises(RequestError):
                        client.retrieve(user_id=USER, filters={"attributes": {"colour": ["red"]}})
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    # The end loses nothing.
    assert len(rows(tmp_path / "logs", SERVED_FOLDER)) == len(rows(tmp_path / "logs", EVENTS_FOLDER)) == 2
    found = dict(bytes_of(tmp_path))
    assert len(found) == 3
    key = UserKeys(secret.encode()).of(USER).encode()
    assert sum(key in content for content in found.values()) == 2
    for name in (USER.encode(), b"jane.doe", secret.encode()):
        assert not [path for path, content in found.items() if name in content]


def test_without_a_key_rows_are_of_nobody(start, tmp_path) -> None:
    with start(served_log=LogSettings(tmp_path)) as running, Client(running.http) as client:
        client.retrieve(user_id=USER)
        client.record_events([CLICK])
    assert [row["user_key"] for kind in (SERVED_FOLDER, EVENTS_FOLDER) for row in rows(tmp_path, kind)] == [None, None]


def test_a_key_is_a_secret(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert UserKeys.load(None) is None
    (tmp_path / "key").write_text("0123456789abcdef\n")
    keys = UserKeys.load(tmp_path / "key")
    monkeypatch.setenv(KEY_VARIABLE, "0123456789abcdef")
    assert keys == UserKeys.load(None) == UserKeys(b"0123456789abcdef")
    assert keys is not None
    assert keys.of("u") == "373d81c1c8b83ed95172284ddfe56ec2" != UserKeys(b"x" * 16).of("u")
    assert "0123" not in repr(keys)
    for bad in (lambda: UserKeys(b"short"), lambda: UserKeys.load(tmp_path / "none")):
        with pytest.raises(InvalidInputError, match="log key"):
            bad()


@pytest.mark.parametrize("changes", [{"sample": 0.0}, {"sample": 1.5}, {"retention_days": 0}])
def test_settings_that_cannot_be_meant_are_refused(tmp_path, changes) -> None:
    with pytest.raises(InvalidInputError, match="log_"):
        LogSettings(tmp_path, **changes)


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="served logs cannot be written"):
        ServedLog(LogSettings(tmp_path / "file"), Metrics())


def test_files_are_written_by_time_and_by_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served_log, "ROWS_PER_FILE", 100)
    for write_seconds, n in ((0.0, 1), (3600.0, 100)):
        folder = tmp_path / str(n)
        log = ServedLog(LogSettings(folder), Metrics(), write_seconds=write_seconds)
        log.record([CLICK] * n, time.time())
        eventually(lambda folder=folder: bool(log_files(folder / EVENTS_FOLDER)))
        log.record([CLICK], time.time())
        log.close()
        assert len(rows(folder, EVENTS_FOLDER)) == n + 1
        assert len(log_files(folder / EVENTS_FOLDER)) == 2
        assert not list(folder.rglob(f"*{PARTIAL}"))


def test_a_record_that_cannot_be_held_takes_no_other_along(tmp_path) -> None:
    metrics = Metrics()
    log = ServedLog(LogSettings(tmp_path), metrics, write_seconds=0.0)
    log.record([CLICK, CLICK.model_copy(update={"item_id": "\ud800"}), CLICK], time.time())
    log.close()
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 2
    assert counted(metrics, "events")["dropped"] == 1


def test_a_full_disk_loses_what_there_is_no_room_for_and_is_waited_out(tmp_path, monkeypatch) -> None:
    full = True

    def sync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(served_log, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(served_log, "MAX_HELD", 10)
    metrics = Metrics()
    log = ServedLog(LogSettings(tmp_path), metrics, write_seconds=0.0)
    log.record([CLICK] * 11, time.time())
    eventually(lambda: "failed" in counted(metrics, "events"))
    assert log_files(tmp_path / EVENTS_FOLDER) == []
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
    with pytest.raises(OverloadedError, match="none of these"):
        log.record([CLICK] * 2, time.time())
    full = False
    eventually(lambda: "written" in counted(metrics, "events"))
    log.record([CLICK], time.time())
    log.close()
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 12
    outcomes = counted(metrics, "events")
    assert (outcomes["written"], outcomes["dropped"]) == (12, 2)


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Replaces what writes files of the log."""
    monkeypatch.setattr(served_log, "RETRY_SECONDS", 0.0)
    return lambda by: monkeypatch.setattr(served_log, "write_table", by)


@pytest.mark.parametrize("fault", [pa.ArrowMemoryError("malloc of size 1 failed"), MemoryError()])
def test_a_lack_of_memory_is_waited_out(tmp_path, write, fault) -> None:
    failing = True

    def without_memory(*table: Any) -> Path:
        if failing:
            raise fault
        return write_table(*table)

    write(without_memory)
    metrics = Metrics()
    with capture_logs() as logged:
        log = ServedLog(LogSettings(tmp_path), metrics, write_seconds=0.0)
        log.record([CLICK] * 3, time.time())
        eventually(lambda: "failed" in counted(metrics, "events"))
        log.record([CLICK], time.time())
        failing = False
        log.close(60)
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 4
    assert (counted(metrics, "events")["written"], "dropped" in counted(metrics, "events")) == (4, False)
    assert next(entry for entry in logged if entry["event"] == "served_log_not_written")["exc_info"] is fault


def test_rows_that_cannot_be_written_keep_out_none_that_come_later(tmp_path, write) -> None:
    fault = pa.ArrowInvalid("never met before")

    def broken(*_: Any) -> Path:
        raise fault

    write(broken)
    metrics = Metrics()
    with capture_logs() as logged:
        log = ServedLog(LogSettings(tmp_path), metrics, write_seconds=0.0)
        log.record([CLICK] * 3, time.time())
        eventually(lambda: "dropped" in counted(metrics, "events"))
        write(write_table)
        log.record([CLICK], time.time())
        log.close(60)
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 1
    assert (counted(metrics, "events")["written"], counted(metrics, "events")["dropped"]) == (1, 3)
    (lost,) = [entry for entry in logged if entry["event"] == "served_log_lost"]
    assert (lost["rows"], lost["exc_info"]) == (3, fault)


def test_no_fault_ends_the_thread(tmp_path, monkeypatch) -> None:
    hold, failing = served_log._ParquetLog._hold, [MemoryError()]

    def once(self: Any, taken: Any) -> None:
        if failing:
            raise failing.pop()
        hold(self, taken)

    monkeypatch.setattr(served_log._ParquetLog, "_hold", once)
    log = ServedLog(LogSettings(tmp_path, retention_days=10**7), Metrics(), write_seconds=0.0)
    log.record([CLICK], time.time())
    eventually(lambda: not failing)
    log.record([CLICK], time.time())
    log.close(60)
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 1


def test_a_disk_that_hangs_does_not_keep_a_server(tmp_path, write) -> None:
    hanging, gate = threading.Event(), threading.Event()

    def hang(*table: Any) -> Path:
        hanging.set()
        gate.wait(60)
        return write_table(*table)

    write(hang)
    log = ServedLog(LogSettings(tmp_path), Metrics(), write_seconds=0.0)
    log.record([CLICK] * 2, time.time())
    assert hanging.wait(60)
    log.record([CLICK] * 3, time.time())
    with capture_logs() as logged:
        log.close(0.01)
    assert [entry["rows"] for entry in logged if entry["event"] == "served_log_given_up"] == [5]
    assert not gate.is_set()
    gate.set()
    log.close(60)
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 5


def test_a_stop_waits_for_the_log_as_long_as_the_drain_leaves(start, tmp_path, write) -> None:
    gate = threading.Event()
    write(lambda *_: gate.wait(60))
    with capture_logs() as logged:
        with start(served_log=LogSettings(tmp_path), drain_seconds=1.0) as running, Client(running.http) as client:
            client.record_events([EVENT])
        gate.set()
    (told,) = [entry for entry in logged if entry["event"] == "served_log_given_up"]
    assert told["waited"] <= 1.0


def test_answers_that_nobody_can_write_are_left_out_and_requests_go_on(start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served_log, "MAX_WAITING", 0)
    with start(served_log=LogSettings(tmp_path)) as running, Client(running.http) as client:
        assert isinstance(client.retrieve(), RetrieveResponse)
        assert counted(running.server.service.metrics, "served_log_records") == {"dropped": 1}
        with pytest.raises(OverloadedError):
            client.record_events([EVENT])


def test_old_days_are_removed(tmp_path) -> None:
    today = datetime.now(UTC).date()
    for days in (0, 6, 7, 8, 400):
        folder = tmp_path / EVENTS_FOLDER / str(today - timedelta(days=days))
        folder.mkdir(parents=True)
        (folder / "1.parquet").touch()
        (folder / f".2.parquet{PARTIAL}").touch()
    (tmp_path / EVENTS_FOLDER / "notes").mkdir()
    ServedLog(LogSettings(tmp_path, retention_days=7), Metrics()).close()
    left = sorted(path.name for path in (tmp_path / EVENTS_FOLDER).iterdir())
    assert left == [*(str(today - timedelta(days=days)) for days in (7, 6, 0)), "notes"]
    assert remove_before(tmp_path / EVENTS_FOLDER, today) == 4


def leave_unfinished(folder: Path, kind: str, day: str, age: float = 0.0) -> Path:
    """What a server leaves behind that is killed in the middle of a write, `age` seconds ago."""
    path = folder / kind / day / f".120000-{age:g}.parquet{PARTIAL}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"rows of somebody")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("retention_days", [None, 90])
def test_what_a_killed_server_left_unfinished_is_removed_at_the_next_start(tmp_path, retention_days) -> None:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    old = [leave_unfinished(tmp_path, kind, today, 7200) for kind in (SERVED_FOLDER, EVENTS_FOLDER)]
    # Of another server on the folder, which may still be writing.
    young = leave_unfinished(tmp_path, EVENTS_FOLDER, today, 600)
    log = ServedLog(LogSettings(tmp_path, retention_days=retention_days), Metrics())
    eventually(lambda: not any(path.exists() for path in old))
    log.close(60)
    assert unfinished(tmp_path / EVENTS_FOLDER) == [young]


def test_a_server_whose_unfinished_file_is_taken_away_loses_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served_log, "RETRY_SECONDS", 0.0)
    write, taken = pq.write_table, []

    def taken_away(table: pa.Table, file: Any, **options: Any) -> None:
        write(table, file, **options)
        if not taken:
            taken.extend(unfinished(tmp_path / EVENTS_FOLDER))
            taken[0].unlink()

    monkeypatch.setattr(pq, "write_table", taken_away)
    log = ServedLog(LogSettings(tmp_path), Metrics(), write_seconds=0.0)
    log.record([CLICK] * 2, time.time())
    eventually(lambda: bool(log_files(tmp_path / EVENTS_FOLDER)))
    log.close(60)
    assert len(taken) == 1
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 2


def test_a_user_can_be_forgotten(start, tmp_path) -> None:
    with start(served_log=LogSettings(tmp_path, keys=KEYS)) as running, Client(running.grpc) as client:
        mine, others = (client.retrieve(user_id=user, top_k=1).attribution_token for user in (USER, "other"))
        event = {"item_id": "item-1", "event": "click"}
        client.record_events(
            [
                event | {"user_id": USER},
                event | {"attribution_token": mine},  # without the id, and yet the user's
                event | {"attribution_token": others},
                event | {"user_id": "other"},
            ]
        )
    with start(served_log=LogSettings(tmp_path, keys=KEYS)) as running, Client(running.grpc) as client:
        client.retrieve(user_id=USER)
    assert len(log_files(tmp_path / SERVED_FOLDER)) == 2
    forgotten = forget_user(tmp_path, KEYS.of(USER))
    assert (forgotten.answers, forgotten.events, forgotten.files) == (2, 2, 3)
    assert [row["attribution_token"] for row in rows(tmp_path, SERVED_FOLDER)] == [others]
    assert len(rows(tmp_path, EVENTS_FOLDER)) == 2
    assert len(log_files(tmp_path / SERVED_FOLDER)) == 1
    again = forget_user(tmp_path, KEYS.of(USER))
    assert (again.answers, again.events, again.files) == (0, 0, 0)


def test_forgetting_waits_for_what_running_servers_hold(start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(served_log, "WRITE_SECONDS", 0.0)
    with start(served_log=LogSettings(tmp_path, keys=KEYS)) as running, Client(running.grpc) as client:
        client.retrieve(user_id=USER)
    said = forget(USER, tmp_path, KEYS, None, wait=True)
    assert next(said) == "logs: 1 answers and 0 events removed, 1 files written anew"
    assert next(said).startswith("waiting")
    with start(served_log=LogSettings(tmp_path, keys=KEYS)) as running, Client(running.grpc) as client:
        client.record_events([CLICK])
    assert list(said) == ["logs: 0 answers and 1 events removed, 1 files written anew"]
    with pytest.raises(InvalidInputError, match="the server's own"):
        next(forget(USER, tmp_path, KEYS, "memory", wait=False))
    with pytest.raises(UnavailableError):
        next(forget(USER, tmp_path, KEYS, "redis://127.0.0.1:1/0", wait=False))
    with pytest.raises(DataError, match="--log-folder"):
        next(forget(USER, tmp_path / "nowhere", KEYS, None, wait=False))


def put_rows(folder: Path, kind: str, *given: dict[str, Any]) -> None:
    """A file of a log, as a server writes it."""
    schema = {SERVED_FOLDER: SERVED, EVENTS_FOLDER: EVENTS}[kind]
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in given], schema=schema)
    write_table(folder / kind, table, datetime.now(UTC))


def test_an_event_without_its_user_that_is_written_while_forgetting_waits_is_found(tmp_path, monkeypatch) -> None:
    put_rows(tmp_path, SERVED_FOLDER, {"attribution_token": "mine", "user_key": KEYS.of(USER)})
    left = leave_unfinished(tmp_path, SERVED_FOLDER, f"{datetime.now(UTC):%Y-%m-%d}")
    written = []

    def meanwhile(_: float) -> None:
        put_rows(tmp_path, EVENTS_FOLDER, {"attribution_token": "mine"}, {"attribution_token": "other"})
        written.append(leave_unfinished(tmp_path, EVENTS_FOLDER, f"{datetime.now(UTC):%Y-%m-%d}"))

    monkeypatch.setattr(served_log.time, "sleep", meanwhile)
    assert list(forget(USER, tmp_path, KEYS, None, wait=True))[-2:] == [
        "logs: 1 files removed that were left unfinished",
        "logs: 0 answers and 1 events removed, 1 files written anew",
    ]
    assert [row["attribution_token"] for row in rows(tmp_path, EVENTS_FOLDER)] == ["other"]
    # What a server has begun to write meanwhile is its own.
    assert (left.exists(), unfinished(tmp_path / EVENTS_FOLDER)) == (False, written)
    assert "logs: 1 files removed that were left unfinished" in forget(USER, tmp_path, KEYS, None, wait=False)
    assert not written[0].exists()


def test_forgetting_that_is_interrupted_can_be_done_again(tmp_path, monkeypatch) -> None:
    put_rows(tmp_path, SERVED_FOLDER, {"attribution_token": "mine", "user_key": KEYS.of(USER)})
    put_rows(tmp_path, EVENTS_FOLDER, {"attribution_token": "mine"}, {"attribution_token": "other"})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(served_logs, "_write", full)
        with pytest.raises(OSError, match="No space"):
            forget_user(tmp_path, KEYS.of(USER))
    again = forget_user(tmp_path, KEYS.of(USER))
    assert (again.answers, again.events, again.tokens) == (1, 1, {"mine"})
    assert [row["attribution_token"] for row in rows(tmp_path, EVENTS_FOLDER)] == ["other"]
