"""The engine on the tiny checkpoint: alone, in batches, streamed, and when something is wrong."""

import copy
import itertools
import pickle

import pytest
import torch

from llama_mini import LLM, Llama, SamplingParams, Tokenizer
from llama_mini.errors import NumericalError, RequestError

PROMPTS = ["a", "the quick brown fox", "0123456789" * 9, "\n", "Grüße, 世界", "x" * 100, "once upon a time there"]


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="float32")


def greedy_by_hand(llm: LLM, prompt: str, n: int) -> list[int]:
    """No cache, no batch, no stream: the whole text through the model for every token."""
    ids = llm.tokenizer.encode(prompt)
    for _ in range(n):
        ids = [*ids, int(llm.model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-n:]


def test_greedy_is_the_argmax_of_the_plain_model(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert completion.token_ids == greedy_by_hand(llm, prompt, 24)
        assert completion.finish_reason == "length"
        assert completion.error is None


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}]
)
def test_a_row_of_a_batch_is_what_it_is_alone(llm: LLM, settings: dict) -> None:
    params = SamplingParams(max_tokens=40, **settings)
    together = llm.generate(PROMPTS, params)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = llm.generate(prompt, params)
        assert completion.token_ids == alone.token_ids
        assert completion.text == alone.text
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_more_prompts_than_decode_together_come_back_in_order(llm: LLM) -> None:
    prompts = [f"{i} {'word ' * (i % 7)}" for i in range(37)]
    params = SamplingParams(max_tokens=5)
    assert [c.text for c in llm.generate(prompts, params)] == [llm.generate(p, params)[0].text for p in prompts]


def test_rows_that_end_early_leave_the_others_alone(llm: LLM) -> None:
    """Every row stops at a different step, at a token of its own."""
    lengths = list(range(1, len(PROMPTS) + 1))
    longest = llm.generate(PROMPTS, SamplingParams(max_tokens=max(lengths), ignore_eos=True))
    for order in itertools.islice(itertools.permutations(lengths), 0, 5040, 997):
        each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in order]
        for completion, whole, n in zip(llm.generate(PROMPTS, each), longest, order, strict=True):
            assert completion.token_ids == whole.token_ids[:n]


def test_the_stream_joined_is_the_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=2, max_tokens=80)
    for prompt in PROMPTS:
        chunks = list(llm.stream(prompt, params))
        (whole,) = llm.generate(prompt, params)
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [chunk.token_id for chunk in chunks] == whole.token_ids
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
        assert chunks[-1].completion.token_ids == whole.token_ids


def test_end_of_text_stops_and_is_not_printed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = llm.generate("hello", SamplingParams(max_tokens=30, ignore_eos=True))[0]
    eos = free.token_ids[11]
    monkeypatch.setattr(llm.tokenizer, "eos_ids", frozenset({eos}))
    stopped = llm.generate("hello", SamplingParams(max_tokens=30))[0]
    cut = free.token_ids.index(eos) + 1
    assert stopped.token_ids == free.token_ids[:cut]  # the closing token is among the ids
    assert stopped.finish_reason == "stop"
    assert stopped.text == llm.tokenizer.decode(free.token_ids[: cut - 1])
    assert llm.generate("hello", SamplingParams(max_tokens=30, ignore_eos=True))[0].token_ids == free.token_ids


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 1), (5, 4), (9, 12)])
def test_a_stop_string_ends_the_text_before_it(llm: LLM, start: int, length: int) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    whole = llm.generate("tell me", params)[0].text
    stop = whole[start : start + length]
    stopping = SamplingParams(max_tokens=60, ignore_eos=True, stop=stop)
    (completion,) = llm.generate("tell me", stopping)
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"
    assert "".join(chunk.text for chunk in llm.stream("tell me", stopping)) == completion.text


def test_a_stop_string_that_never_comes_holds_nothing_back_for_good(llm: LLM) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    whole = llm.generate("tell me", params)[0]
    almost = whole.text[-3:] + "never"
    held = llm.generate("tell me", SamplingParams(max_tokens=50, ignore_eos=True, stop=almost))[0]
    assert held.text == whole.text
    assert held.finish_reason == "length"


def test_the_context_is_used_to_its_last_position_and_not_beyond(llm: LLM) -> None:
    limit = llm.config.max_seq_len
    prompt = [7] * (limit - 10)
    full = llm.generate(prompt, SamplingParams(max_tokens=10, ignore_eos=True))[0]
    assert len(full.token_ids) == 10
    default = llm.generate(prompt, SamplingParams(ignore_eos=True))[0]  # a default shrinks
    assert default.token_ids == full.token_ids
    assert default.finish_reason == "length"
    message = f"{limit - 10} prompt tokens and 11 new ones exceed the context of {limit}"
    for given in ({"max_tokens": 11}, {"min_tokens": 11}):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompt, **given)
    with pytest.raises(RequestError, match=f"{limit} prompt tokens"):
        llm.generate([7] * limit)


def test_an_answer_of_unknown_length_outgrows_its_first_cache(llm: LLM) -> None:
    (completion,) = llm.generate("a", SamplingParams(ignore_eos=True))
    assert len(completion.token_ids) == llm.config.max_seq_len - len(llm.tokenizer.encode("a"))
    assert completion.token_ids[:300] == llm.generate("a", SamplingParams(max_tokens=300, ignore_eos=True))[0].token_ids


