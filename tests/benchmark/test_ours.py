"""The workers that drive this engine, called in this process."""

from pathlib import Path

import pytest
import torch

from benchmark import ours
from benchmark.ours import Billion, Loading, Ours, Steps, Weights, matrix_bytes, random_source, steps, weight_bytes
from benchmark.random_gguf import EIGHT_BILLION, write_random_gguf
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from llama_mini.optimize.fused_step import FusedStep
from tests.tiny_models import TINY, random_tokens, tiny_model

SMALL = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97}
IDS = list(range(3, 40))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], list[int]]]:
    """What every forward pass of any model gets: the shape of its tokens, and how much was filled before."""
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    plain, whole = Llama.hidden, FusedStep.__call__

    def hidden(self: Llama, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        assert cache is not None
        seen.append((tuple(tokens.shape), cache.positions(tokens.shape[1])[:, 0].tolist()))
        return plain(self, tokens, cache)

    def step(self: FusedStep, tokens: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor] | None:
        before = cache.positions(1)[:, 0].tolist()
        if (found := whole(self, tokens, cache)) is not None:
            seen.append((tuple(tokens.shape), before))
        return found

    monkeypatch.setattr(Llama, "hidden", hidden)
    monkeypatch.setattr(FusedStep, "__call__", step)
    return seen


@pytest.mark.parametrize("method", ["prefill", "stream_prefill"])
def test_prefill_is_the_prompt_and_nothing_else(method: str, tiny_dir: Path, fed: list) -> None:
    worker = Ours(str(tiny_dir), "float32", None, 1)
    assert getattr(worker, method)(IDS) > 0
    assert fed == [((1, 37), [0])]


@pytest.mark.parametrize("method", ["decode", "stream_decode"])
def test_decode_is_so_many_steps_after_the_prompt(method: str, tiny_dir: Path, fed: list) -> None:
    worker = Ours(str(tiny_dir), "float32", None, 1)
    assert getattr(worker, method)(IDS, 5) > 0
    assert fed == [((1, 37), [0]), *(((1, 1), [37 + i]) for i in range(5))]


def test_sequences_are_prefilled_alone_and_step_together(tiny_dir: Path, fed: list) -> None:
    Ours(str(tiny_dir), "float32", None, 1).decode(IDS, 2, 3)
    assert fed == [((1, 37), [0])] * 3 + [((3, 1), [37] * 3), ((3, 1), [38] * 3)]


def test_steps_are_greedy() -> None:
    model = tiny_model()
    cache, again = model.new_cache(1, 8), model.new_cache(1, 8)
    assert steps(model, cache, 4) > 0
    tokens = [1]
    for _ in range(3):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    model(torch.tensor([tokens]), again)
    assert cache.lengths == [4]
    torch.testing.assert_close(cache._k[..., :4, :], again._k[..., :4, :])


def test_nll_is_the_mean_of_the_scores(tiny_dir: Path) -> None:
    logits = Llama.from_pretrained(tiny_dir)(torch.tensor([IDS]))[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:])).item()
    assert Ours(str(tiny_dir), "float32", None, 1).nll(IDS) == pytest.approx(expected, rel=1e-5)


def test_the_profile_names_operators_and_what_lies_between(tiny_dir: Path) -> None:
    said = Ours(str(tiny_dir), "float32", None, 1).profile(IDS, 2)
    assert "a prompt of 37 tokens and 2 steps" in said
    assert "aten::" in said
    assert said.splitlines()[-1].endswith("Python between operators")


