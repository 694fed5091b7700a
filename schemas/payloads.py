"""The payload of every command, as the wire contract has it, and what the service must know of each command type."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, time
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from schemas.sensitive import is_pattern
from schemas.topics import ALLOWED
from schemas.wire_types import (
    Country,
    CountryOrEverywhere,
    Credits,
    CreditsDelta,
    CreditsPerUnit,
    Currency,
    Days,
    ExternalRef,
    Id,
    MerchantId,
    Money,
    MoneyOrZero,
    OptionalText,
    Percent,
    ResourceAmount,
    Seconds,
    SeriesPrefix,
    Text,
    Time,
    Url,
    Version,
    fits_currency,
    malformed,
)

Role = Literal["user", "support", "admin", "upstream", "auditor", "metrics"]
TaxRegime = Literal["turnover", "vat", "none"]
TaxCategory = Literal["S", "Z", "E", "AE", "O"]
Shortfall = Literal["debit", "forgive"]

PATTERN_LENGTH_MAX = 200


class Payload(BaseModel):
    """A command's content. Unknown members are ignored; the values are normalised and redacted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def _check_scale(currency: str, amount: Decimal) -> None:
    if not fits_currency(amount, currency):
        raise malformed("the amount has more decimal places than its currency")


# --- purchases and users


class SnapshotTax(Payload):
    """The tax as upstream has charged it."""

    type: Id
    rate: Percent | None = None
    amount: MoneyOrZero | None = None
    note: OptionalText | None = None


class PricingSnapshot(Payload):
    """The price the buyer saw and paid."""

    country: Country
    amount: Money
    currency: Currency
    tax: SnapshotTax | None = None

    @model_validator(mode="after")
    def _scale(self) -> Self:
        _check_scale(self.currency, self.amount)
        if self.tax is not None and self.tax.amount is not None:
            _check_scale(self.currency, self.tax.amount)
        return self


class Buyer(Payload):
    """Who bought, for the receipt. Personal data, apart from everything else."""

    name: OptionalText | None = None
    email: OptionalText | None = None
    country: Country | None = None
    vat_id: Id | None = None
    locale: Id | None = None


class PurchaseSettled(Payload):
    """Money was captured for a product."""

    user_id: Id
    external_ref: ExternalRef
    product_code: Id
    payment_method: Id
    order_placed_at: Time
    settled_at: Time
    pricing_snapshot: PricingSnapshot
    buyer: Buyer | None = None


class UserSignedUp(Payload):
    """A user signed up."""

    user_id: Id
    locale: Id | None = None
    country: Country | None = None


# --- operations


class OperationOpen(Payload):
    """Take the user's operation slot."""

    user_id: Id
    operation_id: Id
    operation_code: Id
    workflow_id: Id | None = None


class OperationRecordAndClose(Payload):
    """Debit what the operation used, and close it."""

    user_id: Id
    operation_id: Id
    resource_amount: ResourceAmount
    resource_unit: Id
    completed_at: Time
    workflow_id: Id | None = None


class OperationCancel(Payload):
    """Close the operation without a debit."""

    user_id: Id
    operation_id: Id
    reason: OptionalText | None = None


# --- credits by hand


class GrantApply(Payload):
    """Give credits: from a grant product, or so many for so many days."""

    grant_id: Id
    user_id: Id
    product_code: Id | None = None
    credits: Credits | None = None
    access_period_days: Days | None = None
    justification: Text
    actor: Text

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        ad_hoc = (self.credits is not None, self.access_period_days is not None)
        if any(ad_hoc) if self.product_code is not None else not all(ad_hoc):
            raise malformed("needs either product_code, or credits and access_period_days")
        return self


class AdjustmentApply(Payload):
    """Correct a balance, up by a lot or down by a debit."""

    adjustment_id: Id
    user_id: Id
    credits_delta: CreditsDelta
    access_period_days: Days | None = None
    justification: Text
    actor: Text

    @model_validator(mode="after")
    def _period_of_a_lot(self) -> Self:
        if self.credits_delta > 0 and self.access_period_days is None:
            raise malformed("a positive credits_delta needs access_period_days")
        return self


class RefundApply(Payload):
    """Money of a purchase was paid back; without an amount all that is left of it."""

    refund_id: Id
    external_ref: ExternalRef
    amount: Money | None = None
    justification: Text
    actor: Text


