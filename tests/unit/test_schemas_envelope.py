"""What of a Kafka record is read, and what makes it malformed or undeliverable."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.codec import encode_avro
from schemas.envelope import Encoding, Incoming, Undeliverable, business_key_digest, decode, message_identity
from schemas.errors import Code
from tests.unit.test_schemas_messages import (
    CARD,
    Record,
    as_avro,
    as_json,
    as_structured_json,
    context,
    envelope,
    event,
    read,
    sample,
    structured,
)

OPEN = sample("Operation.Open")
TEXT = json.dumps(OPEN)
AVRO = encode_avro("Operation.Open", OPEN)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

UNREADABLE_VALUES: dict[str, bytes | None] = {
    "a tombstone": None,
    "an empty value": b"",
    "white space": b"  ",
    "an array": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "broken JSON": TEXT.encode()[:-1],
    "more than one value": TEXT.encode() * 2,
    "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"),
    "Latin-1": TEXT.replace("user-7f3a", "usér").encode("latin-1"),
    "an encoded surrogate": TEXT.encode().replace(b"7f3a", b"\xed\xa0\x80"),
    "an escaped lone surrogate": TEXT.replace("7f3a", r"\ud800").encode(),
    "an escaped lone surrogate in a name": TEXT.replace("{", r'{"\udc00": 1, ', 1).encode(),
    "U+0000 escaped": TEXT.replace("7f3a", r"\u0000").encode(),
    "U+0000 escaped in an unknown member": TEXT.replace("{", r'{"note": ["\u0000"], ', 1).encode(),
    "U+0000": TEXT.replace("7f3a", "\0").encode(),
    "a line break inside a text": TEXT.replace("7f3a", "\n").encode(),
    "a member twice": TEXT.replace("{", '{"user_id": "other", ', 1).encode(),
    "a member twice, once null": TEXT.replace("{", '{"user_id": null, ', 1).encode(),
    "an unknown member twice": TEXT.replace("{", '{"x": 1, "x": 1, ', 1).encode(),
    "an inner member twice": TEXT.replace("{", '{"x": {"y": 1, "y": 1}, ', 1).encode(),
    "a member twice by an escape": TEXT.replace("{", r'{"\u0075ser_id": "other", ', 1).encode(),
    "NaN": TEXT.replace("{", '{"x": NaN, ', 1).encode(),
    "-Infinity": TEXT.replace("{", '{"x": [-Infinity], ', 1).encode(),
    "too deep a nesting": TEXT.replace("{", '{"x": ' + "[" * 40 + "]" * 40 + ", ", 1).encode(),
    "absurdly deep a nesting": b"[" * 60_000,
    "absurdly deep objects": b'{"a":' * 12_000,
    "more than 64 KiB": TEXT.encode() + b" " * 65_536,
    "Avro under a JSON content type": AVRO,
}

UNREADABLE_AVRO = {
    "nothing": b"",
    "the marker alone": AVRO[:2],
    "an unknown schema": AVRO[:2] + b"\0" * 8 + AVRO[10:],
    "no marker": AVRO[10:],
    "a cut datum": AVRO[:-1],
    "bytes after the datum": AVRO + b"\0",
    "another type's schema": encode_avro("Operation.Cancel", sample("Operation.Cancel")),
    "a result": AVRO[:2] + b"\xff" * 20,
    "a text that is not UTF-8": AVRO.replace(b"user", b"\xff\xff\xff\xff"),
    "U+0000": AVRO.replace(b"user", b"u\0er"),
    "an absurd length": AVRO[:10] + b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a negative length": AVRO[:10] + b"\x01",
    "JSON": TEXT.encode(),
}


@pytest.mark.parametrize("value", UNREADABLE_VALUES.values(), ids=UNREADABLE_VALUES)
def test_a_value_that_is_not_strict_json_is_malformed_and_known_by_its_bytes(value: bytes | None) -> None:
    incoming = read(Record(value, envelope("Operation.Open")))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED
    assert incoming.payload is None
    assert incoming.fingerprint == incoming.value_sha256 == hashlib.sha256(value or b"").digest()
    assert (incoming.digests, incoming.business_key) == (b"", None)
    assert incoming.identity == message_identity("/ararat/app", "550e8400-e29b-41d4-a716-446655440000")


@pytest.mark.parametrize("value", UNREADABLE_AVRO.values(), ids=UNREADABLE_AVRO)
def test_a_value_that_is_not_the_commands_avro_is_malformed(value: bytes) -> None:
    incoming = read(Record(value, envelope("Operation.Open", "application/avro")))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED
    assert incoming.encoding is Encoding.AVRO


@pytest.mark.parametrize(
    "changes",
    [
        {"ce_specversion": None},
        {"ce_specversion": "0.3"},
        {"ce_specversion": "1.1"},
        {"ce_specversion": ""},
        {"ce_time": "yesterday"},
        {"ce_time": "2026-03-01"},
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/cloudevents"},
        {"content-type": ""},
    ],
)
def test_an_envelope_that_is_not_as_the_contract_has_it_is_malformed(changes: dict[str, str | None]) -> None:
    headers = [item for item in envelope("Operation.Open") if item[0] not in changes]
    headers += [(name, value.encode()) for name, value in changes.items() if value is not None]

    incoming = read(Record(TEXT.encode(), headers))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED


@pytest.mark.parametrize("name", ["ce_specversion", "ce_time", "content-type"])
def test_a_header_given_twice_is_malformed(name: str) -> None:
    headers = envelope("Operation.Open")

    incoming = read(Record(TEXT.encode(), [*headers, *(item for item in headers if item[0] == name)]))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "Application/JSON", 'application/json; charset="UTF-8"']
)
def test_json_is_what_a_value_is_taken_for(content_type: str | None) -> None:
    headers = [item for item in envelope("Operation.Open") if item[0] != "content-type"]
    headers += [] if content_type is None else [("content-type", content_type.encode())]

    assert read(Record(TEXT.encode(), headers)).error is None


def test_ce_time_and_unknown_headers_are_not_needed() -> None:
    headers = [item for item in envelope("Operation.Open") if item[0] != "ce_time"]

    assert read(Record(TEXT.encode(), [*headers, ("ce_subject", b"\xff"), ("x", b""), ("x", b"")])).error is None


@pytest.mark.parametrize("name", ["ce_id", "ce_source", "ce_type"])
@pytest.mark.parametrize("value", [None, b"", b"x" * 1001, b"\xff", b"a\nb", b"a\0b"])
def test_a_message_without_readable_identity_is_undeliverable(name: str, value: bytes | None) -> None:
    headers = [item for item in envelope("Operation.Open") if item[0] != name]
    headers += [] if value is None else [(name, value)]

    letter = decode(Record(TEXT.encode(), headers), context())

    assert isinstance(letter, Undeliverable)
    assert letter.code is Code.MALFORMED
    assert (letter.topic, letter.partition, letter.offset) == ("credits.ararat.operations", 2, 41)
    assert letter.sha256 == hashlib.sha256(TEXT.encode()).digest()


@pytest.mark.parametrize("name", ["ce_id", "ce_source", "ce_type"])
def test_an_identity_that_is_too_long_is_answered_with_that(name: str) -> None:
    headers = [(key, b"x" * 129 if key == name else value) for key, value in envelope("Operation.Open")]

    command = read(Record(TEXT.encode(), headers))

    assert command.error is not None
    assert command.error.code is Code.MALFORMED


@pytest.mark.parametrize("name", ["ce_id", "ce_source", "ce_type"])
def test_an_identity_given_twice_is_undeliverable(name: str) -> None:
    headers = [*envelope("Operation.Open"), (name, b"other")]

    assert isinstance(decode(Record(TEXT.encode(), headers), context()), Undeliverable)


@pytest.mark.parametrize("name", ["ce_id", "ce_source", "ce_type"])
def test_an_identity_that_may_be_a_card_number_is_undeliverable_and_not_repeated(name: str) -> None:
    headers = [(key, CARD.encode() if key == name else value) for key, value in envelope("Operation.Open")]

    letter = decode(Record(TEXT.encode(), headers), context())

    assert isinstance(letter, Undeliverable)
    assert letter.code is Code.SENSITIVE_DATA
    assert CARD not in repr(letter)


def test_the_record_gives_position_and_time() -> None:
    incoming = read(as_json("Operation.Open", OPEN))

    assert (incoming.topic, incoming.partition, incoming.offset) == ("credits.ararat.operations", 2, 41)
    assert incoming.record_time == datetime(2026, 3, 1, 10, 15, 30, 123000, UTC)
    assert incoming.key == b"user-7f3a"


@pytest.mark.parametrize("timestamp", [-1, 2**62, -(2**62)])
def test_a_record_time_out_of_range_does_no_harm(timestamp: int) -> None:
    record = as_json("Operation.Open", OPEN)
    record.timestamp = timestamp

    assert read(record).error is None


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ("credits.ararat.replies.app-1", True),
        ("credits.ararat.replies.a.b_C", True),
        ("credits.ararat.replies.", False),
        ("credits.ararat.replies", False),
        ("credits.ararat.results", False),
        ("credits.masis.replies.app-1", False),
        ("credits.ararat.replies.a b", False),
        ("credits.ararat.replies." + "a" * 240, False),
        ("xcredits.ararat.replies.a", False),
    ],
)
def test_results_go_only_to_the_merchants_own_reply_topics(asked: str, granted: bool) -> None:
    headers = [*envelope("Operation.Open"), ("ce_replyto", asked.encode())]

    incoming = read(Record(TEXT.encode(), headers))

    assert incoming.error is None
    assert incoming.reply_to == (asked if granted else None)


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (TRACE, True),
        (TRACE.upper(), False),
        ("ff" + TRACE[2:], False),
        (TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32), False),
        (TRACE + "\n", False),
        ("x", False),
    ],
)
def test_a_trace_is_passed_on_if_it_is_one(given: str, passed_on: bool) -> None:
    incoming = read(Record(TEXT.encode(), [*envelope("Operation.Open"), ("traceparent", given.encode())]))

    assert incoming.traceparent == (given if passed_on else None)


def test_identities_and_keys_can_not_be_confused_by_moving_characters_between_them() -> None:
    assert message_identity("a", "bc") != message_identity("ab", "c")
    assert business_key_digest("a", "bc", b"key") != business_key_digest("ab", "c", b"key")
    assert business_key_digest("a", "b", b"key") != business_key_digest("a", "b", b"other")
    assert len(message_identity("a", "b")) == len(business_key_digest("a", "b", b"key")) == 16


UUID7 = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"  # the example of RFC 9562, A.6


def test_identities_of_messages_named_by_time_begin_with_it() -> None:
    identity, key = message_identity("/app", UUID7), business_key_digest("Operation.Open", UUID7, b"key")

    assert identity[:6] == key[:6] == bytes.fromhex("017f22e279b0")
    assert len(identity) == len(key) == 16
    assert len({identity, key, message_identity("/other", UUID7), message_identity("/app", UUID7[:-1] + "e")}) == 4


def test_the_key_of_what_may_be_a_callers_id_does_not_tell_its_time() -> None:
    assert business_key_digest("User.SignedUp", UUID7, b"key")[:6] != bytes.fromhex("017f22e279b0")


@pytest.mark.parametrize(
    "name",
    [
        UUID7.upper(), UUID7 + "\n", UUID7.replace("-", ""), UUID7.replace("-7", "-4"), UUID7.replace("-9", "-c"),
        "017f22e2-79b0-7cc3-98c4-dc0c0c07398g", "١" + UUID7[1:], "zzzzzzzz-zzzz-7", "7" * 36,
    ],
)  # fmt: skip
def test_other_names_are_digests_alone(name: str) -> None:
    framed = b"".join(len(part).to_bytes(4) + part for part in (b"/app", name.encode()))

    assert message_identity("/app", name) == hashlib.sha256(framed).digest()[:16]


def test_the_content_type_decides_between_the_modes() -> None:
    record = as_structured_json("Operation.Open", OPEN)
    record.headers += [("ce_id", b"other"), ("ce_type", b"User.Erase")]

    incoming = read(record)

    assert incoming.error is None
    assert incoming.id == "550e8400-e29b-41d4-a716-446655440000"


@pytest.mark.parametrize(
    "changes",
    [
        {"specversion": "0.3"},
        {"specversion": None},
        {"specversion": 1.0},
        {"time": "x"},
        {"data": None},
        {"data": "x"},
        {"data": []},
        {"data_base64": "e30="},
        {"datacontenttype": "text/plain"},
        {"datacontenttype": "application/avro"},
        {"datacontenttype": 5},
        {"data": None, "data_base64": "%%%"},
        {"data": None, "data_base64": "é"},
        {"data": None, "data_base64": 5},
        {"data": None, "data_base64": "e30=", "datacontenttype": "application/avro"},
        {"x": "\ud800"},
        {"x": "\0"},
    ],
)
def test_a_structured_event_with_an_identity_is_malformed_rather_than_undeliverable(changes: dict[str, Any]) -> None:
    members = event("Operation.Open", data=OPEN) | changes
    value = json.dumps(members).encode()

    incoming = read(Record(value, [("content-type", b"application/cloudevents+json")]))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED
    assert incoming.source == "/ararat/app"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace('"data": {', '"data": {"x": 1, "x": 1, '),
        lambda text: text.replace('"data": {', '"data": {"x": NaN, '),
        lambda text: text + " " * 65_536,
    ],
)
def test_the_identity_of_a_structured_event_is_read_even_if_it_is_not_strict_json(spoil: Any) -> None:
    value = spoil(json.dumps(event("Operation.Open", data=OPEN))).encode()

    incoming = read(Record(value, [("content-type", b"application/cloudevents+json")]))

    assert incoming.error is not None
    assert incoming.error.code is Code.MALFORMED
    assert incoming.fingerprint == hashlib.sha256(value).digest()


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"id": 5, "source": "s", "type": "t"}',
        b"[" * 60_000,
        json.dumps(event("Operation.Open", data=OPEN)).replace('"id"', '"id": "x", "id"').encode(),
    ],
)
def test_a_structured_event_without_readable_identity_is_undeliverable(value: bytes | None) -> None:
    letter = decode(Record(value, [("content-type", b"application/cloudevents+json")]), context())

    assert isinstance(letter, Undeliverable)


def test_a_structured_event_may_ask_for_replies_and_carry_a_trace_and_base64_json() -> None:
    members = event("Operation.Open", replyto="credits.ararat.replies.a", traceparent=TRACE, extension="x")

    incoming = decode(structured(members | {"data_base64": "e30="}), context())

    assert isinstance(incoming, Incoming)
    assert (incoming.reply_to, incoming.traceparent) == ("credits.ararat.replies.a", TRACE)
    assert incoming.error is not None
    assert incoming.error.details["fields"] == ["operation_code", "operation_id", "user_id"]


def test_a_structured_event_s_trace_and_reply_topic_may_be_in_the_record_s_headers() -> None:
    record = structured(event("Operation.Open", data=OPEN))
    asked = [("traceparent", TRACE.encode()), ("ce_replyto", b"credits.ararat.replies.a")]

    incoming = read(Record(record.value, [*record.headers, *asked]))

    assert (incoming.reply_to, incoming.traceparent) == ("credits.ararat.replies.a", TRACE)


def test_neither_value_nor_key_nor_payload_gets_into_a_log_by_a_repr() -> None:
    record = as_json("Operation.Open", OPEN | {"comment": CARD})
    record.key = CARD.encode()

    assert CARD not in repr(read(record))
    assert "user-7f3a" not in repr(read(record))


def test_the_control_topic_has_no_merchant_of_its_own() -> None:
    incoming = read(as_avro("Merchant.Suspend", sample("Merchant.Suspend", merchant_id="masis")), "Merchant.Suspend")

    assert incoming.error is None
    assert incoming.payload.merchant_id == "masis"


@pytest.mark.parametrize(("changes", "named"), [({"config": {}}, "masis"), ({"merchant_id": "Not an id"}, None)])
def test_a_refused_command_of_the_control_topic_tells_whose_it_is_if_that_can_be_read(
    changes: dict[str, Any], named: str | None
) -> None:
    members = sample("Merchant.Register", merchant_id="masis") | changes

    incoming = read(as_json("Merchant.Register", members), "Merchant.Register")

    assert incoming.error is not None
    assert incoming.merchant_id == named
