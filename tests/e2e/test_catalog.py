"""Products, prices and rate versions change on time and never in the past."""

from collections.abc import Callable

from tests.e2e.blackbox import Json, Merchant, name, parse_time

MakeUser = Callable[[], str]


async def test_the_countrys_own_price_comes_before_everywhere_and_the_currency_picks(
    shop: Merchant, user: MakeUser
) -> None:
    code = name("p")
    prices = [("*", "USD", "10.00"), ("AM", "AMD", "4000"), ("AM", "EUR", "9.00"), ("FR", "EUR", "11.00")]
    rows = [{"country": country, "currency": currency, "amount": amount} for country, currency, amount in prices]
    await shop.sellable(code, prices=rows)
    for country, currency, amount in (
        ("AM", "AMD", "4000"),
        ("AM", "EUR", "9.00"),
        ("FR", "EUR", "11.0"),
        ("US", "USD", "10"),
    ):
        await shop.buy(user(), code, amount, country=country, currency=currency)
    # Fallback is per country, never per currency.
    for country, currency, amount in (("AM", "USD", "10.00"), ("FR", "USD", "10.00")):
        purchase = shop.purchase(user(), code, amount, country=country, currency=currency)
        result = await shop.do("Purchase.Settled", purchase)
        assert result["error"]["code"] in ("price_mismatch", "not_for_sale"), result
    await shop.refused("price_mismatch", "Purchase.Settled", shop.purchase(user(), code, "9.99", country="US"))
    wrong = shop.purchase(user(), code, "9.00", country="US", currency="EUR")
    await shop.refused("price_mismatch", "Purchase.Settled", wrong)


async def test_a_country_without_any_price_is_not_for_sale(shop: Merchant, user: MakeUser) -> None:
    code = name("p")
    await shop.sellable(code, prices=[{"country": "AM", "currency": "AMD", "amount": "4000"}])
    await shop.refused("not_for_sale", "Purchase.Settled", shop.purchase(user(), code, "10.00", country="US"))
    await shop.applied("ProductPrice.Create", product_code=code, country="*", currency="USD", amount="10.00")
    await shop.buy(user(), code, "10.00", country="US")


async def test_when_the_countrys_own_price_is_archived_everywhere_applies(shop: Merchant, user: MakeUser) -> None:
    code = name("p")
    rows = [{"country": "*", "currency": "USD", "amount": "10"}, {"country": "AM", "currency": "USD", "amount": "7"}]
    await shop.sellable(code, prices=rows)
    await shop.buy(user(), code, "7")
    paid_before = shop.purchase(user(), code, "7")
    await shop.applied("ProductPrice.Archive", product_code=code, country="AM", currency="USD")
    await shop.buy(user(), code, "10")
    await shop.refused("price_mismatch", "Purchase.Settled", shop.purchase(user(), code, "7"))
    # The order was placed while the price was active: a later archive does not matter.
    await shop.applied("Purchase.Settled", paid_before)


async def test_a_price_changes_at_its_moment(simulated: Merchant, user: MakeUser) -> None:
    code = name("p")
    await simulated.sellable(code)
    tomorrow = simulated.now(86_400)
    key = {"product_code": code, "country": "*", "currency": "USD"}
    await simulated.refused("period_overlap", "ProductPrice.Create", key, amount="12.00", effective_at=tomorrow)
    await simulated.applied("ProductPrice.Archive", key, archived_at=tomorrow)
    await simulated.applied("ProductPrice.Create", key, amount="12.00", effective_at=tomorrow)
    await simulated.buy(user(), code, "10.00")
    await simulated.advance(86_400)
    await simulated.buy(user(), code, "12.00")
    await simulated.refused("price_mismatch", "Purchase.Settled", simulated.purchase(user(), code, "10.00"))


async def test_products_not_yet_or_no_longer_active_are_refused(shop: Merchant, user: MakeUser) -> None:
    future, gone = name("p"), name("p")
    await shop.sellable(future, effective_at=shop.now(3600))
    await shop.refused("product_not_active", "Purchase.Settled", shop.purchase(user(), future))
    await shop.sellable(gone)
    ordered = shop.purchase(user(), gone)
    await shop.applied("Product.Archive", product_code=gone)
    await shop.refused("product_not_active", "Purchase.Settled", shop.purchase(user(), gone))
    await shop.applied("Purchase.Settled", ordered)
    await shop.refused("unknown_product", "Purchase.Settled", shop.purchase(user(), name("none")))


