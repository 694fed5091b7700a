"""The types a payload's members are made of: each checks one value and normalises it.

An error's type is the code it is refused with; every type pydantic knows itself counts as `malformed`, except that the
bounds of numbers are `limit_exceeded`.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final

from iso3166 import countries_by_alpha2
from pydantic import AfterValidator, Field, PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

from schemas.errors import Code
from schemas.money import EXPONENT_MAX, EXPONENTS
from schemas.sensitive import is_card_number, redact
from schemas.topics import is_merchant_id

CREDITS_MAX: Final = 10**12
ACCESS_PERIOD_DAYS_MAX: Final = 36_500
MONEY_LIMIT: Final = Decimal(10**15)
CREDITS_PER_UNIT_MAX: Final = Decimal(10**6)
_RESOURCE_AMOUNT_LIMIT: Final = Decimal(10**15)
SECONDS_MAX: Final = 100 * 366 * 86_400
EVERYWHERE: Final = "*"

_RATE_PLACES = 6
_DECIMAL_LENGTH_MAX = 40
_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?\Z")
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt](?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])\Z"
)
# The database driver writes the first and the last instant of the calendar as infinities, which it reads back without a
# zone: no comparison with another time would work any more.
_INFINITIES: Final = frozenset((datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)))
# ISO 3166-1 has no XK; the data set adds it as everybody's private code.
COUNTRIES: Final = frozenset(countries_by_alpha2) - {"XK"}


def malformed(message: str) -> PydanticCustomError:
    """Return the error for a value that is not what its member asks for."""
    return PydanticCustomError(Code.MALFORMED.value, message)


def limit_exceeded(message: str) -> PydanticCustomError:
    """Return the error for a number beyond its bound."""
    return PydanticCustomError(Code.LIMIT_EXCEEDED.value, message)


def _no_card_number(text: str) -> str:
    if len(text) >= 13 and is_card_number(text):
        raise PydanticCustomError(Code.SENSITIVE_DATA.value, "may be a payment card number")
    return text


def _bounded(places: int, limit: Decimal, *, inclusive: bool, zero: bool = False) -> Callable[[Any], Decimal]:
    """Return a check for decimal strings from 0 (exclusive, unless `zero`) to `limit` with so many decimal places."""

    def check(value: Any) -> Decimal:
        if type(value) is Decimal:
            value = format(value, "f")
        if type(value) is not str or _DECIMAL.match(value) is None:
            raise malformed("not a plain decimal string")
        whole, _, fraction = value.partition(".")
        fraction = fraction.rstrip("0")
        number = Decimal(f"{whole}.{fraction}" if fraction else whole)
        if number < 0 or (number == 0 and not zero):
            raise limit_exceeded("must not be negative" if zero else "must be greater than zero")
        if len(fraction) > places:
            raise malformed(f"more than {places} decimal places")
        if number > limit or (number == limit and not inclusive):
            raise limit_exceeded(f"beyond the bound of {limit}")
        if len(value) > _DECIMAL_LENGTH_MAX:
            raise malformed(f"more than {_DECIMAL_LENGTH_MAX} characters")
        return number

    return check


def parse_time(text: str) -> datetime:
    """Return an RFC 3339 time in UTC, truncated to microseconds; a ValueError for anything else."""
    if _TIME.match(text) is None:
        raise ValueError("not an RFC 3339 time with a zone")
    try:
        moment = datetime.fromisoformat(text.upper())
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time out of range") from None


def _time(value: Any) -> datetime:
    if type(value) is str:
        try:
            moment = parse_time(value)
        except ValueError:
            raise malformed("not an RFC 3339 time with a zone") from None
    elif type(value) is datetime and value.tzinfo is not None:
        moment = value.astimezone(UTC)
    else:
        raise malformed("not an RFC 3339 time with a zone")
    if moment in _INFINITIES:
        raise malformed("a time out of range")
    return moment


def _country(code: str) -> str:
    if code not in COUNTRIES:
        raise malformed("not an ISO 3166-1 alpha-2 country code")
    return code


def _country_or_everywhere(code: str) -> str:
    return code if code == EVERYWHERE else _country(code)


def _currency(code: str) -> str:
    if code not in EXPONENTS:
        raise malformed("not an ISO 4217 currency code")
    return code


def _merchant_id(text: str) -> str:
    if not is_merchant_id(text):
        raise malformed("not a merchant id")
    return text


def _credits_delta(value: int) -> int:
    if value == 0:
        raise limit_exceeded("must not be zero")
    if abs(value) > CREDITS_MAX:
        raise limit_exceeded(f"beyond the bound of {CREDITS_MAX}")
    return value


# Characters of identifiers: anything but control characters, so that they can be joined by line breaks.
_ID = StringConstraints(min_length=1, max_length=128, pattern=r"^[^\p{Cc}]*$")
_NO_CARD = AfterValidator(_no_card_number)
_REDACTED = AfterValidator(redact)

Id = Annotated[str, _ID, _NO_CARD]
# The provider's transaction id: whether a numeric one is let through is decided with the merchant's patterns.
ExternalRef = Annotated[str, _ID]
MerchantId = Annotated[str, AfterValidator(_merchant_id)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000), _REDACTED]
OptionalText = Annotated[str, StringConstraints(max_length=1000), _REDACTED]
Url = Annotated[str, StringConstraints(max_length=1000, pattern=r"^https?://[^\s\p{Cc}]+$"), _NO_CARD]
SeriesPrefix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,30}$"), _NO_CARD]
Country = Annotated[str, AfterValidator(_country)]
CountryOrEverywhere = Annotated[str, AfterValidator(_country_or_everywhere)]
Currency = Annotated[str, AfterValidator(_currency)]
Time = Annotated[datetime, PlainValidator(_time)]

Money = Annotated[Decimal, PlainValidator(_bounded(EXPONENT_MAX, MONEY_LIMIT, inclusive=False))]
MoneyOrZero = Annotated[Decimal, PlainValidator(_bounded(EXPONENT_MAX, MONEY_LIMIT, inclusive=False, zero=True))]
Percent = Annotated[Decimal, PlainValidator(_bounded(_RATE_PLACES, Decimal(100), inclusive=True, zero=True))]
CreditsPerUnit = Annotated[Decimal, PlainValidator(_bounded(_RATE_PLACES, CREDITS_PER_UNIT_MAX, inclusive=True))]
# The ceiling proper is configured, and `decode` compares it.
ResourceAmount = Annotated[Decimal, PlainValidator(_bounded(_RATE_PLACES, _RESOURCE_AMOUNT_LIMIT, inclusive=True))]

Credits = Annotated[int, Field(ge=1, le=CREDITS_MAX)]
CreditsDelta = Annotated[int, AfterValidator(_credits_delta)]
Days = Annotated[int, Field(ge=1, le=ACCESS_PERIOD_DAYS_MAX)]
Seconds = Annotated[int, Field(ge=1, le=SECONDS_MAX)]
Version = Annotated[int, Field(ge=0, le=2**31 - 1)]


def fits_currency(amount: Decimal, currency: str) -> bool:
    """Whether the amount has no more decimal places than the currency."""
    return -amount.as_tuple().exponent <= EXPONENTS[currency]  # type: ignore[operator]  # finite by its type
