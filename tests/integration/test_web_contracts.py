"""The contracts: generated from the code, current, and every example in them tried on a real merchant."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

import schemas.asyncapi
from schemas import examples
from schemas.envelope import DecodeContext, Incoming, decode
from schemas.payloads import COMMANDS
from tests import builders
from tests.integration import contract
from tests.integration.web import ROOT_TOKEN, Shop, open_shop
from tests.services import Services
from workers.web import openapi
from workers.web.endpoints import ENDPOINTS

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell"))), None
)


@pytest.fixture(scope="module")
async def shop(services: Services) -> AsyncIterator[Shop]:
    async with open_shop(services, examples.MERCHANT, **examples.CONFIG) as shop:
        yield shop


@pytest.fixture(scope="module")
async def results(shop: Shop) -> list[dict[str, Any]]:
    return await contract.tell(shop.clerk)


def test_the_documents_in_the_repository_are_current() -> None:
    for path, text in openapi.texts().items():
        assert path.read_text("utf-8") == text, "run `python -m workers.web`"


def test_the_openapi_document_is_valid() -> None:
    validate(openapi.document())


def test_every_message_and_every_endpoint_has_an_example() -> None:
    messages = openapi.asyncapi()["components"]["messages"]
    assert [name for name, message in messages.items() if not message.get("examples")] == []
    assert set(openapi.recorded()["answers"]) == {endpoint.name for endpoint in ENDPOINTS}


# Examples


async def test_every_command_of_the_contract_is_taken_as_it_stands(results: list[dict[str, Any]]) -> None:
    for result, (command_type, payload) in zip(results, examples.story(), strict=True):
        expected = next((code for text, code in contract.NOT_APPLIED.items() if text in payload.values()), None)
        if command_type == "Operation.Open":
            expected = None
        if command_type == "Command.Resolve":
            expected = "not_due"
        assert result["command_type"] == command_type
        assert result.get("error", {}).get("code") == expected, result
    told = {step for step, _ in (*examples.story(), *examples.control())}
    assert told == set(COMMANDS)


def test_every_command_of_the_control_plane_is_readable() -> None:
    for command_type, payload in examples.control():
        context = DecodeContext(None, "control", bytes(32), {}, Decimal(10**9))
        incoming = decode(builders.command(command_type, payload), context)
        assert isinstance(incoming, Incoming)
        assert incoming.error is None


async def test_every_answer_of_the_contract_is_what_the_service_answers(
    shop: Shop, results: list[dict[str, Any]]
) -> None:
    recorded = openapi.recorded()
    answers = await contract.answers(shop.api)
    for name, example in answers.items():
        assert contract.stable(recorded["answers"][name]) == contract.stable(example), name
    outputs = await contract.outputs(shop.clerk, results)
    assert contract.stable(recorded["outputs"]) == contract.stable(outputs)


async def test_every_answer_has_the_members_its_schema_names_and_no_others(
    shop: Shop, results: list[dict[str, Any]]
) -> None:
    assert results
    document = closed(openapi.document())
    for name, example in (await contract.answers(shop.api)).items():
        operation = next(m["get"] for m in document["paths"].values() if m["get"]["operationId"] == name)
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator(schema | {"components": document["components"]}).validate(example["answer"])


async def test_messages_fit_the_schemas_of_the_topics(results: list[dict[str, Any]]) -> None:
    document = openapi.asyncapi()
    components = {"components": closed(document)["components"]}

    def check(name: str, payload: Any) -> None:
        schema = document["components"]["messages"][name]["payload"]
        jsonschema.Draft202012Validator(schema | components).validate(payload)

    for name, message in document["components"]["messages"].items():
        for example in message["examples"]:
            check(name, example["payload"])
    for result in results:
        check(schemas.asyncapi.RESULT, result)


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document whose objects allow no members but those they name."""

    def close(value: Any) -> None:
        if isinstance(value, dict):
            if "properties" in value and value.get("type") == "object":
                value["additionalProperties"] = False
            for member in value.values():
                close(member)
        elif isinstance(value, list):
            for member in value:
                close(member)

    document = deepcopy(document)
    close(document)
    return document


def test_references_of_the_asyncapi_document_lead_somewhere() -> None:
    document = openapi.asyncapi()

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                found: Any = document
                for part in value["$ref"].removeprefix("#/").split("/"):
                    found = found[part]
            for member in value.values():
                check(member)
        elif isinstance(value, list):
            for member in value:
                check(member)

    check(document)
    for channel in document["channels"].values():
        assert set(channel.get("parameters", {})) == {part.split("}")[0] for part in channel["address"].split("{")[1:]}


# The page


async def test_the_page_names_every_query_command_and_error_and_needs_nothing_else(shop: Shop) -> None:
    _, body, headers = await shop.api.holding(None).ask("/docs")
    text = body.decode()
    assert headers["Content-Type"].startswith("text/html")
    for path in openapi.document()["paths"]:
        assert f"GET {path}<" in text
    for name in COMMANDS:
        assert f'id="{name}"' in text
    assert 'id="error-unknown_user"' in text
    assert "src=" not in text
    assert "http://" not in text
    assert "<script" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
async def test_the_page_opens_in_a_browser(shop: Shop, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    url = str(shop.api.client.make_url("/docs"))
    done = await asyncio.to_thread(subprocess.run, [*command, url], capture_output=True, timeout=60, check=True)
    text = done.stdout.decode()
    assert "getBalance" in text
    assert "error-rate_limited" in text


# Fuzzing


async def test_schemathesis_finds_no_failure(shop: Shop, results: list[dict[str, Any]], tmp_path: Path) -> None:
    assert results
    base = str(shop.api.client.make_url("")).rstrip("/")
    program = Path(sys.executable).with_name("schemathesis")
    # A schema can't say that a cursor is not made up, and that as_of excludes as_of_seq: such requests look valid.
    options = ["--exclude-checks=positive_data_acceptance", "--phases=examples,coverage,fuzzing"]
    options += ["--max-examples=5", "--seed=1", "--generation-database=none", "--generation-codec=ascii", "--no-color"]
    process = await asyncio.create_subprocess_exec(
        program,
        "run",
        f"{base}/openapi.json",
        *options,
        "--header",
        f"Authorization: Bearer {ROOT_TOKEN}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()[-30000:]
