"""A real Prometheus scrapes real workers, and is asked what the dashboard and the alerts ask."""

import asyncio
import json
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml  # type: ignore[import-untyped]

from console.processes import free_port, tail
from console.tokens import create
from tests.e2e.blackbox import Bus, Merchant, name
from tests.e2e.conftest import Running

DEPLOY = Path(__file__).parents[2] / "deploy"
SECONDS_MAX = 90
# What happens to nobody while all is well: there is nothing to be seen then.
SILENT = {"NoWorker"}

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus is installed here")


class Prometheus:
    """A running Prometheus; raises what it answers an error to."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API."""
        async with self._session.get(f"{self._url}/api/v1/{path}", params=parameters) as response:
            answer = await response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    async def values(self, expression: str) -> list[float]:
        """Return the values of all samples that an expression has now, but those that are no numbers."""
        found = [float(sample["value"][1]) for sample in (await self.get("query", query=expression))["result"]]
        return [value for value in found if not math.isnan(value)]

    async def up(self) -> list[str]:
        """Return the targets that are up."""
        targets = (await self.get("targets"))["activeTargets"]
        return [target["scrapeUrl"] for target in targets if target["health"] == "up"]


def adapted(running: Running, folder: Path, token: str) -> Path:
    """Write the configuration of the deployment with the files and workers of this test."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    (scrape,) = config["scrape_configs"]
    scrape["authorization"]["credentials_file"] = str(folder / "token")
    (folder / "token").write_text(token)
    del scrape["dns_sd_configs"]
    workers = [line.address for line in running.stack.status() if line.name.startswith("worker")]
    scrape["static_configs"] = [{"targets": [address.removeprefix("http://") for address in workers]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest_asyncio.fixture(loop_scope="session")
async def prometheus(running: Running, tmp_path: Path) -> AsyncIterator[Prometheus]:
    token = await create(running.environment["CREDITS_CONTROL_DATABASE_URL"], "metrics", None, None, None)
    config, port, log = adapted(running, tmp_path, token), free_port(), tmp_path / "prometheus.log"
    options = f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *("prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"), stdout=out, stderr=out
        )
    try:
        async with aiohttp.ClientSession() as session:
            await _ready(session, f"http://127.0.0.1:{port}", process, log)
            yield Prometheus(session, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        await process.wait()


async def _ready(session: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            assert process.returncode is None, tail(log)
            try:
                async with session.get(f"{url}/-/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


def dashboard(merchant: str) -> dict[str, str]:
    """Return what the panels ask, of one merchant; a zero in place of no answer is left out."""
    found = {}
    for panel in json.loads((DEPLOY / "grafana/credits.json").read_text())["panels"]:
        for target in panel["targets"]:
            asked = target["expr"].replace("$merchant", merchant).replace("$__rate_interval", "15s")
            assert "$" not in asked
            found[f"{panel['title']}, {target['refId']}"] = asked.removesuffix(" or vector(0)")
    return found


def alerts() -> dict[str, str]:
    """Return what the alerts ask; where they compare, the comparison's outcome is asked for, so that it has samples."""
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    rules = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    return {alert: re.sub(r" > (?=[\d.])", " > bool ", asked) for alert, asked in rules.items()}


async def trouble(shop: Merchant, user: str) -> None:
    """Cause one of everything that is counted."""
    sent = await shop.send("Purchase.Settled", shop.purchase(user))
    await shop.bus.results(sent)
    again = {"id": sent.id, "source": sent.source, "key": user}
    await shop.bus.send(sent.topic, "Purchase.Settled", sent.value, **again)
    await shop.send("Purchase.Settled", shop.purchase(user), **again)
    await shop.bus.results(sent, 3)
    await shop.open(user)
    await shop.refused(
        "operation_already_open", "Operation.Open", user_id=user, operation_id=name(), operation_code="llm"
    )
    await shop.refused("unknown_product", "Purchase.Settled", shop.purchase(user, product="nothing"))
    await shop.send("Refund.Apply", {"refund_id": name(), "external_ref": name()})
    await shop.dead_letter(await shop.bus.send(shop.topic("operations"), "Operation.Open", b"{", key=user))


