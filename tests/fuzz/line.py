"""One connection of the fuzzer's, with what is due on it."""

from collections import Counter, deque

from callboard.bus.frames import STREAM, TELL, AnyFrame, Cancel, Credit, Post
from callboard.bus.transports.contract import Connection

MOST_CALLS = 32
MOST_LOGGED = 10_000
STANDING_S = 100.0
"""Who asks for longer than this gets an end later than the fuzzer waits for it."""


class Line:
    """One connection of the peer, dialled or accepted."""

    def __init__(self, endpoint: str, incarnation: str, connection: Connection) -> None:
        self.endpoint = endpoint
        self.incarnation = incarnation
        self.connection = connection
        self.sent = 0
        self.received = 0
        self.has_greeted = False
        self.is_left = False
        """Nothing more is sent over it, and what it says does not matter."""
        self.is_doomed = False
        """It must be cut now."""
        self.needs_reason = True
        """And it must be told why."""
        self.has_reason = False
        self.has_heard = False
        self.is_closed = False
        self.num_asked = 0
        self.owed: Counter[int] = Counter()
        """Ends that are due, by id."""
        self.standing: set[int] = set()
        """Ids of questions without a deadline: nothing is due for them."""
        self.forgiven: set[int] = set()
        """Ids that were cancelled: their end may or may not come."""
        self.room: dict[int, int] = {}
        """Items that may still come, by id."""
        self.calls: deque[int] = deque(maxlen=MOST_CALLS)
        """Questions that the node asked here."""
        self.log: deque[bytes] = deque(maxlen=MOST_LOGGED)

    def owe(self, frame: AnyFrame) -> bool:
        """Note what is due for a frame that the node can read; return whether it was a question."""
        match frame:
            case Post() if frame.kind != TELL:
                if frame.id in self.owed or frame.id in self.standing:
                    self.room.pop(frame.id, None)
                elif frame.kind == STREAM:
                    self.room[frame.id] = max(1, frame.credit)
                if frame.timeout is None or not frame.timeout < STANDING_S:
                    self.standing.add(frame.id)
                self.owed[frame.id] += 1
                return True
            case Cancel() if frame.id in self.owed:
                self.forgiven.add(frame.id)
            case Credit() if frame.id in self.room:
                self.room[frame.id] += max(0, frame.count)
        return False
