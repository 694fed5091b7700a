"""What may be payment card data, and how it is kept out of everything that is written."""

import re
from functools import lru_cache

from pydantic import ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

REDACTED = "[redacted]"

_LENGTH_MIN = 13
_LENGTH_MAX = 19
# People write card numbers in groups, and word processors replace their spaces and dashes by typographic ones.
_SEPARATOR = r"[\s\-\u2010-\u2015\u2212]"
_RUN = re.compile(rf"\d(?:{_SEPARATOR}{{0,3}}\d){{12,}}")
_GROUP = re.compile(r"\d+")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# Joined words that name card data wherever they stand in a member's name.
_CARD_TERMS = frozenset(
    {
        "pan",
        "primaryaccountnumber",
        "cardnumber",
        "cardnumbers",
        "cardnum",
        "cardno",
        "ccnumber",
        "ccnum",
        "ccno",
        "creditcard",
        "debitcard",
        "cvv",
        "cvc",
        "cav2",
        "securitycode",
        "verificationcode",
        "verificationvalue",
        "cardcode",
        "cvvcode",
        "cvccode",
        "track1",
        "track2",
        "track3",
        "trackdata",
        "magstripe",
        "magstripedata",
        "magneticstripe",
        "magneticstripedata",
        "pinblock",
        "cardpin",
        "cardexpiry",
        "cardexpiration",
        "cardexp",
        "cardholder",
        "cardholdername",
        # Written as one word, where nothing shows the words they are made of.
        "creditcardnumber",
        "creditcardnum",
        "creditcardno",
        "debitcardnumber",
        "paymentcardnumber",
        "bankcardnumber",
        "pannumber",
        "cardpan",
        "cardcvv",
        "cardcvc",
        "cvvnumber",
        "cvcnumber",
        "cardsecuritycode",
        "cardverificationcode",
        "cardverificationvalue",
        "cardexpirydate",
        "cardexpirationdate",
    }
)
# Too short to be looked for inside longer names.
_CARD_NAMES = frozenset({"pin", "cid", "csc", "cvn"})
_TERM_WORDS_MAX = 4


def passes_luhn(digits: str) -> bool:
    """Whether the check digit of the digits is right."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        total += digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4)
    return total % 10 == 0


def is_card_number(text: str) -> bool:
    """Whether the whole text is 13 to 19 digits with a right check digit, as card numbers are."""
    return _LENGTH_MIN <= len(text) <= _LENGTH_MAX and text.isdecimal() and passes_luhn(text)


def redact(text: str) -> str:
    """Replace everything in the text that may be a card number, also with spaces or dashes between its digits."""
    if _RUN.search(text) is None:
        return text
    return _RUN.sub(lambda run: _redact_run(run.group()), text)


def _redact_run(run: str) -> str:
    """Replace the neighbouring groups of a run that together may be a card number; those that overlap as one."""
    groups = [(match.start(), match.end()) for match in _GROUP.finditer(run)]
    out, written = [], 0
    covered_to = 0
    for first, (start, _) in enumerate(groups):
        end = max(covered_to, _card_end(run, groups[first:]))
        if end > start and end > covered_to:
            if start >= covered_to:
                out += [run[written:start], REDACTED]
            covered_to = written = end
    return "".join([*out, run[written:]])


def _card_end(run: str, groups: list[tuple[int, int]]) -> int:
    """Return where the longest card number that begins with the first group ends, 0 for none."""
    digits, found = "", 0
    for start, end in groups:
        digits += run[start:end]
        if len(digits) > _LENGTH_MAX:
            break
        if is_card_number(digits):
            found = end
    return found


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))


def is_pattern(regex: str) -> bool:
    """Whether a regular expression can be matched in linear time.

    A merchant writes it: one that backtracks could hold up all merchants for hours over a single reference.
    """
    try:
        _compiled(regex)
    except SchemaError:
        return False
    return True


def matches_whole(pattern: str, text: str) -> bool:
    """Whether the whole text is of the form of a pattern that `is_pattern` lets through."""
    try:
        _compiled(f"^(?:{pattern})$").validate_python(text)
    except ValidationError:
        return False
    return True


def is_card_member(name: str) -> bool:
    """Whether a member is named like card data, however it is spelled: `cardNumber`, `card_number`, `PAN`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if "".join(words) in _CARD_NAMES:
        return True
    return any(
        "".join(words[first : first + length]) in _CARD_TERMS
        for first in range(len(words))
        for length in range(1, _TERM_WORDS_MAX + 1)
    )
