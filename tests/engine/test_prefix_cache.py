"""Prefix reuse: what is reused, that it changes nothing, and that a failed request is never reused."""

import random
import weakref

import pytest
import torch

from llama_mini import LLM, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine.prefix_cache import MIN_PREFIX, common_prefix_length
from llama_mini.errors import CapacityError, NumericalError

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SYSTEM = [(7 * i + i * i) % 200 + 40 for i in range(90)]


@pytest.fixture
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="float32")


def cold(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY):
    llm.forget()
    return llm.generate(prompt, params)[0]


def test_how_much_two_prompts_share() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([5], [1]) == 0


def test_common_prefixes_of_random_lists() -> None:
    draw = random.Random(0)
    for _ in range(500):
        a = draw.choices(range(2), k=draw.randrange(40))
        b = [*a[: draw.randrange(len(a) + 1)], *draw.choices(range(300, 302), k=draw.randrange(5))]
        pairs = enumerate(zip(a, b, strict=False))
        expected = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
        assert common_prefix_length(a, b) == common_prefix_length(b, a) == expected


def test_prompts_that_begin_alike_are_compared_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm#9985: each group of 16 was compared with all prompts of the call, which takes hours for 100,000."""
    compared = []

    def counted(a: list[int], b: list[int]) -> int:
        compared.append((a, b))
        return common_prefix_length(a, b)

    monkeypatch.setattr(runner_module, "common_prefix_length", counted)
    prompts = [[*SYSTEM[:40], 50 + (7 * i) % 64] for i in range(64)]
    completions = llm.generate(prompts, SamplingParams(max_tokens=1))
    assert compared == [([*SYSTEM[:40], 50], [*SYSTEM[:40], 113])]
    assert [c.stats.cached_tokens for c in completions] == [0] + [40] * 63


def scale_the_gain(llm: LLM) -> None:
    with torch.no_grad():
        llm.model.norm.weight.mul_(-1)


def replace_a_gain(llm: LLM) -> None:
    llm.model.norm.weight = torch.nn.Parameter(-llm.model.norm.weight)


def swap_a_norm(llm: LLM) -> None:
    llm.model.norm = torch.nn.Identity()


def hook_a_norm(llm: LLM) -> None:
    llm.model.norm.register_forward_hook(lambda _module, _args, y: -y)


@pytest.mark.parametrize("change", [scale_the_gain, replace_a_gain, swap_a_norm, hook_a_norm])
def test_a_changed_model_reuses_nothing_of_before(llm: LLM, change) -> None:
    llm.generate(SYSTEM, GREEDY)
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == len(SYSTEM) - 1
    change(llm)
    changed = llm.generate(SYSTEM, GREEDY)[0]
    assert changed.stats.cached_tokens == 0
    assert changed.token_ids == cold(llm, SYSTEM).token_ids
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == len(SYSTEM) - 1


def test_a_changed_weight_in_int8_reuses_nothing_of_before(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", quantize="int8")
    llm.generate(SYSTEM, GREEDY)
    next(buffer for name, buffer in llm.model.named_buffers() if name.endswith("scales")).mul_(2)
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == 0


def test_a_turn_prefills_only_what_is_new(llm: LLM) -> None:
    first = llm.generate(SYSTEM, GREEDY)[0]
    again = [*SYSTEM, *first.token_ids, 50, 51, 52]
    second = llm.generate(again, GREEDY)[0]
    assert first.stats.cached_tokens == 0
    assert second.stats.cached_tokens == len(SYSTEM) + len(first.token_ids) - 1  # the last token was never fed
    alone = cold(llm, again)
    assert alone.stats.cached_tokens == 0
    assert second.token_ids == alone.token_ids
    assert second.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_the_prompts_of_a_batch_share_one_prefill(llm: LLM) -> None:
    prompts = [[*SYSTEM, *range(60, 60 + i % 9), 45 + i] for i in range(19)]  # more than decode together
    together = llm.generate(prompts, GREEDY)
    assert sum(c.stats.cached_tokens < len(SYSTEM) for c in together) == 1  # the first one pays for all
    for prompt, completion in zip(prompts, together, strict=True):
        alone = cold(llm, prompt)
        assert completion.token_ids == alone.token_ids
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_the_same_prompt_twice_and_a_shorter_one(llm: LLM) -> None:
    llm.generate(SYSTEM, GREEDY)
    for prompt in (SYSTEM, SYSTEM[: MIN_PREFIX + 1], SYSTEM[:MIN_PREFIX]):
        warm = llm.generate(prompt, GREEDY)[0]
        assert warm.stats.cached_tokens == (len(prompt) - 1 if len(prompt) > MIN_PREFIX else 0)
        alone = cold(llm, prompt)
        assert warm.token_ids == alone.token_ids
        llm.generate(SYSTEM, GREEDY)


def test_a_stream_left_early_is_taken_over_as_far_as_it_came(llm: LLM) -> None:
    chunks = llm.stream(SYSTEM, GREEDY)
    ids = [next(chunks).token_id for _ in range(5)]
    chunks.close()
    again = [*SYSTEM, *ids, 60]
    warm = llm.generate(again, GREEDY)[0]
    assert warm.stats.cached_tokens == len(SYSTEM) + 4
    assert warm.token_ids == cold(llm, again).token_ids


def test_a_failed_row_is_never_taken_over(llm: LLM) -> None:
    weight = llm.model.layers[0].attention.pre_norm.weight
    healthy = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        list(llm.stream(SYSTEM, GREEDY))
    weight.copy_(healthy)
    completion = llm.generate(SYSTEM, GREEDY)[0]
    assert completion.stats.cached_tokens == 0
    assert completion.token_ids == cold(llm, SYSTEM).token_ids


def test_prompt_logprobs_are_computed_anew(llm: LLM) -> None:
    llm.generate(SYSTEM, GREEDY)
    params = SamplingParams(max_tokens=2, prompt_logprobs=True, top_logprobs=3)
    completion = llm.generate(SYSTEM, params)[0]
    assert completion.stats.cached_tokens == 0
    logits = llm.model(torch.tensor([SYSTEM]))[0]
    expected = logits.log_softmax(-1)[range(len(SYSTEM) - 1), SYSTEM[1:]].tolist()
    assert completion.prompt_logprobs[0] is None
    assert completion.prompt_logprobs[1:] == pytest.approx(expected, abs=2e-5)
    for row, alternatives in enumerate(completion.prompt_top_logprobs[1:]):
        assert [token for token, _ in alternatives] == logits[row].topk(3).indices.tolist()
    assert completion.logprobs == cold(llm, SYSTEM, SamplingParams(max_tokens=2)).logprobs  # bit for bit


def test_what_was_kept_makes_room(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.generate(SYSTEM, GREEDY)
    kept = weakref.ref(llm._runner.last_prefix.cache)

    def full(*_: object) -> None:
        if kept() is not None:
            raise CapacityError("full")

    monkeypatch.setattr(runner_module, "check_cache_fits", full)
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == 0

    def never(*_: object) -> None:
        raise CapacityError("full")

    monkeypatch.setattr(runner_module, "check_cache_fits", never)
    with pytest.raises(CapacityError):
        llm.generate(SYSTEM, GREEDY)
