"""Products, prices and operation types: periods, effective dates, resolution (spec §1, §4)."""

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import START, Core, config, opening, operation_type, product, purchase, shop, wire_time

HOUR = timedelta(hours=1)


def at(hours: float) -> str:
    return wire_time(START + timedelta(hours=hours))


def create_type(core: Core, rate: str, hours: float | None = None, **changes: Any) -> dict[str, Any]:
    effective_at = None if hours is None else at(hours)
    members = operation_type(credits_per_unit=rate, effective_at=effective_at, **changes)
    return core.do("OperationType.CreateWithArchival", **members)


def archive_type(core: Core, hours: float | None = None, until: float | None = None) -> dict[str, Any]:
    members = {
        "effective_at": None if hours is None else at(hours),
        "archived_at": None if until is None else at(until),
    }
    return core.do("OperationType.Archive", operation_code="chat", actor="admin", **members)


def rate_at(core: Core, hours: float) -> str | None:
    """Ask the only way a caller can: open an operation then; None when no version is in force."""
    other = Core(config())
    other.books.catalog = core.books.catalog
    other.now = START + timedelta(hours=hours)
    result = other.do("Operation.Open", **opening())
    rate: str | None = result["effects"].get("credits_per_unit")
    return rate


def periods(core: Core) -> list[tuple[datetime, datetime | None]]:
    versions = core.books.catalog.operation_types["chat"]
    return [
        (v.effective_at, v.archived_at) for v in versions if v.archived_at is None or v.archived_at > v.effective_at
    ]


def code(result: dict[str, Any]) -> str | None:
    found: str | None = result.get("error", {}).get("code")
    return found


# Effective dates


@pytest.mark.parametrize("minutes_late", [0, 1, 5])
def test_a_date_at_most_five_minutes_in_the_past_means_now(minutes_late: float) -> None:
    core = shop()
    given_at = wire_time(START - timedelta(minutes=minutes_late))

    effects = core.applied("Product.Create", **product("Q", effective_at=given_at))["effects"]

    assert effects["effective_at"] == wire_time(START)


PAST = wire_time(START - timedelta(minutes=5, microseconds=1))
IN_THE_PAST: list[tuple[str, dict[str, Any]]] = [
    ("Product.Create", product("Q", effective_at=PAST)),
    ("Product.Create", product("Q", archived_at=PAST)),
    ("Product.Archive", {"product_code": "P", "archived_at": PAST, "actor": "a"}),
    (
        "ProductPrice.Create",
        {"product_code": "P", "country": "AM", "currency": "AMD", "amount": "1", "effective_at": PAST, "actor": "a"},
    ),
    (
        "ProductPrice.Archive",
        {"product_code": "P", "country": "*", "currency": "USD", "archived_at": PAST, "actor": "a"},
    ),
    ("OperationType.CreateWithArchival", operation_type(credits_per_unit="2", effective_at=PAST)),
    ("OperationType.Archive", {"operation_code": "chat", "archived_at": PAST, "actor": "a"}),
]


@pytest.mark.parametrize(("command_type", "payload"), IN_THE_PAST)
def test_a_date_further_in_the_past_is_refused(command_type: str, payload: dict[str, Any]) -> None:
    core = shop()
    core.wait(days=1)
    core.now = START
    before = core.books.catalog

    assert core.refused(command_type, **payload) == "effective_in_past"
    assert core.books.catalog == before


def test_an_omitted_date_is_the_moment_of_application() -> None:
    core = shop()
    core.wait(days=3)

    effects = core.applied("Product.Create", **product("Q"))["effects"]

    assert effects["effective_at"] == wire_time(core.now)
    assert [price["effective_at"] for price in effects["prices"]] == [wire_time(core.now)]


# Products


def test_a_product_never_changes() -> None:
    core = shop()

    assert core.refused("Product.Create", **product(credits=101)) == "idempotency_conflict"
    assert "replay_of" in core.applied("Product.Create", **product())


