"""The first schema of the control lineage."""

from pathlib import Path

from alembic import op

from migrations.runner import run_script

revision = "0001_control"
down_revision = None


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql"))
