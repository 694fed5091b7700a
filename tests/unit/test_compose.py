"""`docker-compose.yml` and `Dockerfile`: what can be told of them without an engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])


def test_the_services_are_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "kafka", "migrate", "worker", "prometheus", "grafana"}


def test_monitoring_is_there_for_who_asks_for_it(services: dict[str, Any]) -> None:
    configs = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["configs"]

    assert [name for name, service in services.items() if service.get("profiles")] == ["prometheus", "grafana"]
    files = [config["file"] for config in configs.values() if "file" in config]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    wanted = {entry["source"] for name in ("prometheus", "grafana") for entry in services[name]["configs"]}
    assert wanted == set(configs)


def test_ports_are_published_on_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_the_worker_waits_for_the_servers_and_the_migration(services: dict[str, Any]) -> None:
    conditions = {name: need["condition"] for name, need in services["worker"]["depends_on"].items()}

    assert conditions == {
        "migrate": "service_completed_successfully",
        "postgres": "service_healthy",
        "kafka": "service_healthy",
    }
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert all("healthcheck" in services[name] for name in ("postgres", "kafka", "worker"))


def test_the_worker_is_told_all_it_needs(services: dict[str, Any]) -> None:
    environment = services["worker"]["environment"]

    assert set(environment) == {
        "KAFKA_BOOTSTRAP_SERVERS",
        "CREDITS_CONTROL_DATABASE_URL",
        "CREDITS_BOOTSTRAP_TOKEN",
        "CREDITS_WEB_BIND",
        "CREDITS_WEB_PORT",
    }


def test_no_secret_has_a_default(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "TOKEN" in name or "DATABASE_URL" in name:
                assert ":?" in value, name


def test_records_get_the_time_of_their_arrival(services: dict[str, Any]) -> None:
    environment = services["kafka"]["environment"]

    assert environment["KAFKA_LOG_MESSAGE_TIMESTAMP_TYPE"] == "LogAppendTime"
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_data_are_in_volumes(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"]

    mounted = {
        volume.split(":")[0] for name in ("postgres", "kafka", "prometheus") for volume in services[name]["volumes"]
    }
    assert mounted == set(volumes)


def test_the_image_runs_as_nobody_in_particular_and_holds_every_package() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "bench")]

    assert "USER 10001" in lines
    assert [name for name in packages if f"COPY {name}/ {name}/" not in lines] == []


def test_the_image_gets_the_versions_that_were_tested() -> None:
    tested, shipped = (_versions(ROOT / f"requirements{name}.lock") for name in ("", "-runtime"))

    assert {name: tested.get(name) for name in shipped} == shipped


def _versions(lock: Path) -> dict[str, str]:
    pins = [line.split()[0].split("==") for line in lock.read_text().splitlines() if re.match(r"[a-z0-9]", line)]
    return dict(pins)
