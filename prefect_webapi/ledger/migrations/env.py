"""Run by Alembic inside the transaction that `schema.bring_up_to_date` has begun."""

from __future__ import annotations

from alembic import context

from prefect_webapi.ledger.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
