"""A draft model: it changes no text, keeps its own cache in step, and steps aside where it does not pay."""

from pathlib import Path

import pytest

from llama_mini import LLM, Llama, SamplingParams
from llama_mini.engine import draft
from llama_mini.engine import llm as llm_module
from llama_mini.engine.draft import DraftProposer
from llama_mini.errors import RequestError
from tests.engine.test_scheduler import prompt_of
from tests.engine.test_speculative import (
    PROMPTS,
    SAMPLED,
    counts,
    eager,
    everything,
    no_text,
    other_dir,
    plain,
    request_of,
)

__all__ = ["eager", "no_text", "other_dir", "plain"]  # fixtures


@pytest.mark.usefixtures("eager")
def test_a_draft_model_changes_no_text(tiny_dir, other_dir: Path, plain: LLM) -> None:
    """The model as its own draft guesses right; one with other weights now and then."""
    twin, other = (LLM(tiny_dir, dtype="bfloat16", threads=1, draft=path) for path in (tiny_dir, other_dir))
    for settings in ({}, SAMPLED):
        params = SamplingParams(max_tokens=30, ignore_eos=True, **settings)
        expected = list(map(everything, plain.generate([*PROMPTS, prompt_of(470, 4)], params)))
        for llm, least, most in ((twin, 0.9, 1.0), (other, 0.02, 0.9)):
            found = llm.generate([*PROMPTS, prompt_of(470, 4)], params)
            assert list(map(everything, found)) == expected
            right, proposed = counts(found)
            assert proposed > 50
            assert least * proposed <= right <= most * proposed


@pytest.mark.usefixtures("no_text")
def test_a_draft_model_steps_aside_where_it_does_not_pay(tiny_dir) -> None:
    """Where it is as slow as the model; now and then it tries again."""
    proposer = DraftProposer(Llama.from_pretrained(tiny_dir), 260)
    limits = {request_of([5, 6], [7]): 9, request_of([8, 9], [7]): 9}
    for n in range(1, 50):
        proposer.times.add(n % 3 + 1, 1.0)
    proposer._seconds = 0.01
    assert proposer._most(limits) > 2
    assert proposer._most(dict.fromkeys((request_of([5], []) for _ in range(16)), 9)) == 0
    proposer._seconds = 1.0
    assert [proposer._most(limits) for _ in range(64)].count(1) == 2


@pytest.mark.usefixtures("eager")
def test_a_draft_model_without_room_guesses_nothing(tiny_dir, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1, draft=tiny_dir)
    monkeypatch.setattr(draft, "fitting_positions", lambda *_: 8 * 256)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = [prompt_of(50, 1), prompt_of(300, 1)]
    found = llm.generate(prompts, params)
    assert [c.stats.proposed_tokens > 0 for c in found] == [True, False]
    assert [c.token_ids for c in found] == [c.token_ids for c in plain.generate(prompts, params)]
    proposer = llm._scheduler._runner._proposer
    assert isinstance(proposer, DraftProposer)
    assert llm.generate([5], max_tokens=2)
    assert len(proposer._rows) <= 1


def test_a_draft_model_keeps_its_own_bits(tiny_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the dtype as it was asked for: an explicit one would make floats of its codes."""
    asked, plain = [], llm_module.quantize_for
    monkeypatch.setattr(llm_module, "quantize_for", lambda *args: asked.append(args[2]) or plain(*args))
    LLM(tiny_dir, threads=1, draft=tiny_dir)
    assert asked == ["auto", "auto"]


def test_a_draft_model_has_the_same_vocabulary(tiny_dir, smollm2_dir) -> None:
    with pytest.raises(
        RequestError, match=r"another vocabulary: its token \d+ is .*, the model's is .*; give a smaller"
    ):
        LLM(tiny_dir, draft=smollm2_dir)
    with pytest.raises(RequestError, match="a draft model is for speculation, which is off"):
        LLM(tiny_dir, draft=tiny_dir, speculation="off")
    with pytest.raises(RequestError, match="unknown speculation 'on'; known: auto, off"):
        LLM(tiny_dir, speculation="on")
