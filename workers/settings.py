"""Settings of a worker process, read from the environment."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SettingsError(Exception):
    """A setting is missing or makes no sense; the message names the environment variable."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker has to know before it starts.

    Times are in seconds, sizes in records unless the name says otherwise. Secrets may be given as files: for a
    variable `NAME` the variable `NAME_FILE` names a file that has its value.
    """

    kafka_bootstrap_servers: str
    control_database_url: str = field(repr=False)
    web_bind: str = "127.0.0.1"
    web_port: int = 6066
    group: str = "credits"
    # A worker that was killed is missed after this time: short heals soon, long forgives a pause of the process.
    session_timeout: int = 10
    rebalance_timeout: int = 30
    batch_max: int = 2000
    linger_ms: int = 10
    # So many merchants are worked for at once by one process; others wait for their turn.
    concurrency: int = 4
    fetch_max_bytes: int = 1 << 20
    fetch_max_wait_ms: int = 200
    merchants_poll: int = 1
    # Only these merchants are served, all if there are none.
    merchants: str = ""
    # Connections to merchants' databases: one writing one for each of so many merchants, and some reading ones for
    # each of fewer. Those of the merchants not used for the longest time are closed.
    merchants_max: int = 100
    readers: int = 2
    readers_max: int = 15
    idle_seconds: int = 60
    jobs_seconds: int = 2
    # More units in one operation than this are refused.
    resource_amount_max: int = 1_000_000_000
    log_level: str = "INFO"
    security_protocol: str = "PLAINTEXT"
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "WorkerSettings":
        """Read the settings from environment variables.

        Args:
            environ: the variables; default those of the process.

        Raises:
            SettingsError: a variable is missing, or not a number where one is needed, or too small a one.
        """
        environ = os.environ if environ is None else environ
        given = {name: read_variable(environ, variable) for name, variable in _VARIABLES.items()}
        values: dict[str, Any] = {name: _convert(name, value) for name, value in given.items() if value is not None}
        for name in ("kafka_bootstrap_servers", "control_database_url"):
            if name not in values:
                raise SettingsError(f"{_VARIABLES[name]} is not set")
        return cls(**values)

    def serves(self, merchant: str) -> bool:
        """Return whether this worker shall work for a merchant."""
        return not self.merchants or merchant in self.merchants.split(",")

    def security_kwargs(self) -> dict[str, Any]:
        """Return the arguments about security that every client of Kafka in this process is made with."""
        if self.security_protocol == "PLAINTEXT":
            return {}
        kwargs: dict[str, Any] = {"security_protocol": self.security_protocol}
        if self.security_protocol.endswith("SSL"):
            context = ssl.create_default_context(cafile=self.ssl_cafile)
            if self.ssl_certfile:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            kwargs["ssl_context"] = context
        if self.security_protocol.startswith("SASL"):
            kwargs["sasl_mechanism"] = self.sasl_mechanism or "SCRAM-SHA-512"
            kwargs["sasl_plain_username"] = self.sasl_username
            kwargs["sasl_plain_password"] = self.sasl_password
        return kwargs


_VARIABLES = {
    "kafka_bootstrap_servers": "KAFKA_BOOTSTRAP_SERVERS",
    "control_database_url": "CREDITS_CONTROL_DATABASE_URL",
    "web_bind": "CREDITS_WEB_BIND",
    "web_port": "CREDITS_WEB_PORT",
    "group": "CREDITS_GROUP",
    "session_timeout": "CREDITS_SESSION_TIMEOUT",
    "rebalance_timeout": "CREDITS_REBALANCE_TIMEOUT",
    "batch_max": "CREDITS_BATCH_MAX",
    "linger_ms": "CREDITS_LINGER_MS",
    "concurrency": "CREDITS_CONCURRENCY",
    "fetch_max_bytes": "CREDITS_FETCH_MAX_BYTES",
    "fetch_max_wait_ms": "CREDITS_FETCH_MAX_WAIT_MS",
    "merchants_poll": "CREDITS_MERCHANTS_POLL",
    "merchants": "CREDITS_MERCHANTS",
    "merchants_max": "CREDITS_MERCHANTS_MAX",
    "readers": "CREDITS_READERS",
    "readers_max": "CREDITS_READERS_MAX",
    "idle_seconds": "CREDITS_IDLE_SECONDS",
    "jobs_seconds": "CREDITS_JOBS_SECONDS",
    "resource_amount_max": "CREDITS_RESOURCE_AMOUNT_MAX",
    "log_level": "CREDITS_LOG_LEVEL",
    "security_protocol": "KAFKA_SECURITY_PROTOCOL",
    "ssl_cafile": "KAFKA_SSL_CAFILE",
    "ssl_certfile": "KAFKA_SSL_CERTFILE",
    "ssl_keyfile": "KAFKA_SSL_KEYFILE",
    "sasl_mechanism": "KAFKA_SASL_MECHANISM",
    "sasl_username": "KAFKA_SASL_USERNAME",
    "sasl_password": "KAFKA_SASL_PASSWORD",
}
_NUMBERS = {name for name, kind in WorkerSettings.__annotations__.items() if kind is int}
# With any other number at 0 a worker would do nothing, or nothing else, and look well.
_MAY_BE_ZERO = {"linger_ms", "fetch_max_wait_ms"}


def read_variable(environ: Mapping[str, str], variable: str) -> str | None:
    """Return the value of a variable, or of the file its `_FILE` twin names; empty counts as absent."""
    if path := environ.get(f"{variable}_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{variable}_FILE can't be read: {error}") from error
        except UnicodeDecodeError:
            # The error would show a part of a secret.
            raise SettingsError(f"{variable}_FILE is not a text in UTF-8") from None
    return environ.get(variable) or None


def _convert(name: str, value: str) -> str | int:
    if name not in _NUMBERS:
        return value
    try:
        number = int(value)
    except ValueError as error:
        raise SettingsError(f"{_VARIABLES[name]} is not a whole number: {value!r}") from error
    smallest = 0 if name in _MAY_BE_ZERO else 1
    if number < smallest:
        raise SettingsError(f"{_VARIABLES[name]} is less than {smallest}: {value!r}")
    return number
