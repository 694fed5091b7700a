"""Whatever is in the topics: it is answered, it never stops the good ones, and it leaves no traces that it must not."""

import json
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from tests.e2e.blackbox import AVRO, Bus, Json, Merchant, Sent, completed, name
from tests.e2e.conftest import Running

MakeUser = Callable[[], str]
CARD = "4111111111111111"
SPACED = "4111 1111 1111 1111"
DASHED = "5500-0000-0000-0004"
BARE = ("4111111111111111", "5500000000000004")


class Surrounded:
    """Sends good messages before and after each bad one, to the same partition."""

    def __init__(self, shop: Merchant, user: str) -> None:
        self.shop = shop
        self.user = user
        self.good: list[Sent] = []

    async def grant(self) -> None:
        members = {"grant_id": name(), "user_id": self.user, "credits": 1, "access_period_days": 1}
        self.good.append(await self.shop.send("Grant.Apply", members))

    async def send(self, type_: str | None, value: Any, **options: Any) -> Sent:
        await self.grant()
        channel = options.pop("channel", "admin")
        sent = await self.shop.bus.send(self.shop.topic(channel), type_, value, key="k", **options)
        await self.grant()
        return sent

    async def check(self) -> None:
        """Check that all good messages were applied, each once."""
        results = [await self.shop.bus.results(one) for one in self.good]
        assert [one[0].body["outcome"] for one in results] == ["applied"] * len(results)
        assert [one[0].body["user_seq"] for one in results] == list(range(1, len(results) + 1))


def grant(**more: Any) -> Json:
    members = {"grant_id": name(), "user_id": "bad-user", "credits": 5, "access_period_days": 3}
    return completed("Grant.Apply", members | more)


def text(**more: Any) -> str:
    return json.dumps(grant(**more))


async def refusal(shop: Merchant, sent: Sent) -> Json:
    (result,) = await shop.bus.results(sent)
    assert result.body["outcome"] == "rejected", result.body
    error: Json = result.body["error"]
    return error


