"""Admin state in SQL: SQLite beside one server, PostgreSQL for several.

Writers take turns. Each begins by locking the one row of ``revision`` (in SQLite, the whole file) and keeps the lock
until it commits. So revisions are dense and become visible in order, and what a writer has read nobody changes under
it: checks before a write need no second thought, and unique indexes only guard against faults of ours.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import exc
from sqlalchemy.engine import URL, Connection, Engine, Row, make_url

from genretrieval.errors import (
    AlreadyExistsError,
    ConflictError,
    EtagMismatchError,
    GenRetrievalError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    MissingExtraError,
    NotFoundError,
    RequestError,
    SlotsExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from genretrieval.keywords import AttributeType, normalise
from genretrieval_serving.admin.resources import (
    Alias,
    AliasFields,
    AuditEvent,
    Fields,
    Keyword,
    KeywordFields,
    Kind,
    Resource,
    Rule,
    RuleFields,
    Scope,
    SlotRef,
    Synonyms,
    SynonymsFields,
)
from genretrieval_serving.admin.store import Call, Changes, Create, Delete, Operation, Page, Undelete

log = structlog.get_logger(__name__)

CHANNEL = "genretrieval_revision"
MAX_ACTIVE_KEYS = 2

_IDEMPOTENCY_TTL = timedelta(days=1)
_LOCK_SECONDS = 10
_TURN_SECONDS = 30
_TRIES = 4
# An entry of a PostgreSQL index holds 2,704 bytes; 200 characters can normalise to more.
_MAX_INDEXED = 2000
_MIGRATING = 0x67725F61646D  # any number that nothing else in the database locks

_T = TypeVar("_T")


class _Utc(sa.TypeDecorator[datetime]):
    """Aware datetimes, also in SQLite, which keeps no zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        return datetime

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# By code point in both databases, whatever the locale of the server.
_Key = sa.String().with_variant(sa.String(collation="C"), "postgresql")

metadata = sa.MetaData()

