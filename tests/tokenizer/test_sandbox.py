"""The process that renders chat templates: kept, replaced when it has to be, and gone at the end."""

import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer import sandbox
from llama_mini.tokenizer.sandbox import render

HOSTILE = ("{{ 'a' * 10**9 }}", "{{ ''.__class__.x }}", "{{ raise_exception('no') }}", "{% for %}", "{{ m() }}")
LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
pytestmark = pytest.mark.usefixtures("own_sandbox")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and RLIMIT_AS holds")


def process() -> "subprocess.Popen[bytes]":
    worker = sandbox._SANDBOX._worker
    assert worker is not None
    return worker._process


def run(code: str) -> str:
    """What a script prints that begins with a render."""
    start = "import os, sys\nfrom llama_mini.tokenizer.sandbox import _SANDBOX, render\nrender('', {})\n"
    start += "process = _SANDBOX._worker._process\n"
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


def test_a_second_render_is_fast() -> None:
    render("{{ x }}", {"x": "first"})
    pid, times = process().pid, []
    for i in range(31):
        started = time.perf_counter()
        assert render("{{ x }}", {"x": i}) == str(i)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.02  # measured: 0.4 ms; starting a Python takes 50 ms
    assert process().pid == pid


def test_threads_take_turns() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: render("{{ x * 1000 }}", {"x": f"{i} "}), range(100)))
    assert texts == [f"{i} " * 1000 for i in range(100)]


@posix
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_worker_that_was_killed_is_replaced(signal_number: int) -> None:
    render("", {})
    for dead in (False, True):  # perhaps still dying when the render begins, or dead for certain
        killed = process()
        os.kill(killed.pid, signal_number)
        if dead:
            os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        assert render("{{ 1 + 1 }}", {}) == "2"
        assert killed.returncode == -signal_number


@posix
def test_an_interrupt_does_not_reach_the_worker() -> None:
    render("", {})
    pid = process().pid
    assert os.getpgid(pid) == os.getsid(pid) == pid  # Ctrl-C goes to the terminal's group, which is another
    os.kill(pid, signal.SIGINT)
    assert render("{{ 1 + 1 }}", {}) == "2"
    assert process().pid == pid


@posix
def test_an_interrupted_render_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(worker: sandbox._Worker, n_bytes: int) -> bytes:
        raise KeyboardInterrupt

    render("", {})
    killed = process()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox._Worker, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(LONG_LOOP, {})
    assert killed.returncode == -signal.SIGKILL
    assert render("{{ 1 + 1 }}", {}) == "2"


def test_a_render_that_failed_ends_its_worker() -> None:
    for template in HOSTILE:
        render("", {})
        ended = process()
        with pytest.raises(TokenizerError):
            render(template, {})
        assert ended.returncode is not None


@linux
def test_no_render_leaves_the_next_one_less_memory() -> None:
    def has_all_its_memory() -> bool:
        n = 440 << 20  # of 512 MiB, of which Python and jinja2 take 30
        return render("{% set x = letter * n %}{{ x | length }}", {"letter": "a", "n": n}) == str(n)

    assert has_all_its_memory()
    for template in HOSTILE[:2]:
        with pytest.raises(TokenizerError):
            render(template, {})
        assert has_all_its_memory()
    for i in range(12):  # compiled templates are kept, but only so many of them
        assert (
            len(render("{% for i in range(9000) %}{{ text }}{% endfor %}" + "{{ x }}" * 100 * i, {"text": "a"})) == 9000
        )
    assert has_all_its_memory()


@linux
def test_a_worker_that_has_grown_is_replaced() -> None:
    render("", {})
    grown = process()
    assert len(render("{{ text }}{{ text }}", {"text": "日" * 7_900_000})) == 15_800_000
    assert grown.returncode is not None
    assert render("{{ 1 + 1 }}", {}) == "2"


@linux
def test_the_worker_has_no_stream_of_the_parent() -> None:
    links = "[os.readlink(f'/proc/{pid}/fd/{i}') for pid in (os.getpid(), process.pid) for i in range(3)]"
    theirs = run(f"mine, theirs = {links}[:3], {links}[3:]\nassert not set(mine) & set(theirs)\nprint(theirs)")
    assert theirs.count("pipe:") == 2
    assert theirs.count("/dev/null") == 1


@posix
def test_no_worker_is_left_after_the_interpreter() -> None:
    for end in ("", "raise SystemExit", "import threading; threading.Thread(target=render, args=('', {})).start()"):
        pid = int(run(f"print(process.pid, flush=True)\n{end}"))
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@posix
def test_a_worker_ends_with_its_input() -> None:
    """As when the parent is killed, which then closes nothing by itself."""
    render("", {})
    left = process()
    assert left.stdin is not None
    left.stdin.close()
    assert left.wait(timeout=30) == 0


@posix
def test_a_forked_child_has_a_worker_of_its_own() -> None:
    code = """if True:
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and fork
        reader, writer = os.pipe()
        if os.fork() == 0:
            text = render("{{ 'child' }}", {})
            os.write(writer, f"{text} {_SANDBOX._worker._process.pid != process.pid}\\n".encode())
            sys.exit()
        os.wait()
        print(os.read(reader, 99).decode() + render("{{ 'parent' }}", {}), _SANDBOX._worker._process is process)
    """
    assert run(code) == "child True\nparent True\n"


NOT_A_PYTHON = ["None", "''", "'/nowhere/python3'", "'/bin/sh'", "{folder} + '/python'", "{folder} + '/python3.9'"]


@posix
@pytest.mark.parametrize("executable", NOT_A_PYTHON)
def test_without_a_python_a_template_runs_in_this_process_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executable: str
) -> None:
    for name, lines in (("python", "echo hello"), ("python3.9", "exit 2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setattr(sys, "executable", eval(executable.format(folder=repr(str(tmp_path)))))
    with pytest.warns(LlamaMiniWarning, match="is not a Python interpreter; chat only with checkpoints that you trust"):
        assert render("{{ x }}", {"x": 1}) == "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TokenizerError, match=r"the chat template failed: SecurityError"):
            render("{{ ''.__class__.x }}", {})
        with pytest.raises(TokenizerError, match="writes more than 16,000,000 characters"):
            render("{% for i in range(99999) %}{{ x }}{% endfor %}", {"x": "a" * 1000})
    assert sandbox._SANDBOX._worker is None


@posix
def test_a_frozen_application_does_not_start_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.warns(LlamaMiniWarning, match="without limits on memory and time"):
        assert render("{{ x }}", {"x": 1}) == "1"
    assert sandbox._SANDBOX._worker is None


@posix
def test_a_python_that_cannot_be_started_is_a_tokenizer_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("", encoding="utf-8")  # a file that nobody may execute
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(TokenizerError, match="did not start"):
        render("x", {})
