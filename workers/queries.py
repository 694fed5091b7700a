"""Reads of the inbox for HTTP: stored results, who caused what, and paid orders that need a person (spec §2, §8)."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from schemas.canonical import format_time
from schemas.envelope import message_identity
from workers import inbox

Shown = dict[str, Any]


async def stored_result(connection: AsyncConnection, source: str, message_id: str, own: int | None) -> Shown | None:
    """Return a message's result, completed with the user's id; None if there is none (yet).

    ``own`` is the only account whose commands may be shown; None is any.
    """
    rows = await inbox.load(connection, [message_identity(source, message_id)], ())
    if not rows or rows[0].result is None or own not in (None, rows[0].account_id):
        return None
    user_id = rows[0].user_id
    return ({} if user_id is None else {"user_id": user_id}) | rows[0].stored_result()


async def waiting(connection: AsyncConnection, source: str, message_id: str, own: int | None) -> Shown | None:
    """Tell what a parked command waits for, and until when; None if it is not parked, or not of the account ``own``."""
    for parked in await inbox.parked_for(connection, (), (), [message_identity(source, message_id)]):
        return parked_object(parked) if own in (None, parked.account_id) else None
    return None


async def parked_of(connection: AsyncConnection, account_id: int) -> list[Shown]:
    return [
        parked.names() | {"command_type": parked.type} | parked_object(parked)
        for parked in await inbox.parked_for(connection, (), [account_id])
    ]


def parked_object(parked: inbox.Parked) -> Shown:
    return {
        "waits_for": {parked.dependency_kind: parked.dependency_key},
        "parked_at": format_time(parked.parked_at),
        "due_at": format_time(parked.due_at),
    }


async def commands(connection: AsyncConnection, identities: Iterable[bytes]) -> dict[bytes, Shown]:
    """Name the commands with these identities: {source, id, type, actor?}."""
    sql = """
    SELECT identity, result::jsonb ->> 'command_source' AS source, result::jsonb ->> 'command_id' AS id, type, actor
    FROM inbox WHERE identity = ANY($1::bytea[]) AND result IS NOT NULL
    """
    found = {}
    for identity, *values in await fetch(connection, sql, sorted(set(identities))):
        named = zip(("source", "id", "type", "actor"), values, strict=True)
        found[identity] = {name: value for name, value in named if value is not None}
    return found


async def results_of(
    connection: AsyncConnection, account_id: int, identities: Iterable[bytes], *, limit: int
) -> list[Shown]:
    """Return the stored results of an account's commands, in the order they were decided.

    ``identities`` are those of its entries; applied commands that only opened an operation are left out.
    """
    sql = """
    SELECT result FROM inbox
    WHERE result IS NOT NULL AND (identity = ANY($1::bytea[]) OR account_id = $2 AND (
        outcome <> 'applied' OR type NOT IN ('Operation.Open', 'Operation.RecordAndClose', 'Purchase.Settled')))
    ORDER BY decided_at, identity LIMIT $3
    """
    return [json.loads(row[0]) for row in await fetch(connection, sql, sorted(set(identities)), account_id, limit)]


# Refusals are one item for each order: what was refused last, since when, how often. A malformed order has no
# reference: it is an item of its own, as is a message of the purchases topic that could not even be identified.
NEEDING_ATTENTION = """
WITH refused AS (
    SELECT r.external_ref, r.code, r.message, r.refused_at, r.command, i.topic, i.partition, i.kafka_offset,
        r.settled_at, coalesce('ref ' || r.external_ref, 'message ' || encode(r.command, 'hex')) AS key
    FROM purchase_refusals r JOIN inbox i ON i.identity = r.command
    WHERE NOT EXISTS (SELECT FROM purchases p WHERE p.external_ref = r.external_ref)
),
listed AS (
    SELECT DISTINCT ON (r.key) r.key, r.external_ref, r.code, r.message, r.refused_at, r.command,
        r.topic, r.partition, r.kafka_offset, d.sha256,
        count(*) OVER (PARTITION BY r.key) AS times, min(r.refused_at) OVER (PARTITION BY r.key) AS since
    FROM refused r LEFT JOIN dead_letters d USING (topic, partition, kafka_offset)
    WHERE d.redriven_at IS NULL AND r.settled_at IS NULL
    ORDER BY r.key, r.refused_at DESC, r.command
),
items AS (
    SELECT * FROM listed
    UNION ALL
    SELECT format('letter %s/%s/%s', d.topic, d.partition, d.kafka_offset), NULL, d.code, d.message, d.noted_at, NULL,
        d.topic, d.partition, d.kafka_offset, d.sha256, 1, d.noted_at
    FROM dead_letters d
    WHERE split_part(d.topic, '.', 3) = 'purchases' AND d.redriven_at IS NULL
        AND NOT EXISTS (SELECT FROM refused r WHERE (r.topic, r.partition, r.kafka_offset)
            = (d.topic, d.partition, d.kafka_offset))
)
"""
_LIST_NEEDING_ATTENTION = f"""
{NEEDING_ATTENTION}
SELECT * FROM items WHERE ($1::text IS NULL OR external_ref = $1)
    AND ($2::timestamptz IS NULL OR since >= $2) AND ($3::timestamptz IS NULL OR since < $3)
    AND ($4::timestamptz IS NULL OR (since, key) > ($4, $5::text))
ORDER BY since, key LIMIT $6
"""


async def purchases_needing_attention(
    connection: AsyncConnection,
    *,
    after: tuple[datetime, str] | None,
    limit: int,
    external_ref: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[tuple[tuple[datetime, str], Shown]]:
    """Show paid orders that were refused and neither applied nor settled since, and dead letters of their topic.

    Returns (key, item) pairs by the time an order was refused first.
    """
    rows = await fetch(connection, _LIST_NEEDING_ATTENTION, external_ref, since, until, *(after or (None, None)), limit)
    named = await commands(connection, [row.command for row in rows if row.command is not None])
    shown = []
    for row in rows:
        item = {
            "external_ref": row.external_ref,
            "status": "refused" if row.command is not None else "dead_lettered",
            "error": {"code": row.code, "message": row.message},
            "refused_at": format_time(row.refused_at),
            "first_refused_at": format_time(row.since),
            "times": row.times,
            "command": named.get(row.command),
            "message": {"topic": row.topic, "partition": row.partition, "offset": row.kafka_offset},
            "sha256": row.sha256.hex() if row.sha256 is not None else None,
        }
        shown.append(((row.since, row.key), {name: value for name, value in item.items() if value is not None}))
    return shown
