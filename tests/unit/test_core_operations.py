"""Operation types, and operations from open to close (spec §4)."""

from datetime import timedelta
from typing import Any

import pytest

from tests.core import START, Core, admin, closing, config, give, opening, operation_type, shop, take, wire_time


def opened(settings: dict[str, Any] | None = None, credits: int = 100) -> Core:
    core = shop(settings)
    give(core, credits, days=300)
    core.applied("Operation.Open", **opening())
    return core


def test_an_open_captures_the_rate_and_lasts_the_configured_minutes() -> None:
    core = shop(config(operation_timeout_minutes=30))
    core.applied(
        "OperationType.CreateWithArchival", **operation_type("img", credits_per_unit="2.50", resource_unit="image")
    )

    result = core.applied("Operation.Open", **opening(operation_code="img"))

    assert result["effects"] == {
        "operation_id": "op-1",
        "expires_at": wire_time(START + timedelta(minutes=30)),
        "credits_per_unit": "2.5",
        "resource_unit": "image",
    }


def test_a_user_needs_no_sign_up_and_no_credits_to_open() -> None:
    core = shop()

    result = core.applied("Operation.Open", **opening())

    assert (result["user_seq"], result["balance"], result["debt"]) == (0, 0, 0)


def test_a_close_writes_one_debit_with_the_whole_context() -> None:
    core = opened()

    result = core.applied("Operation.RecordAndClose", **closing(resource_amount="12.5", workflow_id="w"))

    assert result["effects"] == {"operation_id": "op-1", "entry_id": core.name_entry("u", 2), "credits": 13}
    entry = core.history("u")[-1]
    assert (entry.amount, entry.reason, entry.operation_type) == (-13, "debit", "chat")
    assert (str(entry.resource_amount), entry.resource_unit) == ("12.5", "token")
    assert (entry.operation_id, entry.workflow_id) == ("op-1", "w")


CHARGES = [
    # credits per unit, minimum, resource amount, credits
    ("1", 1, "1", 1),
    ("0.000001", 1, "1", 1),
    ("0.000001", 1, "1000000", 1),
    ("0.000001", 1, "1000000.000001", 2),
    ("0.1", 1, "30", 3),
    ("0.1", 1, "30.000001", 4),
    ("0.1", 5, "30", 5),
    ("0.1", 5, "50", 5),
    ("0.1", 5, "50.1", 6),
    ("0.333333", 1, "3", 1),
    ("0.333334", 1, "3", 2),
    ("999999.999999", 1, "0.000001", 1),
    ("999999.999999", 1, "999999.999999", 999999999999),
    ("1000000", 1, "999999.999999", 999999999999),
]


@pytest.mark.parametrize(("rate", "minimum", "amount", "credits"), CHARGES)
def test_a_charge_is_the_exact_product_rounded_up_and_at_least_the_minimum(
    rate: str, minimum: int, amount: str, credits: int
) -> None:
    core = shop()
    terms = operation_type("exact", credits_per_unit=rate, minimum_charge=minimum)
    core.applied("OperationType.CreateWithArchival", **terms)
    core.applied("Operation.Open", **opening(operation_code="exact"))

    result = core.applied("Operation.RecordAndClose", **closing(resource_amount=amount))

    assert result["effects"]["credits"] == credits


def test_a_rate_that_changes_during_an_operation_does_not_change_its_charge() -> None:
    core = opened()
    core.wait(minutes=1)
    core.applied("OperationType.CreateWithArchival", **operation_type(credits_per_unit="50", resource_unit="page"))

    result = core.wait(minutes=1).applied("Operation.RecordAndClose", **closing(resource_amount="7"))

    assert result["effects"]["credits"] == 7
    following = core.applied("Operation.Open", **opening("op-2"))
    assert following["effects"]["credits_per_unit"] == "50"


def test_a_scheduled_rate_is_in_force_from_its_moment_without_any_job() -> None:
    core = shop()
    later = START + timedelta(hours=1)
    core.applied(
        "OperationType.CreateWithArchival", **operation_type(credits_per_unit="3", effective_at=wire_time(later))
    )

    core.now = later - timedelta(microseconds=1)
    assert core.applied("Operation.Open", **opening("a", "a"))["effects"]["credits_per_unit"] == "1"
    core.now = later
    assert core.applied("Operation.Open", **opening("b", "b"))["effects"]["credits_per_unit"] == "3"


def test_refusals_of_an_open_come_in_the_order_told() -> None:
    core = shop()
    core.applied("Operation.Open", **opening("first"))
    take(core, 1)
    core.applied("Account.Lock", **admin(user_id="u"))

    assert core.refused("Operation.Open", **opening("a", operation_code="nothing")) == "unknown_operation_type"
    assert core.refused("Operation.Open", **opening("b")) == "account_locked"
    core.applied("Account.Unlock", **admin(user_id="u"))
    assert core.refused("Operation.Open", **opening("c")) == "operation_already_open"
    core.applied("Operation.Cancel", user_id="u", operation_id="first")
    assert core.refused("Operation.Open", **opening("d")) == "insufficient_balance"
    give(core, 1)
    assert core.do("Operation.Open", **opening("e"))["outcome"] == "applied"


