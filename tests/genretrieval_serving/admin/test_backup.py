"""Admin state as a file: whole, of one moment, into either database; and tables of other releases."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

from genretrieval.errors import ConflictError, InvalidInputError
from genretrieval_serving.admin import sql
from genretrieval_serving.admin.backup import backup, restore
from genretrieval_serving.admin.resources import (
    Binding,
    BlockEffect,
    KeywordFields,
    Kind,
    RuleFields,
    Scope,
    Selector,
    SlotRef,
)
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create, Delete, Undelete, Update

ME = Call("ann")
RULE = RuleFields(effect=BlockEffect(kind="block", items=Selector(item_ids=["x"])))
KINDS = ("sqlite", "postgresql")


@pytest.fixture
def open_store(make_database: Callable[[str], str], clock: Any) -> Iterator[Callable[[str], SqlStore]]:
    """A store over a new database of a kind."""
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(closing(SqlStore.open(make_database(kind), clock=clock)))


def word(text: str) -> KeywordFields:
    return KeywordFields(text=text, binding=Binding(items=Selector(item_ids=["é", "2"])))


def fill(store: SqlStore, clock: Any) -> str:
    """Something of everything; the secret of a key."""
    store.sync_slots([SlotRef(level=0, code=code) for code in (5, 6, 7)])
    for text in ("labubu", "furby", "tamagotchi"):
        store.apply(ME, [Create(Kind.KEYWORDS, text, word(text))])
    clock.advance(minutes=1)
    store.apply(ME, [Delete(Kind.KEYWORDS, "furby"), Create(Kind.RULES, "a", RULE)])
    store.apply(ME, [Update(Kind.KEYWORDS, "tamagotchi", lambda _: KeywordFields(text="tamagotchi"))])
    store.apply(Call("bob", idempotency_key="once", fingerprint="f"), [Create(Kind.RULES, "b", RULE)])
    _, secret = store.create_key("ann", [Scope.ADMIN_WRITE])
    id_, _ = store.create_key("bob", [Scope.RETRIEVE], clock() + timedelta(days=1))
    store.revoke_key(id_)
    return secret


def everything(store: SqlStore) -> dict[str, list[Any]]:
    """All rows of all tables."""
    with store._engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())), key=repr)
            for table in sql.metadata.sorted_tables
        }


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_what_is_restored_is_what_was_there_and_goes_on(open_store, clock, tmp_path, source, target) -> None:
    store, file = open_store(source), tmp_path / "backup"
    secret = fill(store, clock)
    contents = backup(store, file)
    assert contents.revision == store.revision()
    assert contents.rows == {name: len(rows) for name, rows in everything(store).items()}
    assert all(contents.rows.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret.encode() not in file.read_bytes()

    restored = open_store(target)
    restored.sync_slots([SlotRef(level=0, code=1)])  # a server had begun on it
    assert restore(restored, file) == contents
    assert everything(restored) == everything(store)
    assert restored.verify_key(secret)[0] == "ann"
    # It goes on: the next revision, sequence, slot in quarantine, repeated call.
    (again,) = restored.apply(Call("bob", idempotency_key="once", fingerprint="f"), [])
    assert again.id == "b"
    assert restored.revision() == contents.revision
    (back,) = restored.apply(ME, [Undelete(Kind.KEYWORDS, "furby")])
    assert (back.revision, back.slot) == (contents.revision + 1, SlotRef(level=0, code=6))
    events, _ = restored.audit(size=100)
    assert [event.revision for event in events[:2]] == [contents.revision + 1, contents.revision]


@pytest.mark.parametrize("kind", KINDS)
def test_only_an_empty_store_is_filled_and_all_or_nothing(open_store, clock, tmp_path, kind) -> None:
    store, file = open_store(kind), tmp_path / "backup"
    fill(store, clock)
    backup(store, file)
    with pytest.raises(ConflictError, match="not empty"):
        restore(store, file)
    used = open_store(kind)
    used.create_key("ann", [Scope.RETRIEVE])
    before = everything(used)
    with pytest.raises(ConflictError, match="not empty"):
        restore(used, file)
    assert everything(used) == before


def test_a_backup_is_of_one_moment(open_store, clock, tmp_path, monkeypatch) -> None:
    store, file = open_store("postgresql"), tmp_path / "backup"
    fill(store, clock)
    before = everything(store)
    read_revision = sql.metadata.tables["revision"]

    def meanwhile(connection: Any, *_: object) -> None:
        if connection.get_isolation_level() == "REPEATABLE READ" and not changed:
            changed.append(1)
            store.apply(ME, [Create(Kind.RULES, "later", RULE)])

    changed: list[int] = []
    sa.event.listen(store._engine, "after_execute", meanwhile)
    contents = backup(store, file)
    sa.event.remove(store._engine, "after_execute", meanwhile)
    assert changed
    assert contents.revision == before[read_revision.name][0][1]
    assert contents.rows == {name: len(rows) for name, rows in before.items()}


def test_files_that_are_no_whole_backup(open_store, clock, tmp_path) -> None:
    store, file = open_store("sqlite"), tmp_path / "backup"
    fill(store, clock)
    backup(store, file)
    lines = file.read_bytes().splitlines(keepends=True)
    empty = open_store("sqlite")
    for broken in (
        lines[:-1],
        lines[:3] + lines[4:],
        [lines[0], lines[1].replace(b"ann", b"ben"), *lines[2:]],
        [*lines, lines[1]],
        [lines[0]],
        [],
        [b"PK\3\4"],
        [b"[]"],
    ):
        file.write_bytes(b"".join(broken))
        with pytest.raises(InvalidInputError, match="no whole backup"):
            restore(empty, file)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        restore(empty, tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        backup(store, tmp_path / "nowhere" / "backup")
    assert empty.revision() == 0


def test_a_backup_of_a_newer_release_is_refused(open_store, clock, tmp_path, monkeypatch) -> None:
    store, file = open_store("sqlite"), tmp_path / "backup"
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    backup(store, file)
    assert json.loads(file.read_text().partition("\n")[0])["schema"] == "0999"
    with pytest.raises(InvalidInputError, match=r"version 0999.*newer one"):
        restore(open_store("sqlite"), file)


@pytest.mark.parametrize("kind", KINDS)
def test_this_release_goes_on_with_tables_of_the_next(make_database, clock, kind) -> None:
    url = make_database(kind)
    with closing(SqlStore.open(url, clock=clock)) as store:
        secret = fill(store, clock)
        revision = store.revision()
        with store._engine.begin() as connection:
            for statement in (
                "UPDATE alembic_version SET version_num = '0999'",
                "ALTER TABLE documents ADD COLUMN colour VARCHAR",
                "ALTER TABLE audit_events ADD COLUMN place VARCHAR DEFAULT 'here' NOT NULL",
                "CREATE TABLE later (id INTEGER PRIMARY KEY)",
                "INSERT INTO documents (kind, id, body, etag, revision, created_at, updated_at) "
                f"SELECT 'moods', id, body, etag, {revision + 1}, created_at, updated_at FROM documents WHERE id = 'a'",
                f"UPDATE revision SET value = {revision + 1}",
            ):
                connection.exec_driver_sql(statement)
            documents = sql.metadata.tables["documents"]
            body = connection.scalars(sa.select(documents.c.body).where(documents.c.id == "b")).one()
            later = body | {"tint": "red", "effect": body["effect"] | {"depth": 3}}
            connection.execute(documents.update().where(documents.c.id == "b").values(body=later))
    with closing(SqlStore.open(url, clock=clock)) as store:
        assert store.verify_key(secret)[0] == "ann"
        changes = store.changes(0)
        assert changes.revision == revision + 1
        assert {resource.id for _, resource in changes.resources} == {"labubu", "furby", "tamagotchi", "a", "b"}
        (changed,) = store.apply(ME, [Update(Kind.RULES, "b", lambda _: RULE)])
        assert changed.revision == revision + 2
        assert store.audit(size=1)[0][0].name == "rules/b"


# Migrations that a server of the release before cannot go on with. Each begins a new thousand in the numbers of
# versions (0005 -> 1001), which has older servers refuse the database instead of misreading it.
NOT_ADDITIVE: set[str] = set()
ADDITIVE = re.compile(
    r"CREATE TABLE .*|CREATE INDEX .*|CREATE UNIQUE INDEX .*|INSERT INTO .*"
    r"|ALTER TABLE \w+ ADD COLUMN (?!.*NOT NULL)(?!.*UNIQUE).*|ALTER TABLE \w+ ADD COLUMN .*DEFAULT .*",
    re.DOTALL,
)


def test_migrations_only_add_to_each_other() -> None:
    _, scripts = sql._scripts()
    chain = list(reversed(list(scripts.walk_revisions())))
    assert [script.revision for script in chain] == sorted(script.revision for script in chain)
    before = None
    for script in chain:
        assert re.fullmatch(r"\d{4}", script.revision)
        statements: list[str] = []
        context = MigrationContext.configure(
            dialect_name="postgresql", opts={"as_sql": True, "output_buffer": Writing(statements)}
        )
        with Operations.context(context):
            script.module.upgrade()
        assert statements
        new = {name for text in statements for name in re.findall(r"CREATE TABLE (\w+)", text)}
        breaks = [text for text in statements if not ADDITIVE.fullmatch(text) or narrows(text, new)]
        if before is not None:
            assert (script.revision in NOT_ADDITIVE) == (script.revision[0] != before[0]), script.revision
        assert bool(breaks) == (script.revision in NOT_ADDITIVE), breaks
        before = script.revision


def narrows(statement: str, new: set[str]) -> bool:
    """Whether it forbids what rows of an older table may have held."""
    found = re.match(r"CREATE UNIQUE INDEX \w+ ON (\w+)", statement)
    return found is not None and found[1] not in new


class Writing:
    """Where Alembic prints statements."""

    def __init__(self, statements: list[str]) -> None:
        self.statements = statements

    def write(self, text: str) -> None:
        self.statements.extend(part.strip() for part in text.split(";") if part.strip())

    def flush(self) -> None: ...


@pytest.mark.parametrize(
    ("statement", "adds"),
    [
        ("ALTER TABLE documents ADD COLUMN a VARCHAR", True),
        ("ALTER TABLE documents ADD COLUMN a INTEGER DEFAULT 0 NOT NULL", True),
        ("ALTER TABLE documents ADD COLUMN a INTEGER NOT NULL", False),
        ("ALTER TABLE documents DROP COLUMN body", False),
        ("ALTER TABLE documents ALTER COLUMN body TYPE VARCHAR", False),
        ("ALTER TABLE documents RENAME TO papers", False),
        ("DROP TABLE slots", False),
        ("UPDATE documents SET body = 'x'", False),
        ("DELETE FROM documents", False),
    ],
)
def test_the_guard_knows_what_breaks_a_reader(statement, adds) -> None:
    assert bool(ADDITIVE.fullmatch(statement)) == adds


def test_verbs(open_store, clock, tmp_path, make_database) -> None:
    from typer.testing import CliRunner

    from genretrieval.cli import app

    store, file = open_store("sqlite"), tmp_path / "backup"
    fill(store, clock)
    url, other = str(store._engine.url), make_database("sqlite")
    saved = CliRunner().invoke(app, ["admin", "backup", str(file), "--store", url])
    assert json.loads(saved.output)["revision"] == store.revision()
    assert CliRunner().invoke(app, ["admin", "restore", str(file), "--store", other]).output == saved.output
    refused = CliRunner().invoke(app, ["admin", "backup", str(file), "--store", make_database("sqlite")])
    assert isinstance(refused.exception, InvalidInputError)


def test_every_table_is_in_a_backup(open_store) -> None:
    store = open_store("sqlite")
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), sql.metadata) == []
