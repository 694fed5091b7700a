"""The tables of documents (declared; made by ``migrations/merchant``)."""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, Table, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP

metadata = MetaData()
TIME = TIMESTAMP(timezone=True)

document_series = Table(
    "document_series",
    metadata,
    Column("prefix", Text, primary_key=True),
    Column("year", Integer, nullable=False),
    Column("next_number", BigInteger, nullable=False),
    Column("last_issued_at", TIME, nullable=False),
    Column("head", LargeBinary, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("number", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("year", Integer, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("issued_at", TIME, nullable=False),
    Column("external_ref", Text, nullable=False),
    Column("account_id", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("command", LargeBinary, nullable=False),
)

buyers = Table(
    "buyers",
    metadata,
    Column("number", Text, primary_key=True),
    Column("account_id", BigInteger, nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("block", Text, nullable=False),
)

fiscal_receipts = Table(
    "fiscal_receipts",
    metadata,
    Column("receipt_number", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("fiscal_number", Text, primary_key=True),
    Column("authority", Text, nullable=False),
    Column("register_number", Text),
    Column("qr_url", Text),
    Column("fiscal_at", TIME, nullable=False),
    Column("actor", Text, nullable=False),
    Column("command", LargeBinary, nullable=False),
    Column("attached_at", TIME, nullable=False),
)
