"""Who asks, and what they may see: bearer tokens, JWTs, roles (spec §6).

A principal is known before its merchant is; for a JWT the role is that of the merchant asked for.
"""

import asyncio
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import merchants.store
from ledger.model import account_id_of
from merchants import tokens
from merchants.registry import Merchant
from merchants.tokens import Token
from schemas.errors import Code
from workers.web.problems import problem
from workers.web.settings import WebSettings

log = structlog.get_logger(__name__)

ALGORITHMS = ("RS256", "ES256", "EdDSA")
LEEWAY_SECONDS = 30
TOKEN_SECONDS = 1.0
KEYS_SECONDS = 300.0
KEYS_AGAIN_SECONDS = 10.0
TOKENS_CACHED_MAX = 10_000
BEARER_LENGTH_MAX = 8192

USER, SUPPORT, ADMIN, UPSTREAM, AUDITOR, METRICS = "user", "support", "admin", "upstream", "auditor", "metrics"
READERS = frozenset({SUPPORT, ADMIN, UPSTREAM, AUDITOR})
EVERYBODY = READERS | {USER}


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who has proved who they are.

    ``role`` is None while it is up to the merchant (JWT). ``merchant_id``: the only one it may see; None is any.
    ``subject`` is the user id of a user, the only one whose data it may see in that role.
    """

    name: str
    role: str | None
    merchant_id: str | None
    subject: str | None

    def sees(self, merchant_id: str) -> bool:
        return self.merchant_id in (None, merchant_id)


@dataclass
class Keys:
    """The key set that JWTs are signed with, from a file or a URL; read again when old or when a key is missing."""

    source: str
    clock: Callable[[], float]
    _keys: dict[str | None, jwt.PyJWK] = field(default_factory=dict)
    _read_at: float = float("-inf")
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return the key of an id; without an id the only one there is."""
        async with self._lock:
            age = self.clock() - self._read_at
            if age > KEYS_SECONDS or (age > KEYS_AGAIN_SECONDS and key_id not in self._keys):
                await self._refresh()
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    async def _refresh(self) -> None:
        self._read_at = self.clock()
        try:
            found = jwt.PyJWKSet.from_dict(json.loads(await self._text())).keys
            self._keys = {key.key_id: key for key in found if key.public_key_use in (None, "sig")}
        except (OSError, ClientError, TimeoutError, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            # The keys read before go on being good.
            log.warning("the key set can't be read", error=repr(error)[:500])

    async def _text(self) -> str:
        if not self.source.startswith("https://"):
            return await asyncio.to_thread(Path(self.source).read_text, "utf-8")
        async with ClientSession(timeout=ClientTimeout(total=5)) as session, session.get(self.source) as answer:
            answer.raise_for_status()
            return await answer.text()


@dataclass
class Gate:
    """Finds out who a request comes from."""

    settings: WebSettings
    control: AsyncEngine
    clock: Callable[[], float]
    keys: Keys | None = None
    _tokens: dict[str, tuple[float, Token | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.settings.jwks:
            self.keys = Keys(self.settings.jwks, self.clock)

    async def principal(self, authorization: str | None) -> Principal:
        """Return who an Authorization header belongs to; raises ``unauthenticated``."""
        scheme, _, credentials = (authorization or "").partition(" ")
        credentials = credentials.strip()
        is_readable = credentials.isascii() and 0 < len(credentials) <= BEARER_LENGTH_MAX
        if scheme.lower() != "bearer" or not is_readable:
            raise problem(Code.UNAUTHENTICATED)
        bootstrap = self.settings.bootstrap_token
        if bootstrap and hmac.compare_digest(credentials.encode(), bootstrap.encode()):
            return Principal("bootstrap", ADMIN, None, None)
        if credentials.startswith(tokens.PREFIX):
            return await self._by_token(credentials)
        return await self._by_jwt(credentials)

    async def _by_token(self, text: str) -> Principal:
        found_at, token = self._tokens.get(text, (float("-inf"), None))
        if self.clock() - found_at > TOKEN_SECONDS:
            async with self.control.connect() as connection:
                token = await tokens.find(connection, text)
            if len(self._tokens) >= TOKENS_CACHED_MAX:
                self._tokens.clear()
            if token is not None:
                self._tokens[text] = (self.clock(), token)
        if token is None:
            raise problem(Code.UNAUTHENTICATED)
        return Principal(f"token:{token.token_id}", token.role, token.merchant_id, token.subject)

    async def _by_jwt(self, text: str) -> Principal:
        if self.keys is None:
            raise problem(Code.UNAUTHENTICATED)
        try:
            header = jwt.get_unverified_header(text)
            if header.get("alg") not in ALGORITHMS:
                raise problem(Code.UNAUTHENTICATED)
            key = await self.keys.find(header.get("kid"))
            if key is None:
                raise problem(Code.UNAUTHENTICATED)
            claims = jwt.decode(
                text,
                key,
                algorithms=list(ALGORITHMS),
                audience=self.settings.jwt_audience,
                issuer=self.settings.jwt_issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError) as error:
            raise problem(Code.UNAUTHENTICATED) from error
        return _of_claims(claims)


def _of_claims(claims: dict[str, Any]) -> Principal:
    subject, merchant_id = claims["sub"], claims.get("mid")
    if not subject or not isinstance(merchant_id, str | None):
        raise problem(Code.UNAUTHENTICATED)
    return Principal(f"subject:{subject}", None, merchant_id, subject)


async def role_in(principal: Principal, merchant: Merchant, connection: AsyncConnection) -> str:
    """Tell a principal's role at a merchant: the token's own, else the one assigned to the subject, else ``user``."""
    if principal.role is not None:
        return principal.role
    assert principal.subject is not None
    subject = account_id_of(principal.subject, merchant.secret)
    return (await merchants.store.load_roles(connection, [subject])).get(subject, USER)
