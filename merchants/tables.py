"""Tables of the control database and a merchant's state (declared; made by ``migrations``)."""

from sqlalchemy import BigInteger, Boolean, Column, Integer, Interval, LargeBinary, MetaData, Table, Text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

TIME = TIMESTAMP(timezone=True)

control_metadata = MetaData()

merchants = Table(
    "merchants",
    control_metadata,
    Column("merchant_id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("database_url", Text, nullable=False),
    Column("password", Text, nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("partitions", Integer, nullable=False),
    Column("simulated", Boolean, nullable=False),
    Column("command", LargeBinary, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("registered_at", TIME, nullable=False),
)

secrets = Table(
    "secrets",
    control_metadata,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

tokens = Table(
    "tokens",
    control_metadata,
    Column("token_id", Text, primary_key=True),
    Column("sha256", LargeBinary, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("merchant_id", Text),
    Column("subject", Text),
    Column("note", Text),
    Column("created_at", TIME, nullable=False),
    Column("revoked_at", TIME),
)

metadata = MetaData()

merchant_state = Table(
    "merchant_state",
    metadata,
    Column("one", Boolean, primary_key=True),
    Column("merchant_id", Text),
    Column("config_version", BigInteger, nullable=False),
    Column("catalog_version", BigInteger, nullable=False),
    Column("clock_offset", Interval, nullable=False),
    Column("suspended", Boolean, nullable=False),
)

merchant_config = Table(
    "merchant_config",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("config", JSONB, nullable=False),
    Column("actor", Text, nullable=False),
    Column("command", LargeBinary, nullable=False),
    Column("applied_at", TIME, nullable=False),
)

user_roles = Table(
    "user_roles",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("role", Text, nullable=False),
    Column("assigned_at", TIME, nullable=False),
)
