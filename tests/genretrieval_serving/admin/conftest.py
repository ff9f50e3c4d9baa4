"""Stored resources, a catalogue with reserved slots, a store in memory, and stores in SQLite and PostgreSQL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine, make_url

from genretrieval.servable import Catalogue
from genretrieval_serving.admin.resources import Alias, Keyword, Kind, Resource, Rule, SlotRef, Synonyms
from genretrieval_serving.admin.snapshot import AdminSnapshot, Items
from genretrieval_serving.admin.sql import SlotCounts, SqlStore
from genretrieval_serving.admin.store import Changes

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
# The catalogue's codebooks have 8 codes each; of the first, 6 and 7 are reserved.
RESERVED = (2, 0, 0)
KINDS = {Kind.KEYWORDS: Keyword, Kind.RULES: Rule, Kind.SYNONYMS: Synonyms, Kind.ALIASES: Alias}

Stored = Callable[..., tuple[Kind, Resource]]


@pytest.fixture(scope="session")
def noon() -> datetime:
    return NOON


@pytest.fixture(scope="session")
def reserved() -> tuple[int, ...]:
    return RESERVED


@pytest.fixture(scope="session")
def catalogue(bundle: Any) -> Catalogue:
    return Catalogue.open(bundle)


@pytest.fixture(scope="session")
def stored() -> Stored:
    """A resource as the store gives it: ``stored("rules/summer", effect=...)``."""

    def make(name: str, *, revision: int = 1, **fields: Any) -> tuple[Kind, Resource]:
        kind, id_ = name.split("/")
        added = {"id": id_, "etag": f"e{revision}", "revision": revision, "created_at": NOON, "updated_at": NOON}
        return Kind(kind), KINDS[Kind(kind)].model_validate(added | fields)

    return make


@pytest.fixture(scope="session")
def snapshot_of(catalogue: Catalogue) -> Callable[..., AdminSnapshot]:
    """A snapshot of some resources, at revision 7."""

    def make(*resources: tuple[Kind, Resource]) -> AdminSnapshot:
        return AdminSnapshot.empty(Items(catalogue, RESERVED)).updated(Changes(7, list(resources)))

    return make


@dataclass
class FakeStore:
    """What a replica asks of a store. `failure` is raised in place of an answer."""

    revision_: int = 0
    resources: dict[tuple[Kind, str], tuple[int, Resource]] = field(default_factory=dict)
    failure: Exception | None = None
    asked: list[str] = field(default_factory=list)

    def put(self, *resources: tuple[Kind, Resource]) -> int:
        """One transaction; the revision after it."""
        self.revision_ += 1
        for kind, resource in resources:
            self.resources[kind, resource.id] = self.revision_, resource
        return self.revision_

    def revision(self) -> int:
        self._answer("revision")
        return self.revision_

    def changes(self, since: int) -> Changes:
        self._answer("changes")
        changed = [(kind, r) for (kind, _), (at, r) in self.resources.items() if at > since]
        return Changes(self.revision_, changed)

    def free_slots(self) -> list[SlotRef]:
        self._answer("free_slots")
        return [SlotRef(level=0, code=6)]

    def slot_counts(self) -> SlotCounts:
        self._answer("slot_counts")
        bound = sum(isinstance(r, Keyword) and r.slot is not None for _, r in self.resources.values())
        return SlotCounts(free=1, bound=bound, quarantined=1 - bound)

    def _answer(self, name: str) -> None:
        self.asked.append(name)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


class Clock:
    """Stands still: ``clock()`` is the time, ``clock.advance(minutes=5)``."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Engine]:
    """A database of this session's own, in which each test makes a schema of its own."""
    given = os.environ.get("GENRETRIEVAL_TEST_POSTGRES")
    if not given:
        missing = pytest.fail if os.environ.get("REQUIRE_POSTGRES") == "1" else pytest.skip
        missing("GENRETRIEVAL_TEST_POSTGRES names no server")
    url = make_url(str(given)).set(drivername="postgresql+psycopg")
    name = f"genretrieval_{secrets.token_hex(6)}"
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    # Without a pool: some tests end every connection to the database.
    yield sa.create_engine(url.set(database=name), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()


@pytest.fixture
def make_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """The URL of an empty database of a kind, ``sqlite`` or ``postgresql``."""

    def make(kind: str) -> str:
        name = f"test_{secrets.token_hex(6)}"
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/{name}.db"
        engine: Engine = request.getfixturevalue("postgres")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        # Nothing here depends on what is on disk.
        options = f"-csearch_path={name} -csynchronous_commit=off"
        url = engine.url.update_query_dict({"options": options}).set(drivername="postgresql")
        return url.render_as_string(hide_password=False)

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, make_database: Callable[[str], str]) -> str:
    """An empty database."""
    return make_database(request.param)


@pytest.fixture
def make_sql_store(database_url: str, clock: Clock) -> Iterator[Callable[..., SqlStore]]:
    """Another store over the same database: ``make_sql_store(quarantine=..., clock=...)``."""
    stores: list[SqlStore] = []

    def make(**options: Any) -> SqlStore:
        stores.append(SqlStore.open(database_url, **{"clock": clock, **options}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def sql_store(make_sql_store: Callable[..., SqlStore]) -> SqlStore:
    return make_sql_store()
