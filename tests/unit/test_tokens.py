"""What a token may be bound to."""

from typing import Any

import pytest

from merchants import tokens


@pytest.mark.parametrize(
    ("role", "merchant_id", "subject"),
    [
        ("root", None, None),
        ("user", "acme", None),
        ("user", None, "ann"),
        ("upstream", None, None),
        ("support", "acme", "ann"),
    ],
)
async def test_a_token_that_makes_no_sense_is_not_made(role: str, merchant_id: str | None, subject: str | None) -> None:
    connection: Any = None  # it is not asked
    with pytest.raises(ValueError, match=r"role"):
        await tokens.create(connection, role, merchant_id, subject)


@pytest.mark.parametrize("text", ["", "crd_", "crd_abc", "crd_abc_", "crd__x", "Bearer", "crd_'; --_x", "abc_def"])
async def test_what_is_no_token_is_not_looked_for(text: str) -> None:
    connection: Any = None
    assert await tokens.find(connection, text) is None
