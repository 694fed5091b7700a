"""The contracts and a page about them, made once and served to anybody."""

from aiohttp import web


async def openapi(_: web.Request) -> web.StreamResponse:
    return web.json_response({})


async def asyncapi(_: web.Request) -> web.StreamResponse:
    return web.json_response({})


async def page(_: web.Request) -> web.StreamResponse:
    return web.Response(text="", content_type="text/html")
