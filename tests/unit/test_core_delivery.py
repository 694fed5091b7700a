"""Identities, business keys, parked commands, erasure, configuration and roles (spec §6, §9)."""

import json
from datetime import timedelta
from typing import Any

import pytest

from tests.core import START, Core, admin, closing, config, give, opening, purchase, shop, take, wire_time


def adjustment(key: str = "a", delta: int = 5, **changes: Any) -> dict[str, Any]:
    return admin(adjustment_id=key, user_id="u", credits_delta=delta, access_period_days=30) | changes


def code(result: dict[str, Any]) -> str | None:
    found: str | None = result.get("error", {}).get("code")
    return found


# Identity and business key


def test_the_same_message_again_gets_the_same_bytes_and_moves_nothing() -> None:
    core = shop()
    message = core.message("Adjustment.Apply", adjustment())
    first = core.published([message])
    take(core, 1)

    assert core.published([message, message]) == first * 2
    assert core.figures("u") == (4, 0)


def test_the_same_key_in_a_new_message_gets_the_original_s_outcome_under_its_own_identity() -> None:
    core = shop()
    first = core.applied("Adjustment.Apply", **adjustment())
    core.wait(minutes=1)
    take(core, 1)

    second = core.applied("Adjustment.Apply", **adjustment())

    assert second["replay_of"] == {"command_source": first["command_source"], "command_id": first["command_id"]}
    assert second["command_id"] != first["command_id"]
    for member in ("outcome", "effects", "user_seq", "balance", "debt", "applied_at"):
        assert second[member] == first[member]
    assert core.figures("u") == (4, 0)


def test_the_same_identity_with_other_content_is_a_conflict_that_names_what_differs() -> None:
    core = shop()
    message = core.message("Adjustment.Apply", adjustment())
    core.send(message)

    (result,) = core.send(message | {"payload": adjustment(delta=6, justification="another")})

    assert code(result) == "idempotency_conflict"
    assert result["error"]["details"] == {
        "fields": ["credits_delta", "justification"],
        "first": {"command_source": message["source"], "command_id": message["id"]},
    }
    assert core.figures("u") == (5, 0)


def test_a_conflict_again_gets_the_same_conflict_again() -> None:
    core = shop()
    message = core.message("Adjustment.Apply", adjustment())
    other = message | {"payload": adjustment(delta=6)}
    core.send(message)

    assert core.published([other]) == core.wait(days=1).published([other])


def test_the_same_key_with_other_content_is_a_conflict() -> None:
    core = shop()
    first = core.applied("Adjustment.Apply", **adjustment())

    result = core.do("Adjustment.Apply", **adjustment(actor="another"))

    assert code(result) == "idempotency_conflict"
    assert result["error"]["details"]["fields"] == ["actor"]
    assert result["error"]["details"]["first"]["command_id"] == first["command_id"]


SAME = [
    {"credits_delta": 5, "unknown": "member"},
    {"credits_delta": 5, "nothing": None},
]


@pytest.mark.parametrize("changes", SAME)
def test_unknown_members_and_nulls_are_no_other_content(changes: dict[str, Any]) -> None:
    core = shop()
    first = core.applied("Adjustment.Apply", **adjustment())

    assert core.do("Adjustment.Apply", **adjustment() | changes)["effects"] == first["effects"]


def test_numbers_and_times_are_the_same_content_however_they_are_written() -> None:
    core = shop()
    core.applied("Operation.Open", **opening())
    first = core.applied("Operation.RecordAndClose", **closing(resource_amount="1.50"))

    same = closing(resource_amount="1.5", completed_at=wire_time(START).replace(".000000Z", "+00:00"))
    assert core.do("Operation.RecordAndClose", **same)["effects"] == first["effects"]


