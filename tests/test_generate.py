"""The command line: what goes where, what each option does, and what every fault says."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_mini import LLM, SamplingParams
from llama_mini.generate import main
from llama_mini.optimize.build import load_kernels
from tests.processes import child

GOLDEN = json.loads((Path(__file__).parent / "golden" / "texts.json").read_text(encoding="utf-8"))
COMMAND = [sys.executable, "-m", "llama_mini.generate", "--threads", "1"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", autouse=True)
def built_operators() -> None:
    """The one line that says that they are being built is not among what is tested here."""
    assert load_kernels()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process."""

    def run(*args: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = main([*map(str, args)])
        except SystemExit as end:  # from argparse
            code = end.code
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["checkpoint"] == "tiny"], ids=lambda c: c["prompt"])
def test_golden_text_of_the_tiny_checkpoint(case: dict, tiny_dir, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(tiny_dir), "--dtype", "float32", "--max-tokens", str(case["max_tokens"])]
    assert main([*args, *(["--raw"] if case["raw"] else []), case["prompt"]]) == 0
    out, err = capfd.readouterr()
    assert out == case["text"] + "\n" * (not case["text"].endswith("\n"))
    assert err == ""


def test_text_alone_on_standard_output(tiny_dir) -> None:
    command = [*COMMAND, "--model", tiny_dir, "--max-tokens", "20", "--stats", "hello"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout + done.stderr
    for word in ("load", "first token", "prefill", "decode", "tok/s", "peak memory"):
        assert word in done.stderr
        assert word not in done.stdout


def test_streamed_and_whole_are_the_same(run: Run, tiny_dir) -> None:
    streamed = run("--model", tiny_dir, "--max-tokens", 50, "--temperature", 1, "--seed", 3, "hello")
    whole = run("--model", tiny_dir, "--max-tokens", 50, "--temperature", 1, "--seed", 3, "--no-stream", "hello")
    assert streamed.stdout == whole.stdout
    assert streamed.returncode == whole.returncode == 0


def test_standard_input_is_the_prompt(run: Run, tiny_dir) -> None:
    args = ["--model", tiny_dir, "--max-tokens", 8]
    assert run(*args, stdin=b"say hi\n").stdout == run(*args, "say hi").stdout
    assert run(*args, "-", stdin=b"\xef\xbb\xbfsay hi\r\n").stdout == run(*args, "say hi").stdout
    for data, said in ((b"a\xff", "not UTF-8"), ("hi".encode("utf-16"), "save it as UTF-8")):
        done = run(*args, stdin=data)
        assert done.returncode == 2
        assert said in done.stderr
    assert run(*args, stdin=b"").returncode == 2


def test_options_reach_the_engine(tiny_dir, capfd: pytest.CaptureFixture[str]) -> None:
    llm = LLM(tiny_dir, dtype="float32")
    base = ["--model", str(tiny_dir), "--dtype", "float32", "--max-tokens", "30", "hello"]

    def text(*options: str) -> str:
        assert main([*base, *options]) == 0
        return capfd.readouterr().out.removesuffix("\n")

    user = {"role": "user", "content": "hello"}
    chat = llm.chat([user], SamplingParams(max_tokens=30)).text
    assert text() == text("--chat") == chat
    assert text("--raw") == llm.generate("hello", SamplingParams(max_tokens=30))[0].text
    system = [{"role": "system", "content": "Be brief."}, user]
    assert text("--system", "Be brief.") == llm.chat(system, SamplingParams(max_tokens=30)).text != chat
    stop = chat[5:7]
    assert text("--stop", "never", "--stop", stop) == chat[: chat.index(stop)]
    sampled = SamplingParams(max_tokens=30, temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=4, ignore_eos=True)
    options = "--temperature 1.2 --top-k 20 --top-p 0.9 --min-p 0.01 --seed 4 --ignore-eos --threads 1"
    assert text(*options.split()) == llm.chat([user], sampled).text


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_formats_and_kernels_reach_the_engine(
    tiny_dir, quantize: str | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[object, ...]] = []

    class Spy(LLM):
        def __init__(self, *args: object, **engine: object) -> None:
            given.append((*args[1:], engine))
            super().__init__(*args, **engine)

    monkeypatch.setattr("llama_mini.engine.llm.LLM", Spy)
    options = ["--kernels", kernels, "--threads", "1", "--dtype", "float32", "--max-tokens", "3"]
    engine = {"draft": None, "speculation": "off" if quantize else "auto", "kv_dtype": "int8" if quantize else "auto"}
    more = ["--quantize", quantize, "--speculation", "off", "--kv-dtype", "int8"] if quantize else []
    assert main(["--model", str(tiny_dir), *options, *more, "hi"]) == 0
    assert given == [("float32", torch.device("cpu"), quantize or "auto", kernels, 1, engine)]


def test_a_draft_model_guesses(run: Run, tiny_dir) -> None:
    options = ("--model", tiny_dir, "--raw", "--ignore-eos", "--max-tokens", 60, "--stats", "x x x x x x x x")
    plain, drafted = run(*options, "--speculation", "off"), run(*options, "--draft", tiny_dir)
    assert drafted.stdout == plain.stdout
    assert re.search(r" tok/s, \d+ of \d+ guesses right · peak", drafted.stderr)
    assert "guesses" not in plain.stderr
    refused = run(*options, "--draft", tiny_dir, "--speculation", "off")
    assert refused.returncode == 2
    assert "a draft model is for speculation, which is off: leave one of them out" in refused.stderr


def test_the_default_length_shrinks_to_the_context(run: Run, tiny_dir) -> None:
    room = 512 - len(LLM(tiny_dir).tokenizer.encode("x" * 400))
    done = run("--model", tiny_dir, "--raw", "--ignore-eos", "--stats", "x" * 400)
    assert done.returncode == 0
    assert f"decode {room} tokens" in done.stderr
    refused = run("--model", tiny_dir, "--raw", "--max-tokens", room + 1, "x" * 400)
    assert refused.returncode == 2
    assert "exceed the context of 512" in refused.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--top-p", "2", "hi"], 2, "top_p must be a finite number from 0 to 1, not 2.0"),
        (["--temperature", "-1", "hi"], 2, "temperature"),
        (["--max-tokens", "0", "hi"], 2, "max_tokens"),
        (["--max-tokens", "many", "hi"], 2, "--max-tokens"),
        (["--stop", "", "hi"], 2, "stop"),
        (["--dtype", "float7", "hi"], 2, "unknown dtype 'float7'"),
        (["--device", "abacus", "hi"], 2, "abacus"),
        (["--threads", "0", "hi"], 2, "threads must be a whole number from 1 to 1024, not 0"),
        (["--threads", "two", "hi"], 2, "--threads"),
        (["--quantize", "int3", "hi"], 2, "--quantize: invalid choice: 'int3'"),
        (["--kernels", "fast", "hi"], 2, "--kernels: invalid choice: 'fast'"),
        (["--chat", "--raw", "hi"], 2, "not allowed with"),
        (["--interactive", "hi"], 2, "not allowed with"),
        (["--batch", "x", "hi"], 2, "not allowed with"),
        (["--info", "hi"], 2, "not allowed with"),
        (["--raw", "--system", "s", "hi"], 2, "--system"),
        ([""], 2, "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_option_is_one_sentence(run: Run, tiny_dir, args: list[str], code: int, message: str) -> None:
    done = run("--model", tiny_dir, *args)
    assert done.returncode == code
    assert done.stdout == ""
    assert message in done.stderr


def test_a_bad_checkpoint_is_one_sentence(run: Run, tiny_dir, tmp_path: Path) -> None:
    absent = run("--model", tmp_path / "nowhere", "hi")
    assert absent.returncode == 3
    assert absent.stderr.count("\n") == 1
    assert "nowhere does not exist" in absent.stderr
    broken = shutil.copytree(tiny_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    done = run("--model", broken, "hi")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr
    no_template = shutil.copytree(tiny_dir, tmp_path / "no_template")
    (no_template / "chat_template.jinja").unlink()
    assert run("--model", no_template, "--max-tokens", 2, "hi").returncode == 0  # completes
    done = run("--model", no_template, "--chat", "hi")
    assert done.returncode == 3
    assert "template" in done.stderr


def test_a_reader_that_leaves_early_ends_it_quietly(tiny_dir) -> None:
    command = [*COMMAND, "--model", tiny_dir, "--ignore-eos", "hello"]
    with child(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_interrupting_keeps_what_was_written(tiny_dir, tmp_path: Path) -> None:
    # A context that lasts for minutes, so that the signal falls into the answer.
    slow = shutil.copytree(tiny_dir, tmp_path / "slow")
    config = json.loads((slow / "config.json").read_text())
    (slow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    command = [*COMMAND, "--model", slow, "--ignore-eos", "--max-tokens", "100000", "hello"]
    with child(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        written = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
        assert process.returncode == 130
    assert len(written) == 40
    assert rest is not None
    assert b"Traceback" not in err


def test_help_version_and_usage_errors_do_not_import_torch() -> None:
    code = "import sys\nfrom llama_mini.generate import main\n"
    code += "for option, expected in (('--help', 0), ('--version', 0), ('--nonsense', 2)):\n"
    code += "    try:\n        main([option])\n    except SystemExit as end:\n        assert end.code == expected\n"
    code += "    assert 'torch' not in sys.modules, option\n"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_help_fits_eighty_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run("--help")
    assert done.stdout.startswith("usage: python -m llama_mini.generate [options] [PROMPT]\n")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_json_is_one_object(run: Run, tiny_dir) -> None:
    args = ["--model", tiny_dir, "--dtype", "float32", "--raw", "--max-tokens", 6, "--json"]
    done = run(*args, "--top-logprobs", 2, "--prompt-logprobs", "hello")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    (whole,) = LLM(tiny_dir, dtype="float32").generate("hello", SamplingParams(max_tokens=6))
    assert said["text"] == whole.text
    assert said["token_ids"] == whole.token_ids
    assert said["finish_reason"] == whole.finish_reason
    assert said["error"] is None
    assert said["logprobs"] == pytest.approx(whole.logprobs, abs=2e-5)
    assert len(said["top_logprobs"]) == len(whole.token_ids)
    assert said["prompt_logprobs"][0] is None
    assert said["stats"]["new_tokens"] == len(whole.token_ids)
    assert "prompt_logprobs" not in json.loads(run(*args, "hello").stdout)


@pytest.mark.parametrize(
    "args",
    [
        ["--interactive", "--raw"],
        ["--interactive", "--json"],
        ["--batch", "x", "--stats"],
        ["--output", "x", "hello"],
        ["--top-logprobs", "2", "hello"],
        ["--prompt-logprobs", "hello"],
        ["--logit-bias", "5", "hello"],
        ["--logit-bias", "a=1", "hello"],
        ["--min-tokens", "5", "--max-tokens", "4", "hello"],
        ["--repetition-penalty", "0", "hello"],
    ],
)
def test_options_that_do_not_go_together(args: list[str], tiny_dir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_dir), *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_every_sampling_option_reaches_the_sampler(tiny_dir, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(tiny_dir), "--dtype", "float32", "--raw", "--json", "--max-tokens", "8", "hello"]

    def said(*more: str) -> list[int]:
        assert main([*args, *more]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    plain = said()
    assert said("--logit-bias", "77=10000") == [77] * 8
    assert plain[0] not in said("--logit-bias", f"{plain[0]}=-inf")
    assert said("--stop-token", str(plain[0])) == plain[:1]
    assert len(said("--stop-token", str(plain[0]), "--min-tokens", "4")) >= 4
    for option, value in (("repetition", "9"), ("presence", "2"), ("frequency", "2")):
        penalised = said("--ignore-eos", f"--{option}-penalty", value, "--logit-bias", "77=2", "--logit-bias", "78=1.9")
        assert penalised != said("--ignore-eos", "--logit-bias", "77=2", "--logit-bias", "78=1.9"), option
