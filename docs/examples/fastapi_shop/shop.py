"""A shop: POST /orders stores an order, and the mail that must follow it, in one transaction."""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outwake import enqueue

engine = create_async_engine(os.environ["SHOP_DATABASE_URL"])  # postgresql+psycopg://…
sessions = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


class Base(DeclarativeBase):
    """The shop's tables."""


class Order(Base):
    """A row of shop_order."""

    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


class Mail(BaseModel):
    """What the handler of email.send gets."""

    article: str


@app.post("/orders", status_code=201)
async def order(mail: Mail) -> dict[str, int]:
    """The mail will be sent if the order is there, and only then."""
    async with sessions.begin() as session:
        placed = Order(article=mail.article)
        session.add(placed)
        row_id = await enqueue(session, "email.send", mail)
    return {"order": placed.id, "row": row_id}
