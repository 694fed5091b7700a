"""Documents per second, issued (numbered, hashed, committed) and rendered: ``python -m bench.documents``."""

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from catalog.model import Catalog
from catalog.sql import fetch
from console.postgres import Postgres
from ledger.books import Books, DocumentDraft
from ledger.model import Lot, Purchase
from merchants.databases import WRITER_SETTINGS, create_engine, engine_url
from merchants.registry import WORKER_GROUP
from migrations import runner
from receipts.model import published
from receipts.render import render_html, render_pdf
from schemas.payloads import Buyer, MerchantConfig
from workers import documents

FOLDER = Path(__file__).parent.parent / ".credits" / "bench-documents"
SECONDS = 5.0
BATCHES = (1, 100, 1000)
AMOUNT = Decimal("12000.00")
CONFIG = MerchantConfig.model_validate(
    {
        "legal_name": "Ararat LLC",
        "registered_address": {"lines": ["1 Abovyan Street"], "city": "Yerevan", "country": "AM"},
        "country": "AM",
        "time_zone": "Asia/Yerevan",
        "locale": "hy",
        "contact_email": "office@ararat.example",
        "tax_regime": "vat",
        "vat_rates": [{"country": "*", "rate": "20"}],
        "receipt_series_prefix": "R",
        "credit_note_series_prefix": "C",
        "retention_years": 10,
    }
)
_numbers = count(1)


def draft() -> DocumentDraft:
    now, command = datetime(2026, 3, 1, tzinfo=UTC), os.urandom(16)
    ref = f"pay-{next(_numbers)}"
    purchase = Purchase(ref, 1, 1, 1000, "pack", "card", "AM", AMOUNT, "AMD", now, now, now, command)
    lot = Lot(1, 1, 1000, 1000, "purchase", "pack", ref, now, now + timedelta(365))
    buyer = Buyer(name="Ann Ararat", email="ann@example.com", country="AM")
    shared: dict[str, Any] = {"config": CONFIG, "config_version": 1, "title": "A thousand credits"}
    return DocumentDraft("receipt", purchase, command, AMOUNT, lot=lot, buyer=buyer, **shared)


async def issue(engine: AsyncEngine, batch: int) -> float:
    """Issue receipts in transactions of ``batch`` for a while; returns how many a second were committed."""
    issued, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        books = Books(datetime.now(UTC), CONFIG, 1, Catalog())
        books.drafts = [draft() for _ in range(batch)]
        async with engine.begin() as connection:
            issued += len(await documents.issue(connection, books, clock_offset=timedelta(), simulated=False))
    return issued / (time.perf_counter() - begun)


def render(rendering: Callable[..., bytes], shown: list[dict[str, Any]]) -> tuple[float, float]:
    """Render documents for a while; returns how many a second, and how many a second of processor time."""
    rendering(shown[0])
    rendered, begun, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < SECONDS:
        rendering(shown[rendered % len(shown)])
        rendered += 1
    return rendered / (time.perf_counter() - begun), rendered / (time.process_time() - used)


async def measure(postgres: Postgres) -> None:
    admin = engine_url(postgres.url("postgres")).render_as_string(hide_password=False)
    url = engine_url(postgres.url("documents"))
    await runner.ensure_role(admin, WORKER_GROUP)
    await runner.ensure_database(admin, "documents")
    await runner.upgrade(url.render_as_string(hide_password=False), "merchant")
    engine = create_engine(url, WRITER_SETTINGS, pool_size=1)
    for batch in BATCHES:
        print(f"issued in transactions of {batch:>4}: {await issue(engine, batch):>7,.0f} a second")
    async with engine.connect() as connection:
        rows = await fetch(connection, "SELECT body, hash, block FROM documents JOIN buyers USING (number) LIMIT 1000")
    await engine.dispose()
    shown = [published(row.body, row.hash, "user-1", row.block) for row in rows]
    for name, rendering in (("HTML", render_html), ("PDF", render_pdf)):
        wall, processor = await asyncio.to_thread(render, rendering, shown)
        print(f"rendered as {name:>4}, one thread: {wall:>7,.0f} a second, {processor:,.0f} a second of processor time")


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    server = Postgres(FOLDER)
    server.start()
    try:
        asyncio.run(measure(server))
    finally:
        server.stop()
        shutil.rmtree(FOLDER)
