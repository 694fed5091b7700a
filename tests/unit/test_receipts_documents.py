"""Receipts, credit notes and corrections: tax, parts that sum, numbering (spec §5)."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from babel.numbers import get_currency_precision
from hypothesis import given
from hypothesis import strategies as st

from receipts.model import Archive, Draft, Issuer, Series, credited_status, published, verify_series
from receipts.tax import included_tax
from schemas.money import EXPONENTS, format_amount, from_minor, to_minor
from schemas.payloads import Buyer, MerchantConfig, SnapshotTax
from tests.core import config

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
VAT = config(
    tax_regime="vat",
    vat_rates=[
        {"country": "AM", "rate": "20"},
        {"country": "DE", "rate": "19", "valid_to": "2026-07-01T00:00:00Z"},
        {"country": "DE", "rate": "16", "valid_from": "2026-07-01T00:00:00Z"},
        {"country": "CH", "rate": "0", "category": "AE"},
        {"country": "*", "rate": "7.7"},
    ],
)


class Office:
    """Issues documents as the service does, at any time on the clock."""

    def __init__(self, settings: dict[str, Any], clock: datetime = NOON) -> None:
        self.config = MerchantConfig.model_validate(settings)
        self.clock = clock
        self.series: dict[str, Series] = {}
        self.archive = Archive()
        self.chains: dict[str, list[tuple[str, bytes]]] = {}

    def issue(self, kind: str, amount: Decimal, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": kind,
            "command": b"",
            "external_ref": "pay-1",
            "account_id": 1,
            "lot_id": "lot",
            "currency": "USD",
            "amount": amount,
            "country": "AM",
            "facts": {},
        }
        draft = Draft(**(values | changes))
        prefix = self.config.receipt_series_prefix if kind == "receipt" else self.config.credit_note_series_prefix
        series = self.series.setdefault(prefix, Series(prefix, 0, 1, LONG_AGO))
        document, _ = Issuer(self.config, 1, self.clock, False).issue(draft, series, self.archive)
        self.chains.setdefault(prefix, []).append((document.body, document.hash))
        body: dict[str, Any] = json.loads(document.body)
        return body

    def credit(self, amount: Decimal, key: str, **changes: Any) -> dict[str, Any]:
        return self.issue("credit_note", amount, facts={"reversal_key": key}, **changes)

    def correct(self, amount: Decimal, key: str, **changes: Any) -> dict[str, Any]:
        return self.issue("correction", amount, facts={"reversal_key": key}, **changes)


def figures(body: dict[str, Any]) -> tuple[Decimal, Decimal, Decimal]:
    tax = body["tax"]
    return Decimal(tax["net"]), Decimal(tax["tax"]), Decimal(tax["gross"])


RATES = st.decimals(0, 100, places=3)
CURRENCIES = st.sampled_from(sorted(EXPONENTS))


@given(minor=st.integers(1, 10**12), rate=RATES, currency=CURRENCIES)
def test_the_tax_in_an_amount_is_rounded_half_up_and_net_and_tax_are_the_gross(
    minor: int, rate: Decimal, currency: str
) -> None:
    gross = from_minor(minor, currency)

    tax = to_minor(included_tax(gross, rate, currency), currency)

    # tax = ⌊gross·r / (100 + r) + ½⌋ in whole numbers, the rate in thousandths of a percent
    thousandths = int(rate * 1000)
    divisor = 100_000 + thousandths
    assert tax == (2 * minor * thousandths + divisor) // (2 * divisor)
    assert 0 <= tax <= minor
    office = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": str(rate)}]))
    net, shown, whole = figures(office.issue("receipt", gross, currency=currency))
    assert net + shown == whole == gross
    assert shown == from_minor(tax, currency)


@given(minor=st.integers(1, 10**7), rate=RATES, cuts=st.lists(st.integers(1, 10**7), max_size=12), currency=CURRENCIES)
def test_credit_notes_in_any_number_of_parts_sum_exactly_to_the_receipt(
    minor: int, rate: Decimal, cuts: list[int], currency: str
) -> None:
    office = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": str(rate)}]))
    receipt = office.issue("receipt", from_minor(minor, currency), currency=currency)
    edges = sorted({cut for cut in cuts if cut < minor} | {0, minor})
    totals = [Decimal(0), Decimal(0), Decimal(0)]

    for number, (before, after) in enumerate(pairwise(edges)):
        note = office.credit(from_minor(after - before, currency), f"refund:{number}", currency=currency)
        net, tax, gross = figures(note)
        assert net + tax == gross == from_minor(after - before, currency)
        assert net >= 0
        assert tax >= 0
        totals = [a + b for a, b in zip(totals, (net, tax, gross), strict=True)]
        assert all(part <= whole for part, whole in zip(totals, figures(receipt), strict=True))
        assert note["receipt_number"] == receipt["receipt_number"]

    assert tuple(totals) == figures(receipt)


@given(
    minor=st.integers(2, 10_000),
    rate=st.sampled_from([Decimal(20), Decimal("7.7"), Decimal(100), Decimal("0.5")]),
    steps=st.lists(st.tuples(st.integers(1, 5_000), st.booleans()), min_size=1, max_size=8),
)
def test_corrections_restore_and_the_standing_notes_still_sum_exactly(
    minor: int, rate: Decimal, steps: list[tuple[int, bool]]
) -> None:
    office = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": str(rate)}]))
    receipt = office.issue("receipt", from_minor(minor, "USD"))
    standing: dict[str, dict[str, Any]] = {}
    left = minor
    for number, (wanted, won) in enumerate([*steps, (minor, False)]):
        amount = min(wanted, left)
        if not amount:
            break
        key = f"chargeback:{number}"
        note = office.credit(from_minor(amount, "USD"), key)
        assert Decimal(note["tax"]["tax"]) >= 0, "a credit note with a negative tax"
        assert Decimal(note["tax"]["net"]) >= 0, "a credit note with a negative net"
        if won:
            correction = office.correct(from_minor(amount, "USD"), key)
            assert correction["tax"] == note["tax"]
            assert correction["corrects"] == note["number"]
        else:
            standing[key] = note
            left -= amount
    if left:
        standing["rest"] = office.credit(from_minor(left, "USD"), "rest")

    sums = [sum(column) for column in zip(*(figures(note) for note in standing.values()), strict=True)]
    assert tuple(sums) == figures(receipt)
    assert credited_status(office.archive.bodies["pay-1"]) == "credited"


def test_standing_notes_never_have_a_negative_tax_after_a_correction() -> None:
    # 10.00 holds 0.20 of tax, so 0.20 holds 0.4 cents and 0.40 holds 0.8: the second note has a whole cent.
    office = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": "2.04"}]))
    office.issue("receipt", Decimal("10.00"))
    assert [office.credit(Decimal("0.20"), key)["tax"]["tax"] for key in "ab"] == ["0.00", "0.01"]
    office.correct(Decimal("0.20"), "a")

    note = office.credit(Decimal("0.01"), "c")

    assert Decimal(note["tax"]["tax"]) >= 0


# Regimes and rates


@pytest.mark.parametrize(
    ("country", "clock", "category", "rate", "tax"),
    [
        ("AM", NOON, "S", "20", "20.00"),
        ("DE", NOON, "S", "19", "19.16"),
        ("DE", datetime(2026, 6, 30, 23, 59, 59, tzinfo=UTC), "S", "19", "19.16"),
        ("DE", datetime(2026, 7, 1, tzinfo=UTC), "S", "16", "16.55"),
        ("US", NOON, "S", "7.7", "8.58"),
        ("CH", NOON, "AE", "0", "0.00"),
    ],
)
def test_vat_is_that_of_the_snapshot_s_country_with_a_default(
    country: str, clock: datetime, category: str, rate: str, tax: str
) -> None:
    body = Office(VAT, clock).issue("receipt", Decimal("120.00"), country=country)

    (line,) = body["tax"]["lines"]
    assert (line["category"], line["rate"], line["tax"]) == (category, rate, tax)
    assert body["tax"]["regime"] == "vat"


@pytest.mark.parametrize("regime", ["turnover", "none"])
def test_without_vat_there_is_a_note_and_no_tax_line(regime: str) -> None:
    body = Office(config(tax_regime=regime, tax_status_note="not a payer")).issue("receipt", Decimal("120.00"))

    assert body["tax"]["lines"] == []
    assert (body["tax"]["tax"], body["tax"]["net"]) == ("0.00", "120.00")
    assert body["tax"]["note"] == "not a payer"


def test_a_rate_of_zero_is_zero_rated_and_not_out_of_scope_unless_told() -> None:
    body = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": "0"}])).issue("receipt", Decimal(1))

    assert body["tax"]["lines"][0]["category"] == "Z"


def test_a_rate_of_zero_is_zero_rated_also_when_the_configuration_calls_it_standard() -> None:
    rates = [{"country": "*", "rate": "0", "category": "S"}]
    body = Office(config(tax_regime="vat", vat_rates=rates)).issue("receipt", Decimal(1))

    assert body["tax"]["lines"][0]["category"] == "Z"


def test_a_country_without_any_rate_is_not_called_out_of_scope_by_ourselves() -> None:
    # Spec §5: "AE/E/O only where config or upstream says so".
    body = Office(config(tax_regime="vat", vat_rates=[{"country": "AM", "rate": "20"}])).issue(
        "receipt", Decimal("120.00"), country="US"
    )

    assert not {line["category"] for line in body["tax"]["lines"]} & {"AE", "E", "O"}


def test_upstream_s_own_tax_is_used_and_a_difference_from_ours_is_flagged() -> None:
    upstream = SnapshotTax(type="VAT", rate=Decimal(10), amount=Decimal("10.91"))
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert tax["source"] == "upstream"
    assert (tax["lines"][0]["rate"], tax["tax"], tax["net"]) == ("10", "10.91", "109.09")
    assert tax["discrepancy"]["merchant_tax"] == "20.00"


def test_upstream_s_wrong_arithmetic_is_flagged_and_not_refused() -> None:
    upstream = SnapshotTax(type="VAT", rate=Decimal(20), amount=Decimal("24.00"))
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert tax["tax"] == "24.00"
    assert "arithmetic" in tax["discrepancy"]


@pytest.mark.parametrize("kind", ["Z", "E", "AE", "reverse_charge", "O"])
@pytest.mark.parametrize("amount", [None, Decimal(0)])
def test_a_rate_that_upstream_did_not_charge_is_not_taxed(kind: str, amount: Decimal | None) -> None:
    upstream = SnapshotTax(type=kind, rate=Decimal(20), amount=amount)
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert (tax["lines"][0]["rate"], tax["tax"], tax["net"]) == ("0", "0.00", "120.00")
    assert tax["discrepancy"] == {"merchant_tax": "20.00"}


def test_a_tax_that_upstream_s_category_does_not_have_is_flagged() -> None:
    upstream = SnapshotTax(type="AE", rate=Decimal(20), amount=Decimal("20.00"))
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert tax["tax"] == "20.00"
    assert tax["discrepancy"] == {"arithmetic": {"rate_gives": "0.00"}}


def test_upstream_s_tax_that_is_ours_is_not_flagged() -> None:
    upstream = SnapshotTax(type="VAT", rate=Decimal(20), amount=Decimal("20.00"))

    assert "discrepancy" not in Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]


@pytest.mark.parametrize("kind", ["vat", "VAT", "S", "inclusive"])
def test_a_kind_of_tax_without_a_figure_is_taxed_at_the_merchant_s_rate(kind: str) -> None:
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=SnapshotTax(type=kind))["tax"]

    assert (tax["source"], tax["tax"], tax["lines"][0]["rate"]) == ("merchant", "20.00", "20")
    assert "discrepancy" not in tax


def test_a_turnover_tax_of_the_seller_is_no_tax_line() -> None:
    upstream = SnapshotTax(type="turnover", rate=Decimal(5), amount=Decimal("5.71"), note="turnover tax payer")
    tax = Office(config(tax_regime="turnover")).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert (tax["lines"], tax["tax"], tax["note"]) == ([], "0.00", "turnover tax payer")
    assert tax["discrepancy"] == {"merchant_tax": "0.00"}


def test_upstream_s_rate_of_zero_is_zero_rated() -> None:
    upstream = SnapshotTax(type="VAT", rate=Decimal(0))
    tax = Office(VAT).issue("receipt", Decimal("120.00"), upstream_tax=upstream)["tax"]

    assert (tax["lines"][0]["category"], tax["tax"]) == ("Z", "0.00")
    assert tax["discrepancy"] == {"merchant_tax": "20.00"}


def test_upstream_s_zero_tax_on_next_to_nothing_is_told_at_the_merchant_s_rate() -> None:
    upstream = SnapshotTax(type="VAT", amount=Decimal(0))
    tax = Office(VAT).issue("receipt", Decimal("0.02"), upstream_tax=upstream)["tax"]

    assert (tax["lines"][0]["category"], tax["lines"][0]["rate"], tax["tax"]) == ("S", "20", "0.00")


# Numbers


def numbers(time_zone: str, *clocks: datetime, prefix: str = "R") -> list[str]:
    office = Office(config(time_zone=time_zone, receipt_series_prefix=prefix))
    found = []
    for reference, clock in enumerate(clocks):
        office.clock = clock
        found.append(office.issue("receipt", Decimal(1), external_ref=str(reference))["number"])
    return found


@pytest.mark.parametrize(
    ("time_zone", "hours"), [("Asia/Yerevan", 4), ("Etc/GMT+8", -8), ("UTC", 0), ("Pacific/Kiritimati", 14)]
)
def test_the_year_of_a_number_is_that_of_the_merchant_s_own_clock(time_zone: str, hours: int) -> None:
    midnight = datetime(2027, 1, 1, tzinfo=UTC) - timedelta(hours=hours)
    instant = timedelta(microseconds=1)

    assert numbers(time_zone, midnight - instant, midnight - instant, midnight, midnight + instant) == [
        "R-2026-0001",
        "R-2026-0002",
        "R-2027-0001",
        "R-2027-0002",
    ]


@pytest.mark.parametrize("time_zone", ["Europe/Berlin", "America/New_York"])
def test_a_change_to_or_from_summer_time_changes_no_number(time_zone: str) -> None:
    zone = ZoneInfo(time_zone)
    clocks = [datetime(2026, month, day, 3, tzinfo=zone).astimezone(UTC) for month in (3, 10, 11) for day in (1, 8, 29)]

    assert numbers(time_zone, *clocks) == [f"R-2026-{n:04d}" for n in range(1, 10)]


@given(
    seconds=st.lists(st.integers(-40_000_000, 80_000_000), min_size=1, max_size=30),
    time_zone=st.sampled_from(["Asia/Yerevan", "Etc/GMT+8", "Europe/Berlin", "Pacific/Apia"]),
)
def test_numbers_are_gapless_and_times_never_go_back_whatever_the_clock_does(
    seconds: list[int], time_zone: str
) -> None:
    office = Office(config(time_zone=time_zone))
    expected_year, expected, last = 0, 0, LONG_AGO
    for reference, offset in enumerate(seconds):
        office.clock = NOON + timedelta(seconds=offset)
        body = office.issue("receipt", Decimal(1), external_ref=str(reference))
        issued_at = datetime.fromisoformat(body["issued_at"])
        assert issued_at == max(last, office.clock)
        year = max(expected_year, issued_at.astimezone(ZoneInfo(time_zone)).year)
        expected = expected + 1 if year == expected_year else 1
        assert body["number"] == f"R-{year}-{expected:04d}"
        expected_year, last = year, issued_at
    assert verify_series(office.chains["R"]) is None


def test_a_time_zone_that_moves_back_over_new_year_does_not_reopen_the_old_year() -> None:
    office = Office(config(time_zone="Pacific/Kiritimati"), datetime(2026, 12, 31, 12, tzinfo=UTC))
    assert office.issue("receipt", Decimal(1), external_ref="a")["number"] == "R-2027-0001"
    office.config = MerchantConfig.model_validate(config(time_zone="Etc/GMT+8"))

    assert office.issue("receipt", Decimal(1), external_ref="b")["number"] == "R-2027-0002"


def test_numbers_have_at_least_four_digits_and_grow() -> None:
    office = Office(config())
    office.series["R"] = Series("R", 2026, 9999, LONG_AGO)

    found = [office.issue("receipt", Decimal(1), external_ref=str(n))["number"] for n in range(2)]

    assert found == ["R-2026-9999", "R-2026-10000"]


@pytest.mark.parametrize("prefix", ["R", "ARA-2026", "a.b_c-9"])
def test_a_prefix_may_be_of_many_forms(prefix: str) -> None:
    assert numbers("UTC", NOON, prefix=prefix) == [f"{prefix}-2026-0001"]


def test_credit_notes_and_corrections_share_a_series_that_is_not_the_receipts() -> None:
    office = Office(VAT)

    kinds = [
        office.issue("receipt", Decimal(10)),
        office.credit(Decimal(4), "a"),
        office.correct(Decimal(4), "a"),
        office.credit(Decimal(5), "b"),
        office.issue("receipt", Decimal(10), external_ref="pay-2"),
    ]

    assert [body["number"] for body in kinds] == [
        "R-2026-0001",
        "C-2026-0001",
        "C-2026-0002",
        "C-2026-0003",
        "R-2026-0002",
    ]


def test_prefixes_of_receipts_and_credit_notes_differ() -> None:
    with pytest.raises(ValueError, match="different series"):
        MerchantConfig.model_validate(config(credit_note_series_prefix="R"))


def test_the_first_break_of_a_series_is_named() -> None:
    office = Office(VAT)
    for reference in range(4):
        office.issue("receipt", Decimal(10), external_ref=str(reference))
    chain = office.chains["R"]

    body, hash_ = chain[2]
    assert verify_series([*chain[:2], (body.replace("10.00", "99.00"), hash_), chain[3]]) == 2
    assert verify_series([chain[0], *chain[2:]]) == 1


def test_a_document_snapshots_the_merchant_and_holds_no_buyer() -> None:
    body = Office(VAT).issue("receipt", Decimal(10), buyer=Buyer(name="Secret Name"), salt=b"salt")

    assert body["merchant"]["legal_name"] == "Ararat LLC"
    assert body["config_version"] == 1
    assert "Secret Name" not in json.dumps(body)
    whole = published(json.dumps(body), b"hash", "u", '{"name":"Secret Name"}')
    assert (whole["user_id"], whole["buyer"]) == ("u", {"name": "Secret Name"})


# Currencies

# Where the locale data of the Unicode consortium and ISO 4217 disagree about the minor unit.
DISAGREE = sorted(code for code, places in EXPONENTS.items() if get_currency_precision(code) != places)


def test_there_are_currencies_where_locale_data_and_iso_4217_disagree() -> None:
    assert len(DISAGREE) == 13
    assert "AMD" not in DISAGREE or EXPONENTS["AMD"] == 2


@pytest.mark.parametrize("currency", DISAGREE)
def test_amounts_have_the_places_of_iso_4217_and_not_those_of_locale_data(currency: str) -> None:
    office = Office(config(tax_regime="vat", vat_rates=[{"country": "*", "rate": "20"}]))
    smallest = from_minor(1, currency)

    body = office.issue("receipt", 7 * smallest, currency=currency)

    places = EXPONENTS[currency]
    assert body["amount"] == format_amount(7 * smallest, currency)
    assert len(body["amount"].partition(".")[2]) == places
    assert body["tax"]["tax"] == format_amount(smallest, currency)
