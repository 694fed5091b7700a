"""Says whether everything is right, from the topics and the databases alone; shares no code with the service.

    python -m tests.chaos.judge BOOTSTRAP_SERVERS CONTROL_DATABASE_URL [MERCHANT…]

prints one JSON object. ``findings`` is empty when every accepted command has exactly one effect and every delivery at
least one result, all results of one id are the same bytes, and balances, numbers and positions are as they must be.
"""

import argparse
import asyncio
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

Json = dict[str, Any]
INPUTS = ("purchases", "users", "operations", "admin", "jobs")
OUTPUTS = ("results", "receipts", "dead-letter")
EXAMPLES = 5
# Commands that may wait for another one, and so be answered out of turn.
DEPENDENT = {
    "Operation.RecordAndClose", "Operation.Cancel", "Refund.Apply", "Chargeback.Apply", "Chargeback.Reverse",
    "Receipt.AttachFiscal",
}  # fmt: skip
KEYS = {
    "Purchase.Settled": "external_ref",
    "Grant.Apply": "grant_id",
    "Adjustment.Apply": "adjustment_id",
    "Refund.Apply": "refund_id",
    "Chargeback.Apply": "dispute_id",
    "Chargeback.Reverse": "dispute_id",
    "User.SignedUp": "user_id",
    "Operation.Open": "operation_id",
    "Operation.RecordAndClose": "operation_id",
    "Operation.Cancel": "operation_id",
    "Product.Create": "product_code",
}


@dataclass
class Verdict:
    """What was counted and what was found wrong, with a few examples of each kind."""

    commands: int = 0
    deliveries: int = 0
    results: int = 0
    lost: int = 0
    unanswered: int = 0
    applied_twice: int = 0
    results_repeated: int = 0
    parked: int = 0
    aborted_seen: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def find(self, what: str, example: object, count: int = 1) -> None:
        """Note something wrong."""
        self.findings[what] += count
        if len(self.examples[what]) < EXAMPLES:
            self.examples[what].append(str(example)[:1500])

    def as_json(self) -> Json:
        """Return everything as a JSON object."""
        return {**self.__dict__, "findings": dict(self.findings), "examples": dict(self.examples)}


@dataclass
class Topics:
    """A merchant's topics as they are: what was committed, and what was aborted."""

    records: dict[str, list[ConsumerRecord]]
    aborted: list[ConsumerRecord]


Identity = tuple[str, str]


