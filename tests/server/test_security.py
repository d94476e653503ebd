"""Host, Origin and keys: what is refused before the body is read."""

import logging
import secrets
from collections.abc import Callable, Iterator

import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from llama_mini.errors import RequestError
from llama_mini.server.settings import Settings
from tests.server.live import wrapped

KEYS = ("sk-first-key", "sk-second-key")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells its salt."""
    await receive()
    await JSONResponse({"salt": scope["state"].get("cache_salt")})(scope, receive, send)


def client(**settings: tuple[str, ...]) -> TestClient:
    return TestClient(wrapped(app, Settings(**settings)), base_url="http://localhost:8000")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("chat.localhost", True),
        ("127.0.0.1:8000", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.1.5", False),
        ("evil.example#localhost", False),
        ("localhost@evil.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_names_of_this_machine_are_served_without_a_key(host: str, allowed: bool) -> None:
    reply = client().get("/v1/models", headers={"host": host})
    assert reply.status_code == (200 if allowed else 403)
    if not allowed:
        assert "--allowed-host" in reply.json()["error"]["message"]
        assert reply.json()["error"]["type"] == "permission_error"


def test_further_names_and_keys() -> None:
    named = {"host": "gpu.example:80"}
    assert client(allowed_hosts=("GPU.example",)).get("/x", headers=named).status_code == 200
    with_key = named | {"authorization": f"Bearer {KEYS[0]}"}
    assert client(api_keys=KEYS).get("/x", headers=with_key).status_code == 200  # a key is what protects it
    strict = client(api_keys=KEYS, allowed_hosts=("other.example",))
    assert strict.get("/x", headers=with_key).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost.evil"])
def test_pages_of_other_sites_are_refused(origin: str) -> None:
    preflight = {"access-control-request-method": "POST"}
    for method, more in (("GET", {}), ("POST", preflight), ("OPTIONS", {}), ("OPTIONS", preflight)):
        reply = client().request(method, "/v1/models", headers={"origin": origin} | more)
        # to a preflight, a response without CORS headers says no
        assert reply.status_code == (200 if method == "OPTIONS" and more else 403), method
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_own_page_and_allowed_ones_may_ask() -> None:
    own = client().post("/v1/models", headers={"origin": "http://localhost:8000"})
    assert (own.status_code, "access-control-allow-origin" in own.headers) == (200, False)
    for origins in (("https://app.example",), ("*",)):
        page = {"origin": "https://app.example"}
        reply = client(allowed_origins=origins).post("/x", headers=page)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert reply.headers["vary"] == "origin"
        refused = client(allowed_origins=origins, api_keys=KEYS).post("/x", headers=page)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page may read why


def test_a_browser_asks_before_and_has_no_key_then() -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    page = {"origin": "https://app.example"} | asked
    reply = client(allowed_origins=("https://app.example",), api_keys=KEYS).options("/v1/models", headers=page)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "POST" in reply.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-wrong-key"},
        {"authorization": "Bearer "},
        {"authorization": KEYS[0]},
        {"authorization": f"Basic {KEYS[0]}"},
        {"authorization": f"Bearer {KEYS[0]}x"},
        {"x-api-key": "sk-wrong-key"},
    ],
    ids=str,
)
def test_without_a_right_key_nothing_is_read(headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama_mini.server")
    read = 0

    def body() -> Iterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    reply = client(api_keys=KEYS).post("/v1/models?key=sk-in-query", content=body(), headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert not read
    assert "POST /v1/models 401" in caplog.text
    assert not [text for text in (caplog.text, reply.text) if "sk-" in text]


def test_keys_keep_the_prefixes_of_users_apart() -> None:
    by_key = client(api_keys=KEYS)
    salts = [by_key.get("/x", headers={"authorization": f"bearer  {key}"}).json()["salt"] for key in KEYS]
    assert by_key.get("/x", headers={"x-api-key": KEYS[1]}).json()["salt"] == salts[1]
    assert salts[0] != salts[1]
    assert not [salt for salt in salts if "sk-" in salt]
    assert client().get("/x").json()["salt"] is None


def test_some_paths_need_no_key() -> None:
    status = {path: client(api_keys=KEYS).get(path).status_code for path in ("/", "/health", "/metrics", "/v1/models")}
    assert status == {"/": 200, "/health": 200, "/metrics": 401, "/v1/models": 401}


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare: Callable[[bytes, bytes], bool] = secrets.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return compare(a, b)

    monkeypatch.setattr(secrets, "compare_digest", counted)
    for key in (KEYS[0], KEYS[1], "x", "x" * 500):
        client(api_keys=KEYS).get("/x", headers={"authorization": f"Bearer {key}"})
    assert compared == [32] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ("",)}, "an API key must be printable ASCII without spaces"),
        ({"api_keys": ("sk key",)}, "an API key must be"),
        ({"api_keys": ("sk-schlüssel",)}, "an API key must be"),
        (
            {"allowed_origins": ("app.example",)},
            "an allowed origin must be like https://example.com, or *, not 'app.ex",
        ),
        ({"allowed_origins": ("https://app.example/",)}, "an allowed origin must be like"),
        ({"model_names": ("a", "")}, "the name of a served model is empty"),
        ({"max_queue": -1}, "max_queue must be a whole number of at least 0, not -1"),
        ({"grace_seconds": float("inf")}, "grace_seconds must be a finite number"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Settings(**settings)
    assert str(error.value).startswith(message)
    assert "sk" not in str(error.value)