@pytest.mark.parametrize(
    "changes",
    [
        {"credits": 5.0},
        {"distribution": "free"},
        {"grant_policy": "manual_grant"},
        {"distribution": "grant", "prices": []},
        {"distribution": "grant", "grant_policy": "manual_grant"},
        {"prices": [{"country": "*", "currency": "USD", "amount": "1.001"}]},
        {"prices": [{"country": "*", "currency": "JPY", "amount": "1.5"}]},
        {"prices": [{"country": "ZZ", "currency": "USD", "amount": "1"}]},
        {"prices": [{"country": "*", "currency": "ZZZ", "amount": "1"}]},
    ],
)
def test_a_product_that_makes_no_sense_is_malformed(changes: dict[str, Any]) -> None:
    assert Core().refused("Product.Create", **product("Q", **changes)) == "malformed"


@pytest.mark.parametrize(
    "changes",
    [
        {"credits": 0},
        {"credits": -1},
        {"access_period_days": 0},
        {"prices": [{"country": "*", "currency": "USD", "amount": "0"}]},
    ],
)
def test_a_product_of_nothing_is_out_of_bounds(changes: dict[str, Any]) -> None:
    assert Core().refused("Product.Create", **product("Q", **changes)) == "limit_exceeded"


def test_only_the_end_of_a_product_changes_while_it_is_to_come() -> None:
    core = shop()
    archive = {"product_code": "P", "actor": "admin"}
    core.applied("Product.Archive", **archive, archived_at=at(10))

    core.applied("Product.Archive", **archive, archived_at=at(5))
    core.applied("Product.Archive", **archive, archived_at=at(7))
    core.now = START + 7 * HOUR
    assert core.refused("Product.Archive", **archive, archived_at=at(9)) == "immutable"
    assert core.refused("Product.Archive", **archive, archived_at=at(6)) == "effective_in_past"
    again = core.applied("Product.Archive", **archive)
    assert again["effects"]["archived_at"] == at(7)


def test_archiving_twice_as_of_a_moment_ago_is_applied_and_changes_nothing() -> None:
    core = shop()
    core.now = START + HOUR
    a_moment_ago = wire_time(core.now - timedelta(seconds=1))
    price = {"product_code": "P", "country": "*", "currency": "USD"}
    archives: list[tuple[str, dict[str, Any]]] = [
        ("OperationType.Archive", {"operation_code": "chat"}),
        ("ProductPrice.Archive", price),
        ("Product.Archive", {"product_code": "P"}),
    ]
    for command_type, names in archives:
        first, second = (
            core.applied(command_type, **names, archived_at=a_moment_ago, actor="admin")["effects"] for _ in range(2)
        )
        assert first["archived_at"] == second["archived_at"] == at(1)


def test_archiving_what_nobody_made_is_refused() -> None:
    core = shop()

    assert core.refused("Product.Archive", product_code="Q", actor="admin") == "unknown_product"
    assert core.refused("OperationType.Archive", operation_code="x", actor="admin") == "unknown_operation_type"


def test_a_product_is_sold_from_its_beginning_until_just_before_its_end() -> None:
    core = Core()
    core.applied("Product.Create", **product(effective_at=at(1), archived_at=at(2)))
    core.now = START + 10 * HOUR
    cases = {0.999: "product_not_active", 1: None, 1.999: None, 2: "product_not_active"}

    for hours, expected in cases.items():
        result = core.do("Purchase.Settled", **purchase(external_ref=f"at {hours}", order_placed_at=at(hours)))
        assert code(result) == expected, hours


# Prices


PRICES = [
    {"country": "*", "currency": "USD", "amount": "10.00"},
    {"country": "*", "currency": "EUR", "amount": "9.00"},
    {"country": "AM", "currency": "AMD", "amount": "4000.00"},
    {"country": "DE", "currency": "EUR", "amount": "8.50"},
    {"country": "DE", "currency": "USD", "amount": "11.00"},
]
RESOLVED = [
    ("US", "USD", "10.00", None),
    ("US", "EUR", "9.00", None),
    ("US", "AMD", "4000.00", "price_mismatch"),
    ("AM", "AMD", "4000.00", None),
    # Armenia has rows of its own, so the rows for everywhere else do not count there, whatever the currency.
    ("AM", "USD", "10.00", "price_mismatch"),
    ("DE", "EUR", "8.50", None),
    ("DE", "USD", "11.00", None),
    ("DE", "EUR", "9.00", "price_mismatch"),
    ("DE", "USD", "10.00", "price_mismatch"),
]


