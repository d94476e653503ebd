"""The first requests of the README run as they stand there."""

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from llama_mini import LLM
from llama_mini.server.app import create_app
from llama_mini.server.page import FOLDER
from llama_mini.server.settings import Settings
from tests.server.live import serving

README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def port(llm: LLM) -> Iterator[int]:
    settings = Settings()
    with serving(create_app(llm, settings), settings) as (_, port):
        yield port


def example(language: str, port: int) -> str:
    """A block of the README, for the port of the test."""
    found = re.search(rf"^```{language} first request\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    assert found[1].count(":8000/") == 1
    return found[1].replace(":8000/", f":{port}/")


def test_curl(port: int) -> None:
    done = subprocess.run(["bash", "-c", example("sh", port)], capture_output=True, text=True, check=True, timeout=60)
    reply = json.loads(done.stdout)
    assert reply["object"] == "chat.completion"
    assert 1 <= reply["usage"]["completion_tokens"] <= 20  # as the sampling has it


def test_the_openai_client(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = example("python", port).replace("max_tokens=20", "max_tokens=20, temperature=0")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    whole = printed[: len(printed) // 2]
    assert len(whole) > 5
    assert printed == f"{whole}\n{whole}"  # at once, then streamed