class ChargebackApply(Payload):
    """A purchase's payment was disputed and taken back."""

    dispute_id: Id
    external_ref: ExternalRef
    amount: Money | None = None
    category: OptionalText | None = None
    justification: Text
    actor: Text


class ChargebackReverse(Payload):
    """The dispute was won."""

    dispute_id: Id
    justification: Text
    actor: Text


# --- catalog


class Price(Payload):
    """A product's tax-inclusive price in a country, or everywhere else."""

    country: CountryOrEverywhere
    currency: Currency
    amount: Money

    @model_validator(mode="after")
    def _scale(self) -> Self:
        _check_scale(self.currency, self.amount)
        return self


class ProductCreate(Payload):
    """Create a lot template."""

    product_code: Id
    title: Text
    credits: Credits
    access_period_days: Days
    distribution: Literal["sellable", "grant"]
    grant_policy: Literal["apply_on_signup", "manual_grant"] | None = None
    effective_at: Time | None = None
    archived_at: Time | None = None
    prices: list[Price] = []
    actor: Text

    @model_validator(mode="after")
    def _distribution(self) -> Self:
        if self.distribution == "grant" and (self.grant_policy is None or self.prices):
            raise malformed("a grant product needs grant_policy and has no prices")
        if self.distribution == "sellable" and self.grant_policy is not None:
            raise malformed("a sellable product has no grant_policy")
        if self.effective_at is not None and self.archived_at is not None and self.archived_at <= self.effective_at:
            raise malformed("archived_at must be later than effective_at")
        return self


class ProductArchive(Payload):
    """End a product, now or at a time."""

    product_code: Id
    archived_at: Time | None = None
    actor: Text


class ProductPriceCreate(Payload):
    """Add a price row."""

    product_code: Id
    country: CountryOrEverywhere
    currency: Currency
    amount: Money
    effective_at: Time | None = None
    actor: Text

    @model_validator(mode="after")
    def _scale(self) -> Self:
        _check_scale(self.currency, self.amount)
        return self


class ProductPriceArchive(Payload):
    """End a price row: the one that begins at effective_at, or else the active one."""

    product_code: Id
    country: CountryOrEverywhere
    currency: Currency
    effective_at: Time | None = None
    archived_at: Time | None = None
    actor: Text


class OperationTypeCreateWithArchival(Payload):
    """Create a version of an operation type, which ends the one before it."""

    operation_code: Id
    display_name: Text
    resource_unit: Id
    credits_per_unit: CreditsPerUnit
    minimum_charge: Credits = 1
    workflow_type: Id | None = None
    effective_at: Time | None = None
    actor: Text


class OperationTypeArchive(Payload):
    """End a version of an operation type: the one that begins at effective_at, or else the active one."""

    operation_code: Id
    effective_at: Time | None = None
    archived_at: Time | None = None
    actor: Text


# --- merchants


class Address(Payload):
    """A postal address."""

    lines: list[OptionalText]
    city: Text
    postal_code: Id | None = None
    country: Country


class VatRate(Payload):
    """A rate of value added tax for a country, or everywhere else."""

    country: CountryOrEverywhere
    rate: Percent
    category: TaxCategory | None = None
    valid_from: Time | None = None
    valid_to: Time | None = None


class RefundPolicy(Payload):
    """What happens to credits of a refunded purchase that are spent already."""

    shortfall: Shortfall = "debit"


class ChargebackPolicy(Payload):
    """What happens to credits of a disputed purchase that are spent already, and whether a credit note is issued."""

    shortfall: Shortfall = "debit"
    credit_note: Literal["never", "on_apply"] = "never"


@lru_cache(maxsize=1024)
def _is_time_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True


def _time_zone(name: str) -> str:
    if not _is_time_zone(name):
        raise malformed("not a time zone of the IANA database")
    return name


def _locale(name: str) -> str:
    try:
        Locale.parse(name.replace("-", "_"))
    except (ValueError, UnknownLocaleError):
        raise malformed("not a known locale") from None
    return name


def _pattern(regex: str) -> str:
    if not is_pattern(regex):
        raise malformed("not a regular expression, or one with look-around or back-references")
    return regex


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=PATTERN_LENGTH_MAX), AfterValidator(_pattern)]
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


