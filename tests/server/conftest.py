"""The tiny model behind the app; and the page in a browser, before a server whose answers a test writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from llama_mini import LLM
from tests.server.browser import Chat, Open, chromium
from tests.server.local import Client
from tests.server.stub import Stub, served


@pytest.fixture
def new_llm(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, dtype="float32", kernels="off", threads=1)


@pytest.fixture(scope="session")
def llm(tiny_dir: Path) -> LLM:
    """One for all files: it has a cache, and the requests of other tests behind it."""
    return LLM(tiny_dir, dtype="float32", kernels="off", threads=1)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[Client]:
    with Client(llm) as client:
        yield client


@pytest.fixture(scope="module")  # not longer: while it is open, this thread has an event loop
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def stub_url() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    with served(stub.app) as url:
        yield stub, url


@pytest.fixture
def stub(stub_url: tuple[Stub, str]) -> Stub:
    stub_url[0].reset()
    return stub_url[0]


@pytest.fixture
def opened(browser: Browser, stub: Stub, stub_url: tuple[Stub, str]) -> Iterator[Open]:
    """Opens the page. In the end: the browser had nothing to complain of, and asked this server alone."""
    chats: list[Chat] = []

    def make(**options: object) -> Chat:
        chats.append(Chat(browser, stub_url[1], **options))
        return chats[-1]

    yield make
    for chat in chats:
        assert chat.close() == []
        assert [url for url in chat.urls if not url.startswith((stub_url[1], "data:,"))] == []


@pytest.fixture
def chat(opened: Open) -> Chat:
    return opened()
