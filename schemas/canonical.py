"""One text for one value: times, decimals and canonical JSON, as they are sent, hashed and compared."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson


def format_time(moment: datetime) -> str:
    """Return an aware time as RFC 3339 in UTC with six fractional digits and Z."""
    if moment.tzinfo is not UTC:
        if moment.tzinfo is None:
            raise ValueError("a time without a zone")
        moment = moment.astimezone(UTC)
    # On the path of every command; isoformat takes half as long again.
    return "%04d-%02d-%02dT%02d:%02d:%02d.%06dZ" % (  # noqa: UP031
        moment.year,
        moment.month,
        moment.day,
        moment.hour,
        moment.minute,
        moment.second,
        moment.microsecond,
    )


def format_decimal(number: Decimal) -> str:
    """Return a finite number without exponent and without trailing zeros."""
    if not number.is_finite():
        raise ValueError("not a finite number")
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def wire_value(value: Any) -> Any:
    """Return what JSON has no type for as the string that stands for it on the wire."""
    if type(value) is Decimal:
        return format_decimal(value)
    if type(value) is datetime:
        return format_time(value)
    raise TypeError(f"no wire form for {type(value).__name__}")


_PLAIN = orjson.OPT_PASSTHROUGH_DATETIME
_SORTED = _PLAIN | orjson.OPT_SORT_KEYS


def canonical_json(value: Any) -> bytes:
    """Return compact UTF-8 JSON with sorted members; decimals by value, times in UTC."""
    return orjson.dumps(value, wire_value, _SORTED)


def compact_json(value: Any) -> bytes:
    """Return compact UTF-8 JSON with the members in the order given."""
    return orjson.dumps(value, wire_value, _PLAIN)
