"""Topics: made by us before anybody subscribes to them, never by a broker that guesses their shape."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from workers.publisher import connect_admin

VISIBLE_SECONDS_MAX = 15


class TopicMismatchError(Exception):
    """A topic exists with another number of partitions."""


@dataclass(frozen=True)
class TopicSpec:
    """The shape of a topic.

    Attributes:
        partitions: their number; it never changes, because a key must stay in its partition.
        config: the broker's names and values, e.g. `retention.ms`.
        replication: -1 is the broker's default.
    """

    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)
    replication: int = -1


async def ensure_topics(
    bootstrap_servers: str, topics: Mapping[str, TopicSpec], security: Mapping[str, Any] | None = None
) -> None:
    """Create the topics that don't exist, and wait until each of them has its leaders.

    Raises:
        TopicMismatchError: one exists with another number of partitions.
        KafkaError: the broker can't be reached, or refuses.
        TimeoutError: the topics were created and are not usable yet.
    """
    admin = await connect_admin(bootstrap_servers, security or {})
    try:
        missing = topics.keys() - set(await admin.list_topics())
        if missing:
            await _create(admin, {name: topics[name] for name in sorted(missing)})
        async with asyncio.timeout(VISIBLE_SECONDS_MAX):
            while not await _are_usable(admin, topics):
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def existing_topics(bootstrap_servers: str, security: Mapping[str, Any] | None = None) -> set[str]:
    """Return the names of all topics.

    Raises:
        KafkaError: the broker can't be reached.
    """
    admin = await connect_admin(bootstrap_servers, security or {})
    try:
        return set(await admin.list_topics())
    finally:
        await admin.close()


async def _create(admin: AIOKafkaAdminClient, topics: Mapping[str, TopicSpec]) -> None:
    wanted = [
        # The broker's default replication is accepted only with an (empty) assignment of replicas.
        NewTopic(name, spec.partitions, spec.replication, {} if spec.replication < 0 else None, dict(spec.config))
        for name, spec in topics.items()
    ]
    response = await admin.create_topics(wanted)
    for topic, code, *message in response.topic_errors:
        error = for_code(code)
        # Another worker may have been quicker.
        if code and error is not TopicAlreadyExistsError:
            raise error(f"{topic}: {' '.join(map(str, message))}")


async def _are_usable(admin: AIOKafkaAdminClient, topics: Mapping[str, TopicSpec]) -> bool:
    usable = True
    for described in await admin.describe_topics(list(topics)):
        name, partitions = described["topic"], described["partitions"]
        if described["error_code"] or not _have_leaders(partitions):
            usable = False
        elif len(partitions) != topics[name].partitions:
            raise TopicMismatchError(
                f"The topic {name} has {len(partitions)} partitions, {topics[name].partitions} are wanted"
            )
    return usable


def _have_leaders(partitions: Iterable[Mapping[str, Any]]) -> bool:
    return all(partition["error_code"] == 0 and partition["leader"] >= 0 for partition in partitions)


__all__ = ["KafkaError", "TopicMismatchError", "TopicSpec", "ensure_topics", "existing_topics"]
