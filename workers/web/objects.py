"""Answers about a merchant's objects: catalogue, documents, operations, purchases, results of commands."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import catalog.queries
import ledger.queries
import receipts.queries
from ledger.model import account_id_of
from receipts.render import render_html, render_pdf
from schemas.codec import parse_time
from schemas.errors import Code
from workers import queries
from workers.web.access import READERS, USER
from workers.web.calls import Call, Shown
from workers.web.problems import problem

NOBODY = -1
"""An account id that no account has."""
Renderer = Callable[[Call, Shown], Awaitable[bytes]]


async def own_account(call: Call) -> int | None:
    """Return the account a user is confined to; None for those who see all. Raises account_erased."""
    if call.role in READERS:
        return None
    assert call.subject is not None
    account_id = account_id_of(call.subject, call.merchant.secret)
    account = await ledger.queries.find_account(call.connection, account_id, call.subject)
    if account is not None and account.user_id != call.subject:
        raise problem(Code.ACCOUNT_ERASED)
    return account_id


async def check_own(call: Call) -> None:
    """Let a user have a merchant's list only of what is their own, which they say by naming themselves."""
    if call.role != USER:
        return
    if "user_id" not in call.query:
        raise problem(Code.FORBIDDEN, "a user names themselves with user_id")
    if call.query["user_id"] != call.subject:
        raise problem(Code.UNKNOWN_USER)
    await own_account(call)


async def _with_account(call: Call) -> dict[str, Any]:
    """Return the filters with the account of the user they name; an erased one is found by the tombstone alone."""
    filters = dict(call.query)
    if "user_id" in filters:
        account_id = account_id_of(filters["user_id"], call.merchant.secret)
        account = await ledger.queries.find_account(call.connection, account_id, filters["user_id"])
        # Refused operations may be of somebody without an account.
        filters["account_id"] = account_id if account is None else account.account_id
        if account is not None and account.user_id != filters["user_id"]:
            filters["account_id"] = NOBODY
    return filters


# Catalogue


async def products(call: Call) -> list[Shown]:
    found = await catalog.queries.products(
        call.connection,
        call.cut.at,
        country=call.query.get("country"),
        distribution=call.query.get("distribution"),
        active_at=call.query.get("active_at"),
        after=call.after[0] if call.after else None,
        limit=call.limit + 1,
    )
    return call.page(found, lambda product: [product["product_code"]])


async def operation_types(call: Call) -> list[Shown]:
    found = await catalog.queries.operation_types(
        call.connection,
        call.cut.at,
        active_at=call.query.get("active_at"),
        state=call.query.get("state"),
        after=(call.after[0], call.after[1]) if call.after else None,
        limit=call.limit + 1,
    )
    return call.page(found, lambda kind: [kind["operation_code"], kind["version"]])


async def operation_type(call: Call) -> Shown:
    code = call.path["code"]
    versions = await catalog.queries.operation_types(call.connection, call.now, operation_code=code, limit=10_000)
    if not versions:
        raise problem(Code.UNKNOWN_OPERATION_TYPE)
    active = next((version for version in versions if version["state"] == "active"), None)
    shown: Shown = {"operation_code": code, "versions": versions}
    return shown | ({"active": active} if active else {})


# Documents


async def document(call: Call) -> Shown:
    """Show a document exactly as it was published."""
    account_id, shown = call.require(
        await receipts.queries.document(call.connection, call.path["number"]), Code.UNKNOWN_RECEIPT
    )
    if await own_account(call) not in (None, account_id):
        raise problem(Code.UNKNOWN_RECEIPT)
    return dict(shown)


async def document_status(call: Call) -> Shown:
    return await receipts.queries.standing(call.connection, await document(call))


async def _rendered(render: Callable[..., bytes], call: Call, shown: Shown) -> bytes:
    standing = await receipts.queries.standing(call.connection, shown)
    status = standing["status"] if shown["kind"] == "receipt" else None
    # Milliseconds of computing, which the loop has not.
    return await asyncio.to_thread(render, shown, call.query.get("locale"), standing["fiscal_receipts"], status)


RENDERERS: dict[str, Renderer] = {
    "text/html": partial(_rendered, render_html),
    "application/pdf": partial(_rendered, render_pdf),
}
"""How a document is rendered, by media type, besides ``application/json``: asked for with Accept."""


# Operations


async def operations(call: Call) -> list[Shown]:
    await check_own(call)
    filters = await _with_account(call)
    found = await ledger.queries.operations(
        call.connection, after=_time_and_id(call.after), limit=call.limit + 1, filters=filters
    )
    return call.page(found, lambda operation: [operation["opened_at"], operation["operation_id"]])


def _time_and_id(after: list[Any] | None) -> tuple[Any, str] | None:
    return (parse_time(after[0]), after[1]) if after else None


async def operation(call: Call) -> Shown:
    account_id, shown = call.require(
        await ledger.queries.operation(call.connection, call.path["operation"]), Code.OPERATION_NOT_FOUND
    )
    if await own_account(call) not in (None, account_id):
        raise problem(Code.OPERATION_NOT_FOUND)
    return dict(shown)


async def operation_metrics(call: Call) -> list[Shown]:
    found = await ledger.queries.operation_metrics(
        call.connection,
        call.cut.at,
        after=call.after[0] if call.after else None,
        limit=call.limit + 1,
        filters=call.query,
    )
    return call.page(found, lambda row: [row["operation_code"]])


# Purchases


async def purchases(call: Call) -> list[Shown]:
    await check_own(call)
    if call.query.get("needs_attention"):
        return await _purchases_needing_attention(call)
    filters = await _with_account(call)
    found = await ledger.queries.purchases(
        call.connection, after=_time_and_id(call.after), limit=call.limit + 1, filters=filters
    )
    return call.page(found, lambda purchase: [purchase["applied_at"], purchase["external_ref"]])


async def _purchases_needing_attention(call: Call) -> list[Shown]:
    if "user_id" in call.query:
        raise problem(Code.INVALID_PARAMETER, "user_id does not go with needs_attention", parameter="user_id")
    found = await queries.purchases_needing_attention(
        call.connection,
        after=_time_and_id(call.after),
        limit=call.limit + 1,
        external_ref=call.query.get("external_ref"),
        since=call.query.get("from"),
        until=call.query.get("to"),
    )
    return [shown for _, shown in call.page(found, lambda pair: list(pair[0]))]


# Commands


async def command(call: Call) -> Shown:
    """Show a command's stored result."""
    source, message_id, own = call.query["source"], call.query["id"], await own_account(call)
    result = await queries.stored_result(call.connection, source, message_id, own)
    if result is not None:
        return result
    parked = await queries.waiting(call.connection, source, message_id, own)
    if parked is not None:
        waits_for = parked.pop("waits_for")
        raise problem(Code.NOT_FOUND, "the command is parked: it has no result yet", waits_for=waits_for, **parked)
    raise problem(Code.NOT_FOUND, "no such command has come in")
