"""The operators' commands on running workers: status, dead letters, and a restore under traffic."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from console.client import Client, NoResultError
from console.kafka import class_path, find_java
from console.merchants import command
from tests.e2e.blackbox import CONTROL, CONTROL_RESULTS, Bus, Merchant, completed, name
from tests.e2e.conftest import Running
from tests.services import JARS
from workers.settings import WorkerSettings

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def has_java_compiler() -> bool:
    """Return whether a Java file can be run as it is."""
    modules = subprocess.run([find_java(), "--list-modules"], capture_output=True, text=True, check=False)
    return "jdk.compiler" in modules.stdout


async def credits(running: Running, *arguments: str, fails: bool = False) -> str:
    """Run the command line and return what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "console.main",
        *arguments,
        env=os.environ | running.environment | {"COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert bool(process.returncode) == fails, out.decode()
    return out.decode()


async def test_the_status_shows_workers_and_merchants(running: Running, bus: Bus, user: Callable[[], str]) -> None:
    merchant = await bus.register()
    await merchant.grant(user(), 5)

    said = await credits(running, "status")

    assert "no worker" not in said
    assert re.search(rf"{merchant.id} +active +0 ", said), said


async def test_a_dead_letter_is_listed_shown_and_redriven(running: Running, bus: Bus, user: Callable[[], str]) -> None:
    merchant = await bus.register()
    await merchant.stock()
    sent = await bus.send(f"credits.{merchant.id}.operations", "Operation.Open", b"{", key=user())
    (refused,) = await bus.results(sent)
    assert refused.body["error"]["code"] == "malformed"
    place = f"{sent.topic}/{sent.partition}/{sent.offset}"

    assert place in await credits(running, "dead-letters", "list", merchant.id)
    shown = json.loads(await credits(running, "dead-letters", "show", merchant.id, place))
    assert shown["headers"]["ce_id"] == sent.id
    assert shown["bytes"] == 1
    said = await credits(running, "dead-letters", "redrive", merchant.id, place)
    again = f"{sent.id}#redriven-{sent.partition}-{sent.offset}"
    assert again in said
    topic = f"credits.{merchant.id}.results"
    await bus.until("the second refusal", lambda: [r for r in bus.topics[topic] if r.body["command_id"] == again])
    # What was redriven is off the list; that it failed again is a dead letter of its own.
    assert place not in await credits(running, "dead-letters", "list", merchant.id)
    assert place in await credits(running, "dead-letters", "list", merchant.id, "--all")
    assert "redriven already" in await credits(running, "dead-letters", "redrive", merchant.id, place, fails=True)


async def test_a_dead_letter_of_the_control_topic_is_listed_shown_redriven_and_settled(
    running: Running, bus: Bus
) -> None:
    sent = await bus.send(CONTROL, "Merchant.Suspend", b"{", key="acme")
    await bus.results(sent)
    place = f"{sent.topic}/{sent.partition}/{sent.offset}"

    assert place in await credits(running, "dead-letters", "list", "control")
    shown = json.loads(await credits(running, "dead-letters", "show", "control", place))
    assert shown["headers"]["ce_id"] == sent.id
    again = f"{sent.id}#redriven-{sent.partition}-{sent.offset}"
    assert again in await credits(running, "dead-letters", "redrive", "control", place)
    results = bus.topics[CONTROL_RESULTS]
    await bus.until("the second refusal", lambda: [r for r in results if r.body["command_id"] == again])
    # Other tests leave some, too; the newest is the last.
    *_, left = re.findall(rf"{CONTROL}/0/[0-9]+", await credits(running, "dead-letters", "list", "control"))
    assert left != place
    await credits(running, "dead-letters", "settle", "control", left)
    assert left not in await credits(running, "dead-letters", "list", "control")


async def test_a_command_that_waits_for_another_is_told_from_one_that_no_worker_takes(
    running: Running, bus: Bus
) -> None:
    merchant = await bus.register()
    members = {"refund_id": name("r"), "external_ref": "pay-later", "amount": "1.00", "currency": "USD"}
    payload = completed("Refund.Apply", members)
    settings = WorkerSettings.from_env(running.environment)

    with pytest.raises(NoResultError, match=r"urn:credits:console \S+: it waits for purchase pay-later until 20"):
        await command(settings, merchant.id, "Refund.Apply", payload, seconds=3)
    async with Client(settings.kafka_bootstrap_servers, settings.security_kwargs()) as client:
        await client.watch(merchant.id, 1, from_start=False)
        with pytest.raises(NoResultError, match=r"^No result within 0 s of urn:credits:console an-id: does a worker"):
            await client.wait(["an-id"], seconds=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("send {merchant} User.Erase", "Integer exceeds 64-bit range"),
        ("send {merchant} User.Export", "There is no command User.Export."),
        ("clock advance {merchant} 99999999999999999999", "Integer exceeds 64-bit range"),
        ("receipts export {merchant} --from 2026-01-01 --to 9999-12-31", "reaches beyond the calendar"),
        ("receipts export nobody --from 2026-01-01 --to 2026-01-01", "There is no merchant nobody."),
        ("tokens create admin --merchant nobody", "There is no merchant nobody."),
        ("verify nobody", "There is no merchant nobody."),
        ("dead-letters list nobody", "There is no merchant nobody."),
    ],
)
async def test_what_cannot_be_done_is_said_without_a_traceback(
    running: Running, shop: Merchant, tmp_path: Path, words: str, said: str
) -> None:
    arguments = words.format(merchant=shop.id).split()
    if arguments[0] == "send":
        arguments.append('{"user_id": 99999999999999999999}')
    if arguments[0] == "receipts":
        arguments += ["--out", str(tmp_path)]

    shown = await credits(running, *arguments, fails=True)

    assert said in shown
    assert "Traceback" not in shown


