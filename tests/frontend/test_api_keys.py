"""API keys at the HTTP door: who has none is told so as OpenAI tells it, and learns nothing else."""

import hashlib
import hmac
import logging
from typing import Any

import openai
import pytest

from callboard.actors.directory import Directory

KEY = "sk-" + "k" * 45
WRONG = ["", "s", KEY[:-1], KEY + "k", KEY.upper(), "sk-" + "x" * 45, "x" * 5000]
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture
async def door(open_door: Any) -> Any:
    return await open_door(api_keys=("sk-other", KEY))


@pytest.mark.parametrize("key", WRONG, ids=["none", "short", "cut", "longer", "upper", "other", "huge"])
async def test_a_wrong_key_is_a_401_in_openais_shape_on_every_route(door: Any, key: str) -> None:
    for method, url in ROUTES:
        reply = await door.http.request(method, url, headers={"authorization": f"Bearer {key}".strip()})
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["content-type"] == "application/json"
        error = reply.json()["error"]
        assert reply.json() == {"error": error}
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
        assert len(key) < 3 or key not in reply.text
    assert not door.router.asked


async def test_no_other_way_of_writing_a_route_or_a_key_opens_the_door(door: Any) -> None:
    for url in ("//v1/models", "/v1/models/", "/v1/./models", "/v1/%6dodels", "/health/../v1/models", "/V1/models"):
        assert (await door.http.get(url)).status_code in (401, 404)
    for headers in (
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY} {KEY}"},
        {"x-api-key": KEY},
        {"authorization": f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}"},
    ):
        assert (await door.http.get("/v1/models", headers=headers)).status_code == 401
    assert (await door.http.get(f"/v1/models?api_key={KEY}")).status_code == 401


async def test_the_openai_client_raises_its_own_error_and_any_known_key_is_served(door: Any) -> None:
    client = door.openai.with_options(api_key="sk-wrong")
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        await client.models.list()
    for key in ("sk-other", KEY):
        client = door.openai.with_options(api_key=key)
        assert (await client.models.list()).data[0].id == "tiny"
        assert (await client.completions.create(model="tiny", prompt="x")).choices
    assert (await door.http.get("/health")).status_code == 200


async def test_no_key_gets_into_a_log(door: Any, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (KEY, "sk-mistyped-secret"):
        await door.http.get("/v1/models", headers={"authorization": f"Bearer {key}".strip()})
        await door.http.post("/v1/completions", headers={"authorization": f"Bearer {key}"}, content=b"no JSON")
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    out, err = capfd.readouterr()
    for secret in (KEY, "sk-mistyped-secret"):
        assert secret not in "\n".join([*ours, out, err])


async def test_every_key_is_compared_whole_whatever_was_given(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def watched(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for key in (*WRONG, "sk-other", KEY):
        compared.clear()
        await door.http.get("/v1/models", headers={"authorization": f"Bearer {key}".strip()})
        assert compared == [(32, 32), (32, 32)]


@pytest.mark.parametrize("path", ["microserving/prep_recv", "microserving/start_generate", "v1/models", "anything"])
async def test_engines_are_behind_the_same_keys_and_there_only_where_it_is_asked_for(open_door: Any, path: str) -> None:
    closed = await open_door(directory=Directory())
    assert (await closed.http.post(f"/engines/e/{path}", json={})).json()["error"]["code"] == "unknown_url"
    door = await open_door(directory=Directory(), api_keys=("sk-one",), microserving=True)
    for headers in ({}, {"authorization": "Bearer sk-two"}):
        reply = await door.http.post(f"/engines/e/{path}", json={}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    reply = await door.http.post(f"/engines/e/{path}", json={}, headers={"authorization": "Bearer sk-one"})
    assert reply.status_code == 404
