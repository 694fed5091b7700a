"""The OpenAPI document of the queries, made from the table of endpoints."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import schemas.asyncapi
from schemas.errors import REGISTRY, Code
from schemas.json_schema import Definitions
from workers.web.access import EVERYBODY
from workers.web.calls import Endpoint
from workers.web.endpoints import ENDPOINTS
from workers.web.parameters import ID_PATTERN, Parameter
from workers.web.shapes import AsOf, Problem

VERSION = "1.0.0"
ROOT = "/v1/merchants/{merchant}"
DOCS = Path(__file__).parents[2] / "docs"

_PARTS = {
    "merchant": "The merchant's id.",
    "user": "The user, as the caller names them; percent-encoded.",
    "entry": "The entry_id.",
    "number": "The document's number.",
    "operation": "The operation_id.",
    "code": "The operation_code.",
}
_EXAMPLE_PARTS = {"merchant": "acme", "user": "ada", "operation": "op-1", "code": "text.generate"}


@cache
def recorded() -> dict[str, Any]:
    """Return answers that were recorded when the story of ``schemas.examples`` had been told; see the tests."""
    text = files("workers.web").joinpath("examples.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def asyncapi() -> dict[str, Any]:
    return schemas.asyncapi.document(recorded()["outputs"])


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    definitions = Definitions()
    problem = definitions.of(Problem)
    definitions.of(AsOf)
    paths: dict[str, Any] = {ROOT + e.path: {"get": _operation(e, definitions)} for e in ENDPOINTS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Credit management service: queries",
            "version": VERSION,
            "description": "Reads of a merchant's credits. Everything that changes something is a command in a topic: "
            "see /asyncapi.json. Credits are integers; money, rates and resource amounts are decimal strings; times "
            "are RFC 3339 in UTC. Answers carry an ETag; If-None-Match spares what has not changed.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": paths | _about_the_process(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": definitions.schemas,
            "responses": {
                "Problem": {
                    "description": "An error (RFC 9457); `code` says which.",
                    "content": {"application/problem+json": {"schema": problem}},
                },
                "NotModified": {"description": "Nothing has changed since the answer with this ETag."},
            },
        },
        "x-error-codes": [
            {
                "code": str(info.code),
                "status": info.http_status,
                "retryable": info.retryable,
                "meaning": info.meaning,
                "fix": info.fix,
            }
            for info in REGISTRY.values()
        ],
    }


def _operation(endpoint: Endpoint, definitions: Definitions) -> dict[str, Any]:
    schema = definitions.of(endpoint.shape)
    if endpoint.is_list:
        schema = _page(schema, with_cut=endpoint.is_about_user)
    content: dict[str, Any] = {"schema": schema}
    example = recorded()["answers"].get(endpoint.name)
    if example is not None:
        content["example"] = example["answer"]
    who = "anybody with a token of the merchant; users for their own data" if endpoint.roles == EVERYBODY else None
    told = [
        endpoint.description,
        f"Roles: {', '.join(sorted(endpoint.roles))}" + (f" ({who})." if who else "."),
    ]
    return {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "description": " ".join(text for text in told if text),
        "parameters": [
            *(_part(name, example) for name in _names(ROOT + endpoint.path)),
            *(_parameter(parameter, example) for parameter in endpoint.parameters),
            {
                "name": "If-None-Match",
                "in": "header",
                "description": "The ETag of an answer that is at hand.",
                "schema": {"type": "string"},
            },
        ],
        "responses": _responses(endpoint, content),
    }


def _names(path: str) -> list[str]:
    return [part.strip("{}") for part in path.split("/") if part.startswith("{")]


def _part(name: str, example: Mapping[str, Any] | None) -> dict[str, Any]:
    shown = {
        "name": name,
        "in": "path",
        "required": True,
        "description": _PARTS[name],
        "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": ID_PATTERN},
    }
    value = (example or {}).get("path", {}).get(name, _EXAMPLE_PARTS.get(name))
    return shown if value is None else shown | {"example": value}


def _parameter(parameter: Parameter, example: Mapping[str, Any] | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": parameter.name,
        "in": "query",
        "required": parameter.required,
        "description": parameter.meaning,
        "schema": dict(parameter.schema),
    }
    if parameter.schema.get("type") == "array":
        shown |= {"style": "form", "explode": False}
    value = (example or {}).get("query", {}).get(parameter.name)
    return shown if value is None else shown | {"example": value}


def _page(item: dict[str, Any], *, with_cut: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "items": {"type": "array", "items": item},
        "next_cursor": {"type": "string", "description": "Where the next page begins; absent on the last one."},
    }
    if with_cut:
        properties["as_of"] = {"$ref": "#/components/schemas/AsOf"}
    required = ["items", "as_of"] if with_cut else ["items"]
    return {"type": "object", "properties": properties, "required": required}


def _responses(endpoint: Endpoint, content: dict[str, Any]) -> dict[str, Any]:
    tag = {"ETag": {"description": "Names this answer.", "schema": {"type": "string"}}}
    statuses = {400, 401, 403, 404, REGISTRY[Code.ACCOUNT_ERASED].http_status, 413, 422, 429, 500, 503}
    if endpoint.is_about_user:
        statuses.add(REGISTRY[Code.NOT_DUE].http_status)
    return {
        "200": {"description": "The answer.", "headers": tag, "content": {"application/json": content}},
        "304": {"$ref": "#/components/responses/NotModified"},
        **{str(status): {"$ref": "#/components/responses/Problem"} for status in sorted(statuses)},
    }


def _about_the_process() -> dict[str, Any]:
    """Describe what is not about a merchant: health, metrics, documentation."""

    def get(name: str, summary: str, media_type: str, statuses: tuple[int, ...], *, public: bool = True) -> Any:
        shown: dict[str, Any] = {
            "operationId": name,
            "summary": summary,
            "responses": {"200": {"description": "The answer.", "content": {media_type: {}}}}
            | {str(status): {"$ref": "#/components/responses/Problem"} for status in (413, 422, *statuses)},
        }
        return {"get": shown | ({"security": []} if public else {})}

    return {
        "/healthz": get("getHealth", "Whether the process lives", "application/json", ()),
        "/readyz": get("getReadiness", "Whether the worker can work", "application/json", (503,)),
        "/metrics": get("getMetrics", "Metrics for Prometheus", "text/plain", (401, 403, 429, 500, 503), public=False),
        "/openapi.json": get("getOpenApi", "This document", "application/json", ()),
        "/asyncapi.json": get("getAsyncApi", "The topics, as AsyncAPI 3", "application/json", ()),
        "/docs": get("getDocs", "A page about all of it", "text/html", ()),
    }


def texts() -> dict[Path, str]:
    """Return the text of every generated document by its path."""
    made = {"openapi.json": document(), "asyncapi.json": asyncapi()}
    return {DOCS / name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in made.items()}
