"""Error registry, topics, money and outgoing events."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from uuid import NAMESPACE_URL, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import events, topics
from schemas.codec import Encoding
from schemas.envelope import Undeliverable, decode
from schemas.errors import REGISTRY, Code, Refusal
from schemas.money import EXPONENTS, exponent, format_amount, from_minor, quantize, to_minor
from schemas.payloads import COMMANDS
from tests.unit.test_schemas_messages import Record, context, sample

AT = datetime(2026, 3, 1, 10, 15, 30, 123456, tzinfo=UTC)


def test_every_code_is_explained_and_ranked_in_the_order_of_precedence() -> None:
    assert list(REGISTRY) == list(Code)
    assert [info.rank for info in REGISTRY.values()] == list(range(len(Code)))
    assert all(info.meaning.endswith(".") and info.fix.endswith(".") for info in REGISTRY.values())
    assert all(400 <= info.http_status < 600 for info in REGISTRY.values())
    assert [code for code, info in REGISTRY.items() if info.http_only] == list(Code)[-7:]


def test_a_refusal_is_a_value_and_an_exception() -> None:
    refusal = Refusal(Code.NOT_DUE, details={"expires_at": "x"})

    assert refusal == Refusal(Code.NOT_DUE, "", {"expires_at": "x"})
    assert refusal != Refusal(Code.NOT_DUE)
    with pytest.raises(Refusal, match="not_due: It is not due yet"):
        raise refusal


def test_a_merchant_has_eight_topics_and_its_inputs_are_recognised() -> None:
    assert topics.all_topics("acme") == (
        "credits.acme.purchases", "credits.acme.users", "credits.acme.operations", "credits.acme.admin",
        "credits.acme.jobs", "credits.acme.results", "credits.acme.receipts", "credits.acme.dead-letter",
    )  # fmt: skip
    for channel in topics.CHANNELS:
        assert topics.parse_input(topics.input_topic("acme", channel)) == ("acme", channel)
    assert topics.parse_input(topics.CONTROL) == (None, "control")
    assert topics.results_topic(None) == topics.CONTROL_RESULTS


@pytest.mark.parametrize(
    "name",
    ["credits.acme.results", "credits.acme", "acme.users", "credits.Acme.users", "credits.control.users", "", "users",
     "credits.acme.users.users", "credits..users"],
)  # fmt: skip
def test_other_topics_are_no_inputs(name: str) -> None:
    with pytest.raises(ValueError, match="input topic"):
        topics.parse_input(name)


def test_every_command_is_allowed_on_exactly_one_topic() -> None:
    assert sorted(name for names in topics.ALLOWED.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("currency", "places"), [("AMD", 2), ("JPY", 0), ("BHD", 3), ("CLF", 4), ("RSD", 2), ("XOF", 0)]
)
def test_currencies_have_the_exponents_of_iso_4217(currency: str, places: int) -> None:
    assert exponent(currency) == places


@pytest.mark.parametrize("code", ["XXX", "XTS", "XAU", "amd", "", "BTC"])
def test_what_has_no_minor_unit_is_no_currency(code: str) -> None:
    with pytest.raises(KeyError):
        exponent(code)


def test_amounts_are_rounded_half_away_from_zero_and_shown_with_all_digits() -> None:
    assert quantize(Decimal("2.005"), "EUR") == Decimal("2.01")
    assert quantize(Decimal("-2.005"), "EUR") == Decimal("-2.01")
    assert format_amount(Decimal(5), "EUR") == "5.00"
    assert format_amount(Decimal("5.0"), "JPY") == "5"
    assert format_amount(Decimal("999999999999999.9"), "BHD") == "999999999999999.900"
    with pytest.raises(ValueError, match="decimal places"):
        format_amount(Decimal("0.001"), "EUR")


@settings(deadline=None)
@given(st.integers(-(10**19), 10**19), st.sampled_from(sorted(EXPONENTS)))
def test_minor_units_and_amounts_are_the_same_thing(minor: int, currency: str) -> None:
    amount = from_minor(minor, currency)

    assert to_minor(amount, currency) == minor
    assert Decimal(format_amount(amount, currency)) == amount


def test_a_results_id_is_the_uuid_the_contract_names() -> None:
    expected = uuid5(uuid5(NAMESPACE_URL, "credits:acme"), "/app\n1\nff00")

    assert events.result_id("acme", "/app", "1", "ff00") == str(expected)
    assert events.result_id(None, "/app", "1", "ff00") == str(
        uuid5(uuid5(NAMESPACE_URL, "credits:control"), "/app\n1\nff00")
    )


def test_a_result_is_a_cloud_event_in_binary_mode() -> None:
    assert events.result_headers("acme", "id-1", AT, Encoding.AVRO, "00-trace") == [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"id-1"),
        ("ce_source", b"/credits/acme"),
        ("ce_type", b"Command.Result"),
        ("ce_time", b"2026-03-01T10:15:30.123456Z"),
        ("content-type", b"application/avro"),
        ("traceparent", b"00-trace"),
    ]


def test_a_receipts_id_is_made_from_its_number() -> None:
    headers = dict(events.receipt_headers("acme", events.RECEIPT, "R-2026-0001", AT))

    assert headers["ce_id"].decode() == str(uuid5(uuid5(NAMESPACE_URL, "credits:acme"), "R-2026-0001"))
    assert headers["ce_type"] == b"Receipt.Issued"
    assert headers["content-type"] == b"application/json"
    assert "traceparent" not in headers


def test_the_headers_of_a_command_are_read_back() -> None:
    headers = events.command_headers("Operation.Open", "id-1", "/app", AT, reply_to="credits.ararat.replies.x")

    incoming = decode(Record(json.dumps(sample("Operation.Open")).encode(), headers), context())

    assert not isinstance(incoming, Undeliverable)
    assert (incoming.id, incoming.source, incoming.type) == ("id-1", "/app", "Operation.Open")
    assert (incoming.error, incoming.reply_to) == (None, "credits.ararat.replies.x")


def test_a_dead_letter_points_to_the_message_and_holds_nothing_of_it() -> None:
    letter = decode(Record(b"4111111111111111", []), context())

    assert isinstance(letter, Undeliverable)
    pointer = json.loads(
        events.dead_letter_value(
            letter.topic, letter.partition, letter.offset, letter.sha256, code=letter.code, message=letter.message
        )
    )
    assert pointer == {
        "topic": "credits.ararat.operations",
        "partition": 2,
        "offset": 41,
        "sha256": letter.sha256.hex(),
        "code": "malformed",
        "message": letter.message,
    }
