"""Whatever comes in, there is an answer."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import encode_avro
from schemas.envelope import Incoming, Undeliverable, decode
from schemas.fingerprint import normalised
from schemas.sensitive import is_card_number, redact
from tests.unit.test_schemas_messages import TYPES, Record, context, envelope, event, sample

FUZZ = settings(max_examples=300, deadline=None)

NAMES = st.sampled_from(
    ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "content-type", "ce_replyto", "traceparent", "x"]
)
CONTENT_TYPES = st.sampled_from(["application/json", "application/avro", "application/cloudevents+json", "text/plain"])
HEADERS = st.lists(st.tuples(NAMES, st.binary(max_size=40) | CONTENT_TYPES.map(str.encode)), max_size=12)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.from_regex(r"-?[0-9]{1,45}"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def answer(value: bytes | None, headers: list[tuple[str, bytes]], name: str = "Operation.Open") -> Any:
    """Decode, and check what holds for every answer."""
    found = decode(Record(value, headers), context(name))
    assert isinstance(found, Incoming | Undeliverable)
    if isinstance(found, Incoming):
        assert (found.error is None) == (found.payload is not None)
        assert (len(found.identity), len(found.fingerprint), len(found.digests) % 10) == (16, 32, 0)
        assert found.error is None or (found.digests, found.business_key) == (b"", None)
    return found


@FUZZ
@given(st.none() | st.binary(max_size=200), HEADERS)
def test_random_bytes_are_answered(value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    answer(value, headers)


@FUZZ
@given(st.sampled_from(TYPES), JSON_VALUES)
def test_random_json_is_answered(name: str, value: Any) -> None:
    found = answer(json.dumps(value).encode(errors="surrogatepass"), envelope(name), name)

    assert isinstance(found, Incoming)


@FUZZ
@given(st.sampled_from(TYPES), st.data())
def test_commands_with_changed_members_are_answered(name: str, data: st.DataObject) -> None:
    payload = sample(name)
    for _ in range(data.draw(st.integers(1, 3))):
        target = payload
        while isinstance(inner := target.get(member := data.draw(st.sampled_from([*target, "extra"]))), dict):
            if data.draw(st.booleans()):
                break
            target = inner
        target[member] = data.draw(JSON_VALUES)

    plain = answer(json.dumps(payload).encode(), envelope(name), name)
    packed = json.dumps(event(name, data=payload)).encode()
    wrapped = answer(packed, [("content-type", b"application/cloudevents+json")], name)

    assert (plain.error is None) == (wrapped.error is None)
    assert plain.payload == wrapped.payload


@FUZZ
@given(st.sampled_from(TYPES), st.booleans(), st.data())
def test_spoiled_bytes_are_answered(name: str, is_avro: bool, data: st.DataObject) -> None:
    value = bytearray(encode_avro(name, sample(name)) if is_avro else json.dumps(sample(name)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(value)))
        value[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))

    answer(bytes(value), envelope(name, "application/avro" if is_avro else "application/json"), name)


@FUZZ
@given(st.sampled_from(TYPES), st.data())
def test_accepted_content_read_again_is_the_same_command(name: str, data: st.DataObject) -> None:
    payload = sample(name)
    members = data.draw(st.sets(st.sampled_from([member for member in payload if isinstance(payload[member], str)])))
    payload |= {member: data.draw(st.text(min_size=1, max_size=30)) for member in members}
    first = answer(json.dumps(payload).encode(), envelope(name), name)
    if first.error is not None:
        return

    again = json.dumps(normalised(first.payload), default=lambda value: str(value).replace(" ", "T")).encode()
    second = answer(again, envelope(name), name)

    assert (second.error, second.fingerprint) == (None, first.fingerprint)


@FUZZ
@given(st.text(alphabet=st.sampled_from("0123456789 -x"), max_size=60))
def test_redacted_text_holds_no_bare_card_number(text: str) -> None:
    redacted = redact(text)

    assert redact(redacted) == redacted
    assert not any(is_card_number(part) for part in redacted.replace("x", " ").split())
