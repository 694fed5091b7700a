"""JSON Schema made from the payloads' models and the shapes of answers, results and documents.

A member's meaning is what its annotation says (``Annotated[str, "date-time", "When."]``), else the glossary's.
"""

import types
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.effects import EFFECTS, CommandResult
from schemas.errors import Code
from schemas.glossary import GLOSSARY

Schema = dict[str, Any]

DECIMAL = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}
FORMATS = frozenset({"date", "date-time"})

_SCALARS: Mapping[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    Decimal: DECIMAL,
    datetime: {"type": "string", "format": "date-time"},
    Any: {},
}
# What pydantic calls a bound, and what JSON Schema does.
_BOUNDS = {"min_length": "minLength", "max_length": "maxLength", "ge": "minimum", "le": "maximum", "pattern": "pattern"}


class Definitions:
    """Collects the schemas of shapes by name; ``prefix`` is where references point to."""

    def __init__(self, prefix: str = "#/components/schemas/") -> None:
        self.schemas: dict[str, Schema] = {}
        self._prefix = prefix

    def of(self, annotation: Any) -> Schema:
        """Return the schema of an annotation; of a shape or model a reference to it."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return self.of(arguments[0]) | _extras(arguments[1:])
        if origin in (Union, types.UnionType):
            members = [self.of(argument) for argument in arguments if argument is not type(None)]
            return members[0] if len(members) == 1 else {"anyOf": members}
        if origin is Literal:
            return {"type": "string", "enum": list(arguments)}
        if origin is list:
            return {"type": "array", "items": self.of(arguments[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if annotation in _SCALARS:
            return dict(_SCALARS[annotation])
        return self._reference(annotation)

    def _reference(self, shape: Any) -> Schema:
        name = shape.__name__
        if name not in self.schemas:
            self.schemas[name] = {}  # a shape may hold itself
            members = _members(shape)
            self.schemas[name] = {
                "type": "object",
                "description": str(shape.__doc__).strip().splitlines()[0],
                "properties": {member: self._member(shape, member, hint) for member, hint, _ in members},
                "required": [member for member, _, optional in members if not optional],
            }
        return {"$ref": self._prefix + name}

    def _member(self, shape: Any, name: str, annotation: Any) -> Schema:
        if shape is CommandResult and name == "effects":
            effects = {kind.__name__: self.of(kind) for kind in EFFECTS.values()}
            schema: Schema = {"anyOf": [*effects.values(), {"type": "object", "maxProperties": 0}]}
        elif name == "code" and shape.__name__ in ("Error", "Problem"):
            schema = {"type": "string", "enum": [str(code) for code in Code]}
        else:
            schema = self.of(annotation)
        told = GLOSSARY.get(f"{shape.__name__}.{name}") or GLOSSARY.get(name)
        # What only refers to something else is told by that.
        if "description" not in schema and (told or "$ref" not in schema.get("items", schema)):
            schema["description"] = told or GLOSSARY[name]
        return schema


def _members(shape: Any) -> list[tuple[str, Any, bool]]:
    """Return (name, annotation, may be absent) of every member."""
    if is_typeddict(shape):
        hints = get_type_hints(shape, include_extras=True)
        return [(name, _given(hint), name in shape.__optional_keys__) for name, hint in hints.items()]
    assert issubclass(shape, BaseModel)
    return [(name, _with_bounds(field), not field.is_required()) for name, field in shape.model_fields.items()]


def _given(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is NotRequired else hint


def _with_bounds(field: FieldInfo) -> Any:
    annotation: Any = field.annotation
    for extra in field.metadata:
        annotation = Annotated[annotation, extra]
    return annotation


def _extras(extras: tuple[Any, ...]) -> Schema:
    """Read what an annotation says besides the type: format and meaning, or pydantic's bounds."""
    found: Schema = {}
    for extra in extras:
        if isinstance(extra, str):
            found["format" if extra in FORMATS else "description"] = extra
        elif isinstance(extra, FieldInfo):
            found |= _extras(tuple(extra.metadata))
        else:
            found |= {name: _bound(extra, own) for own, name in _BOUNDS.items() if _bound(extra, own) is not None}
    return found


def _bound(extra: Any, name: str) -> Any:
    value = getattr(extra, name, None)
    # JSON Schema's expressions know no Unicode categories everywhere.
    return value.replace(r"\p{Cc}", r"\x00-\x1f\x7f-\x9f") if isinstance(value, str) else value