async def read(servers: str, topics: Iterable[str], isolation: str) -> dict[str, list[ConsumerRecord]]:
    """Read topics from beginning to end."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers,
        enable_auto_commit=False,
        isolation_level=isolation,
        max_partition_fetch_bytes=1 << 22,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    found: dict[str, list[ConsumerRecord]] = {topic: [] for topic in topics}
    try:
        partitions = []
        for topic in found:
            numbers = await consumer._client._wait_on_metadata(topic)
            partitions += [TopicPartition(topic, number) for number in numbers]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        left = {tp for tp in partitions if ends[tp] > 0}
        while left:
            for records in (await consumer.getmany(timeout_ms=300)).values():
                found[records[0].topic].extend(records)
            for tp in list(left):
                if await consumer.position(tp) >= ends[tp]:
                    left.discard(tp)
    finally:
        await consumer.stop()
    return found


def header(record: ConsumerRecord, name: str) -> str | None:
    """Return the text of a header that occurs once."""
    values = [value for key, value in record.headers if key == name]
    try:
        return values[0].decode() if len(values) == 1 else None
    except UnicodeDecodeError:
        return None


def identity(record: ConsumerRecord) -> Identity | None:
    """Return (source, id) of a message, None when it has none and can only be a dead letter."""
    named = [header(record, name) for name in ("ce_source", "ce_id", "ce_type")]
    if not all(named):
        return None
    return named[0] or "", named[1] or ""


class Merchant:
    """One merchant's evidence."""

    def __init__(self, name: str, verdict: Verdict) -> None:
        self.name = name
        self.verdict = verdict

    def wrong(self, what: str, example: object, count: int = 1) -> None:
        """Note something wrong with this merchant."""
        self.verdict.find(what, f"{self.name}: {example}", count)

    async def load(self, servers: str, url: str) -> None:
        """Read everything."""
        inputs = [f"credits.{self.name}.{channel}" for channel in INPUTS]
        outputs = [f"credits.{self.name}.{channel}" for channel in OUTPUTS]
        self.records = await read(servers, [*inputs, *outputs], "read_committed")
        everything = await read(servers, inputs, "read_uncommitted")
        committed = {(r.topic, r.partition, r.offset) for topic in inputs for r in self.records[topic]}
        self.aborted = [
            r for records in everything.values() for r in records if (r.topic, r.partition, r.offset) not in committed
        ]
        self.inputs = [r for topic in inputs for r in self.records[topic]]
        self.results = self.records[f"credits.{self.name}.results"]
        self.receipts = self.records[f"credits.{self.name}.receipts"]
        self.letters = self.records[f"credits.{self.name}.dead-letter"]
        database = "credits_m_" + self.name.replace("-", "_")
        connection = await asyncpg.connect(urlsplit(url)._replace(path=f"/{database}").geturl())
        try:
            self.tables: dict[str, list[Json]] = {}
            for table in (
                "accounts", "entries", "allocations", "lots", "debts", "operations", "purchases", "reversals",
                "documents", "document_series", "parked", "positions",
            ):  # fmt: skip
                self.tables[table] = [dict(row) for row in await connection.fetch(f"SELECT * FROM {table}")]
            columns = "identity, type, topic, partition, kafka_offset, outcome, code, result IS NULL AS waiting"
            self.tables["inbox"] = [dict(row) for row in await connection.fetch(f"SELECT {columns} FROM inbox")]
        finally:
            await connection.close()

    def judge(self) -> None:
        """Compare all of it."""
        self._sort()
        self._judge_answers()
        self._judge_order()
        self._judge_aborted()
        self._judge_dead_letters()
        self._judge_effects()
        self._judge_amounts()
        self._judge_ledger()
        self._judge_lots()
        self._judge_documents()
        self._judge_operations()
        self._judge_positions()

    # Deliveries and results

    def _sort(self) -> None:
        self.deliveries: dict[Identity, list[ConsumerRecord]] = defaultdict(list)
        self.nameless: list[ConsumerRecord] = []
        for record in self.inputs:
            named = identity(record)
            if named is None:
                self.nameless.append(record)
            else:
                self.deliveries[named].append(record)
        self.answers: dict[Identity, list[tuple[ConsumerRecord, Json]]] = defaultdict(list)
        for record in self.results:
            body = json.loads(record.value)
            self.answers[body["command_source"], body["command_id"]].append((record, body))
        self.waiting = {(row["source"], row["id"]) for row in self.tables["parked"]}
        verdict = self.verdict
        verdict.commands += len(self.deliveries)
        verdict.deliveries += len(self.inputs)
        verdict.results += len(self.results)
        verdict.parked += len(self.waiting)

    def _judge_answers(self) -> None:
        verdict = self.verdict
        for named, deliveries in self.deliveries.items():
            answers = self.answers.get(named, [])
            if not answers:
                if named not in self.waiting:
                    verdict.lost += 1
                    places = [(r.topic, r.partition, r.offset) for r in deliveries]
                    self.wrong("a command has no result", (named, places))
                continue
            missing = len(deliveries) - len(answers)
            if missing > 0 and named not in self.waiting:
                verdict.unanswered += missing
                places = [(r.topic, r.partition, r.offset) for r in deliveries]
                self.wrong("a delivery has no result", (named, places, len(answers)), missing)
            verdict.results_repeated += max(0, -missing)
            by_id: dict[str | None, set[bytes]] = defaultdict(set)
            for record, _ in answers:
                by_id[header(record, "ce_id")].add(record.value)
            if any(body.get("error", {}).get("code") == "internal_error" for _, body in answers):
                self.wrong("a command was refused with internal_error", (named, answers[0][1]))
            contents = {(r.value, header(r, "ce_type"), r.topic) for r in deliveries}
            if len(by_id) > len(contents):
                self.wrong("one message has results of several ids", (named, list(by_id)))
            for ce_id, values in by_id.items():
                if len(values) > 1:
                    self.wrong("results of one id differ", (named, ce_id, sorted(values)))
        for named in self.answers.keys() - self.deliveries.keys():
            self.wrong("a result answers no message", named)

    def _judge_order(self) -> None:
        """First results keep the order of their input partition, but for commands that may wait for others."""
        first: dict[Identity, tuple[int, int]] = {}
        for answered, answers in self.answers.items():
            record = min((r for r, _ in answers), key=lambda r: r.offset)
            first[answered] = (record.partition, record.offset)
        last: dict[tuple[str, int], int] = {}
        for record in sorted(self.inputs, key=lambda r: (r.topic, r.partition, r.offset)):
            named = identity(record)
            if named is None or len(self.deliveries[named]) > 1 or header(record, "ce_type") in DEPENDENT:
                continue
            partition, offset = first.get(named, (None, 0))
            if partition is None:
                continue
            if partition != record.partition:
                self.wrong("a result is in another partition than its command", named)
            elif offset < last.get((record.topic, record.partition), -1):
                self.wrong("results are out of order", (named, record.topic, record.partition, record.offset))
            else:
                last[record.topic, record.partition] = offset

    def _judge_aborted(self) -> None:
        self.verdict.aborted_seen += len(self.aborted)
        for record in self.aborted:
            named = identity(record)
            if named is not None and named not in self.deliveries and named in self.answers:
                self.wrong("an aborted message was answered", named)
        places = {(r.topic, r.partition, r.offset) for r in self.aborted}
        for row in self.tables["inbox"]:
            if (row["topic"], row["partition"], row["kafka_offset"]) in places:
                self.wrong("an aborted message was applied", row)

    def _judge_dead_letters(self) -> None:
        values: dict[tuple[str, int, int], set[bytes]] = defaultdict(set)
        for record in self.letters:
            body = json.loads(record.value)
            values[body["topic"], body["partition"], body["offset"]].add(record.value)
        by_place = {(r.topic, r.partition, r.offset): r for r in self.inputs}
        for place, bodies in values.items():
            if len(bodies) > 1:
                self.wrong("a message has two different dead letters", place)
            pointed = by_place.get(place)
            if pointed is None:
                self.wrong("a dead letter points at nothing", place)
            elif json.loads(next(iter(bodies)))["sha256"] != hashlib.sha256(pointed.value or b"").hexdigest():
                self.wrong("a dead letter has another hash than its message", place)
        for record in self.nameless:
            if (record.topic, record.partition, record.offset) not in values:
                self.verdict.lost += 1
                self.wrong("a message without identity has no dead letter", (record.topic, record.offset))

    # Effects

    def _originals(self) -> Iterable[tuple[Identity, Json]]:
        """Every applied command that is no repetition of an earlier one, by one of its results each."""
        for named, answers in self.answers.items():
            seen = set()
            for record, body in answers:
                ce_id = header(record, "ce_id")
                if ce_id not in seen and body["outcome"] == "applied" and "replay_of" not in body:
                    yield named, body
                seen.add(ce_id)

    def _payloads(self, named: Identity) -> list[Json]:
        """Return the contents that came under one identity; only the one decided first can have been applied."""
        return [json.loads(value) for value in {record.value for record in self.deliveries[named]} if value]

    def _payload(self, named: Identity) -> Json:
        return self._payloads(named)[0]

    def _judge_effects(self) -> None:
        """Entries are exactly those that results claim, each claimed by one command; keys are used once."""
        entries = {entry_id(row): row for row in self.tables["entries"]}
        claims: dict[str, list[tuple[Identity, str, int | None]]] = defaultdict(list)
        keys: dict[tuple[str, str], list[Identity]] = defaultdict(list)
        for named, body in self._originals():
            for claimed, amount in claimed_entries(body):
                claims[claimed].append((named, body["command_type"], amount))
            key = KEYS.get(body["command_type"])
            if key is not None and named in self.deliveries:
                keys[body["command_type"], str(self._payload(named)[key])].append(named)
        for named, answers in self.answers.items():
            # What only time did is told by refusals too.
            for body in {body["outcome"]: body for _, body in answers if body["outcome"] == "rejected"}.values():
                for claimed, amount in claimed_entries({"effects": {}, "time_effects": body.get("time_effects", {})}):
                    claims[claimed].append((named, body["command_type"], amount))
        for used, users in keys.items():
            if len(users) > 1:
                self.verdict.applied_twice += len(users) - 1
                self.wrong("a command was applied twice", (used, users))
        for claimed, several in claims.items():
            if len({named for named, _, _ in several}) > 1 and not all(t == "Lot.Expire" for _, t, _ in several):
                self.wrong("an entry is claimed twice", (claimed, several))
            row = entries.get(claimed)
            if row is None:
                self.verdict.lost += 1
                self.wrong("an effect is missing", (claimed, several))
            elif several[0][2] is not None and abs(row["amount"]) != several[0][2]:
                self.wrong("an entry has another amount than its result says", (row, several))
        for unclaimed in entries.keys() - claims.keys():
            self.verdict.applied_twice += 1
            self.wrong("an entry belongs to no result", entries[unclaimed])

    def _judge_amounts(self) -> None:
        """Recompute what each command is worth from its own content and the catalogue's commands."""
        products, rates = {}, {}
        for named, body in self._originals():
            if body["command_type"] == "Product.Create":
                products[self._payload(named)["product_code"]] = self._payload(named)
            if body["command_type"] == "OperationType.CreateWithArchival":
                rates[self._payload(named)["operation_code"]] = self._payload(named)
        opened = {row["operation_id"]: row["operation_code"] for row in self.tables["operations"]}
        amounts = {entry_id(row): row["amount"] for row in self.tables["entries"]}

        def worth(type_: str, payload: Json) -> int | None:
            match type_:
                case "Purchase.Settled":
                    return int(products[payload["product_code"]]["credits"])
                case "Grant.Apply":
                    return int(payload["credits"])
                case "Adjustment.Apply":
                    return int(payload["credits_delta"])
                case "Operation.RecordAndClose":
                    rate = Decimal(rates[opened[payload["operation_id"]]]["credits_per_unit"])
                    return -max(1, math.ceil(Decimal(payload["resource_amount"]) * rate))
            return None

        for named, body in self._originals():
            if named in self.deliveries:
                expected = {worth(body["command_type"], payload) for payload in self._payloads(named)}
                moved = amounts.get(body["effects"].get("entry_id"))
                if None not in expected and moved not in expected:
                    self.wrong("a command was worth something else", (named, body, moved, expected))
        self._judge_reversals(products)

    def _judge_reversals(self, products: Mapping[str, Json]) -> None:
        """Parts of a purchase never exceed it, in money and in credits, and the whole takes all of it."""
        standing: dict[str, list[Json]] = defaultdict(list)
        won = set()
        for row in self.tables["reversals"]:
            standing[row["external_ref"]].append(row)
            if row["won_at"] is not None:
                won.add(row["external_ref"])
        for row in self.tables["purchases"]:
            parts = [part for part in standing[row["external_ref"]] if part["won_at"] is None]
            money, due = sum(part["amount"] for part in parts), sum(part["due"] for part in parts)
            if money > row["amount"] or due > row["credits"]:
                self.wrong("more than a purchase was reversed", (row["external_ref"], money, due))
            whole = money == row["amount"] and row["external_ref"] not in won
            if whole and due != products[row["product_code"]]["credits"]:
                self.wrong("a whole reversal took not all credits", (row["external_ref"], money, due))

    # The ledger

    def _judge_ledger(self) -> None:
        """Replay every account's entries: no hole, right running sums, the same balance in table and results."""
        by_account: dict[int, list[Json]] = defaultdict(list)
        for row in self.tables["entries"]:
            by_account[row["account_id"]].append(row)
        self.balances: dict[tuple[str, int], int] = {}
        for account in self.tables["accounts"]:
            entries = sorted(by_account.pop(account["account_id"], []), key=lambda row: row["user_seq"])
            if [row["user_seq"] for row in entries] != list(range(1, len(entries) + 1)):
                self.wrong("a ledger has holes", account["user_id"])
            balance = 0
            for row in entries:
                balance += row["amount"]
                self.balances[account["user_id"], row["user_seq"]] = balance
                if balance != row["balance_after"]:
                    self.wrong("a running balance is wrong", (account["user_id"], row["user_seq"]))
            if (balance, len(entries)) != (account["balance"], account["last_seq"]):
                self.wrong("a balance is not the sum of entries", (account, balance))
        for orphan in by_account:
            self.wrong("entries have no account", orphan)
        erased = {
            payload["user_id"]
            for named, body in self._originals()
            if body["command_type"] == "User.Erase"
            for payload in self._payloads(named)
        }
        for named, answers in self.answers.items():
            body = answers[0][1]
            if "balance" in body and "user_id" in body and body["user_id"] not in erased:
                known = self.balances.get((body["user_id"], body["user_seq"]), 0 if body["user_seq"] == 0 else None)
                if known != body["balance"]:
                    self.wrong("a result has another balance than the ledger", (named, body, known))

    def _judge_lots(self) -> None:
        """Recompute what remains of each lot and what is owed, from the entries alone: first in, first out."""
        owned: dict[int, list[Json]] = defaultdict(list)
        for row in self.tables["lots"]:
            owned[row["account_id"]].append(row)
        by_account: dict[int, list[Json]] = defaultdict(list)
        for row in self.tables["entries"]:
            by_account[row["account_id"]].append(row)
        commands = {row["command"]: row["external_ref"] for row in self.tables["reversals"]}
        owed: Counter[int] = Counter()
        for row in self.tables["debts"]:
            owed[row["account_id"]] += row["uncovered"]
        for account in self.tables["accounts"]:
            number = account["account_id"]
            lots = {row["user_seq"]: row for row in owned[number]}
            remaining, debt = replay(sorted(by_account[number], key=lambda row: row["user_seq"]), lots, commands)
            if remaining != {seq: row["remaining"] for seq, row in lots.items()}:
                self.wrong("lots are not used first in, first out", (account["user_id"], remaining))
            if debt != owed[number] or debt != account["debt"]:
                self.wrong("a debt is wrong", (account["user_id"], debt, owed[number], account["debt"]))
            if sum(remaining.values()) - debt != account["balance"]:
                self.wrong("balance, lots and debt disagree", account["user_id"])

    def _judge_documents(self) -> None:
        """Numbers have no gap and rise with time; each purchase has one receipt; all of them came out, unchanged."""
        series: dict[tuple[str, int], list[Json]] = defaultdict(list)
        for row in self.tables["documents"]:
            series[row["prefix"], row["year"]].append(row)
        for key, rows in series.items():
            rows.sort(key=lambda row: row["sequence"])
            if [row["sequence"] for row in rows] != list(range(1, len(rows) + 1)):
                self.wrong("a series has gaps", key)
            if any(a["issued_at"] > b["issued_at"] for a, b in pairwise(rows)):
                self.wrong("a series is not in order of time", key)
        receipts = Counter(row["external_ref"] for row in self.tables["documents"] if row["kind"] == "receipt")
        purchases = {row["external_ref"] for row in self.tables["purchases"]}
        if set(receipts) != purchases or any(count > 1 for count in receipts.values()):
            self.wrong("purchases and receipts are not one to one", len(set(receipts) ^ purchases))
        published: dict[str, set[bytes]] = defaultdict(set)
        for record in self.receipts:
            body = json.loads(record.value)
            published[str(body.get("credit_note_number") or body.get("number") or body["receipt_number"])].add(
                record.value
            )
        numbers = {row["number"] for row in self.tables["documents"]}
        for number in numbers - published.keys():
            self.verdict.lost += 1
            self.wrong("a document was never published", number)
        for number in published.keys() - numbers:
            self.wrong("a document was published that is not there", number)
        for number, values in published.items():
            if len(values) > 1:
                self.wrong("a document was published with different content", (number, sorted(values)))

    def _judge_operations(self) -> None:
        """A user's operations never overlap, and at most one is open."""
        by_account: dict[int, list[Json]] = defaultdict(list)
        for row in self.tables["operations"]:
            if row["state"] != "refused":
                by_account[row["account_id"]].append(row)
        slots = {row["account_id"]: row["open_operation"] for row in self.tables["accounts"]}
        for account, rows in by_account.items():
            rows.sort(key=lambda row: (row["opened_at"], row["closed_at"] is None, row["closed_at"]))
            open_now = [row["operation_id"] for row in rows if row["state"] == "open"]
            if len(open_now) > 1 or slots[account] not in (open_now or [None]):
                self.wrong("more than one operation is open", (account, open_now, slots[account]))
            for one, next_one in pairwise(rows):
                ended = one["closed_at"] if one["state"] != "timed_out" else one["expires_at"]
                if ended is None or ended > next_one["opened_at"]:
                    self.wrong("operations overlap", (one, next_one))
        known = {row["operation_id"] for row in self.tables["operations"]}
        for named, body in self._originals():
            if body["command_type"] == "Operation.Open" and self._payload(named)["operation_id"] not in known:
                self.verdict.lost += 1
                self.wrong("an opened operation is missing", named)

    def _judge_positions(self) -> None:
        """Everything is applied and published, and the inbox has one row for every message and content."""
        ends: dict[tuple[str, int], int] = {}
        for record in self.inputs:
            place = (record.topic, record.partition)
            ends[place] = max(ends.get(place, 0), record.offset + 1)
        positions = {(row["topic"], row["partition"]): row for row in self.tables["positions"]}
        for place, end in ends.items():
            row = positions.get(place)
            if row is None or row["applied_next"] < end:
                self.wrong("a partition is not applied to its end", (place, end, row))
            elif row["published_next"] != row["applied_next"]:
                self.wrong("a partition is not noted as published", (place, row))
        rows = sum(not row["waiting"] for row in self.tables["inbox"])
        answered = sum(len({header(record, "ce_id") for record, _ in found}) for found in self.answers.values())
        if rows != answered:
            self.wrong("inbox and results do not match", (rows, answered), abs(rows - answered))
        by_key = {row["operation_id"] for row in self.tables["operations"]}
        bought = {row["external_ref"] for row in self.tables["purchases"]}
        for row in self.tables["parked"]:
            there = by_key if row["dependency_kind"] == "operation" else bought
            if row["dependency_key"] in there:
                self.wrong("a command still waits for what is there", row)