@pytest.mark.parametrize(("country", "currency", "amount", "expected"), RESOLVED)
def test_a_country_s_own_rows_count_if_it_has_any_else_those_for_everywhere(
    country: str, currency: str, amount: str, expected: str | None
) -> None:
    core = Core()
    core.applied("Product.Create", **product(prices=PRICES))

    result = core.do("Purchase.Settled", **purchase(country=country, currency=currency, amount=amount))

    assert code(result) == expected


def test_own_rows_that_ended_do_not_count_and_without_any_row_it_is_not_for_sale() -> None:
    core = Core()
    core.applied("Product.Create", **product(prices=PRICES))
    core.wait(hours=1)
    for row in ({"country": "AM", "currency": "AMD"}, {"country": "*", "currency": "USD"}):
        core.applied("ProductPrice.Archive", product_code="P", actor="a", **row)
    core.wait(hours=1)

    def bought(reference: str, **snapshot: str) -> str | None:
        terms = purchase(external_ref=reference, order_placed_at=at(1), **snapshot)
        return code(core.do("Purchase.Settled", **terms))

    assert bought("a", country="AM", currency="EUR", amount="9.00") is None
    core.applied("ProductPrice.Archive", product_code="P", country="*", currency="EUR", archived_at=at(2), actor="a")
    core.wait(hours=1)
    late = purchase(external_ref="b", country="US", currency="EUR", amount="9.00", order_placed_at=at(2))
    assert code(core.do("Purchase.Settled", **late)) == "not_for_sale"


def test_prices_of_one_country_and_currency_never_overlap() -> None:
    core = shop()
    price = {"product_code": "P", "country": "*", "currency": "USD", "actor": "admin"}

    assert core.refused("ProductPrice.Create", **price, amount="12.00") == "period_overlap"
    assert core.refused("ProductPrice.Create", **price, amount="12.00", effective_at=at(5)) == "period_overlap"
    core.applied("ProductPrice.Archive", **price, archived_at=at(5))
    assert core.refused("ProductPrice.Create", **price, amount="12.00", effective_at=at(4.99)) == "period_overlap"
    core.applied("ProductPrice.Create", **price, amount="12.00", effective_at=at(5))
    # Longer than until the next one begins it cannot be made again.
    assert core.refused("ProductPrice.Archive", **price, archived_at=at(6)) == "period_overlap"
    # One that is still to come is withdrawn by its name, the moment it would begin.
    withdrawn = core.applied("ProductPrice.Archive", **price, effective_at=at(5))["effects"]
    assert withdrawn["archived_at"] == withdrawn["effective_at"]
    core.applied("ProductPrice.Archive", **price, archived_at=at(6))


def test_the_price_in_force_already_is_applied_and_changes_nothing() -> None:
    core = shop()
    core.wait(hours=1)
    before = core.books.catalog

    again = {"product_code": "P", "country": "*", "currency": "USD", "amount": "10", "actor": "another"}
    result = core.applied("ProductPrice.Create", **again)

    assert result["effects"]["effective_at"] == wire_time(START)
    assert core.books.catalog == before


def test_a_grant_product_gets_no_price() -> None:
    core = shop()
    core.applied("Product.Create", **product("W", distribution="grant", grant_policy="manual_grant", prices=...))

    result = core.do("ProductPrice.Create", product_code="W", country="*", currency="USD", amount="1", actor="a")

    assert result["outcome"] == "rejected"


# Operation types


def test_a_new_version_ends_the_active_one_at_that_moment() -> None:
    core = shop()
    core.wait(hours=1)

    effects = create_type(core, "2")["effects"]

    assert effects["effective_at"] == at(1)
    assert "archived_at" not in effects
    assert periods(core) == [(START, START + HOUR), (START + HOUR, None)]


def test_a_new_version_ends_where_one_already_scheduled_begins() -> None:
    core = shop()
    create_type(core, "3", 10)

    effects = create_type(core, "2", 5)["effects"]

    assert effects["archived_at"] == at(10)
    assert [rate_at(core, hours) for hours in (0, 4.9, 5, 9.9, 10, 99)] == ["1", "1", "2", "2", "3", "3"]


