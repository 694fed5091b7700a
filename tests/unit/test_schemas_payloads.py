"""What each member of a payload accepts, and with which code the rest is refused."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from schemas.errors import Code
from schemas.payloads import COMMANDS, MerchantConfig
from schemas.topics import ALLOWED
from tests.unit.test_schemas_messages import CARD, TYPES, as_json, read, refusal, sample

SNAPSHOT: dict[str, Any] = sample("Purchase.Settled")["pricing_snapshot"]
CONFIG: dict[str, Any] = sample("Merchant.Configure")["config"]
HUGE = int("9" * 400)


def changes(*each: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return each


MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("Operation.Open", {"user_id": ...}),
    ("Operation.Open", {"user_id": None}),
    ("Operation.Open", {"user_id": ""}),
    ("Operation.Open", {"user_id": "u" * 129}),
    ("Operation.Open", {"user_id": "a\nb"}),
    ("Operation.Open", {"user_id": "a\x85b"}),
    ("Operation.Open", {"user_id": 5}),
    ("Operation.Open", {"user_id": ["u"]}),
    ("Operation.Open", {"operation_id": ...}),
    ("Operation.Open", {"workflow_id": ""}),
    ("Operation.Cancel", {"reason": "r" * 1001}),
    ("Grant.Apply", {"credits": 5.0}),
    ("Grant.Apply", {"credits": "5"}),
    ("Grant.Apply", {"credits": True}),
    ("Grant.Apply", {"credits": ..., "access_period_days": ...}),
    ("Grant.Apply", {"credits": ...}),
    ("Grant.Apply", {"access_period_days": ...}),
    ("Grant.Apply", {"product_code": "welcome"}),
    ("Grant.Apply", {"justification": ...}),
    ("Grant.Apply", {"justification": ""}),
    ("Grant.Apply", {"actor": ...}),
    ("Grant.Apply", {"actor": {"name": "n"}}),
    ("Adjustment.Apply", {"credits_delta": 10}),
    ("Adjustment.Apply", {"credits_delta": 1.5}),
    *(
        ("Operation.RecordAndClose", {"resource_amount": value})
        for value in (
            "1e3", "NaN", "Infinity", "+1", " 1", "1 ", "1.", ".5", "", "1_000", "1,5", "٣",
            "1.0000001", "1" + "0" * 41 + "x", 5, 1.5, True, ["1"],
        )
    ),
    ("Operation.RecordAndClose", {"resource_amount": "1." + "0" * 39}),
    *(
        ("Operation.RecordAndClose", {"completed_at": value})
        for value in (
            "2026-03-01", "2026-03-01T10:00:00", "2026-03-01 10:00:00Z", "2026-02-30T10:00:00Z", "2026-03-01T24:00:00Z",
            "2026-03-01T10:00:60Z", "2026-03-01T10:00:00+24:00", "2026-03-01T10:00:00+0400", "2026-03-01T10:00Z",
            "20260301T100000Z", "2026-W10-1T10:00:00Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-01:00", "2026-03-01T10:00:00.Z", "2026-03-01T10:00:00,5Z", 1772360130, "now", "",
        )
    ),
    # The driver knows them as infinities; one instant further in they are times like any other.
    *(
        (name, {field: value})
        for name, field in (("Operation.RecordAndClose", "completed_at"), ("Product.Archive", "archived_at"))
        for value in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.9999999Z", "9999-12-31T22:59:59.999999-01:00")
    ),
    *(
        ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | change})
        for change in changes(
            {"amount": "12000.001"}, {"amount": 12000}, {"amount": "1E4"},
            {"currency": "JPY", "amount": "100.5"}, {"currency": "XXX"}, {"currency": "XAU"}, {"currency": "XTS"},
            {"currency": "amd"}, {"currency": "ZZZ"}, {"currency": "AM"}, {"country": "am"}, {"country": "ZZ"},
            {"country": "*"}, {"country": "XK"}, {"country": "ARM"}, {"tax": "20"}, {"tax": {}},
            {"tax": {"type": "vat", "amount": "0.001"}}, {"tax": {"type": "vat", "rate": 20}},
        )
    ),
    ("Purchase.Settled", {"pricing_snapshot": ...}),
    ("Purchase.Settled", {"pricing_snapshot": []}),
    ("Purchase.Settled", {"buyer": "Ani"}),
    ("Purchase.Settled", {"buyer": {"country": "Armenia"}}),
    ("Refund.Apply", {"amount": "1.00001"}),
    ("Product.Create", {"distribution": "gift"}),
    ("Product.Create", {"grant_policy": "manual_grant"}),
    ("Product.Create", {"distribution": "grant"}),
    ("Product.Create", {"distribution": "grant", "grant_policy": "manual_grant"}),
    ("Product.Create", {"distribution": "grant", "prices": ...}),
    ("Product.Create", {"prices": [{"country": "AM", "currency": "AMD", "amount": "0.001"}]}),
    ("Product.Create", {"prices": [None]}),
    ("Product.Create", {"prices": {}}),
    ("Product.Create", {"archived_at": "2025-01-01T00:00:00Z"}),
    ("ProductPrice.Create", {"country": "**"}),
    ("ProductPrice.Create", {"amount": "1.001"}),
    ("OperationType.CreateWithArchival", {"credits_per_unit": "0.0000001"}),
    ("Merchant.Register", {"merchant_id": "Ararat"}),
    ("Merchant.Register", {"merchant_id": "a"}),
    ("Merchant.Register", {"merchant_id": "a" * 32}),
    ("Merchant.Register", {"merchant_id": "control"}),
    ("Merchant.Register", {"merchant_id": "ararat\n"}),
    ("Merchant.Register", {"simulated": 1}),
    ("UserRole.Assign", {"role": "root"}),
    ("Receipt.AttachFiscal", {"kind": "gift"}),
    ("Receipt.AttachFiscal", {"qr_url": "javascript:alert(1)"}),
    *(
        ("Merchant.Configure", {"config": {key: value for key, value in (CONFIG | change).items() if value is not ...}})
        for change in changes(
            {"legal_name": ...}, {"time_zone": "Mars/Olympus"}, {"time_zone": "../UTC"}, {"time_zone": ""},
            {"locale": "xx-YY"}, {"locale": ""}, {"locale": "hy/AM"}, {"country": "EU"}, {"tax_regime": "gst"},
            {"vat_rates": ...}, {"vat_rates": []},
            {"vat_rates": [{"country": "AM", "rate": "20", "category": "X"}]},
            {"vat_rates": [{"country": "AM", "rate": "20", "valid_from": "2026-13-01"}]},
            {"credit_note_series_prefix": "ARA"}, {"receipt_series_prefix": "-A"}, {"receipt_series_prefix": "a b"},
            {"receipt_series_prefix": "A" * 32}, {"receipt_series_prefix": "A\n"},
            {"late_close": "ask"}, {"refund_policy": {"shortfall": "loan"}},
            {"chargeback_policy": {"credit_note": "at_lost"}}, {"external_ref_patterns": {"card": "("}},
            {"external_ref_patterns": {"card": "a" * 201}}, {"external_ref_patterns": {"card": 5}},
            {"external_ref_patterns": {"card": "[[a]"}}, {"external_ref_patterns": {"card": r"(.)\1"}},
            {"external_ref_patterns": {"card": "x(?=y)"}}, {"registered_address": {"city": "Yerevan", "country": "AM"}},
        )
    ),
]  # fmt: skip

LIMIT_EXCEEDED: list[tuple[str, dict[str, Any]]] = [
    ("Grant.Apply", {"credits": 10**12 + 1}),
    ("Grant.Apply", {"credits": HUGE}),
    ("Grant.Apply", {"access_period_days": 36_501}),
    ("Adjustment.Apply", {"credits_delta": 0}),
    ("Adjustment.Apply", {"credits_delta": 10**12 + 1, "access_period_days": 1}),
    ("Adjustment.Apply", {"credits_delta": -(10**12) - 1}),
    ("Adjustment.Apply", {"credits_delta": -HUGE}),
    ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | {"amount": str(10**15)}}),
    ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | {"amount": "9" * 60}}),
    ("Refund.Apply", {"amount": str(10**15)}),
    ("Operation.RecordAndClose", {"resource_amount": "1000000000.000001"}),
    ("Operation.RecordAndClose", {"resource_amount": "9" * 5000}),
    ("OperationType.CreateWithArchival", {"credits_per_unit": "1000000.000001"}),
    ("OperationType.CreateWithArchival", {"minimum_charge": 10**12 + 1}),
    ("Clock.Advance", {"seconds": 10**10}),
    ("Merchant.Register", {"partitions": 65}),
    ("Merchant.Configure", {"config": CONFIG | {"retention_years": 101}}),
    ("Merchant.Configure", {"config": CONFIG | {"operation_timeout_minutes": 525_601}}),
    ("Grant.Apply", {"credits": 0}),
    ("Grant.Apply", {"credits": -1}),
    ("Grant.Apply", {"credits": -HUGE}),
    ("Grant.Apply", {"access_period_days": 0}),
    ("Refund.Apply", {"amount": "0"}),
    ("OperationType.CreateWithArchival", {"credits_per_unit": "0"}),
    ("OperationType.CreateWithArchival", {"minimum_charge": 0}),
    ("Merchant.Register", {"partitions": 0}),
    ("Merchant.Configure", {"expected_version": -1}),
    ("Clock.Advance", {"seconds": 0}),
    ("Clock.Advance", {"seconds": -5}),
    *(("Operation.RecordAndClose", {"resource_amount": value}) for value in ("0", "0.0", "-1", "-0.0000001")),
    *(
        ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | change})
        for change in changes(
            {"amount": "0"},
            {"amount": "-5"},
            {"tax": {"type": "vat", "rate": "101"}},
            {"tax": {"type": "vat", "rate": "-1"}},
        )
    ),
    *(
        ("Merchant.Configure", {"config": CONFIG | change})
        for change in changes(
            {"vat_rates": [{"country": "AM", "rate": "100.1"}]},
            {"retention_years": 0},
            {"operation_timeout_minutes": 0},
        )
    ),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("Operation.Open", {"workflow_id": None}),
    ("Operation.Open", {"user_id": "u" * 128}),
    ("Operation.Open", {"user_id": "Անի 🙂"}),
    ("Operation.Open", {"unknown": {"deep": [1, 2.5, None]}}),
    ("Operation.Open", {"unknown": HUGE}),
    ("Operation.Cancel", {"reason": "r" * 1000}),
    ("Grant.Apply", {"credits": 10**12, "access_period_days": 36_500}),
    ("Grant.Apply", {"credits": None, "access_period_days": None, "product_code": "welcome"}),
    ("Adjustment.Apply", {"credits_delta": 1, "access_period_days": 1}),
    ("Operation.RecordAndClose", {"resource_amount": "1000000000"}),
    ("Operation.RecordAndClose", {"resource_amount": "0.000001"}),
    ("Operation.RecordAndClose", {"resource_amount": "1.00000000000"}),
    ("Operation.RecordAndClose", {"completed_at": "2026-03-01t10:00:00z"}),
    ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | {"currency": "JPY", "amount": "100.000", "tax": None}}),
    ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | {"currency": "BHD", "amount": "1.005", "tax": None}}),
    ("Purchase.Settled", {"pricing_snapshot": SNAPSHOT | {"amount": str(10**15 - 1) + ".99"}}),
    ("Purchase.Settled", {"buyer": None}),
    ("Purchase.Settled", {"buyer": {}}),
    ("Refund.Apply", {"amount": None}),
    ("Product.Create", {"prices": None}),
    ("Product.Create", {"distribution": "grant", "grant_policy": "apply_on_signup", "prices": []}),
    ("OperationType.CreateWithArchival", {"credits_per_unit": "1000000"}),
    ("Merchant.Configure", {"config": CONFIG | {"tax_regime": "turnover", "vat_rates": None}}),
    ("Merchant.Configure", {"config": CONFIG | {"vat_rates": [{"country": "*", "rate": "0"}]}}),
    ("Merchant.Configure", {"config": CONFIG | {"locale": "en_GB", "time_zone": "UTC"}}),
]


@pytest.mark.parametrize(("name", "changes"), MALFORMED)
def test_what_is_not_as_the_contract_has_it_is_malformed(name: str, changes: dict[str, Any]) -> None:
    error = refusal(name, sample(name, **changes))

    assert error is not None
    assert error.code is Code.MALFORMED


@pytest.mark.parametrize(("name", "changes"), LIMIT_EXCEEDED)
def test_a_number_beyond_its_bound_exceeds_a_limit(name: str, changes: dict[str, Any]) -> None:
    error = refusal(name, sample(name, **changes))

    assert error is not None
    assert error.code is Code.LIMIT_EXCEEDED
    assert error.details["fields"]


@pytest.mark.parametrize(("name", "changes"), ACCEPTED)
def test_what_the_contract_allows_is_accepted(name: str, changes: dict[str, Any]) -> None:
    assert refusal(name, sample(name, **changes)) is None


def test_amounts_and_times_come_out_as_exact_decimals_and_utc() -> None:
    payload = read(as_json("Purchase.Settled", sample("Purchase.Settled")), "Purchase.Settled").payload

    assert payload.settled_at == datetime(2026, 3, 1, 10, 15, 42, tzinfo=UTC)
    assert payload.settled_at.tzinfo is UTC
    assert payload.pricing_snapshot.amount == Decimal(12000)
    assert payload.order_placed_at.microsecond == 123456


def test_a_fraction_of_a_microsecond_is_cut_off() -> None:
    changed = sample("Operation.RecordAndClose", completed_at="2026-03-01T10:00:00.123456999Z")

    payload = read(as_json("Operation.RecordAndClose", changed), "Operation.RecordAndClose").payload

    assert payload.completed_at.microsecond == 123456


def test_the_ceiling_of_a_resource_amount_is_the_configured_one() -> None:
    changed = sample("Operation.RecordAndClose", resource_amount="10.5")

    error = refusal("Operation.RecordAndClose", changed, resource_amount_max=Decimal(10))

    assert error is not None
    assert (error.code, error.details) == (Code.LIMIT_EXCEEDED, {"fields": ["resource_amount"]})


def test_defaults_stand_for_what_a_config_leaves_out() -> None:
    optional = (
        "operation_timeout_minutes",
        "late_close",
        "refund_policy",
        "chargeback_policy",
        "external_ref_patterns",
    )

    config = MerchantConfig.model_validate({name: value for name, value in CONFIG.items() if name not in optional})

    assert (config.operation_timeout_minutes, config.late_close) == (15, "refuse")
    assert (config.refund_policy.shortfall, config.chargeback_policy.shortfall) == ("debit", "debit")
    assert config.chargeback_policy.credit_note == "never"
    assert config.external_ref_patterns == {}


def test_a_date_of_a_vat_rate_is_midnight_where_the_merchant_is() -> None:
    rates = [{"country": "AM", "rate": "20", "valid_from": "2026-01-01"}]

    config = MerchantConfig.model_validate(CONFIG | {"vat_rates": rates})

    assert config.vat_rates[0].valid_from == datetime(2025, 12, 31, 20, tzinfo=UTC)


def test_a_refusal_names_the_members_and_repeats_no_content() -> None:
    config = CONFIG | {"external_ref_patterns": {CARD: "(", "secret-method": "("}, "late_close": "secret-text"}

    error = refusal("Merchant.Configure", sample("Merchant.Configure", config=config))

    assert error is not None
    assert error.details["fields"] == ["config.external_ref_patterns.*", "config.late_close"]
    assert "secret" not in error.message
    assert CARD not in str(error)


def test_the_refusal_of_several_problems_is_the_one_that_comes_first() -> None:
    limit = {"credits": 10**13}

    def code(**changes: Any) -> Code | None:
        error = refusal("Grant.Apply", sample("Grant.Apply", **limit | changes))
        return None if error is None else error.code

    assert code() is Code.LIMIT_EXCEEDED
    assert code(user_id=CARD) is Code.SENSITIVE_DATA
    assert code(cvv="123") is Code.SENSITIVE_DATA
    assert code(user_id=CARD, merchant_id="other") is Code.WRONG_MERCHANT
    assert code(user_id=CARD, actor=None) is Code.MALFORMED
    everything = sample("Grant.Apply", **limit, user_id=CARD, merchant_id="other")
    error = refusal("Grant.Apply", everything, channel="users")
    assert error is not None
    assert error.code is Code.WRONG_TOPIC


@pytest.mark.parametrize("name", TYPES)
def test_a_command_is_refused_on_every_topic_but_its_own(name: str) -> None:
    for channel in ALLOWED:
        error = refusal(name, sample(name), channel=channel)

        assert (error is None) == (name in ALLOWED[channel])
        assert error is None or error.code is Code.WRONG_TOPIC


def test_the_topics_merchant_may_be_repeated_in_the_payload_and_no_other() -> None:
    assert refusal("Operation.Open", sample("Operation.Open", merchant_id="ararat")) is None
    assert refusal("Operation.Open", sample("Operation.Open", merchant_id=None)) is None
    for other in ("masis", "", 5, ["ararat"]):
        error = refusal("Operation.Open", sample("Operation.Open", merchant_id=other))
        assert error is not None
        assert error.code is Code.WRONG_MERCHANT


def test_an_unknown_type_is_an_unknown_command_unless_it_does_not_even_parse() -> None:
    for name in ("Operation.Close", "operation.open", "Command.Result", "Receipt.Issued"):
        error = refusal(name, sample("Operation.Open", cvv="123"))
        assert error is not None
        assert error.code is Code.UNKNOWN_COMMAND
    error = refusal("Operation.Close", [])
    assert error is not None
    assert error.code is Code.MALFORMED


def test_every_command_has_a_record_key_and_those_of_the_catalog_a_business_key() -> None:
    keys = {name: COMMANDS[name].business_key(read(as_json(name, sample(name)), name).payload) for name in TYPES}
    records = {name: COMMANDS[name].record_key(read(as_json(name, sample(name)), name).payload) for name in TYPES}

    assert all(records.values())
    assert records["Operation.Open"] == "user-7f3a"
    assert records["Refund.Apply"] == "re-1"
    assert keys["Receipt.AttachFiscal"] == "ARA-2026-0001\nsale\n00012345"
    assert {name for name, key in keys.items() if key is None} == {
        "Product.Archive", "ProductPrice.Create", "ProductPrice.Archive", "OperationType.CreateWithArchival",
        "OperationType.Archive", "Merchant.Configure", "UserRole.Assign", "UserRole.Revoke", "Account.Lock",
        "Account.Unlock", "Lot.Expire", "Operation.Expire", "Command.Resolve", "Merchant.Suspend", "Merchant.Resume",
        "Clock.Advance",
    }  # fmt: skip
