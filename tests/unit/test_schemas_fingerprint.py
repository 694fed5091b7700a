"""Equal content gives equal fingerprints, other content other ones, and the difference can be named."""

import hmac
from typing import Any

import pytest

from schemas.codec import canonical_json
from schemas.envelope import Incoming, differing_fields
from schemas.fingerprint import normalised
from tests.unit.test_schemas_messages import SECRET, TYPES, as_json, read, sample


def incoming(name: str, **changes: Any) -> Incoming:
    answer = read(as_json(name, sample(name, **changes)), name)
    assert answer.error is None
    return answer


@pytest.mark.parametrize("name", TYPES)
def test_a_fingerprint_is_the_hmac_of_type_and_canonical_json(name: str) -> None:
    answer = incoming(name)

    content = name.encode() + b"\n" + canonical_json(normalised(answer.payload))

    assert answer.fingerprint == hmac.digest(SECRET, content, "sha256")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Operation.RecordAndClose", {"resource_amount": "01234.5"}),
        ("Operation.RecordAndClose", {"resource_amount": "1234.500000"}),
        ("Operation.RecordAndClose", {"completed_at": "2026-03-01T14:20:00.0000019+04:00"}),
        ("Operation.Open", {"unknown": 1, "merchant_id": "ararat"}),
        ("Grant.Apply", {"product_code": None}),
        ("Adjustment.Apply", {"access_period_days": None}),
        ("Refund.Apply", {"amount": "6000"}),
    ],
)
def test_the_same_content_written_otherwise_has_the_same_fingerprint(name: str, changes: dict[str, Any]) -> None:
    first, second = incoming(name), incoming(name, **changes)

    assert (first.fingerprint, first.digests) == (second.fingerprint, second.digests)


def test_a_default_is_the_same_as_leaving_it_out() -> None:
    changes = {"minimum_charge": 1, "workflow_type": None}

    given = incoming("OperationType.CreateWithArchival", **changes)
    left_out = incoming("OperationType.CreateWithArchival", minimum_charge=..., workflow_type=...)

    assert given.fingerprint == left_out.fingerprint


def test_an_empty_object_or_list_is_the_same_as_leaving_it_out() -> None:
    assert incoming("Purchase.Settled", buyer={}).fingerprint == incoming("Purchase.Settled", buyer=...).fingerprint
    assert incoming("Product.Create", prices=[]).fingerprint == incoming("Product.Create", prices=...).fingerprint


def test_a_config_with_default_policies_is_the_same_as_one_without() -> None:
    config = sample("Merchant.Configure")["config"]
    without = {name: value for name, value in config.items() if not name.endswith("_policy")}
    defaults = without | {"refund_policy": {}, "chargeback_policy": {"shortfall": "debit", "credit_note": "never"}}

    first = incoming("Merchant.Configure", config=without)
    second = incoming("Merchant.Configure", config=defaults)

    assert first.fingerprint == second.fingerprint


def test_texts_are_compared_as_they_are_kept_without_card_numbers() -> None:
    first = incoming("Grant.Apply", justification="card 4111 1111 1111 1111")
    second = incoming("Grant.Apply", justification="card 5500-0000-0000-0004")

    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("member", ["actor", "justification", "grant_id", "user_id", "credits", "access_period_days"])
def test_every_member_is_content(member: str) -> None:
    changed = incoming("Grant.Apply", **{member: 7 if member in ("credits", "access_period_days") else "other"})

    assert changed.fingerprint != incoming("Grant.Apply").fingerprint


def test_the_type_and_the_secret_are_part_of_a_fingerprint() -> None:
    suspend, resume = incoming("Merchant.Suspend"), incoming("Merchant.Resume")
    other = read(as_json("Operation.Open", sample("Operation.Open")), secret=b"other")

    assert suspend.fingerprint != resume.fingerprint
    assert other.fingerprint != incoming("Operation.Open").fingerprint
    assert other.digests != incoming("Operation.Open").digests


def test_nothing_differs_from_itself() -> None:
    digests = incoming("Purchase.Settled").digests

    assert differing_fields(digests, digests) == []


def test_changed_added_and_missing_members_are_named_by_their_paths() -> None:
    snapshot = sample("Purchase.Settled")["pricing_snapshot"]
    changed = snapshot | {"amount": "13000", "tax": {"type": "vat", "rate": "20"}}

    before = incoming("Purchase.Settled", buyer={"name": "Ani", "email": "a@example.com"})
    after = incoming("Purchase.Settled", pricing_snapshot=changed, buyer={"name": "Ani", "locale": "hy"})

    expected = ["buyer.email", "buyer.locale", "pricing_snapshot.amount", "pricing_snapshot.tax.amount"]
    expected += ["pricing_snapshot.tax.note"]
    assert differing_fields(before.digests, after.digests) == expected


def test_a_config_is_compared_down_to_its_members_members() -> None:
    config = sample("Merchant.Configure")["config"]
    address = config["registered_address"] | {"city": "Gyumri", "lines": ["1 Square"]}
    patterns = {"idbank": "[0-9]{15}"}
    changed = config | {"registered_address": address, "external_ref_patterns": patterns, "late_close": "refuse"}

    before, after = incoming("Merchant.Configure"), incoming("Merchant.Configure", config=changed)

    assert differing_fields(before.digests, after.digests) == [
        "config.external_ref_patterns",
        "config.late_close",
        "config.registered_address.city",
        "config.registered_address.lines",
    ]


def test_members_of_commands_of_two_types_are_named_by_their_paths() -> None:
    first, second = incoming("Operation.Cancel"), incoming("Chargeback.Reverse")

    expected = ["actor", "dispute_id", "justification", "operation_id", "reason", "user_id"]
    assert differing_fields(first.digests, second.digests) == expected


def test_a_path_that_no_command_has_any_more_is_a_question_mark() -> None:
    assert differing_fields(b"gone" + bytes(6), b"") == ["?"]


def test_equal_values_of_different_members_have_different_digests() -> None:
    digests = incoming("Operation.Open", user_id="same", operation_id="same", operation_code="same").digests
    values = [digests[at + 4 : at + 10] for at in range(0, len(digests), 10)]

    assert len(set(values)) == len(values) == 4
