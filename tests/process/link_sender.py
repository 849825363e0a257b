"""A process that pushes to one stream until its link is lost, and tells what had arrived."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

from xinf_vllm_backend.process.link import LinkLostError, Sender, offer


def push_until_lost(end: Connection) -> None:
    asyncio.run(_push_until_lost(end))


async def _push_until_lost(end: Connection) -> None:
    made: asyncio.Future[Sender] = asyncio.get_running_loop().create_future()
    end.send(await offer("127.0.0.1", made.set_result))
    key = await asyncio.to_thread(end.recv)
    outlet = (await made).open(key)
    count = 0
    try:
        while True:
            await outlet.ready()
            outlet.put(b"%d" % count)
            count += 1
    except LinkLostError as error:
        end.send((str(error), outlet.acknowledged))
