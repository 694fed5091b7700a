"""Documents and their numbering: pure functions from a draft and a series to the issued document (spec §5).

The stored body holds no personal data: the account id stands for the user, a salted digest for the buyer block.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any
from zoneinfo import ZoneInfo

from receipts.tax import credited_tax_block, tax_block
from schemas.canonical import compact_json, format_time
from schemas.money import format_amount
from schemas.payloads import Buyer, MerchantConfig, SnapshotTax

GENESIS = bytes(32)


@dataclass(slots=True)
class Series:
    """One run of numbers: next number, year and last time of issue, and the head of its hash chain."""

    prefix: str
    year: int
    next_number: int
    last_issued_at: datetime
    head: bytes = GENESIS

    def take(self, clock: datetime, time_zone: ZoneInfo) -> tuple[str, int, datetime]:
        """Hand out the next number: gapless, never back in time, from 1 again in a new year of the merchant."""
        issued_at = max(clock, self.last_issued_at)
        year = max(issued_at.astimezone(time_zone).year, self.year)
        if year != self.year:
            self.year, self.next_number = year, 1
        sequence = self.next_number
        self.next_number += 1
        self.last_issued_at = issued_at
        return f"{self.prefix}-{self.year}-{sequence:04d}", sequence, issued_at


@dataclass(slots=True)
class Draft:
    """What a document is to say, apart from its number and time."""

    kind: str
    command: bytes
    external_ref: str
    account_id: int
    lot_id: str
    currency: str
    amount: Decimal
    country: str
    facts: dict[str, Any]  # product, payment and the like, as shown
    upstream_tax: SnapshotTax | None = None
    buyer: Buyer | None = None
    salt: bytes = b""
    repeats_buyer: bool = False  # the receipt's buyer block is this document's too
    number: str = ""  # set when issued


@dataclass(frozen=True, slots=True)
class Document:
    """An issued document: immutable, chained to the one before it in its series."""

    number: str
    kind: str
    prefix: str
    year: int
    sequence: int
    issued_at: datetime
    external_ref: str
    account_id: int
    body: str
    hash: bytes
    command: bytes


@dataclass(frozen=True, slots=True)
class BuyerBlock:
    """The erasable half of a document."""

    number: str
    account_id: int
    salt: bytes
    block: str


@dataclass(slots=True)
class Archive:
    """The documents issued so far for the purchases of a batch, by external_ref, in order of issue."""

    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, body: dict[str, Any]) -> None:
        self.bodies.setdefault(body["external_ref"], []).append(body)

    def receipt(self, external_ref: str) -> dict[str, Any]:
        return next(body for body in self.bodies[external_ref] if body["kind"] == "receipt")

    def standing_notes(self, external_ref: str) -> list[dict[str, Any]]:
        """List the credit notes that no correction has taken back."""
        issued = self.bodies[external_ref]
        corrected = {body["corrects"] for body in issued if body["kind"] == "correction"}
        return [body for body in issued if body["kind"] == "credit_note" and body["number"] not in corrected]


def merchant_block(config: MerchantConfig) -> dict[str, Any]:
    """The merchant's legal block, as copied into each document."""
    address = config.registered_address
    shown: dict[str, Any] = {
        "legal_name": config.legal_name,
        "registered_address": {
            "lines": list(address.lines),
            "city": address.city,
            **({"postal_code": address.postal_code} if address.postal_code else {}),
            "country": address.country,
        },
        "country": config.country,
        "contact_email": config.contact_email,
        "time_zone": config.time_zone,
        "locale": config.locale,
    }
    return shown | ({"tax_status_note": config.tax_status_note} if config.tax_status_note else {})


def buyer_object(buyer: Buyer) -> dict[str, Any]:
    return buyer.model_dump(exclude_none=True)


def series_of(kind: str, config: MerchantConfig) -> str:
    """Name the series a kind of document is numbered in: corrections share that of credit notes."""
    return config.receipt_series_prefix if kind == "receipt" else config.credit_note_series_prefix


