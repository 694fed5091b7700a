"""How far each partition is applied and published, kept in the database that the effects are in (spec §9.1).

Kafka's committed offsets only say where fetching starts. A batch locks its positions first; if one names another
owner, this worker was replaced while it did not notice, and nothing of the batch may be written or published.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aiokafka import TopicPartition as TP
from sqlalchemy import BigInteger, Column, Integer, MetaData, Table, Text
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import execute, fetch_tuples, insert_rows
from workers.faults import planted
from workers.lanes import Lease

# A batch that another owner keeps from us is tried again after the first, and by force after the second of these:
# longer than a frozen worker stays in the group.
REFUSED_WAIT_SECONDS = 1.0
FORCE_SECONDS = 30.0

metadata = MetaData()

positions = Table(
    "positions",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("applied_next", BigInteger, nullable=False),
    Column("published_next", BigInteger, nullable=False),
)

_COLUMNS = ("topic", "partition", "owner", "generation", "applied_next", "published_next")
_LOCK = """
SELECT p.topic, p.partition, p.owner, p.generation, p.applied_next, p.published_next
FROM unnest($1::text[], $2::integer[]) AS k (topic, partition) JOIN positions p USING (topic, partition)
ORDER BY p.topic, p.partition FOR UPDATE OF p
"""


class LostOwnershipError(Exception):
    """Another worker has taken a partition over: whatever this one still holds of it is not its own any more."""


@dataclass(slots=True)
class Position:
    """One partition's row: offsets below ``published_next`` are done with, below ``applied_next`` they are decided.

    ``generation`` is the consumer group's at which the owner took over.
    """

    owner: str
    generation: int
    applied_next: int
    published_next: int

    def note_published(self, offset: int) -> None:
        """Note what this process remembers to have published; never more than is applied here."""
        self.published_next = max(self.published_next, min(offset, self.applied_next))

    def take_over(self, claim: "Claim") -> None:
        """Make the claimant the owner. Raises LostOwnershipError if a later assignment gave the partition away."""
        is_later = self.owner != claim.worker_id and self.generation > claim.generation
        if is_later and not claim.by_force and not planted("no_owner_fence"):
            raise LostOwnershipError(f"taken over by {self.owner} at generation {self.generation}")
        self.owner, self.generation = claim.worker_id, claim.generation


@dataclass(frozen=True, slots=True)
class Claim:
    """Who claims partitions, by which assignment.

    ``by_force`` is for a claimant that was refused for longer than a frozen worker can stay in the group: generations
    may begin anew when a group is made again.
    """

    worker_id: str
    generation: int
    by_force: bool = False


@dataclass(slots=True)
class Standoff:
    """How long another owner has kept a lease from partitions that it was given."""

    lease: Lease | None = None
    since: float = 0.0

    def begin(self, lease: Lease, now: float) -> None:
        """Note a refusal. Another lease begins anew: what an earlier one waited gives it no right."""
        if self.lease is not lease:
            self.lease, self.since = lease, now

    def end(self) -> None:
        self.lease = None

    def claim(self, lease: Lease, now: float) -> Claim:
        by_force = self.lease is lease and now - self.since > FORCE_SECONDS
        return Claim(lease.worker_id, lease.generation, by_force)


async def lock(connection: AsyncConnection, partitions: Iterable[TP], claim: Claim) -> dict[TP, Position]:
    """Lock the rows of the partitions, in order; those never seen begin at 0, owned by the claimant."""
    wanted = sorted(partitions)
    columns = [tp.topic for tp in wanted], [tp.partition for tp in wanted]
    found = await fetch_tuples(connection, _LOCK, *columns)
    if len(found) < len(wanted):
        rows = [(tp.topic, tp.partition, claim.worker_id, claim.generation, 0, 0) for tp in wanted]
        await insert_rows(connection, positions, _COLUMNS, rows, "ON CONFLICT DO NOTHING")
        found = await fetch_tuples(connection, _LOCK, *columns)
    return {TP(row[0], row[1]): Position(*row[2:]) for row in found}


async def save(connection: AsyncConnection, rows: Mapping[TP, Position]) -> None:
    sql = """
    UPDATE positions p SET owner = v.owner, generation = v.generation,
        applied_next = greatest(p.applied_next, v.applied_next),
        published_next = greatest(p.published_next, v.published_next)
    FROM unnest($1::text[], $2::integer[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
        AS v (topic, partition, owner, generation, applied_next, published_next)
    WHERE p.topic = v.topic AND p.partition = v.partition
    """
    if not rows:
        return
    values = [
        (tp.topic, tp.partition, row.owner, row.generation, row.applied_next, row.published_next)
        for tp, row in rows.items()
    ]
    await execute(connection, sql, *map(list, zip(*values, strict=True)))


async def take_over(connection: AsyncConnection, partitions: Iterable[TP], claim: Claim) -> None:
    """Take idle partitions over, so that a worker that was frozen with records of theirs finds another owner."""
    rows = await lock(connection, partitions, claim)
    for row in rows.values():
        row.take_over(claim)
    await save(connection, rows)


async def note_published(connection: AsyncConnection, published: Mapping[TP, int], worker_id: str) -> None:
    """Write what was published, outside of a batch; rows that another worker owns by now are left alone."""
    sql = """
    UPDATE positions p SET published_next = greatest(p.published_next, least(v.published_next, p.applied_next))
    FROM unnest($1::text[], $2::integer[], $3::bigint[]) AS v (topic, partition, published_next)
    WHERE p.topic = v.topic AND p.partition = v.partition AND p.owner = $4
    """
    if published:
        rows = [(tp.topic, tp.partition, offset) for tp, offset in published.items()]
        await connection.exec_driver_sql(sql, (*map(list, zip(*rows, strict=True)), worker_id))
