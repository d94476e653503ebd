"""Adapters as a user gives them: LLM(adapter=), --adapter, info, score and convert, and an adapter's own tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_mini import LLM
from llama_mini.__main__ import main
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import RequestError
from tests.checkpoint.adapters.tiny_adapters import write_adapter

HEAD, QUERY = "base_model.model.lm_head", "base_model.model.model.layers.0.self_attn.q_proj"


def write(directory: Path, tiny_dir: Path, seed: int = 0) -> Path:
    values = torch.Generator().manual_seed(seed)
    shapes = {f"{HEAD}.lora_A.weight": (2, 32), f"{HEAD}.lora_B.weight": (260, 2)}
    shapes |= {f"{QUERY}.lora_A.weight": (2, 32), f"{QUERY}.lora_B.weight": (40, 2)}
    tensors = {name: torch.randn(shape, generator=values) / 2 for name, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": str(tiny_dir)}
    return write_adapter(directory, config, tensors)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    return code, *capsys.readouterr()


@pytest.fixture
def adapters(tmp_path: Path, tiny_dir: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a", tiny_dir), write(tmp_path / "b", tiny_dir, 1)


def test_text_with_adapters(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """The answers of the commands are those of LLM, and of the model that convert writes."""
    a, b = adapters
    plain = ["--raw", "--kernels", "off", "--dtype", "float32", "--max-tokens", "8", "--ignore-eos", "Alice"]
    both = ["--model", tiny_dir, "--adapter", a, "--adapter", f"{b}=0.5"]
    code, text, _ = run(capsys, *both, *plain)
    assert code == 0
    llm = LLM(tiny_dir, "float32", kernels="off", adapter={a: 1, b: 0.5})
    assert text.rstrip("\n") == llm.generate("Alice", max_tokens=8, ignore_eos=True)[0].text.rstrip("\n")
    ids = [1, 2, 3, 4]
    assert run(capsys, "convert", tiny_dir, tmp_path / "merged", *both[2:])[0] == 0
    merged = LLM(tmp_path / "merged", "float32", kernels="off")
    assert merged.score(ids)[1:] == pytest.approx(llm.score(ids)[1:], abs=1e-5)
    texts = {text, run(capsys, "--model", tiny_dir, *plain)[1]}
    texts |= {run(capsys, *given, *plain)[1] for given in (["--adapter", a], ["--lora", f"{a}=-1"], ["--adapter", b])}
    assert len(texts) == 5
    assert run(capsys, "--model", a, *plain)[1] == run(capsys, "--adapter", a, *plain)[1]


def test_info_says_what_is_merged(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, adapters: tuple[Path, Path]
) -> None:
    a, b = adapters
    _, text, _ = run(capsys, "info", tiny_dir, "--adapter", a, "--adapter", f"{b}=0.25")
    what = "LoRA of rank 2 on 2 matrices"
    assert f"adapters       {what}, 1 × {a}; {what}, 0.25 × {b}\n" in text
    assert f"path           {tiny_dir}\n" in run(capsys, "info", a)[1]
    assert f"adapters       {what}, 1 × {a}\n" in run(capsys, "--info", "--adapter", a)[1]


def test_score_with_adapters(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("Alice was beginning to get very tired")
    options = ["--model", tiny_dir, "--kernels", "off", "--dtype", "float32", "--json", tmp_path / "text"]
    figures = json.loads(run(capsys, "score", "--adapter", adapters[0], "--against", tiny_dir, *options)[1])
    assert figures["model"] == f"{tiny_dir} + {adapters[0]}"
    assert figures["against"]["kl_mean"] > 0.01
    figures = json.loads(run(capsys, "score", "--adapter", adapters[0], "--against-dtype", "float32", *options)[1])
    assert figures["against"]["kl_mean"] < 1e-6  # the reference has the adapter too


def test_names_with_an_equals_sign(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lr=0.5", tiny_dir)
    assert "1 × lr=0.5\n" in run(capsys, "info", tiny_dir, "--adapter", "lr=0.5")[1]
    assert "2 × lr=0.5\n" in run(capsys, "info", tiny_dir, "--adapter", "lr=0.5=2")[1]
    for given, says in {
        "lr=x": "lr=x has no adapter_config.json",
        "lr=0.5=nan": "the weight of the adapter lr=0.5 must be a finite number from -1000000000.0",
    }.items():
        code, _, error = run(capsys, "info", tiny_dir, "--adapter", given)
        assert code in (2, 3)
        assert says in error
    code, _, error = run(capsys, "info", tiny_dir, "--adapter", "lr=0.5", "--adapter", "lr=0.5=2")
    assert (code, error) == (2, "error: --adapter: 'lr=0.5' is given twice\n")


def test_an_opened_checkpoint_takes_none(tiny_dir: Path, adapters: tuple[Path, Path]) -> None:
    with pytest.raises(RequestError, match="an opened checkpoint takes no adapter: give it to open_checkpoint"):
        LLM(open_checkpoint(tiny_dir), adapter=adapters[0])


def test_an_adapter_with_a_tokenizer_of_its_own(tiny_dir: Path, tmp_path: Path) -> None:
    """An added token, a chat template, rows for the token; texts also end where they do in the model."""
    adapter = write(tmp_path / "adapter", tiny_dir)
    tokenizer = json.loads((tiny_dir / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 260, "content": "<|tool|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|tool|>"}))
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}<|tool|>")
    weights = load_file(tiny_dir / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    whole = {f"base_model.model.{name}": torch.cat((weights[name], torch.ones(1, 32))) for name in names}
    write_adapter(adapter, {"peft_type": "LORA", "base_model_name_or_path": str(tiny_dir)}, whole)
    assert main(["convert", str(adapter), str(tmp_path / "merged")]) == 0
    for path in (adapter, tmp_path / "merged"):
        llm = LLM(path, "float32", kernels="off")
        assert (llm.config.vocab_size, llm.tokenizer.vocab_size) == (261, 261)
        assert llm.tokenizer.eos_ids == {257, 259, 260}
        assert llm.tokenizer.apply_chat_template([{"role": "user", "content": "a"}])[-1] == 260
