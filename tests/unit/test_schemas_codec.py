"""Results and other values in both encodings, and the one text of times, decimals and JSON."""

import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas.codec import (
    AVRO_MAGIC,
    SCHEMAS,
    Encoding,
    canonical_json,
    decode_avro,
    decode_result,
    encode_avro,
    encode_result,
    encode_value,
    format_decimal,
    format_time,
    parse_time,
)
from schemas.effects import EFFECTS
from schemas.payloads import COMMANDS
from tests.unit.test_schemas_messages import sample

AT = datetime(2026, 3, 1, 10, 15, 30, 123456, tzinfo=UTC)


def example(annotation: Any) -> Any:
    """Return a value of the shape of an effect."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and is_typeddict(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        return {name: example(hint) for name, hint in hints.items()}
    if origin is list:
        return [example(arguments[0])]
    if hasattr(annotation, "__metadata__"):
        (model,) = annotation.__metadata__
        assert issubclass(model, BaseModel)
        return sample("Merchant.Configure")["config"]
    if origin is not None:
        return example(arguments[0])
    return {str: "text", int: 12, bool: True}[annotation]


def result(command_type: str, **changes: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "command_id": "550e8400-e29b-41d4-a716-446655440000",
        "command_source": "/ararat/app",
        "command_type": command_type,
        "merchant_id": "ararat",
        "user_id": "Անի",
        "outcome": "applied",
        "user_seq": 3,
        "balance": -20,
        "debt": 20,
        "applied_at": format_time(AT),
        "effects": example(EFFECTS[command_type]),
    }
    return answer | changes


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_the_result_of_every_command_survives_both_encodings(name: str, encoding: Encoding) -> None:
    answer = result(
        name, time_effects={"expired": [{"lot_id": "l", "entry_id": "e", "credits": 1}], "timed_out": ["o"]}
    )

    assert decode_result(encode_result(answer, encoding)) == answer


def test_every_command_has_a_shape_of_effects() -> None:
    assert set(EFFECTS) == set(COMMANDS)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize(
    "details",
    [
        {},
        {"fields": ["a.b", "c"], "first": {"command_source": "s", "command_id": "i"}},
        {"seconds_remaining": 5, "locked": True, "operation_id": "o"},
    ],
)
def test_a_rejection_survives_both_encodings(encoding: Encoding, details: dict[str, Any]) -> None:
    error = {"code": "idempotency_conflict", "message": "other content", "details": details}
    answer = result("Purchase.Settled", outcome="rejected", effects={}, error=error)

    assert decode_result(encode_result(answer, encoding)) == answer


def test_the_rejection_of_an_unknown_type_can_be_sent_in_avro() -> None:
    answer = result("Operation.Open", outcome="rejected", effects={}) | {"command_type": "No.Such"}

    assert decode_result(encode_result(answer, Encoding.AVRO))["command_type"] == "No.Such"


def test_details_of_details_become_texts_in_avro() -> None:
    error = {"code": "price_mismatch", "message": "", "details": {"prices": [{"amount": "5"}], "at": {"seq": 5}}}

    data = encode_result(result("Refund.Apply", outcome="rejected", effects={}, error=error), Encoding.AVRO)

    assert decode_result(data)["error"]["details"] == {"prices": ['{"amount":"5"}'], "at": {"seq": "5"}}


def test_a_json_result_is_compact_and_keeps_the_order_given() -> None:
    data = encode_result({"b": "é", "a": Decimal("1.50"), "c": AT}, Encoding.JSON)

    assert data == '{"b":"é","a":"1.5","c":"2026-03-01T10:15:30.123456Z"}'.encode()


def test_an_effect_that_is_not_of_its_shape_can_not_be_sent_in_avro() -> None:
    for effects in ({"entry_id": "e"}, {"entry_id": "e", "credits": 1, "surprise": 1}, {"entry_id": 5, "credits": 1}):
        with pytest.raises(ValueError, match=r"Command\.Result"):
            encode_result(result("Grant.Apply", effects=effects), Encoding.AVRO)


def test_other_bytes_are_no_result() -> None:
    with pytest.raises(ValueError, match="not a Command"):
        decode_result(encode_avro("Operation.Open", sample("Operation.Open")))
    with pytest.raises(ValueError, match="known schema"):
        decode_avro(b"")


def test_avro_values_are_marked_with_the_little_endian_rabin_fingerprint_of_their_schema() -> None:
    data = encode_avro("Lot.Expire", {"user_id": "u", "lot_id": "l"})
    canonical = (
        '{"name":"credits.LotExpire","type":"record","fields":'
        '[{"name":"user_id","type":"string"},{"name":"lot_id","type":"string"}]}'
    )

    assert data[:2] == AVRO_MAGIC == b"\xc3\x01"
    assert int.from_bytes(data[2:10], "little") == rabin(canonical.encode())
    assert data[10:] == b"\x02u\x02l"


def rabin(data: bytes) -> int:
    """Return CRC-64-AVRO, written down from the Avro specification."""
    empty = 0xC15D213AA4D7A795
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (empty & -(value & 1))
        table.append(value)
    crc = empty
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc


@pytest.mark.parametrize("encoding", Encoding)
def test_a_command_can_be_sent_in_both_encodings(encoding: Encoding) -> None:
    data = encode_value("Refund.Apply", sample("Refund.Apply") | {"amount": Decimal("6000.00")}, encoding)

    decoded = decode_avro(data)[1] if encoding is Encoding.AVRO else json.loads(data)
    assert decoded["amount"] == "6000"
    assert encoding.content_type in ("application/json", "application/avro")


def test_every_field_of_every_schema_is_documented() -> None:
    def check(schema: Any) -> int:
        if isinstance(schema, list):
            return sum(check(item) for item in schema)
        if not isinstance(schema, dict):
            return 0
        assert schema["type"] != "record" or schema["doc"]
        fields = schema.get("fields", [])
        assert all(field["doc"].endswith(".") for field in fields)
        return len(fields) + sum(
            check(part) for part in [*(f["type"] for f in fields), schema.get("items"), schema.get("values")]
        )

    assert all(check(schema.parsed) for schema in SCHEMAS.values())


@settings(deadline=None)
@given(st.datetimes(timezones=st.timezones()))
def test_a_time_is_read_back_as_the_same_moment(moment: datetime) -> None:
    if not 2 <= moment.year <= 9998:
        return

    text = format_time(moment)

    assert len(text) == 27
    assert parse_time(text) == moment.astimezone(UTC)


def test_a_time_without_a_zone_has_no_text() -> None:
    with pytest.raises(ValueError, match="zone"):
        format_time(datetime(2026, 1, 1))
    assert format_time(datetime(5, 1, 1, 4, tzinfo=timezone(timedelta(hours=4)))) == "0005-01-01T00:00:00.000000Z"


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_decimal_has_one_text_without_exponent(number: Decimal) -> None:
    text = format_decimal(number)

    assert Decimal(text) == number
    assert "E" not in text.upper()
    assert "." not in text or not text.endswith(("0", "."))
    assert text != "-0"


def test_what_is_no_finite_number_has_no_text() -> None:
    for number in (Decimal("NaN"), Decimal("Infinity")):
        with pytest.raises(ValueError, match="finite"):
            format_decimal(number)


def test_canonical_json_is_sorted_compact_utf_8() -> None:
    value = {"b": [1, True, None], "a": {"z": Decimal("10.00"), "ä": AT}, "é": "\u2028"}

    assert canonical_json(value) == (
        '{"a":{"z":"10","ä":"2026-03-01T10:15:30.123456Z"},"b":[1,true,null],"é":"\u2028"}'.encode()
    )


def test_other_types_have_no_wire_form() -> None:
    with pytest.raises(TypeError, match="bytes"):
        canonical_json(b"")
