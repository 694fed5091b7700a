"""Sends one settled purchase and prints its result.

Arguments: servers, merchant, user, product, amount, currency.
"""

import asyncio
import json
import sys
import uuid
from datetime import UTC, datetime

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

SOURCE = "/my-shop"


async def main(servers: str, merchant: str, user: str, product: str, amount: str, currency: str) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    # The provider's transaction id: one purchase, however often it is sent.
    payment = f"pay-{uuid.uuid4()}"
    payload = {
        "user_id": user,
        "external_ref": payment,
        "product_code": product,
        "payment_method": "card",
        "order_placed_at": now,
        "settled_at": now,
        "pricing_snapshot": {"country": "AM", "amount": amount, "currency": currency},
    }
    command_id = f"settled-{payment}"
    headers = {
        "ce_specversion": "1.0",
        "ce_id": command_id,
        "ce_source": SOURCE,
        "ce_type": "Purchase.Settled",
        "ce_time": now,
        "content-type": "application/json",
    }
    results = AIOKafkaConsumer(f"credits.{merchant}.results", bootstrap_servers=servers, auto_offset_reset="latest")
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    await results.start()
    await producer.start()
    try:
        await results.seek_to_end()
        await producer.send_and_wait(
            f"credits.{merchant}.purchases",
            json.dumps(payload).encode(),
            key=user.encode(),
            headers=[(name, value.encode()) for name, value in headers.items()],
        )
        async for record in results:
            result = json.loads(record.value)
            if (result["command_source"], result["command_id"]) == (SOURCE, command_id):
                print(json.dumps(result, indent=2))
                return
    finally:
        await producer.stop()
        await results.stop()


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 30))
