"""Alembic's environment: the shop's tables, on the shop's database."""

import os

from alembic import context
from shop import Base
from sqlalchemy import create_engine

with create_engine(os.environ["SHOP_DATABASE_URL"]).connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
