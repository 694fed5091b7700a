"""Payment card data is found however it is written, and never kept."""

from typing import Any

import pytest

from schemas.errors import Code
from schemas.fingerprint import member_names
from schemas.payloads import COMMANDS
from schemas.sensitive import is_card_member, is_card_number, redact
from tests.unit.test_schemas_messages import CARD, TYPES, as_json, read, refusal, sample

CARD_NAMES = [
    "pan", "PAN", "card_pan", "cardPan", "card_number", "cardNumber",
    "CardNumber", "CARD-NUMBER", "cardnumber", "cc_number", "ccnumber", "cc-num",
    "credit_card_number", "creditCard", "debit_card", "cvv", "CVV2", "cvvCode",
    "cvc", "cvc2", "customer_cvv", "security_code", "cardSecurityCode", "card_verification_value",
    "track1", "Track2", "track_2", "track2Data", "track_data", "magstripe",
    "magStripeData", "pin", "pin_block", "PINBlock", "primary_account_number", "card_expiry",
    "cardholder_name", "creditcardnumber", "CREDITCARDNUMBER", "paymentcardnumber", "cardcvv", "pannumber",
    "cardsecuritycode",
]  # fmt: skip
OTHER_NAMES = [
    "company", "japan", "span", "pancake", "card_brand", "last4",
    "card_type", "shipping", "tracking", "track", "trackId", "opinion",
    "accounting", "number", "security", "code", "cvs", "discard_number",
]  # fmt: skip
CARDS = [CARD, "378282246310005", "6011000990139424", "4222222222222", "6304000000000000018"]


@pytest.mark.parametrize("card", CARDS)
def test_a_right_check_digit_makes_thirteen_to_nineteen_digits_a_card_number(card: str) -> None:
    wrong = card[:-1] + str((int(card[-1]) + 1) % 10)

    assert is_card_number(card)
    assert not is_card_number(wrong)
    assert not is_card_number(card + " ")


@pytest.mark.parametrize("text", ["", "0", "424242424242", "42424242424242424242", "4242-4242-4242-4242", "pi_" + CARD])
def test_other_lengths_and_characters_are_no_card_number(text: str) -> None:
    assert not is_card_number(text)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (CARD, "[redacted]"),
        (f"card {CARD}.", "card [redacted]."),
        (f"x{CARD}y", "x[redacted]y"),
        ("4111 1111 1111 1111", "[redacted]"),
        ("4111-1111-1111-1111", "[redacted]"),
        ("4111 1111-1111 1111", "[redacted]"),
        ("4111\u00a01111\u20111111\u20131111", "[redacted]"),
        ("4111 - 1111 - 1111 - 1111", "[redacted]"),
        ("3782 822463 10005", "[redacted]"),
        ("4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", "[redacted]"),
        ("1 4111 1111 1111 1111 23", "1 [redacted] 23"),
        ("№ 17 4111 1111 1111 1111", "№ 17 [redacted]"),
        (f"{CARD} and 5500-0000-0000-0004", "[redacted] and [redacted]"),
        ("٤١١١١١١١١١١١١١١١", "[redacted]"),
        ("4111111111111112", "4111111111111112"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("2026-03-01 10:15:30", "2026-03-01 10:15:30"),
        ("+374 10 123456", "+374 10 123456"),
        ("no digits", "no digits"),
        ("", ""),
    ],
)
def test_text_loses_what_may_be_a_card_number_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted


@pytest.mark.parametrize(
    "name",
    CARD_NAMES,
)
def test_names_of_card_data_are_known_in_every_spelling(name: str) -> None:
    assert is_card_member(name)


@pytest.mark.parametrize(
    "name",
    OTHER_NAMES,
)
def test_other_names_are_no_card_data(name: str) -> None:
    assert not is_card_member(name)


def test_none_of_our_own_members_is_named_like_card_data() -> None:
    names = {name for command in COMMANDS for path in member_names(command) for name in path.split(".")}

    assert not [name for name in names if is_card_member(name)]


@pytest.mark.parametrize("name", TYPES)
def test_a_member_named_like_card_data_is_refused_in_every_command_at_any_depth(name: str) -> None:
    for extra in ({"cvv": "123"}, {"payment": {"cardNumber": 1}}, {"list": [[{"track_2": None, "pan": "x"}]]}):
        error = refusal(name, sample(name) | extra)
        assert error is not None
        assert error.code is Code.SENSITIVE_DATA


