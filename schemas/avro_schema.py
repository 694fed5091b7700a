"""Avro schemas made from the payloads' models and the shapes of results and documents.

Identifiers, texts, times and decimals are Avro strings and integers are long, so that the members of a JSON payload are
a datum. What may be absent is a union with null whose default is null.
"""

import types
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel

from schemas.documents import CreditNoteIssued, ReceiptIssued
from schemas.effects import EFFECTS, CommandResult, Error
from schemas.glossary import GLOSSARY
from schemas.payloads import COMMANDS

NAMESPACE = "credits"

_SCALARS: Mapping[Any, str] = {str: "string", Decimal: "string", datetime: "string", int: "long", bool: "boolean"}
_DETAIL = [
    "null",
    "boolean",
    "long",
    "string",
    {"type": "array", "items": "string"},
    {"type": "map", "values": "string"},
]


def all_schemas() -> dict[str, dict[str, Any]]:
    """Return the Avro schema of every ce_type: commands, Command.Result, Receipt.Issued, CreditNote.Issued."""
    schemas = {name: _record(spec.model, name.replace(".", ""), set()) for name, spec in COMMANDS.items()}
    schemas["Command.Result"] = _record(CommandResult, "CommandResult", set())
    schemas["Receipt.Issued"] = _record(ReceiptIssued, "ReceiptIssued", set())
    schemas["CreditNote.Issued"] = _record(CreditNoteIssued, "CreditNoteIssued", set())
    return schemas


def _record(shape: Any, name: str, seen: set[str]) -> Any:
    """Return the record of a model or TypedDict; one that the schema has defined already by its name."""
    full_name = f"{NAMESPACE}.{name}"
    if full_name in seen:
        return full_name
    seen.add(full_name)
    fields = [
        _field(shape, member, annotation, seen, optional=optional) for member, annotation, optional in _members(shape)
    ]
    return {"type": "record", "name": name, "namespace": NAMESPACE, "doc": _first_line(shape), "fields": fields}


def _first_line(shape: Any) -> str:
    return str(shape.__doc__).strip().splitlines()[0]


def _members(shape: Any) -> list[tuple[str, Any, bool]]:
    """Return (name, annotation, may be absent) of every member."""
    if is_typeddict(shape):
        hints = get_type_hints(shape, include_extras=True)
        return [
            (name, get_args(hint)[0] if get_origin(hint) is NotRequired else hint, name in shape.__optional_keys__)
            for name, hint in hints.items()
        ]
    return [(name, field.annotation, not field.is_required()) for name, field in shape.model_fields.items()]


def _field(shape: Any, name: str, annotation: Any, seen: set[str], *, optional: bool) -> dict[str, Any]:
    doc = GLOSSARY.get(f"{shape.__name__}.{name}") or GLOSSARY[name]
    if shape is CommandResult and name == "effects":
        return {"name": name, "type": ["null", *_effects(seen)], "default": None, "doc": doc}
    if shape is Error and name == "details":
        return {"name": name, "type": {"type": "map", "values": _DETAIL}, "doc": doc}
    avro = _type(annotation, seen)
    if not optional:
        return {"name": name, "type": avro, "doc": doc}
    return {"name": name, "type": ["null", avro], "default": None, "doc": doc}


def _effects(seen: set[str]) -> list[Any]:
    shapes = {shape.__name__: shape for shape in EFFECTS.values()}
    return [_record(shape, name, seen) for name, shape in shapes.items()]


def _type(annotation: Any, seen: set[str]) -> Any:
    """Return the Avro type of an annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # An effect that shows a payload's object names its model beside the dict it is.
        model = next(
            (extra for extra in arguments[1:] if isinstance(extra, type) and issubclass(extra, BaseModel)), None
        )
        return _type(model or arguments[0], seen)
    if origin in (Union, types.UnionType):
        (value,) = (argument for argument in arguments if argument is not type(None))
        return _type(value, seen)
    if origin is Literal:
        return "string"
    if origin is list:
        return {"type": "array", "items": _type(arguments[0], seen)}
    if origin is dict:
        return {"type": "map", "values": _type(arguments[1], seen)}
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    return _record(annotation, annotation.__name__, seen)