def test_a_business_key_belongs_to_its_command_type() -> None:
    core = shop()
    core.applied("Purchase.Settled", **purchase())

    core.applied("Refund.Apply", **admin(refund_id="x", external_ref="pay-1", amount="1.00"))
    core.applied("Chargeback.Apply", **admin(dispute_id="x", external_ref="pay-1", amount="1.00"))
    assert core.do("Chargeback.Reverse", **admin(dispute_id="x"))["outcome"] == "applied"


def test_a_refused_command_leaves_its_key_free() -> None:
    core = shop()
    assert core.refused("Purchase.Settled", **purchase(amount="9.00")) == "price_mismatch"
    assert core.refused("Purchase.Settled", **purchase(amount="9.00")) == "price_mismatch"

    assert core.do("Purchase.Settled", **purchase())["outcome"] == "applied"
    assert core.refused("Purchase.Settled", **purchase(amount="9.00")) == "idempotency_conflict"


def test_one_batch_answers_every_delivery_of_its_duplicates() -> None:
    core = shop()
    message = core.message("Purchase.Settled", purchase())
    again = core.message("Purchase.Settled", purchase())

    first, second, third = core.batch([message, message, again])

    assert first == second
    assert third["effects"] == first["effects"]
    assert first["effects"]["receipt_number"] == "R-2026-0001"
    assert len(core.documents) == 1


def test_a_sign_up_is_a_conflict_when_it_differs_and_not_when_a_command_of_another_type_has_its_key() -> None:
    core = shop()
    core.applied("User.SignedUp", user_id="u")
    core.applied("Adjustment.Apply", **adjustment("u"))

    assert core.refused("User.SignedUp", user_id="u", locale="hy") == "idempotency_conflict"


@pytest.mark.parametrize(
    ("topic", "command_type", "expected"),
    [
        ("credits.ararat.users", "Operation.Open", "wrong_topic"),
        ("credits.ararat.operations", "Operation.Open", None),
        ("credits.ararat.admin", "Lot.Expire", "wrong_topic"),
    ],
)
def test_a_command_is_allowed_on_its_topic_only(topic: str, command_type: str, expected: str | None) -> None:
    core = shop()
    payload = opening() if command_type == "Operation.Open" else {"user_id": "u", "lot_id": "x"}

    (result,) = core.send(core.message(command_type, payload) | {"topic": topic})

    assert code(result) == expected


def test_patterns_are_configured_for_payment_methods_that_are_called_like_cards() -> None:
    core = shop()

    configured = core.applied("Merchant.Configure", **admin(config=config(external_ref_patterns={"credit_card": "x+"})))

    assert configured["effects"]["config"]["external_ref_patterns"] == {"credit_card": "x+"}
    worse = config(external_ref_patterns={"card": "x+"}, card_number="1")
    assert core.refused("Merchant.Configure", **admin(config=worse)) == "sensitive_data"


def test_what_cannot_be_read_leaves_a_dead_letter_under_a_known_identity_too() -> None:
    core = shop()
    message = core.message("Adjustment.Apply", adjustment())
    core.send(message)

    (result,) = core.send(message | {"payload": adjustment(credits_delta="many")})

    assert code(result) == "malformed"
    assert [letter.code for letter in core.letters] == ["malformed"]


def test_a_message_stays_the_same_when_another_pattern_of_references_is_configured() -> None:
    core = shop()
    message = core.message("Purchase.Settled", purchase(external_ref="4000056655665556"))
    refused = core.published([message])
    assert code(json.loads(refused[0])) == "sensitive_data"

    core.applied("Merchant.Configure", **admin(config=config(external_ref_patterns={"card": "[0-9]{16}"})))
    assert core.published([message]) == refused
    later = core.message("Purchase.Settled", message["payload"])
    settled = core.published([later])
    assert json.loads(settled[0])["outcome"] == "applied"

    core.applied("Merchant.Configure", **admin(config=config()))
    assert core.published([later]) == settled


def test_the_same_message_on_another_topic_is_no_other_content() -> None:
    core = shop()
    message = core.message("Operation.Open", opening())
    refused = core.published([message | {"topic": "credits.ararat.admin"}])

    assert core.published([message]) == refused


