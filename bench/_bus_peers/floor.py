"""The latency floor: blocking pyzmq, a ZeroMQ message per request or event, no event loop and no codec.

DEALER and ROUTER over ``ipc://``, the sockets that Callboard uses. Raw bytes of the size of the others' messages:
nothing in Python over ZeroMQ answers a single request sooner.
"""

import time
from collections.abc import Sequence

import zmq
from _bus_load import (
    IN_FLIGHT,
    STREAMS,
    TEXT,
    TOKENS,
    Echo,
    EchoTokens,
    Event,
    Measured,
    Order,
    follow_orders_blocking,
    latency_of,
    ready,
)
from msgspec.msgpack import encode

BODY = encode(Echo(TEXT))
TOKENS_BODY = encode(EchoTokens(TOKENS))


def serve(address: str) -> None:
    """Echo; a message that begins with ``S`` asks for that many events."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.bind(address)
    event = encode(Event(1000, TEXT))
    ready()
    while True:
        peer, body = router.recv_multipart()
        if body[:1] == b"S":
            for _ in range(int(body[1:])):
                router.send_multipart((peer, event))
        else:
            router.send_multipart((peer, body))


def client(address: str, pids: Sequence[int]) -> None:
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(address)
    clock = time.perf_counter

    def latency(body: bytes, seconds: float) -> Measured:
        times = []
        end = clock() + seconds
        stop = 0.0
        while stop < end:
            start = clock()
            dealer.send(body)
            reply = dealer.recv()
            stop = clock()
            times.append(stop - start)
        assert reply == body
        return latency_of(times)

    def requests(order: Order) -> Measured:
        start = clock()
        end = start + order.seconds
        num_replies = IN_FLIGHT
        for _ in range(IN_FLIGHT):
            dealer.send(BODY)
        while clock() < end:
            dealer.recv()
            dealer.send(BODY)
            num_replies += 1
        for _ in range(IN_FLIGHT):
            reply = dealer.recv()
        assert reply == BODY
        return Measured(num_replies, clock() - start)

    def events(order: Order) -> Measured:
        total = STREAMS * order.count
        start = clock()
        dealer.send(b"S%d" % total)
        for _ in range(total):
            dealer.recv()
        return Measured(total, clock() - start)

    follow_orders_blocking(
        {
            "latency": lambda order: latency(BODY, order.seconds),
            "latency tokens": lambda order: latency(TOKENS_BODY, order.seconds),
            "requests": requests,
            "events": events,
        },
        pids,
    )
