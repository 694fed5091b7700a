"""Messages that were valid once stay valid, and keep their fingerprints: these are stored for ever."""

import json

import pytest

from schemas.avro_schema import all_schemas
from schemas.codec import SCHEMAS
from schemas.envelope import Encoding
from schemas.generate import DIRECTORY, files
from schemas.payloads import COMMANDS
from tests.unit.test_schemas_messages import (
    CORPUS,
    TYPES,
    Record,
    as_avro,
    as_json,
    as_structured_avro,
    as_structured_json,
    envelope,
    read,
    sample,
)

EXPECTED = json.loads((CORPUS / "expected" / "fingerprints.json").read_text("utf-8"))


def test_the_corpus_has_one_message_of_every_command() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_file()} == {
        f"{name}.{encoding}" for name in COMMANDS for encoding in ("json", "avro")
    }


@pytest.mark.parametrize("name", TYPES)
def test_every_json_message_of_the_corpus_is_read_with_the_fingerprint_it_had(name: str) -> None:
    record = Record((CORPUS / f"{name}.json").read_bytes(), envelope(name))

    incoming = read(record, name)

    assert incoming.error is None
    assert incoming.encoding is Encoding.JSON
    assert incoming.fingerprint.hex() == EXPECTED[name]["fingerprint"]
    assert incoming.digests.hex() == EXPECTED[name]["digests"]
    assert (incoming.business_key and incoming.business_key.hex()) == EXPECTED[name]["business_key"]


@pytest.mark.parametrize("name", TYPES)
def test_every_avro_message_of_the_corpus_is_read_with_the_same_fingerprint(name: str) -> None:
    record = Record((CORPUS / f"{name}.avro").read_bytes(), envelope(name, "application/avro"))

    incoming = read(record, name)

    assert incoming.error is None
    assert incoming.encoding is Encoding.AVRO
    assert incoming.fingerprint.hex() == EXPECTED[name]["fingerprint"]


@pytest.mark.parametrize("name", TYPES)
def test_a_command_is_the_same_in_every_mode_and_encoding(name: str) -> None:
    payload = sample(name)
    builders = (as_json, as_avro, as_structured_json, as_structured_avro)

    answers = [read(build(name, payload), name) for build in builders]

    assert [answer.error for answer in answers] == [None] * 4
    assert len({(answer.fingerprint, answer.digests, answer.business_key, answer.identity) for answer in answers}) == 1
    assert all(answer.payload == answers[0].payload for answer in answers)
    assert [answer.encoding for answer in answers] == [Encoding.JSON, Encoding.AVRO, Encoding.JSON, Encoding.AVRO]


def test_the_schema_files_are_what_the_models_say() -> None:
    for path, text in files().items():
        assert path.read_text("utf-8") == text, f"run python -m schemas.generate: {path.name}"
    assert {path.name.removesuffix(".avsc") for path in DIRECTORY.glob("*.avsc") if "@" not in path.name} == set(
        all_schemas()
    )


def test_every_schema_is_loaded_under_its_own_fingerprint() -> None:
    assert set(SCHEMAS) == set(all_schemas())
    assert len({schema.header for schema in SCHEMAS.values()}) == len(SCHEMAS)
