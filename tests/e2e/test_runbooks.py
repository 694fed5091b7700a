"""The runbooks, followed: each situation is brought about, and the page's own lines are run until it is over.

The commands of all other documents are run here, too.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from console.postgres import SYSTEM_USER
from console.processes import free_port, is_root
from tests import builders
from tests.e2e.blackbox import Bus, Merchant, name
from tests.e2e.conftest import Running
from tests.e2e.pages import ROOT, Script, commands, database
from tests.services import Services

SCRIPTED: set[str] = set()
# Room for a merchant's database and a kept one.
SMALL_DISK = "64m"
GRANTS = 2_000
CARD_LIKE = "4000056655665556"


def follows(page: str) -> pytest.MarkDecorator:
    """Mark a test that runs all commands of a page, which come as `script`."""
    SCRIPTED.add(page)
    return pytest.mark.parametrize("script", [page], indirect=True)


@pytest.fixture
def script(request: pytest.FixtureRequest, running: Running, tmp_path: Path) -> Iterator[Script]:
    environment = running.environment | {
        "CREDITS_URL": running.start("worker-1"),
        "CREDITS_TOKEN": running.token,
        "POSTGRES_URL": running.services.postgres_url,
    }
    script = Script(request.param, tmp_path, environment)
    yield script
    script.over()


@pytest.fixture
async def server(running: Running) -> AsyncIterator[asyncpg.Connection]:
    """Return a superuser's connection."""
    connection = await asyncpg.connect(running.services.postgres_url)
    yield connection
    await connection.close()


@pytest.fixture
async def acme(bus: Bus) -> Merchant:
    """Return a merchant that sells, of its own for each test."""
    merchant = await bus.register()
    await merchant.stock()
    return merchant