async def test_a_grant_product_is_not_for_sale_and_a_sellable_one_no_grant(shop: Merchant, user: MakeUser) -> None:
    grant = {"title": "g", "credits": 5, "access_period_days": 3, "distribution": "grant"}
    code, signup = name("g"), name("s")
    await shop.applied("Product.Create", grant, product_code=code, grant_policy="manual_grant")
    await shop.refused("not_for_sale", "Purchase.Settled", shop.purchase(user(), code))
    await shop.applied("Product.Create", grant, product_code=signup, grant_policy="apply_on_signup")
    for product in ("pack", signup):
        result = await shop.do("Grant.Apply", grant_id=name(), user_id=user(), product_code=product)
        assert result["outcome"] == "rejected", product
    await shop.refused("unknown_product", "Grant.Apply", grant_id=name(), user_id=user(), product_code=name())


async def test_impossible_products_are_malformed(shop: Merchant) -> None:
    sellable: Json = {"title": "p", "credits": 5, "access_period_days": 3, "distribution": "sellable"}
    sellable |= {"prices": [{"country": "*", "currency": "USD", "amount": "1.00"}]}
    grant: Json = {"title": "g", "credits": 5, "access_period_days": 3, "distribution": "grant"}
    for members in (
        grant,
        grant | {"grant_policy": "manual_grant", "prices": sellable["prices"]},
        sellable | {"grant_policy": "manual_grant"},
        sellable | {"prices": [{"country": "*", "currency": "USD", "amount": "1.001"}]},
        sellable | {"prices": [{"country": "*", "currency": "JPY", "amount": "1.5"}]},
        sellable | {"prices": [{"country": "XX", "currency": "USD", "amount": "1"}]},
        sellable | {"prices": [{"country": "AM", "currency": "XQQ", "amount": "1"}]},
        sellable | {"distribution": "other"},
    ):
        result = await shop.do("Product.Create", members, product_code=name("bad"))
        assert (result["outcome"], result["error"]["code"]) == ("rejected", "malformed"), (members, result)
    for change in ({"credits": 0}, {"access_period_days": 0}):
        result = await shop.do("Product.Create", sellable | change, product_code=name("bad"))
        assert result["error"]["code"] in ("malformed", "limit_exceeded"), change


async def test_the_scale_of_money_is_the_currencys_of_iso_4217(shop: Merchant, user: MakeUser) -> None:
    code = name("p")
    prices = [
        {"country": "AM", "currency": "AMD", "amount": "1000.50"},
        {"country": "KW", "currency": "KWD", "amount": "1.234"},
        {"country": "JP", "currency": "JPY", "amount": "150"},
    ]
    await shop.sellable(code, prices=prices)
    for price in prices:
        await shop.buy(user(), code, price["amount"], country=price["country"], currency=price["currency"])


async def test_effective_dates_are_now_or_later(shop: Merchant) -> None:
    for seconds, code in ((-240, None), (-400, "effective_in_past"), (-86_400, "effective_in_past")):
        effective_at = shop.now(seconds)
        members: Json = {"effective_at": effective_at}
        prices = [{"country": "*", "currency": "USD", "amount": "1"}]
        product = {"title": "p", "credits": 5, "access_period_days": 3, "distribution": "sellable", "prices": prices}
        for type_, more in (
            ("Product.Create", product | {"product_code": name("p")}),
            (
                "OperationType.CreateWithArchival",
                {
                    "operation_code": name("o"),
                    "display_name": "o",
                    "resource_unit": "T",
                    "credits_per_unit": "1",
                },
            ),
        ):
            if code:
                await shop.refused(code, type_, members | more)
            else:
                result = await shop.applied(type_, members | more)
                assert parse_time(result["effects"]["effective_at"]) == parse_time(result["applied_at"])


async def test_an_order_may_be_placed_at_most_five_minutes_ahead(shop: Merchant, user: MakeUser) -> None:
    await shop.applied("Purchase.Settled", shop.purchase(user()) | {"order_placed_at": shop.now(240)})
    await shop.refused("malformed", "Purchase.Settled", shop.purchase(user()) | {"order_placed_at": shop.now(400)})


