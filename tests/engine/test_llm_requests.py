"""What a request may ask of the engine beside plain sampling."""

import asyncio
import json
import math
import shutil
import threading
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, SequenceBiasLogitsProcessor

from llama_mini import LLM, Chunk, SamplingParams
from llama_mini.engine import request as request_module
from llama_mini.engine.runner import Runner
from llama_mini.errors import RequestError

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="float32")


def test_n_answers_of_one_prompt_draw_from_seeds_in_turn(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=7, n=3, ignore_eos=True)
    answers = llm.generate(["a b c", "d e f"], params)
    assert len(answers) == 6
    for place, answer in enumerate(answers):
        own = SamplingParams(max_tokens=10, temperature=1.5, seed=7 + place % 3, ignore_eos=True)
        assert answer.token_ids == llm.generate(["a b c", "d e f"][place // 3], own)[0].token_ids
    assert len({tuple(answer.token_ids) for answer in answers[:3]}) == 3


def test_one_answer_where_one_comes_back(llm: LLM) -> None:
    for call in (llm.stream, lambda prompt, params: llm.chat([{"role": "user", "content": prompt}], params)):
        with pytest.raises(RequestError, match="n must be 1"):
            call("a", SamplingParams(n=2))


def test_parameters_of_each_prompt(llm: LLM) -> None:
    lengths = [3, 7, 1]
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    assert [len(c.token_ids) for c in llm.generate(["a", "b", "c"], each)] == lengths
    with pytest.raises(RequestError, match="only 2 params, but more prompts"):
        llm.generate(["a", "b", "c"], each[:2])


def test_a_stop_token_ends_the_text_and_is_not_in_it(llm: LLM) -> None:
    free = llm.generate("hello", GREEDY)[0]
    stop = free.token_ids[4]
    cut = llm.generate("hello", SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[stop]))[0]
    first = free.token_ids.index(stop)
    assert cut.token_ids == free.token_ids[: first + 1]
    assert cut.finish_reason == "stop"
    assert cut.text == llm.tokenizer.decode(free.token_ids[:first])


def test_no_end_before_min_tokens(llm: LLM) -> None:
    stop = llm.generate("hello", GREEDY)[0].token_ids[0]
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[stop], min_tokens=6)
    assert stop not in llm.generate("hello", params)[0].token_ids[:6]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_no_stop_string_before_min_tokens(llm: LLM, ignore_eos: bool) -> None:
    """vllm#21987: the answer ended at a stop string in its first min_tokens tokens."""
    m = llm.tokenizer.encode("m", add_special_tokens=False)[0]
    params = SamplingParams(max_tokens=8, min_tokens=5, logit_bias={m: 1e6}, stop="m", ignore_eos=ignore_eos)
    completion = llm.generate("x", params)[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([m] * 6, "mmmmm", "stop")
    all_early = llm.generate("x", replace(params, max_tokens=5))[0]
    assert (all_early.text, all_early.finish_reason) == ("mmmmm", "length")
    two = llm.generate("x", replace(params, stop="mm"))[0]  # one that begins early and ends later counts
    assert (len(two.token_ids), two.text) == (6, "mmmm")
    assert "".join(chunk.text for chunk in llm.stream("x", params)) == completion.text


def test_time_cuts_a_text_before_min_tokens_too(llm: LLM) -> None:
    completion = llm.generate("x", SamplingParams(min_tokens=50, max_tokens=50, max_time=1e-9))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


@pytest.mark.parametrize("special", [True, False])
def test_a_stop_string_may_be_the_text_of_a_control_token(tiny_dir, tmp_path, special: bool) -> None:
    """llama.cpp#6770, vllm#3672: such a string never stopped, since the text does not hold control tokens."""
    folder = shutil.copytree(tiny_dir, tmp_path / "tiny")
    spec = json.loads((folder / "tokenizer.json").read_text())
    token = next(each for each in spec["added_tokens"] if each["content"] == "<|im_start|>")
    token["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    llm, start = LLM(folder, dtype="float32"), token["id"]
    forced = SamplingParams(max_tokens=6, logit_bias={start: 1e6})
    assert llm.generate("x", forced)[0].token_ids == [start] * 6
    for how in ({"stop": "<|im_start|>"}, {"stop_token_ids": [start]}):
        completion = llm.generate("x", replace(forced, **how))[0]
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([start], "", "stop")
    late = llm.generate("x", replace(forced, stop="<|im_start|>", min_tokens=3))[0]
    assert (len(late.token_ids), late.finish_reason) == (4, "stop")
    twice = llm.generate("x", replace(forced, stop="<|im_start|><|im_start|>"))[0]
    assert (len(twice.token_ids), twice.text, twice.finish_reason) == (2, "", "stop")


def test_time_cuts_a_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(request_module.time, "perf_counter", lambda: float(next(ticks)))
    completion = llm.generate("hello", SamplingParams(max_tokens=100, max_time=5, ignore_eos=True))[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 5  # the clock ticks once a token


def test_a_bias_bans_and_forces(llm: LLM) -> None:
    best = llm.generate("hello", GREEDY)[0].token_ids[0]
    banned = llm.generate("hello", SamplingParams(max_tokens=12, logit_bias={best: -math.inf}, ignore_eos=True))[0]
    assert best not in banned.token_ids
    forced = llm.generate("hello", SamplingParams(max_tokens=12, logit_bias={77: 1e4}, ignore_eos=True))[0]
    assert forced.token_ids == [77] * 12
    with pytest.raises(RequestError, match="logit_bias: token id 1000000000 is outside the vocabulary of 260"):
        llm.generate("hello", SamplingParams(logit_bias={10**9: 1.0}))


def test_logprobs_stay_raw_and_come_with_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=2.0, seed=3, top_logprobs=4, repetition_penalty=1.5)
    completion = llm.generate("hello", params)[0]
    ids = llm.tokenizer.encode("hello") + completion.token_ids
    raw = llm.model(torch.tensor([ids]))[0].log_softmax(-1)
    for i, (token, logprob, top) in enumerate(
        zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True)
    ):
        row = raw[len(ids) - len(completion.token_ids) + i - 1]
        assert logprob == pytest.approx(float(row[token]), abs=2e-5)
        assert [each for each, _ in top] == row.topk(4).indices.tolist()
        assert [value for _, value in top] == pytest.approx(row.topk(4).values.tolist(), abs=2e-5)


def test_a_processor_that_fails_ends_its_row_alone(llm: LLM) -> None:
    def broken(ids: list[int], logits: Tensor) -> Tensor:
        if len(ids) > 8:
            raise ValueError("broken on purpose")
        return logits

    each = [GREEDY, SamplingParams(max_tokens=12, ignore_eos=True, logits_processors=[broken])]
    good, bad = llm.generate(["a", "a"], each)
    assert good.token_ids == llm.generate("a", GREEDY)[0].token_ids
    assert bad.finish_reason == "error"
    assert "broken on purpose" in bad.error
    assert bad.token_ids == good.token_ids[: len(bad.token_ids)]
    with pytest.raises(RequestError, match="broken on purpose"):
        list(llm.stream("a", each[1]))


def test_completions_come_as_they_end_and_errors_alone(llm: LLM) -> None:
    prompts = ["a", [], "b", [10**9], "c"]
    found = dict(llm.completions(prompts, SamplingParams(max_tokens=3)))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [found[i].finish_reason == "error" for i in range(5)] == [False, True, False, True, False]
    assert "empty" in found[1].error
    assert found[2].token_ids == llm.generate("b", SamplingParams(max_tokens=3))[0].token_ids


def test_the_async_stream_is_the_stream_and_leaves_the_loop_free(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    turned, step = threading.Event(), Runner._step

    def step_after_the_loop_turned(runner: Runner) -> None:
        turned.clear()
        assert turned.wait(20)
        step(runner)

    async def both() -> list[Chunk]:
        async def other() -> None:
            while True:
                turned.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        chunks = [chunk async for chunk in llm.astream("hello", GREEDY)]
        task.cancel()
        return chunks

    plain = list(llm.stream("hello", GREEDY))
    monkeypatch.setattr(Runner, "_step", step_after_the_loop_turned)
    chunks = asyncio.run(both())
    assert [chunk.token_id for chunk in chunks] == [chunk.token_id for chunk in plain]
    assert "".join(chunk.text for chunk in chunks) == plain[-1].completion.text


def test_an_async_stream_left_early_lets_the_model_go(llm: LLM) -> None:
    async def first() -> int:
        stream = llm.astream("hello", GREEDY)
        async for chunk in stream:
            await stream.aclose()
            return chunk.token_id
        raise AssertionError

    assert asyncio.run(first()) == llm.generate("hello", GREEDY)[0].token_ids[0]


def test_eos_token_id_replaces_the_models_own_as_in_transformers(tiny_dir, llm: LLM) -> None:
    ids, (eos, *_) = llm.tokenizer.encode("hello"), sorted(llm.tokenizer.eos_ids)
    theirs = LlamaForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    for likely, length in ((eos, 4), (99, 1)):
        bias = SequenceBiasLogitsProcessor([[[likely], 50.0]])
        expected = theirs.generate(
            torch.tensor([ids]), eos_token_id=99, logits_processor=[bias], max_new_tokens=4, do_sample=False
        )[0, len(ids) :].tolist()
        given = {"logit_bias": {likely: 50.0}, "max_new_tokens": 4}
        found = llm.generate(ids, eos_token_id=99, **given)[0]
        assert found.token_ids == expected == [likely] * length
        assert llm.generate(ids, eos_token_id=99, ignore_eos=False, **given)[0].token_ids == [likely]  # both
