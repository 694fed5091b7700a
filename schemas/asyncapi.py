"""The AsyncAPI document of the topics, made from the code: channels, commands, results, documents, dead letters."""

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from schemas import examples
from schemas.codec import Encoding
from schemas.documents import CreditNoteIssued, ReceiptIssued
from schemas.effects import CommandResult
from schemas.errors import REGISTRY
from schemas.events import CREDIT_NOTE, RECEIPT
from schemas.json_schema import Definitions
from schemas.payloads import COMMANDS
from schemas.topics import ALLOWED, CONTROL, CONTROL_CHANNEL, CONTROL_RESULTS

VERSION = "1.0.0"
RESULT = "Command.Result"
DEAD_LETTERED = "Message.DeadLettered"


class DeadLetter(TypedDict):
    """A pointer to a message that could not be read or decided; never a copy of it."""

    topic: Annotated[str, "The topic it lies in."]
    partition: Annotated[int, "Its partition."]
    offset: Annotated[int, "Its offset."]
    sha256: Annotated[str, "SHA-256 of its value, hexadecimal."]
    code: Annotated[str, "The error code."]
    message: str


HEADERS: Mapping[str, tuple[str, bool]] = {
    "ce_specversion": ("1.0", True),
    "ce_id": ("Identifies the message within its source; a repetition is answered, not done again.", True),
    "ce_source": ("Who sends it.", True),
    "ce_type": ("What it is.", True),
    "ce_time": ("When it was made (RFC 3339).", False),
    "content-type": ("application/json, application/avro, or application/cloudevents+json for structured mode.", False),
    "ce_replyto": ("A topic credits.{merchant}.replies.<name> that gets the result too.", False),
    "traceparent": ("W3C trace context, passed on to the result.", False),
}

_OUTPUTS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "results": ("credits.{merchant}.results", "The answer to every command, in its partition's order.", (RESULT,)),
    "receipts": ("credits.{merchant}.receipts", "Every document issued, kept for ever.", (RECEIPT, CREDIT_NOTE)),
    "dead-letter": ("credits.{merchant}.dead-letter", "Pointers to what needs a person.", (DEAD_LETTERED,)),
    "replies": ("credits.{merchant}.replies.{name}", "Results for whoever asked for them here.", (RESULT,)),
    "control-results": (CONTROL_RESULTS, "The answer to every command of the control plane.", (RESULT,)),
}
_SHAPES: Mapping[str, Any] = {
    RESULT: CommandResult,
    RECEIPT: ReceiptIssued,
    CREDIT_NOTE: CreditNoteIssued,
    DEAD_LETTERED: DeadLetter,
}


def document(outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document; ``outputs`` gives examples of what comes out, by ce_type."""
    definitions = Definitions()
    messages = {name: _command(name, definitions) for name in COMMANDS}
    messages |= {name: _output(name, definitions, (outputs or {}).get(name)) for name in _SHAPES}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Credit management service: topics",
            "version": VERSION,
            "description": "Commands in, results and documents out, as CloudEvents 1.0 over Kafka (binary mode; "
            "structured JSON mode is accepted as well). `{merchant}` is a merchant's id.",
        },
        "defaultContentType": Encoding.JSON.content_type,
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": messages,
            "schemas": definitions.schemas | {"Headers": _headers()},
            "parameters": {
                "merchant": {"description": "The merchant's id."},
                "name": {"description": "Chosen by whoever asks; the topic must exist."},
            },
        },
        "x-error-codes": [
            {"code": str(info.code), "retryable": info.retryable, "meaning": info.meaning, "fix": info.fix}
            for info in REGISTRY.values()
            if not info.http_only
        ],
    }


def _channels() -> dict[str, Any]:
    channels = {}
    for channel, types in ALLOWED.items():
        address = CONTROL if channel == CONTROL_CHANNEL else f"credits.{{merchant}}.{channel}"
        own = "; the service's own" if channel == "jobs" else ""
        channels[channel] = _channel(address, f"Commands of the channel {channel}{own}.", sorted(types))
    return channels | {name: _channel(*told) for name, told in _OUTPUTS.items()}


def _channel(address: str, description: str, types: Any) -> dict[str, Any]:
    parameters = [name for name in ("merchant", "name") if f"{{{name}}}" in address]
    shown = {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in types},
    }
    if parameters:
        shown["parameters"] = {name: {"$ref": f"#/components/parameters/{name}"} for name in parameters}
    return shown


def _operations() -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for channel in ALLOWED:
        reply = "control-results" if channel == CONTROL_CHANNEL else "results"
        operations[f"receive-{channel}"] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{channel}"},
            "reply": {"channel": {"$ref": f"#/channels/{reply}"}},
        }
    for name in _OUTPUTS:
        operations[f"send-{name}"] = {"action": "send", "channel": {"$ref": f"#/channels/{name}"}}
    return operations


def _command(name: str, definitions: Definitions) -> dict[str, Any]:
    spec = COMMANDS[name]
    told = [payload for step, payload in (*examples.control(), *examples.story()) if step == name]
    return {
        "name": name,
        "title": name,
        "summary": str(spec.model.__doc__).strip().splitlines()[0],
        "contentType": Encoding.JSON.content_type,
        "headers": {"$ref": "#/components/schemas/Headers"},
        "payload": definitions.of(spec.model),
        "examples": [{"payload": payload} for payload in told],
    }


def _output(name: str, definitions: Definitions, example: Any) -> dict[str, Any]:
    shape = _SHAPES[name]
    shown = {
        "name": name,
        "title": name,
        "summary": str(shape.__doc__).strip().splitlines()[0],
        "contentType": Encoding.JSON.content_type,
        "headers": {"$ref": "#/components/schemas/Headers"},
        "payload": definitions.of(shape),
    }
    return shown | ({"examples": [{"payload": example}]} if example is not None else {})


def _headers() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "The headers of a CloudEvent in binary mode.",
        "properties": {name: {"type": "string", "description": told} for name, (told, _) in HEADERS.items()},
        "required": [name for name, (_, required) in HEADERS.items() if required],
    }
