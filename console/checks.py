"""What is wrong with settings that read well, found before anything is started; a message names the variable."""

import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from workers.settings import SettingsError, WorkerSettings

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def check_url(url: str) -> str:
    """Return the URL of the control database. Raises SettingsError, without the URL: it has a password."""
    try:
        named = make_url(url).database
    except (ArgumentError, ValueError):
        named = None
    if not named:
        raise SettingsError("CREDITS_CONTROL_DATABASE_URL is not like postgresql://user:password@host:5432/database")
    return url


def check(settings: WorkerSettings) -> WorkerSettings:
    """Return settings of which any command can be run. Raises SettingsError."""
    check_url(settings.control_database_url)
    for server in settings.kafka_bootstrap_servers.split(","):
        try:
            address = urlsplit(f"//{server.strip()}")
            named = address.hostname if address.port != 0 else None
        except ValueError:
            named = None
        if named is None:
            raise SettingsError(f"KAFKA_BOOTSTRAP_SERVERS has {server!r}, which is not like host:9092")
    _check_security(settings)
    return settings


def _check_security(settings: WorkerSettings) -> None:
    if settings.security_protocol not in _PROTOCOLS:
        raise SettingsError(f"KAFKA_SECURITY_PROTOCOL is none of {', '.join(_PROTOCOLS)}")
    if settings.security_protocol.startswith("SASL"):
        if settings.sasl_mechanism not in (None, *_MECHANISMS):
            raise SettingsError(f"KAFKA_SASL_MECHANISM is none of {', '.join(_MECHANISMS)}")
        if not (settings.sasl_username and settings.sasl_password):
            raise SettingsError("KAFKA_SECURITY_PROTOCOL needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD")
    if not settings.security_protocol.endswith("SSL"):
        return
    files = {
        "KAFKA_SSL_CAFILE": settings.ssl_cafile,
        "KAFKA_SSL_CERTFILE": settings.ssl_certfile,
        "KAFKA_SSL_KEYFILE": settings.ssl_keyfile,
    }
    for variable, file in files.items():
        try:
            if file is not None:
                Path(file).read_bytes()
        except OSError as error:
            raise SettingsError(f"{variable} can't be read: {error}") from error
    try:
        settings.security_kwargs()
    except OSError as error:
        raise SettingsError(f"the files of {', '.join(files)} can't be used: {error}") from error


def check_worker(settings: WorkerSettings) -> WorkerSettings:
    """Return settings that a worker can be started with. Raises SettingsError."""
    if settings.log_level.upper() not in logging.getLevelNamesMapping():
        raise SettingsError(f"CREDITS_LOG_LEVEL is not a level, such as INFO: {settings.log_level!r}")
    if settings.web_port >= 1 << 16:
        raise SettingsError(f"CREDITS_WEB_PORT is not a port: {settings.web_port}")
    bind, port = settings.web_bind, settings.web_port
    try:
        family, *_, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"CREDITS_WEB_BIND and CREDITS_WEB_PORT, {bind} and {port}, can't be used: {error}"
        ) from error
    return check(settings)