def test_the_same_effective_at_twice_is_an_overlap() -> None:
    core = shop()
    create_type(core, "3", 10)

    assert code(create_type(core, "4", 10)) == "period_overlap"
    assert rate_at(core, 10) == "3"


def test_the_version_scheduled_already_is_applied_and_changes_nothing() -> None:
    core = shop()
    create_type(core, "3", 10)
    before = core.books.catalog

    assert create_type(core, "3.0", 10, actor="another")["outcome"] == "applied"
    assert core.books.catalog == before


def test_a_version_still_to_come_is_withdrawn_and_the_one_before_goes_on() -> None:
    core = shop()
    create_type(core, "2", 5)
    create_type(core, "3", 10)

    assert archive_type(core, 5)["outcome"] == "applied"

    assert [rate_at(core, hours) for hours in (0, 5, 9.9, 10)] == ["1", "1", "1", "3"]
    assert archive_type(core, 10)["outcome"] == "applied"
    assert [rate_at(core, hours) for hours in (0, 5, 10, 99)] == ["1", "1", "1", "1"]


def test_archiving_the_active_version_leaves_the_scheduled_one_standing() -> None:
    core = shop()
    create_type(core, "2", 5)
    core.wait(hours=1)

    assert archive_type(core)["effects"]["archived_at"] == at(1)

    assert [rate_at(core, hours) for hours in (0.9, 1, 4.9, 5)] == ["1", None, None, "2"]


def test_a_version_ends_at_a_moment_to_come_but_not_inside_the_next_one() -> None:
    core = shop()
    create_type(core, "2", 5)

    assert code(archive_type(core, until=6)) == "period_overlap"
    assert archive_type(core, until=3)["outcome"] == "applied"
    assert [rate_at(core, hours) for hours in (2.9, 3, 5)] == ["1", None, "2"]


def test_a_withdrawn_version_made_again_is_not_answered_as_in_force() -> None:
    # Spec §7: "setting what is already in force is applied and changes nothing" - but a withdrawn one is not in force.
    core = shop()
    create_type(core, "2", 5)
    archive_type(core, 5)

    result = create_type(core, "2", 5)

    assert result["outcome"] == "rejected" or rate_at(core, 5) == "2"


def test_a_version_cut_short_and_made_again_is_not_answered_as_in_force_for_ever() -> None:
    core = shop()
    archive_type(core, until=3)

    result = create_type(core, "1")

    assert result["outcome"] == "rejected" or rate_at(core, 4) == "1"


def test_a_code_begins_again_after_its_version_was_archived() -> None:
    core = shop()
    core.wait(hours=1)
    archive_type(core)
    core.wait(hours=1)

    assert create_type(core, "7")["outcome"] == "applied"
    assert [rate_at(core, hours) for hours in (0.5, 1.5, 2)] == ["1", None, "7"]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [("23", "3"), ("232", "2"), ("2323", "3"), ("2-", None), ("23-", None), ("2-3", "3"), ("2-2", "2"), ("1-", None)],
)
def test_changes_of_one_batch_take_effect_in_their_order(changes: str, rate: str | None) -> None:
    core = shop()
    core.wait(hours=1)
    archive = {"operation_code": "chat", "actor": "admin"}

    results = core.batch(
        [
            core.message("OperationType.Archive", archive)
            if change == "-"
            else core.message("OperationType.CreateWithArchival", operation_type(credits_per_unit=change))
            for change in changes
        ]
    )

    assert {result["outcome"] for result in results} == {"applied"}
    assert rate_at(core, 2) == rate
    assert rate_at(core, 0.5) == "1"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "create", "create", "archive", "wait"]),
        st.integers(1, 9),
        st.one_of(st.none(), st.integers(0, 12)),
        st.one_of(st.none(), st.integers(0, 12)),
    ),
    max_size=12,
)


@given(STEPS)
def test_versions_of_a_code_never_overlap_whatever_is_asked(
    steps: list[tuple[str, int, int | None, int | None]],
) -> None:
    core = shop()
    for action, number, hours, until in steps:
        match action:
            case "create":
                create_type(core, str(number), hours)
            case "archive":
                archive_type(core, hours, until)
            case _:
                core.wait(minutes=10 * number)
        found = sorted(periods(core))
        for (_, end), (start, _) in pairwise(found):
            assert end is not None
            assert end <= start