MALFORMED: dict[str, bytes | str | None] = {
    "nothing that can be decoded": b"\x00\x01\x02",
    "an empty value": b"",
    "an unfinished object": b'{"user_id": "u"',
    "not UTF-8": text().encode().replace(b"bad-user", b"bad-\xff\xfe"),
    "a BOM": b"\xef\xbb\xbf" + text().encode(),
    "UTF-16": text().encode("utf-16"),
    "a duplicated member": text()[:-1] + ', "credits": 5}',
    "a duplicated unknown member": text()[:-1] + ', "x": 5, "x": 5}',
    "a duplicated nested member": text()[:-1] + ', "x": {"y": 5, "y": 5}}',
    "5.0 for an integer": text().replace('"credits": 5', '"credits": 5.0'),
    "5e0 for an integer": text().replace('"credits": 5', '"credits": 5e0'),
    "a string for an integer": text(credits="5"),
    "a boolean for an integer": text(credits=True),
    "a number for an id": text(grant_id=17),
    "U+0000": text(justification="a\x00b"),
    "U+0000 in an unknown member": text(extra="a\x00b"),
    "a lone surrogate": text().replace("bad-user", "bad-\\ud800"),
    "a lone surrogate in an unknown member": text(extra="x").replace('"x"', '"\\udc00"'),
    "NaN": text().replace('"credits": 5', '"credits": NaN'),
    "a list": "[]",
    "a string": '"text"',
    "null": "null",
    "trailing text": text() + " {}",
    "an absent member": json.dumps({key: value for key, value in grant().items() if key != "user_id"}),
    "a null for a member that must be": text(user_id=None),
    "an empty id": text(user_id=""),
    "an id of 129 characters": text(grant_id="g" * 129),
    "a text of 1,001 characters": text(justification="g" * 1001),
    "no actor": json.dumps({key: value for key, value in grant().items() if key != "actor"}),
    "no justification": json.dumps({key: value for key, value in grant().items() if key != "justification"}),
    "more than 64 KiB": text(extra="x" * 65_536),
    "a thousand levels": text()[:-1] + ', "x": ' + "[" * 1000 + "]" * 1000 + "}",
    "a tombstone": None,
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_malformed_values_are_refused_between_good_ones(shop: Merchant, user: MakeUser, what: str) -> None:
    between = Surrounded(shop, user())
    sent = await between.send("Grant.Apply", MALFORMED[what])
    assert (await refusal(shop, sent))["code"] == "malformed"
    await between.check()


async def test_the_limits_themselves_are_allowed(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = grant(user_id=someone, grant_id=name("g").ljust(128, "x"), justification="é" * 1000)
    await shop.applied("Grant.Apply", members)
    padding = 65_536 - len(json.dumps(grant(user_id=someone, extra="")))
    value = json.dumps(grant(user_id=someone, extra="x" * padding)).encode()
    assert len(value) == 65_536
    sent = await shop.bus.send(shop.topic("admin"), "Grant.Apply", value, key=someone)
    (result,) = await shop.bus.results(sent)
    assert result.body["outcome"] == "applied", result.body


@pytest.mark.parametrize("version", ["0.3", "2.0", "1", ""])
async def test_another_specversion_is_malformed(shop: Merchant, user: MakeUser, version: str) -> None:
    between = Surrounded(shop, user())
    sent = await between.send("Grant.Apply", grant(), headers={"ce_specversion": version})
    assert (await refusal(shop, sent))["code"] == "malformed"
    await between.check()


async def test_damaged_avro_is_malformed(shop: Merchant, user: MakeUser) -> None:
    between = Surrounded(shop, user())
    for value in (b"", b"\xc3\x01", b"\xc3\x01" + b"\x00" * 20, text().encode(), b"\xc3\x02" + b"\x11" * 30):
        sent = await between.send("Grant.Apply", value, encoding=AVRO)
        assert (await refusal(shop, sent))["code"] == "malformed"
    await between.check()


async def test_an_unknown_content_type_is_malformed(shop: Merchant, user: MakeUser) -> None:
    between = Surrounded(shop, user())
    for encoding in ("text/xml", "application/octet-stream"):
        sent = await between.send("Grant.Apply", text(), encoding=encoding)
        assert (await refusal(shop, sent))["code"] == "malformed"
    await between.check()


@pytest.mark.parametrize("header", ["ce_id", "ce_source", "ce_type"])
@pytest.mark.parametrize("how", ["absent", "empty", "not UTF-8"])
async def test_a_message_without_identity_is_a_pointer_in_the_dead_letter_topic(
    shop: Merchant, user: MakeUser, header: str, how: str
) -> None:
    between = Surrounded(shop, user())
    damage: dict[str, str | bytes | None] = {"absent": None, "empty": "", "not UTF-8": b"\xff\xfe"}
    sent = await between.send("Grant.Apply", text(extra="secret-payload"), headers={header: damage[how]})
    letter = await shop.dead_letter(sent)
    assert set(letter.body) == {"topic", "partition", "offset", "sha256", "code", "message"}
    assert letter.body["sha256"] == sent.sha256
    assert letter.body["code"] == "malformed"
    assert b"secret-payload" not in letter.value
    await between.check()
    assert shop.bus.heard(sent) == []


@pytest.mark.parametrize("header", ["ce_id", "ce_source", "ce_type"])
async def test_a_card_number_for_an_identity_is_a_dead_letter_that_does_not_repeat_it(
    shop: Merchant, running: Running, user: MakeUser, header: str
) -> None:
    between = Surrounded(shop, user())
    sent = await between.send("Grant.Apply", grant(), headers={header: CARD})
    letter = await shop.dead_letter(sent)
    assert set(letter.body) == {"topic", "partition", "offset", "sha256", "code", "message"}
    assert (letter.body["sha256"], letter.body["code"]) == (sent.sha256, "sensitive_data")
    assert CARD not in f"{letter.value!r} {letter.headers} {letter.key!r}"
    await between.check()
    assert [result for result in shop.said("results") if CARD.encode() in result.value] == []
    rows = await dump(running, shop)
    assert [row for row in rows if CARD in row] == []
    place = f"{sent.topic} {sent.partition} {sent.offset}"
    assert len([row for row in rows if "dead_letters" in row and place in row]) == 1


async def test_a_message_without_any_header_is_a_dead_letter(shop: Merchant, user: MakeUser) -> None:
    between = Surrounded(shop, user())
    headers = dict.fromkeys(("ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "content-type"))
    for value in (None, b"\xff", text().encode()):
        sent = await between.send("Grant.Apply", value, headers=headers)
        assert (await shop.dead_letter(sent)).body["sha256"] == sent.sha256
    await between.check()


async def test_unknown_types_wrong_topics_and_wrong_merchants_are_refused(shop: Merchant, user: MakeUser) -> None:
    between = Surrounded(shop, user())
    for code, type_, channel, members in (
        ("unknown_command", "Grant.Aply", "admin", grant()),
        ("unknown_command", "Command.Result", "admin", {}),
        ("wrong_topic", "Grant.Apply", "operations", grant()),
        ("wrong_topic", "Purchase.Settled", "admin", shop.purchase("bad-user")),
        ("wrong_topic", "Lot.Expire", "admin", {"user_id": "bad-user", "lot_id": "x"}),
        ("wrong_topic", "User.Erase", "users", completed("User.Erase", {"request_id": name(), "user_id": "bad-user"})),
        ("wrong_topic", "Merchant.Suspend", "admin", completed("Merchant.Suspend", {"merchant_id": shop.id})),
        ("wrong_merchant", "Grant.Apply", "admin", grant(merchant_id="another")),
    ):
        sent = await between.send(type_, members, channel=channel)
        assert (await refusal(shop, sent))["code"] == code, (code, type_)
    await between.check()
    ours = await shop.applied("Grant.Apply", grant(user_id=user(), merchant_id=shop.id))
    assert ours["balance"] == 5


async def test_malformed_comes_before_wrong_topic_only_where_the_registry_says_so(shop: Merchant) -> None:
    sent = await shop.bus.send(shop.topic("operations"), "Grant.Apply", b"\xff", key="k")
    assert (await refusal(shop, sent))["code"] == "malformed"
    sent = await shop.bus.send(shop.topic("operations"), "Grant.Aply", text(), key="k")
    assert (await refusal(shop, sent))["code"] == "unknown_command"


@pytest.mark.parametrize(
    ("type_", "channel", "change"),
    [
        ("Grant.Apply", "admin", {"credits": 10**30}),
        ("Grant.Apply", "admin", {"credits": 2**63}),
        ("Grant.Apply", "admin", {"credits": 2**63 - 1}),
        ("Grant.Apply", "admin", {"credits": 0}),
        ("Grant.Apply", "admin", {"credits": -5}),
        ("Grant.Apply", "admin", {"access_period_days": 10**9}),
        ("Adjustment.Apply", "admin", {"credits_delta": -(2**63)}),
        ("Operation.RecordAndClose", "operations", {"resource_amount": "1" + "0" * 60}),
        ("Operation.RecordAndClose", "operations", {"resource_amount": "0"}),
        ("Operation.RecordAndClose", "operations", {"resource_amount": "-1"}),
        ("Operation.RecordAndClose", "operations", {"resource_amount": "0.0000001"}),
        ("OperationType.CreateWithArchival", "admin", {"credits_per_unit": "1" + "0" * 60}),
        ("Purchase.Settled", "purchases", {"amount": "1" + "0" * 60}),
    ],
)
async def test_absurd_numbers_are_refused(
    shop: Merchant, user: MakeUser, type_: str, channel: str, change: Json
) -> None:
    between, someone = Surrounded(shop, user()), user()
    members: Json = {
        "Grant.Apply": grant(user_id=someone),
        "Adjustment.Apply": {"adjustment_id": name(), "user_id": someone, "credits_delta": 1, "access_period_days": 1},
        "Operation.RecordAndClose": shop.closing(someone, name(), "1"),
        "OperationType.CreateWithArchival": {"operation_code": name(), "display_name": "x", "resource_unit": "T"},
        "Purchase.Settled": shop.purchase(someone),
    }[type_]
    if type_ == "Purchase.Settled":
        members["pricing_snapshot"] |= change
    else:
        members |= change
    sent = await between.send(type_, completed(type_, members), channel=channel)
    code = (await refusal(shop, sent))["code"]
    assert code == "limit_exceeded" or (code == "malformed" and str(next(iter(change.values())))[0] in "-0"), code
    await between.check()


async def test_exponents_and_long_digits_do_not_stop_a_worker(shop: Merchant, user: MakeUser) -> None:
    between = Surrounded(shop, user())
    for value in (
        text().replace('"credits": 5', '"credits": 1' + "0" * 5000),
        text().replace('"credits": 5', '"credits": 1e999999999'),
        text(extra=1).replace('"extra": 1', '"extra": 1e999999999'),
        text(extra=1).replace('"extra": 1', '"extra": ' + "9" * 5000),
    ):
        sent = await between.send("Grant.Apply", value)
        (result,) = await shop.bus.results(sent)
        assert result.body["outcome"] == "applied" or result.body["error"]["code"] in ("malformed", "limit_exceeded")
    for amount in ("1e999999999", "1e5", "NaN", "Infinity", "٣", "1_000", "0x10", " 1", "+1", ""):
        sent = await between.send("Operation.RecordAndClose", shop.closing("u", name(), amount), channel="operations")
        assert (await refusal(shop, sent))["code"] in ("malformed", "limit_exceeded"), amount
    await between.check()


@pytest.mark.parametrize(
    ("type_", "change"),
    [
        ("Grant.Apply", {"grant_id": CARD}),
        ("Grant.Apply", {"user_id": CARD}),
        ("Grant.Apply", {"product_code": CARD}),
        ("Purchase.Settled", {"external_ref": CARD}),
        ("Purchase.Settled", {"user_id": CARD}),
        ("Operation.Open", {"operation_id": CARD}),
        ("Operation.Open", {"workflow_id": CARD}),
        ("Refund.Apply", {"external_ref": CARD}),
        ("Chargeback.Apply", {"dispute_id": CARD}),
        ("Purchase.Settled", {"card_number": "x"}),
        ("Purchase.Settled", {"cardNumber": "x"}),
        ("Purchase.Settled", {"pan": "x"}),
        ("Purchase.Settled", {"cvv": "123"}),
        ("Purchase.Settled", {"payment": {"details": [{"cvc": "123"}]}}),
    ],
)
async def test_card_data_is_refused(shop: Merchant, user: MakeUser, type_: str, change: Json) -> None:
    between = Surrounded(shop, user())
    members: Json = {
        "Grant.Apply": grant(),
        "Purchase.Settled": shop.purchase("bad-user"),
        "Operation.Open": {"user_id": "bad-user", "operation_id": name(), "operation_code": "llm"},
        "Refund.Apply": {"refund_id": name(), "external_ref": name()},
        "Chargeback.Apply": {"dispute_id": name(), "external_ref": name()},
    }[type_] | change
    channel = {"Purchase.Settled": "purchases", "Operation.Open": "operations"}.get(type_, "admin")
    sent = await between.send(type_, completed(type_, members), channel=channel)
    (result,) = await shop.bus.results(sent)
    assert result.body["error"]["code"] == "sensitive_data", result.body
    assert CARD.encode() not in result.value
    assert CARD.encode() not in (result.key or b"")
    await between.check()


async def test_a_digit_run_that_fails_luhn_is_an_id_like_any_other(shop: Merchant) -> None:
    assert (await shop.applied("Grant.Apply", grant(user_id="4111111111111112")))["balance"] == 5
    assert (await shop.applied("Grant.Apply", grant(user_id="u4111111111111111")))["outcome"] == "applied"


async def test_a_configured_pattern_allows_digits_in_a_reference(bus: Bus, user: MakeUser) -> None:
    shop = await bus.register(external_ref_patterns={"card": "[0-9]{16}"})
    await shop.stock()
    await shop.buy(user(), external_ref="4242424242424242")
    await shop.refused(
        "sensitive_data", "Purchase.Settled", shop.purchase(user(), external_ref=CARD, payment_method="x")
    )


async def test_no_card_number_and_no_erased_user_is_left_anywhere(bus: Bus, running: Running, user: MakeUser) -> None:
    shop = await bus.register()
    await shop.stock()
    erased, other = f"erased-by-name-{name()}", user()
    buyer = {"name": f"Ani {SPACED}", "email": "ani.only.here@example.org", "vat_id": "VAT-ONLY-HERE"}
    for someone in (erased, other):
        members = shop.purchase(someone, buyer=buyer, note=CARD, deep={"list": [DASHED, {"x": SPACED}]})
        result = await shop.applied("Purchase.Settled", members)
        assert "4111" not in (await shop.document(result["effects"]["receipt_number"])).value.decode()
    ref = members["external_ref"]
    justification = f"called about {SPACED} and {DASHED}, then {CARD}"
    await shop.applied("Grant.Apply", grant(user_id=erased, justification=justification))
    await shop.applied("Refund.Apply", refund_id=name(), external_ref=ref, amount="1", justification=justification)
    await shop.do("Chargeback.Apply", dispute_id=name(), external_ref=ref, amount="1", category=f"fraud {SPACED}")
    await shop.send("Operation.Cancel", {"user_id": erased, "operation_id": name(), "reason": justification})
    parked = {"refund_id": name(), "external_ref": name("later"), "justification": justification}
    await shop.send("Refund.Apply", parked)
    await shop.refused("sensitive_data", "Grant.Apply", grant(grant_id=CARD))
    await shop.refused("unknown_product", "Grant.Apply", _without_credits(grant(product_code=f"x{name()}")))
    for value in (f'{{"user_id": "{CARD}"', f"{CARD}".encode() + b"\xff", f"{SPACED}"):
        await bus.results(await bus.send(shop.topic("admin"), "Grant.Apply", value, key="k"))
    await shop.dead_letter(await bus.send(shop.topic("admin"), None, f"{CARD}", key=CARD, headers={"ce_type": None}))
    for header in ("ce_id", "ce_source", "ce_type"):
        await bus.send(shop.topic("admin"), "Grant.Apply", grant(), key="k", headers={header: CARD})
    opened = await shop.open(erased)
    await shop.applied("Operation.Cancel", user_id=erased, operation_id=opened)
    await shop.applied("User.Erase", request_id=name(), user_id=erased)
    await shop.refused("account_erased", "Grant.Apply", grant(user_id=erased))
    await shop.grant(other, 1)
    rows = await dump(running, shop)
    assert any("[redacted]" in row for row in rows)
    for number in (CARD, SPACED, *BARE, DASHED):
        assert [row for row in rows if number in row] == []
    for trace in (erased, "ani.only.here@example.org", "VAT-ONLY-HERE"):
        found = [row for row in rows if trace in row]
        # The other user's buyer block is the only one left.
        assert len(found) <= (0 if trace == erased else 1), found
    for channel in ("results", "receipts", "dead-letter"):
        for message in shop.said(channel):
            whole = message.value.decode(errors="replace") + str(message.headers) + str(message.key)
            assert not [number for number in (CARD, SPACED, *BARE, DASHED) if number in whole], whole


async def test_a_card_number_in_the_actor_is_redacted(shop: Merchant, running: Running, user: MakeUser) -> None:
    await shop.applied("Grant.Apply", grant(user_id=user(), actor=f"Ani {CARD}"))
    assert [row for row in await dump(running, shop) if f"Ani {CARD}" in row] == []


def _without_credits(members: Json) -> Json:
    return {key: value for key, value in members.items() if key not in ("credits", "access_period_days")}


async def dump(running: Running, merchant: Merchant) -> list[str]:
    """Return every row of every table of a merchant's database as text, bytes both as hex and as text."""
    connection = await asyncpg.connect(running.services.database_url(await database_of(running, merchant)))
    try:
        tables = await connection.fetch(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        rows = [
            (table, record) for (table,) in tables for record in await connection.fetch(f"SELECT t.* FROM {table} AS t")
        ]
        return [f"{table}: " + " ".join(_readable(value) for value in record.values()) for table, record in rows]
    finally:
        await connection.close()


def _readable(value: Any) -> str:
    return f"{value.hex()} {value.decode(errors='replace')}" if isinstance(value, bytes) else str(value)


async def database_of(running: Running, merchant: Merchant) -> str:
    """Find the merchant's database by its name."""
    connection = await asyncpg.connect(running.services.postgres_url)
    try:
        found = await connection.fetch(
            "SELECT datname FROM pg_database WHERE datname LIKE '%' || $1 || '%'", merchant.id
        )
    finally:
        await connection.close()
    assert len(found) == 1, found
    return str(found[0][0])
