"""Slots that seem to have leaked are remembered between two looks; calls of all processes share a rate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webapi_surplus",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.CheckConstraint("slots > 0", name="webapi_surplus_slots"),
    )
    op.create_table(
        "webapi_rate",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("free_at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("webapi_rate")
    op.drop_table("webapi_surplus")
