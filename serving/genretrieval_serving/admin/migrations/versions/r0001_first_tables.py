"""Documents, slots, revision, audit events, idempotency records, API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables, and revision 0."""
    key = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    time = sa.DateTime(timezone=True)
    op.create_table(
        "documents",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("id", key, primary_key=True),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("normalised", sa.String),
        sa.Column("etag", sa.String, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("updated_at", time, nullable=False),
        sa.Column("deleted_at", time),
    )
    op.create_index("ix_documents_revision", "documents", ["revision"])
    undeleted = sa.text("deleted_at IS NULL")
    op.create_index(
        "uq_documents_normalised",
        "documents",
        ["normalised"],
        unique=True,
        sqlite_where=undeleted,
        postgresql_where=undeleted,
    )
    op.create_table(
        "slots",
        sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("code", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("reserved", sa.Boolean, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("keyword_id", key),
        sa.Column("retired_at", time),
        sa.CheckConstraint("status IN ('free', 'bound', 'retired')", name="ck_slots_status"),
    )
    bound = sa.text("status = 'bound'")
    op.create_index(
        "uq_slots_keyword_id", "slots", ["keyword_id"], unique=True, sqlite_where=bound, postgresql_where=bound
    )
    counter = op.create_table(
        "revision",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.CheckConstraint("id = 1", name="ck_revision_single"),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    op.create_table(
        "audit_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("at", time, nullable=False),
        sa.Column("principal", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.Column("request_id", sa.String, nullable=False),
    )
    op.create_index("ix_audit_events_name", "audit_events", ["name"])
    op.create_table(
        "idempotency",
        sa.Column("principal", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("response", sa.JSON, nullable=False),
        sa.Column("expires_at", time, nullable=False),
    )
    op.create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"])
    op.create_table(
        "api_keys",
        sa.Column("id", key, primary_key=True),
        sa.Column("principal", sa.String, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("expires_at", time),
        sa.Column("revoked_at", time),
    )
    op.create_index("ix_api_keys_principal", "api_keys", ["principal"])
