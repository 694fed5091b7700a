"""A small client of the command topics: sends commands, and keeps the results that come back."""

import asyncio
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from console.processes import StackError
from schemas.canonical import compact_json
from schemas.events import command_headers
from schemas.payloads import COMMANDS
from schemas.topics import CONTROL, CONTROL_CHANNEL, input_topic, results_topic

RESULT_SECONDS_MAX = 60.0
NAMED_MAX = 10
# What names the record: the user where the command has one, else its business key or code.
_KEYS = (
    "user_id",
    "refund_id",
    "dispute_id",
    "product_code",
    "operation_code",
    "receipt_number",
    "subject",
    "merchant_id",
)

Result = dict[str, Any]


class NoResultError(StackError):
    """A command got no result in time: no worker runs, or it waits for another command."""


class Client:
    """Sends commands as ``source``; ``sent`` has merchant and type, ``results`` the results, both by command id.

    Each command has exactly one result; a list that is longer shows that one was published twice.
    """

    def __init__(
        self, bootstrap_servers: str, security: Mapping[str, Any], source: str = "urn:credits:console"
    ) -> None:
        self.source = source
        self.results: defaultdict[str, list[Result]] = defaultdict(list)
        self.sent: dict[str, tuple[str | None, str]] = {}
        self._unconfirmed: list[asyncio.Future[Any]] = []
        self._producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True, linger_ms=5, **security
        )
        self._consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest", **security)

    async def __aenter__(self) -> "Client":
        try:
            await self._producer.start()
            await self._consumer.start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await self._consumer.stop()
        await self._producer.stop()

    async def watch(self, merchant: str | None, partitions: int, *, from_start: bool) -> None:
        """Collect the results of a merchant, or of the control topic: from now on, or of a new one from the start."""
        added = [TopicPartition(results_topic(merchant), number) for number in range(partitions)]
        at = {tp: await self._consumer.position(tp) for tp in self._consumer.assignment()}
        self._consumer.assign([*at, *added])
        for tp, offset in [*at.items(), *((tp, 0) for tp in added if from_start)]:
            self._consumer.seek(tp, offset)
        if not from_start:
            await self._consumer.seek_to_end(*added)

    async def send(self, merchant: str | None, command_type: str, payload: Mapping[str, Any]) -> str:
        """Send a command, not waiting for anything; returns its id. What is sent for one key keeps its order.

        Raises:
            StackError: the payload has what JSON on the wire can't have.
        """
        try:
            value = compact_json(payload)
        except (TypeError, ValueError) as error:
            raise StackError(f"This can't be sent: {error}.") from error
        message_id = str(uuid.uuid4())
        channel = COMMANDS[command_type].channel
        topic = CONTROL if channel == CONTROL_CHANNEL else input_topic(merchant or "", channel)
        key = next((str(payload[name]) for name in _KEYS if name in payload), command_type)
        at = datetime.now(UTC)
        headers = command_headers(command_type, message_id, self.source, at)
        future = await self._producer.send(topic, value, key=key.encode(), headers=headers)
        self._unconfirmed.append(future)
        self.sent[message_id] = merchant, command_type
        return message_id

    async def flush(self) -> None:
        """Wait until the broker has everything that was sent."""
        unconfirmed, self._unconfirmed = self._unconfirmed, []
        await asyncio.gather(*unconfirmed)

    async def receive(self) -> None:
        """Wait a little for results, and keep what came."""
        for records in (await self._consumer.getmany(timeout_ms=200, max_records=5000)).values():
            for record in records:
                result = json.loads(record.value)
                if result["command_source"] == self.source:
                    self.results[result["command_id"]].append(result)

    async def wait(self, ids: Iterable[str], seconds: float = RESULT_SECONDS_MAX) -> list[Result]:
        """Wait for the results of commands that were sent, and return them in the same order."""
        wanted = list(ids)
        missing = set(wanted) - self.results.keys()
        until = time.monotonic() + seconds
        while missing:
            if time.monotonic() > until:
                named = [f"{self.source} {message_id}" for message_id in wanted if message_id in missing]
                left_out = f" and {len(named) - NAMED_MAX:,} more" if len(named) > NAMED_MAX else ""
                commands = ", ".join(named[:NAMED_MAX]) + left_out
                raise NoResultError(f"No result within {seconds:.0f} s of {commands}: does a worker run?")
            await self.receive()
            missing -= self.results.keys()
        return [self.results[message_id][0] for message_id in wanted]

    async def call(
        self,
        merchant: str | None,
        command_type: str,
        payload: Mapping[str, Any],
        seconds: float = RESULT_SECONDS_MAX,
    ) -> Result:
        """Send one command and wait for its result."""
        message_id = await self.send(merchant, command_type, payload)
        await self.flush()
        return (await self.wait([message_id], seconds))[0]
