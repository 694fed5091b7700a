"""A real PostgreSQL and a real Kafka: containers where a Docker engine answers, else the embedded stack."""

import gc
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import docker  # type: ignore[import-untyped]
import psutil
import pytest
from docker.errors import DockerException  # type: ignore[import-untyped]
from testcontainers.core.container import DockerContainer

from console.kafka import is_in_service
from console.processes import free_port
from console.stack import Stack

STATE = Path(__file__).parent.parent / ".credits"
JARS = STATE / "jars"
READY_SECONDS_MAX = 120


@dataclass(frozen=True)
class Services:
    """Where the services of this test session are."""

    kafka_bootstrap_servers: str
    # The superuser's URL of the database `postgres`.
    postgres_url: str

    def database_url(self, database: str) -> str:
        """Return the superuser's URL of a database (which need not exist)."""
        return urlsplit(self.postgres_url)._replace(path=f"/{database}").geturl()


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """Return a folder for stacks of this session; what earlier sessions left there when killed is removed."""
    for left in STATE.glob("test-*"):
        if not psutil.pid_exists(int(left.name.removeprefix("test-"))):
            for state in left.rglob(".credits"):
                Stack(state.parent, jars=JARS).stop()
            shutil.rmtree(left)
    folder = STATE / f"test-{os.getpid()}"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        # Addresses of a stack in use shall not lead tests to its data.
        patch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
        patch.delenv("CREDITS_CONTROL_DATABASE_URL", raising=False)
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def services(scratch: Path) -> Iterator[Services]:
    """Run a PostgreSQL and a Kafka for the whole session. Tests use databases, topics and merchants of their own."""
    with _containers() if _has_docker() else _embedded(scratch / "services") as services:
        yield services


@contextmanager
def _embedded(root: Path) -> Iterator[Services]:
    stack = Stack(root, jars=JARS)
    try:
        endpoints = stack.start()
        yield Services(endpoints.kafka_bootstrap_servers, stack.postgres.url("postgres"))
    finally:
        stack.stop()


def _has_docker() -> bool:
    with warnings.catch_warnings():
        # The client forgets the socket of a refused connection; it is to be closed while that is no error.
        warnings.simplefilter("ignore", ResourceWarning)
        answers = _docker_answers()
        gc.collect()
    return answers


def _docker_answers() -> bool:
    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return False
    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        client.close()


@contextmanager
def _containers() -> Iterator[Services]:
    with _postgres_container() as postgres_url, _kafka_container() as bootstrap_servers:
        yield Services(bootstrap_servers, postgres_url)


@contextmanager
def _postgres_container() -> Iterator[str]:
    port = free_port()
    container = DockerContainer("postgres:18")
    container.with_env("POSTGRES_USER", "credits").with_env("POSTGRES_PASSWORD", "tests").with_env(
        "POSTGRES_DB", "postgres"
    )
    container.with_env("POSTGRES_INITDB_ARGS", "--locale-provider=builtin --locale=C.UTF-8 --encoding=UTF8")
    container.with_command(
        "postgres -c max_connections=400 -c jit=off -c max_wal_size=4GB -c log_error_verbosity=terse"
    )
    container.ports = {"5432/tcp": ("127.0.0.1", port)}  # type: ignore[dict-item]
    # Over TCP: while the image prepares the data folder, its server listens on a socket file only.
    ready = ["pg_isready", "--quiet", "--host=127.0.0.1", "--username=credits", "--dbname=postgres"]
    with container:
        _wait_until(lambda: container.exec(ready).exit_code == 0, "PostgreSQL")
        yield f"postgresql://credits:tests@127.0.0.1:{port}/postgres"


@contextmanager
def _kafka_container() -> Iterator[str]:
    # The broker tells its clients where it is, so the port must be known before it starts.
    port = free_port()
    container = DockerContainer("apache/kafka:4.1.0")
    settings = {
        "NODE_ID": "1",
        "PROCESS_ROLES": "broker,controller",
        "LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "LOG_MESSAGE_TIMESTAMP_TYPE": "LogAppendTime",
        "AUTO_CREATE_TOPICS_ENABLE": "false",
        "OFFSETS_TOPIC_NUM_PARTITIONS": "4",
        "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_NUM_PARTITIONS": "4",
        "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    }
    for name, value in settings.items():
        container.with_env(f"KAFKA_{name}", value)
    container.ports = {"9092/tcp": ("127.0.0.1", port)}  # type: ignore[dict-item]
    with container:
        _wait_until(lambda: is_in_service(port), "Kafka")
        yield f"127.0.0.1:{port}"


def _wait_until(is_ready: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + READY_SECONDS_MAX
    while not is_ready():
        assert time.monotonic() < end, f"{what} is not ready after {READY_SECONDS_MAX} seconds"
        time.sleep(0.1)