@pytest.mark.parametrize(("kv_dtype", "quantize"), [("auto", None), ("int8", "int8")])
def test_steps_in_the_engines_cache_read_the_text_before_them(
    tiny_dir: Path, kv_dtype: str, quantize: str | None
) -> None:
    worker = Steps(str(tiny_dir), "float32", quantize, kv_dtype, 1, IDS)
    seen: list[torch.Tensor] = []
    worker._step = lambda tokens, cache: seen.append(FusedStep(worker._model)(tokens, cache)[0]) or (seen[-1], tokens)
    assert worker.at(20, 3, 2) > 0
    assert worker.at(30, 1, 1) > 0
    expected = worker._model(torch.tensor([[*IDS[:20], 1, 1, 1]]))[0, -3:]
    most = 0.05 if quantize else 1e-4
    assert [len(logits) for logits in seen] == [3, 3, 1]
    assert (seen[1] - expected).norm() < most * expected.norm()


@pytest.mark.parametrize(("kind", "tied"), [("Q4_K_M", True), ("Q4_0", False)])
def test_a_file_of_random_weights_is_one_of_llama_cpps(tmp_path: Path, kind: str, tied: bool) -> None:
    shape = {**EIGHT_BILLION, **SMALL, "dim": 256, "hidden_dim": 512, "n_layers": 8, "tie_word_embeddings": tied}
    write_random_gguf(tmp_path / "model.gguf", kind, shape)
    source = open_checkpoint(tmp_path / "model.gguf")
    assert source.config == LlamaConfig(**shape)
    kinds = {name: stored.number_format for name, stored in source.tensors.items() if len(stored.shape) == 2}
    if kind == "Q4_K_M":  # as llama.cpp's own quantize mixes them
        more = {name for name, each in kinds.items() if each == "Q6_K"}
        assert set(kinds.values()) == {"Q4_K", "Q6_K"}
        assert {int(name.split(".")[1]) for name in more if "attn_v" in name} == {0, 3, 6, 7}
    else:
        assert [name for name, each in kinds.items() if each != "Q4_0"] == ["output.weight"]
    worker = Weights(str(tmp_path / "model.gguf"), 1)
    assert worker.prefill(IDS) > 0
    assert worker.decode(IDS, 2) > 0
    assert worker.memory() >= 0  # over the peak of this process, which may have been higher
    logits = Llama.from_pretrained(tmp_path / "model.gguf", dtype="float32")(torch.tensor([IDS]))
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_large_shape_steps_at_any_context_of_its_cache(quantize: str | None, fed: list) -> None:
    worker = Billion(quantize, 48, 1, SMALL)
    fed.clear()
    for context in (40, 16, 44):
        worker.decode(context, 2)
    assert fed == [((1, 1), [n + i]) for n in (40, 16, 44) for i in range(2)]


def test_the_bytes_of_a_step_are_those_of_the_matrices() -> None:
    layers = 2 * 64 * (64 + 32 + 32 + 64 + 3 * 96)
    assert Billion(None, 16, 1, SMALL).step_bytes() == 2 * (layers + 97 * 64)
    int8, int4 = (Billion(q, 16, 1, SMALL).step_bytes() for q in ("int8", "int4"))
    assert layers / 2 < int4 < layers < int8 < 2 * layers


def test_random_weights_are_a_checkpoint_like_any_other() -> None:
    model = load_model(Llama, random_source(LlamaConfig(**TINY)), torch.float32, "cpu", fuser("off"))
    plain = load_model(Llama, random_source(LlamaConfig(**TINY)), torch.float32, "cpu")
    assert model(random_tokens(1, 9)).isfinite().all()
    assert 0.5 < plain.norm.weight.min() < plain.norm.weight.max() < 1.5
    assert plain.layers[0].attention.q_proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.1)
    assert matrix_bytes(plain) == 0
    assert weight_bytes(plain) >= 4 * sum(p.numel() for p in plain.parameters())


def test_a_load_says_its_time_and_its_memory(tiny_dir: Path) -> None:
    found = Loading(1).load(str(tiny_dir), "float32", None, IDS, 2)
    assert found["seconds"] > 0
    assert 0 < found["floor"] <= found["peak"] == ours.peak_bytes()
    stored = 4 * sum(p.numel() for p in Llama.from_pretrained(tiny_dir).parameters())
    assert stored <= found["weights"] < 1.05 * stored
