"""Tells the story of ``schemas.examples`` to a real database and asks every query about it.

``python -m tests.integration.contract <url of a scratch server's database>`` records the answers that the OpenAPI and
AsyncAPI documents show as examples: needed when an answer has changed on purpose; then ``python -m workers.web``.
"""

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from yarl import URL

import receipts.queries
import workers.web
from merchants.schema import migrate
from schemas import examples
from schemas.events import dead_letter
from tests import builders
from tests.integration.web import Api, serve

FILE = Path(workers.web.__file__).parent / "examples.json"

NOT_APPLIED = {"pay_1003": "price_mismatch", "00c0ffee00c0ffee-1": "unknown_lot", "op-3": "not_due"}

# What differs each time the story is told.
_VOLATILE = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"), "<time>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d\b"), "<day>"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "<hash>"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "<account>"),
    (re.compile(r"\b([RC])-\d{4}-"), r"\1-<year>-"),
    (re.compile(r'"(median|p95)": ?"[0-9.]+"'), r'"\1": "<seconds>"'),
    (re.compile(r'"next_cursor": ?"[^"]+"'), '"next_cursor": "<cursor>"'),
)


@dataclass(frozen=True)
class Question:
    """An example request: the endpoint's name, where it lies below the merchant, and its query."""

    name: str
    path: str
    parts: Mapping[str, str]
    query: Mapping[str, str]

    async def ask(self, api: Api) -> Any:
        path = self.path.format(**{name: URL.build(path=part).raw_path for name, part in self.parts.items()})
        return await api.get(path, **self.query)


async def tell(clerk: builders.Clerk) -> list[dict[str, Any]]:
    """Send the story's commands one after the other, each as of now; returns their results."""
    results = []
    for number in range(len(examples.story())):
        command_type, payload = examples.story(datetime.now(UTC))[number]
        command_id = f"m-{number + 1}"
        results.append(await clerk.send(command_type, payload, source=examples.SOURCE, command_id=command_id))
    return results


async def questions(api: Api) -> list[Question]:
    """Ask each endpoint one thing."""
    entries = (await api.get("/users/ada/ledger"))["items"]
    debit = next(entry for entry in entries if entry["reason"] == "debit")
    number = (await api.get("/users/ada/receipts"))["items"][0]["number"]
    ada = {"user": "ada"}
    return [
        Question("getBalance", "/users/{user}/balance", ada, {"explain": "true"}),
        Question("listLots", "/users/{user}/lots", ada, {"state": "active", "limit": "2"}),
        Question("listEntries", "/users/{user}/ledger", ada, {"limit": "3"}),
        Question("explainEntry", "/users/{user}/ledger/{entry}/explain", ada | {"entry": debit["entry_id"]}, {}),
        Question("listUsage", "/users/{user}/usage", ada, {"group_by": "workflow_id,operation_code"}),
        Question("listReceipts", "/users/{user}/receipts", ada, {"limit": "1"}),
        Question("getOverview", "/users/{user}/overview", ada, {}),
        Question("exportUser", "/users/{user}/export", ada, {}),
        Question("getReceipt", "/receipts/{number}", {"number": number}, {}),
        Question("getReceiptStatus", "/receipts/{number}/status", {"number": number}, {}),
        Question("listProducts", "/products", {}, {"country": "AM"}),
        Question("listOperationTypes", "/operation-types", {}, {"state": "active"}),
        Question("getOperationType", "/operation-types/{code}", {"code": "text.generate"}, {}),
        Question("listOperations", "/operations", {}, {"state": "closed"}),
        Question("listOperationMetrics", "/operations/metrics", {}, {}),
        Question("getOperation", "/operations/{operation}", {"operation": "op-1"}, {}),
        Question("listPurchases", "/purchases", {}, {"needs_attention": "true"}),
        Question("getCommandResult", "/commands", {}, {"source": examples.SOURCE, "id": "m-10"}),
    ]


async def answers(api: Api) -> dict[str, Any]:
    return {
        question.name: {
            "path": dict(question.parts),
            "query": dict(question.query),
            "answer": await question.ask(api),
        }
        for question in await questions(api)
    }


async def outputs(clerk: builders.Clerk, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one example of everything the service publishes."""
    found = {}
    async with clerk.engine.connect() as connection:
        for kind, event in (("receipt", "Receipt.Issued"), ("credit_note", "CreditNote.Issued")):
            account = int(next(r["effects"]["lot_id"] for r in results if "lot_id" in r["effects"]).split("-")[0], 16)
            documents = await receipts.queries.documents(connection, account, after=None, limit=1, kind=kind)
            document = await receipts.queries.document(connection, documents[0]["number"])
            assert document is not None
            found[event] = document[1]
    topic, message = "credits.acme.purchases", "ce_source, ce_id or ce_type is missing or not readable"
    letter = dead_letter(topic, 0, 17, bytes(32), code="malformed", message=message)
    return {"Command.Result": results[9], **found, "Message.DeadLettered": letter}


def stable(value: Any) -> str:
    """Return a value's JSON without what differs each time."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    for pattern, stand_in in _VOLATILE:
        text = pattern.sub(stand_in, text)
    return text


async def record(server_url: str) -> None:
    control_url = urlsplit(server_url)._replace(path="/contract_control").geturl()
    await migrate(control_url)
    async with (
        builders.clerk(await builders.merchant(control_url, **examples.CONFIG)) as clerk,
        serve(control_url, examples.MERCHANT) as api,
    ):
        results = await tell(clerk)
        recorded = {"answers": await answers(api), "outputs": await outputs(clerk, results)}
    FILE.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1]))
