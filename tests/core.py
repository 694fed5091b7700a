"""Drives the pure core in memory, batch by batch, as a worker does against a database; and checks its identities.

A message is a plain dict: ``type``, ``payload`` (as on the wire), ``id``, ``source``, and optionally ``record_time``
and ``topic``. A result is the dict that would be published.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from catalog.model import Catalog
from ledger.books import Books
from ledger.chain import seal
from ledger.model import GENESIS, Allocation, Entry, Lot, account_id_of, entry_id_of
from merchants.decisions import Settings
from receipts.model import Archive, BuyerBlock, Document, Issuer, Series, series_of
from schemas.envelope import DecodeContext, Incoming, decode
from schemas.payloads import COMMANDS, MerchantConfig
from schemas.topics import input_topic
from workers import documents, inbox, outgoing
from workers.decide import Desk, Fiscal
from workers.documents import Issued
from workers.inbox import Row

MERCHANT = "ararat"
SECRET = b"the secret of the merchant"
SOURCE = "/ararat/app"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

Message = Mapping[str, Any]
Result = dict[str, Any]


def config(**changes: Any) -> dict[str, Any]:
    """Return a merchant's configuration as on the wire, with members changed; `...` leaves one out."""
    whole = {
        "legal_name": "Ararat LLC",
        "registered_address": {"lines": ["1 Abovyan Street"], "city": "Yerevan", "country": "AM"},
        "country": "AM",
        "time_zone": "Asia/Yerevan",
        "locale": "en",
        "contact_email": "office@ararat.example",
        "tax_regime": "none",
        "receipt_series_prefix": "R",
        "credit_note_series_prefix": "C",
        "retention_years": 10,
        "operation_timeout_minutes": 15,
        "late_close": "refuse",
        "refund_policy": {"shortfall": "debit"},
        "chargeback_policy": {"shortfall": "debit", "credit_note": "never"},
    }
    return {name: value for name, value in (whole | changes).items() if value is not ...}


def wire_time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class Record:
    """A consumed Kafka record."""

    value: bytes | None
    headers: list[tuple[str, bytes]]
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None = None


_offsets = itertools.count()


def as_record(message: Message, merchant: str, now: datetime) -> Record:
    """Make the record of a message; without a ``record_time`` the broker took it ``now``."""
    command_type = message["type"]
    spec = COMMANDS.get(command_type)
    topic = message.get("topic") or input_topic(merchant, spec.channel if spec else "admin")
    at: datetime = message.get("record_time", now)
    headers = {
        "ce_specversion": "1.0",
        "ce_id": message["id"],
        "ce_source": message.get("source", SOURCE),
        "ce_type": command_type,
        "ce_time": wire_time(at),
        "content-type": "application/json",
    }
    return Record(
        json.dumps(message["payload"], ensure_ascii=False).encode(),
        [(name, value.encode()) for name, value in headers.items()],
        topic,
        0,
        next(_offsets),
        (at - LONG_AGO) // timedelta(milliseconds=1),
    )