class MerchantConfig(Payload):
    """A merchant's whole configuration: legal block, documents, tax, operations, policies."""

    legal_name: Text
    registered_address: Address
    country: Country
    time_zone: Annotated[str, StringConstraints(max_length=128), AfterValidator(_time_zone)]
    locale: Annotated[str, StringConstraints(max_length=128), AfterValidator(_locale)]
    contact_email: Text
    tax_regime: TaxRegime
    vat_rates: list[VatRate] = []
    tax_status_note: OptionalText | None = None
    receipt_series_prefix: SeriesPrefix
    credit_note_series_prefix: SeriesPrefix
    retention_years: Annotated[int, Field(ge=1, le=100)]
    operation_timeout_minutes: Annotated[int, Field(ge=1, le=525_600)] = 15
    late_close: Literal["refuse", "debit"] = "refuse"
    refund_policy: RefundPolicy = RefundPolicy()
    chargeback_policy: ChargebackPolicy = ChargebackPolicy()
    external_ref_patterns: dict[Id, Pattern] = {}

    @model_validator(mode="before")
    @classmethod
    def _dates_are_local_midnights(cls, config: Any) -> Any:
        """Let the validity of rates be given by dates: a tax year begins at midnight of the merchant's time zone."""
        if type(config) is not dict or type(config.get("vat_rates")) is not list:
            return config
        zone = config.get("time_zone")
        if type(zone) is not str or len(zone) > 128 or not _is_time_zone(zone):
            return config
        return config | {"vat_rates": [_with_midnights(rate, ZoneInfo(zone)) for rate in config["vat_rates"]]}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.receipt_series_prefix == self.credit_note_series_prefix:
            raise malformed("receipts and credit notes need different series prefixes")
        if self.tax_regime == "vat" and not self.vat_rates:
            raise malformed("the vat regime needs vat_rates")
        return self


def _with_midnights(rate: Any, zone: ZoneInfo) -> Any:
    if type(rate) is not dict:
        return rate
    return {
        name: _midnight(value, zone) if name in ("valid_from", "valid_to") else value for name, value in rate.items()
    }


def _midnight(value: Any, zone: ZoneInfo) -> Any:
    if type(value) is not str or _DATE.match(value) is None:
        return value
    try:
        return datetime.combine(datetime.fromisoformat(value), time(), zone)
    except ValueError:
        return value


class MerchantConfigure(Payload):
    """Replace the whole configuration; the next version."""

    expected_version: Version | None = None
    config: MerchantConfig
    actor: Text


class MerchantRegister(Payload):
    """Create a merchant."""

    merchant_id: MerchantId
    config: MerchantConfig
    partitions: Annotated[int, Field(ge=1, le=64)] = 4
    simulated: bool = False
    actor: Text


class ClockAdvance(Payload):
    """Move a simulated merchant's clock forward."""

    merchant_id: MerchantId
    seconds: Seconds
    actor: Text


class MerchantSuspend(Payload):
    """Stop consuming a merchant's topics."""

    merchant_id: MerchantId
    justification: Text
    actor: Text


class MerchantResume(Payload):
    """Consume a merchant's topics again."""

    merchant_id: MerchantId
    justification: Text
    actor: Text


# --- roles, accounts, documents


class UserRoleAssign(Payload):
    """Give a subject a role."""

    subject: Id
    role: Role
    actor: Text


class UserRoleRevoke(Payload):
    """Take a role from a subject."""

    subject: Id
    role: Role
    actor: Text


class AccountLock(Payload):
    """Let the user open no operations, for ever or until a time."""

    user_id: Id
    justification: Text
    until: Time | None = None
    actor: Text


class AccountUnlock(Payload):
    """Let the user open operations again."""

    user_id: Id
    justification: Text
    actor: Text


class UserErase(Payload):
    """Forget who the user is."""

    request_id: Id
    user_id: Id
    justification: Text
    actor: Text


class ReceiptAttachFiscal(Payload):
    """Attach an authority's fiscal receipt to a document."""

    receipt_number: Id
    kind: Literal["sale", "prepayment", "return"]
    fiscal_number: Id
    authority: Text
    register_number: Id | None = None
    qr_url: Url | None = None
    fiscal_at: Time
    actor: Text


# --- the system's own jobs


