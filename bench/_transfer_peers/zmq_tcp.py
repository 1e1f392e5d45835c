"""ZeroMQ: a PAIR of blocking sockets over TCP, packed pieces sent and received without copies of ZeroMQ's own.

Pieces are packed into buffers that are used again once ZeroMQ has sent them, while others are on their way.
"""

import zmq
from _transfer_job import Job, Setup, follow_far, follow_near, ready

from .staging import PIECE_BYTES, Packer, pieces

IN_FLIGHT = 4


def socket() -> "zmq.Socket[bytes]":
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    made.setsockopt(zmq.SNDHWM, IN_FLIGHT)
    made.setsockopt(zmq.RCVHWM, IN_FLIGHT)
    return made


def far(setup: Setup) -> None:
    pair, packer = socket(), Packer(setup.target())
    pair.bind("tcp://127.0.0.1:*")

    def receive(job: Job) -> None:
        for blocks in pieces(job.blocks()[1]):
            packer.unpack(blocks, pair.recv(copy=False).buffer)
        pair.send(b"done")

    ready(pair.getsockopt_string(zmq.LAST_ENDPOINT))
    follow_far(receive)


def near(setup: Setup) -> None:
    pair, packer = socket(), Packer(setup.source())
    pair.connect(setup.facts)
    buffers = [bytearray(PIECE_BYTES) for _ in range(IN_FLIGHT)]
    trackers: list[zmq.MessageTracker | None] = [None] * IN_FLIGHT

    def move(job: Job) -> None:
        for number, blocks in enumerate(pieces(job.blocks()[0])):
            place = number % IN_FLIGHT
            tracker = trackers[place]
            if tracker is not None:
                tracker.wait()
            size = packer.pack(blocks, buffers[place])
            trackers[place] = pair.send(memoryview(buffers[place])[:size], copy=False, track=True)
        assert pair.recv() == b"done"

    follow_near(move)
