"""Untrusted chat templates: transformers' text for an honest one, one sentence in bounded time for a hostile one."""

import runpy
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import sandbox
from llama_mini.tokenizer.sandbox import render

pytestmark = pytest.mark.usefixtures("own_sandbox")

# What a worker says and hears, for workers that break the rules.
READY = "import json, os, signal, sys\nsys.stdout.buffer.write(b'ready\\n')\nsys.stdout.flush()\n"
READ = READY + "sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4)))\n"
SEND = READ + "send = lambda data: sys.stdout.buffer.write(len(data).to_bytes(4) + data)\n"
MESSAGES = [{"role": "user", "content": "x"}]
LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
HOSTILE = {
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "attr": ("{{ ''['__cl' + 'ass__'] }}{{ ('' | attr('__class__')).x }}", "Error: "),
    "repeat": ("{{ 'a' * 10**9 }}", "needs more than 512 MiB"),
    "center": ("{{ 'a'.center(10**9) }}", "needs more than 512 MiB"),
    "format": ("{{ '%1000000000d' % 1 }}", "needs more than 512 MiB"),
    "doubling": (DOUBLING, "(needs more than 512 MiB|0.3 seconds of processor time)"),  # on a slow machine
    "range": ("{{ range(10**9) | join }}", "Range too big"),
    "loops": (LONG_LOOP, "more than 0.3 seconds of processor time"),
    "power": ("{{ 10**(10**9) }}", "more than 0.3 seconds of processor time"),
    "product": ("{% set n = 10**(10**6) %}{{ (n * n) | string }}", "limit .* for integer string conversion"),
    "macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "burner": (
        "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "more than 0.3 seconds of processor time",
    ),
    "flood": (
        "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}",
        "writes more than 16,000,000 characters",
    ),
    "long": ("a" * 10_000_000, "it has 10,000,000 characters, the limit is 1,000,000"),
    "expressions": ("{{ a }}" * 140_000, "more than 0.3 seconds of processor time"),
    "parentheses": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "RecursionError"),
    "nested": ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "too many statically nested blocks"),
    "syntax": ("{% for %}" + "a" * 100_000, "TemplateSyntaxError"),
}


