"""Outwake 1.0"""

from pathlib import Path

from alembic import op

revision = "0c1d5a7e9b30"
down_revision = None


def run(sql: str) -> None:
    op.get_bind().exec_driver_sql(sql, execution_options={"no_parameters": True})


def upgrade() -> None:
    run(Path(__file__).with_name("outwake_1_0.sql").read_text())


def downgrade() -> None:
    run("DROP SCHEMA outwake CASCADE")  # with all rows in it
