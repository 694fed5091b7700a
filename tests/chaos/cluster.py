"""The processes that chaos strikes: PostgreSQL, Kafka and workers of one folder, with proxies before both services."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from rich.console import Console

from console.kafka import Kafka
from console.postgres import SYSTEM_USER, Postgres
from console.processes import Daemon, free_port, is_root, tail
from console.stack import CONTROL_DATABASE
from tests.chaos.proxy import Proxy

PROJECT = Path(__file__).parent.parent.parent
SESSION_SECONDS = 6
DISK_BYTES = 3 << 30


class ProxiedKafka(Kafka):
    """A broker that tells the clients of a second listener to come through a proxy."""

    def __init__(self, state: Path, jars: Path, console: Console) -> None:
        super().__init__(state, jars, console)
        self.proxied_port = free_port()
        self.proxy_port = free_port()

    def _write_properties(self, data: Path) -> None:
        super()._write_properties(data)
        lines = []
        for line in self._properties.read_text().splitlines():
            key = line.partition("=")[0]
            if key == "listeners":
                line += f",PROXIED://127.0.0.1:{self.proxied_port}"
            elif key == "advertised.listeners":
                line += f",PROXIED://127.0.0.1:{self.proxy_port}"
            elif key == "listener.security.protocol.map":
                line += ",PROXIED:PLAINTEXT"
            lines.append(line)
        self._properties.write_text("\n".join(lines) + "\n")


@dataclass
class Exit:
    """A worker that ended without having been told to.

    Attributes:
        served: whether it had an assignment; one that finds no service when it starts ends at once.
    """

    worker: str
    served: bool
    log: str


@dataclass
class Worker:
    """A worker process, as it should be: the cluster starts it again when it ends by itself."""

    name: str
    daemon: Daemon
    wanted: bool = False
    expected: bool = False  # its end was asked for
    starts: list[float] = field(default_factory=list)
    served: Callable[[], bool] = bool


def _worker_daemon(state: Path, name: str) -> Daemon:
    pid_file = state / "run" / f"{name}.pid"
    return Daemon(pid_file, f"pidfile={pid_file}", state / "logs" / f"{name}.log")


class Cluster:
    """Services, proxies and workers of one folder.

    Args:
        root: gets `.credits`; made anew.
        jars: the folder of the downloaded Kafka.
        environment: more environment variables for the workers.
    """

    def __init__(self, root: Path, jars: Path, environment: dict[str, str] | None = None) -> None:
        self.state = root.resolve() / ".credits"
        self._clear(jars)
        for folder, mode in ((self.state, 0o711), (self.state / "logs", 0o700), (self.state / "run", 0o700)):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        self.postgres = Postgres(self.state)
        self.kafka = ProxiedKafka(self.state, jars.resolve(), Console(stderr=True))
        self.workers: dict[str, Worker] = {}
        self.exits: list[Exit] = []
        self._environment = environment or {}
        self._proxies: list[Proxy] = []
        # Who starts a worker and who looks after it are different threads.
        self._starting = threading.RLock()

    def _clear(self, jars: Path) -> None:
        """End and remove what a run that was killed left in the folder."""
        for pid_file in self.state.glob("run/*.pid"):
            _worker_daemon(self.state, pid_file.stem).kill()
        if self.state.exists():
            ProxiedKafka(self.state, jars.resolve(), Console(stderr=True)).stop()
            Postgres(self.state).stop()
        self._remove_disk()
        shutil.rmtree(self.state, ignore_errors=True)

    @property
    def bootstrap_servers(self) -> str:
        """The broker, not through the proxy."""
        return self.kafka.bootstrap_servers

    def database_url(self, database: str = CONTROL_DATABASE) -> str:
        """The superuser's URL of a database, not through the proxy."""
        return self.postgres.url(database)

    def start(self) -> None:
        """Start the services and make the schemas."""
        self.postgres.start()
        self.kafka.start()
        self.pg_proxy = Proxy(self.postgres.port, free_port())
        self.kafka_proxy = Proxy(self.kafka.proxied_port, self.kafka.proxy_port)
        self._proxies = [self.pg_proxy, self.kafka_proxy]
        url = urlsplit(self.database_url())
        proxied = url._replace(netloc=url.netloc.replace(f":{self.postgres.port}", f":{self.pg_proxy.port}"))
        self.environment = {
            **os.environ,
            "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{self.kafka_proxy.port}",
            "CREDITS_CONTROL_DATABASE_URL": proxied.geturl(),
            "CREDITS_SESSION_TIMEOUT": str(SESSION_SECONDS),
            "CREDITS_REBALANCE_TIMEOUT": "20",
            "CREDITS_WEB_BIND": "127.0.0.1",
            "PYTHONPATH": str(PROJECT),
            "CREDITS_TEST_FAULTS": "1",
            **self._environment,
        }
        command = [sys.executable, "-m", "console.main", "migrate"]
        subprocess.run(command, env=self.environment, cwd=PROJECT, check=True, capture_output=True)

    def stop(self) -> None:
        """Stop everything and remove the small disk."""
        for worker in self.workers.values():
            worker.wanted = False
            if process := worker.daemon.find():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            worker.daemon.kill()
        for proxy in self._proxies:
            proxy.close()
        self.kafka.stop()
        self.postgres.stop()
        self._remove_disk()

    # A disk that can be full

    @property
    def data(self) -> Path:
        """The data folder of PostgreSQL."""
        return self.state / "data" / "postgres"

    def make_disk(self) -> str | None:
        """Put PostgreSQL's data on a small disk in memory; return why that is not possible, if so."""
        if not is_root() or sys.platform != "linux":
            return "mounting a small disk needs root on Linux"
        self.postgres.start()
        self.postgres.stop()
        options = f"size={DISK_BYTES},mode=0700,uid={SYSTEM_USER},gid={SYSTEM_USER}"
        aside = self.data.with_suffix(".aside")
        self.data.rename(aside)
        self.data.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", options, "credits-chaos", str(self.data)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            self.data.rmdir()
            aside.rename(self.data)
            return f"mounting a small disk failed: {done.stderr.strip()}"
        subprocess.run(["cp", "-a", f"{aside}/.", str(self.data)], check=True)
        subprocess.run(["rm", "-rf", str(aside)], check=True)
        return None

    def _remove_disk(self) -> None:
        if self.data.is_mount():
            subprocess.run(["umount", str(self.data)], check=True)

    def fill_disk(self) -> None:
        """Take all the room that is left."""
        with (self.data / "ballast").open("wb") as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(1 << 20))
                ballast.flush()

    def free_disk(self) -> None:
        """Give the room back."""
        (self.data / "ballast").unlink(missing_ok=True)

    # Workers

    def start_worker(self, name: str, fault: str | None = None) -> None:
        """Start a worker process, with a fault built in perhaps; it is started again without when it ends."""
        with self._starting:
            self._start_worker(name, fault)

    def _start_worker(self, name: str, fault: str | None) -> None:
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = Worker(name, _worker_daemon(self.state, name))
        assert worker.daemon.find() is None, f"{name} runs already"
        environment = self.environment | {"CREDITS_WEB_PORT": str(free_port())}
        if fault:
            environment["CREDITS_FAULT"] = fault
        worker.served = self.watch_log(name, '"event": "assigned"')
        worker.daemon.spawn(
            [sys.executable, "-X", worker.daemon.mark, "-m", "console.main", "worker"], env=environment, cwd=PROJECT
        )
        worker.wanted, worker.expected = True, fault is not None
        worker.starts.append(time.monotonic())

    def kill_worker(self, name: str) -> None:
        """Kill a worker; it is started again."""
        worker = self.workers[name]
        with self._starting:
            worker.expected = True
            worker.daemon.kill()

    def leave(self, name: str, limit: int = 45) -> bool:
        """Send SIGTERM and let the worker stay away; return whether it ended by itself."""
        worker = self.workers[name]
        with self._starting:
            worker.wanted, worker.expected = False, True
        return worker.daemon.stop(signal.SIGTERM, limit)

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal, if the worker runs."""
        if process := self.workers[name].daemon.find():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def watch_log(self, name: str, text: str) -> Callable[[], bool]:
        """Return a function that tells whether a worker's log has got a text since now."""
        log = self.workers[name].daemon.log
        begin = log.stat().st_size if log.exists() else 0

        def has_come() -> bool:
            if not log.exists():
                return False
            with log.open("rb") as file:
                file.seek(begin if log.stat().st_size >= begin else 0)
                return text.encode() in file.read()

        return has_come

    def look_after(self) -> None:
        """Start workers again that ended, and note those that nobody had told to."""
        with self._starting:
            for worker in list(self.workers.values()):
                if worker.wanted and worker.daemon.find() is None:
                    self._restart(worker)

    def _restart(self, worker: Worker) -> None:
        # A worker started while a service is away ends at once; then it gets its time.
        if len(worker.starts) > 1 and time.monotonic() - worker.starts[-1] < 1.5:
            return
        if not worker.expected:
            self.exits.append(Exit(worker.name, worker.served(), tail(worker.daemon.log, 12)))
        self._start_worker(worker.name, None)

    def server_ports(self, name: str) -> list[int]:
        """Return the ports under which the database knows the connections of a worker."""
        process = self.workers[name].daemon.find()
        if process is None:
            return []
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            return []
        ours = {c.laddr.port for c in connections if c.raddr and c.raddr.port == self.pg_proxy.port}
        return self.pg_proxy.server_ports(ours)