async def test_a_database_lost_under_traffic_is_restored_and_every_command_is_applied_once(
    running: Running, bus: Bus, user: Callable[[], str], tmp_path: Path
) -> None:
    merchant = await bus.register()
    await merchant.stock()
    users = [user() for _ in range(5)]
    dump = str(tmp_path / "dump")
    for someone in users:
        await merchant.buy(someone)
    await credits(running, "backup", merchant.id, "--out", dump)
    members = {"access_period_days": 9, "credits": 3}
    sent = [await merchant.send("Grant.Apply", members | {"user_id": u, "grant_id": name("g")}) for u in users * 6]
    for someone in users:
        await merchant.buy(someone)
    before = {one.id: (await bus.results(one))[0] for one in sent}
    receipts = list(bus.topics[f"credits.{merchant.id}.receipts"])

    await bus.control("Merchant.Suspend", {"merchant_id": merchant.id})
    waiting = [await merchant.send("Grant.Apply", members | {"user_id": u, "grant_id": name("g")}) for u in users]
    said = await credits(running, "restore", merchant.id, dump)
    assert "commands imposed" in said
    await bus.control("Merchant.Resume", {"merchant_id": merchant.id})

    late = [(await bus.results(one))[0].body for one in waiting]
    assert [one["outcome"] for one in late] == ["applied"] * len(users)
    for someone, one in zip(users, late, strict=True):
        # Two purchases, six grants before and one after.
        assert one["user_seq"] == 9, someone
    again = [await merchant.send("Grant.Apply", json.loads(one.value or b""), id=one.id) for one in sent[:5]]
    topic = f"credits.{merchant.id}.results"
    wanted = {one.id for one in again}

    def answered_twice() -> bool:
        answers = [r for r in bus.topics[topic] if r.body["command_id"] in wanted]
        return len(answers) >= 2 * len(again)

    await bus.until("the answers to duplicates", answered_twice)
    for message in bus.topics[topic]:
        if message.body["command_id"] in wanted:
            assert message.value == before[message.body["command_id"]].value
    assert bus.topics[f"credits.{merchant.id}.receipts"] == receipts
    await credits(running, "verify", merchant.id)


async def test_the_documented_python_example_settles_a_purchase(
    running: Running, bus: Bus, user: Callable[[], str]
) -> None:
    merchant = await bus.register()
    await merchant.stock()
    servers = running.services.kafka_bootstrap_servers
    arguments = (str(EXAMPLES / "purchase.py"), servers, merchant.id, user(), "pack", "10.00", "USD")

    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()

    assert process.returncode == 0
    assert json.loads(out)["outcome"] == "applied"


@pytest.mark.skipif(not has_java_compiler(), reason="the Java example needs a JDK")
async def test_the_documented_java_example_settles_a_purchase(
    running: Running, bus: Bus, user: Callable[[], str]
) -> None:
    merchant = await bus.register()
    await merchant.stock()
    servers = running.services.kafka_bootstrap_servers
    jars = class_path(JARS, Console(stderr=True))
    arguments = ("-cp", jars, str(EXAMPLES / "Purchase.java"), servers, merchant.id, user(), "pack", "10.00", "USD")

    process = await asyncio.create_subprocess_exec(str(find_java()), *arguments, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()

    assert process.returncode == 0
    command = out.decode().split()[-1]
    topic = f"credits.{merchant.id}.results"
    await bus.until("the result", lambda: [r for r in bus.topics[topic] if r.body["command_id"] == command])
    (result,) = [r for r in bus.topics[topic] if r.body["command_id"] == command]
    assert result.body["outcome"] == "applied"