@pytest.mark.parametrize(("template", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_stopped_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    if "processor time" in message:
        monkeypatch.setattr(sandbox, "MAX_CPU_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 60)  # on a busy machine, a second of processor time takes longer
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=rf"^the chat template (failed|was stopped): .*{message}") as caught:
        render(template, {"messages": MESSAGES})
    assert time.monotonic() - started < 30  # measured: 1.4 s at most
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss, and whether RLIMIT_AS holds, differ")
def test_memory_stays_bounded() -> None:
    code = f"""if True:
        import resource
        from llama_mini.errors import TokenizerError
        from llama_mini.tokenizer.sandbox import render
        for template in {[HOSTILE[name][0] for name in ("repeat", "doubling", "flood")]}:
            try:
                render(template, {{}})
            except TokenizerError:
                print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.split()]  # MiB, each the highest so far
    assert len(peaks) == 3
    assert 100 < peaks[-1] < 520  # measured: 404; it must grow until it is stopped


@pytest.mark.parametrize(
    "template",
    [
        "{{ text }}",
        "{{ [text, {text: 1}] | tojson }}{{ text | length }}",
        "a\r\nb\u2028c\x00{{ '日本 🎉' }}\n",
        "{{ {'b': 1, 'a': none} | tojson(sort_keys=true, separators=(',', ':')) }}{{ 1.5 }}{{ true }}{{ 10**30 }}",
        "  {% set n = namespace(x=dict(a=1)) %}\n{% generation %} {{ n.x }}{% endgeneration %} {{ missing }}\n\n",
    ],
)
def test_the_text_is_that_of_transformers_to_the_character(template: str) -> None:
    every = "".join(map(chr, range(0x11_0000))) + "\ud83d\udca9"  # surrogates too, apart and in a row
    variables = {"text": every, "messages": MESSAGES}
    assert render(template, variables) == _compile_jinja_template(template).render(**variables)


def test_a_message_of_the_template_reaches_the_user_cut_and_on_one_line() -> None:
    template = "{{ raise_exception('roles must\\n\\n alternate \x1b[31m\u202e\ud800' + 'x' * 10**6) }}"
    with pytest.raises(TokenizerError) as caught:
        render(template, {})
    message = str(caught.value)
    assert message.startswith("the chat template failed: TemplateError: roles must alternate [31m xxx")
    assert message.isprintable()
    assert 300 <= len(message) < 350


def test_the_date_is_that_of_the_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = "{{ strftime_now('%d %b %Y %H') }}"
    for zone in ("AAA-11", "BBB+11"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        shown = render(now, {})
        try:
            assert shown in {datetime.now().strftime("%d %b %Y %H"), datetime.now().strftime("%d %b %Y %H")}
        finally:
            monkeypatch.undo()
            time.tzset()


def test_the_child_is_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "é 日"
    folder.mkdir()
    for name in ("jinja2", "json", "datetime", "sitecustomize"):
        (folder / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(
        sandbox, "WORKER", Path(_copied(folder / "child.py", sandbox.WORKER.read_text(encoding="utf-8")))
    )
    assert render("{{ 'works' }}", {}) == "works"
    answer = f"{SEND}send(json.dumps({{'text': ' '.join(os.environ)}}).encode())"
    monkeypatch.setattr(sandbox, "WORKER", _copied(tmp_path / "environment.py", answer))
    assert set(render("", {}).split()) <= {*sandbox.KEPT_ENVIRONMENT, "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}


def test_the_child_imports_neither_torch_nor_this_package() -> None:
    code = "import runpy, sys\n"
    code += f"runpy.run_path({str(sandbox.WORKER)!r})\nprint({{'torch', 'llama_mini'}} & {{*sys.modules}})\n"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("while True: pass", "it took more than 0.5 seconds"),
        (f"{READY}while True: pass", "it took more than 0.5 seconds"),
        (f"{READ}while True: sys.stdout.write(chr(127) * 10**6)", "its answer is longer than 96,000,100 bytes"),
        (f"{READY}raise SystemExit(3)", "its process ended with exit code 3"),
        (f"{READY}os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with exit code -11"),
        (READY, "its process ended with exit code 0"),
        (f"{READ}sys.stdout.buffer.write(bytes([0, 0, 0, 9]) + b'[')", "its process ended with exit code 0"),
        (f"{SEND}send(b'hello')", "its process gave no valid answer"),
        (f"{SEND}send(b'[' * 10**6)", "its process gave no valid answer"),
        (f"{SEND}send(b'{{\"text\": 1}}')", "its process gave no valid answer"),
        (f"{SEND}send(b'{{\"error\": null}}')", "its process gave no valid answer"),
        (f"{SEND}send(b'\\xff')", "its process gave no valid answer"),
    ],
)
def test_a_child_that_breaks_the_rules_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5 if "0.5 seconds" in message else 60)
    monkeypatch.setattr(sandbox, "WORKER", _copied(tmp_path / "child.py", code))
    with pytest.raises(TokenizerError, match=f"^the chat template was stopped: {message}"):
        render("x", {"text": "x" * 1_000_000})  # more than a pipe holds


def test_without_limits_of_the_platform_time_and_output_are_still_limited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import runpy, signal, sys; sys.modules['resource'] = None; del signal.setitimer; "
        f"runpy.run_path({str(sandbox.WORKER)!r}, run_name='__main__')"
    )
    monkeypatch.setattr(sandbox, "WORKER", _copied(tmp_path / "child.py", code))
    assert render("{{ 1 + 1 }}", {}) == "2"
    with pytest.raises(TokenizerError, match="writes more than 16,000,000 characters"):
        render("{{ 'a' * 10**8 }}", {})
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1)
    with pytest.raises(TokenizerError, match="more than 1 seconds;"):
        render(LONG_LOOP, {})


def test_limits_are_lowered_only(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limit = runpy.run_path(str(sandbox.WORKER))["_limit"]
    asked: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append((kind, pair)))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5, 10))
    limit("RLIMIT_CPU", 20, 30)
    limit("RLIMIT_CPU", 3, 4)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5, resource.RLIM_INFINITY))
    limit("RLIMIT_CPU", 20, 30)
    limit("RLIMIT_OF_ANOTHER_PLATFORM", 1, 1)
    assert asked == [(resource.RLIMIT_CPU, pair) for pair in ((10, 10), (3, 4), (20, 30))]


def _copied(path: Path, code: str) -> Path:
    path.write_text(code, encoding="utf-8")
    return path