def test_the_refusal_of_a_second_open_tells_which_one_is_open() -> None:
    core = opened()
    core.wait(minutes=5)

    error = core.do("Operation.Open", **opening("op-2"))["error"]

    assert error["code"] == "operation_already_open"
    assert error["details"] == {
        "operation_id": "op-1",
        "operation_code": "chat",
        "opened_at": wire_time(START),
        "seconds_remaining": 600,
    }


def test_every_user_has_a_slot_of_his_own() -> None:
    core = opened()

    assert core.do("Operation.Open", **opening("op-2", "v"))["outcome"] == "applied"


def test_a_balance_of_zero_opens_and_one_below_zero_does_not() -> None:
    core = shop()
    give(core, 5)
    take(core, 5)
    core.applied("Operation.Open", **opening("a"))
    core.applied("Operation.RecordAndClose", **closing("a"))

    assert core.figures("u") == (-1, 1)
    assert core.refused("Operation.Open", **opening("b")) == "insufficient_balance"


def test_a_lock_stops_opens_only_and_ends_by_itself() -> None:
    core = opened()
    until = START + timedelta(hours=1)
    core.applied("Account.Lock", **admin(user_id="u", until=wire_time(until)))

    assert core.do("Operation.RecordAndClose", **closing())["outcome"] == "applied"
    give(core, 1)
    core.now = until - timedelta(microseconds=1)
    assert core.refused("Operation.Open", **opening("a")) == "account_locked"
    core.now = until
    assert core.do("Operation.Open", **opening("b"))["outcome"] == "applied"


def test_locking_and_unlocking_what_is_so_already_is_applied_and_changes_nothing() -> None:
    core = opened()

    assert core.applied("Account.Unlock", **admin(user_id="u"))["effects"] == {"locked": False}
    first = core.applied("Account.Lock", **admin(user_id="u"))
    assert core.applied("Account.Lock", **admin(user_id="u"))["effects"] == first["effects"] == {"locked": True}


def test_unlocking_a_user_never_seen_opens_no_account() -> None:
    core = opened()

    unlocked = core.applied("Account.Unlock", **admin(user_id="nobody"))

    assert unlocked["effects"] == {"locked": False}
    assert "balance" not in unlocked


REFUSED_CLOSES = [
    ({"operation_id": "other"}, None),
    ({"user_id": "v"}, "operation_not_found"),
    ({"resource_unit": "page"}, "resource_unit_mismatch"),
    ({"resource_unit": "page", "workflow_id": "x"}, "resource_unit_mismatch"),
    ({"workflow_id": "x"}, "workflow_mismatch"),
]


@pytest.mark.parametrize(("changes", "code"), REFUSED_CLOSES)
def test_refusals_of_a_close(changes: dict[str, Any], code: str | None) -> None:
    core = shop()
    core.applied("Operation.Open", **opening(workflow_id="w"))

    results = core.send(core.message("Operation.RecordAndClose", closing() | changes))

    # A close of an operation nobody has opened waits for the open.
    assert [result["error"]["code"] for result in results] == ([code] if code else [])
    assert core.do("Operation.RecordAndClose", **closing(workflow_id="w"))["outcome"] == "applied"


def test_a_refused_close_leaves_the_operation_open_and_may_be_corrected() -> None:
    core = opened()
    message = core.message("Operation.RecordAndClose", closing(resource_unit="page"))
    (refused,) = core.send(message)

    (same,) = core.send(message)
    assert same == refused
    corrected = core.applied("Operation.RecordAndClose", **closing())
    assert corrected["effects"]["credits"] == 1


def test_the_open_s_workflow_is_used_else_the_close_s() -> None:
    core = opened()
    core.applied("Operation.RecordAndClose", **closing(workflow_id="of the close"))
    core.applied("Operation.Open", **opening("op-2", workflow_id="of the open"))
    core.applied("Operation.RecordAndClose", **closing("op-2"))

    assert [entry.workflow_id for entry in core.history("u")[1:]] == ["of the close", "of the open"]


def test_a_cancel_closes_without_a_debit() -> None:
    core = opened()

    result = core.applied("Operation.Cancel", user_id="u", operation_id="op-1", reason="no need")

    assert result["user_seq"] == 1
    assert core.do("Operation.Open", **opening("op-2"))["outcome"] == "applied"


