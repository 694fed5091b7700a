"""What `credits status` shows of many merchants on a small screen."""

from rich.console import Console

from console.status import screen
from workers.status import MerchantStatus, Status

CALM = {
    "open_operations": 0.0,
    "parked_commands": 0.0,
    "dead_letters_open": 0.0,
    "purchases_needing_attention": 0.0,
    "receipts_gaps": 0.0,
}
MERCHANTS = [MerchantStatus(f"m{number:03}", "active", False, gauges=CALM) for number in range(100)]


def shown(*changed: MerchantStatus, lines: int | None) -> list[str]:
    others = [merchant for merchant in MERCHANTS if merchant.merchant_id not in {one.merchant_id for one in changed}]
    status = Status(0.0, ["worker"], 0, sorted([*others, *changed], key=lambda merchant: merchant.merchant_id))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(screen(status, lines=lines))
    return captured.get().splitlines()


def test_a_small_screen_shows_first_what_an_operator_has_to_look_at() -> None:
    lost = MerchantStatus("m090", "active", False, error="the database does not answer")
    dead = MerchantStatus("m070", "active", False, gauges=CALM | {"dead_letters_open": 1.0})
    late = MerchantStatus("m080", "active", False, lag=5, gauges=CALM)

    lines = shown(late, dead, lost, lines=10)

    assert len(lines) == 10
    assert [line.split()[0] for line in lines[2:-1]] == ["m090", "m070", "m080", "m000", "m001", "m002", "m003"]
    assert lines[-1].strip() == "and 93 more, with less to look at"


def test_a_screen_that_is_large_enough_keeps_the_order_of_names() -> None:
    lines = shown(MerchantStatus("m090", "active", False, lag=5, gauges=CALM), lines=103)

    assert [line.split()[0] for line in lines[2:]] == [merchant.merchant_id for merchant in MERCHANTS]
