"""Answers about one user: balance, lots, ledger, usage, receipts, overview, export, and why an entry is there."""

from typing import Any, TypeVar

import ledger.queries
import merchants.store
import receipts.queries
from ledger.model import Account, Entry, parse_entry_id
from schemas.canonical import format_time
from schemas.codec import parse_time
from schemas.errors import Code
from workers import queries
from workers.web.access import USER
from workers.web.calls import Call, Shown
from workers.web.problems import problem

T = TypeVar("T")

AT_A_GLANCE = 20
EXPLAINED_MAX = 200
EVERYTHING = 2**31
# Of each kind. What is made at once keeps memory and the event loop from others, and all of it is in the lists, too.
EXPORTED_MAX = 50_000


async def balance(call: Call) -> Shown:
    shown = await _balance(call)
    if call.query.get("explain"):
        found = await ledger.queries.lots(call.connection, call.account, call.cut, limit=EVERYTHING)
        shown["lots"] = [lot for lot in found if lot["remaining"]]
        shown["debts"] = await ledger.queries.debts(call.connection, call.account, call.cut)
    return shown


async def _balance(call: Call) -> Shown:
    account, cut = call.account, call.cut
    shown: Shown = {"user_id": account.user_id} | await ledger.queries.balance(call.connection, account, cut)
    if is_present(call):
        shown |= ledger.queries.lock_of(account, call.now)
        if account.open_operation is not None:
            found = await ledger.queries.operation(call.connection, account.open_operation)
            assert found is not None
            shown["open_operation"] = found[1]
    return shown | {"as_of": cut.as_object()}


def is_present(call: Call) -> bool:
    return "as_of" not in call.query and "as_of_seq" not in call.query


async def lots(call: Call) -> list[Shown]:
    after = call.after[0] if call.after else 0
    found = await ledger.queries.lots(
        call.connection, call.account, call.cut, after=after, limit=call.limit + 1, filters=call.query
    )
    return call.page(found, lambda lot: [lot["user_seq"]])


async def entries(call: Call) -> list[Shown]:
    after = call.after[0] if call.after else 0
    found = await ledger.queries.entries(
        call.connection,
        call.account,
        after=after,
        until=call.cut.user_seq,
        limit=call.limit + 1,
        filters=call.query,
    )
    return await _entry_objects(call, call.page(found, lambda entry: [entry.user_seq]))


async def _entry_objects(call: Call, found: list[Entry]) -> list[Shown]:
    shown = await ledger.queries.entry_objects(call.connection, found, call.cut)
    named = await queries.commands(call.connection, [entry.command for entry in found])
    for entry, item in zip(found, shown, strict=True):
        if entry.command in named:
            item["command"] = named[entry.command]
    return shown


async def usage(call: Call) -> list[Shown]:
    config = await merchants.store.read_config(call.connection, call.config_version)
    found = await ledger.queries.usage(
        call.connection,
        call.account,
        call.cut,
        group_by=call.query.get("group_by", ["day", "workflow_id", "operation_code"]),
        time_zone=config.time_zone,
        after=call.after,
        limit=call.limit + 1,
        filters=call.query,
    )
    return call.page(found, ledger.queries.usage_key)


async def documents(call: Call) -> list[Shown]:
    found = await receipts.queries.documents(
        call.connection,
        call.account.account_id,
        after=(parse_time(call.after[0]), call.after[1]) if call.after else None,
        limit=call.limit + 1,
        kind=call.query.get("kind"),
        issued_from=call.query.get("from"),
        issued_to=call.query.get("to"),
    )
    return call.page(found, lambda document: [document["issued_at"], document["number"]])


async def overview(call: Call) -> Shown:
    connection, account, cut = call.connection, call.account, call.cut
    latest = await ledger.queries.latest_entries(connection, account, AT_A_GLANCE)
    active = {"state": "active"}
    return {
        "user_id": account.user_id,
        "since": format_time(account.created_at or call.now),
        "balance": await _balance(call),
        "active_lots": await ledger.queries.lots(connection, account, cut, limit=AT_A_GLANCE, filters=active),
        "latest_entries": await _entry_objects(call, latest),
        "latest_operations": await ledger.queries.latest_operations(connection, account.account_id, AT_A_GLANCE),
        "latest_documents": await receipts.queries.latest_documents(connection, account.account_id, AT_A_GLANCE),
        "parked_commands": await queries.parked_of(connection, account.account_id),
        "as_of": cut.as_object(),
    }


async def export(call: Call) -> Shown:
    """Everything about one user as one document, all of it as of one moment."""
    connection, account, cut = call.connection, call.account, call.cut
    own, limit = {"account_id": account.account_id}, EXPORTED_MAX + 1
    history = _whole(await ledger.queries.entries(connection, account, after=0, until=cut.user_seq, limit=limit))
    lots = _whole(await ledger.queries.lots(connection, account, cut, limit=limit))
    operations = _whole(await ledger.queries.operations(connection, after=None, limit=limit, filters=own))
    caused = [entry.command for entry in history]
    results = _whole(await queries.results_of(connection, account.account_id, caused, limit=limit))
    return {
        "merchant_id": call.merchant.merchant_id,
        "user_id": account.user_id,
        "exported_at": format_time(call.now),
        "account": await _account_object(call),
        "balance": await _balance(call),
        "lots": lots,
        "entries": await _entry_objects(call, history),
        "operations": operations,
        "purchases": await ledger.queries.purchases(connection, after=None, limit=EVERYTHING, filters=own),
        "documents": await receipts.queries.documents(connection, account.account_id, after=None, limit=EVERYTHING),
        "commands": results,
        "parked_commands": await queries.parked_of(connection, account.account_id),
        "as_of": cut.as_object(),
    }


