"""The embedded stack: PostgreSQL, Kafka and workers of one folder, without Docker.

Everything is under `<root>/.credits`: `data` (delete it to begin anew), `jars` (the downloaded Kafka), `logs`, `run`
(pids and ports) and, while the stack is up, `stack.env`.
"""

import asyncio
import http.client
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from console.kafka import Kafka
from console.postgres import Postgres
from console.processes import Daemon, StackError, locked, remembered_port

CONTROL_DATABASE = "credits_control"
WORKER_READY_SECONDS_MAX = 90
WORKER_STOP_SECONDS_MAX = 45


@dataclass(frozen=True)
class Endpoints:
    """Where the services are; the names are those of the environment variables, in lower case."""

    kafka_bootstrap_servers: str
    control_database_url: str

    def environment(self) -> dict[str, str]:
        """Return the environment variables that tell a worker where the services are."""
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
            "CREDITS_CONTROL_DATABASE_URL": self.control_database_url,
        }


@dataclass(frozen=True)
class Worker:
    """A running worker process."""

    name: str
    pid: int
    url: str
    log: Path


@dataclass(frozen=True)
class Status:
    """One line of the stack's status; `pid` is None when the process does not run, or is none of ours."""

    name: str
    address: str
    pid: int | None
    log: Path | None