@dataclass(frozen=True, slots=True)
class Issuer:
    """What all documents of a batch share: the merchant as configured then, and the moment on its clock."""

    config: MerchantConfig
    config_version: int
    clock: datetime
    simulated: bool

    def issue(self, draft: Draft, series: Series, archive: Archive) -> tuple[Document, BuyerBlock | None]:
        """Number a draft and write its body; the archive is extended by it."""
        number, sequence, issued_at = series.take(self.clock, ZoneInfo(self.config.time_zone))
        draft.number = number
        body = self._head(draft, number, issued_at) | self._content(draft, archive, issued_at)
        buyer = None
        if draft.buyer is not None:
            block = compact_json(buyer_object(draft.buyer)).decode()
            buyer = BuyerBlock(number, draft.account_id, draft.salt, block)
            body["buyer_digest"] = sha256(draft.salt + block.encode()).hexdigest()
        elif draft.repeats_buyer:
            body["buyer_digest"] = archive.receipt(draft.external_ref)["buyer_digest"]
        text = compact_json(body).decode()
        series.head = sha256(series.head + text.encode()).digest()
        archive.add(body)
        document = Document(
            number,
            draft.kind,
            series.prefix,
            series.year,
            sequence,
            issued_at,
            draft.external_ref,
            draft.account_id,
            text,
            series.head,
            draft.command,
        )
        return document, buyer

    def _head(self, draft: Draft, number: str, issued_at: datetime) -> dict[str, Any]:
        head: dict[str, Any] = {"kind": draft.kind, "number": number}
        head["receipt_number" if draft.kind == "receipt" else f"{draft.kind}_number"] = number
        head["issued_at"] = format_time(issued_at)
        if self.simulated:
            head["simulation"] = "SIMULATION"
        return head

    def _content(self, draft: Draft, archive: Archive, issued_at: datetime) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if draft.kind == "receipt":
            tax = tax_block(self.config, draft.country, draft.currency, draft.amount, draft.upstream_tax, issued_at)
        else:
            receipt = archive.receipt(draft.external_ref)
            notes = archive.standing_notes(draft.external_ref)
            content["receipt_number"] = receipt["receipt_number"]
            if draft.kind == "credit_note":
                tax = credited_tax_block(receipt, notes, draft.amount)
            else:
                corrected = next(note for note in notes if note["reversal_key"] == draft.facts["reversal_key"])
                content["corrects"], tax = corrected["number"], corrected["tax"]
        return content | {
            "external_ref": draft.external_ref,
            "account_id": f"{draft.account_id:016x}",
            "lot_id": draft.lot_id,
            "amount": format_amount(draft.amount, draft.currency),
            "currency": draft.currency,
            "country": draft.country,
            **draft.facts,
            "tax": tax,
            "merchant": merchant_block(self.config),
            "config_version": self.config_version,
        }


def published(document_body: str, hash_: bytes, user_id: str, buyer: str | None) -> dict[str, Any]:
    """Complete a stored body with what is kept beside it: whose it is, the buyer block, its hash."""
    body: dict[str, Any] = json.loads(document_body)
    body["user_id"] = user_id
    if buyer is not None:
        body["buyer"] = json.loads(buyer)
    body["hash"] = hash_.hex()
    return body


def verify_series(heads: Sequence[tuple[str, bytes]], start: bytes = GENESIS) -> int | None:
    """Recompute a series' chain from (body, hash) pairs in order; returns the index of the first break, or None."""
    head = start
    for index, (body, expected) in enumerate(heads):
        head = sha256(head + body.encode()).digest()
        if head != expected:
            return index
    return None


def credited_status(bodies: Sequence[Mapping[str, Any]]) -> str:
    """Derive a receipt's status from the documents of its purchase: paid, partially_credited or credited."""
    archive = Archive()
    for body in bodies:
        archive.add(dict(body))
    receipt = next(body for body in bodies if body["kind"] == "receipt")
    credited = sum((Decimal(n["amount"]) for n in archive.standing_notes(receipt["external_ref"])), Decimal(0))
    if not credited:
        return "paid"
    return "credited" if credited >= Decimal(receipt["amount"]) else "partially_credited"
