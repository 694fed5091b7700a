"""Documents are found by the time they were issued."""

from pathlib import Path

from alembic import op

from migrations.runner import run_script

revision = "0003_documents_issued"
down_revision = "0002_refusals_settled"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql"))
