"""The default checkpoint against transformers: logits, greedy tokens, bfloat16's error, and one golden text."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llama_mini import LLM, Llama, SamplingParams
from llama_mini.generate import main

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "greedy.json").read_text(encoding="utf-8"))  # scripts/make_golden_texts.py
CASES = RECORDED["cases"]
PROMPTS = [case["prompt"] for case in CASES]
STEPS = 64


@pytest.fixture(scope="module")
def theirs(smollm2_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> LLM:
    return LLM(smollm2_dir, dtype="float32")


def test_logits_and_greedy_tokens_are_those_recorded_of_transformers(llm: LLM) -> None:
    for case in CASES:
        assert llm.tokenizer.encode(case["prompt"]) == case["ids"]
        logits, recorded = llm.model(torch.tensor([case["ids"]]))[0, -1], torch.tensor(case["logits"])
        assert (logits[:: RECORDED["every"]] - recorded).abs().max() <= 1e-4 * logits.abs().max()
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=STEPS, ignore_eos=True))
    assert [answer.token_ids for answer in answers] == [case["tokens"] for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:20])
def test_logits_and_greedy_tokens_equal_transformers(prompt: str, llm: LLM, theirs: PreTrainedModel) -> None:
    ids = llm.tokenizer.encode(prompt)
    tokens, past, expected = torch.tensor([ids]), None, []
    with torch.inference_mode():
        logits = theirs(tokens).logits
        assert (llm.model(tokens) - logits).abs().max() <= 1e-4 * logits.abs().max()
        for _ in range(STEPS):  # by hand: `generate` stops at the end of text, or bans it, and either hides steps
            out = theirs(tokens, past_key_values=past, use_cache=True)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            expected.append(int(tokens))
    (ours,) = llm.generate(ids, SamplingParams(max_tokens=STEPS, ignore_eos=True))
    assert ours.token_ids == expected


@pytest.mark.slow  # a batch is compared with what transformers gave of each prompt above, and by bits in optimize/
def test_a_batch_of_real_prompts_is_each_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24)
    together = llm.generate(PROMPTS, params)
    assert [c.token_ids for c in together] == [llm.generate(p, params)[0].token_ids for p in PROMPTS]


def kl(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean KL from the exact logits, in nats a token."""
    p = exact.log_softmax(-1)
    return float((p.exp() * (p - logits.float().log_softmax(-1))).sum(-1).mean())


def prose(llm: LLM, n: int) -> torch.Tensor:
    text = (GOLDEN / "alice.txt").read_text(encoding="utf-8")
    return torch.tensor(llm.tokenizer.encode(text)[:n]).view(-1, 512)


def test_bfloat16_is_as_close_to_float32_as_was_recorded_of_transformers(llm: LLM, smollm2_dir: Path) -> None:
    ids = prose(llm, RECORDED["prose_tokens"])
    with torch.inference_mode():
        found = kl(Llama.from_pretrained(smollm2_dir, dtype="bfloat16")(ids)[0], llm.model(ids)[0])
    assert 0 < found <= 1.1 * RECORDED["kl_of_bfloat16"]


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(
    llm: LLM, theirs: PreTrainedModel, smollm2_dir: Path
) -> None:
    """Over 2,048 tokens of prose, both from the same float32 logits, in pieces of 512."""
    ids = prose(llm, 2048)
    ours = Llama.from_pretrained(smollm2_dir, dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        exact = [theirs(row[None]).logits[0] for row in ids]
        our_kl = sum(kl(ours(row[None])[0], e) for row, e in zip(ids, exact, strict=True)) / 4
        their_kl = sum(kl(reference(row[None]).logits[0], e) for row, e in zip(ids, exact, strict=True)) / 4
    print(f"mean KL from float32: ours {our_kl:.3e}, transformers {their_kl:.3e} nats")
    assert 0 < our_kl <= 1.1 * their_kl


def test_golden_text(smollm2_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Covers tokenizer, template, model, loop and command line at once; transformers wrote the expected text."""
    texts = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))
    (case,) = [case for case in texts if case["checkpoint"] == "smollm2"]
    args = ["--model", str(smollm2_dir), "--dtype", "float32", "--max-tokens", str(case["max_tokens"])]
    assert main([*args, case["prompt"]]) == 0
    assert capfd.readouterr().out == case["text"] + "\n" * (not case["text"].endswith("\n"))


def test_tokens_equal_transformers(smollm2_dir: Path, llm: LLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for prompt in PROMPTS:
        assert llm.tokenizer.encode(prompt) == tokenizer(prompt).input_ids
        messages = [{"role": "user", "content": prompt}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        assert llm.tokenizer.apply_chat_template(messages) == expected


@pytest.mark.clock
def test_it_loads_in_under_half_a_second_from_a_warm_disk_cache(smollm2_dir: Path) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        Llama.from_pretrained(smollm2_dir)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.5


def test_the_gguf_file_beside_it_is_the_same_model(smollm2_dir: Path, smollm2_gguf: Path) -> None:
    one, other = Llama.from_pretrained(smollm2_gguf), Llama.from_pretrained(smollm2_dir)
    assert one.config == other.config
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name
    wide = Llama.from_pretrained(smollm2_gguf, dtype="float32")  # not rounded to bfloat16 on the way
    assert not torch.equal(wide.tok_embeddings.weight, other.tok_embeddings.weight.float())
