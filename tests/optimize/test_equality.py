"""Fast models against the plain model on logits, for every format, dtype, batch and context.

Quantized models are compared with a plain model of the same weights, dequantized. The tolerances are relative, of each
token's logits: float32 sums in another order; activations of 16 bits for quantized weights; and in bfloat16 the
rounding of every layer, which differs wherever sums differ.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_mini import LLM, KVCache, Llama, NormPlan, SamplingParams, Tokenizer
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.optimize.conftest import DTYPES, FORMATS, KERNELS, Seen, error, fast_of, plain_of, prompts, steps
from tests.tiny_models import random_tokens, tiny_model

LATE = NormSpec(cast="late")
QK_LATE = NormPlan(
    attention=BranchPlan(pre=LATE, q=LATE, k=LATE), feed_forward=BranchPlan(pre=NormSpec(eps=1e-2)), final=NormSpec()
)
SHAPES: dict[str, dict[str, Any]] = {
    "gqa, head_dim 8": {},
    "mqa, tied, biases, no multiple of 16": {
        "dim": 37, "hidden_dim": 51, "n_heads": 7, "n_kv_heads": 1, "head_dim": 10, "tie_word_embeddings": True,
        "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    },
    "mha, head_dim 64, every bias": {
        "dim": 64, "hidden_dim": 96, "n_heads": 2, "n_kv_heads": 2, "head_dim": 64, "vocab_size": 128,
        "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    },
    "head_dim 80, tied, windows in some layers": {
        "n_heads": 10, "n_kv_heads": 2, "head_dim": 80, "sliding_window": 100, "sliding_layers": (0, 2),
        "qkv_bias": True, "tie_word_embeddings": True,
    },
    "head_dim 96, q and k normed early": {"n_heads": 3, "n_kv_heads": 1, "head_dim": 96, "norm_plan": "pre+qk"},
    "q and k normed late, a window beyond a chunk": {
        "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "norm_plan": QK_LATE, "sliding_window": 300,
        "sliding_layers": (1,),
    },
}  # fmt: skip
SHAPES_OF_FAMILIES: dict[str, dict[str, Any]] = {  # which no operator takes through whole layers
    "soft caps, a scale, windows": {
        "attention_softcap": 2.0, "attention_scale": 0.4, "sliding_window": 30, "sliding_layers": (1,),
        "activation": "gelu_tanh", "norm_plan": "peri+qk",
    },
    "mqa, partial rotation": {"n_heads": 5, "n_kv_heads": 1, "head_dim": 80, "rotary_dim": 20, "gated_mlp": False},
}  # fmt: skip
OTHER_PLANS = (
    "post", "peri", "out+qk:full", "deep", "lns", "sub", "mix(.5)", "pre+qk:full", "normformer", "simple"
)  # fmt: skip
LENGTHS = (1, 16, 17, 254, 510, 600)  # decode crosses 256 and 512, where attention's next chunk offsets
CHUNKS = (100, 16, 300)


def tolerance(dtype: torch.dtype, quantize: str | None, kernels: str) -> float:
    """With quantized weights, activations have 16 bits; in a bfloat16 prompt without AMX mostly 8, three times the
    rounding of bfloat16 itself."""
    quantized = bool(quantize) and kernels == "auto"
    if dtype == torch.bfloat16:
        return 0.06 if quantized else 0.03
    return 3e-4 if quantized else 2e-5


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        *((torch.float32, kernels) for kernels in KERNELS),
        (torch.bfloat16, "auto"),
        pytest.param(torch.bfloat16, "off", marks=pytest.mark.slow),  # one shape of it is among the batches below
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_steps_of_any_length_are_the_plain_models(
    shape: str, dtype: torch.dtype, quantize: str | None, kernels: str
) -> None:
    plain, expected = plain_run(shape, dtype, quantize)
    found = run(fast_of(plain, quantize, kernels), LENGTHS, 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs) < tolerance(dtype, quantize, kernels)


@cache
def plain_run(shape: str, dtype: torch.dtype, quantize: str | None) -> tuple[Llama, list[Tensor]]:
    """A plain model, and what it gives of the weights that a format keeps of it: those of either setting of kernels."""
    plain = tiny_model(1, dtype, **{"max_seq_len": 1024} | SHAPES[shape])
    return plain, run(plain_of(fast_of(plain, quantize), plain), LENGTHS, 4)


def run(model: Llama, lengths: Sequence[int], n: int, chunks: Sequence[int] = (10**6,)) -> list[Tensor]:
    """Logits of a prompt of each length, (T, V), and last of n steps of them all."""
    cache = model.new_cache(len(lengths), max(lengths) + n)
    return [*prompts(model, cache, lengths, chunks), steps(model, cache, n)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)), 16])
def test_every_batch_after_prompts_in_chunks(
    batch: int, dtype: torch.dtype, quantize: str | None, kernels: str
) -> None:
    plain, expected = plain_batch(batch, dtype, quantize)
    found = run(fast_of(plain, quantize, kernels), batch_lengths(batch), 3, CHUNKS)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < tolerance(dtype, quantize, kernels)


def batch_lengths(batch: int) -> list[int]:
    return [(250 + 97 * row) % 430 + 1 for row in range(batch)]


@cache
def plain_batch(batch: int, dtype: torch.dtype, quantize: str | None) -> tuple[Llama, list[Tensor]]:
    plain = tiny_model(2, dtype, max_seq_len=1024, norm_plan="pre+qk")
    return plain, run(plain_of(fast_of(plain, quantize), plain), batch_lengths(batch), 3, CHUNKS)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 40), (3, 40)], ids=str)
def test_without_a_cache_too(tokens: tuple[int, int], quantize: str | None, kernels: str) -> None:
    plain = tiny_model(3, sliding_window=9, sliding_layers=(1,))
    fast = fast_of(plain, quantize, kernels)
    ids = random_tokens(*tokens)
    assert error(fast(ids), plain_of(fast, plain)(ids)) < tolerance(torch.float32, quantize, kernels)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("plan", OTHER_PLANS)
def test_each_other_plan_equals_the_plain_model(plan: str, quantize: str | None) -> None:
    plain = tiny_model(4, norm_plan=plan, n_layers=4)
    fast = fast_of(plain, quantize)
    plain, most = plain_of(fast, plain), tolerance(torch.float32, quantize, "auto")
    for ours, theirs in zip(*(run(model, (30, 1, 19), 3) for model in (fast, plain)), strict=True):
        assert error(ours, theirs) < most


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize(
    ("plan", "n_operators"), [("pre", 1), ("pre+qk", 1), ("pre+qk:full", 1), ("peri", 1), ("lns", 1), ("mix(.5)", 1)]
)
def test_step_and_prompt_are_one_operator_for_each_run_of_layers_that_it_supports(
    plan: str, n_operators: int, quantize: str | None
) -> None:
    """`lns` scales every norm but the first layer's; the second half of `mix(.5)` is the plain plan."""
    fast = fast_of(tiny_model(5, norm_plan=plan, n_layers=4), quantize)
    cache = fast.new_cache(2, 16)
    with Seen() as seen:
        steps(fast, cache, 1)
    assert seen.names.count("layers") == n_operators
    assert seen.names[-1] == "gemv"
    with Seen() as seen:
        fast(random_tokens(1, 20), fast.new_cache(1, 32))
    assert seen.names.count("layers") == n_operators
    assert seen.names[-1] == "gemm"