def test_what_cannot_be_read_is_answered_and_pointed_to() -> None:
    core = shop()

    assert core.refused("Adjustment.Apply", adjustment_id="a") == "malformed"
    assert core.refused("Nothing.AtAll", x=1) == "unknown_command"
    assert [letter.code for letter in core.letters] == ["malformed", "unknown_command"]


# Order of arrival


def test_a_close_before_its_open_waits_and_is_decided_right_after_it() -> None:
    core = shop()
    early = core.message("Operation.RecordAndClose", closing(resource_amount="3"))
    assert core.send(early) == []

    opened, closed = core.send(core.message("Operation.Open", opening()))

    assert (opened["outcome"], closed["outcome"]) == ("applied", "applied")
    assert closed["command_id"] == early["id"]
    assert closed["effects"]["credits"] == 3
    assert core.parked == {}
    assert core.send(early) == [closed]


def test_a_close_that_waits_for_a_refused_open_finds_nothing_open() -> None:
    core = shop()
    take(core, 1)
    core.send(core.message("Operation.RecordAndClose", closing()))

    opened, closed = core.send(core.message("Operation.Open", opening()))

    assert (code(opened), code(closed)) == ("insufficient_balance", "operation_not_open")


def test_duplicates_of_a_waiting_command_are_all_answered_when_it_is() -> None:
    core = shop()
    early = core.message("Operation.RecordAndClose", closing())
    assert core.send(early) == []
    assert core.batch([early, early]) == []

    results = core.send(core.message("Operation.Open", opening()))

    assert len(results) == 4
    assert results[1] == results[2] == results[3]


def test_commands_wait_for_one_another_and_are_decided_in_order_of_arrival() -> None:
    core = shop()
    assert core.send(core.message("Chargeback.Reverse", admin(dispute_id="d"))) == []
    assert core.send(core.message("Refund.Apply", admin(refund_id="r", external_ref="pay-1", amount="4.00"))) == []
    assert core.send(core.message("Chargeback.Apply", admin(dispute_id="d", external_ref="pay-1"))) == []
    fiscal = {
        "receipt_number": "R-2026-0001",
        "kind": "sale",
        "fiscal_number": "f",
        "authority": "SRC",
        "fiscal_at": wire_time(START),
        "actor": "admin",
    }
    assert core.send(core.message("Receipt.AttachFiscal", fiscal)) == []

    results = core.send(core.message("Purchase.Settled", purchase()))

    assert [result["command_type"] for result in results] == [
        "Purchase.Settled",
        "Refund.Apply",
        "Chargeback.Apply",
        "Chargeback.Reverse",
        "Receipt.AttachFiscal",
    ]
    assert {result["outcome"] for result in results} == {"applied"}
    assert core.figures("u") == (60, 0)


def test_a_refund_whose_purchase_was_refused_stays_parked() -> None:
    core = shop()
    core.send(core.message("Refund.Apply", admin(refund_id="r", external_ref="pay-1")))

    assert core.refused("Purchase.Settled", **purchase(amount="9.00")) == "price_mismatch"
    results = core.send(core.message("Purchase.Settled", purchase()))

    assert [result["outcome"] for result in results] == ["applied", "applied"]


def test_two_messages_with_one_key_wait_together_and_are_decided_once() -> None:
    core = shop()
    for _ in range(2):
        core.send(core.message("Operation.RecordAndClose", closing()))
    core.send(core.message("Operation.RecordAndClose", closing(resource_amount="9")))

    _, first, second, third = core.send(core.message("Operation.Open", opening()))

    assert first["effects"]["credits"] == 1
    assert second["replay_of"]["command_id"] == first["command_id"]
    assert code(third) == "idempotency_conflict"
    assert core.figures("u") == (-1, 1)


