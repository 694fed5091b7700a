"""In which form a document is answered: JSON, or what a renderer makes of it."""

from hashlib import sha256

from aiohttp import web

from receipts.render import HTML_POLICY
from schemas.canonical import compact_json
from workers.web.calls import Call, Shown
from workers.web.objects import RENDERERS

JSON, HTML, PDF = "application/json", "text/html", "application/pdf"


def preferred(accept: str, offered: list[str]) -> str:
    """Return the offered media type that an Accept header prefers; the first one if it wants none of them."""
    best, best_quality = offered[0], 0.0
    for media_type in offered:
        quality = max((q for name, q in _ranges(accept) if _covers(name, media_type)), default=0.0)
        if quality > best_quality:
            best, best_quality = media_type, quality
    return best


def _ranges(accept: str) -> list[tuple[str, float]]:
    found = []
    for part in accept.split(","):
        name, *parameters = (text.strip().lower() for text in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            found.append((name, float(quality)))
        except ValueError:
            found.append((name, 0.0))
    return found


def _covers(name: str, media_type: str) -> bool:
    return name in ("*/*", media_type) or (name.endswith("/*") and media_type.startswith(name[:-1]))


async def respond(request: web.Request, call: Call, document: Shown, tag: str) -> web.Response:
    """Answer with a document in the form asked for; ``tag`` is the ETag of its JSON."""
    media_type = preferred(request.headers.get("Accept", "*/*"), [JSON, *RENDERERS])
    render = RENDERERS.get(media_type)
    if render is None:
        body = compact_json(document)
    else:
        # Besides the document it shows what was attached and credited since, in a locale.
        body = await render(call, document)
        tag = f'W/"{sha256(body).hexdigest()[:24]}"'
    headers = {"ETag": tag, "Vary": "Accept"}
    if is_known(request, tag):
        return web.Response(status=304, headers=headers)
    if media_type == HTML:
        headers["Content-Security-Policy"] = f"{HTML_POLICY}; frame-ancestors 'none'"
    if media_type == PDF:
        headers["Content-Disposition"] = f'inline; filename="{document["number"]}.pdf"'
    return web.Response(
        body=body, content_type=media_type, charset="utf-8" if media_type == HTML else None, headers=headers
    )


def is_known(request: web.Request, tag: str) -> bool:
    """Tell whether If-None-Match names a tag, weakly compared; ``*`` is any."""
    given = (part.strip() for line in request.headers.getall("If-None-Match", ()) for part in line.split(","))
    return any(one == "*" or one.removeprefix("W/") == tag.removeprefix("W/") for one in given)
