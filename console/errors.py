"""What keeps a command from its work and is no defect of ours, each in a line for people."""

import errno
import re
import socket

import asyncpg
from aiokafka.errors import KafkaError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from console.processes import StackError
from merchants.databases import in_a_line
from workers.settings import SettingsError

# A password must not be shown, wherever a library has an address from.
_PASSWORD = re.compile(r"(?<=//)\S*@")


def explain(error: BaseException) -> str | None:
    """Return what to say of an error; None for one that is a defect, and needs its traceback."""
    said = _explain(error)
    return None if said is None else _PASSWORD.sub("", said)


def _explain(error: BaseException) -> str | None:
    match error:
        case StackError() | SettingsError():
            return str(error)
        case BrokenPipeError():
            # Who reads the output has seen enough: that is known already, and needs no words.
            return None
        case KafkaError():
            return f"Kafka: {in_a_line(error)}"
        case DBAPIError(orig=BaseException() as cause):
            return f"PostgreSQL: {in_a_line(cause.__cause__ or cause)}"
        case SQLAlchemyError() | asyncpg.PostgresError() | asyncpg.InterfaceError():
            return f"PostgreSQL: {in_a_line(error)}"
        case TimeoutError(errno=None):
            return "PostgreSQL or Kafka did not answer in time."
        case OSError(filename=str() as file):
            return f"{file}: {error.strerror}"
        case OSError() if _is_of_a_connection(error):
            return f"PostgreSQL can't be reached: {in_a_line(error)}"
        case OSError():
            return in_a_line(error)
        case UnicodeError() if "idna" in str(error):
            return "PostgreSQL can't be reached: its host is not a name of the network"
        case _:
            return None


def _is_of_a_connection(error: OSError) -> bool:
    # Without a number it is asyncpg's of several tries.
    return isinstance(error, (ConnectionError, socket.gaierror)) or error.errno in (
        None,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    )
