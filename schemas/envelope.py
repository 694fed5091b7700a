"""From a Kafka record to a command, or to the reason why it is none. Pure, and it never raises.

Every check runs, and the refusal that comes first in the order of precedence is the answer. A message without a
readable identity can't be answered: it becomes a dead letter alone.
"""

import base64
import binascii
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NoReturn, Protocol

from pydantic import ValidationError

from schemas.codec import Encoding, decode_avro, parse_time
from schemas.errors import REGISTRY, Code, Refusal
from schemas.fingerprint import differing_fields, fingerprint, member_names
from schemas.payloads import COMMANDS, CommandSpec
from schemas.sensitive import is_card_member, is_card_number, matches_whole
from schemas.topics import CONTROL_CHANNEL, is_merchant_id, is_reply_topic

__all__ = [
    "DecodeContext",
    "Encoding",
    "Incoming",
    "RecordLike",
    "Undeliverable",
    "business_key_digest",
    "decode",
    "differing_fields",
    "message_identity",
]

VALUE_SIZE_MAX = 64 * 1024
DEPTH_MAX = 32

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INTEGER_LENGTH_MAX = 40
_BEYOND_EVERY_BOUND: int = 10**_INTEGER_LENGTH_MAX
ID_LENGTH_MAX = 128
# A longer id than is allowed can be answered with that; one without end is not repeated.
_READABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,1000}\Z")
UUID7 = "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_UUID7 = re.compile(UUID7 + r"\Z")
_NEVER_IN_TEXT = re.compile("[\x00\ud800-\udfff]")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")

_JSON = "application/json"
_AVRO = "application/avro"
_STRUCTURED = "application/cloudevents+json"
# Without a content type a value is taken for JSON.
_MEDIA_TYPES: Mapping[bytes | None, str] = {
    None: _JSON,
    **{name.encode(): name for name in (_JSON, _AVRO, _STRUCTURED)},
}


class RecordLike(Protocol):
    """What is read of a consumed Kafka record; its timestamp is in milliseconds."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@dataclass(frozen=True, slots=True)
class DecodeContext:
    """What decoding depends on besides the record. `merchant_id` is None on the control topic.

    `external_ref_patterns` maps payment methods to the regular expressions of their references.
    """

    merchant_id: str | None
    channel: str
    secret: bytes
    external_ref_patterns: Mapping[str, str]
    resource_amount_max: Decimal


@dataclass(slots=True)
class Incoming:
    """A message with an identity: a command, or with `error` one that is refused for what it is.

    `identity`: 16 bytes of (source, id). `fingerprint`: 32 bytes of the content, of the bare value if it has none that
    can be read.
    `digests`: see `schemas.fingerprint`, empty if refused. `business_key`: see `business_key_digest`, None without one.
    `order`: the external_ref of a purchase refused for what it is, where it could be read.
    """

    topic: str
    partition: int
    offset: int
    record_time: datetime
    source: str
    id: str
    type: str
    identity: bytes
    fingerprint: bytes
    digests: bytes
    business_key: bytes | None
    payload: Any = field(repr=False)
    error: Refusal | None
    encoding: Encoding
    reply_to: str | None
    traceparent: str | None
    # Bytes as they came may hold anything, so they must not get into a log by way of a repr.
    key: bytes | None = field(repr=False)
    value: bytes | None = field(repr=False)
    # Whose command it is: the topic's merchant, on the control topic the one it names, as far as that can be read.
    merchant_id: str | None = None
    order: str | None = None

    @property
    def value_sha256(self) -> bytes:
        """SHA-256 of the value as it came, 32 bytes; of nothing for a null value."""
        return hashlib.sha256(self.value or b"").digest()


@dataclass(slots=True)
class Undeliverable:
    """A message without a readable identity: all that is kept is where it lies and why. `sha256` is of its value."""

    topic: str
    partition: int
    offset: int
    record_time: datetime
    code: Code
    message: str
    sha256: bytes


class _MalformedError(ValueError):
    """The message can't be read; the text says why, without repeating anything of it."""


@dataclass(slots=True)
class _Envelope:
    """The attributes of an event as far as they could be read, and its data or the problem with them."""

    source: str | None
    id: str | None
    type: str | None
    encoding: Encoding
    reply_to: str | None
    traceparent: str | None
    data: dict[str, Any] | None = None
    problem: str | None = None


