"""What of a database's errors is the surroundings' fault, what a race, and what a defect of ours."""

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from workers.pipeline import is_race, is_trouble

TROUBLE = [
    asyncpg.ConnectionDoesNotExistError("the connection was closed"),
    asyncpg.DeadlockDetectedError("deadlock detected"),
    asyncpg.LockNotAvailableError("canceling statement due to lock timeout"),
    asyncpg.AdminShutdownError("terminating connection"),
    asyncpg.DiskFullError("no space left on device"),
    asyncpg.InvalidCachedStatementError("cached plan must not change result type"),
]
RACES = [asyncpg.UniqueViolationError("a key is taken"), asyncpg.ExclusionViolationError("periods overlap")]
DEFECTS = [
    asyncpg.DataError("invalid input for query argument $1"),
    asyncpg.CheckViolationError("a check failed"),
    asyncpg.UndefinedColumnError("no such column"),
    asyncpg.FeatureNotSupportedError("not supported"),
]


def wrapped(error: asyncpg.PostgresError) -> DBAPIError:
    """Return the error as SQLAlchemy hands it on."""
    return DBAPIError("SELECT 1", (), error)


@pytest.mark.parametrize("error", TROUBLE, ids=lambda error: type(error).__name__)
def test_trouble_is_no_race_and_no_defect(error: asyncpg.PostgresError) -> None:
    assert is_trouble(error)
    assert not is_race(error)


@pytest.mark.parametrize("error", RACES, ids=lambda error: type(error).__name__)
def test_a_race_on_a_key_is_no_trouble(error: asyncpg.PostgresError) -> None:
    for one in (error, wrapped(error)):
        assert is_race(one)
        assert not is_trouble(one)


@pytest.mark.parametrize("error", DEFECTS, ids=lambda error: type(error).__name__)
def test_what_would_fail_again_is_a_defect(error: asyncpg.PostgresError) -> None:
    for one in (error, wrapped(error)):
        assert not is_trouble(one)
        assert not is_race(one)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.OutdatedSchemaCacheError("the schema has changed"), True),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (asyncpg.ClientConfigurationError("a setting is wrong"), False),
        (asyncpg.InternalClientError("no binary format encoder"), False),
        (TypeError("an integer is required"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_the_server_did_not_send_is_trouble_unless_it_is_about_our_values(
    error: Exception, expected: bool
) -> None:
    assert is_trouble(error) is expected
