"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webapi_group",
        sa.Column("base", sa.Text, primary_key=True),
        sa.Column("draws", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "webapi_claim",
        sa.Column("base", sa.Text, primary_key=True),
        sa.Column("task_run", sa.Text, primary_key=True),
        sa.Column("nth", sa.Integer, primary_key=True),
        sa.Column("execution", sa.Text, nullable=False),
        sa.Column("levels", sa.Text, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
    )
    op.create_index("webapi_claim_execution", "webapi_claim", ["base", "execution"])
    op.create_table(
        "webapi_job",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("runtime", sa.Text, nullable=False),
        sa.Column("plugin", sa.Text, nullable=False),
        sa.Column("task_type", sa.Text, nullable=False),
        sa.Column("connection", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("quota", sa.Text),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.Column("counted", sa.SmallInteger, nullable=False),
        sa.Column("failed", sa.SmallInteger, nullable=False),
        sa.Column("handle", sa.Text),
        sa.Column("cancel_reason", sa.Text),
        sa.Column("flow_run", sa.Text, nullable=False),
        sa.Column("root_run", sa.Text, nullable=False),
        sa.Column("task_run", sa.Text, nullable=False),
        sa.Column("deadline", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.UniqueConstraint("base", "ordinal", "attempt", name="webapi_job_identity"),
    )
    op.create_index("webapi_job_root_run", "webapi_job", ["root_run"])
    op.create_index("webapi_job_flow_run", "webapi_job", ["flow_run"])
    open_jobs = sa.text("state <> 'CLOSED'")
    op.create_index(
        "webapi_job_open",
        "webapi_job",
        ["runtime", "state"],
        sqlite_where=open_jobs,
        postgresql_where=open_jobs,
    )
    to_cancel = sa.text("cancel_reason IS NOT NULL")
    op.create_index(
        "webapi_job_cancel",
        "webapi_job",
        ["runtime"],
        sqlite_where=to_cancel,
        postgresql_where=to_cancel,
    )
    op.create_table(
        "webapi_quota",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("live", sa.Integer, nullable=False),
        sa.Column("lim", sa.Integer, nullable=False),
        sa.CheckConstraint("live >= 0", name="webapi_quota_live"),
    )
    op.create_table(
        "webapi_runtime",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("born", sa.Double, nullable=False),
        sa.Column("started", sa.BigInteger, nullable=False),
        sa.Column("last_beat", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in ("runtime", "quota", "job", "claim", "group"):
        op.drop_table(f"webapi_{table}")