def message_identity(source: str, message_id: str) -> bytes:
    """Return the 16 bytes that stand for a message, (ce_source, ce_id); of a UUIDv7 its 6 bytes of time come first."""
    return _by_time(message_id, _digest16(source, message_id))


def business_key_digest(command_type: str, key: str, secret: bytes) -> bytes:
    """Return the 16 bytes that stand for a business key of its command type.

    Keyed, because some are a caller's id, which must not be guessable from the inbox. Those of an operation whose id is
    a UUIDv7 begin with its 6 bytes of time.
    """
    digest = hashlib.blake2b(_digest16(command_type, key), digest_size=16, key=secret).digest()
    return _by_time(key, digest) if command_type.startswith("Operation.") else digest


def _by_time(name: str, digest: bytes) -> bytes:
    """Put the time of a UUIDv7 (RFC 9562, 5.7) first: an index of digests that are kept for ever grows at its end."""
    if name[14:15] != "7" or not _UUID7.match(name):
        return digest
    return bytes.fromhex(name[:8] + name[9:13]) + digest[:10]


def _digest16(first: str, second: str) -> bytes:
    a, b = first.encode(), second.encode()
    return hashlib.sha256(b"%b%b%b%b" % (len(a).to_bytes(4), a, len(b).to_bytes(4), b)).digest()[:16]


def decode(record: RecordLike, context: DecodeContext) -> Incoming | Undeliverable:
    """Return the command of a record, refused or not; Undeliverable if it has no readable identity."""
    value = record.value
    envelope = _read_envelope(record.headers, value)
    source, message_id, command_type = envelope.source, envelope.id, envelope.type
    if source is None or message_id is None or command_type is None:
        return _undeliverable(record, Code.MALFORMED, "ce_source, ce_id or ce_type is missing or not readable")
    if is_card_number(source) or is_card_number(message_id) or is_card_number(command_type):
        return _undeliverable(record, Code.SENSITIVE_DATA, "the message's identity may be a payment card number")
    if max(len(source), len(message_id), len(command_type)) > ID_LENGTH_MAX:
        envelope.data, envelope.problem = None, f"ce_source, ce_id or ce_type is longer than {ID_LENGTH_MAX} characters"
    payload, error, content = _read_command(command_type, envelope, context)
    business_key = None
    if content is None:
        print_, digests = hashlib.sha256(value or b"").digest(), b""
    else:
        print_, digests = fingerprint(command_type, content, context.secret)
    if error is None:
        key = COMMANDS[command_type].business_key(payload)
        business_key = None if key is None else business_key_digest(command_type, key, context.secret)
    else:
        digests = b""
    reply_to, traceparent = envelope.reply_to, envelope.traceparent
    return Incoming(
        record.topic,
        record.partition,
        record.offset,
        _record_time(record.timestamp),
        source,
        message_id,
        command_type,
        message_identity(source, message_id),
        print_,
        digests,
        business_key,
        payload,
        error,
        envelope.encoding,
        reply_to if reply_to and is_reply_topic(context.merchant_id, reply_to) else None,
        traceparent if traceparent and _TRACEPARENT.match(traceparent) else None,
        record.key,
        value,
        context.merchant_id or _merchant_named(envelope.data),
        None if error is None else _order(command_type, envelope.data),
    )


def _merchant_named(data: dict[str, Any] | None) -> str | None:
    merchant_id = None if data is None else data.get("merchant_id")
    return merchant_id if type(merchant_id) is str and is_merchant_id(merchant_id) else None


def _order(command_type: str, data: dict[str, Any] | None) -> str | None:
    """Return which order a purchase is of that is refused for something else: somebody paid, and must be found."""
    if data is None or command_type != "Purchase.Settled":
        return None
    reference = _identifier(data.get("external_ref"))
    return None if reference is None or is_card_number(reference) else reference


def _undeliverable(record: RecordLike, code: Code, message: str) -> Undeliverable:
    sha256 = hashlib.sha256(record.value or b"").digest()
    time = _record_time(record.timestamp)
    return Undeliverable(record.topic, record.partition, record.offset, time, code, message, sha256)


def _record_time(milliseconds: int) -> datetime:
    try:
        return _EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        # Only a topic without LogAppendTime can carry such a time; it says nothing.
        return _EPOCH


# --- envelope


