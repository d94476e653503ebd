"""Models with sliding windows: the pages before a window are given back, nothing reads them, and no bit changes.

In all tests a page that is given back is filled with NaN at once.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mini import LLM, Completion, Llama, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine.pages import PAGE, PagedTokens, Pages, SequencePages
from llama_mini.engine.speculative import StepTimes
from tests.engine.test_scheduler import same_bits, small_cache
from tests.engine.test_speculative import counts
from tests.tiny_models import tiny_model

SHAPES: dict[str, dict[str, Any]] = {
    "all layers": {"sliding_window": 300},
    "some layers": {"sliding_window": 100, "sliding_layers": (0, 2)},
    "one position": {"sliding_window": 1, "sliding_layers": (1,)},
}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are free hold NaN; PyTorch's attention needs a new page without."""
    give_back, take, share = Pages.give_back, Pages.take, Pages.share

    def poisoned(pages: Pages, page: int) -> None:
        give_back(pages, page)
        if page in pages.free:
            pages._storage[page] = -1 if pages._storage.dtype == torch.int8 else torch.nan

    def clean(pages: Pages) -> int:
        page = take(pages)
        pages.zero(page, 0)
        return page

    def used(pages: Pages, page: int) -> int:
        assert pages._users[page]
        return share(pages, page)

    monkeypatch.setattr(Pages, "give_back", poisoned)
    monkeypatch.setattr(Pages, "take", clean)
    monkeypatch.setattr(Pages, "share", used)


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "model"
    tiny_model(
        vocab_size=260, max_seq_len=4096, eos_ids=(257, 259), bos_id=256, **SHAPES[request.param]
    ).save_pretrained(path)
    for file in tiny_dir.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture
def llm(path: Path) -> LLM:
    return LLM(path, dtype="bfloat16", threads=1)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


def params_of(n_new: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=n_new, ignore_eos=True, **changes)


