"""Builders of messages for the tests of the wire contract, and a test that they build what is meant."""

import base64
import json
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from schemas.codec import encode_avro
from schemas.envelope import DecodeContext, Incoming, decode
from schemas.errors import Refusal
from schemas.payloads import COMMANDS

CORPUS = Path(__file__).parents[1] / "data" / "corpus" / "v1"
SECRET = b"the secret of the corpus"
MERCHANT = "ararat"
TYPES = sorted(COMMANDS)
CARD = "4111111111111111"


@dataclass
class Record:
    """A consumed Kafka record, as far as decoding looks at it."""

    value: bytes | None
    headers: list[tuple[str, bytes]]
    topic: str = "credits.ararat.operations"
    partition: int = 2
    offset: int = 41
    timestamp: int = 1_772_360_130_123
    key: bytes | None = field(default=b"user-7f3a")


def sample(command_type: str, **changes: Any) -> dict[str, Any]:
    """Return the golden payload of a type with members changed; `...` leaves one out."""
    payload = json.loads((CORPUS / f"{command_type}.json").read_text("utf-8")) | changes
    return {name: value for name, value in payload.items() if value is not ...}


def envelope(
    command_type: str, content_type: str = "application/json", **changes: str | None
) -> list[tuple[str, bytes]]:
    headers: dict[str, str | None] = {
        "ce_specversion": "1.0",
        "ce_id": "550e8400-e29b-41d4-a716-446655440000",
        "ce_source": "/ararat/app",
        "ce_type": command_type,
        "ce_time": "2026-03-01T10:15:30Z",
        "content-type": content_type,
    }
    return [(name, value.encode()) for name, value in (headers | changes).items() if value is not None]


def as_json(command_type: str, payload: Any) -> Record:
    return Record(json.dumps(payload, ensure_ascii=False).encode(), envelope(command_type))


def as_avro(command_type: str, payload: dict[str, Any]) -> Record:
    return Record(encode_avro(command_type, payload), envelope(command_type, "application/avro"))


def event(command_type: str, **members: Any) -> dict[str, Any]:
    attributes = {"specversion": "1.0", "id": "550e8400-e29b-41d4-a716-446655440000", "source": "/ararat/app"}
    return attributes | {"type": command_type, "time": "2026-03-01T10:15:30Z"} | members


def structured(members: dict[str, Any]) -> Record:
    return Record(json.dumps(members).encode(), [("content-type", b"application/cloudevents+json; charset=UTF-8")])


def as_structured_json(command_type: str, payload: Any) -> Record:
    return structured(event(command_type, data=payload, datacontenttype="application/json"))


def as_structured_avro(command_type: str, payload: dict[str, Any]) -> Record:
    data = base64.b64encode(encode_avro(command_type, payload)).decode()
    return structured(event(command_type, data_base64=data, datacontenttype="application/avro"))


def context(command_type: str = "Operation.Open", **changes: Any) -> DecodeContext:
    spec = COMMANDS.get(command_type)
    channel = "operations" if spec is None else spec.channel
    values: dict[str, Any] = {
        "merchant_id": None if channel == "control" else MERCHANT,
        "channel": channel,
        "secret": SECRET,
        "external_ref_patterns": {},
        "resource_amount_max": Decimal(10**9),
    }
    return DecodeContext(**(values | changes))


def read(record: Record, command_type: str = "Operation.Open", **changes: Any) -> Incoming:
    """Decode a record that has an identity."""
    incoming = decode(record, context(command_type, **changes))
    assert isinstance(incoming, Incoming)
    return incoming


def refusal(command_type: str, payload: Any, **changes: Any) -> Refusal | None:
    """Return why a JSON payload is refused, None if it is not."""
    return read(as_json(command_type, payload), command_type, **changes).error


def test_a_built_message_is_read_as_the_command_it_was_built_for() -> None:
    incoming = read(as_json("Operation.Open", sample("Operation.Open")))

    assert incoming.error is None
    assert incoming.payload.user_id == "user-7f3a"
