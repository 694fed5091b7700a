"""The command line says in a line what keeps it from its work, and never shows a password."""

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aiokafka.errors import KafkaConnectionError
from sqlalchemy.exc import ArgumentError
from typer.testing import CliRunner

from console import main
from console.errors import explain
from console.main import app
from console.processes import free_port

PERIOD = ("--from", "2026-01-01", "--to", "2026-01-31")


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have both services away, and a folder of our own to write to."""
    monkeypatch.setenv("CREDITS_CONTROL_DATABASE_URL", "postgresql://credits:secret@127.0.0.1:1/control")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")


def said(*arguments: str, exit_code: int = 1) -> str:
    """Run a command that can't do its work; return what it said on stderr."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout.strip()) == (exit_code, "")
    assert "secret" not in result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("merchants", "list"),
        ("merchants", "create", "acme", "--config", "config.json"),
        ("clock", "advance", "acme", "1"),
        ("send", "acme", "User.Erase", "{}"),
        ("send", "acme", "Merchant.Suspend", "{}"),
        ("tokens", "create", "admin"),
        ("tokens", "list"),
        ("tokens", "revoke", "0"),
        ("verify", "acme"),
        ("verify", "--all"),
        ("backup", "acme"),
        ("backup", "control"),
        ("restore", "acme", "config.json"),
        ("receipts", "export", "acme", *PERIOD),
        ("dead-letters", "list", "acme"),
        ("dead-letters", "show", "acme", "t/0/0"),
        ("dead-letters", "redrive", "acme", "t/0/0"),
        ("dead-letters", "settle", "acme", "t/0/0"),
        ("migrate",),
        ("migrate", "--check"),
    ],
    ids=" ".join,
)
def test_services_that_are_away_are_said_in_a_line(command: tuple[str, ...]) -> None:
    lines = said(*command).splitlines()

    assert lines[0].startswith(("PostgreSQL can't be reached: ", "Kafka: ", "pg_dump failed "))
    assert len(lines) == 1 or command == ("backup", "control")


@pytest.mark.parametrize(
    "url", ["secret", "postgresql://u:secret@h:port/db", "postgresql://u:secret@h", "//secret@h/d"]
)
@pytest.mark.parametrize("command", [("merchants", "list"), ("status",)], ids=" ".join)
def test_an_address_that_is_none_is_named_by_its_variable(
    command: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITS_CONTROL_DATABASE_URL", url)

    assert "CREDITS_CONTROL_DATABASE_URL is not like postgresql://" in said(*command)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000], ids=["no JSON", "no UTF-8", "too deep"])
def test_a_configuration_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)

    assert said("merchants", "create", "acme", "--config", "config.json").startswith("config.json: ")


@pytest.mark.parametrize("place", ["t/0", "t/0/1²", "t/0/99999999999999999999", "t/9999999999/0", "/0/0"])
@pytest.mark.parametrize("command", ["show", "redrive", "settle"])
def test_a_place_that_can_be_none_is_told(command: str, place: str) -> None:
    assert said("dead-letters", command, "acme", place) == f"{place} is not topic/partition/offset."


def test_a_backup_is_not_written_onto_a_folder(tmp_path: Path) -> None:
    assert "is a directory" in said("backup", "acme", "--out", str(tmp_path), exit_code=2)


def test_a_missing_folder_is_named() -> None:
    assert said("backup", "control", "--out", "missing/dump") == "missing/dump.part: No such file or directory"


def test_a_password_is_cut_out_of_what_a_library_says() -> None:
    assert explain(ArgumentError("no URL: postgresql://u:sec@ret@h/db")) == "PostgreSQL: no URL: postgresql://h/db"
    assert explain(ArgumentError("no URL: postgresql://u:se/cret@h/db")) == "PostgreSQL: no URL: postgresql://h/db"


def test_errors_without_words_of_their_own_are_said_all_the_same() -> None:
    assert explain(TimeoutError()) == "PostgreSQL or Kafka did not answer in time."
    assert explain(KafkaConnectionError()) == "Kafka: KafkaConnectionError"
    assert explain(asyncio.InvalidStateError()) is None
    assert explain(OSError(errno.ENOSPC, "No space left on device")) == "[Errno 28] No space left on device"
    assert explain(UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")) is None


@pytest.mark.parametrize(
    ("variable", "value", "trouble"),
    [
        ("CREDITS_LOG_LEVEL", "loud", "is not a level"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS", "is none of PLAINTEXT, SSL"),
        ("KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT", "needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"),
        ("KAFKA_SSL_CAFILE", "missing.pem", "can't be read"),
        ("KAFKA_SSL_KEYFILE", ".", "can't be read"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092,kafka:port", "has 'kafka:port', which is not like host:9092"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092,", "has '', which is not like host:9092"),
        ("CREDITS_CONTROL_DATABASE_URL", "secret", "is not like postgresql://"),
        ("CREDITS_JWKS", "keys.json", "needs CREDITS_JWT_ISSUER"),
        ("CREDITS_WEB_RATE", "abc", "is not a whole number"),
        ("CREDITS_WEB_PORT", "65536", "is not a port"),
        ("CREDITS_WEB_PORT", "0", "is less than 1"),
        ("CREDITS_WEB_BIND", "no host", "can't be used"),
    ],
)
def test_a_worker_that_cannot_start_names_the_variable(
    variable: str, value: str, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITS_WEB_PORT", str(free_port()))
    if variable.startswith("KAFKA_SSL"):
        monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SSL")
    monkeypatch.setenv(variable, value)

    (line,) = said("worker", exit_code=2).splitlines()

    assert line.startswith(variable)
    assert trouble in line


def test_a_certificate_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_text("none")
    monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SSL")
    monkeypatch.setenv("KAFKA_SSL_CAFILE", "ca.pem")

    assert "KAFKA_SSL_CAFILE" in said("status")


def test_a_worker_does_not_start_on_a_port_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("CREDITS_WEB_PORT", str(taken.getsockname()[1]))
        (line,) = said("worker", exit_code=2).splitlines()

    assert line.startswith("CREDITS_WEB_BIND and CREDITS_WEB_PORT, 127.0.0.1 and ")


def test_a_worker_whose_database_is_away_at_the_start_says_so_in_a_line() -> None:
    command = [sys.executable, "-m", "console.main", "worker"]
    environment = os.environ | {"CREDITS_WEB_PORT": str(free_port()), "PYTHONPATH": str(Path(main.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert json.loads(line)["event"] == "what CREDITS_CONTROL_DATABASE_URL names can't be used"


def test_a_defect_of_the_command_line_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("console.merchants.as_table", lambda _: None)
    monkeypatch.setattr("console.merchants.registered", lambda _: None)

    assert isinstance(CliRunner().invoke(app, ["merchants", "list"]).exception, ValueError)
