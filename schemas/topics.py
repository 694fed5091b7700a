"""Names of the topics, and which command may come in on which of them."""

import re
from collections.abc import Mapping
from types import MappingProxyType

CHANNELS = ("purchases", "users", "operations", "admin", "jobs")

MERCHANT_ID = re.compile(r"^[a-z][a-z0-9-]{1,30}\Z")
# A merchant of this name would share its topics with the control plane.
RESERVED_MERCHANT_IDS = frozenset({"control"})

CONTROL_CHANNEL = "control"
CONTROL = "credits.control"
CONTROL_RESULTS = "credits.control.results"

ALLOWED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "purchases": frozenset({"Purchase.Settled"}),
        "users": frozenset({"User.SignedUp"}),
        "operations": frozenset({"Operation.Open", "Operation.RecordAndClose", "Operation.Cancel"}),
        "admin": frozenset(
            {
                "Grant.Apply",
                "Adjustment.Apply",
                "Refund.Apply",
                "Chargeback.Apply",
                "Chargeback.Reverse",
                "Product.Create",
                "Product.Archive",
                "ProductPrice.Create",
                "ProductPrice.Archive",
                "OperationType.CreateWithArchival",
                "OperationType.Archive",
                "Merchant.Configure",
                "UserRole.Assign",
                "UserRole.Revoke",
                "Account.Lock",
                "Account.Unlock",
                "User.Erase",
                "Receipt.AttachFiscal",
            }
        ),
        "jobs": frozenset({"Lot.Expire", "Operation.Expire", "Command.Resolve"}),
        CONTROL_CHANNEL: frozenset({"Merchant.Register", "Merchant.Suspend", "Merchant.Resume", "Clock.Advance"}),
    }
)

_REPLY_NAME = re.compile(r"[A-Za-z0-9._-]+\Z")
_TOPIC_LENGTH_MAX = 249


def is_merchant_id(text: str) -> bool:
    """Whether a merchant may have this id."""
    return MERCHANT_ID.match(text) is not None and text not in RESERVED_MERCHANT_IDS


def input_topic(merchant: str, channel: str) -> str:
    """Return the topic of a merchant's channel, one of CHANNELS."""
    assert channel in CHANNELS, channel
    return f"credits.{merchant}.{channel}"


def results_topic(merchant: str | None) -> str:
    """Return the topic of a merchant's results; without a merchant that of the control plane."""
    return CONTROL_RESULTS if merchant is None else f"credits.{merchant}.results"


def receipts_topic(merchant: str) -> str:
    """Return the topic of a merchant's receipts and credit notes."""
    return f"credits.{merchant}.receipts"


def dead_letter_topic(merchant: str) -> str:
    """Return the topic of the pointers to a merchant's undeliverable messages."""
    return f"credits.{merchant}.dead-letter"


def all_topics(merchant: str) -> tuple[str, ...]:
    """Return a merchant's eight topics: the inputs in the order of CHANNELS, results, receipts, dead letters."""
    inputs = (input_topic(merchant, channel) for channel in CHANNELS)
    return (*inputs, results_topic(merchant), receipts_topic(merchant), dead_letter_topic(merchant))


def parse_input(topic: str) -> tuple[str | None, str]:
    """Return (merchant, channel) of an input topic; the control topic has no merchant. Any other is a ValueError."""
    if topic == CONTROL:
        return None, CONTROL_CHANNEL
    prefix, _, channel = topic.rpartition(".")
    merchant = prefix.removeprefix("credits.")
    if channel not in CHANNELS or merchant == prefix or not is_merchant_id(merchant):
        raise ValueError(f"not an input topic: {topic}")
    return merchant, channel


def is_reply_topic(merchant: str | None, name: str) -> bool:
    """Whether a sender may ask for results in this topic: `credits.<m>.replies.<name>` of its own merchant."""
    prefix = f"credits.{merchant or CONTROL_CHANNEL}.replies."
    return name.startswith(prefix) and len(name) <= _TOPIC_LENGTH_MAX and bool(_REPLY_NAME.match(name, len(prefix)))