class LotExpire(Payload):
    """Write the expiry of a lot that is due."""

    user_id: Id
    lot_id: Id


class OperationExpire(Payload):
    """Time out an operation that is overdue."""

    user_id: Id
    operation_id: Id


class CommandResolve(Payload):
    """Decide a parked command, or give it up."""

    source: Id
    id: Id


# --- the table of commands


PayloadModel = type[Payload]


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """What holds for one command type.

    `business_key` gives the key of the act within its command type, None where there is none; `record_key` the key of
    the Kafka record, which decides its partition.
    """

    type: str
    model: PayloadModel
    channel: str
    business_key: Callable[[Any], str | None]
    record_key: Callable[[Any], str]
    user_field: bool


# Model, member(s) of the business key, member of the record key where the command has no user_id ("": none).
_COMMANDS: dict[str, tuple[type[Payload], tuple[str, ...], str]] = {
    "Purchase.Settled": (PurchaseSettled, ("external_ref",), ""),
    "User.SignedUp": (UserSignedUp, ("user_id",), ""),
    "Operation.Open": (OperationOpen, ("operation_id",), ""),
    "Operation.RecordAndClose": (OperationRecordAndClose, ("operation_id",), ""),
    "Operation.Cancel": (OperationCancel, ("operation_id",), ""),
    "Grant.Apply": (GrantApply, ("grant_id",), ""),
    "Adjustment.Apply": (AdjustmentApply, ("adjustment_id",), ""),
    "Refund.Apply": (RefundApply, ("refund_id",), "refund_id"),
    "Chargeback.Apply": (ChargebackApply, ("dispute_id",), "dispute_id"),
    "Chargeback.Reverse": (ChargebackReverse, ("dispute_id",), "dispute_id"),
    "Product.Create": (ProductCreate, ("product_code",), "product_code"),
    "Product.Archive": (ProductArchive, (), "product_code"),
    "ProductPrice.Create": (ProductPriceCreate, (), "product_code"),
    "ProductPrice.Archive": (ProductPriceArchive, (), "product_code"),
    "OperationType.CreateWithArchival": (OperationTypeCreateWithArchival, (), "operation_code"),
    "OperationType.Archive": (OperationTypeArchive, (), "operation_code"),
    "Merchant.Configure": (MerchantConfigure, (), ""),
    "Merchant.Register": (MerchantRegister, ("merchant_id",), "merchant_id"),
    "Clock.Advance": (ClockAdvance, (), "merchant_id"),
    "Merchant.Suspend": (MerchantSuspend, (), "merchant_id"),
    "Merchant.Resume": (MerchantResume, (), "merchant_id"),
    "UserRole.Assign": (UserRoleAssign, (), "subject"),
    "UserRole.Revoke": (UserRoleRevoke, (), "subject"),
    "Account.Lock": (AccountLock, (), ""),
    "Account.Unlock": (AccountUnlock, (), ""),
    "User.Erase": (UserErase, ("request_id",), ""),
    "Receipt.AttachFiscal": (ReceiptAttachFiscal, ("receipt_number", "kind", "fiscal_number"), "receipt_number"),
    "Lot.Expire": (LotExpire, (), ""),
    "Operation.Expire": (OperationExpire, (), ""),
    "Command.Resolve": (CommandResolve, (), "id"),
}


def _key_of(members: tuple[str, ...]) -> Callable[[Any], str | None]:
    """Return the join of the members. Identifiers hold no control characters, so a line break joins unambiguously."""
    if not members:
        return lambda _: None
    if len(members) == 1:
        return lambda payload: payload.__dict__[members[0]]
    return lambda payload: "\n".join(payload.__dict__[member] for member in members)


def _spec(command_type: str) -> CommandSpec:
    model, key_members, record_key = _COMMANDS[command_type]
    (channel,) = (channel for channel, types in ALLOWED.items() if command_type in types)
    has_user = "user_id" in model.model_fields
    by = "user_id" if has_user else record_key
    return CommandSpec(
        command_type,
        model,
        channel,
        _key_of(key_members),
        # Without a key of their own, all commands of the type share a partition and so keep their order.
        lambda payload: payload.__dict__[by] if by else command_type,
        has_user,
    )


COMMANDS: Mapping[str, CommandSpec] = MappingProxyType({name: _spec(name) for name in _COMMANDS})
