"""Requests of several callers in one batch: each has the bits that it has alone; what is left ends."""

import asyncio
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_mini import LLM, Completion, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine.pages import PAGE
from llama_mini.errors import CapacityError, RequestError

FORMATS = ["int4", *(pytest.param(each, marks=pytest.mark.slow) for each in (None, "int8"))]
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="bfloat16", threads=1)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


def settings(seed: int, n_new: int) -> SamplingParams:
    """Greedy or seeded; both give the log-probabilities of the prompt or the likeliest tokens now and then."""
    sampled = {"temperature": 1.0, "seed": seed} if seed % 2 else {}
    return SamplingParams(max_tokens=n_new, ignore_eos=True, prompt_logprobs=seed % 5 == 0, **sampled)


def alone(llm: LLM, prompt: list[int], params: SamplingParams) -> Completion:
    llm.forget()
    (completion,) = llm.generate(prompt, params)
    assert completion.stats.cached_tokens == 0
    return completion


def same_bits(a: Completion, b: Completion) -> bool:
    return (a.token_ids, a.logprobs, a.prompt_logprobs) == (b.token_ids, b.logprobs, b.prompt_logprobs)


def test_the_number_of_generated_tokens_never_falls(llm: LLM) -> None:
    before = llm.activity().generated_tokens
    for n in (3, 5):
        llm.generate("a", max_tokens=n, ignore_eos=True)
        llm.forget()
        before += n
        assert llm.activity().generated_tokens == before
    llm.generate("a", max_tokens=1)  # of a new runner, which counts once its step has ended
    assert before <= llm.activity().generated_tokens <= before + 1


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_request_has_the_bits_that_it_has_alone_in_any_company(tiny_dir, quantize: str | None) -> None:
    """Forty of them from four threads: they join and leave at any time, and some begin like others."""
    llm = LLM(tiny_dir, dtype="bfloat16", quantize=quantize, threads=1)
    draw = random.Random(1)
    system = prompt_of(300, 0)
    prompts = [prompt_of(draw.choice((1, 2, 3, 17, 100)), i) for i in range(30)]
    prompts += [system[: draw.randrange(30, 301)] + prompt_of(draw.randrange(1, 20), i) for i in range(10)]
    each = [settings(i, draw.randrange(1, 40)) for i in range(40)]
    expected = [alone(llm, prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    llm.forget()
    with ThreadPoolExecutor(4) as threads:
        calls = [
            threads.submit(lambda at: llm.generate(prompts[at : at + 4], each[at : at + 4]), at)
            for at in range(0, 40, 4)
        ]
        found = [completion for call in calls for completion in call.result()]
    assert all(map(same_bits, found, expected))
    assert sum(completion.stats.cached_tokens > 0 for completion in found) > 3


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("most", [2, 3, 50])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(
    tiny_dir, most: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's operators may choose another order of sums."""
    llm = LLM(tiny_dir, dtype="bfloat16" if kernels == "auto" else "float32", kernels=kernels, threads=1)
    prompts, each = [prompt_of(n, 1) for n in (300, 2, 51, 53)], [settings(n, 5) for n in (10, 5, 6, 7)]
    expected = [alone(llm, prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    monkeypatch.setattr(runner_module, "PREFILL_CHUNK", most)
    monkeypatch.setattr(runner_module, "LEAST_PREFILL", most)
    llm.forget()
    for completion, other in zip(llm.generate(prompts, each), expected, strict=True):
        if kernels == "auto":
            assert same_bits(completion, other)
        else:
            assert completion.token_ids == other.token_ids
            assert completion.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def small_cache(monkeypatch: pytest.MonkeyPatch, pages: int) -> list[int]:
    """A cache of so few pages. The list that comes back grows by one each time that a request is preempted."""
    monkeypatch.setattr(runner_module, "fitting_positions", lambda *_: pages * PAGE)
    seen: list[int] = []
    preempt = runner_module.Request.preempt
    monkeypatch.setattr(runner_module.Request, "preempt", lambda request: seen.append(1) or preempt(request))
    return seen


@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_request_that_is_preempted_goes_on_with_the_same_tokens(
    tiny_dir, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six that need two pages each at their end, in a cache of five: pages run out while they run."""
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1, prefix_cache=prefix_cache)
    prompts = [prompt_of(n, 2) for n in (200, 210, 220, 190, 250, 254)]
    each = [settings(i + 1, 100) for i in range(6)]
    expected = [alone(llm, prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    llm.forget()
    seen = small_cache(monkeypatch, 5)
    for completion, other in zip(llm.generate(prompts, each), expected, strict=True):
        assert same_bits(completion, other)
        assert (completion.text, completion.finish_reason) == (other.text, "length")
    assert seen


def test_what_does_not_fit_by_itself_is_refused_before_it_runs(tiny_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1)
    small_cache(monkeypatch, 1)
    prompt = prompt_of(200, 3)
    with pytest.raises(CapacityError, match=r"has 257 positions .* only 256 positions fit"):
        llm.generate(prompt, max_tokens=58)
    assert len(llm.generate(prompt, max_tokens=57, ignore_eos=True)[0].token_ids) == 57
    assert len(llm.generate(prompt, ignore_eos=True)[0].token_ids) == 57  # a default shrinks
    small_cache(monkeypatch, 0)
    llm.forget()
    with pytest.raises(CapacityError, match="only 0 positions"):
        llm.score(prompt)
    small_cache(monkeypatch, 2)
    assert llm.generate(prompt, max_tokens=58)  # there is more memory now


def test_what_no_longer_fits_when_its_turn_comes_fails_and_the_others_run(
    tiny_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is forgotten and made anew, with less memory, between the call and its turn."""
    llm, found = LLM(tiny_dir, dtype="bfloat16", threads=1), list[Completion]()
    llm.generate([5], max_tokens=1)
    with llm.exclusive():
        thread = threading.Thread(target=lambda: found.extend(llm.generate(prompt_of(300, 3), max_tokens=2)))
        thread.start()
        while not llm._scheduler._inbox.qsize():
            pass
        small_cache(monkeypatch, 1)
        llm._scheduler._runner = None
        llm._scheduler._get_runner()
    thread.join()
    assert "only 256 positions fit" in str(found[0].error)
    assert llm.generate([5], max_tokens=1)[0].error is None


@pytest.mark.parametrize("length", [2, 100, 256, 300])
def test_the_answers_to_one_prompt_share_one_prefill(llm: LLM, length: int, passes: list[tuple[int, int]]) -> None:
    prompt = prompt_of(length, 4)
    each = [SamplingParams(max_tokens=8, temperature=1.0, seed=9 + i, ignore_eos=True) for i in range(20)]
    expected = [alone(llm, prompt, params) for params in each]
    passes.clear()
    llm.forget()
    found = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=1.0, seed=9, n=20, ignore_eos=True))
    assert all(map(same_bits, found, expected))
    assert sum(n for rows, n in passes if n > 1) == length
    assert {rows for rows, n in passes if n == 1} == {20}


def test_calls_join_while_a_stream_is_open(llm: LLM) -> None:
    stream = llm.stream(prompt_of(9, 5), LONG)
    first = [next(stream).token_id for _ in range(3)]
    inner = llm.generate(prompt_of(7, 5), SamplingParams(max_tokens=3, ignore_eos=True))  # in the same thread
    assert llm.score(prompt_of(7, 5))[0] is None
    rest = [chunk.token_id for chunk in stream]
    assert first + rest == alone(llm, prompt_of(9, 5), LONG).token_ids
    assert inner[0].token_ids == llm.generate(prompt_of(7, 5), max_tokens=3, ignore_eos=True)[0].token_ids


def test_tasks_join(llm: LLM) -> None:
    async def text(seed: int) -> list[int | None]:
        return [chunk.token_id async for chunk in llm.astream(prompt_of(9, seed), settings(seed, 30))]

    async def all_of_them() -> list[list[int | None]]:
        return await asyncio.gather(*map(text, range(1, 9)))

    for seed, found in enumerate(asyncio.run(all_of_them()), 1):
        assert found == alone(llm, prompt_of(9, seed), settings(seed, 30)).token_ids


def test_exclusive_waits_for_its_turn_and_others_for_its_end(llm: LLM) -> None:
    stream = llm.stream(prompt_of(9, 7), LONG)
    ids = [next(stream).token_id]
    with llm.exclusive():
        for call in (lambda: llm.generate([5]), lambda: llm.score([5, 6]), llm.forget, lambda: next(llm.stream([5]))):
            with pytest.raises(RequestError, match=r"within exclusive\(\)"):
                call()
        with pytest.raises(RequestError, match=r"within exclusive\(\)"), llm.exclusive():
            pass
        later: list[Completion] = []
        thread = threading.Thread(target=lambda: later.extend(llm.generate([5], max_tokens=2, ignore_eos=True)))
        thread.start()
        expected = llm.model(torch.tensor([prompt_of(9, 7)]))[0, -1].argmax()
        assert later == []
    thread.join()
    assert len(later[0].token_ids) == 2
    ids += [chunk.token_id for chunk in stream]
    assert ids[0] == int(expected)
    assert ids == alone(llm, prompt_of(9, 7), LONG).token_ids


def test_what_a_hook_raises_reaches_its_callers_and_the_engine_goes_on(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", threads=1)
    expected = llm.generate([5, 6, 7], max_tokens=3)
    handle = llm.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError("a hook")))
    for call in (lambda: llm.generate([[5], [6]]), lambda: list(llm.stream([5])), lambda: llm.score([5, 6])):
        with pytest.raises(ZeroDivisionError, match="a hook"):
            call()

    async def stream() -> None:
        async for _ in llm.astream([5]):
            pass

    with pytest.raises(ZeroDivisionError, match="a hook"):
        asyncio.run(stream())
    handle.remove()
    assert llm.generate([5, 6, 7], max_tokens=3)[0].token_ids == expected[0].token_ids


def test_the_thread_ends_with_its_llm(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", threads=1)
    llm.generate([5], max_tokens=1)
    thread, model = llm._scheduler._thread, weakref.ref(llm.model)
    assert thread is not None
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert model() is None


def test_numbers_that_failed_poison_no_page_for_pytorchs_attention(tiny_dir) -> None:
    """It reads masked positions too. The failed rows leave NaN in pages that others take over."""
    llm = LLM(tiny_dir, dtype="float32", kernels="off", threads=1)
    expected = alone(llm, prompt_of(9, 8), settings(2, 40))
    weight = llm.model.layers[0].attention.pre_norm.weight
    healthy = weight.clone()
    weight.fill_(float("nan"))
    assert llm.generate(prompt_of(300, 8), max_tokens=2)[0].finish_reason == "error"
    weight.copy_(healthy)
    assert llm.generate(prompt_of(9, 8), settings(2, 40))[0].token_ids == expected.token_ids


def test_pytorchs_operators_give_each_row_what_it_has_alone(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", kernels="off", threads=1)
    prompts = [prompt_of(n, 9) for n in (1, 250, 300, 40)]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    together = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        other = alone(llm, prompt, params)
        assert completion.token_ids == other.token_ids
        assert completion.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_log_probabilities_only_where_they_are_asked_for(llm: LLM) -> None:
    both = llm.generate([[5], [5]], [{"max_tokens": 4, "logprobs": False}, {"max_tokens": 4}])
    assert both[0].token_ids == both[1].token_ids
    assert [len(c.logprobs) for c in both] == [0, len(both[1].token_ids)]
