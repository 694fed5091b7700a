"""What is shown of many merchants on a small screen, and of long names on a narrow one."""

from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from console.deadletters import Letter, as_table
from console.output import print_whole
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


ID = "a-merchant-with-quite-a-long-id-0123456789abcdef"
PLACE = f"credits.{ID}.administration/3/1234567890123"
LETTER = Letter(
    f"credits.{ID}.administration", 3, 1234567890123, b"", "malformed", "no [/] " * 30, datetime.now(UTC), None
)


def printed(shown: RenderableType, **terminal: object) -> str:
    file = StringIO()
    print_whole(Console(file=file, **terminal), shown)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_place_and_the_id_of_a_merchant_can_be_copied_from_any_terminal(width: int) -> None:
    status = Status(0.0, ["worker"], 0, [MerchantStatus(ID, "active", False, lag=123456, gauges=CALM)])

    assert PLACE in printed(as_table([LETTER]), force_terminal=True, width=width)
    assert ID in printed(screen(status), force_terminal=True, width=width)


def test_into_a_pipe_goes_one_whole_line_a_row() -> None:
    _, line = printed(as_table([LETTER])).splitlines()

    assert line.split() == [PLACE, "malformed", *f"{LETTER.noted_at:%Y-%m-%d %H:%M:%S}".split(), *["no", "[/]"] * 30]


def test_a_message_that_looks_like_markup_is_shown_as_it_is() -> None:
    lost = MerchantStatus(ID, "active", False, error="no [/] database")

    assert "no [/] database" in printed(screen(Status(0.0, [], 0, [lost])))
