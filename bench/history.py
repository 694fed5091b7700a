"""Writes a long history fast: the service's own books and stores in big batches, without Kafka.

What it leaves behind is what commands would have: valid chains, balances, lots, operations, and inbox rows for the
open and the close of each operation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from hashlib import blake2b

from sqlalchemy.ext.asyncio import AsyncConnection

import catalog.store
import ledger.store
import merchants.store
from bench.scenarios import SOURCE, message_id
from catalog.sql import fetch
from ledger.books import Books, Movement, NewLot
from ledger.model import Account, Lot, Operation, account_id_of, entry_id_of
from merchants.databases import WRITER_SETTINGS, create_unpooled_engine, engine_url
from schemas.codec import Encoding, format_time
from schemas.envelope import business_key_digest, message_identity
from workers import inbox

BATCH = 20_000
CREDITS_EACH = 13
TOKENS = Decimal(1234)
LOT_DAYS = 365


@dataclass
class Writer:
    """Writes to one merchant, which nobody works for meanwhile.

    Attributes:
        url: of the merchant's database.
        users: whom entries are written for, in turn; they have accounts already.
    """

    url: str
    secret: bytes
    users: Sequence[str]
    number: int = 0
    _accounts: dict[int, Account] = field(default_factory=dict)
    _lots: dict[int, list[Lot]] = field(default_factory=dict)

    async def add(self, count: int) -> None:
        """Write so many debits, each with its operation."""
        engine = create_unpooled_engine(engine_url(self.url), _SETTINGS)
        async with engine.connect() as connection:
            await self._load(connection)
            await connection.commit()
            for begin in range(0, count, BATCH):
                async with connection.begin():
                    await self._batch(connection, min(BATCH, count - begin))
        await engine.dispose()

    async def add_lots(self, count: int, credits: int) -> None:
        """Give the first user so many lots; the user may be new."""
        engine = create_unpooled_engine(engine_url(self.url), _SETTINGS)
        async with engine.begin() as connection:
            await self._load(connection)
            books = await self._books(connection)
            account = books.open_account(account_id_of(self.users[0], self.secret), self.users[0])
            rows = []
            for _ in range(count):
                self.number += 1
                id_ = message_id("history", "grant", self.number)
                command = message_identity(SOURCE, id_)
                what = Movement("promo", "promo_grant", Decimal(credits))
                books.credit(account, credits, what, NewLot(books.now + timedelta(days=LOT_DAYS)), command)
                rows.append(self._row("Grant.Apply", id_, id_, account, books, "admin"))
            await ledger.store.save_ledger(connection, books)
            await inbox.save(connection, rows, [])
        await engine.dispose()

    async def _load(self, connection: AsyncConnection) -> None:
        """Read the accounts anew: the service may have moved them since."""
        ids = [account_id_of(user, self.secret) for user in self.users]
        self._accounts = await ledger.store.lock_accounts(connection, ids)
        names = ", ".join(ledger.store.LOTS)
        sql = f"SELECT {names} FROM lots WHERE account_id = ANY($1::bigint[]) AND NOT spent ORDER BY user_seq"
        self._lots = {}
        for row in await fetch(connection, sql, ids):
            lot = Lot(*row)
            self._lots.setdefault(lot.account_id, []).append(lot)

    async def _books(self, connection: AsyncConnection) -> Books:
        state = await merchants.store.read_state(connection)
        config = await merchants.store.read_config(connection, state.config_version)
        books = Books(
            now=state.now,
            config=config,
            config_version=state.config_version,
            catalog=await catalog.store.load(connection, state.catalog_version),
            accounts=self._accounts,
            lots=self._lots,
            lots_complete=set(self._accounts),
        )
        books.lots_by_id = {(lot.account_id, lot.user_seq): lot for lots in self._lots.values() for lot in lots}
        return books

    async def _batch(self, connection: AsyncConnection, count: int) -> None:
        books = await self._books(connection)
        rows: list[inbox.Row] = []
        for _ in range(count):
            self.number += 1
            user = self.users[self.number % len(self.users)]
            rows += self._operation(books, self._accounts[account_id_of(user, self.secret)])
        await ledger.store.save_ledger(connection, books)
        await inbox.save(connection, rows, [])

    def _operation(self, books: Books, account: Account) -> Iterable[inbox.Row]:
        name = message_id("history", "operation", self.number)
        opening, closing = (message_id("history", kind, self.number) for kind in ("open", "close"))
        operation = Operation(
            name,
            account.account_id,
            "llm",
            "TOKEN",
            Decimal("0.01"),
            1,
            books.now,
            None,
            "open",
            books.now,
            books.now + timedelta(minutes=15),
        )
        books.add_operation(operation)
        opened = self._row("Operation.Open", opening, name, account, books, "operations")
        what = Movement("debit", "llm", TOKENS, "TOKEN", operation_id=name)
        operation.entry_seq = books.debit(account, CREDITS_EACH, what, message_identity(SOURCE, closing))
        operation.resource_amount, operation.credits, operation.completed_at = TOKENS, CREDITS_EACH, books.now
        books.end_operation(account, operation, "closed")
        return opened, self._row("Operation.RecordAndClose", closing, name, account, books, "operations")

    def _row(self, kind: str, id_: str, key: str, account: Account, books: Books, channel: str) -> inbox.Row:
        at, identity = format_time(books.now), message_identity(SOURCE, id_)
        # Long past: offsets of these rows are below all that Kafka has, and no position refers to them.
        row = inbox.Row(
            identity,
            blake2b(identity, digest_size=32).digest(),
            bytes(40),
            business_key_digest(kind, key, self.secret),
            kind,
            f"credits.history.{channel}",
            0,
            self.number,
            int(Encoding.JSON),
            account.account_id,
            None,
            "applied",
            None,
            books.now,
        )
        row.result = (
            f'{{"command_id":"{id_}","command_source":"{SOURCE}","command_type":"{kind}",'
            f'"merchant_id":"growth","outcome":"applied","user_seq":{account.last_seq},"balance":{account.balance},'
            f'"debt":0,"applied_at":"{at}","effects":{{"operation_id":"{key}",'
            f'"entry_id":"{entry_id_of(account.account_id, account.last_seq)}","credits":{CREDITS_EACH}}}}}'
        )
        return row


# A batch of this size is decided for longer than a worker's may be.
_SETTINGS = {
    **WRITER_SETTINGS,
    "application_name": "bench-history",
    "statement_timeout": "300s",
    "idle_in_transaction_session_timeout": "300s",
}
