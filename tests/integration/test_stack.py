"""The embedded stack: a PostgreSQL and a Kafka of our own, which must survive what tests and users do to them."""

import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from rich.console import Console

from console.processes import StackError, free_port
from console.stack import Endpoints, Stack, up
from tests.services import JARS


@pytest.fixture(scope="module")
def stack(scratch: Path) -> Iterator[Stack]:
    """A stack that tests may kill; they leave it running."""
    stack = Stack(scratch / "stack", jars=JARS)
    stack.start()
    yield stack
    stack.stop()


def test_starting_a_running_stack_changes_nothing(stack: Stack) -> None:
    pids = stack.postgres.pid, stack.kafka.pid

    endpoints = Stack(stack.state.parent, jars=JARS).start()

    assert endpoints == stack.endpoints
    assert (stack.postgres.pid, stack.kafka.pid) == pids


async def test_a_committed_row_survives_a_killed_server(stack: Stack) -> None:
    url = stack.postgres.url("postgres")
    async with _connection(url) as connection:
        await connection.execute("CREATE TABLE survivors (name text); INSERT INTO survivors VALUES ('row')")

        stack.postgres.kill()
        assert stack.postgres.pid is None
        stack.postgres.start()

    assert stack.postgres.url("postgres") == url
    async with _connection(url) as connection:
        assert await connection.fetchval("SELECT name FROM survivors") == "row"


async def test_an_acknowledged_record_survives_a_killed_broker(stack: Stack) -> None:
    servers = stack.kafka.bootstrap_servers
    await _create_topic(servers, "survivors")
    await _produce(servers, "survivors", b"record")

    stack.kafka.kill()
    assert stack.kafka.pid is None
    stack.kafka.start()

    assert stack.kafka.bootstrap_servers == servers
    assert await _first_record(servers, "survivors") == b"record"


async def test_rows_and_records_survive_a_stop(stack: Stack) -> None:
    await _create_topic(stack.kafka.bootstrap_servers, "kept")
    await _produce(stack.kafka.bootstrap_servers, "kept", b"record")
    async with _connection(stack.postgres.url("postgres")) as connection:
        await connection.execute("CREATE TABLE kept (name text); INSERT INTO kept VALUES ('row')")
    endpoints = stack.endpoints

    stack.stop()
    began = time.monotonic()
    assert stack.start() == endpoints
    seconds = time.monotonic() - began

    print(f"a stack that was made before is up in {seconds:.1f} s")
    assert seconds < 20
    assert await _first_record(stack.kafka.bootstrap_servers, "kept") == b"record"
    async with _connection(stack.postgres.url("postgres")) as connection:
        assert await connection.fetchval("SELECT name FROM kept") == "row"


def test_the_lock_file_of_a_killed_server_does_not_stop_the_next_one(stack: Stack) -> None:
    lock = stack.state / "data" / "postgres" / "postmaster.pid"
    lines = lock.read_text().splitlines()
    stack.postgres.kill()
    # The system has given the old pid to another program: this one.
    lock.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")

    stack.postgres.start()

    assert stack.postgres.pid


def test_everything_listens_on_this_machine_only(stack: Stack) -> None:
    for pid in (stack.postgres.pid, stack.kafka.pid):
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


async def test_the_database_asks_for_the_password(stack: Stack) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://credits:guess@127.0.0.1:{stack.postgres.port}/postgres")

    password = stack.state / "data" / "postgres.password"
    assert password.stat().st_mode & 0o777 == 0o600


async def test_the_database_is_set_for_durability(stack: Stack) -> None:
    wanted = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "data_checksums": "on",
        "max_wal_size": "4GB",
        "max_connections": "400",
        "jit": "off",
        "server_encoding": "UTF8",
        "TimeZone": "UTC",
    }

    async with _connection(stack.postgres.url("postgres")) as connection:
        assert {name: await connection.fetchval("SELECT current_setting($1)", name) for name in wanted} == wanted
        assert await connection.fetchval("SHOW server_version_num") >= "180000"


