"""One request for a merchant's data: what a handler is given, and how lists are cut into pages."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ledger.model import Account
from ledger.queries import Cut
from merchants.registry import Merchant
from schemas.errors import Code
from workers.web.access import READERS
from workers.web.parameters import LIMIT_DEFAULT, Parameter
from workers.web.problems import problem

Shown = dict[str, Any]


@dataclass
class Call:
    """A request that was let in, inside of its read-only transaction.

    ``now`` is what the merchant's clock shows. ``cut`` is the point in time the answer shows: for a page after the
    first one, that of the first. ``after`` is the key of the last item of the page before.
    """

    connection: AsyncConnection
    merchant: Merchant
    role: str
    subject: str | None
    path: Mapping[str, str]
    query: Mapping[str, Any]
    now: datetime
    cut: Cut
    config_version: int
    owner: Account | None = None
    after: list[Any] | None = None
    next_key: list[Any] | None = None

    @property
    def account(self) -> Account:
        """The account of the user in the path."""
        assert self.owner is not None
        return self.owner

    @property
    def limit(self) -> int:
        limit: int = self.query.get("limit", LIMIT_DEFAULT)
        return limit

    def page(self, found: Sequence[Any], key_of: Callable[[Any], list[Any]]) -> list[Any]:
        """Return one page of what was found, and note where the next one begins; ask for ``limit + 1`` rows."""
        items = list(found[: self.limit])
        if len(found) > self.limit:
            self.next_key = key_of(items[-1])
        return items

    def require(self, found: Any, code: Code) -> Any:
        """Return what was found; raises the code, a 404, for None."""
        if found is None:
            raise problem(code)
        return found

    def may_see(self, account_id: int, own: int | None) -> bool:
        """Tell whether data of an account may be shown: a user sees only their own."""
        return self.role in READERS or account_id == own


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True)
class Endpoint:
    """One address below ``/v1/merchants/{merchant}``, and all there is to say of it.

    ``shape`` is the TypedDict of the answer, of an item for a list. ``roles`` are let in; a user only to what is
    their own. ``not_found`` is the code of what is not there.
    """

    path: str
    name: str
    summary: str
    handler: Handler
    shape: Any
    roles: frozenset[str]
    parameters: tuple[Parameter, ...] = ()
    is_list: bool = False
    not_found: Code | None = None
    description: str = ""

    @property
    def is_about_user(self) -> bool:
        return "{user}" in self.path

    @property
    def known(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}
