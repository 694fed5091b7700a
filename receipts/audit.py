"""The documents' identities (spec §5, §6): one receipt a purchase, numbers without gaps, an unbroken chain a series."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from catalog.audit import Check, Finding
from receipts.model import GENESIS
from schemas.canonical import format_time

CHECKS: Sequence[Check] = (
    Check(
        "one receipt per purchase, of what was bought",
        "purchases",
        """
        SELECT format('purchase %s', external_ref), format('receipt %s, document %s', receipt_number, number)
        FROM purchases p FULL JOIN (
            SELECT *, CASE WHEN body IS JSON OBJECT THEN body::json END AS said FROM documents WHERE kind = 'receipt'
        ) d USING (external_ref)
        WHERE (receipt_number, p.account_id, p.command) IS DISTINCT FROM (number, d.account_id, d.command)
            OR (product_code, credits::text, payment_method, country, amount, currency) IS DISTINCT FROM
                (said #>> '{product,product_code}', said #>> '{product,credits}', said ->> 'payment_method',
                 said ->> 'country', (said ->> 'amount')::numeric, said ->> 'currency')
            OR (order_placed_at, settled_at) IS DISTINCT FROM
                ((said ->> 'order_placed_at')::timestamptz, (said ->> 'settled_at')::timestamptz)
        """,
    ),
    Check(
        "a credit note or correction is of one reversal",
        "documents WHERE kind <> 'receipt'",
        """
        SELECT format('document %s', coalesce(number, expected)), format('reversal %s', key)
        FROM (SELECT * FROM documents WHERE kind <> 'receipt') d FULL JOIN (
            SELECT 'credit_note' AS kind, CASE WHEN has_credit_note THEN credit_note_number END AS expected,
                external_ref, account_id, key, command
            FROM reversals WHERE has_credit_note OR credit_note_number IS NOT NULL
            UNION ALL
            SELECT 'correction', correction_number, external_ref, account_id, key, e.command
            FROM reversals r LEFT JOIN (SELECT account_id, user_seq AS given_back_seq, command FROM entries) e
                USING (account_id, given_back_seq)
            WHERE won_at IS NOT NULL AND has_credit_note OR correction_number IS NOT NULL
        ) r ON number = expected
        WHERE (d.kind, d.external_ref, d.account_id, d.command) IS DISTINCT FROM
            (r.kind, r.external_ref, r.account_id, coalesce(r.command, d.command))
        """,
    ),
)

DOCUMENTS = """
SELECT d.prefix, d.number, d.kind, d.year, d.sequence, d.issued_at, d.external_ref, d.account_id, d.body, d.hash,
    b.salt, b.block, b.account_id
FROM documents d LEFT JOIN buyers b USING (number) ORDER BY d.prefix, d.year, d.sequence
"""
"""Every document with its buyer block, in order of its series."""

SERIES = "SELECT prefix, year, next_number, last_issued_at, head FROM document_series WHERE next_number > 1 OR year > 0"


@dataclass(slots=True)
class _End:
    """Where a series stands."""

    year: int
    next_number: int
    last_issued_at: datetime | None
    head: bytes


class Archives:
    """Recomputes all series from the rows of ``DOCUMENTS``, given one by one in their order."""

    def __init__(self) -> None:
        self.numbers = Finding("document numbers are gapless and chronological")
        self.chain = Finding("the hash chain of every document series")
        self.content = Finding("a document's row and buyer block are what its body says")
        self.series = Finding("a series' row is its last document")
        self.findings = (self.numbers, self.chain, self.content, self.series)
        self._ends: dict[str, _End] = {}

    def add(self, row: Sequence[Any]) -> None:
        """Compare one document with those before it in its series."""
        prefix, number, kind, year, sequence, issued_at, external_ref, account_id, body, digest, *buyer = row
        end = self._ends.setdefault(prefix, _End(year, 1, None, GENESIS))
        expected = end.next_number if year == end.year else 1
        if sequence != expected or number != f"{prefix}-{year}-{sequence:04d}":
            self.numbers.note(number, f"number {expected} of {year} is missing")
        if end.last_issued_at is not None and issued_at < end.last_issued_at:
            self.numbers.note(number, f"issued at {issued_at}, after one of {end.last_issued_at}")
        if sha256(end.head + body.encode()).digest() != digest:
            self.chain.note(number, "its hash does not follow from its body and the document before")
        shown = {
            "number": number,
            "kind": kind,
            "issued_at": format_time(issued_at),
            "external_ref": external_ref,
            "account_id": f"{account_id:016x}",
        }
        self._compare(number, shown, body, account_id, *buyer)
        self._ends[prefix] = _End(year, sequence + 1, issued_at, digest)
        self.numbers.checked += 1
        self.chain.checked += 1
        self.content.checked += 1

    def _compare(
        self,
        number: str,
        shown: Mapping[str, str],
        body: str,
        account_id: int,
        salt: bytes | None,
        block: str | None,
        owner: int | None,
    ) -> None:
        try:
            content = json.loads(body)
        except ValueError:
            self.content.note(number, "its body is no JSON")
            return
        for name, value in shown.items():
            if content.get(name) != value:
                self.content.note(number, f"{name} is {value} in its row, {content.get(name)} in its body")
        # A buyer block may be gone, erased or past its retention; one that is there must be the one sealed.
        # A restored document's salt is lost: its digest cannot be checked any more.
        if salt and block is not None:
            digest = sha256(salt + block.encode()).hexdigest()
            if digest != content.get("buyer_digest") or owner != account_id:
                self.content.note(number, "its buyer block is not the one it was issued with")

    def end(self, rows: Sequence[Sequence[Any]]) -> None:
        """Compare the rows of ``SERIES`` with where the documents end."""
        kept = {prefix: _End(*values) for prefix, *values in rows}
        for prefix in sorted(kept.keys() | self._ends.keys()):
            self.series.checked += 1
            if kept.get(prefix) != self._ends.get(prefix):
                self.series.note(f"series {prefix}", f"{kept.get(prefix)}, documents {self._ends.get(prefix)}")
