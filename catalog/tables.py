"""The catalogue's tables (declared; made by ``migrations/merchant``)."""

from sqlalchemy import BigInteger, Column, Integer, MetaData, Numeric, Table, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP

metadata = MetaData()
TIME = TIMESTAMP(timezone=True)

products = Table(
    "products",
    metadata,
    Column("product_code", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("credits", BigInteger, nullable=False),
    Column("access_period_days", Integer, nullable=False),
    Column("distribution", Text, nullable=False),
    Column("grant_policy", Text),
    Column("effective_at", TIME, nullable=False),
    Column("archived_at", TIME),
)

product_prices = Table(
    "product_prices",
    metadata,
    Column("product_code", Text, primary_key=True),
    Column("country", Text, primary_key=True),
    Column("currency", Text, primary_key=True),
    Column("amount", Numeric, nullable=False),
    Column("effective_at", TIME, nullable=False),
    Column("archived_at", TIME),
    Column("version", Integer, primary_key=True),
)

operation_types = Table(
    "operation_types",
    metadata,
    Column("operation_code", Text, primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("resource_unit", Text, nullable=False),
    Column("credits_per_unit", Numeric, nullable=False),
    Column("minimum_charge", BigInteger, nullable=False),
    Column("workflow_type", Text),
    Column("effective_at", TIME, nullable=False),
    Column("archived_at", TIME),
    Column("version", Integer, primary_key=True),
)
