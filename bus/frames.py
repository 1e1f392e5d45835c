"""What links carry: frames, in batches. A batch is one ZeroMQ message: ``[incarnation, sequence, [frame, ...]]``.

A frame's ``body`` is the actor's message, encoded in place; on arrival it stays raw until the mailbox it is for
decodes it as one of the types it handles. Frames are positional: append only, and count PROTOCOL_VERSION up.
"""

from typing import Annotated, Any

import msgspec

PROTOCOL_VERSION = 5
MAX_BATCH_BYTES = 64 * 1024
MAX_FRAME_BYTES = 16 * 1024 * 1024
"""A prompt of 128 Ki tokens is 512 KiB: nothing that belongs on the bus comes near this."""

TELL, ASK, STREAM = 0, 1, 2


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One item of a batch. Frames refer to nothing that refers back: the garbage collector need not look at them."""


class PeerInfo(Frame, frozen=True):
    """Who is at the other end of a link. ``endpoint`` is empty for a node that cannot be dialled."""

    version: int
    fleet: str
    node: str
    incarnation: str
    endpoint: str
    host: str = ""
    """Names the kernel and its pid namespace: equal hosts can watch each other's processes."""
    pid: int = 0
    pid_start: int = 0
    proof: bytes = b""
    """Shows, where the fleet has keys, that the sender holds the key of ``node`` (keys.py)."""


class Hello(PeerInfo, frozen=True, tag=1):
    """The first frame of whoever dialled."""


class Welcome(PeerInfo, frozen=True, tag=2):
    """The first frame of whoever was dialled."""


class Refused(Frame, frozen=True, tag=3):
    """Instead of Welcome: this link will not be, and why."""

    reason: str


class Post(Frame, frozen=True, tag=4):
    """A message to an actor. ``timeout`` is what remains in seconds when it leaves; ``credit`` is for streams."""

    id: int
    kind: int
    actor: str
    body: msgspec.Raw
    timeout: float | None = None
    request_id: str = ""
    credit: int = 0


class Answer(Frame, frozen=True, tag=5):
    """The one answer of an ask."""

    id: int
    body: msgspec.Raw


class Items(Frame, frozen=True, tag=6):
    """Items of a stream, in order: ``body`` is the array of them."""

    id: int
    body: msgspec.Raw


class End(Frame, frozen=True, tag=7):
    """A stream ended well."""

    id: int


class Fail(Frame, frozen=True, tag=8):
    """An ask or a stream ended badly: ``kind`` is refusal, actor_died, link_lost or timeout.

    ``name`` is the refusal's class; of another kind, "relayed" where it is said of somebody else (failures.py).
    """

    id: int
    kind: str
    text: str
    name: str = ""
    fields: dict[str, Any] = {}


class Cancel(Frame, frozen=True, tag=9):
    """The caller no longer wants the answer."""

    id: int


class Credit(Frame, frozen=True, tag=10):
    """The caller has room for ``count`` more items."""

    id: int
    count: int


class Ping(Frame, frozen=True, tag=11):
    """Are you there?"""


class Pong(Frame, frozen=True, tag=12):
    """Yes."""


class Bye(Frame, frozen=True, tag=13):
    """The node stops in order; nothing follows. Answered with Bye: all before it was heard."""


class TracedPost(Post, frozen=True, tag=14):
    """A Post that is recorded: ``span`` names the call in the records of both nodes (taps.py).

    ``trace`` is the W3C trace that it belongs to, 32 hex digits; empty for none.
    """

    span: Annotated[int, msgspec.Meta(ge=0)] = 0
    trace: Annotated[str, msgspec.Meta(max_length=32)] = ""


AnyFrame = (
    Hello | Welcome | Refused | Post | Answer | Items | End | Fail | Cancel | Credit | Ping | Pong | Bye | TracedPost
)

decode_batch = msgspec.msgpack.Decoder(tuple[str, int, list[AnyFrame]]).decode
encode_batch = msgspec.msgpack.Encoder().encode
