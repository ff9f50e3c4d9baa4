"""Writers that race and processes that are killed: the scenarios of `bench faults admin_store`, in small numbers."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genretrieval_serving.faults import admin_store as faults
from genretrieval_serving.faults.processes import PostgresCluster

N_SLOTS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    binaries = PostgresCluster.binaries()
    if binaries is None:
        missing = pytest.fail if os.environ.get("REQUIRE_POSTGRES") == "1" else pytest.skip
        missing("PostgreSQL is not installed: there is no initdb")
    with PostgresCluster(binaries) as running:
        yield running


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/admin.db"
    return str(request.getfixturevalue("cluster").database())


@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
def test_writers_that_race(url: str) -> None:
    outcome = faults.race(url, writers=4, replicas=2, operations=10, n_slots=N_SLOTS)
    assert outcome.problems == []
    assert outcome.answers > 30


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
def test_a_writer_that_is_killed(url: str, number: int) -> None:
    outcome = faults.kill_round(url, "writer", random.Random(number), 4, N_SLOTS, None)
    assert outcome.problems == []
    assert outcome.answers


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_postgresql_that_is_killed(url: str, cluster: Any, number: int) -> None:
    outcome = faults.kill_round(url, "writer", random.Random(number), 4, N_SLOTS, cluster)
    assert outcome.problems == []
    assert outcome.answers


def test_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresCluster, "binaries", lambda: None)
    figures, problems = faults.admin_store_faults(rounds=1, writers=2, replicas=1, operations=5)
    assert figures["faults.admin_store.kill9_rounds"].value == 1
    assert problems == []


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raced") / "admin.db"
    assert faults.race(f"sqlite:///{path}", 4, 1, 20, N_SLOTS).problems == []
    return path


class TestItFindsWhatIsWrong:
    """A check that never fails shows nothing."""

    @pytest.mark.parametrize(
        ("fault", "problem"),
        [
            (
                "DELETE FROM audit_events WHERE revision = (SELECT value FROM revision)",
                "does not have revisions 1 to",
            ),
            ("UPDATE revision SET value = value + 1", "does not have revisions 1 to"),
            ("UPDATE audit_events SET revision = revision + 1 WHERE revision = 5", "does not have revisions 1 to"),
            (
                "UPDATE documents SET etag = 'x' WHERE id = 'counter'",
                "does not lead to what is stored: keywords/counter",
            ),
            ("DELETE FROM documents WHERE id = 'counter'", "does not lead to what is stored: keywords/counter"),
            ("DELETE FROM audit_events WHERE name LIKE 'rules/pair-%b'", "half of rules/pair-"),
            (
                "UPDATE audit_events SET before = json_set(before, '$.note', '-1') WHERE seq = "
                "(SELECT max(seq) FROM audit_events WHERE name = 'keywords/counter')",
                "lost update: revision",
            ),
            (
                "UPDATE audit_events SET after = json_set(after, '$.note', '-1') WHERE seq = "
                "(SELECT max(seq) FROM audit_events WHERE name = 'keywords/counter')",
                "lost update: the counter went from",
            ),
            (
                "UPDATE audit_events SET after = json_set(after, '$.slot', json('{\"level\": 0, \"code\": 0}')) "
                "WHERE action = 'create' AND name LIKE 'keywords/race%'",
                "slot (0, 0) went to",
            ),
            ("UPDATE slots SET status = 'retired' WHERE status = 'bound'", "slots are held, but the store counts"),
            (
                "UPDATE audit_events SET after = json_remove(after, '$.slot') "
                "WHERE action = 'create' AND name LIKE 'keywords/race%'",
                "is bound, and its slot is None",
            ),
        ],
    )
    def test_in_the_store(self, raced: Path, tmp_path: Path, fault: str, problem: str) -> None:
        copy = tmp_path / "admin.db"
        with sqlite3.connect(raced) as whole, sqlite3.connect(copy) as broken:
            whole.backup(broken)
            assert broken.execute(fault).rowcount
        broken.close()
        whole.close()
        assert any(problem in found for found in faults.check(f"sqlite:///{copy}", [], N_SLOTS).problems)

    def test_in_the_answers(self, raced: Path) -> None:
        url = f"sqlite:///{raced}"
        assert faults.check(url, [("keywords/counter", 1, "another etag")], N_SLOTS).problems == [
            "lost: keywords/counter was answered with revision 1 and is not in it"
        ]
        assert faults.check(url, [("keywords/none", 2, "x")], N_SLOTS).problems[0].startswith("lost: keywords/none")
        assert faults.exactly_once(url, []) != []

    def test_in_what_a_replica_saw(self, raced: Path) -> None:
        replica = faults.Replica(f"sqlite:///{raced}")
        replica._stop.set()
        replica._thread.join()
        replica.follow()
        del replica.view["keywords/counter"]
        assert replica.end() == ["a replica that followed the changes does not have what is stored"]