async def test_prometheus_answers_all_that_dashboard_and_alerts_ask(
    bus: Bus, prometheus: Prometheus, running: Running
) -> None:
    shop = await bus.register()
    await shop.stock()
    asked = dashboard(shop.id) | alerts()
    silent = {alert: asked.pop(alert) for alert in SILENT}
    missing = set(asked)
    async with asyncio.timeout(SECONDS_MAX):
        while missing:
            await trouble(shop, name("u"))
            missing = {what for what in missing if not await prometheus.values(asked[what])}

    assert [what for what, expression in silent.items() if await prometheus.values(expression)] == []
    assert len(await prometheus.up()) == 2
    assert await prometheus.values("sum(credits_worker_ready)") == [2]
    assert await prometheus.values(asked["Invariant violations (must be 0), A"]) == [0]
    merchants = await prometheus.get("label/merchant/values", **{"match[]": "credits_commands_total"})
    assert shop.id in merchants
    suspended = f'credits_merchant_suspended{{merchant="{shop.id}"}}'
    assert await prometheus.values(suspended) == [0, 0]
    await bus.control("Merchant.Suspend", {"merchant_id": shop.id})
    async with asyncio.timeout(SECONDS_MAX):
        while await prometheus.values(suspended) != [1, 1]:
            await asyncio.sleep(0.5)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool is installed here")
def test_prometheus_own_checker_has_nothing_to_say(running: Running, tmp_path: Path) -> None:
    for arguments in (
        ("rules", DEPLOY / "alerts.yml"),
        ("config", "--syntax-only", DEPLOY / "prometheus.yml"),
        ("config", adapted(running, tmp_path, "a token")),
    ):
        done = subprocess.run(["promtool", "check", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout + done.stderr


def histogram(merchant: str, fast: str, all_of_them: str) -> list[dict[str, str]]:
    """Return series of a merchant's commands: those within a second, and all."""
    return [
        {"series": f'credits_end_to_end_seconds_bucket{{merchant="{merchant}", le="1.0"}}', "values": fast},
        {"series": f'credits_end_to_end_seconds_count{{merchant="{merchant}"}}', "values": all_of_them},
    ]


def firing(alert: str, minute: int, *merchants: str | None) -> dict[str, Any]:
    """Return what promtool shall find firing: for merchants, or for all together."""
    rule = next(
        rule
        for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == alert
    )
    expected = []
    for merchant in merchants:
        texts = {
            name: text.replace("{{ $labels.merchant }}", str(merchant)) for name, text in rule["annotations"].items()
        }
        labels = rule["labels"] | ({"merchant": merchant} if merchant else {})
        expected.append({"exp_labels": labels, "exp_annotations": texts})
    return {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool is installed here")
def test_suspended_merchants_and_registrations_alert_nobody(tmp_path: Path) -> None:
    suspended = [
        {"series": 'credits_merchant_suspended{merchant="paused", instance="a"}', "values": "1x60 0x60"},
        {"series": 'credits_merchant_suspended{merchant="busy", instance="a"}', "values": "0x120"},
    ]
    for_two = [
        {"series": f'{name}{{merchant="{merchant}"}}', "values": values}
        for merchant in ("paused", "busy")
        for name, values in (("credits_consumer_lag", "0+100x120"), ("credits_overdue_operations", "3x120"))
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": suspended + for_two,
            "alert_rule_test": [
                firing("LagGrows", 45, "busy"),
                firing("OperationsOverdue", 45, "busy"),
                firing("LagGrows", 90, "busy", "paused"),
                firing("OperationsOverdue", 90, "busy", "paused"),
            ],
        },
        {
            "interval": "1m",
            "input_series": [
                *suspended,
                *histogram("busy", "0+100x120", "0+100x120"),
                # All that waited is answered in the minutes after the merchant was resumed.
                *histogram("paused", "0x120", "0x60 0+500x9 4500x49"),
                *histogram("control", "0x120", "0+9x120"),
            ],
            "alert_rule_test": [firing("SlowCommands", minute) for minute in (30, 65, 75, 110)],
        },
        {
            "interval": "1m",
            "input_series": [*suspended, *histogram("busy", "0+90x120", "0+100x120")],
            "alert_rule_test": [firing("SlowCommands", 90, None)],
        },
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
