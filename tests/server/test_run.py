"""The command: its address, its signals, its messages and its exit codes."""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_mini import serve
from llama_mini.server import run
from tests.server.live import ask, connect, head, post, read_all, read_until

CHAT = {"messages": [{"role": "user", "content": "a private word"}], "max_tokens": 4}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


def command(monkeypatch: pytest.MonkeyPatch, client: Callable[[int], None], *options: object) -> int:
    """Runs the command in this thread, which gets the signals, and a client in another; returns the exit code."""
    served, problems = threading.Event(), list[BaseException]()
    startup = run.Server.startup

    async def started(server: run.Server, sockets: list[socket.socket] | None = None) -> None:
        await startup(server, sockets)
        port.append(server.servers[0].sockets[0].getsockname()[1])
        served.set()

    def ask_and_stop() -> None:
        served.wait()
        try:
            client(port[0])
        except BaseException as error:
            problems.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    port = list[int]()
    monkeypatch.setattr(run.Server, "startup", started)
    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    try:
        return serve.main([*map(str, options)])
    finally:
        served.set()
        thread.join()
        assert problems == []


@pytest.fixture
def options(tiny_dir: Path) -> list[object]:
    return ["--model", tiny_dir, "--kernels", "off", "--port", 0]


def test_it_serves_until_it_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[object]
) -> None:
    monkeypatch.setenv(serve.KEY, "sk-of-the-environment")
    asked: dict[str, object] = {}

    def client(port: int) -> None:
        asked["port"] = port
        key = {"authorization": "Bearer sk-of-the-environment"}
        asked["models"] = json.loads(ask(port, head(path="/v1/models", **key))[2])["data"][0]["id"]
        asked["chat"] = ask(port, post("/v1/chat/completions", CHAT, **key))
        asked["refused"] = ask(port, head(path="/v1/models"))[0]

    assert command(monkeypatch, client, *options, "--served-model-name", "mine", "-a", "other") == 0
    out, err = capsys.readouterr()
    assert (out, asked["models"], asked["refused"]) == ("", "mine", 401)
    status, _, body = asked["chat"]
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 4)
    first, *log = err.splitlines()
    assert first == f"mine is served at http://127.0.0.1:{asked['port']}, Ctrl-C stops it"
    assert len(log) == 3
    assert " 127.0.0.1 POST /v1/chat/completions 200 prompt=" in log[1]
    assert " new=4 first=0." in log[1]
    assert "private" not in err
    assert "sk-" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_let_streams_finish(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[object], number: signal.Signals
) -> None:
    ends = []

    def client(port: int) -> None:
        body = CHAT | {"max_tokens": 60, "stream": True, "ignore_eos": True}
        clients = [connect(port, post("/v1/chat/completions", body)) for _ in range(4)]
        begun = [read_until(each, b'"content":"') for each in clients]
        os.kill(os.getpid(), number)
        for each, got in zip(clients, begun, strict=True):
            events = got + read_all(each)
            ends.append((events.count(b'"content"'), events.count(b"data: [DONE]"), b"error" in events))
            each.close()

    assert command(monkeypatch, client, *options, "--grace", 20) == 0
    assert [end[1:] for end in ends] == [(1, False)] * 4
    assert [
        record for record in capsys.readouterr().err.splitlines() if "POST" in record and " new=60 " not in record
    ] == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 can be reached from other machines: give --api-key or LLAMA_MINI"),
        (["--host", "::"], 2, "--host :: can be reached from other machines"),
        (["--host", "no-such-host.invalid"], 1, "cannot serve at no-such-host.invalid port 8000: "),
        (["--port", "70000"], 2, "port must be a whole number from 0 to 65535, not 70000"),
        (["--api-key", ""], 2, "an API key must be printable ASCII without spaces"),
        (["--allowed-origin", "example.com"], 2, "an allowed origin must be like https://example.com, or *"),
        (["--max-queue", "-1"], 2, "max_queue must be a whole number of at least 0"),
        (["--grace", "nan"], 2, "grace_seconds must be a finite number of at least 0, not nan"),
        (["--adapter", "a", "--adapter", "a"], 2, "--adapter: 'a' is given twice"),
        (["--model", "/nowhere/at/all", "--port", "0"], 3, "/nowhere/at/all"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert serve.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    assert capsys.readouterr().err == f"error: cannot serve at 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for module in [module for module in sys.modules if module.startswith(("llama_mini.server.", f"{name}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert serve.main(["--port", "0"]) == 1
    assert capsys.readouterr() == ("", f"error: {serve.INSTALL}\n")


def test_the_log_of_an_error_has_its_place_and_not_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    with run._log_to_standard_error():
        try:
            raise KeyError("a private word")
        except KeyError as error:
            run.logging.getLogger("llama_mini.server").error("a request failed", exc_info=error)
    err = capsys.readouterr().err
    assert "a request failed\n" in err
    assert f'File "{__file__}", line ' in err
    assert err.endswith("KeyError\n")
    assert 'KeyError("a private word")\n' in err  # a line of the program, not the message
