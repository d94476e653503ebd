"""python -m llama_mini.score: what it prints, as text and JSON, and what it refuses."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mini import LLM
from llama_mini.eval.perplexity import compare, perplexity
from llama_mini.score import main

TEXT = (Path(__file__).parent / "golden" / "alice.txt").read_text(encoding="utf-8")[:300]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, dtype="float32", kernels="off")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def test_the_command_prints_its_conditions(tiny: LLM, tiny_dir: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT[:200].replace("\n", "\r\n").encode())
    options = [text, "--model", tiny_dir, "--dtype", "float32", "--context", 64, "--stride", 32, "--kernels", "off"]
    expected = perplexity(tiny, tiny.tokenizer.encode(text.read_bytes().decode()), 64, 32)
    code, out, err = run(capsys, *options)
    assert (code, err) == (0, "")
    for said in (
        f"model           {tiny_dir}, float32",
        f"text            {text}",
        "context         64 tokens, a window every 32",
        "BOS             256 <|begin_of_text|>, before each text",
        f"tokens scored   {expected.tokens} of {expected.tokens + 1}",
        f"mean NLL        {expected.nll:.5f} nats",
        f"perplexity      {expected.perplexity:.4f}",
        f"bits per byte   {expected.bits_per_byte:.5f}",
    ):
        assert said in out.splitlines()
    found = json.loads(run(capsys, *options, "--json", "--bos", "none")[1])
    plain = perplexity(tiny, tiny.tokenizer.encode(text.read_bytes().decode(), add_special_tokens=False), 64, 32)
    assert (found["bos"], found["bos_place"]) == (None, None)
    assert (found["tokens"], found["nll"], found["perplexity"]) == (plain.tokens, plain.nll, plain.perplexity)
    options = [text, text, "--model", tiny_dir, "--context", 64, "--kernels", "off", "--bos", "each", "--json"]
    found = json.loads(run(capsys, *options)[1])
    assert (found["bos"], found["bos_place"], found["stride"]) == (256, "before each window", 63)
    assert found["texts"] == [str(text)] * 2
    assert found["tokens"] == 2 * len(text.read_bytes())


def test_the_command_compares(tiny: LLM, tiny_dir: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    coded = LLM(tiny_dir, dtype="float32", quantize="int4")
    expected = compare(coded, tiny, tiny.tokenizer.encode(TEXT))
    options = [text, "--model", tiny_dir, "--dtype", "float32", "--quantize", "int4"]
    code, out, _ = run(capsys, *options, "--against-dtype", "float32")
    assert code == 0
    assert f"model           {tiny_dir}, int8 and int4 weights, float32" in out
    assert f"reference       {tiny_dir}, float32, perplexity {expected.reference.perplexity:.4f}" in out
    mixed = run(capsys, text, "--model", tiny_dir, "--dtype", "bfloat16", "--against-dtype", "float32", "--json")
    found = json.loads(mixed[1])
    assert (found["format"], found["reference_format"]) == ("bfloat16", "float32")
    assert found["against"]["reference"]["nll"] == pytest.approx(expected.reference.nll, abs=1e-5)
    found = json.loads(run(capsys, *options, "--against", tiny_dir, "--json")[1])
    assert found["nll"] == pytest.approx(expected.model.nll, abs=1e-5)
    assert found["against"]["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-3)
    assert found["against"]["reference"]["nll"] == pytest.approx(expected.reference.nll, abs=1e-5)


@pytest.mark.parametrize(
    ("data", "args", "code", "message"),
    [
        (b"", [], 2, "is empty"),
        (b"ab\xff", [], 2, "is not UTF-8 text: invalid start byte at byte 2"),
        (b"a", ["--bos", "none"], 2, "the text has 1 tokens; at least 2 are needed"),
        (b"abc", ["--context", 513], 2, "context must be a whole number from 2 to 512, the model's context, not 513"),
        (b"abc", ["--context", 8, "--stride", 9], 2, "stride must be a whole number from 1 to 8"),
        (b"abc", ["--stride", 0], 2, "not 0"),
        (b"abc", ["--dtype", "float7"], 2, "unknown dtype 'float7'"),
        (b"abc", ["--against", "/nowhere"], 3, "/nowhere does not exist"),
        (None, [], 2, "text.txt: No such file or directory"),
    ],
    ids=str,
)
def test_a_fault_is_one_sentence(
    tiny_dir: Path, tmp_path: Path, capsys, data: bytes | None, args: list[object], code: int, message: str
) -> None:
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    found, out, err = run(capsys, text, "--model", tiny_dir, "--kernels", "off", *args)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_standard_input_is_read_once(tiny_dir: Path, capsys) -> None:
    found, _, err = run(capsys, "-", "-", "--model", tiny_dir)
    assert (found, err) == (
        2,
        "error: standard input, -, is given twice, but can be read once: leave one of them out\n",
    )


def test_a_byte_order_mark_and_a_pipe(tiny_dir: Path, tmp_path: Path, capsys) -> None:
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        reading, writing = os.pipe()
        os.write(writing, mark + b"some words")
        os.close(writing)
        found.append(run(capsys, f"/dev/fd/{reading}", "--model", tiny_dir, "--kernels", "off", "--json"))
        os.close(reading)
    assert found[0][0] == 0
    assert json.loads(found[0][1])["nll"] == json.loads(found[1][1])["nll"]


def test_standard_input(tiny_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    code, out, err = run(capsys, "--model", tiny_dir, "--kernels", "off", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["texts"] == ["standard input"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    assert json.loads(run(capsys, "-", "--model", tiny_dir, "--kernels", "off", "--json")[1])["texts"] == ["-"]


def test_help_fits_eighty_columns_without_torch() -> None:
    code = "import sys; from llama_mini.score import main\n"
    code += "try:\n    main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules, 'torch'\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "--against-dtype" in done.stdout
