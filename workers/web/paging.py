"""Cursors: where a walk stands and which point in time it shows, sealed so that nobody can make one up."""

import base64
import binascii
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.queries import Cut
from schemas.canonical import canonical_json, compact_json, format_time
from schemas.codec import parse_time
from schemas.errors import Code
from workers.web.problems import problem

_SEAL_SIZE = 16


@dataclass(frozen=True, slots=True)
class Cursor:
    """The key of the last item shown, and the cut that all pages of the walk show."""

    key: list[Any]
    cut: Cut


def _seal(secret: bytes, scope: Mapping[str, Any], payload: bytes) -> bytes:
    return hmac.digest(secret, b"cursor\n" + canonical_json(scope) + b"\n" + payload, "sha256")[:_SEAL_SIZE]


def write(cursor: Cursor, secret: bytes, scope: Mapping[str, Any]) -> str:
    """Return the text of a cursor that is good only in its scope: the address and the filters."""
    payload = compact_json([cursor.key, cursor.cut.user_seq, format_time(cursor.cut.at)])
    return _text(_seal(secret, scope, payload) + payload)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def read(text: str, secret: bytes, scope: Mapping[str, Any]) -> Cursor:
    """Return a cursor from its text; raises ``invalid_cursor``."""
    try:
        data = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise problem(Code.INVALID_CURSOR) from None
    seal, payload = data[:_SEAL_SIZE], data[_SEAL_SIZE:]
    # Bits of the last character that stand for nothing are part of the text all the same.
    if not hmac.compare_digest(seal, _seal(secret, scope, payload)) or _text(data) != text:
        raise problem(Code.INVALID_CURSOR)
    key, user_seq, at = json.loads(payload)
    return Cursor(key, Cut(user_seq, parse_time(at)))
