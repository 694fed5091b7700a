"""What the commands on a merchant's configuration and roles do: pure (spec §6, §7)."""

from dataclasses import dataclass, field
from typing import Any

from schemas import payloads
from schemas.errors import Code, Refusal
from schemas.payloads import MerchantConfig


@dataclass(slots=True)
class Settings:
    """A merchant's configuration and roles as loaded by a batch, and what the batch changed of them."""

    version: int
    config: MerchantConfig
    roles: dict[int, str] = field(default_factory=dict)  # account id of the subject -> role
    new_versions: list[tuple[int, MerchantConfig, str, bytes]] = field(default_factory=list)
    changed_roles: dict[int, str | None] = field(default_factory=dict)  # None: revoked
    prefixes: set[tuple[str, str]] = field(default_factory=set)  # of receipts and credit notes, in all versions so far


def config_object(version: int, config: MerchantConfig) -> dict[str, Any]:
    return {"version": version, "config": config.model_dump(exclude_none=True)}


def configure(settings: Settings, command: payloads.MerchantConfigure, identity: bytes) -> dict[str, Any]:
    """Replace the whole configuration: it becomes the next version."""
    _check_series(settings, command.config)
    if command.expected_version is not None and command.expected_version != settings.version:
        raise Refusal(
            Code.VERSION_CONFLICT,
            "the configuration has another version by now",
            {"expected_version": command.expected_version, "version": settings.version},
        )
    if command.config != settings.config:
        settings.version += 1
        settings.config = command.config
        settings.new_versions.append((settings.version, command.config, command.actor, identity))
        settings.prefixes.add(prefixes_of(command.config))
    return config_object(settings.version, settings.config)


def prefixes_of(config: MerchantConfig) -> tuple[str, str]:
    return config.receipt_series_prefix, config.credit_note_series_prefix


def _check_series(settings: Settings, config: MerchantConfig) -> None:
    """Refuse to take a prefix that was ever the other kind's: both would be numbered in the one series of its name.

    Which documents there are by then does not matter: a batch under way may issue one under an earlier version.
    """
    before = prefixes_of(settings.config)
    receipts, credit_notes = map(set, zip(before, *settings.prefixes, strict=True))
    receipt, credit_note = prefixes_of(config)
    taken = []
    if receipt != before[0] and receipt in credit_notes:
        taken.append("config.receipt_series_prefix")
    if credit_note != before[1] and credit_note in receipts:
        taken.append("config.credit_note_series_prefix")
    if taken:
        raise Refusal(
            Code.IMMUTABLE,
            "the prefix names a series of the other kind of document: choose a new one",
            {"fields": taken},
        )


def assign_role(settings: Settings, subject: int, command: payloads.UserRoleAssign) -> dict[str, Any]:
    if settings.roles.get(subject) != command.role:
        settings.roles[subject] = settings.changed_roles[subject] = command.role
    return {"role": command.role}


def revoke_role(settings: Settings, subject: int, command: payloads.UserRoleRevoke) -> dict[str, Any]:
    """Take a role away; a role the subject does not have is gone already."""
    if settings.roles.get(subject) == command.role:
        del settings.roles[subject]
        settings.changed_roles[subject] = None
    return {}


def forget(settings: Settings, subject: int) -> None:
    """Take the role of an erased user away, whatever it is."""
    settings.roles.pop(subject, None)
    settings.changed_roles[subject] = None
