"""The sub-requests of the last requests, as the router saw them: a bounded ring, kept whether anybody looks or not."""

from collections import OrderedDict, deque

from callboard.actors.protocol import SubRequest

NUM_REQUESTS = 1000
NUM_PER_REQUEST = 512
"""More than any sensible script makes; a script that loops keeps its last ones."""

MOST_TOLD = 8192
"""Sub-requests that are told of at once: they are one message."""


def request_of(request_id: str) -> str:
    """Return the id of the request a sequence belongs to: ``ID`` for ``ID`` and ``ID.1``."""
    stem, dot, index = request_id.rpartition(".")
    return stem if dot and index.isdigit() else request_id


class Spans:
    """Sub-requests by request, the oldest request dropped first."""

    def __init__(self, num_requests: int = NUM_REQUESTS) -> None:
        self._num_requests = num_requests
        self._records: OrderedDict[str, deque[SubRequest]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, sub_request: SubRequest) -> None:
        """Keep one."""
        self._record(sub_request.request_id).append(sub_request)

    def of_request(self, request_id: str) -> tuple[SubRequest, ...]:
        """Return those of all sequences of a request (``ID``), or of one of its later sequences (``ID.1``)."""
        record = self._records.get(request_of(request_id))
        if record is None:
            return ()
        wanted = (s for s in record if request_id in (s.request_id, request_of(s.request_id)))
        return tuple(sorted(wanted, key=lambda s: s.start_s))

    def of_last(self, limit: int) -> tuple[SubRequest, ...]:
        """Return those of the last ``limit`` requests, the oldest request first; fewer where those are too many."""
        last: list[SubRequest] = []
        for request_id in list(self._records)[: -limit - 1 : -1] if limit > 0 else []:
            found = self.of_request(request_id)
            if len(last) + len(found) > MOST_TOLD:
                break
            last[:0] = found
        return tuple(last)

    def _record(self, request_id: str) -> deque[SubRequest]:
        key = request_of(request_id)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = deque(maxlen=NUM_PER_REQUEST)
            if len(self._records) > self._num_requests:
                self._records.popitem(last=False)
        return record
