"""The ledger's tables (declared; made by ``migrations/merchant``)."""

from sqlalchemy import BigInteger, Boolean, Column, LargeBinary, MetaData, Numeric, Table, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP

metadata = MetaData()
TIME = TIMESTAMP(timezone=True)

accounts = Table(
    "accounts",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_id", Text, nullable=False, unique=True),
    Column("last_seq", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("debt", BigInteger, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("last_entry_at", TIME),
    Column("created_at", TIME, nullable=False),
    Column("locked", Boolean, nullable=False),
    Column("locked_until", TIME),
    Column("open_operation", Text),
    Column("erased_at", TIME),
)

entries = Table(
    "entries",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("amount", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("operation_type", Text, nullable=False),
    Column("resource_amount", Numeric, nullable=False),
    Column("resource_unit", Text, nullable=False),
    Column("operation_id", Text),
    Column("workflow_id", Text),
    Column("note", Text),
    Column("command", LargeBinary, nullable=False),
    Column("created_at", TIME, primary_key=True),
    Column("effective_at", TIME, nullable=False),
    Column("balance_after", BigInteger, nullable=False),
    Column("debt_after", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

allocations = Table(
    "allocations",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("entry_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("lot_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("credits", BigInteger, nullable=False),
    Column("created_at", TIME, primary_key=True),
)

lots = Table(
    "lots",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("credits", BigInteger, nullable=False),
    Column("remaining", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("product_code", Text),
    Column("purchase", Text),
    Column("issued_at", TIME, nullable=False),
    Column("expires_at", TIME, nullable=False),
    Column("spent", Boolean, nullable=False),
    Column("expired_credits", BigInteger, nullable=False),
    Column("expiry_seq", BigInteger),
)

debts = Table(
    "debts",
    metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("entry_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("uncovered", BigInteger, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("operation_id", Text, primary_key=True),
    Column("account_id", BigInteger, nullable=False),
    Column("operation_code", Text, nullable=False),
    Column("resource_unit", Text, nullable=False),
    Column("credits_per_unit", Numeric, nullable=False),
    Column("minimum_charge", BigInteger, nullable=False),
    Column("type_effective_at", TIME),
    Column("workflow_id", Text),
    Column("state", Text, nullable=False),
    Column("opened_at", TIME, nullable=False),
    Column("expires_at", TIME, nullable=False),
    Column("closed_at", TIME),
    Column("completed_at", TIME),
    Column("resource_amount", Numeric),
    Column("credits", BigInteger),
    Column("entry_seq", BigInteger),
    Column("note", Text),
)

purchases = Table(
    "purchases",
    metadata,
    Column("external_ref", Text, primary_key=True),
    Column("account_id", BigInteger, nullable=False),
    Column("lot_seq", BigInteger, nullable=False),
    Column("credits", BigInteger, nullable=False),
    Column("product_code", Text, nullable=False),
    Column("payment_method", Text, nullable=False),
    Column("country", Text, nullable=False),
    Column("amount", Numeric, nullable=False),
    Column("currency", Text, nullable=False),
    Column("order_placed_at", TIME, nullable=False),
    Column("settled_at", TIME, nullable=False),
    Column("applied_at", TIME, nullable=False),
    Column("command", LargeBinary, nullable=False),
    Column("receipt_number", Text, nullable=False),
)

reversals = Table(
    "reversals",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("external_ref", Text, nullable=False),
    Column("account_id", BigInteger, nullable=False),
    Column("amount", Numeric, nullable=False),
    Column("due", BigInteger, nullable=False),
    Column("taken", BigInteger, nullable=False),
    Column("entry_seq", BigInteger),
    Column("category", Text),
    Column("applied_at", TIME, nullable=False),
    Column("command", LargeBinary, nullable=False),
    Column("credit_note_number", Text),
    Column("has_credit_note", Boolean, nullable=False),
    Column("won_at", TIME),
    Column("given_back_seq", BigInteger),
    Column("correction_number", Text),
)

purchase_refusals = Table(
    "purchase_refusals",
    metadata,
    Column("command", LargeBinary, primary_key=True),
    Column("external_ref", Text),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("refused_at", TIME, nullable=False),
)
