"""Orders"""

import sqlalchemy as sa
from alembic import op

revision = "5be0c2a94f11"
down_revision = "0c1d5a7e9b30"


def upgrade() -> None:
    article = sa.Column("article", sa.String, nullable=False)
    op.create_table("shop_order", sa.Column("id", sa.Integer, primary_key=True), article)


def downgrade() -> None:
    op.drop_table("shop_order")