def test_a_released_close_is_judged_by_the_time_the_broker_took_it() -> None:
    core = shop()
    core.send(core.message("Operation.RecordAndClose", closing()))
    core.wait(hours=2)

    results = core.send(core.message("Operation.Open", opening()))

    assert [result["outcome"] for result in results] == ["applied", "applied"]


@pytest.mark.parametrize(
    ("command_type", "payload", "minutes"),
    [
        ("Operation.RecordAndClose", closing(), 15),
        ("Operation.Cancel", {"user_id": "u", "operation_id": "op-1"}, 15),
        ("Refund.Apply", admin(refund_id="r", external_ref="pay-1"), 7 * 24 * 60),
        ("Chargeback.Apply", admin(dispute_id="d", external_ref="pay-1"), 7 * 24 * 60),
        ("Chargeback.Reverse", admin(dispute_id="d"), 7 * 24 * 60),
    ],
)
def test_what_waits_too_long_is_given_up(command_type: str, payload: dict[str, Any], minutes: int) -> None:
    core = shop()
    early = core.message(command_type, payload)
    core.send(early)
    job = {"source": early["source"], "id": early["id"]}

    core.now = START + timedelta(minutes=minutes) - timedelta(microseconds=1)
    assert core.refused("Command.Resolve", **job) == "not_due"
    core.now = START + timedelta(minutes=minutes)
    results = core.send(core.message("Command.Resolve", job))

    answers = {result["command_type"]: result for result in results}
    assert answers["Command.Resolve"]["outcome"] == "applied"
    assert code(answers[command_type]) == "dependency_timeout"
    assert core.send(early) == [answers[command_type]]
    # A new message is decided afresh.
    assert core.send(core.message(command_type, payload)) == []


def test_a_close_by_another_user_that_waits_is_not_found_by_him() -> None:
    core = shop()
    core.send(core.message("Operation.RecordAndClose", closing(user_id="v")))

    opened, closed = core.send(core.message("Operation.Open", opening()))

    assert (opened["outcome"], code(closed)) == ("applied", "operation_not_found")


# Erasure


def erased() -> Core:
    core = shop(config(chargeback_policy={"shortfall": "debit", "credit_note": "on_apply"}))
    core.applied("Purchase.Settled", **purchase("secret-user", buyer={"name": "Secret Name", "email": "s@example.am"}))
    core.applied("UserRole.Assign", subject="secret-user", role="support", actor="admin")
    core.applied("Operation.Open", **opening(user_id="secret-user"))
    core.applied("User.Erase", **admin(request_id="e", user_id="secret-user"))
    return core


def test_after_an_erasure_the_user_s_id_is_nowhere() -> None:
    core = erased()

    kept = [
        *(repr(row) for row in core.inbox.values()),
        *(document.body for document in core.documents),
        *(repr(block) for block in core.buyers),
        *(repr(parked) for parked in core.parked.values()),
        repr((core.books.accounts, core.books.lots_by_id, core.books.operations, core.books.purchases)),
        repr((core.entries, core.allocations, core.roles, core.fiscal)),
    ]

    assert "secret-user" not in json.dumps(kept)
    assert "Secret Name" not in json.dumps(kept)
    (account,) = core.books.accounts.values()
    assert account.user_id.startswith("erased-")
    assert core.buyers == []


def test_stored_results_and_documents_never_held_the_user_s_id_or_the_buyer() -> None:
    core = shop()
    core.applied("Purchase.Settled", **purchase("secret-user", buyer={"name": "Secret Name"}))
    core.applied("UserRole.Assign", subject="secret-user", role="support", actor="admin")

    for row in core.inbox.values():
        assert "secret-user" not in (row.result or "")
        assert b"secret-user" not in row.digests
    assert "secret-user" not in core.documents[0].body
    assert "Secret Name" not in core.documents[0].body


