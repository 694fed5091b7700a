"""The documentation is true: its commands exist, its links lead somewhere, its rules are what the code does."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]

from console.main import app
from ledger.model import Operation
from receipts.tax import included_tax
from schemas.errors import REGISTRY
from schemas.payloads import COMMANDS
from schemas.topics import ALLOWED
from tests.core import Core
from workers.decide import PARKED_FOR, PARKED_FOR_MONEY
from workers.metrics import _GAUGES, Metrics
from workers.settings import _VARIABLES, WorkerSettings
from workers.web.endpoints import ENDPOINTS
from workers.web.settings import WebSettings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
DOMAIN = DOCS / "domain"
# The overview's document map.
MAP = (
    "01_product_pricing_spec.md",
    "02_purchases_and_payments_boundary.md",
    "03_ledger_and_balance_invariants.md",
    "04_operation_type_catalog.md",
    "05_receipts_and_tax.md",
    "06_security_privacy_ops.md",
    "07_domain_command_catalog.md",
    "08_queries_and_shapes.md",
    "09_idempotency_requirements.md",
)
TEXTS = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]


def rows(document: str, header: str) -> list[list[str]]:
    """Return the cells of the table under a header line, without backticks."""
    _, _, rest = (DOMAIN / document).read_text().partition(header + "\n")
    assert rest, (document, header)
    found = []
    for line in rest.splitlines()[1:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return found


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield (document, words) of each `credits …` in the documents."""
    for text in TEXTS:
        for line in re.findall(r"^credits (.+)$|`credits ([a-z][^`]*)`", text.read_text(), re.MULTILINE):
            yield names(text), next(filter(None, line)).partition("#")[0].split()


