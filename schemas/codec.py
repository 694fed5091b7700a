"""Values on the wire: JSON, and Avro single-object encoding with the schemas of `schemas/avro`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from importlib.resources import files
from io import BytesIO
from types import MappingProxyType
from typing import Any

import fastavro
from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form

from schemas.canonical import canonical_json, compact_json, format_decimal, format_time, wire_value
from schemas.effects import EFFECTS
from schemas.wire_types import parse_time

__all__ = [
    "AVRO_MAGIC",
    "SCHEMAS",
    "Encoding",
    "canonical_json",
    "decode_avro",
    "decode_result",
    "encode_avro",
    "encode_result",
    "encode_value",
    "format_decimal",
    "format_time",
    "parse_time",
]

AVRO_MAGIC = b"\xc3\x01"
_HEADER_SIZE = 10
RESULT = "Command.Result"


class Encoding(IntEnum):
    """How a command came in, and so how its result goes out."""

    JSON = 0
    AVRO = 1

    @property
    def content_type(self) -> str:
        """The media type of a value in this encoding."""
        return "application/avro" if self is Encoding.AVRO else "application/json"


@dataclass(frozen=True, slots=True)
class AvroSchema:
    """One schema: the ce_type it belongs to, and the header its values begin with."""

    type: str
    parsed: Any
    header: bytes


def _load() -> tuple[dict[str, AvroSchema], dict[bytes, AvroSchema]]:
    """Read the schemas: `<ce_type>.avsc` is the current one, `<ce_type>@<anything>.avsc` a former one still read."""
    current, by_header = {}, {}
    for file in sorted(files("schemas.avro").iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".avsc"):
            continue
        source = json.loads(file.read_text("utf-8"))
        # fastavro gives the CRC-64-AVRO fingerprint's bytes in the little-endian order of the single-object header.
        crc = bytes.fromhex(fingerprint(to_parsing_canonical_form(source), "CRC-64-AVRO"))
        name, _, former = file.name.removesuffix(".avsc").partition("@")
        schema = AvroSchema(name, parse_schema(source, named_schemas={}), AVRO_MAGIC + crc)
        by_header[schema.header] = schema
        if not former:
            current[name] = schema
    return current, by_header


_CURRENT, _BY_HEADER = _load()
SCHEMAS: Mapping[str, AvroSchema] = MappingProxyType(_CURRENT)


def encode_avro(type_name: str, value: dict[str, Any]) -> bytes:
    """Return a value of a ce_type in Avro single-object encoding; one that does not fit the schema is a ValueError."""
    schema = SCHEMAS[type_name]
    out = BytesIO()
    out.write(schema.header)
    try:
        fastavro.schemaless_writer(out, schema.parsed, value, strict_allow_default=True)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a {type_name}: {error}") from error
    return out.getvalue()


def decode_avro(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return (ce_type, value without nulls) of a value in Avro single-object encoding; else a ValueError."""
    schema = _BY_HEADER.get(data[:_HEADER_SIZE])
    if schema is None:
        raise ValueError("not Avro single-object encoding with a known schema")
    body = BytesIO(data)
    body.seek(_HEADER_SIZE)
    try:
        value = fastavro.schemaless_reader(body, schema.parsed, None)
    except Exception as error:
        # The reader raises whatever its parts happen to raise on bytes that are no datum of the schema.
        raise ValueError("not a datum of its Avro schema") from error
    if body.tell() != len(data):
        raise ValueError("bytes after the Avro datum")
    return schema.type, without_nulls(value)


def without_nulls(value: Any) -> Any:
    """Return the value with every member that is null left out, at any depth."""
    if type(value) is dict:
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    if type(value) is list:
        return [without_nulls(item) for item in value]
    return value


def encode_value(type_name: str, value: dict[str, Any], encoding: Encoding) -> bytes:
    """Return a command or document in the encoding: JSON with the members in the order given, or Avro."""
    if encoding is Encoding.AVRO:
        return encode_avro(type_name, json.loads(compact_json(value)))
    return compact_json(value)


def encode_result(result: dict[str, Any], encoding: Encoding) -> bytes:
    """Return a Command.Result in the encoding of its command; decimals and times may be given as such."""
    if encoding is Encoding.JSON:
        return compact_json(result)
    plain = json.loads(compact_json(result))
    effects = plain.get("effects") or None
    shape = EFFECTS.get(plain["command_type"])
    plain["effects"] = None if effects is None or shape is None else (f"credits.{shape.__name__}", effects)
    if "error" in plain:
        plain["error"]["details"] = {name: _detail(value) for name, value in plain["error"]["details"].items()}
    return encode_avro(RESULT, plain)


def decode_result(data: bytes) -> dict[str, Any]:
    """Return a Command.Result of either encoding; nulls are left out, no effects are an empty object."""
    if not data.startswith(AVRO_MAGIC):
        return dict(json.loads(data))
    type_name, result = decode_avro(data)
    if type_name != RESULT:
        raise ValueError("not a Command.Result")
    result.setdefault("effects", {})
    return result


def _detail(value: Any) -> Any:
    """Return an error detail as the schema has it: a scalar, a list of strings or an object of strings."""
    if type(value) is list:
        return [_string(item) for item in value]
    if type(value) is dict:
        return {name: _string(member) for name, member in value.items()}
    return wire_value(value) if value is not None and type(value) not in (bool, int, str) else value


def _string(value: Any) -> str:
    return value if type(value) is str else compact_json(value).decode()
