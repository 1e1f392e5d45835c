"""A transport whose stop is cancelled closes its context all the same."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from callboard.bus import Node
from callboard.bus.transports.zmq import ZmqTransport


async def test_a_stop_that_is_cancelled_while_it_waits_for_a_thread_closes_the_context() -> None:
    transport, free = ZmqTransport(), threading.Event()
    node = await Node("a", transport=transport).__aenter__()
    with ThreadPoolExecutor(1) as only:
        asyncio.get_running_loop().set_default_executor(only)
        only.submit(free.wait)
        stopping = asyncio.create_task(node.stop())
        while not only._work_queue.qsize():
            await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait([stopping])
        free.set()
    assert transport._context.closed
