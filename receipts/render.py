"""Renders documents as HTML and PDF: pure functions, the same bytes for the same document each time.

The JSON document is the record. HTML has no scripts and loads nothing; its policy allows its own style and no more.
The PDF is PDF/A-3b with the record attached, set in fonts that are shipped here and pinned by their hashes.
"""

import base64
import json
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import typst
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from receipts.sheet import TEMPLATES, choose_locale, write_sheet
from schemas.canonical import canonical_json

FONTS = Path(__file__).parent / "fonts"
PDF_STANDARD = "a-3b"
UNPRINTABLE = "\N{WHITE SQUARE}"
_IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}

_TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, auto_reload=False
)
_STYLE_DIGEST = sha256(_TEMPLATES.get_template("document.css").render().encode()).digest()
HTML_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(_STYLE_DIGEST).decode()}'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
_COMPILERS = threading.local()


class FontsError(Exception):
    """A font is not the one that documents were set in before."""


def render_html(
    document: Mapping[str, Any],
    locale: str | None = None,
    fiscal: Sequence[Mapping[str, Any]] = (),
    status: str | None = None,
    logo: bytes | None = None,
) -> bytes:
    """Render a published document as one self-contained HTML page.

    ``locale`` is the one asked for (see ``sheet.choose_locale``), ``fiscal`` rows of attached fiscal receipts,
    ``status`` the receipt's derived one, ``logo`` a PNG or JPEG. Send it with ``HTML_POLICY`` as its
    Content-Security-Policy; the page carries the same.
    """
    sheet = write_sheet(document, choose_locale(document, locale), fiscal, status)
    page = _TEMPLATES.get_template("document.html").render(
        sheet=sheet, policy=HTML_POLICY, logo=_data_url(logo) if logo else None
    )
    return page.encode()


def render_pdf(
    document: Mapping[str, Any],
    locale: str | None = None,
    fiscal: Sequence[Mapping[str, Any]] = (),
    status: str | None = None,
    logo: bytes | None = None,
) -> bytes:
    """Render a published document as PDF/A-3b, the record attached; arguments as for ``render_html``.

    A character that no shipped font has is printed as a white square, in the PDF alone. Takes some milliseconds of
    computing: call it from a thread. Raises FontsError when a font is missing or not the pinned one.
    """
    sheet = _printable(write_sheet(document, choose_locale(document, locale), fiscal, status))
    if logo:
        _data_url(logo)
        sheet["logo"] = list(logo)
    pdf = _compiler().compile(
        format="pdf",
        sys_inputs={"sheet": json.dumps(sheet), "record": canonical_json(document).decode()},
        pdf_standards=[PDF_STANDARD],
        timestamp=int(datetime.fromisoformat(document["issued_at"]).timestamp()),
    )
    assert isinstance(pdf, bytes)
    return pdf


def _data_url(logo: bytes) -> str:
    kind = next((kind for magic, kind in _IMAGES.items() if logo.startswith(magic)), None)
    if kind is None:
        raise ValueError("a logo must be a PNG or a JPEG")
    return f"data:{kind};base64,{base64.b64encode(logo).decode()}"


def _compiler() -> Any:
    # A compiler keeps its fonts and parsed template, and may be used by one thread at a time.
    if not hasattr(_COMPILERS, "compiler"):
        check_fonts()
        fonts = typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[str(FONTS)])
        _COMPILERS.compiler = typst.Compiler(
            str(TEMPLATES / "document.typ"), root=str(TEMPLATES), font_paths=fonts, ignore_system_fonts=True
        )
    return _COMPILERS.compiler


@cache
def check_fonts() -> None:
    """Compare the shipped fonts with their pinned hashes; a difference would change every document's bytes."""
    for name, digest in _manifest()["files"].items():
        file = FONTS / name
        if not file.exists() or sha256(file.read_bytes()).hexdigest() != digest:
            raise FontsError(f"{name} is not the font that documents are set in")


@cache
def _manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((FONTS / "fonts.json").read_text(encoding="utf-8"))
    return manifest


@cache
def _characters() -> tuple[list[int], list[int]]:
    """The first and last code points of the ranges that the shipped fonts have characters for."""
    ranges = [part.split("-") for part in _manifest()["characters"].split()]
    return [int(part[0], 16) for part in ranges], [int(part[-1], 16) for part in ranges]


def _printable(value: Any) -> Any:
    """Replace what no font can print, in all strings of a sheet: PDF/A does not allow the missing-glyph box."""
    if isinstance(value, str):
        return "".join(c if _is_printable(c) else UNPRINTABLE for c in value)
    if isinstance(value, dict):
        return {name: _printable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


def _is_printable(character: str) -> bool:
    firsts, lasts = _characters()
    index = bisect_right(firsts, ord(character)) - 1
    return index >= 0 and ord(character) <= lasts[index]
