"""The shapes of a result's `effects`, one per command type; members named as in the wire contract.

Identifiers, times, money and rates are strings, credits are integers. A shape's name is that of its Avro record.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, NotRequired, TypedDict

from schemas.payloads import MerchantConfig


class PurchaseEffects(TypedDict):
    """The lot a purchase issued, and its receipt."""

    lot_id: str
    entry_id: str
    credits: int
    expires_at: str
    receipt_number: str


class SignupGrant(TypedDict):
    """One grant of a sign-up."""

    product_code: str
    lot_id: str
    entry_id: str
    credits: int


class SignupEffects(TypedDict):
    """The grants of a sign-up, none for a user who had them before."""

    grants: list[SignupGrant]


class OperationOpenEffects(TypedDict):
    """The operation with the rate it captured."""

    operation_id: str
    expires_at: str
    credits_per_unit: str
    resource_unit: str


class OperationCloseEffects(TypedDict):
    """The debit of an operation."""

    operation_id: str
    entry_id: str
    credits: int


class OperationStateEffects(TypedDict):
    """An operation that ended without a debit."""

    operation_id: str
    state: NotRequired[str]


class CreditEffects(TypedDict):
    """The entry of a grant or an adjustment, and the lot it issued; credits are absolute."""

    entry_id: str
    lot_id: NotRequired[str]
    credits: int


class ReversalEffects(TypedDict):
    """What a refund or a chargeback took."""

    entry_id: NotRequired[str]
    credits_taken: int
    credits_due: int
    credit_note_number: NotRequired[str]


class ReversalUndoneEffects(TypedDict):
    """What a won dispute gave back."""

    entry_id: NotRequired[str]
    lot_id: NotRequired[str]
    credits: int


class LotExpiryEffects(TypedDict):
    """What expired of a lot; without an entry when nothing was left."""

    entry_id: NotRequired[str]
    lot_id: str
    credits: int


class PriceEffects(TypedDict):
    """A price row; inside its product without the code."""

    product_code: NotRequired[str]
    country: str
    currency: str
    amount: str
    effective_at: str
    archived_at: NotRequired[str]


class ProductEffects(TypedDict):
    """A product, with its prices if it is sellable."""

    product_code: str
    title: str
    credits: int
    access_period_days: int
    distribution: str
    grant_policy: NotRequired[str]
    effective_at: str
    archived_at: NotRequired[str]
    prices: NotRequired[list[PriceEffects]]


class OperationTypeEffects(TypedDict):
    """A version of an operation type."""

    operation_code: str
    display_name: str
    resource_unit: str
    credits_per_unit: str
    minimum_charge: int
    workflow_type: NotRequired[str]
    effective_at: str
    archived_at: NotRequired[str]


class ConfigEffects(TypedDict):
    """A version of a merchant's configuration."""

    version: int
    config: Annotated[dict[str, Any], MerchantConfig]


class MerchantEffects(TypedDict):
    """A merchant as it is registered."""

    merchant_id: str
    state: str
    version: NotRequired[int]
    partitions: NotRequired[int]
    simulated: NotRequired[bool]


class ClockEffects(TypedDict):
    """A simulated merchant's clock."""

    merchant_id: str
    offset_seconds: int
    now: str


class UserRoleEffects(TypedDict):
    """A subject's role; none after it was revoked."""

    subject: str
    role: NotRequired[str]


class AccountEffects(TypedDict):
    """Whether the account is locked, and until when if that is bounded."""

    locked: bool
    until: NotRequired[str]


class ErasureEffects(TypedDict):
    """When the user was erased; the result's user_id is the tombstone."""

    erased_at: str


class FiscalEffects(TypedDict):
    """An authority's fiscal receipt, attached to a document."""

    receipt_number: str
    kind: str
    fiscal_number: str
    authority: str
    register_number: NotRequired[str]
    qr_url: NotRequired[str]
    fiscal_at: str


class ResolveEffects(TypedDict):
    """The parked command that was looked at, and what was decided; no outcome if it waits on."""

    source: str
    id: str
    outcome: NotRequired[str]


EFFECTS: Mapping[str, Any] = MappingProxyType(
    {
        "Purchase.Settled": PurchaseEffects,
        "User.SignedUp": SignupEffects,
        "Operation.Open": OperationOpenEffects,
        "Operation.RecordAndClose": OperationCloseEffects,
        "Operation.Cancel": OperationStateEffects,
        "Grant.Apply": CreditEffects,
        "Adjustment.Apply": CreditEffects,
        "Refund.Apply": ReversalEffects,
        "Chargeback.Apply": ReversalEffects,
        "Chargeback.Reverse": ReversalUndoneEffects,
        "Product.Create": ProductEffects,
        "Product.Archive": ProductEffects,
        "ProductPrice.Create": PriceEffects,
        "ProductPrice.Archive": PriceEffects,
        "OperationType.CreateWithArchival": OperationTypeEffects,
        "OperationType.Archive": OperationTypeEffects,
        "Merchant.Configure": ConfigEffects,
        "Merchant.Register": MerchantEffects,
        "Clock.Advance": ClockEffects,
        "Merchant.Suspend": MerchantEffects,
        "Merchant.Resume": MerchantEffects,
        "UserRole.Assign": UserRoleEffects,
        "UserRole.Revoke": UserRoleEffects,
        "Account.Lock": AccountEffects,
        "Account.Unlock": AccountEffects,
        "User.Erase": ErasureEffects,
        "Receipt.AttachFiscal": FiscalEffects,
        "Lot.Expire": LotExpiryEffects,
        "Operation.Expire": OperationStateEffects,
        "Command.Resolve": ResolveEffects,
    }
)


class CommandName(TypedDict):
    """The message a result repeats."""

    command_source: str
    command_id: str


class Error(TypedDict):
    """Why a command was rejected. Details are scalars, lists of strings or objects of strings."""

    code: str
    message: str
    details: dict[str, Any]


class ExpiredLot(TypedDict):
    """A lot that expired before the command was decided."""

    lot_id: str
    entry_id: str
    credits: int


class TimeEffects(TypedDict):
    """What had come due before the command was decided."""

    expired: NotRequired[list[ExpiredLot]]
    timed_out: NotRequired[list[str]]


class CommandResult(TypedDict):
    """The answer to one command. `effects` is empty for a rejected one."""

    command_id: str
    command_source: str
    command_type: str
    merchant_id: NotRequired[str]
    user_id: NotRequired[str]
    outcome: str
    error: NotRequired[Error]
    replay_of: NotRequired[CommandName]
    user_seq: NotRequired[int]
    balance: NotRequired[int]
    debt: NotRequired[int]
    applied_at: str
    effects: Any
    time_effects: NotRequired[TimeEffects]