# --- rows alone and together ---


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [*((torch.bfloat16, q) for q in (None, "mixed")), *((d, q) for d in DTYPES for q in ("int8", "int4"))],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    ["mqa, tied, biases, no multiple of 16", "head_dim 80, tied, windows in some layers", *SHAPES_OF_FAMILIES],
)
def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(shape: str, dtype: torch.dtype, quantize: str | None) -> None:
    fast = fast_of(tiny_model(6, dtype, max_seq_len=1024, **(SHAPES | SHAPES_OF_FAMILIES)[shape]), quantize)
    lengths = [1, 255, 31, 300, 2, 16, 511, *(row * 7 % 60 + 1 for row in range(33))]
    alone = fast.new_cache(40, 520)
    prompts(fast, alone, lengths)
    filled, tokens = copy.deepcopy(alone), random_tokens(40, 2).split(1, dim=1)
    own = [torch.cat([fast(token[row : row + 1], alone.row(row)) for row in range(40)]) for token in tokens]
    for batch in (2, 3, 7, 16, 40):
        together = first_rows(filled, batch)
        for token, expected in zip(tokens, own, strict=True):
            logits, expected = fast(token[:batch], together), expected[:batch]
            if dtype == torch.float32 and shape in SHAPES_OF_FAMILIES:  # PyTorch's SiLU depends on how many there are
                assert error(logits, expected) < tolerance(dtype, quantize, "auto"), batch
            else:
                assert torch.equal(logits, expected), batch


def first_rows(filled: KVCache, n: int) -> KVCache:
    """A copy of a cache, cut to its first n rows."""
    cache = copy.deepcopy(filled)
    cache._k, cache._v, cache._layers = cache._k[:, :n].clone(), cache._v[:, :n].clone(), None
    cache._host_lengths, cache._lengths = cache._host_lengths[:n], cache._lengths[:n]
    return cache


@pytest.mark.parametrize("quantize", FORMATS)
def test_answers_of_a_batch_are_those_of_each_prompt_alone(tiny_dir, quantize: str | None) -> None:
    llm = LLM(tiny_dir, dtype="bfloat16", quantize=quantize, threads=1)
    questions = [f"{row}{' word' * (row * 5 % 17)}" for row in range(16)]  # none offsets as another does
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for question, together in zip(questions, llm.generate(questions, params), strict=True):
        llm.forget()
        (alone,) = llm.generate(question, params)
        assert alone.stats.cached_tokens == together.stats.cached_tokens == 0
        assert together.token_ids == alone.token_ids
        assert together.logprobs == alone.logprobs


# --- the default checkpoint ---

QUESTIONS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"]


@pytest.mark.parametrize("quantize", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "int8"))])
def test_answers_of_the_default_checkpoint_have_the_same_bits_in_a_batch(smollm2_dir, quantize: str | None) -> None:
    llm = LLM(smollm2_dir, dtype="bfloat16", quantize=quantize, threads=1)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for question, together in zip(QUESTIONS, llm.generate(QUESTIONS, params), strict=True):
        (alone,) = llm.generate(question, params)
        assert (together.token_ids, together.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.slow  # tests/model/test_real_checkpoint.py has the recorded text of a batch, too
def test_greedy_text_in_float32_is_the_plain_models(smollm2_dir) -> None:
    """Token by token: where the plain model reads the whole text, each argmax is the token that follows."""
    tokenizer, plain = Tokenizer.from_pretrained(smollm2_dir), Llama.from_pretrained(smollm2_dir, dtype="float32")
    fast, off = (LLM(smollm2_dir, dtype="float32", kernels=kernels, threads=1) for kernels in KERNELS)
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    answers = fast.generate(QUESTIONS, params)
    assert off.generate(QUESTIONS[0], params)[0].token_ids == answers[0].token_ids
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = tokenizer.encode(question) + answer.token_ids
        assert plain(torch.tensor([ids]))[0, -49:-1].argmax(-1).tolist() == answer.token_ids
