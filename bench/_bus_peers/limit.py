"""The throughput limit: blocking pyzmq with batches of up to 64 KiB, no event loop, no links, no actors.

What is left is what no bus of typed messages over ZeroMQ in Python can leave out. Each message is a struct of its
own, made and encoded by a call of its own where it arises, because it is one of many streams'; messages that are
there together share a ZeroMQ message; on arrival each is decoded by a call of its own, because its type depends on
who it is for, and looked at. Requests come 128 at a time, two such batches in flight, and are answered in batches.
The kind ``raw`` leaves out the codec too: the same bytes again and again, counted by the batch. It is what the
sockets carry, and nothing that has 64 streams can reach it.
"""

import time
from collections.abc import Sequence

import zmq
from _bus_load import (
    IN_FLIGHT,
    MAX_BATCH_BYTES,
    STREAMS,
    TEXT,
    Echo,
    Event,
    Measured,
    Order,
    Reply,
    check_count,
    check_reply,
    follow_orders_blocking,
    out_of_order,
    ready,
)
from msgspec import Raw
from msgspec.msgpack import Decoder, Encoder

BATCHES_IN_FLIGHT = 2
HIGH_WATER_MARK = 4
"""Batches, the best of 2 to 1000: at 1000 the sender runs ahead of its own I/O thread, and half of the rate is lost."""
HEADER = b"\xdd"
"""A msgpack array with its length in the next four bytes."""

encode_into = Encoder().encode_into
decode_batch = Decoder(list[tuple[int, Raw]]).decode
decode_echo, decode_reply, decode_event = Decoder(Echo).decode, Decoder(Reply).decode, Decoder(Event).decode
EVENTS_PER_BATCH = MAX_BATCH_BYTES // (len(Encoder().encode((STREAMS, Event(100_000, TEXT)))) + 1)


def new_batch() -> bytearray:
    """Return an empty batch, with room for its header."""
    return bytearray(5)


def sealed(batch: bytearray, count: int) -> bytearray:
    """Return the batch with its header written."""
    batch[0:5] = HEADER + count.to_bytes(4, "big")
    return batch


def socket(kind: int) -> "zmq.Socket[bytes]":
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    made.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    return made


def serve(address: str) -> None:
    """Answer batches of requests; ``S`` and ``R`` ask for that many events of each stream, encoded or raw."""
    router = socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.bind(address)
    ready()
    while True:
        peer, body = router.recv_multipart()
        if body[:1] == b"S":
            send_events(router, peer, int(body[1:]))
        elif body[:1] == b"R":
            send_raw(router, peer, int(body[1:]))
        else:
            batch = new_batch()
            requests = decode_batch(body)
            for number, request in requests:
                encode_into((number, Reply(decode_echo(request).text)), batch, -1)
            router.send_multipart((peer, sealed(batch, len(requests))), copy=False)


def send_events(router: "zmq.Socket[bytes]", peer: bytes, count: int) -> None:
    batch, held = new_batch(), 0
    for index in range(count):
        for stream in range(STREAMS):
            encode_into((stream, Event(index, TEXT)), batch, -1)
            held += 1
            if held == EVENTS_PER_BATCH:
                router.send_multipart((peer, sealed(batch, held)), copy=False)
                batch, held = new_batch(), 0
    if held:
        router.send_multipart((peer, sealed(batch, held)), copy=False)


def send_raw(router: "zmq.Socket[bytes]", peer: bytes, count: int) -> None:
    event = Encoder().encode((STREAMS, Event(count, TEXT)))
    whole = event * EVENTS_PER_BATCH
    batches, rest = divmod(STREAMS * count, EVENTS_PER_BATCH)
    for _ in range(batches):
        router.send_multipart((peer, whole))
    if rest:
        router.send_multipart((peer, event * rest))


def client(address: str, pids: Sequence[int]) -> None:
    dealer = socket(zmq.DEALER)
    dealer.connect(address)
    clock = time.perf_counter

    def send_requests(first: int) -> None:
        batch = new_batch()
        each = IN_FLIGHT // BATCHES_IN_FLIGHT
        for number in range(first, first + each):
            encode_into((number, Echo(TEXT)), batch, -1)
        dealer.send(sealed(batch, each), copy=False)

    def receive_replies() -> int:
        replies = decode_batch(dealer.recv())
        for _, reply in replies:
            last = decode_reply(reply)
        check_reply(last)
        return len(replies)

    def requests(order: Order) -> Measured:
        start = clock()
        end = start + order.seconds
        num_replies = 0
        for number in range(BATCHES_IN_FLIGHT):
            send_requests(number)
        while clock() < end:
            num_replies += receive_replies()
            send_requests(num_replies)
        for _ in range(BATCHES_IN_FLIGHT):
            num_replies += receive_replies()
        return Measured(num_replies, clock() - start)

    def events(order: Order) -> Measured:
        total = STREAMS * order.count
        received = [0] * STREAMS
        start = clock()
        dealer.send(b"S%d" % order.count)
        num_events = 0
        while num_events < total:
            batch = decode_batch(dealer.recv())
            for stream, body in batch:
                event = decode_event(body)
                if event.index != received[stream]:
                    raise out_of_order(event.index, received[stream])
                received[stream] += 1
            num_events += len(batch)
        seconds = clock() - start
        for each in received:
            check_count(each, order.count)
        return Measured(total, seconds)

    def raw(order: Order) -> Measured:
        total = STREAMS * order.count
        size = len(Encoder().encode((STREAMS, Event(order.count, TEXT))))
        start = clock()
        dealer.send(b"R%d" % order.count)
        num_bytes = 0
        while num_bytes < total * size:
            num_bytes += len(dealer.recv())
        return Measured(total, clock() - start)

    follow_orders_blocking({"requests": requests, "events": events, "events raw": raw}, pids)
