"""A job takes places of several limits; processes say for which ones they wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    array, element = "json_array(quota)", "quota"
    if op.get_bind().dialect.name == "postgresql":
        array = f"json_build_array({element})::text"
    op.add_column("webapi_job", sa.Column("quotas", sa.Text, nullable=False, server_default="[]"))
    op.execute(f"UPDATE webapi_job SET quotas = {array} WHERE quota IS NOT NULL")
    op.drop_column("webapi_job", "quota")
    waiting = sa.text("state = 'SLOT_REQUESTED'")
    op.create_index(
        "webapi_job_waiting",
        "webapi_job",
        ["runtime", "quotas", "created_at"],
        sqlite_where=waiting,
        postgresql_where=waiting,
    )
    op.create_table(
        "webapi_queue",
        sa.Column("runtime", sa.Text, primary_key=True),
        sa.Column("quotas", sa.Text, primary_key=True),
        sa.Column("asked_at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Of several limits the first one stays: it is the namespace's own."""
    first = "json_extract(quotas, '$[0]')"
    if op.get_bind().dialect.name == "postgresql":
        first = "quotas::json ->> 0"
    op.drop_table("webapi_queue")
    op.drop_index("webapi_job_waiting", "webapi_job")
    op.add_column("webapi_job", sa.Column("quota", sa.Text))
    op.execute(f"UPDATE webapi_job SET quota = {first}")
    op.drop_column("webapi_job", "quotas")
