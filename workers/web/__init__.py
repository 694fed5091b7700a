"""The read side over HTTP: queries, health, documentation (spec §6, §8).

``mount`` puts it onto a worker's web server. ``endpoints`` is the table of queries.
"""

from typing import TYPE_CHECKING

from aiohttp import web

from workers.web.server import Server
from workers.web.settings import WebSettings

if TYPE_CHECKING:
    from workers.service import Service

__all__ = ["WebSettings", "mount"]


def mount(application: web.Application, service: "Service", settings: WebSettings | None = None) -> None:
    """Add all routes and the middleware that guards them; the settings are by default those of the environment."""
    Server(service, settings or WebSettings.from_env()).mount(application)