def test_token_ids_are_taken_as_they_are(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    params = SamplingParams(max_tokens=8)
    by_text, by_ids = llm.generate("hello", params), llm.generate(ids, params)
    assert by_text[0].token_ids == by_ids[0].token_ids
    assert [c.token_ids for c in llm.generate(["hello", ids], params)] == [by_text[0].token_ids] * 2
    assert llm.generate([], params) == []


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=8)
    ids = llm.tokenizer.apply_chat_template(messages)
    assert llm.chat(messages, params).token_ids == llm.generate(ids, params)[0].token_ids


def test_scores_are_log_probabilities_of_the_plain_model(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the quick brown fox " * 20)
    scores = llm.score(ids)
    logits = llm.model(torch.tensor([ids]))[0].double()
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]]
    assert scores[0] is None
    assert scores[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert llm.score(ids[:1]) == [None]


def test_logprobs_are_raw_whatever_the_temperature(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    (cold,) = llm.generate(ids, SamplingParams(max_tokens=20, ignore_eos=True))
    (hot,) = llm.generate(ids, SamplingParams(max_tokens=20, temperature=2.0, seed=0, ignore_eos=True))
    for completion in (cold, hot):
        assert completion.logprobs == pytest.approx(llm.score(ids + completion.token_ids)[len(ids) :], abs=1e-4)
        assert all(value <= 0 for value in completion.logprobs)


def test_statistics_say_what_ran(llm: LLM) -> None:
    stats = llm.generate("hello", SamplingParams(max_tokens=10, ignore_eos=True))[0].stats
    assert stats.prompt_tokens == len(llm.tokenizer.encode("hello"))
    assert stats.new_tokens == 10
    assert stats.load_seconds == llm.load_seconds > 0
    assert 0 < 1 / stats.prefill_tok_s < stats.ttft_seconds
    assert stats.decode_tok_s > 0
    assert stats.peak_memory_bytes > 50 * 2**20


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "empty"),
        ([0, 260], "260 is outside the vocabulary of 260"),
        ([-1], "-1"),
        ([True], "not"),
        (["a", 5], "not 5"),
        ([["a"]], "not"),
    ],
)
def test_a_bad_prompt_is_named(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_checked(tiny_dir, threads: object) -> None:
    with pytest.raises(RequestError, match="threads"):
        LLM(tiny_dir, threads=threads)


def test_a_device_that_is_not_there_is_named(tiny_dir) -> None:
    with pytest.raises(RequestError, match="abacus"):
        LLM(tiny_dir, device="abacus")


def test_numbers_that_fail_end_their_row_alone_and_name_the_layer(tiny_dir) -> None:
    llm = LLM(tiny_dir, dtype="float32")
    poison = llm.tokenizer.encode("Z", add_special_tokens=False)[0]
    embeddings = llm.model.tok_embeddings.weight
    embeddings[poison] = 0
    good = llm.generate(["abc", "abd"], SamplingParams(max_tokens=6, ignore_eos=True))
    down = llm.model.layers[1].feed_forward
    down.register_forward_hook(
        lambda _m, args, y: y.masked_fill((args[0] == args[0]) & poisoned[..., None], float("nan"))
    )
    poisoned = torch.zeros(1, 1, dtype=torch.bool)

    def mark(_module, args):
        nonlocal poisoned
        poisoned = args[0] == poison

    llm.model.tok_embeddings.register_forward_pre_hook(mark)
    bad_prompt = "abZ"
    rows = llm.generate(["abc", bad_prompt, "abd"], SamplingParams(max_tokens=6, ignore_eos=True))
    assert [row.finish_reason for row in rows] == ["length", "error", "length"]
    assert [rows[0].token_ids, rows[2].token_ids] == [row.token_ids for row in good]
    position = len(llm.tokenizer.encode(bad_prompt)) - 1
    assert f"position {position} " in rows[1].error
    assert "layers.1" in rows[1].error
    with pytest.raises(NumericalError, match=r"layers\.1"):
        list(llm.stream(bad_prompt))
    with pytest.raises(NumericalError, match=rf"position {position} .*layers\.1"):
        llm.score(llm.tokenizer.encode(bad_prompt + "cd"))


def test_logits_whose_sum_overflows_are_no_failure(llm: LLM) -> None:
    (before,) = llm.generate("abc", SamplingParams(max_tokens=2, ignore_eos=True))
    llm.forget()
    found = []

    def grown(_module, _args, y):
        found.append((y - y.amin() + 1) / (y.amax() - y.amin() + 1) * 3e38)  # all of one sign
        return found[-1]

    head = llm.model.lm_head or llm.model.tok_embeddings.head
    head.register_forward_hook(grown)
    (after,) = llm.generate("abc", SamplingParams(max_tokens=2, ignore_eos=True))
    assert any(y.isfinite().all() and not y.sum().isfinite() for y in found)
    assert after.finish_reason == "length"
    assert after.token_ids[0] == before.token_ids[0]


def test_the_parts_are_reachable(llm: LLM, tiny_dir) -> None:
    assert isinstance(llm.model, Llama)
    assert isinstance(llm.tokenizer, Tokenizer)
    assert llm.config == Llama.from_pretrained(tiny_dir).config


def test_a_copy_is_refused_in_a_sentence(llm: LLM) -> None:
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one in each process"):
            make(llm)
