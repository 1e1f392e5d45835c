"""Whether the frontend lives, and whether it is ready: two questions, for whoever restarts it, and who sends to it."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from litestar import Response, get

Unready = Callable[[], Sequence[str]]
"""Says in sentences what is missing for requests to be answered."""

JSON = "application/json"


class Health(msgspec.Struct, frozen=True):
    """``status`` is ok or unavailable; ``missing`` says what is."""

    status: str
    missing: list[str]


def health_routes(unready: Unready) -> list[Any]:
    """Return /health/live, which answers 200 for as long as the process does, and /health/ready, 503 until it is."""

    @get("/health/live", sync_to_thread=False, opt={"is_open": True})
    def live() -> Response[bytes]:
        return health_response(())

    @get("/health/ready", sync_to_thread=False, opt={"is_open": True})
    def ready() -> Response[bytes]:
        return health_response(unready())

    return [live, ready]


def health_response(missing: Sequence[str]) -> Response[bytes]:
    """Return 200, or 503 with what is missing."""
    health = Health("unavailable" if missing else "ok", list(missing))
    return Response(msgspec.json.encode(health), status_code=503 if missing else 200, media_type=JSON)