_documents = sa.Table(
    "documents",
    metadata,
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("id", _Key, primary_key=True),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("normalised", sa.String),
    sa.Column("etag", sa.String, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("updated_at", _Utc, nullable=False),
    sa.Column("deleted_at", _Utc),
)
_undeleted = _documents.c.deleted_at.is_(None)
sa.Index(
    "uq_documents_normalised",
    _documents.c.normalised,
    unique=True,
    sqlite_where=_undeleted,
    postgresql_where=_undeleted,
)

# A retired slot keeps the id of its last keyword, which may have it back. `reserved`: the bundle being served has it.
_slots = sa.Table(
    "slots",
    metadata,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("code", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("reserved", sa.Boolean, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("keyword_id", _Key),
    sa.Column("retired_at", _Utc),
    sa.CheckConstraint("status IN ('free', 'bound', 'retired')", name="ck_slots_status"),
)
_bound = _slots.c.status == sa.literal_column("'bound'")
sa.Index("uq_slots_keyword_id", _slots.c.keyword_id, unique=True, sqlite_where=_bound, postgresql_where=_bound)

_revision = sa.Table(
    "revision",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("value", sa.BigInteger, nullable=False),
    sa.CheckConstraint("id = 1", name="ck_revision_single"),
)

_audit_events = sa.Table(
    "audit_events",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("at", _Utc, nullable=False),
    sa.Column("principal", sa.String, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False, index=True),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("request_id", sa.String, nullable=False),
)

_idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("principal", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("response", sa.JSON, nullable=False),
    sa.Column("expires_at", _Utc, nullable=False, index=True),
)

_api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", _Key, primary_key=True),
    sa.Column("principal", sa.String, nullable=False, index=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("expires_at", _Utc),
    sa.Column("revoked_at", _Utc),
)

_FIELDS: dict[Kind, type[Fields]] = {
    Kind.KEYWORDS: KeywordFields,
    Kind.RULES: RuleFields,
    Kind.SYNONYMS: SynonymsFields,
    Kind.ALIASES: AliasFields,
}
_STORED: dict[Kind, type[Resource]] = {
    Kind.KEYWORDS: Keyword,
    Kind.RULES: Rule,
    Kind.SYNONYMS: Synonyms,
    Kind.ALIASES: Alias,
}

_RESOURCES = sa.select(_documents, _slots.c.level, _slots.c.code).select_from(
    _documents.outerjoin(
        _slots, (_documents.c.kind == Kind.KEYWORDS.value) & (_slots.c.keyword_id == _documents.c.id) & _bound
    )
)


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Reserved slots by state; those of an older bundle count only while a keyword holds them."""

    free: int
    bound: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of an API key; its secret is not."""

    id: str
    principal: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class SqlStore:
    """A `Store` in a database; threads may share it.

    Make one with `open`, end it with `close`. A `change` of an `Update` runs inside the transaction, and again where
    the database asks for a repetition, so it must have no effects of its own.
    """

    def __init__(self, engine: Engine, *, quarantine: timedelta, clock: Callable[[], datetime], notify: bool) -> None:
        self._engine = engine
        self._quarantine = quarantine
        self._clock = clock
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._notify = notify and self._is_postgresql
        self._preferred: Mapping[AttributeType, int] = {}
        self._writing = engine.execution_options(sqlite_begin="IMMEDIATE")
        # One thread writes, what others ask of it in their order. Would each wait for the lock of the database by
        # itself, it would keep a connection from readers, and SQLite lets some wait for ever.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="admin-writer")
        # Reads of one statement need no transaction in PostgreSQL, reads of several need one snapshot. In SQLite every
        # transaction is a snapshot.
        self._reading, self._snapshot = engine, engine
        if self._is_postgresql:
            self._reading = engine.execution_options(isolation_level="AUTOCOMMIT")
            self._snapshot = engine.execution_options(isolation_level="REPEATABLE READ")

    @classmethod
    def open(
        cls,
        url: str,
        *,
        quarantine: timedelta = timedelta(hours=1),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        notify: bool = True,
        migrate: bool = True,
    ) -> Self:
        """Connect, and bring the tables up to date.

        Args:
            url: ``sqlite:///path`` or ``postgresql://user:password@host/database``.
            quarantine: how long a slot that a keyword gave up stays unused, because replicas and attribution may still
                refer to it.
            clock: the time, in UTC.
            notify: whether PostgreSQL sends a ``NOTIFY genretrieval_revision`` with every change.
            migrate: False leaves the tables as they are, and whether there are any; to look at them.

        Raises:
            InvalidInputError: the URL is of another kind, or the database of a newer version of this program.
            MissingExtraError: the driver of PostgreSQL is not installed.
            UnavailableError: the database cannot be reached.
        """
        store = cls(_engine(_checked(url)), quarantine=quarantine, clock=clock, notify=notify)
        try:
            if migrate:
                store._migrate()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give back the connections; changes that wait are made first."""
        self._writer.shutdown()
        self._engine.dispose()

    def apply(self, call: Call, operations: Sequence[Operation]) -> list[Resource]:
        """Do all operations in one transaction, with one new revision, or none.

        Raises:
            AlreadyExistsError: an id or the normalised text of a keyword is taken, or what is to be undeleted is not
                deleted.
            NotFoundError: a resource does not exist or was deleted.
            EtagMismatchError: a resource has changed meanwhile.
            IdempotencyKeyReusedError: the key came before, with another fingerprint.
            SlotsExhaustedError: a keyword is to be bound and no slot is free.
            RequestError: a text or key cannot be stored.
            UnavailableError: the database cannot be reached or stays locked.
        """
        _check_indexed("the principal", call.principal)
        _check_indexed("the idempotency key", call.idempotency_key or "")

        def work(change: _Change) -> list[Resource]:
            if call.idempotency_key is None:
                return [change.perform(operation) for operation in operations]
            first = change.first_answer(call.idempotency_key, call.fingerprint)
            if first is not None:
                return first
            resources = [change.perform(operation) for operation in operations]
            change.remember(call.idempotency_key, call.fingerprint, resources)
            return resources

        return self._change(call, work)

    def note(self, call: Call, name: str, after: dict[str, Any]) -> None:
        """An audit event about something that is kept elsewhere; it moves the revision, as every change does.

        Args:
            call: who changes it.
            name: what.
            after: what is to be known of the change.
        """
        _check_indexed("the name", name)
        self._change(call, lambda change: change.event("update", name, None, after))

    def get(self, kind: Kind, id_: str) -> Resource:
        """One resource, deleted or not.

        Raises:
            NotFoundError: there is none.
        """
        row = self._transact(self._reading, lambda connection: connection.execute(_select(kind, id_)).one_or_none())
        if row is None:
            raise _not_found(kind, id_)
        return _resource(row)

    def page(self, kind: Kind, *, size: int, token: str = "", show_deleted: bool = False) -> Page:
        """Resources in the order of their ids.

        Raises:
            RequestError: the token is not one that this listing returned.
        """
        assert size > 0, size
        listing = f"{kind.value}, {'with' if show_deleted else 'without'} deleted"
        query = _RESOURCES.where(_documents.c.kind == kind.value).order_by(_documents.c.id).limit(size + 1)
        if not show_deleted:
            query = query.where(_undeleted)
        if token:
            query = query.where(_documents.c.id > _key_of(token, listing))
        rows = self._transact(self._reading, lambda connection: connection.execute(query).all())
        more = len(rows) > size
        return Page([_resource(row) for row in rows[:size]], _token(listing, rows[size - 1].id) if more else "")

    def audit(self, *, size: int, token: str = "", name: str | None = None) -> tuple[list[AuditEvent], str]:
        """Audit events, newest first, and where the next page begins.

        Raises:
            RequestError: the token is not one that this listing returned, or the name cannot be one.
        """
        assert size > 0, size
        listing = "audit" if name is None else f"audit of {name}"
        query = sa.select(_audit_events).order_by(_audit_events.c.seq.desc()).limit(size + 1)
        if name is not None:
            _check_indexed("the name", name)
            query = query.where(_audit_events.c.name == name)
        if token:
            key = _key_of(token, listing)
            if not (key.isascii() and key.isdigit() and len(key) < 19):
                raise _bad_token()
            query = query.where(_audit_events.c.seq < int(key))
        rows = self._transact(self._reading, lambda connection: connection.execute(query).all())
        more = len(rows) > size
        events = [AuditEvent.model_validate({k: v for k, v in row._mapping.items() if k != "seq"}) for row in rows]
        return events[:size], _token(listing, str(rows[size - 1].seq)) if more else ""

    def revision(self) -> int:
        """The revision that is in force."""
        return self._transact(self._reading, _read_revision)

    def changes(self, since: int) -> Changes:
        """What changed after revision `since`, in the order of the changes; 0 for everything."""
        # A later version may keep what this one does not know.
        query = _RESOURCES.where(_documents.c.revision > since, _documents.c.kind.in_(list(Kind)))
        query = query.order_by(_documents.c.revision, _documents.c.kind, _documents.c.id)

        def work(connection: Connection) -> Changes:
            revision = _read_revision(connection)
            rows = connection.execute(query).all() if revision > since else []
            return Changes(revision, [(Kind(row.kind), _resource(row)) for row in rows])

        return self._transact(self._snapshot, work)

    def free_slots(self) -> list[SlotRef]:
        """Reserved slots that can be bound now, in their order."""
        pool = self._pool()
        return [slot.ref for slot in pool.slots if pool.is_free(slot)]

    def slot_counts(self) -> SlotCounts:
        """How many slots are free, bound and in quarantine."""
        return self._pool().counts()

    def sync_slots(
        self, slots: Sequence[SlotRef], preferred: Mapping[AttributeType, int] | None = None
    ) -> list[Keyword]:
        """Declare which slots the bundle that is served reserves; changes no revision.

        Slots that it no longer has are forgotten, those that a keyword holds excepted. Such a keyword gets one of the
        new slots with the next `Update` of it that leaves it bound.

        Args:
            slots: all of them.
            preferred: the level in which keywords of a type are bound first.

        Returns:
            Keywords that hold a slot which the bundle does not have.
        """
        call = Call(principal="")
        self._preferred = dict(preferred or {})

        def work(change: _Change) -> list[Keyword]:
            change.pool.declare({(slot.level, slot.code) for slot in slots})
            strays = _RESOURCES.where(_slots.c.reserved.is_(sa.false())).order_by(_documents.c.id)
            rows = change.connection.execute(strays).all()
            return [keyword for row in rows if isinstance(keyword := _resource(row), Keyword)]

        return self._change(call, work)

    def create_key(
        self,
        principal: str,
        scopes: Iterable[Scope],
        expires_at: datetime | None = None,
        *,
        by: str = "operator",
        request_id: str = "",
    ) -> tuple[str, str]:
        """A new API key.

        Args:
            principal: who will hold it.
            scopes: what it may do.
            expires_at: when it ends by itself.
            by: who asks for it, for the audit.
            request_id: for the audit.

        Returns:
            Its id, and the secret, which cannot be had again.

        Raises:
            ConflictError: the principal has two active keys: one in use, one to change over to.
            RequestError: no scope or no principal is given, or the expiry lies in the past.
        """
        _check_indexed("the principal", principal)
        granted = sorted({Scope(scope).value for scope in scopes})
        if not principal or not granted:
            raise RequestError("an API key needs a principal and at least one scope; give both")

        def work(change: _Change) -> tuple[str, str]:
            if expires_at is not None and expires_at <= change.now:
                raise RequestError(f"the key would have expired already ({expires_at.isoformat()}); give a later time")
            held = sa.select(_api_keys).where(_api_keys.c.principal == principal, _api_keys.c.revoked_at.is_(None))
            active = [
                r.id for r in change.connection.execute(held) if r.expires_at is None or r.expires_at > change.now
            ]
            if len(active) >= MAX_ACTIVE_KEYS:
                raise ConflictError(
                    f"{principal} has {MAX_ACTIVE_KEYS} active API keys already ({', '.join(active)}); revoke one first"
                )
            id_ = secrets.token_hex(6)
            secret = f"grk_{id_}_{secrets.token_urlsafe(32)}"
            salt = secrets.token_bytes(16)
            row = {"id": id_, "principal": principal, "scopes": granted, "created_at": change.now}
            row |= {"expires_at": expires_at, "revoked_at": None}
            change.connection.execute(_api_keys.insert().values(**row, salt=salt, digest=_digest(salt, secret)))
            change.event("create", f"apiKeys/{id_}", None, _audited_key(row))
            return id_, secret

        return self._change(Call(principal=by, request_id=request_id), work)

    def revoke_key(self, id_: str, *, by: str = "operator", request_id: str = "") -> None:
        """End an API key, now and for good.

        Raises:
            NotFoundError: there is no such key, or it was revoked before.
        """

        def work(change: _Change) -> None:
            mine = (_api_keys.c.id == id_) & _api_keys.c.revoked_at.is_(None)
            row = change.connection.execute(sa.select(_api_keys).where(mine)).one_or_none()
            if row is None:
                raise NotFoundError(f"there is no API key {id_} that is not revoked; list the keys for their ids")
            change.connection.execute(_api_keys.update().where(mine).values(revoked_at=change.now))
            before = dict(row._mapping)
            after = before | {"revoked_at": change.now}
            change.event("delete", f"apiKeys/{id_}", _audited_key(before), _audited_key(after))

        self._change(Call(principal=by, request_id=request_id), work)

    def list_keys(self) -> list[ApiKey]:
        """All API keys, oldest first, those that ended included."""
        query = sa.select(_api_keys).order_by(_api_keys.c.created_at, _api_keys.c.id)
        rows = self._transact(self._reading, lambda connection: connection.execute(query).all())
        return [
            ApiKey(r.id, r.principal, frozenset(map(Scope, r.scopes)), r.created_at, r.expires_at, r.revoked_at)
            for r in rows
        ]

    def verify_key(self, secret: str) -> tuple[str, frozenset[Scope]]:
        """Who holds a key, and what it may do.

        Raises:
            UnauthenticatedError: it is malformed, unknown, revoked or expired.
        """
        unknown = UnauthenticatedError("the API key is not known here; check it, or ask an operator for a new one")
        prefix, _, rest = secret.partition("_")
        id_, _, _ = rest.partition("_")
        if prefix != "grk" or not (id_.isascii() and id_.isalnum()):
            raise unknown
        query = sa.select(_api_keys).where(_api_keys.c.id == id_)
        row = self._transact(self._reading, lambda connection: connection.execute(query).one_or_none())
        if row is None or not hmac.compare_digest(row.digest, _digest(row.salt, secret)):
            raise unknown
        if row.revoked_at is not None:
            raise UnauthenticatedError(f"the API key {id_} was revoked; ask an operator for a new one")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise UnauthenticatedError(f"the API key {id_} has expired; ask an operator for a new one")
        return row.principal, frozenset(map(Scope, row.scopes))

    def read_all(self, work: Callable[[Connection], _T]) -> _T:
        """Run `work` on one snapshot of all tables, for a backup; again where the database asks for it."""
        return self._transact(self._snapshot, work)

    def write_all(self, work: Callable[[Connection], _T]) -> _T:
        """Run `work` in one transaction, for a restoration; it locks the row of ``revision`` first, as writers do."""
        return self._transact(self._writing, work)

    def schema(self) -> str | None:
        """Version of the tables that there are; None where there are none.

        Raises:
            InvalidInputError: they are not known and cannot be used.
            UnavailableError: the database cannot be reached.
        """
        return self._transact(self._reading, self._version)

    def time(self) -> datetime:
        """What the database's own clock says; of SQLite it is this machine's."""
        if not self._is_postgresql:
            return datetime.now(UTC)
        clock = sa.select(sa.func.clock_timestamp(type_=_Utc()))
        return self._transact(self._reading, lambda connection: connection.scalars(clock).one())

    @staticmethod
    def known_schemas() -> set[str]:
        """Versions of the tables that this program knows, oldest to newest."""
        return {script.revision for script in _scripts()[1].walk_revisions()}

    def _pool(self) -> _Pool:
        return self._transact(self._reading, lambda connection: _Pool(connection, self._clock(), self._quarantine, {}))

    def _change(self, call: Call, work: Callable[[_Change], _T]) -> _T:
        """Run `work` while no other writer runs; what it did is undone if it raises or is only to be checked."""

        def transaction(connection: Connection) -> _T:
            if self._is_postgresql:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
            revision = connection.scalars(sa.select(_revision.c.value).with_for_update()).one()
            now = self._clock()
            change = _Change(
                connection, call, revision + 1, now, lambda: _Pool(connection, now, self._quarantine, self._preferred)
            )
            answer = work(change)
            if call.validate_only:
                under_way = connection.get_transaction()
                assert under_way is not None
                under_way.rollback()
            elif change.events:
                connection.execute(_audit_events.insert(), change.events)
                connection.execute(_revision.update().values(value=change.revision))
                if self._notify:
                    connection.execute(sa.select(sa.func.pg_notify(CHANNEL, str(change.revision))))
            return answer

        turn = self._writer.submit(self._transact, self._writing, transaction)
        wait([turn], timeout=_TURN_SECONDS)
        if turn.cancel():  # it had not begun
            raise UnavailableError("too many changes wait for the admin database; try again")
        return turn.result()

    def _transact(self, engine: Engine, work: Callable[[Connection], _T]) -> _T:
        """Run `work` in a transaction, again where the database asks for it, with errors of ours."""
        for tries_left in reversed(range(_TRIES)):
            try:
                with engine.begin() as connection:
                    return work(connection)
            except exc.DBAPIError as error:
                if tries_left and _wants_repetition(error):
                    time.sleep(0.05 * (_TRIES - tries_left) * (1 + secrets.randbelow(100) / 100))
                    continue
                raise self._translated(error) from error
            except exc.TimeoutError as error:  # of the pool
                raise UnavailableError("every connection to the admin database is in use; try again") from error
        raise AssertionError("unreachable")

    def _translated(self, error: exc.DBAPIError) -> Exception:
        # Callers without a key see some of these errors, and the driver's text names hosts, users and values.
        log.warning("admin_store_failed", database=shown(self._engine.url), error=" ".join(str(error.orig).split()))
        if isinstance(error, exc.IntegrityError):
            return AlreadyExistsError("somebody else made the same at the same time; read it, then decide")
        if isinstance(error, exc.DataError):
            return RequestError("the admin store cannot hold a value; change it")
        if isinstance(error, exc.ProgrammingError | exc.NotSupportedError):
            return GenRetrievalError(
                "the admin store refused a statement; was it changed by hand, or is it of another version? The log of "
                "this program says more"
            )
        return UnavailableError(
            "the admin store cannot be reached; check that it runs and may be written (the log of this program says "
            "more), then try again: a change that carries an idempotency key is never made twice"
        )

    def _migrate(self) -> None:
        config, scripts = _scripts()

        def is_current(connection: Connection) -> bool:
            current = self._version(connection)
            return current is not None and current >= str(scripts.get_current_head())

        def upgrade(connection: Connection) -> None:
            if self._is_postgresql:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
            if not is_current(connection):  # servers start together, and one was first
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

        if not self._transact(self._reading, is_current):
            self._transact(self._writing, upgrade)

    def _version(self, connection: Connection) -> str | None:
        current, known = MigrationContext.configure(connection).get_current_revision(), self.known_schemas()
        if current is None or current in known:
            return current
        # Versions with the same first digit only add to each other, so that the release before can go on.
        newest = max(known)
        if len(current) == len(newest) and current[0] == newest[0] and current > newest:
            return str(current)
        raise InvalidInputError(
            f"the tables in {shown(self._engine.url)} have version {current}, which is not known here: they are those "
            "of a newer genretrieval, or of another program. Update genretrieval, or give it a database of its own"
        )


def _scripts() -> tuple[Config, ScriptDirectory]:
    """Alembic's, of the folder ``migrations``."""
    config = Config()
    folder = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


class _Change:
    """What one write transaction has done so far."""

    def __init__(
        self, connection: Connection, call: Call, revision: int, now: datetime, make_pool: Callable[[], _Pool]
    ) -> None:
        self.connection = connection
        self.revision = revision
        self.now = now
        self.events: list[dict[str, object]] = []
        self._call = call
        self._make_pool = make_pool
        self._pool: _Pool | None = None

    @property
    def pool(self) -> _Pool:
        """The slots; read when first needed, because most changes are not about them."""
        if self._pool is None:
            self._pool = self._make_pool()
        return self._pool

    def first_answer(self, key: str, fingerprint: str) -> list[Resource] | None:
        """What the same call was answered before."""
        self.connection.execute(_idempotency.delete().where(_idempotency.c.expires_at <= self.now))
        query = sa.select(_idempotency).where(
            _idempotency.c.principal == self._call.principal, _idempotency.c.key == key
        )
        row = self.connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.fingerprint != fingerprint:
            raise IdempotencyKeyReusedError(
                f"the idempotency key {key!r} came with another request before; use a new key for a new request"
            )
        return [_STORED[Kind(kind)].model_validate(resource, extra="ignore") for kind, resource in row.response]

    def remember(self, key: str, fingerprint: str, resources: Sequence[Resource]) -> None:
        """Keep an answer for repetitions of the call."""
        kinds = {stored: kind.value for kind, stored in _STORED.items()}
        self.connection.execute(
            _idempotency.insert().values(
                principal=self._call.principal,
                key=key,
                fingerprint=fingerprint,
                response=[[kinds[type(resource)], resource.model_dump(mode="json")] for resource in resources],
                expires_at=self.now + _IDEMPOTENCY_TTL,
            )
        )

    def event(
        self,
        action: Literal["create", "update", "delete", "undelete"],
        name: str,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
    ) -> None:
        """Note a change for the audit."""
        who = {"principal": self._call.principal, "request_id": self._call.request_id}
        what = {"action": action, "name": name, "before": before, "after": after}
        self.events.append({"revision": self.revision, "at": self.now, **who, **what})

    def perform(self, operation: Operation) -> Resource:
        """Do one operation."""
        kind, id_ = operation.kind, operation.id
        row = self.connection.execute(_select(kind, id_)).one_or_none()
        before = None if row is None else _resource(row)
        if isinstance(operation, Create):
            if before is not None:
                hint = (
                    "use another id" if before.deleted_at is None else "it was deleted; undelete it, or use another id"
                )
                raise AlreadyExistsError(f"{kind.value}/{id_} exists already; {hint}")
            return self._save("create", kind, id_, operation.fields, None)
        if before is None:
            raise _not_found(kind, id_)
        if isinstance(operation, Undelete):
            if before.deleted_at is None:
                raise AlreadyExistsError(f"{kind.value}/{id_} is not deleted; there is nothing to undelete")
        elif before.deleted_at is not None:
            raise NotFoundError(f"{kind.value}/{id_} was deleted at {before.deleted_at.isoformat()}; undelete it first")
        if operation.etag is not None and operation.etag != before.etag:
            raise EtagMismatchError(
                f"{kind.value}/{id_} has changed: its etag is {before.etag!r}, yours is {operation.etag!r}; read it "
                "again, then decide"
            )
        if isinstance(operation, Undelete):
            if operation.check is not None:
                operation.check(before)
            return self._save("undelete", kind, id_, before, before)
        if isinstance(operation, Delete):
            return self._save("delete", kind, id_, before, before, deleted_at=self.now)
        return self._save("update", kind, id_, operation.change(before), before)

    def _save(
        self,
        action: Literal["create", "update", "delete", "undelete"],
        kind: Kind,
        id_: str,
        fields: Fields,
        before: Resource | None,
        deleted_at: datetime | None = None,
    ) -> Resource:
        assert isinstance(fields, _FIELDS[kind]), (kind, type(fields))
        name = f"{kind.value}/{id_}"
        body = fields.model_dump(mode="json", include=set(_FIELDS[kind].model_fields))
        slot, normalised = None, None
        if isinstance(fields, KeywordFields):
            normalised = self._normalised(name, id_, fields.text, must_be_free=deleted_at is None)
            due = fields.binding is not None and deleted_at is None
            if due or (isinstance(before, Keyword) and before.slot is not None):
                slot = self.pool.settle(id_, fields.type, due)
        if isinstance(fields, AliasFields):
            body["previous"] = fields.previous if isinstance(fields, Alias) else _previous(fields, before)
        # The same for a change that is only checked and then made, and for no other.
        state = json.dumps([self.revision, body, deleted_at is None], sort_keys=True)
        row = {
            "kind": kind.value,
            "id": id_,
            "body": body,
            "normalised": normalised,
            "etag": hashlib.sha256(state.encode()).hexdigest()[:16],
            "revision": self.revision,
            "created_at": self.now if before is None else before.created_at,
            "updated_at": self.now,
            "deleted_at": deleted_at,
        }
        if before is None:
            self.connection.execute(_documents.insert().values(row))
        else:
            mine = (_documents.c.kind == kind.value) & (_documents.c.id == id_)
            self.connection.execute(_documents.update().where(mine).values(row))
        after = _stored(row, slot)
        self.event(
            action, name, None if before is None else before.model_dump(mode="json"), after.model_dump(mode="json")
        )
        return after

    def _normalised(self, name: str, id_: str, text: str, *, must_be_free: bool) -> str:
        normalised = normalise(text)
        if not any(map(str.isalnum, normalised)) or "\0" in normalised:
            raise RequestError(f"{name}: {text!r} has no letter or digit, or a NUL; it cannot be a word")
        _check_indexed(f"{name}: the normalised text", normalised)
        query = sa.select(_documents.c.id).where(
            _documents.c.normalised == normalised, _undeleted, _documents.c.id != id_
        )
        other = self.connection.scalars(query).first() if must_be_free else None
        if other is not None:
            raise AlreadyExistsError(
                f"{name}: {text!r}, once normalised, is the text of keywords/{other}; change or delete that first"
            )
        return normalised


@dataclass(slots=True)
class _Slot:
    """A row of ``slots``, in the order of its columns."""

    level: int
    code: int
    reserved: bool
    status: str
    keyword_id: str | None
    retired_at: datetime | None

    @property
    def ref(self) -> SlotRef:
        return SlotRef(level=self.level, code=self.code)


class _Pool:
    """The slots as one transaction sees them."""

    def __init__(
        self, connection: Connection, now: datetime, quarantine: timedelta, preferred: Mapping[AttributeType, int]
    ) -> None:
        rows = connection.execute(sa.select(_slots).order_by(_slots.c.level, _slots.c.code))
        self.slots = [_Slot(*row) for row in rows.all()]
        self._held = {slot.keyword_id: slot for slot in self.slots if slot.status == "bound"}
        self._connection = connection
        self._now = now
        self._quarantine = quarantine
        self._preferred = preferred

    def is_free(self, slot: _Slot) -> bool:
        """Whether any keyword may take it."""
        return slot.reserved and (slot.status == "free" or self._is_rested(slot))

    def counts(self) -> SlotCounts:
        """How many are in which state."""
        return SlotCounts(
            free=sum(map(self.is_free, self.slots)), bound=len(self._held), quarantined=len(self._in_quarantine())
        )

    def settle(self, keyword_id: str, type_: AttributeType, due: bool) -> SlotRef | None:
        """Give a keyword the slot that it is due, or retire the one that it is not."""
        held = self._held.get(keyword_id)
        if held is not None and not (due and held.reserved):
            del self._held[keyword_id]
            self._set(held, status="retired", retired_at=self._now)
            held = None
        if held is None and due:
            held = self._held[keyword_id] = self._choose(keyword_id, type_)
            self._set(held, status="bound", keyword_id=keyword_id, retired_at=None)
        return None if held is None else held.ref

    def declare(self, reserved: set[tuple[int, int]]) -> None:
        """Make these the reserved slots."""
        for slot in self.slots:
            if (kept := (slot.level, slot.code) in reserved) != slot.reserved:
                self._set(slot, reserved=kept)
            if not kept and (slot.status == "free" or self._is_rested(slot)):
                self._connection.execute(_slots.delete().where(_row_of(slot)))
        new = reserved - {(slot.level, slot.code) for slot in self.slots}
        if new:
            row = {"reserved": True, "status": "free", "keyword_id": None, "retired_at": None}
            rows = [{"level": level, "code": code, **row} for level, code in sorted(new)]
            self._connection.execute(_slots.insert(), rows)

    def _is_rested(self, slot: _Slot) -> bool:
        return slot.retired_at is not None and slot.retired_at + self._quarantine <= self._now

    def _in_quarantine(self) -> list[_Slot]:
        return [s for s in self.slots if s.reserved and s.status == "retired" and not self._is_rested(s)]

    def _choose(self, keyword_id: str, type_: AttributeType) -> _Slot:
        # What refers to a slot in quarantine means the keyword that had it, so that one may have it back at once.
        own = [s for s in self.slots if s.reserved and s.retired_at is not None and s.keyword_id == keyword_id]
        if own:
            return max(own, key=lambda slot: slot.retired_at or self._now)
        free = [slot for slot in self.slots if self.is_free(slot)]
        if not free:
            raise self._exhausted(keyword_id)
        room = Counter(slot.level for slot in free)
        level = self._preferred.get(type_)
        if level not in room:
            level = max(sorted(room), key=room.__getitem__)
        return next(slot for slot in free if slot.level == level)

    def _exhausted(self, keyword_id: str) -> SlotsExhaustedError:
        waiting = [slot.retired_at + self._quarantine for slot in self._in_quarantine() if slot.retired_at]
        counts = self.counts()
        taken = f"{counts.bound} {'is' if counts.bound == 1 else 'are'} bound, {counts.quarantined} in quarantine"
        if waiting:
            taken += f", the next free at {min(waiting).isoformat()}"
        remedy = "unbind a keyword, wait for the quarantine to end, or serve a bundle with more reserved slots"
        return SlotsExhaustedError(f"keywords/{keyword_id}: no reserved slot is free ({taken}); {remedy}")

    def _set(self, slot: _Slot, **values: Any) -> None:
        for name, value in values.items():
            setattr(slot, name, value)
        self._connection.execute(_slots.update().where(_row_of(slot)).values(**values))


def _row_of(slot: _Slot) -> sa.ColumnElement[bool]:
    return (_slots.c.level == slot.level) & (_slots.c.code == slot.code)


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):  # ValueError: of a port; either shows the URL, password included
        raise InvalidInputError(f"the URL of the admin database cannot be read; {_URLS}") from None
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    # Other programs write the same URL with another driver, or with the old name of the scheme.
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidInputError(f"the admin database cannot be {shown(parsed)!r}; {_URLS}")


def shown(url: URL) -> str:
    """A URL as messages may have it: without its password, and without its query, which may hold another one."""
    return url.set(query={}).render_as_string(hide_password=True)


_URLS = "give sqlite:///path/to/file or postgresql://user:password@host/database"


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        engine = sa.create_engine(url, pool_pre_ping=True)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    # A server that does not answer must not hold up a caller for minutes.
    patience = {} if "connect_timeout" in url.query else {"connect_timeout": _LOCK_SECONDS}
    try:
        return sa.create_engine(url, pool_pre_ping=True, connect_args=patience)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"an admin database in PostgreSQL needs {error.name}; install it with: pip install 'genretrieval[postgres]'"
        ) from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins, and not the driver when it sees fit
    connection.execute(f"PRAGMA busy_timeout = {_LOCK_SECONDS * 1000}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # with less, a power cut can take back what was acknowledged


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later can fail half way; one that says so at once waits its turn.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")


def _wants_repetition(error: exc.DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.OperationalError):
        # The low byte: the rest says in which of several ways it is busy or locked.
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    # Serialization failure, deadlock.
    return getattr(error.orig, "sqlstate", None) in ("40001", "40P01")


def _select(kind: Kind, id_: str) -> sa.Select[Any]:
    return _RESOURCES.where(_documents.c.kind == kind.value, _documents.c.id == id_)


def _read_revision(connection: Connection) -> int:
    return int(connection.scalars(sa.select(_revision.c.value)).one())


def _resource(row: Row[Any]) -> Resource:
    slot = None if row.level is None else SlotRef(level=row.level, code=row.code)
    return _stored(row._mapping, slot)


def _stored(row: Mapping[Any, Any], slot: SlotRef | None) -> Resource:
    kind = Kind(row["kind"])
    added = {name: row[name] for name in ("id", "etag", "revision", "created_at", "updated_at", "deleted_at")}
    if kind is Kind.KEYWORDS:
        added["slot"] = slot
    # A later release may have added fields.
    return _STORED[kind].model_validate({**row["body"], **added}, extra="ignore")


def _previous(fields: AliasFields, before: Resource | None) -> str | None:
    """What an alias is rolled back to, once it names other bundles."""
    if not isinstance(before, Alias):
        return None
    return before.previous if before.bundle == fields.bundle else before.bundle


def _not_found(kind: Kind, id_: str) -> NotFoundError:
    return NotFoundError(f"there is no {kind.value}/{id_}; list {kind.value} for the ids there are")


def _check_indexed(what: str, value: str) -> None:
    if len(value.encode(errors="replace")) > _MAX_INDEXED or "\0" in value:
        raise RequestError(f"{what} is longer than {_MAX_INDEXED} bytes, or has a NUL; give another one")


def _digest(salt: bytes, secret: str) -> bytes:
    # A slow hash makes guessing dear where secrets can be guessed. This one has 256 random bits, and is checked with
    # every request; the salt is there so that two stores never hold the same digest.
    return hashlib.sha256(salt + secret.encode(errors="replace")).digest()


def _audited_key(row: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: row[name] and row[name].isoformat() for name in ("created_at", "expires_at", "revoked_at")}
    return {"id": row["id"], "principal": row["principal"], "scopes": row["scopes"], **times}


def _token(listing: str, key: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([listing, key]).encode()).decode().rstrip("=")


def _key_of(token: str, listing: str) -> str:
    try:
        made_for, key = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError):  # TypeError: JSON of another shape
        raise _bad_token() from None
    if made_for != listing or not isinstance(key, str) or "\0" in key:
        raise _bad_token()
    return key


def _bad_token() -> RequestError:
    return RequestError(
        "the page token is not one that this listing returned; repeat the call with the token and the other arguments "
        "as they were, or begin without a token"
    )
