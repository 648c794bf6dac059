"""How long the jobs of a task take is remembered, and how often each process reads its jobs is told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webapi_duration",
        sa.Column("plugin", sa.Text, primary_key=True),
        sa.Column("task", sa.Text, primary_key=True),
        sa.Column("seconds", sa.Text, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "webapi_reading",
        sa.Column("runtime", sa.Text, primary_key=True),
        sa.Column("plugin", sa.Text, primary_key=True),
        sa.Column("connection", sa.Text, primary_key=True),
        sa.Column("jobs", sa.Integer, nullable=False),
        sa.Column("every", sa.Double, nullable=False),
        sa.Column("late", sa.Double, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("webapi_reading")
    op.drop_table("webapi_duration")
