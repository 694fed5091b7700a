"""Refused orders can be settled."""

from pathlib import Path

from alembic import op

from migrations.runner import run_script

revision = "0002_refusals_settled"
down_revision = "0001_ledger"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql"))
