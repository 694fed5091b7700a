"""Errors over HTTP: RFC 9457 problem documents made from the one registry of codes."""

import math
from collections.abc import Mapping

from aiohttp import web

from schemas.canonical import compact_json
from schemas.errors import REGISTRY, Code, Refusal

CONTENT_TYPE = "application/problem+json"
RETRY_SECONDS = 2


class ProblemError(Exception):
    """Ends a request with a problem; ``status`` and ``headers`` are for what the registry does not say."""

    def __init__(
        self, refusal: Refusal, *, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.status = status or REGISTRY[refusal.code].http_status
        self.headers = dict(headers or {})


def problem(code: Code, message: str = "", **details: object) -> ProblemError:
    """Return the error of a code, with the registry's status."""
    headers = {"WWW-Authenticate": "Bearer"} if code is Code.UNAUTHENTICATED else {}
    return ProblemError(Refusal(code, message, details), headers=headers)


def unavailable(message: str) -> ProblemError:
    """Return the error for what is away and will come back."""
    return ProblemError(Refusal(Code.INTERNAL_ERROR, message), status=503, headers={"Retry-After": str(RETRY_SECONDS)})


def too_many(seconds: float) -> ProblemError:
    return ProblemError(Refusal(Code.RATE_LIMITED), headers={"Retry-After": str(max(1, math.ceil(seconds)))})


def response(error: ProblemError) -> web.Response:
    """Write the problem: {type, title, status, detail, code, retryable, details?}."""
    refusal = error.refusal
    info = REGISTRY[refusal.code]
    body = {
        "type": f"/docs#error-{refusal.code}",
        "title": info.meaning,
        "status": error.status,
        "detail": refusal.message,
        "code": refusal.code,
        "retryable": info.retryable,
    }
    if refusal.details:
        body["details"] = refusal.details
    return web.Response(body=compact_json(body), status=error.status, content_type=CONTENT_TYPE, headers=error.headers)


def from_http_error(error: web.HTTPException) -> ProblemError:
    """Translate what the web server itself has to say: no such address, not this method, too large."""
    if error.status == 405:
        allow = error.headers.get("Allow", "GET")
        refusal = Refusal(Code.NOT_FOUND, "this method is not allowed here", {"allowed": allow.split(",")})
        return ProblemError(refusal, status=405, headers={"Allow": allow})
    if error.status == 404:
        return problem(Code.NOT_FOUND)
    code = Code.INVALID_PARAMETER if error.status < 500 else Code.INTERNAL_ERROR
    return ProblemError(Refusal(code, error.reason), status=error.status)