@pytest.mark.parametrize(
    ("document", "words"), [*commands()], ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_every_command_of_the_documents_exists_with_its_options(document: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not getattr(command, "commands", {}), f"{document}: {words} is no command"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_make_target_exists(text: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text.read_text(), re.MULTILINE)) <= targets


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_link_and_path_leads_somewhere(text: Path) -> None:
    body = text.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", body) if not link.startswith("http")]
    assert [link for link in links if link and not (text.parent / link).exists()] == []
    paths = re.findall(r"`((?:docs|deploy|tests|schemas|workers|ledger|migrations|console)/[\w./-]+)`", body)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_domain_documents_are_those_of_the_overview() -> None:
    assert tuple(sorted(path.name for path in DOMAIN.glob("*.md"))) == MAP


def test_the_command_catalogue_is_the_codes_own() -> None:
    told = {(name, channel, user) for name, channel, user in rows(MAP[6], "| type | channel | names a user |")}

    assert told == {
        (name, channel, "yes" if COMMANDS[name].user_field else "no")
        for channel in ALLOWED
        for name in ALLOWED[channel]
    }


def test_the_codes_stand_in_their_order_of_precedence() -> None:
    told = [(code, meaning) for code, meaning in rows(MAP[8], "| code | meaning |")]

    assert told == [
        (str(code), REGISTRY[code].meaning) for code in sorted(REGISTRY, key=lambda code: REGISTRY[code].rank)
    ]


def test_the_queries_are_those_that_are_served() -> None:
    told = dict(rows(MAP[7], "| path | roles |"))

    assert told == {endpoint.path: ", ".join(sorted(endpoint.roles)) for endpoint in ENDPOINTS}


def test_the_worked_example_of_the_ledger_comes_out_as_told() -> None:
    core = Core()
    admin = {"actor": "ops", "justification": "the documents"}

    def adjust(delta: int, key: str, days: int = 30) -> None:
        more = {"access_period_days": days} if delta > 0 else {}
        core.applied("Adjustment.Apply", adjustment_id=key, user_id="ann", credits_delta=delta, **more, **admin)

    def figures() -> list[str]:
        return [str(figure) for figure in core.figures("ann")]

    told = [[balance, debt] for _, balance, debt in rows(MAP[2], "| step | balance | debt |")]
    adjust(10, "A", 90)
    adjust(100, "B", 90)
    found = [figures()]
    for step in ((-50, "x"), (-80, "y"), (100, "C")):
        adjust(*step)
        found.append(figures())
    core.wait(days=31)
    core.do("Operation.Open", user_id="ann", operation_id="o", operation_code="none")
    found.append(figures())

    assert found == told


@pytest.mark.parametrize(
    "row", rows(MAP[3], "| resource_amount | credits_per_unit | minimum_charge | credits |"), ids=str
)
def test_operations_cost_what_the_table_says(row: list[str]) -> None:
    amount, rate, minimum, credits = row

    operation: Any = SimpleNamespace(credits_per_unit=Decimal(rate), minimum_charge=int(minimum))
    assert Operation.charge(operation, Decimal(amount)) == int(credits)


@pytest.mark.parametrize("row", rows(MAP[4], "| gross | rate | tax | net |"), ids=str)
def test_tax_is_what_the_table_says(row: list[str]) -> None:
    gross, rate, tax, net = map(Decimal, row)

    assert included_tax(gross, rate, "EUR") == tax
    assert gross - tax == net


def test_parking_lasts_as_long_as_told() -> None:
    assert "After 15 minutes (refunds and\n   chargebacks: 7 days)" in (DOMAIN / MAP[8]).read_text()
    assert PARKED_FOR["operation"] == timedelta(minutes=15)
    assert timedelta(days=7) == PARKED_FOR_MONEY


@pytest.mark.parametrize("example", sorted((DOCS / "examples").glob("*.py")), ids=names)
def test_the_examples_compile(example: Path) -> None:
    subprocess.run([sys.executable, "-m", "py_compile", example], check=True, capture_output=True)


# Deployment


@pytest.mark.parametrize("file", sorted((ROOT / "deploy").rglob("*.yml")), ids=names)
def test_every_manifest_parses_and_names_a_kind(file: Path) -> None:
    documents = list(yaml.safe_load_all(file.read_text()))

    assert documents
    if file.parent.name == "kubernetes":
        assert all(
            document["apiVersion"] and document["kind"] and document["metadata"]["name"] for document in documents
        )


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((ROOT / "deploy/grafana/credits.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    state: Any = SimpleNamespace(ready=False, assigned={}, lag={}, counters=SimpleNamespace())
    metrics = Metrics(lambda: state, dict, {})
    families = {family.name: family.type for family in metrics.collect()}
    samples = set()
    for name, kind in families.items():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
        samples |= {name + suffix for suffix in suffixes}
    asked = {name for expression in expressions() for name in re.findall(r"\bcredits_\w+", expression)}

    assert asked - samples == set()
    assert {f"credits_{gauge}" for gauge in _GAUGES} <= samples


def test_every_alert_has_a_runbook() -> None:
    for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert (ROOT / rule["annotations"]["runbook"]).is_file(), rule["alert"]
    index = (DOCS / "operations/README.md").read_text()
    pages = {path.name for path in (DOCS / "operations").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\(([\w-]+\.md)\)", index))


def test_the_table_of_settings_has_all_variables_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (DOCS / "operations/settings.md").read_text(), re.MULTILINE)
    bare = {variable: getattr(WorkerSettings, name, None) for name, variable in _VARIABLES.items()}
    web = re.findall(r'"(CREDITS_\w+)"', (ROOT / "workers/web/settings.py").read_text())
    bare |= dict.fromkeys(web) | {"CREDITS_WEB_RATE": WebSettings.rate, "CREDITS_WEB_BURST": WebSettings.burst}

    told = {variable: text.strip("` ") for variable, text in rows}
    assert {variable for variable, text in told.items() if text == "needed"} == {
        "KAFKA_BOOTSTRAP_SERVERS",
        "CREDITS_CONTROL_DATABASE_URL",
    }
    assert {name: "" if text == "needed" else text for name, text in told.items()} == {
        variable: "" if default is None else str(default) for variable, default in bare.items()
    }