class Core:
    """One merchant's whole ledger in memory. ``now`` is the merchant's clock; it moves only when told to."""

    def __init__(self, settings: dict[str, Any] | None = None, now: datetime = START) -> None:
        self.config = MerchantConfig.model_validate(settings or config())
        self.config_version = 1
        self.now = now
        self.books = self._books()
        self.roles: dict[int, str] = {}
        self.prefixes: set[tuple[str, str]] = set()
        self.inbox: dict[bytes, Row] = {}
        self.keys: dict[bytes, Row] = {}
        self.parked: dict[bytes, inbox.Parked] = {}
        self.entries: dict[int, list[Entry]] = {}
        self.allocations: dict[int, list[Allocation]] = {}
        self.series: dict[str, Series] = {}
        self.archive = Archive()
        self.documents: list[Document] = []
        self.buyers: list[BuyerBlock] = []
        self.fiscal: list[tuple[Any, ...]] = []
        self.letters: list[inbox.DeadLetter] = []
        self._ids = itertools.count(1)

    # Time

    def wait(self, **duration: float) -> "Core":
        """Let time pass: `wait(days=30)`."""
        self.now += timedelta(**duration)
        return self

    # Messages

    def message(self, command_type: str, payload: Mapping[str, Any] | None = None, **members: Any) -> dict[str, Any]:
        """Make a message with an id of its own; members are those of the payload unless it is given."""
        return {
            "type": command_type,
            "id": f"m-{next(self._ids)}",
            "source": SOURCE,
            "payload": members if payload is None else payload,
        }

    def do(self, command_type: str, **members: Any) -> Result:
        """Send one command alone and return its result, which must be exactly one."""
        (result,) = self.batch([self.message(command_type, members)])
        return result

    def applied(self, command_type: str, **members: Any) -> Result:
        result = self.do(command_type, **members)
        assert result["outcome"] == "applied", result
        return result

    def refused(self, command_type: str, **members: Any) -> str:
        """Send one command that is refused, and return the code."""
        result = self.do(command_type, **members)
        assert result["outcome"] == "rejected", result
        code: str = result["error"]["code"]
        return code

    def send(self, message: Message) -> list[Result]:
        return self.batch([message])

    def batch(self, messages: Sequence[Message]) -> list[Result]:
        """Decide messages as one batch; returns all results that are published for it, in order."""
        return [json.loads(value) for value in self.published(messages)]

    def published(self, messages: Sequence[Message]) -> list[bytes]:
        """Decide messages as one batch; returns the values of the results as published."""
        desk = self._desk()
        for message in messages:
            desk.receive(self._decoded(message))
        self._keep(desk)
        values = [out.value for out in outgoing.results(MERCHANT, desk.answers, desk.books.accounts)]
        for row in (*desk.new_rows, *desk.resolved_rows):
            account = desk.books.account(row.account_id) if row.account_id is not None else None
            row.user_id, row.body = account.user_id if account else None, {}
        check_identities(self)
        return [value for value in values if value is not None]

    def _decoded(self, message: Message) -> Incoming:
        record = as_record(message, MERCHANT, self.now)
        channel = record.topic.rpartition(".")[2]
        patterns = self.config.external_ref_patterns
        incoming = decode(record, DecodeContext(MERCHANT, channel, SECRET, patterns, Decimal(10**9)))
        assert isinstance(incoming, Incoming)
        return incoming

    def _books(self, before: Books | None = None) -> Books:
        """Return the books of the next batch: the state is carried over, the recorded facts are not."""
        catalog = before.catalog if before else Catalog()
        books = Books(self.now, self.config, self.config_version, catalog)
        if before is None:
            return books
        books.accounts = before.accounts
        books.lots_complete = set(before.accounts)
        books.lots_by_id = before.lots_by_id
        for lot in sorted(before.lots_by_id.values(), key=lambda lot: (lot.account_id, lot.user_seq)):
            if not lot.spent:
                books.lots.setdefault(lot.account_id, []).append(lot)
        books.debts = before.debts
        books.operations = before.operations
        books.purchases, books.reversals = before.purchases, before.reversals
        books.reversals_of = before.reversals_of
        return books

    def _desk(self) -> Desk:
        newest = [a.last_entry_at for a in self.books.accounts.values() if a.last_entry_at is not None]
        self.now = max([self.now, *newest])
        self.books = self._books(self.books)
        settings = Settings(self.config_version, self.config, dict(self.roles), prefixes=self.prefixes)
        accounts = self.books.accounts.values()
        return Desk(
            merchant_id=MERCHANT,
            now=self.now,
            secret=SECRET,
            books=self.books,
            settings=settings,
            inbox=self.inbox,
            keys=self.keys,
            parked=self.parked,
            fiscal=Fiscal({document.number for document in self.documents}),
            tombstones={a.user_id: a.account_id for a in accounts if a.erased_at is not None},
        )

    def _keep(self, desk: Desk) -> None:
        issued = self._issue(desk.books)
        if issued:
            desk.release_for_documents(documents.numbers_by_command(issued))
        for item in issued:
            name = documents.NUMBER_IN_EFFECTS.get(item.document.kind)
            if name is not None:
                desk.inbox[item.document.command].body["effects"][name] = item.document.number
        for row in (*desk.new_rows, *desk.resolved_rows):
            if row.body:
                row.result = inbox.result_text(row)
        for entry in desk.books.entries:
            self.entries.setdefault(entry.account_id, []).append(entry)
        for allocation in desk.books.allocations:
            self.allocations.setdefault(allocation.account_id, []).append(allocation)
        for subject, role in desk.settings.changed_roles.items():
            self.roles.pop(subject, None)
            if role is not None:
                self.roles[subject] = role
        self.fiscal += desk.fiscal.attached
        self.letters += desk.letters
        self.config, self.config_version = desk.settings.config, desk.settings.version
        erased = {account.account_id for account in desk.books.erased}
        self.buyers = [block for block in self.buyers if block.account_id not in erased]
        for row in self.inbox.values() if erased else ():
            if row.account_id in erased:
                row.user_id = desk.books.accounts[row.account_id].user_id

    def _issue(self, books: Books) -> list[Issued]:
        issued = []
        for draft in books.drafts:
            assert draft.config is not None
            prefix = series_of(draft.kind, draft.config)
            series = self.series.setdefault(prefix, Series(prefix, 0, 1, LONG_AGO))
            issuer = Issuer(draft.config, draft.config_version, self.now, False)
            item = documents.issue_one(issuer, draft, series, self.archive, self._buyer_blocks())
            self.documents.append(item.document)
            if item.buyer is not None:
                self.buyers.append(item.buyer)
            issued.append(item)
        return issued

    def _buyer_blocks(self) -> dict[str, str]:
        refs = {document.number: document.external_ref for document in self.documents}
        return {refs[buyer.number]: buyer.block for buyer in self.buyers}

    # What is there

    def account_id(self, user_id: str) -> int:
        return account_id_of(user_id, SECRET)

    def name_entry(self, user_id: str, seq: int) -> str:
        """Name a user's entry, and the lot it issues, as on the wire."""
        return entry_id_of(self.account_id(user_id), seq)

    def account(self, user_id: str) -> Any:
        return self.books.accounts[self.account_id(user_id)]

    def history(self, user_id: str) -> list[Entry]:
        return self.entries.get(self.account_id(user_id), [])

    def lots(self, user_id: str) -> list[Lot]:
        """List a user's lots in issue order."""
        mine = (lot for lot in self.books.lots_by_id.values() if lot.account_id == self.account_id(user_id))
        return sorted(mine, key=lambda lot: lot.user_seq)

    def remaining(self, user_id: str) -> list[int]:
        return [lot.remaining for lot in self.lots(user_id)]

    def figures(self, user_id: str) -> tuple[int, int]:
        """Return (balance, debt)."""
        account = self.account(user_id)
        return account.balance, account.debt

    def document_bodies(self) -> list[dict[str, Any]]:
        return [json.loads(document.body) for document in self.documents]