async def close(server: asyncpg.Connection, name: str) -> None:
    """Let nobody into a database any more."""
    await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    await server.fetch("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name)


@follows("docs/operations/erasure.md")
async def test_a_person_is_exported_and_erased(script: Script, acme: Merchant, tmp_path: Path) -> None:
    script.about(acme.id)
    ref, _ = await acme.buy("ann")

    await script.run("curl")
    assert ref in (tmp_path / "ann.json").read_text()
    erased = json.loads(await script.run("credits send acme User.Erase"))
    assert erased["outcome"] == "applied"
    assert json.loads(await script.run("curl"))["code"] == "account_erased"
    await script.run("credits verify acme")


@follows("docs/operations/late-chargeback.md")
async def test_a_chargeback_comes_long_after_the_purchase(script: Script, bus: Bus) -> None:
    acme = await bus.register(simulated=True)
    await acme.stock()
    ref, _ = await acme.buy("ann")
    await acme.use("ann", "30")
    await acme.advance(20 * 86_400)
    script.about(acme.id)
    script.put({"pay-1": ref})

    charged = json.loads(await script.run("credits send acme Chargeback.Apply"))
    assert charged["effects"]["credits_taken"] == 100
    assert json.loads(await script.run("curl"))["items"][-1]["reason"] == "chargeback"
    won = json.loads(await script.run("credits send acme Chargeback.Reverse"))
    assert won["outcome"] == "applied"


@follows("docs/operations/onboarding.md")
async def test_a_merchant_comes_and_pauses(script: Script, tmp_path: Path) -> None:
    merchant = name("acme")
    script.about(merchant)
    (tmp_path / "merchant.json").write_bytes((ROOT / "docs/examples/merchant.json").read_bytes())

    await script.run("credits merchants create acme")
    assert re.search(rf"{merchant} +active +4", await script.run("credits merchants list"))
    await script.run("credits send acme Product.Create")
    await script.run("credits send acme OperationType.CreateWithArchival")
    assert (await script.run("credits tokens create upstream")).startswith("crd_")
    assert re.search(rf"{merchant} +active +0 ", await script.run("credits status"))
    assert [product["product_code"] for product in json.loads(await script.run("curl"))["items"]] == ["pack"]
    for type_ in ("Merchant.Suspend", "Merchant.Resume"):
        assert json.loads(await script.run(f"credits send acme {type_}"))["outcome"] == "applied"


@follows("docs/operations/poison.md")
async def test_messages_that_could_not_be_decided_are_redriven_or_settled(
    script: Script, acme: Merchant, tmp_path: Path
) -> None:
    malformed = await acme.bus.send(acme.topic("operations"), "Operation.Open", b"{", key="ann")
    looks_like_a_card = await acme.send("Purchase.Settled", acme.purchase("ann", external_ref=CARD_LIKE))
    order = acme.purchase("ann", amount="9.00")
    await acme.refused("price_mismatch", "Purchase.Settled", order)
    paid_back = await acme.send("Purchase.Settled", acme.purchase("ann", product="nothing"))
    assert (await acme.bus.results(paid_back))[0].body["outcome"] == "rejected"
    places = [f"{sent.topic}/{sent.partition}/{sent.offset}" for sent in (looks_like_a_card, malformed)]
    for sent in (looks_like_a_card, malformed):
        await acme.dead_letter(sent)
    script.about(acme.id)
    script.put({"credits.acme.purchases/0/42": places[0], "credits.acme.operations/0/17": places[1]})
    place = f"{paid_back.topic}/{paid_back.partition}/{paid_back.offset}"
    script.put({"pay-1": order["external_ref"], "invoice": "card", "credits.acme.purchases/0/43": place})
    script.put({"2026-01-01T10:00:00Z": acme.now(), "2026-01-01T10:05:00Z": acme.now()})
    config = acme.config | {"external_ref_patterns": {"card": "[0-9]{16}"}}
    (tmp_path / "merchant.json").write_text(json.dumps(config))

    listed = await script.run("credits dead-letters list acme")
    assert all(place in listed for place in places)
    assert json.loads(await script.run("credits dead-letters show acme"))["code"] == "sensitive_data"
    await script.run("credits dead-letters list control")
    await script.run("credits send acme Merchant.Configure")
    assert f"{looks_like_a_card.id}#redriven" in await script.run("credits dead-letters redrive acme")
    await script.run("credits dead-letters settle acme")
    needing, lost = json.loads(await script.run("curl"))["items"]
    assert needing["external_ref"] == order["external_ref"]
    assert "/".join(str(lost["message"][part]) for part in ("topic", "partition", "offset")) == place
    await script.run("credits send acme Purchase.Settled")
    await script.run("credits dead-letters settle acme")
    assert "no dead letters" in await script.run("credits dead-letters list acme")
    assert json.loads(await script.run("curl"))["items"] == []


@follows("docs/operations/database-down.md")
async def test_a_database_does_not_answer(script: Script, acme: Merchant, bus: Bus, server: asyncpg.Connection) -> None:
    script.about(acme.id)
    await close(server, database(acme.id))
    waiting = await acme.send("Grant.Apply", {"user_id": "ann", "grant_id": "g", "credits": 5, "access_period_days": 9})

    assert re.search(rf"{acme.id} +(?!active)\S", await script.run("credits status"))
    assert "accepting connections" in await script.run("pg_isready")
    assert " f " in await script.run("psql")
    other = await bus.register()
    await other.grant("ben", 1)
    assert bus.heard(waiting) == []
    await script.run("psql")
    assert (await bus.results(waiting))[0].body["outcome"] == "applied"
    assert re.search(rf"{acme.id} +active +0 ", await script.run("credits status"))


@follows("docs/operations/key-rotation.md")
async def test_tokens_keys_and_passwords_are_rotated(
    script: Script, acme: Merchant, running: Running, server: asyncpg.Connection
) -> None:
    script.about(acme.id)
    role = name("rotated")
    await server.execute(f"""CREATE ROLE "{role}" LOGIN PASSWORD 'the old one' SUPERUSER""")
    url = urlsplit(running.environment["CREDITS_CONTROL_DATABASE_URL"])
    place = f"{url.hostname}:{url.port}"
    old, new = (url._replace(netloc=f"{role}:the%20{which}%20one@{place}").geturl() for which in ("old", "new"))

    token = (await script.run("credits tokens create admin")).strip()
    token_id = token.split("_")[1]
    assert token_id in await script.run("credits tokens list")
    script.put({"0123456789ab": token_id})
    await script.run("credits tokens revoke")
    await script.run("psql", CREDITS_CONTROL_DATABASE_URL=old)
    assert acme.id in await script.run("credits merchants list", CREDITS_CONTROL_DATABASE_URL=new)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(old)
    assert await script.run("curl", CREDITS_TOKEN=token) == "401\n"
    await server.execute(f'DROP ROLE "{role}"')


@follows("docs/operations/restore.md")
async def test_a_lost_database_is_restored(script: Script, acme: Merchant, server: asyncpg.Connection) -> None:
    script.about(acme.id)
    control = name("control")
    script.put({"credits_control": control})
    await acme.buy("ann")

    await script.run("credits backup acme")
    await script.run("credits backup control")
    bought = [(await acme.buy(user))[1] for user in ("ann", "ben")]
    await server.execute(f'DROP DATABASE "{database(acme.id)}" WITH (FORCE)')
    lost = urlsplit(script.environment["CREDITS_CONTROL_DATABASE_URL"])._replace(path=f"/{control}").geturl()
    for begin in ("psql", "pg_restore"):
        await script.run(begin, CREDITS_CONTROL_DATABASE_URL=lost)
    assert database(acme.id) in await script.run("credits migrate", code=1, CREDITS_CONTROL_DATABASE_URL=lost)
    assert acme.id in await script.run("credits merchants list", CREDITS_CONTROL_DATABASE_URL=lost)
    await script.run("credits send acme Merchant.Suspend")
    refused = await acme.bus.control("Merchant.Resume", {"merchant_id": acme.id})
    assert refused["error"]["message"] == "the merchant's database is lost, restore it first"
    assert "2 documents" in await script.run("credits restore acme")
    await script.run("credits send acme Merchant.Resume")
    await script.run("credits verify acme")
    assert re.search(rf"{acme.id} +active +0 ", await script.run("credits status"))
    assert (await acme.buy("ann"))[1]["balance"] == bought[0]["balance"] + 100
    await server.execute(f'DROP DATABASE "{control}"')


@follows("docs/operations/chain-broken.md")
async def test_books_that_were_changed_behind_the_services_back_are_put_right(
    script: Script, acme: Merchant, running: Running, tmp_path: Path
) -> None:
    script.about(acme.id)
    await acme.buy("ann")
    await acme.use("ann", "30")
    # The backup of every night.
    await script.shell(f"credits backup {acme.id} --out {acme.id}.dump")
    vandal = await asyncpg.connect(running.services.database_url(database(acme.id)))
    await vandal.execute("SET session_replication_role = replica")
    await vandal.execute("UPDATE entries SET note = 'nothing happened' WHERE user_seq = 1")
    await vandal.close()

    assert "the hash chain of every account" in await script.run("credits verify acme", code=1)
    await script.run("credits send acme Merchant.Suspend")
    await script.run("credits backup acme")
    assert (tmp_path / "evidence.dump").stat().st_size
    assert "credits" in await script.run("psql")
    assert "kept as" in await script.run("credits restore acme")
    await script.run("credits send acme Merchant.Resume")
    await script.run("credits verify acme")
    await acme.use("ann", "30")


@follows("docs/operations/upgrade.md")
async def test_all_databases_are_brought_to_the_newest_schema(
    script: Script, running: Running, server: asyncpg.Connection
) -> None:
    control = running.services.database_url(name("control"))
    script.environment["CREDITS_CONTROL_DATABASE_URL"] = control
    # Databases that are behind, and workers of two versions, are in test_upgrade.py.
    await script.shell("credits migrate")
    acme = name("acme")
    script.about(acme)
    await builders.merchant(control, acme)

    await script.run("credits backup control")
    await script.run("credits backup acme")
    for begin in ("credits migrate --check", "credits migrate", "credits migrate --check"):
        assert "3 of 3 databases" in await script.run(begin)
    await script.run("credits verify --all")


@follows("docs/operations/lag.md")
async def test_no_worker_runs_and_one_is_started(script: Script, acme: Merchant, running: Running) -> None:
    script.about(acme.id)
    port = str(free_port())
    script.environment |= {"CREDITS_WEB_BIND": "127.0.0.1", "CREDITS_WEB_PORT": port}
    script.environment["CREDITS_URL"] = f"http://127.0.0.1:{port}"
    try:
        for worker in ("worker-1", "worker-2"):
            assert await asyncio.to_thread(running.stack.stop_worker, worker)
        grant = {"user_id": "ann", "grant_id": "g", "credits": 5, "access_period_days": 9}
        waiting = await acme.send("Grant.Apply", grant)

        await script.run_until("credits status --watch", rf"(?s)no worker.*{acme.id} +active +1 ")
        async with script.meanwhile("credits worker"):
            assert (await acme.bus.results(waiting))[0].body["outcome"] == "applied"
            assert "credits_batch_records_count" in await script.run("curl")
            assert re.search(rf"(?s)1 workers.*{acme.id} +active +0 ", await script.run("credits status"))
            await script.run("credits verify acme")
    finally:
        for worker in ("worker-1", "worker-2"):
            await asyncio.to_thread(running.start, worker)


@pytest.fixture
def disk(scratch: Path, services: Services) -> Iterator[Path]:
    """Mount a small disk in memory where the server sees it."""
    if not (is_root() and (scratch / "services").exists()):
        pytest.skip("mounting a small disk for PostgreSQL needs root, and the embedded server")
    disk = scratch / "small"
    disk.mkdir()
    options = f"size={SMALL_DISK},mode=0700,uid={SYSTEM_USER},gid={SYSTEM_USER}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "credits-runbook", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small disk failed: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
async def small(disk: Path, server: asyncpg.Connection) -> AsyncIterator[Path]:
    """Return a small disk with the tablespace `small` on it."""
    await server.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
    yield disk
    await server.execute("DROP TABLESPACE small")


async def move(server: asyncpg.Connection, name: str, tablespace: str) -> None:
    """Move a database to another disk; nobody must be in it meanwhile."""
    await close(server, name)
    await server.execute(f'ALTER DATABASE "{name}" SET TABLESPACE {tablespace}')
    await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@follows("docs/operations/disk-full.md")
async def test_a_disk_is_full(script: Script, acme: Merchant, server: asyncpg.Connection, small: Path) -> None:
    script.about(acme.id)
    kept = f"{database(acme.id)}_lost_20260101_120000"
    script.put({"credits_m_acme_lost_20260101_120000": kept})
    await server.execute(f'CREATE DATABASE "{kept}" TEMPLATE template0 TABLESPACE small')
    await move(server, database(acme.id), "small")
    with (small / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    grants = [
        {"user_id": f"user-{number}", "grant_id": f"g-{number}", "credits": 5, "access_period_days": 9}
        for number in range(GRANTS)
    ]
    sent = [await acme.send("Grant.Apply", grant) for grant in grants]

    assert re.search(rf"{acme.id} +active +[1-9]", await script.run("credits status"))
    assert not all(acme.bus.heard(one) for one in sent)
    assert kept in await script.run("psql")
    await script.run("psql")
    assert [(await acme.bus.results(one))[0].body["outcome"] for one in sent] == ["applied"] * GRANTS
    assert re.search(rf"{acme.id} +active +0 ", await script.run("credits status"))
    await script.run("credits verify acme")
    await move(server, database(acme.id), "pg_default")


# The other documents


@follows("docs/operations/README.md")
async def test_an_operator_looks_first(script: Script, acme: Merchant) -> None:
    # As many lines as there may be merchants: a screen shows no more than it has room for.
    await script.run_until("credits status --watch", rf"{acme.id} +active", LINES="1000")
    assert "PAYLOAD" in (await script.run("credits send --help")).upper()


@follows("docs/control-app.md")
async def test_the_control_app_finds_refused_orders(script: Script, acme: Merchant) -> None:
    script.put({"<m>": acme.id})
    await acme.refused("price_mismatch", "Purchase.Settled", acme.purchase("ann", amount="9.00"))

    assert len(json.loads(await script.get())["items"]) == 1


@follows("docs/receipts-consumer.md")
async def test_a_consumer_of_receipts_reads_and_exports_them(script: Script, acme: Merchant) -> None:
    script.about(acme.id)
    _, bought = await acme.buy("ann")
    number = bought["effects"]["receipt_number"]
    script.put({"<m>": acme.id, "<number>": number, "2026-01-01": acme.now(-86_400)[:10]})
    script.put({"2026-01-31": acme.now(86_400)[:10]})

    assert "<html" in await script.get("text/html")
    assert json.loads(await script.get("application/json"))["status"] == "paid"
    assert "1 documents" in await script.run("credits receipts export acme")


@follows("README.md")
async def test_the_first_credits_of_the_readme_are_granted_spent_and_traced(
    script: Script, bus: Bus, tmp_path: Path
) -> None:
    text = (ROOT / "README.md").read_text()
    # One merchant's: others may be in the middle of something.
    script.put({"--all": (await bus.register()).id})
    for _ in range(2):
        assert "every identity holds" in await script.run("credits verify --all")
    acme = Merchant(bus, name("acme"), {}, 4)
    script.about(acme.id)
    (tmp_path / "docs/examples").mkdir(parents=True)
    (tmp_path / "docs/examples/merchant.json").write_bytes((ROOT / "docs/examples/merchant.json").read_bytes())
    await script.run("credits merchants create acme")
    await script.run("credits send acme OperationType.CreateWithArchival")
    await script.run("credits send acme Grant.Apply")
    await acme.watch()

    (value,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    told, _, _ = text.partition("```json")
    headers = dict(re.findall(r"`(ce_\w+|content-type)(?:: ([^`]+))?`", told))
    assert headers.keys() == {"ce_specversion", "ce_id", "ce_source", "ce_type", "content-type"}
    (topic,) = re.findall(r"topic `credits\.<merchant>\.(\w+)`", told)
    given = {header: text for header, text in headers.items() if text}
    sent = await acme.bus.send(
        acme.topic(topic), headers["ce_type"], value, key="ann", headers={"ce_time": None} | given
    )

    assert (await acme.bus.results(sent))[0].body["outcome"] == "applied"
    # The same operation, opened before by the application.
    again = json.loads(await script.run("credits send acme Operation.Open"))
    assert again["replay_of"]["command_id"] == sent.id
    await script.run("credits send acme Operation.RecordAndClose")
    told = json.loads(await script.run("curl"))
    assert (told["balance"], [lot["remaining"] for lot in told["lots"]]) == (498, [498])
    assert "every identity holds" in await script.run("credits verify acme")


@follows("docs/contributing.md")
async def test_a_contributor_makes_the_avro_schemas(script: Script) -> None:
    folder = ROOT / "schemas/avro"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    await script.run("python -m schemas.generate")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@follows("docs/queries.md")
async def test_a_contributor_makes_the_contracts(script: Script) -> None:
    before = [(ROOT / "docs" / file).read_bytes() for file in ("openapi.json", "asyncapi.json")]
    await script.run("python -m workers.web")
    assert [(ROOT / "docs" / file).read_bytes() for file in ("openapi.json", "asyncapi.json")] == before


def test_every_document_with_commands_is_run() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert {str(page.relative_to(ROOT)) for page in pages if commands(str(page.relative_to(ROOT)))} == SCRIPTED
