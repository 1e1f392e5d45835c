"""MLC-LLM's microserving REST: the three verbs of each engine over HTTP, for routers that were written for it.

An engine's base URL is ``/engines/NAME``: behind it are the verbs, and OpenAI's completions, answered by this engine
and asked of no router. What MLC-LLM calls preemption the engine deals with: no answer ends with it.
"""

from typing import Any

from litestar.handlers import asgi
from litestar.types import Receive, Scope, Send

from .endpoint import send_error
from .errors import ApiError
from .microserving_asks import EngineAsk, PrepRecvRequest, RemoteSendRequest, prep_recv, remote_send, send_json
from .microserving_door import EngineDoor
from .microserving_generation import EngineCompletion, StartGenerate
from .responses import ModelReply, ModelsReply

BASE = "/engines"


def microserving_routes(door: EngineDoor) -> list[Any]:
    """Return the routes of all engines."""

    # Mounted, and told apart here: Litestar gives path parameters to handlers of a method alone.
    @asgi(BASE, is_mount=True, copy_scope=True)
    async def engines(scope: Scope, receive: Receive, send: Send) -> None:
        name, _, verb = str(scope["path"]).removeprefix(BASE).strip("/").partition("/")
        scope["path"] = f"{BASE}/{name}/{verb}"
        try:
            serve = _application(door, name, verb, scope["path"])
        except ApiError as error:
            await send_error(send, error)
            return
        await serve(scope, receive, send)

    return [engines]


def _application(door: EngineDoor, engine: str, verb: str, path: str) -> Any:
    """Return the ASGI application of one request. Raises ApiError (404)."""
    match verb:
        case "microserving/prep_recv":
            return EngineAsk(door, engine, "microserving_prep_recv", PrepRecvRequest, prep_recv)
        case "microserving/remote_send":
            return EngineAsk(door, engine, "microserving_remote_send", RemoteSendRequest, remote_send)
        case "microserving/start_generate":
            return StartGenerate(door, engine)
        case "v1/completions":
            return EngineCompletion(door, engine)
        case "v1/models":
            model = door.backend.model(door.engine(engine).model)
            reply = ModelsReply([ModelReply(model.name, model.created, model.max_model_len)])
            return lambda scope, receive, send: send_json(send, reply)
    raise ApiError(404, f"Unknown request URL: {path}.", code="unknown_url")