async def test_two_stacks_do_not_disturb_each_other(stack: Stack, scratch: Path) -> None:
    neighbour = Stack(scratch / "neighbour", jars=JARS)
    pids = stack.postgres.pid, stack.kafka.pid
    try:
        endpoints = neighbour.start()
        assert endpoints.kafka_bootstrap_servers != stack.endpoints.kafka_bootstrap_servers
        assert endpoints.control_database_url != stack.endpoints.control_database_url
        await _create_topic(endpoints.kafka_bootstrap_servers, "mine")
        assert "mine" not in await _topics(stack.kafka.bootstrap_servers)
    finally:
        neighbour.stop()

    assert (stack.postgres.pid, stack.kafka.pid) == pids
    assert _processes_of(neighbour) == []


async def test_deleting_the_data_begins_anew(scratch: Path) -> None:
    stack = Stack(scratch / "reset", jars=JARS)
    try:
        stack.start()
        await _create_topic(stack.kafka.bootstrap_servers, "forgotten")
        # Even under running servers.
        shutil.rmtree(stack.state / "data")
        stack.start()
        assert "forgotten" not in await _topics(stack.kafka.bootstrap_servers)
        async with _connection(stack.postgres.url("postgres")) as connection:
            assert await connection.fetchval("SELECT 1") == 1
    finally:
        stack.stop()
    assert _processes_of(stack) == []


def test_a_pid_file_that_names_another_program_does_it_no_harm(scratch: Path) -> None:
    stack = Stack(scratch / "stranger", jars=JARS)
    for name in ("postgres", "kafka", "worker-1"):
        file = stack.state / "run" / f"{name}.pid"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{os.getpid()}\n")

    stack.stop()

    assert (stack.postgres.pid, stack.kafka.pid) == (None, None)
    assert list((stack.state / "run").glob("*.pid")) == []


def test_external_services_are_used_and_not_started(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka.test:9092")
    monkeypatch.setenv("CREDITS_CONTROL_DATABASE_URL", "postgresql://u:secret@db.test/credits_control")
    stack = Stack(scratch / "external", jars=JARS)

    endpoints = stack.start()

    assert endpoints == Endpoints("kafka.test:9092", "postgresql://u:secret@db.test/credits_control")
    assert _processes_of(stack) == []
    assert "secret" not in str(stack.status())


def test_the_own_addresses_in_the_environment_are_not_external(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stack.endpoints.environment().items():
        monkeypatch.setenv(name, value)
    stack.kafka.stop()

    Stack(stack.state.parent, jars=JARS).start()

    assert stack.kafka.pid


def test_a_server_that_cannot_start_says_why(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITS_POSTGRES_SHARED_BUFFERS", "a lot")
    stack = Stack(scratch / "refused", jars=JARS)

    with pytest.raises(StackError, match="invalid value for parameter"):
        stack.postgres.start()

    assert _processes_of(stack) == []


def test_a_registry_out_of_reach_is_told_in_words(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITS_MAVEN_REPOSITORY", f"http://127.0.0.1:{free_port()}/maven2")
    stack = Stack(scratch / "offline")

    with pytest.raises(StackError, match="could not be downloaded from http"):
        stack.kafka.start()

    assert _processes_of(stack) == []


def test_up_tells_a_failure_in_words_and_keeps_the_rest_in_a_log(stack: Stack) -> None:
    async def prepare(endpoints: Endpoints) -> str:
        raise ValueError(f"no such thing at {endpoints.kafka_bootstrap_servers}")

    screen = StringIO()

    assert up(stack.state.parent, Console(file=screen, width=500), prepare) == 1
    output = screen.getvalue()
    assert "The stack is not up" in output
    assert "no such thing" in output
    assert "Traceback" not in output
    assert "Traceback" in (stack.state / "logs" / "up.log").read_text()


def _processes_of(stack: Stack) -> list[psutil.Process]:
    """Return the processes that work in the stack's folder or name it in their command line."""
    folder = str(stack.state)
    found = psutil.process_iter(["cwd", "cmdline"])
    return [p for p in found if folder in " ".join([p.info["cwd"] or "", *(p.info["cmdline"] or [])])]


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


async def _create_topic(servers: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def _topics(servers: str) -> list[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        return list(await admin.list_topics())
    finally:
        await admin.close()


async def _produce(servers: str, topic: str, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def _first_record(servers: str, topic: str) -> bytes:
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.start()
    try:
        record = await consumer.getone()
    finally:
        await consumer.stop()
    return bytes(record.value)
