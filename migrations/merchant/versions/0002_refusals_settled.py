"""Refused orders can be settled."""

from alembic import op

revision = "0002_refusals_settled"
down_revision = "0001_ledger"


def upgrade() -> None:
    op.execute("ALTER TABLE purchase_refusals ADD COLUMN settled_at timestamptz")
    op.execute("GRANT UPDATE (settled_at) ON purchase_refusals TO credits_worker")