def _whole(found: list[T]) -> list[T]:
    if len(found) > EXPORTED_MAX:
        raise problem(Code.LIMIT_EXCEEDED, "too much for one document: page through the user's lists instead")
    return found


async def _account_object(call: Call) -> Shown:
    account = call.account
    role = (await merchants.store.load_roles(call.connection, [account.account_id])).get(account.account_id)
    shown: Shown = {
        "account_id": f"{account.account_id:016x}",
        "created_at": format_time(account.created_at or call.now),
        **ledger.queries.lock_of(account, call.now),
    }
    if account.erased_at is not None:
        shown["erased_at"] = format_time(account.erased_at)
    return shown | ({"role": role} if role is not None and role != USER else {})


# Explanations


async def explain(call: Call) -> Shown:
    """Tell what caused an entry, at what rate, and where its credits came from or went to."""
    key = parse_entry_id(call.path["entry"])
    if key is None or key[0] != call.account.account_id or not 1 <= key[1] <= call.cut.user_seq:
        raise problem(Code.NOT_FOUND, "the user has no such entry")
    seq = key[1]
    (entry,) = await ledger.queries.entries(call.connection, call.account, after=seq - 1, until=seq, limit=1)
    (shown,) = await _entry_objects(call, [entry])
    told: Shown = {"entry": shown, "as_of": call.cut.as_object()}
    if "command" in shown:
        told["command"] = shown["command"]
    told |= await _operation_behind(call, entry)
    told |= await _uses_of_lot(call, entry) if entry.amount > 0 else await _payers(call, entry, shown)
    return told | await _purchase_behind(call, entry, told)


async def _operation_behind(call: Call, entry: Entry) -> Shown:
    if entry.operation_id is None:
        return {}
    found = await ledger.queries.operation(call.connection, entry.operation_id)
    assert found is not None
    return {"operation": found[1]}


async def _payers(call: Call, entry: Entry, shown: Shown) -> Shown:
    """List the lots that paid a negative entry, each with the command and the receipt behind it."""
    account = call.account
    paid = [(_seq(a["lot_id"]), a) for a in shown["allocations"]]
    found = await ledger.queries.lots_named(call.connection, account, call.cut, [seq for seq, _ in paid])
    by_seq = {lot["user_seq"]: lot for lot in found}
    issuers = await _issuers(call, account, sorted(by_seq))
    refs = [lot["external_ref"] for lot in found if "external_ref" in lot]
    numbers = await ledger.queries.receipt_numbers(call.connection, refs)
    sources = []
    for seq, allocation in paid:
        lot = by_seq[seq]
        source: Shown = {"lot": lot, "credits": allocation["credits"], "at_seq": allocation["at_seq"]}
        if seq in issuers:
            source["command"] = issuers[seq]
        if lot.get("external_ref") in numbers:
            source["receipt_number"] = numbers[lot["external_ref"]]
        sources.append(source)
    uncovered = -entry.amount - sum(a["credits"] for _, a in paid)
    told: Shown = {"paid_by": sources, "uncovered": uncovered}
    return told | ({"lot": found[0]} if entry.reason == "expiry" else {})


def _seq(entry_id: str) -> int:
    key = parse_entry_id(entry_id)
    assert key is not None
    return key[1]


async def _issuers(call: Call, account: Account, seqs: list[int]) -> dict[int, Shown]:
    identities = await ledger.queries.commands_of(call.connection, account.account_id, seqs)
    named = await queries.commands(call.connection, identities.values())
    return {seq: named[identity] for seq, identity in identities.items() if identity in named}


async def _uses_of_lot(call: Call, entry: Entry) -> Shown:
    account, cut = call.account, call.cut
    (lot,) = await ledger.queries.lots_named(call.connection, account, cut, [entry.user_seq])
    spent_on = await ledger.queries.uses_of_lot(call.connection, account, cut, entry.user_seq, EXPLAINED_MAX)
    return {"lot": lot, "spent_on": spent_on}


async def _purchase_behind(call: Call, entry: Entry, told: Shown) -> Shown:
    """Show the purchase that an entry settled or reversed, or whose lot it issued or wrote off."""
    refs = [told["lot"]["external_ref"]] if "external_ref" in told.get("lot", {}) else []
    if entry.reason in ("refund", "chargeback") and entry.amount < 0:
        refs = await ledger.queries.purchases_reversed_by(call.connection, entry.account_id, entry.user_seq)
    found: list[Any] = []
    if refs:
        filters = {"external_ref": refs[0]}
        found = await ledger.queries.purchases(call.connection, after=None, limit=1, filters=filters)
    return {"purchase": found[0], "receipt_number": found[0]["receipt_number"]} if found else {}
