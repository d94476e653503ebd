"""Guesses of the next tokens: they change no text and no distribution, and step aside where they do not pay."""

import itertools
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from llama_mini import LLM, Completion, Llama, SamplingParams
from llama_mini.engine import draft, speculative
from llama_mini.engine.request import Request
from llama_mini.engine.speculative import LookupProposer, PromptLookup, StepTimes
from tests.engine.test_scheduler import prompt_of, small_cache

PROMPTS = [[7, 8, 9, 10] * 12, prompt_of(250, 1), [5], prompt_of(40, 2) * 2]
SAMPLED = {"temperature": 0.1, "seed": 3}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess pays."""
    monkeypatch.setattr(StepTimes, "fit", lambda self: (1e9, 1.0))


@pytest.fixture(scope="module")
def plain(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="bfloat16", threads=1, speculation="off")


@pytest.fixture(scope="module")
def other_dir(tiny_dir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise on its weights."""
    path = tmp_path_factory.mktemp("other") / "model"
    model = Llama.from_pretrained(tiny_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    model.save_pretrained(path)
    for file in tiny_dir.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def everything(completion: Completion) -> tuple[object, ...]:
    return (
        completion.text,
        completion.token_ids,
        completion.finish_reason,
        completion.logprobs,
        completion.top_logprobs,
    )


def counts(completions: list[Completion]) -> tuple[int, int]:
    """Guesses that were right, and all."""
    stats = [completion.stats for completion in completions]
    return sum(s.accepted_tokens for s in stats), sum(s.proposed_tokens for s in stats)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_texts_have_the_same_bits_with_guesses(tiny_dir, quantize: str | None) -> None:
    """Also beyond the end of a page, with everything that looks at the tokens so far, and alone or together."""
    on, off = (LLM(tiny_dir, dtype="bfloat16", quantize=quantize, threads=1, speculation=s) for s in ("auto", "off"))
    for settings in (
        {"max_tokens": 40, "top_logprobs": 2},
        {"max_tokens": 40, "ignore_eos": False, **SAMPLED},
        {"max_tokens": 25, "repetition_penalty": 1.01, "frequency_penalty": 0.01, "top_p": 0.9, **SAMPLED},
        {"max_tokens": 40, "min_tokens": 30, "stop": ["e", "o"], "stop_token_ids": [40], "top_k": 30, **SAMPLED},
    ):
        params = SamplingParams(**{"ignore_eos": True} | settings)
        expected = list(map(everything, off.generate(PROMPTS, params)))
        together = on.generate(PROMPTS, params)
        assert list(map(everything, together)) == expected
        assert [everything(on.generate(prompt, params)[0]) for prompt in PROMPTS] == expected
        right, proposed = counts(together)
        assert proposed > right > 0
    assert counts(off.generate(PROMPTS, max_tokens=20)) == (0, 0)


@pytest.mark.usefixtures("eager")
def test_a_guess_that_is_right_saves_a_step(tiny_dir, passes: list[tuple[int, int]]) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    right, proposed = counts(LLM(tiny_dir, dtype="bfloat16", threads=1).generate(PROMPTS[0], params))
    assert right > 0
    assert len(passes) == 40 - right  # the prompt, then steps
    assert sum(rows for rows, _ in passes) == 40 - right + proposed


@pytest.mark.usefixtures("eager")
def test_a_logits_processor_sees_each_token_once(tiny_dir, plain: LLM) -> None:
    def run(llm: LLM) -> tuple[list[int], list[list[int]]]:
        seen: list[list[int]] = []
        params = SamplingParams(
            max_tokens=30,
            ignore_eos=True,
            logits_processors=[lambda ids, logits: seen.append(ids) or logits],
            **SAMPLED,
        )
        return llm.generate(PROMPTS[0], params)[0].token_ids, seen

    assert run(LLM(tiny_dir, dtype="bfloat16", threads=1)) == run(plain)


@pytest.mark.usefixtures("eager")
def test_requests_with_guesses_are_preempted_and_stream(tiny_dir, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1)
    prompts = [[7, 8, 9, 10] * 50, prompt_of(210, 2), prompt_of(110, 3) * 2, prompt_of(250, 2)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    expected = [everything(plain.generate(prompt, params)[0]) for prompt in prompts]
    seen = small_cache(monkeypatch, 5)
    found = llm.generate(prompts, params)
    assert list(map(everything, found)) == expected
    assert seen
    assert counts(found)[0] > 0
    assert [chunk.token_id for chunk in llm.stream(prompts[0], params)] == expected[0][1]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("with_draft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_distribution_of_the_model(
    tiny_dir, other_dir: Path, with_draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary of four tokens: chi-square of the first three tokens against the model's probabilities."""
    for module in (speculative, draft):
        monkeypatch.setattr(module, "MOST_TOKENS", 200)
    llm = LLM(tiny_dir, dtype="float32", threads=1, draft=other_dir if with_draft else None)
    allowed = [60, 70, 80, 90]
    bias = {i: -float("inf") for i in range(llm.config.vocab_size) if i not in allowed}
    prompt = random.Random(5).choices(allowed, k=60)
    params = SamplingParams(n=500, max_tokens=4, temperature=1.0, seed=0, logit_bias=bias, ignore_eos=True)
    completions = llm.generate(prompt, params)
    found = Counter(tuple(c.token_ids[:3]) for c in completions)
    cells = list(itertools.product(allowed, repeat=3))
    with torch.inference_mode():
        logits = llm.model(torch.tensor([[*prompt, *cell] for cell in cells]))[:, -4:-1, allowed]
    at = torch.tensor([[allowed.index(token) for token in cell] for cell in cells])
    expected = 500 * logits.log_softmax(-1).gather(2, at[:, :, None])[:, :, 0].sum(1).exp()
    chi_square = sum((found[cell] - e) ** 2 / e for cell, e in zip(cells, expected.tolist(), strict=True))
    assert chi_square < 103.4  # of 63 degrees of freedom: more in one of a thousand runs
    right, proposed = counts(completions)
    assert 0.1 * proposed < right < 0.95 * proposed
    assert proposed > 500


def test_nothing_is_guessed_with_pytorchs_operators_or_for_many_requests(tiny_dir, eager: None) -> None:
    """The bits of PyTorch's operators depend on the number of tokens."""
    off = LLM(tiny_dir, dtype="float32", kernels="off", threads=1)
    assert counts(off.generate(PROMPTS, max_tokens=20)) == (0, 0)
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert counts(llm.generate(PROMPTS[0], params, n=16)) == (0, 0)  # they begin together
    assert counts(llm.generate(PROMPTS[0], params, n=8))[0] > 0


# --- what pays


def request_of(prompt: list[int], new: list[int]) -> Request:
    return Request(prompt, SamplingParams(), 100, None, 0.0, token_ids=new)  # type: ignore[arg-type]


def looked_up(prompt: list[int], new: list[int], proposer: LookupProposer, limit: int = 15) -> list[int]:
    request = request_of(prompt, new)
    return proposer.propose({request: limit}).get(request, [])


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "__post_init__", lambda self: None)


@pytest.mark.usefixtures("no_text")
def test_guesses_are_as_many_as_pay() -> None:
    """By what tokens cost beside a step, and by how many tokens are equal."""
    text = list(range(40, 60))
    proposer = LookupProposer()
    assert looked_up(text, text[:9], proposer, limit=3) == text[9:12]
    assert looked_up(text, text[:9], proposer, limit=0) == []
    for cost, fewest, most in ((1e-4, 11, 11), (0.1, 3, 11), (1.5, 0, 0)):
        for n in range(1, 200):
            proposer.times.add(n % 4 + 1, 1 + cost * (n % 4))
        guess = looked_up(text, text[:9], proposer)
        assert guess[:11] == text[9:][: len(guess)]
        assert fewest <= min(len(guess), 11) <= most
    assert looked_up(text, [1, 2, 3], LookupProposer()) == []
    assert len(looked_up(text, [1, 2, *text[:2]], LookupProposer())) < len(looked_up(text, text[:9], LookupProposer()))


def test_the_time_of_a_step_is_a_line_through_what_was_measured() -> None:
    times, draw = StepTimes(), random.Random(0)
    step, each = times.fit()
    assert 0 < each < step
    for _ in range(30):
        times.add(1, 0.005)
    step, each = times.fit()
    assert step + each == pytest.approx(0.005)
    assert 0 < each < step
    for _ in range(200):
        n = draw.randrange(1, 9)
        times.add(n, (0.004 + 0.0007 * n) * draw.uniform(0.9, 1.1))
    times.add(2, 1.0)  # another process had the processor
    step, each = times.fit()
    assert each == pytest.approx(0.0007, rel=0.3)
    assert step == pytest.approx(0.004, rel=0.25)


def test_what_never_comes_true_is_guessed_no_more() -> None:
    """And again once it does. A token counts whether it was guessed in a step or not."""
    lookup = PromptLookup([1, 2, 3])
    before = lookup.initial_rates[2]
    for i in range(60):
        lookup.extend([1, 2, 100 + i])
    lookup.extend([1, 2])
    assert lookup.rate(0) < 0.1 * before
    for _ in range(40):
        lookup.extend([7, 8, 9, 30, 31, 32, 33, 34])
    assert lookup.rate(0) > 0.9


def test_a_guess_follows_the_longest_run_of_equal_tokens_that_it_began_with() -> None:
    draw = random.Random(1)
    for _ in range(50):
        prompt, new = draw.choices(range(4), k=draw.randrange(1, 30)), draw.choices(range(4), k=60)
        lookup, tokens = PromptLookup(prompt), list(prompt)
        for token in [None, *new]:
            if token is not None:
                lookup.extend([token])
                tokens.append(token)
            if not lookup.rate(0):
                assert tokens[-1] not in tokens[:-1]
                continue
            n, at = lookup._equal, lookup._next
            assert tokens[at - n : at] == tokens[-n:]
            assert n > 0
            assert [lookup.token(i) for i in range(3)] == [*tokens[at:], *tokens[at:], *tokens[at:]][:3]