def test_commands_that_name_an_erased_user_are_refused() -> None:
    core = erased()

    assert core.refused("Purchase.Settled", **purchase("secret-user", "pay-2")) == "account_erased"
    assert core.refused("User.SignedUp", user_id="secret-user") == "account_erased"
    assert core.refused("Operation.RecordAndClose", **closing(user_id="secret-user")) == "account_erased"
    # What would have to wait for an operation does not.
    assert core.refused("Operation.RecordAndClose", **closing("never", user_id="secret-user")) == "account_erased"
    assert core.refused("Operation.Cancel", user_id="secret-user", operation_id="never") == "account_erased"
    assert core.refused("Account.Lock", **admin(user_id="secret-user")) == "account_erased"
    assert core.refused("User.Erase", **admin(request_id="e2", user_id="secret-user")) == "account_erased"


def test_refunds_and_chargebacks_still_work_after_an_erasure() -> None:
    core = erased()

    refund = core.applied("Refund.Apply", **admin(refund_id="r", external_ref="pay-1", amount="5.00"))
    assert refund["effects"]["credits_taken"] == 50
    assert refund["user_id"].startswith("erased-")
    core.applied("Chargeback.Apply", **admin(dispute_id="d", external_ref="pay-1"))
    assert core.applied("Chargeback.Reverse", **admin(dispute_id="d"))["balance"] == 50


def test_time_goes_on_for_an_erased_user_under_the_tombstone() -> None:
    core = erased()
    (account,) = core.books.accounts.values()
    (lot,) = core.books.lots_by_id.values()
    core.wait(days=30)

    core.applied("Operation.Expire", user_id=account.user_id, operation_id="op-1")
    assert core.applied("Lot.Expire", user_id=account.user_id, lot_id=lot.lot_id)["effects"]["credits"] == 100


def test_a_stored_answer_shows_the_tombstone_after_an_erasure() -> None:
    core = shop()
    message = core.message("Adjustment.Apply", adjustment())
    core.send(message)
    core.applied("User.Erase", **admin(request_id="e", user_id="u"))

    (again,) = core.send(message)

    assert again["user_id"].startswith("erased-")
    assert again["balance"] == 5


def test_a_conflict_again_shows_the_tombstone_after_an_erasure() -> None:
    core = shop()
    core.applied("Adjustment.Apply", **adjustment())
    other = core.message("Adjustment.Apply", adjustment(delta=6))
    (conflict,) = core.send(other)
    core.applied("User.Erase", **admin(request_id="e", user_id="u"))

    (again,) = core.send(other)

    assert code(again) == code(conflict) == "idempotency_conflict"
    assert again["user_id"].startswith("erased-")
    # The account's figures after the command, which moved nothing.
    assert (conflict["user_seq"], conflict["balance"], conflict["debt"]) == (1, 5, 0)


def test_a_waiting_command_of_a_user_who_is_erased_is_answered_then() -> None:
    core = shop()
    early = core.message("Operation.RecordAndClose", closing())
    core.send(early)

    results = core.send(core.message("User.Erase", admin(request_id="e", user_id="u")))

    assert [code(result) for result in results] == [None, "account_erased"]
    assert core.parked == {}


def test_an_open_by_an_erased_user_answers_a_close_that_waits_for_it() -> None:
    core = shop()
    give(core, 5)
    core.applied("User.Erase", **admin(request_id="e", user_id="u"))
    early = core.message("Operation.RecordAndClose", closing(user_id="v"))
    core.send(early)

    results = core.send(core.message("Operation.Open", opening()))

    # Spec §9.5: what waited is decided right after the Open, also when that is refused. The code is not told.
    opened, closed = results
    assert code(opened) == "account_erased"
    assert closed["command_id"] == early["id"]


def test_an_open_refused_because_the_user_was_erased_is_final_like_any_other() -> None:
    # Spec §9.4: "A refusal is final for Operation.Open, for its operation_id."
    core = shop()
    give(core, 5)
    core.applied("User.Erase", **admin(request_id="e", user_id="u"))
    assert core.refused("Operation.Open", **opening()) == "account_erased"

    assert core.refused("Operation.Open", **opening(user_id="v")) == "idempotency_conflict"


