"""Money: decimal amounts whose scale fits their currency.

ISO 4217 says how many decimal places a currency has; locale data disagrees for some, so it is not asked.
"""

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Context, Decimal
from types import MappingProxyType

from iso4217 import Currency

# Codes without a minor unit (precious metals, testing, "no currency") are no money here.
EXPONENTS: Mapping[str, int] = MappingProxyType(
    {currency.code: currency.exponent for currency in Currency if currency.exponent is not None}
)
EXPONENT_MAX = max(EXPONENTS.values())

# Wide enough for any amount of the wire; the process-wide context must not round behind our back.
_WIDE = Context(prec=80, rounding=ROUND_HALF_UP)
_UNITS = tuple(Decimal(1).scaleb(-places) for places in range(EXPONENT_MAX + 1))


def exponent(currency: str) -> int:
    """Return the number of decimal places of a currency; an unknown one is a KeyError."""
    return EXPONENTS[currency]


def quantize(amount: Decimal, currency: str) -> Decimal:
    """Round half up (away from zero) to the currency's minor unit."""
    return amount.quantize(_UNITS[EXPONENTS[currency]], ROUND_HALF_UP, _WIDE)


def format_amount(amount: Decimal, currency: str) -> str:
    """Return the amount with exactly the currency's digits; one that does not fit them is a ValueError."""
    return format(from_minor(to_minor(amount, currency), currency), "f")


def to_minor(amount: Decimal, currency: str) -> int:
    """Return the amount in minor units; one that does not fit them is a ValueError."""
    minor = amount.scaleb(EXPONENTS[currency], _WIDE)
    if minor != minor.to_integral_value():
        raise ValueError(f"the amount has more decimal places than {currency}")
    return int(minor)


def from_minor(minor: int, currency: str) -> Decimal:
    """Return the amount of so many minor units, with exactly the currency's digits."""
    return Decimal(minor).scaleb(-EXPONENTS[currency], _WIDE)
