"""The small parts of the web server: allowances, cursors, content negotiation, the table of endpoints."""

import itertools
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from ledger.queries import Cut
from merchants.tokens import PREFIX
from schemas.errors import REGISTRY, Code
from workers.web import paging
from workers.web.access import Gate
from workers.web.endpoints import ENDPOINTS
from workers.web.limits import BUCKETS_MAX, RateLimit
from workers.web.negotiation import preferred
from workers.web.problems import ProblemError, problem, response
from workers.web.settings import WebSettings

SECRET, SCOPE = b"s" * 32, {"path": "/ledger"}
NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    clock = Clock()
    limit = RateLimit(rate=2, burst=3, clock=clock)

    assert [limit.wait("a") for _ in range(3)] == [0, 0, 0]
    assert limit.wait("a") == 0.5
    assert limit.wait("b") == 0
    clock.now = 0.5
    assert limit.wait("a") == 0
    assert limit.wait("a") > 0
    clock.now = 1000
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_rate_of_zero_is_no_limit_and_buckets_are_forgotten_in_the_end() -> None:
    assert RateLimit(rate=0, burst=0, clock=Clock()).wait("a") == 0
    limit = RateLimit(rate=1, burst=1, clock=Clock())
    for number in range(BUCKETS_MAX + 1):
        limit.wait(str(number))
    assert limit.wait("0") == 0
    assert limit.wait(str(BUCKETS_MAX)) > 0


def test_a_cursor_comes_back_as_it_was_in_its_scope_only() -> None:
    cursor = paging.Cursor(["2026-03-01T00:00:00.000000Z", "ü/1"], Cut(7, NOW))
    scope = {"endpoint": "listX", "filters": {"from": NOW}}
    text = paging.write(cursor, b"secret", scope)

    assert paging.read(text, b"secret", scope) == cursor
    for secret, other in ((b"other", scope), (b"secret", scope | {"endpoint": "listY"})):
        with pytest.raises(ProblemError) as caught:
            paging.read(text, secret, other)
        assert caught.value.refusal.code is Code.INVALID_CURSOR


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("text/html", "text/html"),
        ("text/*", "text/html"),
        ("application/pdf, text/html;q=0.5", "application/pdf"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("image/png", "application/json"),
        ("text/html;q=0, */*;q=0.1", "application/json"),
        ("text/html;q=x", "application/json"),
        ("", "application/json"),
    ],
)
def test_the_preferred_media_type_is_chosen(accept: str, expected: str) -> None:
    assert preferred(accept, ["application/json", "text/html", "application/pdf"]) == expected


@pytest.mark.parametrize("code", list(Code))
def test_every_code_makes_a_problem_with_its_status(code: Code) -> None:
    answer = response(problem(code))
    assert answer.status == REGISTRY[code].http_status
    assert answer.content_type == "application/problem+json"


def test_names_and_paths_of_endpoints_are_unique_and_lists_can_be_walked() -> None:
    assert len({endpoint.name for endpoint in ENDPOINTS}) == len({endpoint.path for endpoint in ENDPOINTS})
    for endpoint in ENDPOINTS:
        assert endpoint.is_list == ({"cursor", "limit"} <= endpoint.known.keys()), endpoint.name
        assert len(endpoint.known) == len(endpoint.parameters), endpoint.name


@pytest.mark.parametrize("size", range(1, 7))
def test_a_cursor_of_which_any_character_was_changed_is_none(size: int) -> None:
    written = paging.write(paging.Cursor(["x" * size], Cut(7, NOW)), SECRET, SCOPE)
    assert paging.read(written, SECRET, SCOPE).key == ["x" * size]

    for at, other in itertools.product((0, len(written) - 1), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"):
        changed = written[:at] + other + written[at + 1 :]
        if changed != written:
            with pytest.raises(ProblemError):
                paging.read(changed, SECRET, SCOPE)


@pytest.mark.parametrize("credentials", ["Bearer \udce9", f"Bearer {PREFIX}0_\udce9", "Bearer é"])
async def test_credentials_that_are_no_text_are_not_let_in(credentials: str) -> None:
    gate = Gate(WebSettings(bootstrap_token="t" * 32), create_async_engine("postgresql+asyncpg://nowhere"), Clock())

    with pytest.raises(ProblemError) as refused:
        await gate.principal(credentials)
    assert refused.value.refusal.code == Code.UNAUTHENTICATED