def test_a_member_of_an_inner_object_named_like_card_data_is_refused() -> None:
    buyer = {"name": "Ani", "card_number": "x"}

    error = refusal("Purchase.Settled", sample("Purchase.Settled", buyer=buyer))

    assert error is not None
    assert error.code is Code.SENSITIVE_DATA


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("Operation.Open", "user_id"),
        ("Operation.Open", "operation_id"),
        ("Operation.Open", "operation_code"),
        ("Operation.Open", "workflow_id"),
        ("Purchase.Settled", "external_ref"),
        ("Purchase.Settled", "product_code"),
        ("Refund.Apply", "external_ref"),
        ("Chargeback.Apply", "external_ref"),
        ("Refund.Apply", "refund_id"),
        ("Receipt.AttachFiscal", "fiscal_number"),
        ("Lot.Expire", "lot_id"),
        ("Command.Resolve", "id"),
    ],
)
def test_an_id_that_may_be_a_card_number_is_refused_and_not_repeated(name: str, member: str) -> None:
    error = refusal(name, sample(name, **{member: CARD}))

    assert error is not None
    assert error.code is Code.SENSITIVE_DATA
    assert error.details == {"fields": [member]}
    assert CARD not in str(error)


@pytest.mark.parametrize("member", ["receipt_series_prefix", "credit_note_series_prefix"])
def test_a_series_prefix_that_may_be_a_card_number_is_refused(member: str) -> None:
    config = sample("Merchant.Configure")["config"] | {member: CARD}

    error = refusal("Merchant.Configure", sample("Merchant.Configure", config=config))

    assert error is not None
    assert error.code is Code.SENSITIVE_DATA


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        ({}, False),
        ({"idbank": "[0-9]{16}"}, False),
        ({"card": "[0-9]{16}"}, True),
        ({"card": "4[0-9]{14}"}, False),
        ({"card": "[0-9]{15}"}, False),
        ({"card": "x|[0-9]+"}, True),
        # Backtracking, this would take hours.
        ({"card": "((([0-9]+)+)+)+x"}, False),
    ],
)
def test_a_purchases_numeric_reference_needs_the_pattern_of_its_payment_method(
    patterns: dict[str, str], allowed: bool
) -> None:
    error = refusal("Purchase.Settled", sample("Purchase.Settled", external_ref=CARD), external_ref_patterns=patterns)

    assert (error is None) is allowed


@pytest.mark.parametrize("name", ["Refund.Apply", "Chargeback.Apply"])
def test_a_reversals_numeric_reference_needs_any_pattern(name: str) -> None:
    patterns = {"card": "pi_.*", "idbank": "[0-9]{16}"}

    assert refusal(name, sample(name, external_ref=CARD), external_ref_patterns=patterns) is None


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("Operation.Cancel", "reason"),
        ("Grant.Apply", "justification"),
        ("Chargeback.Apply", "category"),
        ("Product.Create", "title"),
        ("OperationType.CreateWithArchival", "display_name"),
        ("Receipt.AttachFiscal", "authority"),
    ],
)
def test_free_text_is_redacted(name: str, member: str) -> None:
    payload = read(as_json(name, sample(name, **{member: "was 4111 1111 1111 1111"})), name).payload

    assert getattr(payload, member) == "was [redacted]"


def test_buyer_tax_note_and_address_are_redacted_too() -> None:
    purchase = sample("Purchase.Settled", buyer={"name": CARD, "email": f"{CARD}@example.com"})
    purchase["pricing_snapshot"]["tax"]["note"] = CARD
    config = sample("Merchant.Configure")["config"]
    config["registered_address"] |= {"lines": [CARD, "x"], "city": CARD}

    settled = read(as_json("Purchase.Settled", purchase), "Purchase.Settled").payload
    address = read(
        as_json("Merchant.Configure", sample("Merchant.Configure", config=config)), "Merchant.Configure"
    ).payload.config.registered_address

    assert (settled.buyer.name, settled.buyer.email) == ("[redacted]", "[redacted]@example.com")
    assert settled.pricing_snapshot.tax.note == "[redacted]"
    assert (address.lines, address.city) == (["[redacted]", "x"], "[redacted]")


@pytest.mark.parametrize("value", [CARD, "4111 1111 1111 1111", int(CARD), {"number": CARD}])
def test_unknown_members_are_left_out_whatever_they_hold(value: Any) -> None:
    incoming = read(as_json("Operation.Open", sample("Operation.Open", comment=value)))

    assert incoming.error is None
    assert CARD not in repr(incoming.payload)
