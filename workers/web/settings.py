"""Settings of the web server, read from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.settings import SettingsError, read_variable


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Who is let in, and how much of it. Each variable may be given as a file, by its ``_FILE`` twin.

    Attributes:
        bootstrap_token: a token that is taken for an admin's, to make the first real ones with.
        jwks: path or https URL of the keys that JWTs are signed with; without it there are none.
        jwt_issuer, jwt_audience: what a JWT must name; needed with ``jwks``.
        rate: requests a second that one principal may go on making; 0 is no limit.
        burst: requests it may make at once.
    """

    bootstrap_token: str | None = field(default=None, repr=False)
    jwks: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    rate: int = 500
    burst: int = 1000

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "WebSettings":
        """Read the settings; raises SettingsError for what is incomplete or unsafe."""
        environ = os.environ if environ is None else environ
        settings = cls(
            bootstrap_token=read_variable(environ, "CREDITS_BOOTSTRAP_TOKEN"),
            jwks=read_variable(environ, "CREDITS_JWKS"),
            jwt_issuer=read_variable(environ, "CREDITS_JWT_ISSUER"),
            jwt_audience=read_variable(environ, "CREDITS_JWT_AUDIENCE"),
            rate=_number(environ, "CREDITS_WEB_RATE", cls.rate),
            burst=_number(environ, "CREDITS_WEB_BURST", cls.burst),
        )
        if settings.burst == 0:
            raise SettingsError("CREDITS_WEB_BURST is less than 1: nothing could be asked")
        if settings.jwks and not (settings.jwt_issuer and settings.jwt_audience):
            raise SettingsError("CREDITS_JWKS needs CREDITS_JWT_ISSUER and CREDITS_JWT_AUDIENCE")
        if settings.jwks and settings.jwks.startswith("http://"):
            raise SettingsError("CREDITS_JWKS must be a path or an https URL")
        return settings


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    value = read_variable(environ, variable)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit()):
        raise SettingsError(f"{variable} is not a whole number: {value!r}")
    return int(value)