# Commands in short: the members that a test does not care about have values


def purchase(user_id: str = "u", external_ref: str = "pay-1", **changes: Any) -> dict[str, Any]:
    """Return the payload of a Purchase.Settled of product P at 10.00 USD, ordered at ``START``."""
    amount, currency = changes.pop("amount", "10.00"), changes.pop("currency", "USD")
    country, tax = changes.pop("country", "US"), changes.pop("tax", None)
    return {
        "user_id": user_id,
        "external_ref": external_ref,
        "product_code": "P",
        "payment_method": "card",
        "order_placed_at": wire_time(START),
        "settled_at": wire_time(START),
        "pricing_snapshot": {"country": country, "amount": amount, "currency": currency, "tax": tax},
    } | changes


def product(product_code: str = "P", **changes: Any) -> dict[str, Any]:
    whole = {
        "product_code": product_code,
        "title": "A hundred credits",
        "credits": 100,
        "access_period_days": 30,
        "distribution": "sellable",
        "prices": [{"country": "*", "currency": "USD", "amount": "10.00"}],
        "actor": "admin",
    } | changes
    return {name: value for name, value in whole.items() if value is not ...}


def operation_type(operation_code: str = "chat", **changes: Any) -> dict[str, Any]:
    return {
        "operation_code": operation_code,
        "display_name": "Chat",
        "resource_unit": "token",
        "credits_per_unit": "1",
        "actor": "admin",
    } | changes


def admin(**members: Any) -> dict[str, Any]:
    return members | {"justification": "because", "actor": "admin"}


def shop(settings: dict[str, Any] | None = None, now: datetime = START) -> Core:
    """Return a core with product P (100 credits, 30 days, 10.00 USD) and operation type chat (1 credit a token)."""
    core = Core(settings, now)
    core.applied("Product.Create", **product())
    core.applied("OperationType.CreateWithArchival", **operation_type())
    return core


