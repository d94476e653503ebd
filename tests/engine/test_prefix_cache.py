"""Prefix reuse: what is reused, that it changes nothing, and that a failed request is never reused."""

import random

import pytest
import torch

from llama_mini import LLM, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine.pages import PAGE, Pages, SequencePages, pages_of
from llama_mini.engine.prefix_cache import MIN_PREFIX, PrefixCache, common_prefix_length
from llama_mini.engine.scheduler import Scheduler
from llama_mini.errors import NumericalError, RequestError
from tests.tiny_models import tiny_model

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
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == len(SYSTEM) - 2
    change(llm)
    changed = llm.generate(SYSTEM, GREEDY)[0]
    assert changed.stats.cached_tokens == 0
    assert changed.token_ids == cold(llm, SYSTEM).token_ids
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == len(SYSTEM) - 2


def test_a_changed_weight_in_int8_reuses_nothing_of_before(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", quantize="int8")
    llm.generate(SYSTEM, GREEDY)
    next(buffer for name, buffer in llm.model.named_buffers() if name.endswith("scales")).mul_(2)
    assert llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens == 0


def test_a_turn_prefills_the_last_answer_and_what_is_new(llm: LLM) -> None:
    """An answer's keys are rounded as decoding rounds; those of a prompt are not."""
    first = llm.generate(SYSTEM, GREEDY)[0]
    again = [*SYSTEM, *first.token_ids, 50, 51, 52]
    second = llm.generate(again, GREEDY)[0]
    third = llm.generate([*again, *second.token_ids, 53, 54], GREEDY)[0]
    assert [turn.stats.cached_tokens for turn in (first, second, third)] == [0, len(SYSTEM), len(again)]
    alone = cold(llm, again)
    assert (second.token_ids, second.logprobs) == (alone.token_ids, alone.logprobs)


def test_the_prompts_of_a_batch_share_one_prefill(llm: LLM) -> None:
    prompts = [[*SYSTEM, *range(60, 60 + i % 9), 45 + i, 50] for i in range(39)]  # more than run together
    together = llm.generate(prompts, GREEDY)
    assert sum(c.stats.cached_tokens < len(SYSTEM) for c in together) == 1  # the first one pays for all
    for prompt, completion in zip(prompts, together, strict=True):
        alone = cold(llm, prompt)
        assert (completion.token_ids, completion.logprobs) == (alone.token_ids, alone.logprobs)


def test_the_same_prompt_twice_a_shorter_one_and_others(llm: LLM) -> None:
    """Also across the end of a page. The last two tokens run again."""
    long = [*SYSTEM, *SYSTEM[:60], *SYSTEM, *SYSTEM]
    for prompt in (SYSTEM, long, long[:256], long[:257], long[:258]):
        llm.forget()
        llm.generate(prompt, GREEDY)
        changed = [*prompt[:-1], prompt[-1] + 1]
        for again in (prompt, prompt[: MIN_PREFIX + 2], prompt[: MIN_PREFIX + 1], changed, [*prompt, 50, 51]):
            warm = llm.generate(again, GREEDY)[0]
            shared = min(common_prefix_length(prompt, again), len(again) - 2)
            assert warm.stats.cached_tokens == (shared if shared >= MIN_PREFIX else 0)
            other = LLM.__new__(LLM)  # the same model with a cache of its own
            other.__dict__ = llm.__dict__ | {"_scheduler": Scheduler(llm.model, llm.tokenizer.eos_ids, False)}
            cold_one = other.generate(again, GREEDY)[0]
            assert (warm.token_ids, warm.logprobs) == (cold_one.token_ids, cold_one.logprobs)


def test_salts_keep_users_apart(llm: LLM) -> None:
    def cached(salt: str | None) -> int:
        return llm.generate(SYSTEM, GREEDY, cache_salt=salt)[0].stats.cached_tokens

    assert [cached(salt) for salt in (None, "a", "b", None, "a", "b")] == [0] * 3 + [len(SYSTEM) - 2] * 3


def test_it_can_be_turned_off(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32", prefix_cache=False)
    assert [llm.generate(SYSTEM, GREEDY)[0].stats.cached_tokens for _ in range(2)] == [0, 0]
    assert [c.stats.cached_tokens for c in llm.generate([SYSTEM] * 3, GREEDY)] == [0] * 3
    with pytest.raises(RequestError, match="prefix_cache must be true or false"):
        LLM(tiny_dir, prefix_cache="no")


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


def refuse(_ids: list[int], _logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no token")


def test_a_prompt_outlives_the_request_whose_processor_fails_at_its_first_token(llm: LLM) -> None:
    """Its keys and values are in order, and others have taken them over."""
    other = SamplingParams(max_tokens=24, ignore_eos=True, logits_processors=[refuse])
    expected = cold(llm, SYSTEM)
    llm.forget()
    assert [c.finish_reason for c in llm.generate([SYSTEM, SYSTEM], [other, GREEDY])] == ["error", "length"]
    for completion in (llm.generate(SYSTEM, GREEDY)[0], llm.generate([*SYSTEM, 50], other)[0]):
        assert completion.stats.cached_tokens >= len(SYSTEM) - 2
    warm = llm.generate(SYSTEM, GREEDY)[0]
    assert (warm.token_ids, warm.logprobs) == (expected.token_ids, expected.logprobs)


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


def test_the_least_recently_used_pages_go_first() -> None:
    pages = Pages(tiny_model(dtype=torch.bfloat16), 9)
    cache = PrefixCache([pages], most=3)
    prompts = [[i] * 40 for i in range(4)]

    def enter(prompt: list[int]) -> list[int]:
        row = SequencePages(pages)
        row.grow(pages_of(len(prompt)))
        cache.insert(prompt, [row], None)
        taken = row.pages
        row.clear()
        cache.trim()
        return taken

    def found() -> list[bool]:
        return [cache.find(prompt, None)[1] > 0 for prompt in prompts]

    for prompt in prompts[:3]:
        enter(prompt)
    assert cache.find(prompts[0], None)[1] == 38
    enter(prompts[3])
    assert found() == [True, False, True, True]
    assert cache.evict(0)
    assert found() == [False, False, True, True]
    long = [7] * (2 * PAGE + 40)  # three pages, of which the last goes before those that it follows
    row = enter(long)
    assert found() == [False] * 4
    assert cache.evict(0)
    assert cache.find(long, None) == ([row[:2]], 2 * PAGE)


def test_no_page_is_lost_or_freed_while_it_is_used() -> None:
    """Random prompts, some of which are held and some let go."""
    draw = random.Random(3)
    for _ in range(10):
        pages = Pages(tiny_model(dtype=torch.bfloat16), 40)
        cache, held = PrefixCache([pages], most=8), list[SequencePages]()
        stem = draw.choices(range(3), k=700)
        for _ in range(60):
            prompt = stem[: draw.choice((40, 256, 300, 600))] + draw.choices(range(5, 9), k=draw.randrange(2, 300))
            row = SequencePages(pages)
            cache.take_over(prompt, None, [row])
            row.grow(pages_of(len(prompt)))
            cache.insert(prompt, [row], None)
            held.append(row)
            if len(held) > draw.randrange(3):
                held.pop(0).clear()
                cache.trim()
            assert cache.n_unused(0) <= 8
            used = {page for row in held for page in row.pages} | {page for node in cache._nodes for page in node.pages}
            assert sorted([*pages.free, *used]) == list(range(40))
        cache.clear()
        for row in held:
            row.clear()
        assert sorted(pages.free) == list(range(40))


def test_what_was_kept_makes_room(tiny_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "fitting_positions", lambda *_: 2 * PAGE)
    llm = LLM(tiny_dir, dtype="float32")
    prompts = [[*SYSTEM, *range(60, 60 + i), *SYSTEM, *SYSTEM] for i in range(5)]  # two pages each
    for prompt in [*prompts, *prompts]:
        assert llm.generate(prompt, GREEDY)[0].token_ids == cold(llm, prompt).token_ids