def in_full(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
    """The same answers, each alone, with pages of all positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequencePages, "slide", lambda *_: None)
        each = params if isinstance(params, list) else [params] * len(prompts)
        found = []
        for prompt, one in zip(prompts, each, strict=True):
            llm.forget()
            found += llm.generate(prompt, one)
        llm.forget()
    return found


@pytest.mark.parametrize(("kernels", "kv_dtype"), [("auto", "auto"), ("auto", "int8"), ("off", "auto")])
def test_a_request_has_the_bits_of_the_full_cache_and_keeps_no_more_than_its_windows(
    path: Path, kernels: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch; PyTorch's operators, which round by the size of a batch, one by one."""
    dtype = "bfloat16" if kernels == "auto" else "float32"
    llm = LLM(path, dtype=dtype, kernels=kernels, kv_dtype=kv_dtype, threads=1, speculation="off")
    lengths = (1700, 3, 400, 513) if kernels == "auto" else (1700,)
    prompts, params = [prompt_of(n, 1) for n in lengths], params_of(280 if kernels == "auto" else 30)
    expected = in_full(llm, prompts, params)
    held = list[tuple[int, ...]]()

    def watched(cache: Any, rows: Any, positions: Any) -> PagedTokens:
        held.extend(tuple(len(pages.pages) for pages in row) for row in rows)
        assert all(pages.pool.needed(4096) >= len(pages.pages) for row in rows for pages in row)
        return PagedTokens(cache, rows, positions)

    monkeypatch.setattr(runner_module, "PagedTokens", watched)
    calls = [prompts] if kernels == "auto" else [[prompt] for prompt in prompts]
    found = [completion for call in calls for completion in llm.generate(call, params)]
    assert all(map(same_bits, found, expected))
    window, n_windowed = llm.config.sliding_window, len(llm.config.sliding_layers)
    assert max(row[-1] for row in held) <= -(-(window + 512) // PAGE) + 1
    if n_windowed < llm.config.n_layers:
        assert max(row[0] for row in held) >= 7  # of 1,730 positions and more
    assert held[-1][-1] <= -(-window // PAGE) + 2


def test_answers_are_those_of_the_plain_model(path: Path) -> None:
    """It has a mask and a cache of all positions."""
    llm, plain = LLM(path, dtype="float32", threads=1), Llama.from_pretrained(path)
    for prompt in (prompt_of(1400, 2), prompt_of(250, 2)):
        found = llm.generate(prompt, params_of(40))[0]
        ids = [*prompt, *found.token_ids]
        with torch.no_grad():
            logprobs = plain(torch.tensor([ids[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == found.token_ids
        assert found.logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=2e-4)


def test_a_chat_reuses_its_last_turn_and_a_prefix_without_its_window_is_cut(llm: LLM) -> None:
    params = params_of(5)
    first = prompt_of(1800, 3)
    turn, early, again = [*first, *prompt_of(50, 4)], [*first[:900], *prompt_of(60, 5)], [*first[:1790], 7, 8, 9]
    expected = in_full(llm, [first, turn, early, again], params)
    found = [llm.generate(prompt, params)[0] for prompt in (first, turn, early, again)]
    assert all(map(same_bits, found, expected))
    rest = 768 if llm.config.sliding_window == 1 else 0  # the window before position 900 is gone
    assert [completion.stats.cached_tokens for completion in found] == [0, 1800, rest, 1790]
    short = [*first[:600], 5, 5]
    assert same_bits(llm.generate(short, params)[0], in_full(llm, [short], params)[0])


def test_of_a_prefix_as_much_is_reused_as_has_its_window(llm: LLM) -> None:
    """A prompt of 520 tokens keeps all its pages; the longer one that begins like it, those of its end."""
    params, first = params_of(3), prompt_of(2400, 6)
    found = [llm.generate(prompt, params)[0] for prompt in (first[:520], first, [*first[:1300], 5, 6])]
    assert found[1].stats.cached_tokens == 520
    assert found[2].stats.cached_tokens == (1280 if llm.config.sliding_window == 1 else 512)
    assert same_bits(found[2], in_full(llm, [[*first[:1300], 5, 6]], params)[0])


def test_preempted_requests_go_on_with_the_same_tokens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(path, dtype="bfloat16", threads=1)
    prompts = [prompt_of(n, 7) for n in (700, 250, 800, 650)]
    each = [params_of(300, temperature=1.0, seed=i) for i in range(4)]
    expected = in_full(llm, prompts, each)
    seen = small_cache(monkeypatch, 5)
    llm.forget()
    assert all(map(same_bits, llm.generate(prompts, each), expected))
    assert seen
    runner = llm._scheduler._runner
    assert runner is not None
    llm.forget()
    assert all(len(kind.free) == kind.count == 5 for kind in runner.cache.kinds)


def test_a_context_longer_than_the_cache_fits_where_all_layers_have_a_window(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(path, dtype="bfloat16", threads=1)
    expected = in_full(llm, [prompt_of(3000, 8)], params_of(300))
    small_cache(monkeypatch, 5)
    llm.forget()
    if len(llm.config.sliding_layers) == llm.config.n_layers:
        assert same_bits(llm.generate(prompt_of(3000, 8), params_of(300))[0], expected[0])
    else:
        with pytest.raises(Exception, match="only 1280 positions fit"):
            llm.generate(prompt_of(3000, 8), params_of(300))


@pytest.mark.parametrize("length", [768, 1100])
def test_the_answers_to_one_prompt_share_its_pages(llm: LLM, length: int) -> None:
    prompt = prompt_of(length, 9)
    each = [params_of(100, temperature=1.0, seed=i) for i in range(3)]
    expected = in_full(llm, [prompt] * 3, each)
    found = llm.generate(prompt, params_of(100, temperature=1.0, seed=0, n=3))
    assert all(map(same_bits, found, expected))
    assert [c.stats.cached_tokens for c in found] == [0, length, length]


@pytest.mark.parametrize("drafted", [False, True])
def test_guesses_change_no_bit(path: Path, drafted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are wrong are taken back, also across the end of a page; a draft model has windows too."""
    llm = LLM(path, dtype="bfloat16", threads=1, draft=path if drafted else None)
    prompts = [[7, 8, 9, 10] * 200, prompt_of(1100, 10), prompt_of(60, 11) * 5]
    each = [params_of(300, temperature=0.3, seed=i) for i in range(3)]
    plain = LLM(path, dtype="bfloat16", threads=1, speculation="off")
    expected = in_full(plain, prompts, each)
    monkeypatch.setattr(StepTimes, "fit", lambda self: (1e9, 1.0))
    found = llm.generate(prompts, each)
    assert all(map(same_bits, found, expected))
    right, proposed = counts(found)
    assert proposed > 50
    assert right >= 0.9 * proposed or not drafted  # the model is its own draft


def test_numbers_that_failed_early_poison_no_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages are given back before the failure shows, and PyTorch's attention reads what others find in them."""
    monkeypatch.undo()
    llm = LLM(path, dtype="float32", kernels="off", threads=1)
    expected = in_full(llm, [prompt_of(9, 8)], params_of(40))
    embedding = llm.model.tok_embeddings.weight
    healthy = embedding[5].clone()
    embedding[5] = torch.nan
    bad = [t if t != 5 else 6 for t in prompt_of(1040, 8)]  # its last part takes fewer pages than it gives back
    assert llm.generate([*bad[:300], 5, *bad[300:]], max_tokens=2)[0].finish_reason == "error"
    embedding[5] = healthy
    runner = llm._scheduler._runner
    assert runner is not None
    assert all(kind._storage.isfinite().all() for kind in runner.cache.kinds)
    assert llm.generate(prompt_of(9, 8), params_of(40))[0].token_ids == expected[0].token_ids
