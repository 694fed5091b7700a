"""The pipeline against a real database and broker: what it does when the fault is its own."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from merchants.schema import migrate
from tests.integration.shop import Shop, open_shop
from tests.services import Services
from workers import faults


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url("pipeline_control")
    await migrate(url)
    async with open_shop(services, url, "pipeline") as opened:
        yield opened


@pytest.mark.parametrize("point", ["after_begin", "after_lock", "before_decide", "after_decide", "before_commit"])
async def test_a_defect_that_does_not_repeat_refuses_no_command(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    adjustment = {"adjustment_id": point, "user_id": "ann", "credits_delta": 5, "access_period_days": 5}
    command = shop.send("Adjustment.Apply", **adjustment, actor="ops", justification="alone in its batch")
    monkeypatch.setattr(faults, "_fault", faults._Fault(f"{point}:break"))

    await shop.work()

    assert (await shop.results())[command]["outcome"] == "applied"
