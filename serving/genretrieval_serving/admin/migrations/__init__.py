"""Migrations of the tables in `genretrieval_serving.admin.sql`; Alembic reads this folder."""