async def test_only_archived_at_changes_and_only_while_it_is_empty_or_in_the_future(shop: Merchant) -> None:
    code = name("p")
    await shop.sellable(code)
    await shop.applied("Product.Archive", product_code=code, archived_at=shop.now(7200))
    await shop.applied("Product.Archive", product_code=code, archived_at=shop.now(3600))
    await shop.applied("Product.Archive", product_code=code)
    await shop.refused("immutable", "Product.Archive", product_code=code, archived_at=shop.now(3600))
    await shop.refused("unknown_product", "Product.Archive", product_code=name("none"))


async def test_a_new_rate_ends_the_one_before_it_and_open_operations_keep_theirs(
    shop: Merchant, user: MakeUser
) -> None:
    code, someone, other = name("o"), user(), user()
    await shop.grant(someone, 1000)
    await shop.grant(other, 1000)
    await shop.rate(code, "2")
    operation_id = await shop.open(someone, code)
    await shop.rate(code, "3")
    closed = await shop.applied("Operation.RecordAndClose", shop.closing(someone, operation_id, "10"))
    assert closed["balance"] == 980
    assert (await shop.use(other, "10", code))["balance"] == 970


async def test_rates_change_on_time_and_a_scheduled_one_can_be_withdrawn(simulated: Merchant, user: MakeUser) -> None:
    code, someone = name("o"), user()
    await simulated.grant(someone, 1000)
    await simulated.rate(code, "1")
    day, two_days = simulated.now(86_400), simulated.now(2 * 86_400)
    await simulated.rate(code, "5", effective_at=two_days)
    second = await simulated.rate(code, "2", effective_at=day)
    # It ends itself where an already scheduled later version begins.
    assert second["effects"]["archived_at"] == two_days
    twice = {"operation_code": code, "display_name": code, "resource_unit": "TOKEN", "credits_per_unit": "9"}
    await simulated.refused("period_overlap", "OperationType.CreateWithArchival", twice, effective_at=day)
    assert (await simulated.use(someone, "10", code))["balance"] == 990
    await simulated.advance(86_400)
    assert (await simulated.use(someone, "10", code))["balance"] == 970
    await simulated.applied("OperationType.Archive", operation_code=code, effective_at=two_days)
    await simulated.advance(86_400)
    # Withdrawn: the one before goes on.
    assert (await simulated.use(someone, "10", code))["balance"] == 950


async def test_archiving_the_active_rate_leaves_a_scheduled_one_standing(simulated: Merchant, user: MakeUser) -> None:
    code, someone = name("o"), user()
    await simulated.grant(someone, 1000)
    await simulated.rate(code, "1")
    await simulated.rate(code, "5", effective_at=simulated.now(86_400))
    await simulated.applied("OperationType.Archive", operation_code=code)
    opening = {"user_id": someone, "operation_id": name(), "operation_code": code}
    await simulated.refused("unknown_operation_type", "Operation.Open", opening)
    await simulated.advance(86_400)
    assert (await simulated.use(someone, "10", code))["balance"] == 950


async def test_configurations_compare_and_set(changeable: Merchant) -> None:
    shop = changeable
    config = shop.config | {"legal_name": name("Acme")}
    first = (await shop.applied("Merchant.Configure", config=config))["effects"]["version"]
    second = config | {"retention_years": 6}
    result = await shop.applied("Merchant.Configure", config=second, expected_version=first)
    assert result["effects"]["version"] == first + 1
    third = config | {"retention_years": 8}
    await shop.refused("version_conflict", "Merchant.Configure", config=third, expected_version=first)
    # What is already in force is applied and changes nothing.
    assert (await shop.applied("Merchant.Configure", config=second))["effects"]["version"] == first + 1
    same = config | {"credit_note_series_prefix": config["receipt_series_prefix"]}
    assert (await shop.do("Merchant.Configure", config=same))["outcome"] == "rejected"
    for change in ({"tax_regime": "none2"}, {"time_zone": "Mars/Base"}, {"country": "XX"}, {"late_close": "maybe"}):
        await shop.refused("malformed", "Merchant.Configure", config=config | change)