def test_after_a_cancel_a_close_finds_nothing_open_and_the_reverse() -> None:
    core = opened()
    core.applied("Operation.Cancel", user_id="u", operation_id="op-1")
    assert core.refused("Operation.RecordAndClose", **closing()) == "operation_not_open"

    core.applied("Operation.Open", **opening("op-2"))
    core.applied("Operation.RecordAndClose", **closing("op-2"))
    assert core.refused("Operation.Cancel", user_id="u", operation_id="op-2") == "operation_not_open"


def test_another_user_can_neither_close_nor_cancel() -> None:
    core = opened()

    assert core.refused("Operation.RecordAndClose", **closing(user_id="v")) == "operation_not_found"
    assert core.refused("Operation.Cancel", user_id="v", operation_id="op-1") == "operation_not_found"


def late(core: Core, record_time_minutes: float, **changes: Any) -> dict[str, Any]:
    """Send a close that the broker took so many minutes after the open."""
    message = core.message("Operation.RecordAndClose", closing(**changes))
    message["record_time"] = START + timedelta(minutes=record_time_minutes)
    (result,) = core.send(message)
    return result


@pytest.mark.parametrize("policy", ["refuse", "debit"])
def test_a_close_taken_by_the_broker_in_time_is_debited_although_the_operation_timed_out(policy: str) -> None:
    core = opened(config(late_close=policy))
    core.wait(minutes=40)
    assert core.do("Operation.Open", **opening("op-2"))["time_effects"] == {"timed_out": ["op-1"]}

    result = late(core, 15)

    assert result["outcome"] == "applied"
    assert core.history("u")[-1].operation_id == "op-1"
    # The slot is the newer operation's and stays its own.
    assert core.refused("Operation.Open", **opening("op-3")) == "operation_already_open"


@pytest.mark.parametrize(("policy", "outcome"), [("refuse", "rejected"), ("debit", "applied")])
def test_a_close_taken_too_late_follows_the_policy_once_the_operation_timed_out(policy: str, outcome: str) -> None:
    core = opened(config(late_close=policy))
    core.wait(minutes=40)
    core.applied("Operation.Expire", user_id="u", operation_id="op-1")

    result = late(core, 15.001)

    assert result["outcome"] == outcome
    assert result.get("error", {}).get("code") == ("operation_timed_out" if policy == "refuse" else None)


@pytest.mark.parametrize("policy", ["refuse", "debit"])
def test_a_close_taken_too_late_is_accepted_while_the_operation_is_still_open(policy: str) -> None:
    core = opened(config(late_close=policy))
    core.wait(hours=40)

    assert late(core, 20 * 60)["outcome"] == "applied"


def test_a_close_refused_as_late_names_the_timeout_before_the_unit() -> None:
    core = opened()
    core.wait(minutes=40).applied("Operation.Expire", user_id="u", operation_id="op-1")

    assert late(core, 20, resource_unit="page")["error"]["code"] == "operation_timed_out"


def test_the_timeout_job_frees_the_slot_and_does_nothing_early() -> None:
    core = opened()

    core.now = START + timedelta(minutes=15) - timedelta(microseconds=1)
    assert core.refused("Operation.Expire", user_id="u", operation_id="op-1") == "not_due"
    core.now = START + timedelta(minutes=15)
    assert core.applied("Operation.Expire", user_id="u", operation_id="op-1")["effects"] == {"operation_id": "op-1"}
    assert core.account("u").open_operation is None
    assert len(core.history("u")) == 1


def test_only_an_open_times_an_overdue_operation_out() -> None:
    core = opened()
    core.wait(minutes=40)

    assert "time_effects" not in give(core, 1)
    assert core.account("u").open_operation == "op-1"


def test_an_overdue_operation_is_timed_out_by_an_open_that_is_refused_all_the_same() -> None:
    core = opened()
    core.wait(minutes=40)

    result = core.do("Operation.Open", **opening("op-2", operation_code="nothing"))

    assert result["outcome"] == "rejected"
    assert result["time_effects"] == {"timed_out": ["op-1"]}


def test_a_refused_open_is_final_for_its_operation_id() -> None:
    core = shop()
    take(core, 1)
    assert core.refused("Operation.Open", **opening()) == "insufficient_balance"
    give(core, 100)

    again = core.do("Operation.Open", **opening())

    assert again["error"]["code"] == "insufficient_balance"
    assert again["balance"] == -1
    assert "replay_of" in again
    assert core.refused("Operation.Open", **opening(workflow_id="other")) == "idempotency_conflict"
    assert core.refused("Operation.RecordAndClose", **closing()) == "operation_not_open"


def test_an_amount_beyond_the_ledger_s_range_is_refused_and_leaves_the_operation_open() -> None:
    core = opened()

    assert core.refused("Operation.RecordAndClose", **closing(resource_amount="1000000000.1")) == "limit_exceeded"
    assert core.do("Operation.RecordAndClose", **closing())["outcome"] == "applied"
