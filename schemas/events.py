"""What goes out: identities, headers and bodies of results, receipts, dead letters and commands. All deterministic."""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from hashlib import sha1
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from schemas.canonical import compact_json, format_time
from schemas.codec import RESULT, Encoding

RECEIPT = "Receipt.Issued"
CREDIT_NOTE = "CreditNote.Issued"

Headers = list[tuple[str, bytes]]

_CONTENT_TYPES: Mapping[Encoding, bytes] = {encoding: encoding.content_type.encode() for encoding in Encoding}


@lru_cache(maxsize=4096)
def namespace(merchant: str | None) -> UUID:
    """Return the UUID namespace of a merchant's events; without a merchant that of the control plane."""
    return uuid5(NAMESPACE_URL, f"credits:{merchant or 'control'}")


@lru_cache(maxsize=4096)
def own_source(merchant: str | None) -> bytes:
    """Return the ce_source of events the service itself sends for a merchant."""
    return f"/credits/{merchant or 'control'}".encode()


def result_id(merchant: str | None, source: str, message_id: str, fingerprint_hex: str) -> str:
    """Return the ce_id of the result of a message: a UUIDv5 of its source, id and fingerprint."""
    name = f"{source}\n{message_id}\n{fingerprint_hex}".encode()
    # What uuid.uuid5 does (RFC 9562, 5.5), without making a UUID object for each result.
    digest = bytearray(sha1(namespace(merchant).bytes + name, usedforsecurity=False).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def document_id(merchant: str, number: str) -> str:
    """Return the ce_id of the event that publishes a receipt or credit note: a UUIDv5 of its number."""
    return str(uuid5(namespace(merchant), number))


def event_headers(
    event_type: str,
    event_id: str,
    source: bytes,
    at: datetime | str,
    *,
    encoding: Encoding = Encoding.JSON,
    traceparent: str | None = None,
) -> Headers:
    """Return the headers of an event in binary mode; a time as text is on the wire as it is."""
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_source", source),
        ("ce_type", event_type.encode()),
        ("ce_time", (at if isinstance(at, str) else format_time(at)).encode()),
        ("content-type", _CONTENT_TYPES[encoding]),
    ]
    if traceparent is not None:
        headers.append(("traceparent", traceparent.encode()))
    return headers


def result_headers(
    merchant: str | None, event_id: str, at: datetime | str, encoding: Encoding, traceparent: str | None = None
) -> Headers:
    """Return the headers of a Command.Result; `at` is its applied_at."""
    return event_headers(RESULT, event_id, own_source(merchant), at, encoding=encoding, traceparent=traceparent)


def receipt_headers(
    merchant: str,
    event_type: str,
    number: str,
    at: datetime,
    *,
    encoding: Encoding = Encoding.JSON,
    traceparent: str | None = None,
) -> Headers:
    """Return the headers of a Receipt.Issued or CreditNote.Issued; `at` is its issued_at."""
    assert event_type in (RECEIPT, CREDIT_NOTE), event_type
    return event_headers(
        event_type, document_id(merchant, number), own_source(merchant), at, encoding=encoding, traceparent=traceparent
    )


def command_headers(
    command_type: str,
    message_id: str,
    source: str,
    at: datetime,
    *,
    encoding: Encoding = Encoding.JSON,
    reply_to: str | None = None,
) -> Headers:
    """Return the headers of a command, as its sender gives them."""
    headers = event_headers(command_type, message_id, source.encode(), at, encoding=encoding)
    return headers if reply_to is None else [*headers, ("ce_replyto", reply_to.encode())]


def dead_letter(
    topic: str, partition: int, offset: int, value_sha256: bytes, *, code: str, message: str
) -> dict[str, Any]:
    """Return the pointer to a message that needs a person; it never holds the message."""
    return {
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "sha256": value_sha256.hex(),
        "code": str(code),
        "message": message,
    }


def dead_letter_value(
    topic: str, partition: int, offset: int, value_sha256: bytes, *, code: str, message: str
) -> bytes:
    """Return the value of a dead letter: the pointer as JSON."""
    return compact_json(dead_letter(topic, partition, offset, value_sha256, code=code, message=message))
