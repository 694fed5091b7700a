"""What an audit is made of, and the catalogue's part of it.

A check is one identity of the books that must hold after every commit. It is a statement that finds the rows that
break it, never a sample: an audit that finds nothing has looked at everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch


@dataclass(frozen=True, slots=True)
class Check:
    """An identity, as SQL.

    ``checked`` is what follows FROM to count the things it is about; ``broken`` selects (place, what is wrong) of each
    thing that breaks it.
    """

    name: str
    checked: str
    broken: str


@dataclass(slots=True)
class Finding:
    """What an audit found out about one identity."""

    name: str
    checked: int = 0
    violations: int = 0
    first: str | None = None  # the first break: where it is, and what is wrong there

    def note(self, place: str, what: str) -> None:
        """Count a violation."""
        self.violations += 1
        self.first = self.first or f"{place}: {what}"


async def run(connection: AsyncConnection, check: Check) -> Finding:
    """Run one check over all rows."""
    finding = Finding(check.name, (await fetch(connection, f"SELECT count(*) FROM {check.checked}"))[0][0])
    sql = f"""
    SELECT place, what, count(*) OVER () FROM ({check.broken}) AS broken (place, what) ORDER BY place, what LIMIT 1
    """
    for place, what, count in await fetch(connection, sql):
        finding.violations, finding.first = count, f"{place}: {what}"
    return finding


CHECKS: Sequence[Check] = (
    Check(
        "a product's prices do not overlap",
        "product_prices",
        """
        SELECT format('price %s %s %s', product_code, country, currency), format('from %s', next_at)
        FROM (
            SELECT *, lead(effective_at) OVER (PARTITION BY product_code, country, currency ORDER BY effective_at)
                AS next_at FROM product_prices WHERE archived_at IS DISTINCT FROM effective_at
        ) p WHERE next_at < coalesce(archived_at, 'infinity')
        """,
    ),
    Check(
        "an operation type's versions do not overlap",
        "operation_types",
        """
        SELECT format('operation type %s', operation_code), format('from %s', next_at)
        FROM (
            SELECT *, lead(effective_at) OVER (PARTITION BY operation_code ORDER BY effective_at) AS next_at
            FROM operation_types WHERE archived_at IS DISTINCT FROM effective_at
        ) t WHERE next_at < coalesce(archived_at, 'infinity')
        """,
    ),
)
