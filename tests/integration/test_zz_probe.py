import time, asyncio, random, os
from datetime import timedelta
from tests.integration.test_receipt_series import *
async def test_probe(services):
    url = services.database_url("probe")
    admin_url = str(engine_url(services.postgres_url).render_as_string(hide_password=False))
    await runner.ensure_role(admin_url, WORKER_GROUP)
    await runner.ensure_database(admin_url, "probe")
    await runner.upgrade(engine_url(url).render_as_string(hide_password=False), "merchant")
    for n in (1,4,8):
        engine = create_engine(engine_url(url), WRITER_SETTINGS|{"lock_timeout":"30s"}, pool_size=n)
        tally=Tally(); refs=[f"x{n}-{i}" for i in range(400)]
        t=time.time(); c=time.process_time()
        async with asyncio.TaskGroup() as g:
            for k in range(n): g.create_task(client(engine, refs[k::n], tally, random.Random(k)))
        print(n, 400/(time.time()-t), "cpu", time.process_time()-c, time.time()-t)
        await engine.dispose()
    engine = create_engine(engine_url(url), WRITER_SETTINGS, pool_size=1)
    settings = MerchantConfig.model_validate(SETTINGS)
    for batch in (1,50,500):
        t=time.time(); done=0
        while time.time()-t<3:
            books = Books(datetime.now(UTC), settings, 1, Catalog())
            books.drafts = list(drafts_of([f"b{batch}-{done+i}" for i in range(batch)], settings, False))
            async with engine.begin() as c: await documents.issue(c, books, clock_offset=timedelta(), simulated=False)
            done+=batch
        print("batch",batch, done/(time.time()-t))
    await engine.dispose()