def give(core: Core, credits: int, days: int = 30, user_id: str = "u") -> Result:
    """Issue a lot by an adjustment."""
    key = f"give-{next(core._ids)}"
    members = admin(adjustment_id=key, user_id=user_id, credits_delta=credits, access_period_days=days)
    return core.applied("Adjustment.Apply", **members)


def take(core: Core, credits: int, user_id: str = "u") -> Result:
    """Debit credits by an adjustment."""
    key = f"take-{next(core._ids)}"
    return core.applied("Adjustment.Apply", **admin(adjustment_id=key, user_id=user_id, credits_delta=-credits))


def opening(operation_id: str = "op-1", user_id: str = "u", **changes: Any) -> dict[str, Any]:
    return {"user_id": user_id, "operation_id": operation_id, "operation_code": "chat"} | changes


def closing(operation_id: str = "op-1", user_id: str = "u", resource_amount: str = "1", **changes: Any) -> Any:
    return {
        "user_id": user_id,
        "operation_id": operation_id,
        "resource_amount": resource_amount,
        "resource_unit": "token",
        "completed_at": wire_time(START),
    } | changes


# Identities (spec §3), checked after every batch


def check_identities(core: Core) -> None:
    books = core.books
    for account in books.accounts.values():
        lots = [lot for lot in books.lots_by_id.values() if lot.account_id == account.account_id]
        entries = core.entries.get(account.account_id, [])
        allocations = core.allocations.get(account.account_id, [])
        check_sums(account, lots, entries, allocations, core.now)
        check_chain(account, lots, entries, allocations)
    check_purchases(core)


def check_sums(
    account: Any, lots: Iterable[Lot], entries: Sequence[Entry], allocations: Sequence[Allocation], now: datetime
) -> None:
    """Check ``balance = Σ entries = Σ remaining − debt`` and what goes with it."""
    by_seq = {lot.user_seq: lot for lot in lots}
    assert [entry.user_seq for entry in entries] == list(range(1, account.last_seq + 1))
    balance = 0
    for entry in entries:
        balance += entry.amount
        assert entry.amount != 0
        assert entry.balance_after == balance
        assert (entry.user_seq in by_seq) == (entry.amount > 0)
    assert account.balance == balance
    assert account.balance == sum(lot.remaining for lot in by_seq.values()) - account.debt
    paid: dict[int, int] = {}
    covered: dict[int, int] = {}
    for allocation in allocations:
        assert allocation.credits > 0
        assert entries[allocation.entry_seq - 1].amount < 0
        assert allocation.at_seq == max(allocation.entry_seq, allocation.lot_seq)
        paid[allocation.lot_seq] = paid.get(allocation.lot_seq, 0) + allocation.credits
        covered[allocation.entry_seq] = covered.get(allocation.entry_seq, 0) + allocation.credits
    assert paid.keys() <= by_seq.keys()
    for lot in by_seq.values():
        assert lot.remaining == lot.credits - paid.get(lot.user_seq, 0) >= 0
        assert lot.spent == (lot.remaining == 0)
        assert not account.debt or not lot.remaining or lot.expires_at <= now, "debt beside credits that can be spent"
    uncovered = {e.user_seq: -e.amount - covered.get(e.user_seq, 0) for e in entries if e.amount < 0}
    assert all(credits >= 0 for credits in uncovered.values())
    assert account.debt == sum(uncovered.values())


def check_chain(account: Any, lots: Iterable[Lot], entries: Iterable[Entry], allocations: Sequence[Allocation]) -> None:
    by_seq = {lot.user_seq: lot for lot in lots}
    head = GENESIS
    for entry in entries:
        caused = sorted((a for a in allocations if a.at_seq == entry.user_seq), key=lambda a: (a.entry_seq, a.lot_seq))
        head = seal(head, entry, by_seq.get(entry.user_seq), caused)
        assert entry.hash == head
    assert account.head == head


def check_purchases(core: Core) -> None:
    books = core.books
    for bought in books.purchases.values():
        reversals = books.reversals_of.get(bought.external_ref, [])
        taken = sum(r.taken for r in reversals)
        given_back = sum(r.taken for r in reversals if r.won_at is not None)
        expired = sum(lot.expired_credits for lot in books.lots_of(bought))
        assert taken - given_back + expired <= bought.credits
        assert sum(r.amount for r in reversals if r.won_at is None) <= bought.amount
