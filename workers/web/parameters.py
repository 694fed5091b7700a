"""Query parameters: how each is read from its text, and how it is described."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from multidict import MultiMapping

from schemas.errors import Code
from schemas.wire_types import COUNTRIES, parse_time
from workers.web.problems import problem

LIMIT_DEFAULT = 50
LIMIT_MAX = 200
SEQ_MAX = 10**15
CURSOR_LENGTH_MAX = 2048

ID_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]*$"
TIME_PATTERN = (
    r"^[12][0-9]{3}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
_ID = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}\Z")
_NUMBER = re.compile(r"[0-9]{1,16}\Z")


@dataclass(frozen=True)
class Parameter:
    """One query parameter. ``read`` turns its text into a value, or raises ValueError saying what is wrong."""

    name: str
    meaning: str
    schema: Mapping[str, Any]
    read: Callable[[str], Any]
    required: bool = False


def is_id(text: str) -> bool:
    """Whether a text may be an identifier of a caller: 1 to 128 characters, none of them a control character."""
    return _ID.match(text) is not None


def _read_id(text: str) -> str:
    if not is_id(text):
        raise ValueError("has 1 to 128 characters and no control characters")
    return text


def _read_time(text: str) -> datetime:
    return parse_time(text)


def identifier(name: str, meaning: str, *, required: bool = False) -> Parameter:
    schema = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": ID_PATTERN}
    return Parameter(name, meaning, schema, _read_id, required)


def choice(name: str, meaning: str, *values: str) -> Parameter:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"is one of {', '.join(values)}")
        return text

    return Parameter(name, meaning, {"type": "string", "enum": list(values)}, read)


def flag(name: str, meaning: str) -> Parameter:
    def read(text: str) -> bool:
        if text not in ("true", "false"):
            raise ValueError("is true or false")
        return text == "true"

    return Parameter(name, meaning, {"type": "boolean", "default": False}, read)


def number(name: str, meaning: str, *, minimum: int, maximum: int, default: int | None = None) -> Parameter:
    def read(text: str) -> int:
        if _NUMBER.match(text) is None or not minimum <= int(text) <= maximum:
            raise ValueError(f"is a whole number from {minimum} to {maximum}")
        return int(text)

    schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return Parameter(name, meaning, schema if default is None else schema | {"default": default}, read)


def time(name: str, meaning: str) -> Parameter:
    schema = {"type": "string", "format": "date-time", "pattern": TIME_PATTERN}
    return Parameter(name, meaning, schema, _read_time)


def some_of(name: str, meaning: str, *values: str) -> Parameter:
    def read(text: str) -> list[str]:
        given = text.split(",")
        if not set(given) <= set(values) or len(set(given)) < len(given):
            raise ValueError(f"is a comma-separated list of {', '.join(values)}, each at most once")
        return given

    items = {"type": "string", "enum": list(values)}
    schema = {"type": "array", "items": items, "uniqueItems": True, "minItems": 1}
    return Parameter(name, meaning, schema, read)


def country(name: str, meaning: str) -> Parameter:
    def read(text: str) -> str:
        if text not in COUNTRIES:
            raise ValueError("is an ISO 3166-1 alpha-2 country code")
        return text

    return Parameter(name, meaning, {"type": "string", "pattern": "^[A-Z]{2}$"}, read)


def cursor(name: str, meaning: str) -> Parameter:
    schema = {"type": "string", "maxLength": CURSOR_LENGTH_MAX}
    # Whether it is one is for whoever reads it to say: that is another error.
    return Parameter(name, meaning, schema, lambda text: text)


LIMIT = number("limit", "How many items to return at most.", minimum=1, maximum=LIMIT_MAX, default=LIMIT_DEFAULT)
CURSOR = cursor("cursor", "The next_cursor of the page before; the other parameters, but limit, stay the same.")
FROM = time("from", "Only what happened at this time or later.")
TO = time("to", "Only what happened before this time.")
AS_OF_SEQ = number(
    "as_of_seq", "As it was right after this entry of the user; 0 is before the first.", minimum=0, maximum=SEQ_MAX
)
AS_OF = time("as_of", "As it was at this time.")
MIN_SEQ = number(
    "min_seq",
    "Wait, for at most two seconds, until the user has reached this user_seq: to read what a result reported.",
    minimum=0,
    maximum=SEQ_MAX,
)


def read_query(parameters: Mapping[str, Parameter], query: MultiMapping[str]) -> dict[str, Any]:
    """Read a query; raises ``invalid_parameter`` for one that is unknown, repeated, missing or not acceptable."""
    values: dict[str, Any] = {}
    for name, text in query.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise problem(
                Code.INVALID_PARAMETER,
                "there is no such parameter here",
                parameter=name[:128],
                known=sorted(parameters),
            )
        if name in values:
            raise problem(Code.INVALID_PARAMETER, f"{name} is given more than once", parameter=name)
        try:
            values[name] = parameter.read(text)
        except ValueError as error:
            raise problem(Code.INVALID_PARAMETER, f"{name} {error}", parameter=name) from None
    for name, parameter in parameters.items():
        if parameter.required and name not in values:
            raise problem(Code.INVALID_PARAMETER, f"{name} is missing", parameter=name)
    if "from" in values and "to" in values and values["from"] > values["to"]:
        raise problem(Code.INVALID_PARAMETER, "from is later than to", parameter="from")
    return values