class Stack:
    """PostgreSQL, Kafka and workers of one folder; any number of stacks run side by side.

    The environment variables KAFKA_BOOTSTRAP_SERVERS and CREDITS_CONTROL_DATABASE_URL name services that run already:
    those are used then and not started here.

    Args:
        root: the folder that gets `.credits`.
        jars: the folder of the downloaded Kafka, to share it; default `<root>/.credits/jars`.
        console: shows the progress of the first download; default stderr.
    """

    def __init__(self, root: Path, *, jars: Path | None = None, console: Console | None = None) -> None:
        self.state = root.resolve() / ".credits"
        self.postgres = Postgres(self.state)
        self.kafka = Kafka(self.state, jars or self.state / "jars", console or Console(stderr=True))
        self._external_kafka = _external("KAFKA_BOOTSTRAP_SERVERS", lambda: self.kafka.bootstrap_servers)
        self._external_database = _external("CREDITS_CONTROL_DATABASE_URL", lambda: self.postgres.url(CONTROL_DATABASE))

    @property
    def endpoints(self) -> Endpoints:
        """Where the services are, or were last."""
        return Endpoints(
            kafka_bootstrap_servers=self._external_kafka or self.kafka.bootstrap_servers,
            control_database_url=self._external_database or self.postgres.url(CONTROL_DATABASE),
        )

    def start(self) -> Endpoints:
        """Start what does not run yet and wait until it is ready. Blocks; call it in a thread from async code.

        Raises:
            StackError: a service can't be started.
        """
        starts: list[Callable[[], None]] = []
        if not self._external_database:
            starts.append(self.postgres.start)
        if not self._external_kafka:
            starts.append(self.kafka.start)
        with self._locked(), ThreadPoolExecutor(max_workers=2) as pool:
            errors = [future.exception() for future in [pool.submit(start) for start in starts]]
        if refusals := [str(error) for error in errors if isinstance(error, StackError)]:
            raise StackError("\n".join(refusals))
        if unexpected := next(filter(None, errors), None):
            raise unexpected
        return self.endpoints

    def stop(self) -> None:
        """Stop the workers, then the services; what was not started from this folder is left alone."""
        with self._locked():
            for name in self._worker_names():
                self.stop_worker(name)
            self.kafka.stop()
            self.postgres.stop()

    def start_worker(self, name: str = "worker-1", env: Mapping[str, str] | None = None) -> Worker:
        """Start a worker process and wait until it is ready; running already, it is left as it is.

        Args:
            name: begins with `worker`.
            env: more environment variables for it.

        Raises:
            StackError: it ended or took too long; the message has the tail of its log.
        """
        daemon = self._worker(name)
        port_file = self.state / "run" / f"{name}.port"
        port_file.parent.mkdir(parents=True, exist_ok=True)
        if daemon.find() is None:
            web = {"CREDITS_WEB_BIND": "127.0.0.1", "CREDITS_WEB_PORT": str(remembered_port(port_file))}
            # Python leaves unknown -X options alone; this one makes the process known again.
            command = [sys.executable, "-X", daemon.mark, "-m", "console.main", "worker"]
            environment = {**os.environ, **self.endpoints.environment(), **web, **(env or {})}
            daemon.spawn(command, env=environment, cwd=Path(__file__).parent.parent)
        port = int(port_file.read_text())
        daemon.wait_until(lambda _: _is_ready(port), f"The worker {name}", WORKER_READY_SECONDS_MAX)
        process = daemon.find()
        if process is None:
            raise StackError(f"The worker {name} ended just after it was ready, see {daemon.log}")
        return Worker(name, process.pid, f"http://127.0.0.1:{port}", daemon.log)

    def stop_worker(self, name: str = "worker-1", limit_seconds: int = WORKER_STOP_SECONDS_MAX) -> bool:
        """Send SIGTERM, after the limit SIGKILL; return whether the worker ended by itself."""
        return self._worker(name).stop(signal.SIGTERM, limit_seconds)

    def kill_worker(self, name: str = "worker-1") -> None:
        """Kill a worker with SIGKILL, as a crash would."""
        self._worker(name).kill()

    def status(self) -> list[Status]:
        """Return one line per service and per worker."""
        lines = [
            _service_status(self.postgres, self._external_database),
            _service_status(self.kafka, self._external_kafka),
        ]
        for name in self._worker_names():
            daemon = self._worker(name)
            process = daemon.find()
            port = (self.state / "run" / f"{name}.port").read_text().strip()
            lines.append(Status(name, f"http://127.0.0.1:{port}", process.pid if process else None, daemon.log))
        return lines

    def _worker(self, name: str) -> Daemon:
        assert name.startswith("worker")
        pid_file = self.state / "run" / f"{name}.pid"
        return Daemon(pid_file, f"pidfile={pid_file}", self.state / "logs" / f"{name}.log")

    def _worker_names(self) -> list[str]:
        return sorted(file.stem for file in (self.state / "run").glob("worker*.pid"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for folder, mode in ((self.state, 0o711), (self.state / "logs", 0o700)):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        with locked(self.state / "run" / "lock"):
            yield


def up(root: Path, console: Console, prepare: Callable[[Endpoints], Awaitable[str]]) -> int:
    """Start the stack and one worker, write `.credits/stack.env` and print a summary.

    Args:
        root: the folder that gets `.credits`.
        console: gets the summary, or the reason of a failure.
        prepare: brings the databases up to date and returns an admin token.

    Returns:
        The exit code of the program.
    """
    stack = Stack(root, console=console)
    try:
        with console.status("Starting PostgreSQL and Kafka"):
            endpoints = stack.start()
        with console.status("Preparing the databases"):
            token = asyncio.run(_call(prepare, endpoints))
        with console.status("Starting a worker"):
            worker = stack.start_worker()
    except StackError as error:
        console.print(f"[red]The stack is not up.[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except Exception as error:
        log = stack.state / "logs" / "up.log"
        log.write_text(traceback.format_exc())
        console.print(f"[red]The stack is not up.[/red] {escape(repr(error))}", highlight=False, soft_wrap=True)
        console.print(f"The whole story is in {log}", highlight=False, soft_wrap=True)
        return 1
    env_file = stack.state / "stack.env"
    _write_secret(
        env_file,
        {
            **endpoints.environment(),
            "CREDITS_URL": worker.url,
            "CREDITS_TOKEN": token,
            "CREDITS_WORKER_PID": str(worker.pid),
        },
    )
    console.print(_summary(stack))
    console.print(f"Addresses and the admin token: {env_file}", highlight=False, soft_wrap=True)
    console.print("Stop it with `make down`; its data stay in .credits/data.", highlight=False)
    return 0


def down(root: Path, console: Console) -> int:
    """Stop the workers and the services of the folder; its data stay.

    Returns:
        The exit code of the program.
    """
    stack = Stack(root, console=console)
    try:
        with console.status("Stopping"):
            stack.stop()
    except (StackError, psutil.Error) as error:
        console.print(f"[red]The stack could not be stopped.[/red] {escape(str(error))}", highlight=False)
        return 1
    (stack.state / "stack.env").unlink(missing_ok=True)
    console.print("The stack is down.")
    return 0


async def _call(prepare: Callable[[Endpoints], Awaitable[str]], endpoints: Endpoints) -> str:
    return await prepare(endpoints)


def _external(variable: str, own: Callable[[], str]) -> str | None:
    """Return the address in an environment variable, None when there is none or it is our own, out of `stack.env`."""
    given = os.environ.get(variable)
    try:
        return given if given and given != own() else None
    except FileNotFoundError:
        # This stack was never started, so the address is not its own.
        return given


def _service_status(service: Kafka | Postgres, external: str | None) -> Status:
    if external:
        # The address may have a password in it.
        return Status(service.name, external.rsplit("@", 1)[-1], None, None)
    pid = service.pid
    return Status(service.name, f"127.0.0.1:{service.port}" if pid else "", pid, service.log)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _write_secret(file: Path, variables: Mapping[str, str]) -> None:
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
        handle.writelines(f"{name}={value}\n" for name, value in variables.items())


def _summary(stack: Stack) -> Table:
    table = Table("service", "address", "pid", "log", box=None, header_style="bold")
    for line in stack.status():
        pid, log = str(line.pid or "not ours"), str(line.log or "")
        table.add_row(line.name, line.address, pid, os.path.relpath(log) if log else "")
    return table
