"""The one registry of error codes: documentation, HTTP problems and results are made from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Code(StrEnum):
    """Every error code, in order of precedence: of several that apply, the first one is answered."""

    MALFORMED = "malformed"
    UNKNOWN_COMMAND = "unknown_command"
    WRONG_TOPIC = "wrong_topic"
    WRONG_MERCHANT = "wrong_merchant"
    SENSITIVE_DATA = "sensitive_data"
    LIMIT_EXCEEDED = "limit_exceeded"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    UNKNOWN_MERCHANT = "unknown_merchant"
    ACCOUNT_ERASED = "account_erased"
    UNKNOWN_PRODUCT = "unknown_product"
    NOT_FOR_SALE = "not_for_sale"
    PRODUCT_NOT_ACTIVE = "product_not_active"
    PRICE_MISMATCH = "price_mismatch"
    UNKNOWN_OPERATION_TYPE = "unknown_operation_type"
    UNKNOWN_PURCHASE = "unknown_purchase"
    UNKNOWN_DISPUTE = "unknown_dispute"
    UNKNOWN_RECEIPT = "unknown_receipt"
    UNKNOWN_LOT = "unknown_lot"
    ACCOUNT_LOCKED = "account_locked"
    OPERATION_ALREADY_OPEN = "operation_already_open"
    INSUFFICIENT_BALANCE = "insufficient_balance"
    OPERATION_NOT_FOUND = "operation_not_found"
    OPERATION_NOT_OPEN = "operation_not_open"
    OPERATION_TIMED_OUT = "operation_timed_out"
    RESOURCE_UNIT_MISMATCH = "resource_unit_mismatch"
    WORKFLOW_MISMATCH = "workflow_mismatch"
    ALREADY_REVERSED = "already_reversed"
    AMOUNT_EXCEEDS_PURCHASE = "amount_exceeds_purchase"
    EFFECTIVE_IN_PAST = "effective_in_past"
    PERIOD_OVERLAP = "period_overlap"
    IMMUTABLE = "immutable"
    VERSION_CONFLICT = "version_conflict"
    NOT_DUE = "not_due"
    DEPENDENCY_TIMEOUT = "dependency_timeout"
    INTERNAL_ERROR = "internal_error"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    UNKNOWN_USER = "unknown_user"
    INVALID_PARAMETER = "invalid_parameter"
    INVALID_CURSOR = "invalid_cursor"
    RATE_LIMITED = "rate_limited"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What one code means. `rank` is its place in the order of precedence, from 0.

    `retryable`: sending the same content again, in a new message, may be decided otherwise.
    """

    code: Code
    rank: int
    http_status: int
    retryable: bool
    meaning: str
    fix: str
    http_only: bool


_AGAIN = True
_FINAL = False