def _read_envelope(headers: Sequence[tuple[str, bytes]], value: bytes | None) -> _Envelope:
    named: dict[str, bytes | None] = dict(headers)
    twice = set() if len(named) == len(headers) else _names_given_twice(headers)
    for name in twice:
        named[name] = None
    media_type = _media_type(named.get("content-type"))
    if media_type == _STRUCTURED:
        structured = _read_structured(value)
        # Neither is an attribute of the event's own: a sender may leave both in the record's headers.
        structured.reply_to = structured.reply_to or _text(named.get("ce_replyto"))
        structured.traceparent = structured.traceparent or _text(named.get("traceparent"))
        return structured
    envelope = _Envelope(
        _identifier(_text(named.get("ce_source"))),
        _identifier(_text(named.get("ce_id"))),
        _identifier(_text(named.get("ce_type"))),
        Encoding.AVRO if media_type == _AVRO else Encoding.JSON,
        _text(named.get("ce_replyto")),
        _text(named.get("traceparent")),
    )
    try:
        if "content-type" in twice:
            raise _MalformedError("more than one content type")
        time = named.get("ce_time", b"")
        _check_attributes(_text(named.get("ce_specversion")), None if time == b"" else _text(time) or "?")
        envelope.data = _read_data(value, media_type, envelope)
    except _MalformedError as error:
        envelope.problem = str(error)
    return envelope


def _names_given_twice(headers: Sequence[tuple[str, bytes]]) -> set[str]:
    return {name for name, times in Counter(name for name, _ in headers).items() if times > 1}


