"""The first schema of the merchant lineage."""

from pathlib import Path

from alembic import op

from migrations.runner import run_script

revision = "0001_ledger"
down_revision = None


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql"))
