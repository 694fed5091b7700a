"""The hash chain of an account: each entry seals the lot it issues and the allocations made with it (spec §6).

``hash_n = SHA-256(hash_{n−1} ‖ canonical JSON of entry n)``. Times are whole microseconds since 1970, decimals
plain digits as stored, UTF-8 without spaces, so that the bytes can be recomputed from the tables alone.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import orjson

from ledger.model import Allocation, Entry, Lot

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def microseconds(at: datetime) -> int:
    return (at - EPOCH) // MICROSECOND


def seal(head: bytes, entry: Entry, lot: Lot | None, allocations: Sequence[Allocation]) -> bytes:
    """Compute the hash of ``entry`` (whose own ``hash`` is not looked at) on top of ``head``."""
    issued = lot and [
        lot.credits,
        lot.reason,
        lot.product_code,
        lot.purchase,
        microseconds(lot.issued_at),
        microseconds(lot.expires_at),
    ]
    canonical = orjson.dumps(
        [
            entry.account_id,
            entry.user_seq,
            entry.amount,
            entry.reason,
            entry.operation_type,
            format(entry.resource_amount, "f"),
            entry.resource_unit,
            entry.operation_id,
            entry.workflow_id,
            entry.note,
            entry.command.hex(),
            microseconds(entry.created_at),
            microseconds(entry.effective_at),
            entry.balance_after,
            entry.debt_after,
            issued,
            [[a.entry_seq, a.lot_seq, a.credits] for a in allocations],
        ]
    )
    return sha256(head + canonical).digest()
