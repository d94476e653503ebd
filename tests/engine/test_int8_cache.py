"""An int8 cache: the operators' codes are those of PyTorch, and its errors are small; bits depend on nothing else."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_mini import LLM, SamplingParams
from llama_mini.engine.pages import PAGE, PagedLayer, Pages, from_codes, to_codes
from llama_mini.errors import RequestError
from llama_mini.memory import cache_bytes, fitting_positions
from llama_mini.optimize.build import load_kernels
from tests.engine.test_scheduler import alone, prompt_of, same_bits, settings
from tests.tiny_models import tiny_model


def test_codes_are_the_nearest_of_255() -> None:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 5)[:, None]
    rows = to_codes(x)
    assert (rows.dtype, rows.shape) == (torch.int8, (3, 5, 44))
    assert rows[..., :40].abs().amax(-1).eq(127).all()
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((from_codes(rows, torch.float32) - x).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_shows_and_what_is_tiny_is_zero(dtype: torch.dtype) -> None:
    x = torch.ones(4, 6, dtype=dtype)
    x[0, 3], x[1, 0], x[2] = torch.nan, -torch.inf, 1e-35
    found = from_codes(to_codes(x), dtype)
    assert found[:2].isnan().all()
    assert (found[2] == 0).all()
    assert (found[3] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_stores_the_codes_of_pytorch(dtype: torch.dtype) -> None:
    """And attends to them: both paths of a token, from the same keys and values."""
    if not load_kernels():
        pytest.skip("the operators cannot be built here")
    rng, heads, kv_heads, dim = torch.Generator().manual_seed(2), 6, 2, 38
    caches = [to_codes(torch.randn(3, kv_heads, PAGE, dim, generator=rng)) for _ in range(2)]
    qkv = torch.randn(3, 1, heads + 2 * kv_heads, dim, generator=rng).to(dtype)
    qkv[2, 0, -1, 5] = torch.nan
    pages, positions = torch.tensor([[2], [0], [1]]), torch.tensor([[7], [255], [100]])
    plain = PagedLayer(*(cache.clone() for cache in caches), pages, positions)
    y = torch.ops.llama_mini.attend(qkv, *caches, pages, positions, 0, 0.3, 0.0)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
    keys, values = plain.append(k, v, PAGE)
    finite = [0, 2]  # the pages of the first two; of a row with NaN the scale is NaN, and its codes mean nothing
    assert torch.equal(caches[0], plain.k)
    assert torch.equal(caches[1][finite], plain.v[finite])
    assert torch.equal(from_codes(caches[1], dtype).isnan(), from_codes(plain.v, dtype).isnan())
    for row, at in enumerate(positions[:2, 0].tolist()):
        k, v = (t[row, :, : at + 1].double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values))
        scores = torch.einsum("hd,hsd->hs", q[row, 0].double(), k) * 0.3
        expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), v).flatten()
        assert (y[row, 0].double() - expected).abs().max() <= (2e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_request_has_the_bits_that_it_has_alone(tiny_dir, quantize: str | None) -> None:
    """In any company, with any prefix taken over."""
    llm = LLM(tiny_dir, dtype="bfloat16", quantize=quantize, threads=1, kv_dtype="int8")
    draw, system = random.Random(1), prompt_of(300, 0)
    prompts = [prompt_of(draw.choice((1, 3, 100)), i) for i in range(8)]
    prompts += [system[: draw.randrange(30, 301)] + prompt_of(draw.randrange(1, 20), i) for i in range(8)]
    each = [settings(i, draw.randrange(1, 30)) for i in range(16)]
    expected = [alone(llm, prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    llm.forget()
    with ThreadPoolExecutor(4) as threads:
        four = [slice(i, i + 4) for i in range(0, 16, 4)]
        calls = [threads.submit(lambda at: llm.generate(prompts[at], each[at]), at) for at in four]
        found = [completion for call in calls for completion in call.result()]
    assert all(map(same_bits, found, expected))
    assert any(completion.stats.cached_tokens for completion in found)
    exact = LLM(tiny_dir, dtype="bfloat16", quantize=quantize, threads=1)
    assert exact.score(system) != llm.score(system)  # the codes were used


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_an_int8_cache_changes_scores_a_little(tiny_dir, kernels: str) -> None:
    ids = prompt_of(400, 3)
    exact, int8 = (LLM(tiny_dir, dtype="float32", kernels=kernels, kv_dtype=each) for each in ("auto", "int8"))
    a, b = (torch.tensor(llm.score(ids)[1:]) for llm in (exact, int8))
    assert 0 < (a - b).abs().max() < 0.05
    assert (a - b).mean().abs() < 2e-3
    greedy = SamplingParams(max_tokens=30, ignore_eos=True)
    given = [int8.generate(ids, greedy)[0] for _ in range(2)]
    assert given[0].token_ids == given[1].token_ids
    assert given[1].stats.cached_tokens == 398


def test_it_takes_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    config = model.config
    pages = Pages(model, 5, dtype=torch.int8)
    assert pages._storage.nbytes == 5 * cache_bytes(config, PAGE, torch.int8)
    assert cache_bytes(config, PAGE, torch.int8) == cache_bytes(config, PAGE, torch.bfloat16) * (
        config.head_dim + 4
    ) / (2 * config.head_dim)
    monkeypatch.setattr("llama_mini.memory.available_memory", lambda device: 10**8)
    exact, int8 = (fitting_positions(config, 10**9, torch.bfloat16, model.device, each) for each in (None, torch.int8))
    assert int8 == pytest.approx(exact * 2 * config.head_dim / (config.head_dim + 4), rel=0.02)


def test_another_dtype_is_refused(tiny_dir) -> None:
    with pytest.raises(RequestError, match="unknown kv_dtype 'fp8'; known: auto, int8"):
        LLM(tiny_dir, kv_dtype="fp8")
