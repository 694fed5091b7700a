"""Turns the ledger's document drafts into issued documents: numbered when all ledger rows are written (spec §5)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

import receipts.store
from ledger.books import Books, DocumentDraft
from ledger.model import entry_id_of
from receipts.model import Archive, BuyerBlock, Document, Draft, Issuer, Series, series_of
from schemas.canonical import format_time
from schemas.money import format_amount

NUMBER_IN_EFFECTS = {"receipt": "receipt_number", "credit_note": "credit_note_number"}


@dataclass(frozen=True, slots=True)
class Issued:
    """A document as it is published: with what is kept beside it."""

    document: Document
    buyer: BuyerBlock | None
    draft: DocumentDraft
    shown_buyer: str | None  # the block it is published with: its own, or its receipt's


async def issue(connection: AsyncConnection, books: Books, *, clock_offset: timedelta, simulated: bool) -> list[Issued]:
    """Lock the series, number the drafts in the order they were decided, and save the documents."""
    drafts = books.drafts
    if not drafts:
        return []
    older = sorted({d.purchase.external_ref for d in drafts if d.kind != "receipt"})
    archive = await receipts.store.load_archive(connection, older)
    blocks = await receipts.store.load_buyers(connection, older)
    prefixes = [series_of(draft.kind, _config(draft)) for draft in drafts]
    series = await receipts.store.lock_series(connection, prefixes)
    clock = await receipts.store.read_clock(connection) + clock_offset
    issued = []
    for draft, prefix in zip(drafts, prefixes, strict=True):
        issuer = Issuer(_config(draft), draft.config_version, clock, simulated)
        issued.append(issue_one(issuer, draft, series[prefix], archive, blocks))
    buyers = [item.buyer for item in issued if item.buyer is not None]
    await receipts.store.save(connection, series.values(), [item.document for item in issued], buyers)
    return issued


def issue_one(issuer: Issuer, draft: DocumentDraft, series: Series, archive: Archive, blocks: dict[str, str]) -> Issued:
    """Issue one document; ``blocks`` are the buyer blocks of purchases, and are extended by a receipt's."""
    external_ref = draft.purchase.external_ref
    document, buyer = issuer.issue(_draft(draft, repeats_buyer=external_ref in blocks), series, archive)
    if buyer is not None:
        blocks[external_ref] = buyer.block
    _note_number(draft, document.number)
    return Issued(document, buyer, draft, blocks.get(external_ref))


def _config(draft: DocumentDraft) -> Any:
    assert draft.config is not None
    return draft.config


def _draft(draft: DocumentDraft, *, repeats_buyer: bool) -> Draft:
    purchase = draft.purchase
    return Draft(
        kind=draft.kind,
        command=draft.command,
        external_ref=purchase.external_ref,
        account_id=purchase.account_id,
        lot_id=entry_id_of(purchase.account_id, purchase.lot_seq),
        currency=purchase.currency,
        amount=draft.amount,
        country=purchase.country,
        facts=_facts(draft),
        upstream_tax=draft.tax,
        buyer=draft.buyer,
        # Not derived from anything: once it is deleted, the digest tells nothing about the buyer.
        salt=os.urandom(16) if draft.buyer is not None else b"",
        repeats_buyer=repeats_buyer,
    )


def _facts(draft: DocumentDraft) -> dict[str, Any]:
    """What a document says of its occasion: the product and payment, or what was reversed."""
    purchase, reversal = draft.purchase, draft.reversal
    facts: dict[str, Any] = {"payment_method": purchase.payment_method}
    if reversal is None:
        assert draft.lot is not None
        facts["product"] = {
            "product_code": purchase.product_code,
            "title": draft.title,
            "credits": purchase.credits,
            "expires_at": format_time(draft.lot.expires_at),
        }
        facts["price"] = {
            "country": purchase.country,
            "currency": purchase.currency,
            "amount": format_amount(purchase.amount, purchase.currency),
        }
        facts["order_placed_at"] = format_time(purchase.order_placed_at)
        facts["settled_at"] = format_time(purchase.settled_at)
        return facts
    key = "refund_id" if reversal.kind == "refund" else "dispute_id"
    return facts | {
        "reversal": reversal.kind,
        "reversal_key": f"{reversal.kind}:{reversal.key}",
        key: reversal.key,
        "credits_taken": reversal.taken,
        "credits_due": reversal.due,
    }


def _note_number(draft: DocumentDraft, number: str) -> None:
    if draft.kind == "receipt":
        draft.purchase.receipt_number = number
    elif draft.kind == "credit_note":
        assert draft.reversal is not None
        draft.reversal.credit_note_number = number
    else:
        assert draft.reversal is not None
        draft.reversal.correction_number = number


def numbers_by_command(issued: Iterable[Issued]) -> dict[bytes, str]:
    return {item.document.command: item.document.number for item in issued}