def entry_id(row: Mapping[str, Any]) -> str:
    """Return an entry's name on the wire."""
    return f"{row['account_id']:016x}-{row['user_seq']}"


def claimed_entries(body: Json) -> Iterable[tuple[str, int | None]]:
    """Yield the entries that a result claims, with the credits each must have moved if the result tells."""
    effects = body["effects"]
    if effects.get("entry_id"):
        credits = effects.get("credits", effects.get("credits_taken"))
        yield effects["entry_id"], None if credits is None else abs(credits)
    for grant in effects.get("grants", ()):
        yield grant["entry_id"], grant["credits"]
    for lot in (body.get("time_effects") or {}).get("expired", ()):
        yield lot["entry_id"], abs(lot["credits"])


def replay(
    entries: Iterable[Mapping[str, Any]], lots: Mapping[int, Mapping[str, Any]], reversals: Mapping[bytes, str]
) -> tuple[dict[int, int], int]:
    """Replay an account: return what remains of each lot, and the debt."""
    remaining: dict[int, int] = {}
    debt = 0
    for entry in entries:
        seq, amount = entry["user_seq"], entry["amount"]
        if amount > 0:
            covered = min(debt, amount)
            debt -= covered
            remaining[seq] = amount - covered
            continue
        due = -amount
        order = sorted(remaining)
        ref = reversals.get(entry["command"])
        if entry["reason"] in ("refund", "chargeback") and ref is not None:
            # The purchase's own lots first.
            order.sort(key=lambda number: (lots[number]["purchase"] != ref, number))
        for number in order:
            taken = min(due, remaining[number])
            remaining[number] -= taken
            due -= taken
        debt += due
    return remaining, debt


async def judge(servers: str, control_url: str, names: Sequence[str], repeats_max: int | None) -> Verdict:
    """Judge merchants of a control database, all of them if none is named."""
    if not names:
        connection = await asyncpg.connect(control_url)
        try:
            names = [row[0] for row in await connection.fetch("SELECT merchant_id FROM merchants ORDER BY 1")]
        finally:
            await connection.close()
    verdict = Verdict()
    for name in names:
        merchant = Merchant(name, verdict)
        await merchant.load(servers, control_url)
        merchant.judge()
    if repeats_max is not None and verdict.results_repeated > repeats_max:
        verdict.find("more results were repeated than unfinished batches had", verdict.results_repeated)
    return verdict


def main() -> int:
    """Judge, print the verdict, and return 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.judge", description=__doc__)
    parser.add_argument("servers")
    parser.add_argument("control_url")
    parser.add_argument("merchants", nargs="*")
    parser.add_argument("--repeats-max", type=int)
    options = parser.parse_args()
    verdict = asyncio.run(judge(options.servers, options.control_url, options.merchants, options.repeats_max))
    print(json.dumps(verdict.as_json(), default=str))
    return 1 if verdict.findings else 0


if __name__ == "__main__":
    sys.exit(main())