def _text(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None


def _identifier(text: object) -> str | None:
    return text if type(text) is str and _READABLE.match(text) else None


def _media_type(raw: bytes | None) -> str:
    """Return one of the media types known here, or "" for another one or another character set."""
    known = _MEDIA_TYPES.get(raw)
    if known is not None:
        return known
    name, *parameters = (part.strip().lower() for part in (_text(raw) or "?").split(";"))
    known = _MEDIA_TYPES.get(name.encode(), "")
    charsets = [parameter[8:].strip('"') for parameter in parameters if parameter.startswith("charset=")]
    return known if all(charset in ("utf-8", "utf8", "us-ascii") for charset in charsets) else ""


def _check_attributes(specversion: object, time: object) -> None:
    if specversion != "1.0":
        raise _MalformedError("ce_specversion is not 1.0")
    if time is None:
        return
    try:
        parse_time(time if type(time) is str else "")
    except ValueError:
        raise _MalformedError("ce_time is not an RFC 3339 time with a zone") from None


def _read_data(value: bytes | None, media_type: str, envelope: _Envelope) -> dict[str, Any]:
    """Return the payload's members, without nulls, from a value of the media type."""
    if not value:
        raise _MalformedError("the message has no value")
    if len(value) > VALUE_SIZE_MAX:
        raise _MalformedError("the message is larger than 64 KiB")
    if media_type == _JSON:
        return _object(_parse_json(value))
    if media_type == _AVRO:
        return _parse_avro(value, envelope.type)
    raise _MalformedError("the content type is not supported")


def _parse_avro(value: bytes, command_type: str | None) -> dict[str, Any]:
    try:
        name, data = decode_avro(value)
    except ValueError as error:
        raise _MalformedError(str(error)) from None
    if name != command_type:
        raise _MalformedError("the Avro schema is another type's")
    _check_texts(data)
    return data


def _object(data: object) -> dict[str, Any]:
    if type(data) is not dict:
        raise _MalformedError("the value is not an object")
    return data


# --- JSON


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object without the members that are null, which is the same as absent."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _MalformedError("a member is given twice")
    if None in members.values():
        return {name: value for name, value in members.items() if value is not None}
    return members


def _integer(literal: str) -> int:
    """Read an integer; one of absurd length as a number beyond every bound, which no parser has to build."""
    if len(literal) <= _INTEGER_LENGTH_MAX:
        return int(literal)
    return -_BEYOND_EVERY_BOUND if literal.startswith("-") else _BEYOND_EVERY_BOUND


def _no_constant(_: str) -> NoReturn:
    raise _MalformedError("NaN and Infinity are no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_int=_integer, parse_constant=_no_constant)


def _parse_json(value: bytes) -> Any:
    """Return strict JSON's value: no duplicates, no BOM, no U+0000, no lone surrogate, not too deep."""
    try:
        text = value.decode()
        data = _DECODER.decode(text)
    except _MalformedError:
        raise
    except (ValueError, RecursionError):
        raise _MalformedError("the value is not JSON in UTF-8") from None
    if "\\u" in text:
        # Only an escape can have brought in a character that UTF-8 or the JSON grammar would not let through.
        _check_texts(data)
    return data


def _containers(data: Any) -> list[Any]:
    """Return all objects and lists of a value, outermost first; too deep a nesting is malformed."""
    found: list[Any] = []
    level = [data]
    for _ in range(DEPTH_MAX + 1):
        level = [item for item in level if type(item) is dict or type(item) is list]
        if not level:
            return found
        found += level
        level = [inner for item in level for inner in (item.values() if type(item) is dict else item)]
    raise _MalformedError("the value is nested too deep")


def _names(data: Any) -> set[str]:
    """Return the names of the members at any depth."""
    return {name for item in _containers(data) if type(item) is dict for name in item}


def _check_texts(data: Any) -> None:
    texts: list[Any] = [data, *_names(data)]
    for item in _containers(data):
        texts += item.values() if type(item) is dict else item
    if any(type(text) is str and _NEVER_IN_TEXT.search(text) for text in texts):
        raise _MalformedError("a text holds U+0000 or a lone surrogate")


# --- structured mode


def _read_structured(value: bytes | None) -> _Envelope:
    """Read an event in structured JSON mode; its identity even where the rest is malformed."""
    problem, event = None, {}
    try:
        if value and len(value) > VALUE_SIZE_MAX:
            raise _MalformedError("the message is larger than 64 KiB")
        event = _object(_parse_json(value or b""))
    except _MalformedError as error:
        problem, event = str(error), _leniently(value or b"")
    media_type = _media_type(str(event.get("datacontenttype", _JSON)).encode(errors="replace"))
    envelope = _Envelope(
        _identifier(event.get("source")),
        _identifier(event.get("id")),
        _identifier(event.get("type")),
        Encoding.AVRO if media_type == _AVRO else Encoding.JSON,
        _identifier(event.get("replyto")),
        _identifier(event.get("traceparent")),
        problem=problem,
    )
    if problem is None:
        try:
            _check_attributes(event.get("specversion"), event.get("time"))
            envelope.data = _structured_data(event, media_type, envelope)
        except _MalformedError as error:
            envelope.problem = str(error)
    return envelope


def _structured_data(event: dict[str, Any], media_type: str, envelope: _Envelope) -> dict[str, Any]:
    if "data_base64" not in event:
        if media_type != _JSON:
            raise _MalformedError("data of this content type belongs into data_base64")
        return _object(event.get("data"))
    encoded = event["data_base64"]
    if type(encoded) is not str or "data" in event:
        raise _MalformedError("data_base64 is not a text, or given beside data")
    try:
        return _read_data(base64.b64decode(encoded.encode(), validate=True), media_type, envelope)
    except (binascii.Error, UnicodeEncodeError):
        raise _MalformedError("data_base64 is not base64") from None


def _leniently(value: bytes) -> dict[str, Any]:
    """Return what can be read of an event that is not strict JSON; an attribute given twice as null."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        times = Counter(name for name, _ in pairs)
        return {name: None if times[name] > 1 else item for name, item in pairs}

    try:
        event = json.loads(value, object_pairs_hook=members, parse_int=_integer)
    except (ValueError, RecursionError):
        return {}
    return event if type(event) is dict else {}


# --- command


def _rank(refusal: Refusal) -> int:
    return REGISTRY[refusal.code].rank


def _read_command(command_type: str, envelope: _Envelope, context: DecodeContext) -> tuple[Any, Refusal | None, Any]:
    """Return the payload or the refusal that comes first in the order of precedence, and the content.

    The content is the payload even of a command that is refused for its topic, a pattern or a ceiling: where it came in
    and what is configured is no part of it, so the same message stays the same when those differ.
    """
    data = envelope.data
    if data is None:
        return None, Refusal(Code.MALFORMED, envelope.problem or "the message has no value"), None
    spec = COMMANDS.get(command_type)
    try:
        has_card_member = _has_card_member(command_type, data)
    except _MalformedError as error:
        return None, Refusal(Code.MALFORMED, str(error)), None
    if spec is None:
        return None, Refusal(Code.UNKNOWN_COMMAND), None
    payload, refusals = _validate(spec, data, context)
    content = None if has_card_member else payload
    if spec.channel != context.channel:
        refusals.append(Refusal(Code.WRONG_TOPIC, details={"channel": spec.channel}))
    merchant_id = data.get("merchant_id", context.merchant_id)
    if merchant_id != context.merchant_id and context.channel != CONTROL_CHANNEL:
        refusals.append(Refusal(Code.WRONG_MERCHANT))
        content = None
    if has_card_member:
        refusals.append(Refusal(Code.SENSITIVE_DATA, "a member is named like payment card data"))
    if not refusals:
        return payload, None, content
    return None, min(refusals, key=_rank), content


def _has_card_member(command_type: str, data: dict[str, Any]) -> bool:
    """Whether any member is named like card data. The members of our own flat payloads are known not to be."""
    known = _FLAT_NAMES.get(command_type)
    if known is not None and data.keys() <= known:
        return False
    config = data.get("config")
    if type(config) is dict and type(config.get("external_ref_patterns")) is dict:
        # Its members are named by payment methods, and `credit_card` is one.
        data = data | {"config": config | {"external_ref_patterns": None}}
    foreign = _names(data) - _OWN_NAMES
    return any(is_card_member(name) for name in foreign)


_OWN_NAMES = frozenset(name for command in COMMANDS for path in member_names(command) for name in path.split("."))
# A known member that holds an object instead of a value is malformed by its type, so these need no look inside.
_FLAT_NAMES = {
    name: frozenset(spec.model.model_fields) | {"merchant_id"}
    for name, spec in COMMANDS.items()
    if not any("." in path for path in member_names(name))
}

_VALIDATE = {name: spec.model.__pydantic_validator__.validate_python for name, spec in COMMANDS.items()}


def _validate(spec: CommandSpec, data: dict[str, Any], context: DecodeContext) -> tuple[Any, list[Refusal]]:
    """Return the payload and what there is against it besides topic and merchant."""
    refusals = []
    payload: Any = None
    try:
        payload = _VALIDATE[spec.type](data)
    except ValidationError as error:
        refusals.append(_refusal_of(error))
    if "external_ref" in data and _is_sensitive_ref(spec, data, context.external_ref_patterns):
        refusals.append(_refusal(Code.SENSITIVE_DATA, "external_ref", "may be a payment card number"))
    if spec.type == "Operation.RecordAndClose" and payload is not None:
        maximum = context.resource_amount_max
        if payload.resource_amount > maximum:
            refusals.append(_refusal(Code.LIMIT_EXCEEDED, "resource_amount", f"beyond the bound of {maximum:f}"))
    return payload, refusals


def _is_sensitive_ref(spec: CommandSpec, data: dict[str, Any], patterns: Mapping[str, str]) -> bool:
    """Whether the reference may be a card number and is not of a form the merchant has configured."""
    reference = data["external_ref"]
    if "external_ref" not in spec.model.model_fields or type(reference) is not str or not is_card_number(reference):
        return False
    if "payment_method" in spec.model.model_fields:
        allowed = [pattern for method, pattern in patterns.items() if method == data.get("payment_method")]
    else:
        allowed = list(patterns.values())
    return not any(matches_whole(pattern, reference) for pattern in allowed)


# --- refusals of a payload

_CODES: Mapping[str, Code] = {
    "less_than_equal": Code.LIMIT_EXCEEDED,
    "greater_than_equal": Code.LIMIT_EXCEEDED,
    Code.LIMIT_EXCEEDED.value: Code.LIMIT_EXCEEDED,
    Code.SENSITIVE_DATA.value: Code.SENSITIVE_DATA,
}


def _refusal(code: Code, path: str, problem: str) -> Refusal:
    return Refusal(code, f"{path}: {problem}" if path else problem, {"fields": [path]} if path else {})


def _refusal_of(error: ValidationError) -> Refusal:
    """Return the refusal for what a payload's model found; of several codes the first in the order of precedence."""
    by_code: dict[Code, list[tuple[str, str]]] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        code = _CODES.get(item["type"], Code.MALFORMED)
        by_code.setdefault(code, []).append((_path(item["loc"]), item["msg"]))
    code = min(by_code, key=lambda code: REGISTRY[code].rank)
    found = by_code[code]
    refusal = _refusal(code, *found[0])
    fields = sorted({path for path, _ in found if path})
    return Refusal(code, refusal.message, {"fields": fields} if fields else {})


def _path(location: tuple[int | str, ...]) -> str:
    """Return a path of members; the names that the sender chose are content and are not repeated."""
    return ".".join(str(part) if type(part) is int or part in _OWN_NAMES else "*" for part in location)
