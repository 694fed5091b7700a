"""Bearer tokens of services and people: random, shown once, kept as a SHA-256 in the control database (spec §6)."""

import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import get_args

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from schemas.payloads import Role

PREFIX = "crd_"
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token; the token itself is not.

    ``merchant_id`` binds it to one merchant, None is good for all. ``subject`` is the user id of a user's token.
    """

    token_id: str
    role: str
    merchant_id: str | None
    subject: str | None
    note: str | None
    created_at: datetime
    revoked_at: datetime | None


_COLUMNS = "token_id, role, merchant_id, subject, note, created_at, revoked_at"


async def create(
    connection: AsyncConnection,
    role: str,
    merchant_id: str | None = None,
    subject: str | None = None,
    note: str | None = None,
) -> str:
    """Make a token and return its text, ``crd_<id>_<secret>``: the only time it can be seen.

    Raises ValueError for a role that does not exist or lacks what it is bound to: a ``user`` has a merchant and a
    subject, ``upstream`` a merchant; nobody else has a subject.
    """
    if role not in ROLES:
        raise ValueError(f"no such role: {role}; there are {', '.join(ROLES)}")
    if role in ("user", "upstream") and merchant_id is None:
        raise ValueError(f"a token of the role {role} needs a merchant")
    if (role == "user") != (subject is not None):
        raise ValueError("a token of the role user, and no other, names its user as the subject")
    token_id = secrets.token_hex(6)
    text = f"{PREFIX}{token_id}_{secrets.token_urlsafe(32)}"
    sql = """
    INSERT INTO tokens (token_id, sha256, role, merchant_id, subject, note, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp())
    """
    values = (token_id, sha256(text.encode()).digest(), role, merchant_id, subject, note)
    await connection.exec_driver_sql(sql, values)
    return text


async def list_all(connection: AsyncConnection) -> list[Token]:
    """List all tokens, revoked ones too, in the order they were made."""
    return [Token(*row) for row in await fetch(connection, f"SELECT {_COLUMNS} FROM tokens ORDER BY created_at")]


async def revoke(connection: AsyncConnection, token_id: str) -> bool:
    """End a token; workers forget it within a second. Returns whether there was such a token in force."""
    sql = "UPDATE tokens SET revoked_at = clock_timestamp() WHERE token_id = $1 AND revoked_at IS NULL"
    return bool((await connection.exec_driver_sql(sql, (token_id,))).rowcount)


async def find(connection: AsyncConnection, text: str) -> Token | None:
    """Return the token in force with this text; None for any other text."""
    token_id, _, secret = text.removeprefix(PREFIX).partition("_")
    if not (text.startswith(PREFIX) and secret and token_id.isalnum()):
        return None
    sql = f"SELECT sha256, {_COLUMNS} FROM tokens WHERE token_id = $1 AND revoked_at IS NULL"
    for stored, *row in await fetch(connection, sql, token_id):
        if hmac.compare_digest(stored, sha256(text.encode()).digest()):
            return Token(*row)
    return None
