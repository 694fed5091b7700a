"""The contracts and a page about them, made once and served to anybody. The page needs nothing but itself."""

import json
from functools import cache
from html import escape
from typing import Any

from aiohttp import web

from schemas.canonical import compact_json
from workers.web.openapi import asyncapi as make_asyncapi
from workers.web.openapi import document

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; }
a { color: inherit; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { overflow: auto; max-height: 24rem; background: #8881; padding: .75rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; }
summary { cursor: pointer; padding: .4rem 0; }
.path { font-weight: 600; }
"""

LINKS = """<p>Machine-readable: <a href="/openapi.json">openapi.json</a>, <a href="/asyncapi.json">asyncapi.json</a>.
Here: <a href="#queries">queries</a>, <a href="#topics">topics</a>, <a href="#messages">messages</a>,
<a href="#shapes">shapes</a>, <a href="#errors">errors</a>.</p>"""


@cache
def _openapi() -> bytes:
    return compact_json(document())


@cache
def _asyncapi() -> bytes:
    return compact_json(make_asyncapi())


async def openapi(_: web.Request) -> web.StreamResponse:
    return web.Response(body=_openapi(), content_type="application/json")


async def asyncapi(_: web.Request) -> web.StreamResponse:
    return web.Response(body=_asyncapi(), content_type="application/json")


async def page(_: web.Request) -> web.StreamResponse:
    return web.Response(text=_page(), content_type="text/html", charset="utf-8")


@cache
def _page() -> str:
    contract, topics = document(), make_asyncapi()
    info = contract["info"]
    operations = [(path, methods["get"]) for path, methods in contract["paths"].items()]
    parts = [
        f"<h1>{escape(info['title'].partition(':')[0])}</h1>",
        f"<p>{escape(info['description'])}</p>",
        LINKS,
        '<h2 id="queries">Queries</h2>',
        *(_query(path, operation) for path, operation in operations),
        '<h2 id="topics">Topics</h2>',
        _table(("Topic", "What"), [(c["address"], c["description"]) for c in topics["channels"].values()]),
        '<h2 id="messages">Messages</h2>',
        *(_message(message, topics) for message in topics["components"]["messages"].values()),
        '<h2 id="shapes">Shapes</h2>',
        *(_shape(name, shape) for name, shape in sorted(contract["components"]["schemas"].items())),
        '<h2 id="errors">Errors</h2>',
        _errors(contract["x-error-codes"]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(info["title"])}</title><style>{STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}{viewport}</head><body>{"".join(parts)}</body></html>'


def _query(path: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"{p['name']}{' (required)' if p['required'] else ''}", p["description"])
        for p in operation.get("parameters", [])
        if p["in"] == "query"
    ]
    ((_, content),) = operation["responses"]["200"].get("content", {"": {}}).items()
    returned = f"<p>Returns {_type(content['schema'])}.</p>" if "schema" in content else ""
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><code class="path">GET {escape(path)}</code> '
        f"{escape(operation['summary'])}</summary><p>{escape(operation.get('description', ''))}</p>"
        f"{_table(('Parameter', 'What'), rows) if rows else ''}{returned}{_example(content.get('example'))}</details>"
    )


def _message(message: dict[str, Any], topics: dict[str, Any]) -> str:
    shape = topics["components"]["schemas"][message["payload"]["$ref"].rpartition("/")[2]]
    examples = "".join(_example(example["payload"]) for example in message.get("examples", [])[:1])
    return (
        f'<details id="{escape(message["name"])}"><summary><code class="path">{escape(message["name"])}</code> '
        f"{escape(message['summary'])}</summary>{_members(shape)}{examples}</details>"
    )


def _shape(name: str, shape: dict[str, Any]) -> str:
    return (
        f'<details id="shape-{escape(name)}"><summary><code class="path">{escape(name)}</code> '
        f"{escape(shape['description'])}</summary>{_members(shape)}</details>"
    )


def _members(shape: dict[str, Any]) -> str:
    required = set(shape["required"])
    cells = [
        f"<tr><td><code>{escape(name)}{'' if name in required else '?'}</code></td><td>{_type(member)}</td>"
        f"<td>{escape(member.get('description', ''))}</td></tr>"
        for name, member in shape["properties"].items()
    ]
    return f"<table><tr><th>Member</th><th>Type</th><th>What</th></tr>{''.join(cells)}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#shape-{escape(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(member) for member in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "items" in schema.get("properties", {}):
        return f"a page of {_type(schema['properties']['items'])}"
    if "enum" in schema:
        return escape(", ".join(schema["enum"])) if len(schema["enum"]) < 12 else "string"
    return escape(schema.get("format", schema.get("type", "anything")))


def _example(example: Any) -> str:
    if example is None:
        return ""
    return f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"


def _table(heads: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [f"<tr><td><code>{escape(name)}</code></td><td>{escape(what)}</td></tr>" for name, what in rows]
    return f"<table><tr><th>{heads[0]}</th><th>{heads[1]}</th></tr>{''.join(cells)}</table>"


def _errors(codes: list[dict[str, Any]]) -> str:
    rows = [
        f'<tr id="error-{escape(c["code"])}"><td><code>{escape(c["code"])}</code></td><td>{c["status"]}</td>'
        f"<td>{escape(c['meaning'])} {escape(c['fix'])}</td></tr>"
        for c in codes
    ]
    return f"<table><tr><th>Code</th><th>Status</th><th>What, and what to do</th></tr>{''.join(rows)}</table>"