# Configuration and roles


def test_a_configuration_is_replaced_whole_as_the_next_version() -> None:
    core = shop()

    result = core.applied("Merchant.Configure", config=config(operation_timeout_minutes=1), actor="admin")

    assert result["effects"]["version"] == 2
    opened = core.applied("Operation.Open", **opening())
    assert opened["effects"]["expires_at"] == wire_time(core.now + timedelta(minutes=1))


def test_the_configuration_in_force_already_is_applied_and_makes_no_version() -> None:
    core = shop()

    assert core.applied("Merchant.Configure", config=config(), actor="admin")["effects"]["version"] == 1


def test_an_expected_version_compares_and_sets() -> None:
    core = shop()
    later = config(late_close="debit")

    assert core.refused("Merchant.Configure", expected_version=2, config=later, actor="admin") == "version_conflict"
    result = core.applied("Merchant.Configure", expected_version=1, config=later, actor="admin")
    assert result["effects"]["version"] == 2
    assert core.refused("Merchant.Configure", expected_version=1, config=config(), actor="admin") == "version_conflict"


@pytest.mark.parametrize(
    ("receipt", "credit_note", "fields"),
    [
        ("C", "R", ["config.receipt_series_prefix", "config.credit_note_series_prefix"]),
        ("C", "CN", ["config.receipt_series_prefix"]),
        ("INV", "R", ["config.credit_note_series_prefix"]),
    ],
)
def test_a_series_never_becomes_the_other_documents(receipt: str, credit_note: str, fields: list[str]) -> None:
    core = shop()
    changed = config(receipt_series_prefix=receipt, credit_note_series_prefix=credit_note)

    result = core.do("Merchant.Configure", config=changed, actor="admin")

    assert (result["error"]["code"], result["error"]["details"]) == ("immutable", {"fields": fields})


def test_a_new_prefix_and_one_of_its_own_from_before_are_taken() -> None:
    core = shop()

    for receipt, credit_note in (("INV", "C"), ("INV", "CN"), ("R", "C")):
        changed = config(receipt_series_prefix=receipt, credit_note_series_prefix=credit_note)
        core.applied("Merchant.Configure", config=changed, actor="admin")

    later = config(receipt_series_prefix="CN", credit_note_series_prefix="C")
    assert core.refused("Merchant.Configure", config=later, actor="admin") == "immutable"


def test_an_open_operation_keeps_the_deadline_it_was_opened_with() -> None:
    core = shop()
    core.applied("Operation.Open", **opening())
    core.applied("Merchant.Configure", config=config(operation_timeout_minutes=1), actor="admin")
    core.wait(minutes=2)

    assert core.refused("Operation.Expire", user_id="u", operation_id="op-1") == "not_due"


def test_a_role_is_assigned_replaced_and_revoked() -> None:
    core = shop()

    assert core.applied("UserRole.Assign", subject="s", role="support", actor="a")["effects"]["role"] == "support"
    core.applied("UserRole.Assign", subject="s", role="admin", actor="a")
    assert list(core.roles.values()) == ["admin"]
    core.applied("UserRole.Revoke", subject="s", role="support", actor="a")
    assert list(core.roles.values()) == ["admin"]
    assert core.applied("UserRole.Revoke", subject="s", role="admin", actor="a")["effects"] == {"subject": "s"}
    assert core.roles == {}


def test_a_role_given_after_an_erasure_does_not_depend_on_where_batches_end() -> None:
    outcomes = []
    for in_one_batch in (True, False):
        core = shop()
        give(core, 1)
        erase = core.message("User.Erase", admin(request_id="e", user_id="u"))
        assign = core.message("UserRole.Assign", {"subject": "u", "role": "support", "actor": "admin"})
        results = core.batch([erase, assign]) if in_one_batch else core.send(erase) + core.send(assign)
        outcomes.append(([result["outcome"] for result in results], core.roles))

    assert outcomes[0] == outcomes[1]