# code: HTTP status, retryable, meaning, fix.
_TABLE: dict[Code, tuple[int, bool, str, str]] = {
    Code.MALFORMED: (
        400,
        _FINAL,
        "The message can't be read as the command it names.",
        "Correct the members named in details.fields and send a new message.",
    ),
    Code.UNKNOWN_COMMAND: (
        400,
        _FINAL,
        "The ce_type names no command.",
        "Use a command type of the catalog, spelled exactly.",
    ),
    Code.WRONG_TOPIC: (
        403,
        _FINAL,
        "This command is not allowed on the topic it came in.",
        "Send it to the topic the command catalog gives for its type.",
    ),
    Code.WRONG_MERCHANT: (
        403,
        _FINAL,
        "The payload names another merchant than the topic.",
        "Leave merchant_id out, or send the command to that merchant's topic.",
    ),
    Code.SENSITIVE_DATA: (
        422,
        _FINAL,
        "The message holds what may be payment card data.",
        "Remove the card data; for numeric references configure external_ref_patterns.",
    ),
    Code.LIMIT_EXCEEDED: (
        422,
        _FINAL,
        "A number is outside the bounds the service accepts.",
        "Stay within the bounds of the wire contract.",
    ),
    Code.IDEMPOTENCY_CONFLICT: (
        409,
        _FINAL,
        "The same identity or business key came before with other content.",
        "Compare details.fields with the original in details.first; use a new key for a new act.",
    ),
    Code.UNKNOWN_MERCHANT: (404, _AGAIN, "No such merchant is registered.", "Register the merchant first."),
    Code.ACCOUNT_ERASED: (
        410,
        _FINAL,
        "The user was erased.",
        "Use a new user_id; refunds and chargebacks of old purchases still work.",
    ),
    Code.UNKNOWN_PRODUCT: (404, _AGAIN, "No such product exists.", "Create the product, or correct product_code."),
    Code.NOT_FOR_SALE: (
        422,
        _AGAIN,
        "The product has no price there, or is a grant product.",
        "Create a price for the country, or name a sellable product.",
    ),
    Code.PRODUCT_NOT_ACTIVE: (
        422,
        _AGAIN,
        "The product was not active when the order was placed.",
        "Name a product that was active at order_placed_at.",
    ),
    Code.PRICE_MISMATCH: (
        422,
        _AGAIN,
        "Amount or currency differ from the price in force when the order was placed.",
        "Compare pricing_snapshot with the catalog price named in details.",
    ),
    Code.UNKNOWN_OPERATION_TYPE: (
        404,
        _AGAIN,
        "No version of this operation type is active.",
        "Create the operation type, or correct operation_code.",
    ),
    Code.UNKNOWN_PURCHASE: (404, _AGAIN, "No such purchase exists.", "Correct external_ref."),
    Code.UNKNOWN_DISPUTE: (404, _AGAIN, "No such chargeback exists.", "Correct dispute_id."),
    Code.UNKNOWN_RECEIPT: (404, _AGAIN, "No such document exists.", "Correct receipt_number."),
    Code.UNKNOWN_LOT: (404, _AGAIN, "The user has no such lot.", "Correct lot_id."),
    Code.ACCOUNT_LOCKED: (
        423,
        _AGAIN,
        "The account is locked: no operation can be opened.",
        "Wait for the end of the lock, or unlock the account.",
    ),
    Code.OPERATION_ALREADY_OPEN: (
        409,
        _AGAIN,
        "The user has an open operation; there is one at a time.",
        "Close or cancel the operation named in details, or wait for its timeout.",
    ),
    Code.INSUFFICIENT_BALANCE: (
        402,
        _AGAIN,
        "The balance is negative: no operation can be opened.",
        "Let the user buy credits; then open a new operation.",
    ),
    Code.OPERATION_NOT_FOUND: (404, _AGAIN, "The user has no such operation.", "Correct operation_id or user_id."),
    Code.OPERATION_NOT_OPEN: (
        409,
        _FINAL,
        "The operation was closed, cancelled or never opened.",
        "Open a new operation.",
    ),
    Code.OPERATION_TIMED_OUT: (
        409,
        _FINAL,
        "The operation's deadline had passed when the command was recorded.",
        "Close operations in time, or configure a longer timeout or late_close.",
    ),
    Code.RESOURCE_UNIT_MISMATCH: (
        422,
        _AGAIN,
        "The resource unit differs from the one of the operation's rate.",
        "Use the resource unit of the operation type.",
    ),
    Code.WORKFLOW_MISMATCH: (
        422,
        _AGAIN,
        "The workflow differs from the one the operation was opened with.",
        "Leave workflow_id out, or give the one of the Open.",
    ),
    Code.ALREADY_REVERSED: (
        409,
        _FINAL,
        "Nothing is left to reverse.",
        "Look at the purchase's earlier refunds and chargebacks.",
    ),
    Code.AMOUNT_EXCEEDS_PURCHASE: (
        422,
        _AGAIN,
        "Refunds and chargebacks together would exceed the purchase.",
        "Lower the amount to what is left of the purchase, or leave it out.",
    ),
    Code.EFFECTIVE_IN_PAST: (
        422,
        _FINAL,
        "An effective date lies in the past.",
        "Use a time from now on, or leave it out.",
    ),
    Code.PERIOD_OVERLAP: (
        409,
        _AGAIN,
        "The period overlaps one that exists.",
        "Archive the existing row first, or choose another time.",
    ),
    Code.IMMUTABLE: (
        409,
        _FINAL,
        "This can't be changed once it exists.",
        "Create a new object under a new code.",
    ),
    Code.VERSION_CONFLICT: (
        409,
        _AGAIN,
        "The configuration is at another version than expected.",
        "Read the current version, merge, and send it with that expected_version.",
    ),
    Code.NOT_DUE: (409, _AGAIN, "It is not due yet.", "Wait until it is due."),
    Code.DEPENDENCY_TIMEOUT: (
        504,
        _AGAIN,
        "The command this one depends on did not come in time.",
        "Send the missing command, then this one again in a new message.",
    ),
    Code.INTERNAL_ERROR: (
        500,
        _AGAIN,
        "The service failed on this command; nothing was changed.",
        "Report it with the command's id; send it again in a new message later.",
    ),
    Code.UNAUTHENTICATED: (401, _FINAL, "No valid credentials were given.", "Send a valid bearer token."),
    Code.FORBIDDEN: (403, _FINAL, "The role does not allow this.", "Use a principal with a suitable role."),
    Code.NOT_FOUND: (404, _FINAL, "There is nothing at this address.", "Correct the path."),
    Code.UNKNOWN_USER: (404, _AGAIN, "No such user is known.", "Correct the user id."),
    Code.INVALID_PARAMETER: (400, _FINAL, "A query parameter is not acceptable.", "Correct the named parameter."),
    Code.INVALID_CURSOR: (
        400,
        _FINAL,
        "The cursor is not one of this list.",
        "Start from the first page.",
    ),
    Code.RATE_LIMITED: (429, _AGAIN, "Too many requests.", "Wait as long as Retry-After says."),
}

_FIRST_HTTP_ONLY = list(Code).index(Code.UNAUTHENTICATED)

REGISTRY: Mapping[Code, ErrorInfo] = MappingProxyType(
    {code: ErrorInfo(code, rank, *_TABLE[code], rank >= _FIRST_HTTP_ONLY) for rank, code in enumerate(Code)}
)


class Refusal(Exception):  # noqa: N818 - a refusal is an answer, not an error of ours.
    """Why a command is not applied: a value that decisions return or raise.

    `message` is for people and never repeats free text or identifiers of the payload; `details` is for programs:
    names to booleans, integers, strings, lists of strings or one more level of such an object of strings.
    """

    __slots__ = ("code", "details", "message")

    def __init__(self, code: Code, message: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message or REGISTRY[code].meaning
        self.details: dict[str, Any] = details or {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Refusal):
            return NotImplemented
        return (self.code, self.message, self.details) == (other.code, other.message, other.details)

    def __hash__(self) -> int:
        return hash(self.code)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
