"""Entry point of Alembic: `SqlStore.open` hands over its connection, whose transaction holds all of a migration."""

from alembic import context

from genretrieval_serving.admin import sql

context.configure(connection=context.config.attributes["connection"], target_metadata=sql.metadata)
context.run_migrations()
