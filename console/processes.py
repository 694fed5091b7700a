"""Detached processes of the embedded stack, known again by their pid files."""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

POLL_SECONDS = 0.02
VISIBLE_SECONDS_MAX = 10
LOG_BYTES_MAX = 16 * 1024 * 1024

# A child that ends stays a zombie until the process that started it asks for its status.
_children: dict[int, subprocess.Popen[bytes]] = {}


class StackError(Exception):
    """The embedded stack can't do what was asked; the message is written for the user."""


class Daemon:
    """One detached process.

    Args:
        pid_file: where the pid is remembered; it outlives the process that started the daemon.
        mark: an argument of the daemon's command line that no other process has. A pid alone proves nothing,
            because the system gives the same one again.
        log: receives stdout and stderr.
    """

    def __init__(self, pid_file: Path, mark: str, log: Path) -> None:
        self.pid_file = pid_file
        self.mark = mark
        self.log = log

    def find(self) -> psutil.Process | None:
        """Return the running process, or None when there is none or the pid belongs to somebody else."""
        try:
            process = psutil.Process(int(self.pid_file.read_text()))
            mine = is_alive(process) and self.mark in process.cmdline()
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        return process if mine else None

    def spawn(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start the command in a session of its own, so that it outlives the caller and no Ctrl-C reaches it."""
        assert self.mark in command
        self.pid_file.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES_MAX:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=env,
                cwd=cwd,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        _children[child.pid] = child
        self.pid_file.write_text(f"{child.pid}\n")
        # For a moment after its start a program has no command line, and could not be told from somebody else's.
        end = time.monotonic() + VISIBLE_SECONDS_MAX
        while child.poll() is None and self.find() is None:
            if time.monotonic() > end:
                child.kill()
                raise StackError(f"{command[0]} does not show the command line it was started with")
            time.sleep(POLL_SECONDS)

    def wait_until(self, is_ready: Callable[[psutil.Process], bool], what: str, limit_seconds: int) -> None:
        """Wait until the daemon is ready.

        Raises:
            StackError: it ended or took too long; it is killed then, and the message ends with the tail of its log.
        """
        end = time.monotonic() + limit_seconds
        while (process := self.find()) and time.monotonic() < end:
            if is_ready(process):
                return
            time.sleep(POLL_SECONDS)
        trouble = f"is not ready after {limit_seconds} seconds" if process else "ended while it was starting"
        self.kill()
        raise StackError(f"{what} {trouble}. The end of {self.log}:\n{tail(self.log)}")

    def stop(self, first_signal: signal.Signals = signal.SIGTERM, limit_seconds: int = 30) -> bool:
        """Ask the daemon to end, and kill it when it takes too long.

        Returns:
            Whether it ended by itself (or did not run).
        """
        process = self.find()
        if process is None:
            self._forget()
            return True
        with _ignore_gone():
            process.send_signal(first_signal)
        if ended := wait_until_gone([process], limit_seconds):
            self._forget()
        else:
            self.kill()
        return ended

    def kill(self) -> None:
        """SIGKILL the daemon and all its descendants at once."""
        if process := self.find():
            family = [process]
            with _ignore_gone():
                family += process.children(recursive=True)
            # The parent first: it shall see no child die and begin to clean up.
            for member in family:
                with _ignore_gone():
                    member.kill()
            if not wait_until_gone(family, limit_seconds=30):
                raise StackError(f"Process {process.pid} can't be killed")
        self._forget()

    def _forget(self) -> None:
        self.pid_file.unlink(missing_ok=True)


@contextmanager
def _ignore_gone() -> Iterator[None]:
    """A process may end between the look at it and the deed: that is what was wanted."""
    try:
        yield
    except psutil.NoSuchProcess:
        return


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie does not.

    Our own zombies are reaped on the way. Waiting for the pid to vanish would not do: in a container nobody may be
    there to reap the children of a process that has ended.
    """
    try:
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        alive = False
    if not alive and (child := _children.pop(process.pid, None)):
        child.wait()
    return alive


def wait_until_gone(processes: Sequence[psutil.Process], limit_seconds: int) -> bool:
    """Return whether all of the processes ended within the limit."""
    end = time.monotonic() + limit_seconds
    while any(is_alive(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(empty)"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; it ends with the process at the latest."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def remembered_port(file: Path) -> int:
    """Return the port written in the file while it is free, else choose and remember another."""
    remembered = int(file.read_text()) if file.exists() else None
    if remembered is not None and _is_free(remembered):
        return remembered
    port = free_port()
    file.write_text(f"{port}\n")
    return port


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1 below the range that the system hands out to outgoing connections.

    A client that keeps knocking at a dead server could otherwise be given the server's own port as its own.
    """
    while not _is_free(port := random.randrange(15_000, 32_000)):
        continue
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # As servers do: connections that have ended but are still remembered don't count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def run_as(user: str | None, command: Sequence[str], what: str) -> None:
    """Run a program to its end.

    Raises:
        StackError: it failed; the message has its output.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    if done.returncode:
        raise StackError(f"{what} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def is_root() -> bool:
    """Return whether we run as the superuser of a Unix system."""
    return sys.platform != "win32" and os.geteuid() == 0
