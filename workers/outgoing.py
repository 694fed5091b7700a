"""Makes the messages of a batch: results, receipts and dead letters, the same bytes each time (spec §10)."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ledger.model import Account
from receipts.model import published
from receipts.store import Stored
from schemas.canonical import compact_json
from schemas.codec import Encoding, encode_result
from schemas.events import (
    CREDIT_NOTE,
    RECEIPT,
    dead_letter_value,
    event_headers,
    own_source,
    receipt_headers,
    result_headers,
    result_id,
)
from schemas.payloads import COMMANDS
from schemas.topics import dead_letter_topic, receipts_topic, results_topic
from workers.decide import Answer
from workers.documents import Issued
from workers.faults import planted
from workers.inbox import DeadLetter, Row
from workers.publisher import OutMessage

# Effects that are a caller's id: kept out of the stored result, completed from the command at hand.
_FROM_PAYLOAD: Mapping[str, str] = {"UserRole.Assign": "subject", "UserRole.Revoke": "subject"}


def user_of(answer: Answer, accounts: Mapping[int, Account]) -> str | None:
    """Tell whose result it is: the account's id of the moment (a tombstone after an erasure), else as given."""
    row = answer.row
    account = accounts.get(row.account_id) if row.account_id is not None else None
    if account is not None:
        return account.user_id
    return row.user_id or getattr(answer.payload, "user_id", None)


def result_value(row: Row, user_id: str | None, payload: Any) -> bytes:
    """Complete a stored result with what personal data it leaves out, in the encoding of its command."""
    member = _FROM_PAYLOAD.get(row.type)
    if row.encoding == Encoding.JSON and (member is None or row.outcome != "applied"):
        assert row.result is not None
        head = b"{" if user_id is None else b'{"user_id":' + compact_json(user_id) + b","
        return head + row.result.encode()[1:]
    result = row.stored_result()
    if member is not None and payload is not None and result["outcome"] == "applied":
        result["effects"] = {member: getattr(payload, member)} | result["effects"]
    if user_id is not None:
        result = {"user_id": user_id} | result
    return encode_result(result, Encoding(row.encoding))


def key_of(answer: Answer, user_id: str | None) -> bytes:
    spec = COMMANDS.get(answer.row.type)
    if user_id is not None and (spec is None or spec.user_field):
        return user_id.encode()
    if spec is not None and answer.payload is not None:
        return spec.record_key(answer.payload).encode()
    return answer.id.encode()


def results(merchant: str | None, answers: Sequence[Answer], accounts: Mapping[int, Account]) -> list[OutMessage]:
    """One message an answer, in order, to the partition its command came from; and one for who asked for a reply."""
    topic = results_topic(merchant)
    messages = []
    for answer in answers:
        row = answer.row
        assert row.decided_at is not None
        user_id = user_of(answer, accounts)
        value = result_value(row, user_id, answer.payload)
        event_id = result_id(merchant, answer.source, answer.id, row.fingerprint.hex())
        if planted("random_id"):
            event_id = str(uuid.uuid4())
        headers = result_headers(merchant, event_id, row.applied_at(), Encoding(row.encoding), answer.traceparent)
        key = key_of(answer, user_id)
        messages += [OutMessage(topic, key, value, headers, answer.partition)] * answer.times
    return messages


def replies(merchant: str | None, answers: Sequence[Answer], accounts: Mapping[int, Account]) -> list[OutMessage]:
    """The results that go to a reply topic as well."""
    asked = [answer for answer in answers if answer.reply_to is not None]
    made = results(merchant, asked, accounts)
    topics = [answer.reply_to for answer in asked for _ in range(answer.times)]
    return [
        OutMessage(topic, message.key, message.value, message.headers)
        for topic, message in zip(topics, made, strict=True)
        if topic is not None
    ]


def issued_documents(
    merchant: str, issued: Sequence[Issued], accounts: Mapping[int, Account], partitions: Mapping[bytes, int]
) -> list[OutMessage]:
    """The documents of a batch; ``partitions`` tells where the command of each came from."""
    stored = []
    for item in issued:
        document = item.document
        user_id = accounts[document.account_id].user_id
        erased = accounts[document.account_id].erased_at is not None
        buyer = item.shown_buyer if not erased else None
        stored.append(
            Stored(
                document.number,
                document.kind,
                document.issued_at,
                document.body,
                document.hash,
                document.command,
                user_id,
                buyer,
            )
        )
    return stored_documents(merchant, stored, partitions)


def stored_documents(merchant: str, stored: Sequence[Stored], partitions: Mapping[bytes, int]) -> list[OutMessage]:
    topic = receipts_topic(merchant)
    messages = []
    for item in stored:
        value = compact_json(published(item.body, item.hash, item.user_id, item.buyer))
        event_type = RECEIPT if item.kind == "receipt" else CREDIT_NOTE
        headers = receipt_headers(merchant, event_type, item.number, item.issued_at)
        partition = partitions.get(item.command)
        messages.append(OutMessage(topic, item.user_id.encode(), value, headers, partition))
    return messages


def dead_letters(merchant: str, letters: Sequence[DeadLetter]) -> list[OutMessage]:
    topic = dead_letter_topic(merchant)
    messages = []
    for letter in letters:
        place = f"{letter.topic}/{letter.partition}/{letter.kafka_offset}"
        value = dead_letter_value(
            letter.topic,
            letter.partition,
            letter.kafka_offset,
            letter.sha256,
            code=letter.code,
            message=letter.message,
        )
        assert letter.noted_at is not None
        headers = event_headers("Message.DeadLettered", place, own_source(merchant), letter.noted_at)
        messages.append(OutMessage(topic, place.encode(), value, headers, letter.partition))
    return messages
