"""Pages of the cache, and tokens of any rows in one call: the bits of a token depend on its own row alone."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llama_mini.engine.pages import to_codes
from llama_mini.memory import SCALE_BYTES
from llama_mini.optimize.build import ISA_VARIANTS
from tests.optimize.layer_twins import Step
from tests.optimize.random_layers import INT8_CACHE, LAYER_FORMATS, nothing, random_prompt, random_step
from tests.optimize.twins import each_isa, generator, same_bits

DTYPES = [torch.float32, torch.bfloat16]
PAGE = 256

CACHES = pytest.mark.parametrize("parts", [0, INT8_CACHE], ids=["exact cache", "int8 cache"])

isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


def paged(step: Step, seed: int) -> Step:
    """The same caches in pages, in any order and among others that hold NaN."""
    rows, heads, length, width = step.layers[0].k.shape
    n = -(-length // PAGE)
    pages = torch.randperm(rows * n + 3, generator=generator(seed))[: rows * n].view(rows, n)

    def moved(cache: Tensor) -> Tensor:
        pool = nothing(cache.new_empty(rows * n + 3, heads, PAGE, width))
        whole = torch.cat([cache, nothing(cache.new_empty(rows, heads, n * PAGE - length, width))], 2)
        pool[pages] = whole.unflatten(2, (n, PAGE)).transpose(1, 2)
        return pool

    layers = [layer._replace(k=moved(layer.k), v=moved(layer.v)) for layer in step.layers]
    return step._replace(layers=layers, pages=pages)


def in_two_kinds(step: Step) -> Step:
    """The layers with a window have pages of their own, one more than the others; those before it hold NaN."""
    assert step.pages is not None
    n = len(step.layers[0].k)
    windowed, window = (step.pages + 1) % (n + 1), max(layer.window for layer in step.layers)
    first = (step.positions[:, 0] + 1 - window).clamp(min=0) // PAGE

    def moved(cache: Tensor) -> Tensor:
        pool = nothing(cache.new_empty(n + 1, *cache.shape[1:]))
        for row, old, new in zip(first, step.pages, windowed, strict=True):
            pool[new[row:]] = cache[old[row:]]
        return pool

    layers = [layer._replace(k=moved(layer.k), v=moved(layer.v)) if layer.window else layer for layer in step.layers]
    return step._replace(layers=layers, windowed=windowed)


def same_contents(step: Step, in_pages: Step) -> bool:
    """The caches of rows, and in pages."""
    pairs = [pair for a, b in zip(step.layers, in_pages.layers, strict=True) for pair in ((a.k, b.k), (a.v, b.v))]
    return all(
        same_bits(pool[in_pages.pages].transpose(1, 2).flatten(2, 3)[:, :, : cache.shape[2]], cache)
        for cache, pool in pairs
    )


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CACHES
def test_a_step_in_pages_is_the_step_of_rows_in_one_piece(
    isa: str, format_: str, dtype: torch.dtype, parts: int
) -> None:
    step = random_step(3, format_, dtype, 5, 2, 3, 8, 40, 50, longest=1100, windows=(0, 300), parts=parts)
    in_pages = paged(step, 1)
    in_kinds = in_two_kinds(in_pages)
    expected = step.run()
    assert same_bits(in_pages.run(), expected)
    assert same_bits(in_kinds.run(), expected)
    assert same_contents(step, in_pages)


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CACHES
def test_a_prompt_in_pages_and_in_any_parts_is_the_prompt_at_once(
    isa: str, format_: str, dtype: torch.dtype, parts: int
) -> None:
    """Parts of one token are left out: they decode."""
    step = random_prompt(4, format_, dtype, 200, 400, 2, 3, 8, 40, 50, windows=(0, 300), parts=parts)
    in_pages = paged(step, 2)
    whole = step.run()
    for cuts in ([0, 400], [0, 2, 57, 60, 398, 400], [0, 56, 312, 400]):
        again = paged(step, 3) if cuts[1] != 400 else in_pages
        parts = [again.part(*cut)._replace(pages=again.pages).run() for cut in pairwise(cuts)]
        assert same_bits(torch.cat(parts, 1), whole), cuts
        assert same_contents(step, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CACHES
def test_a_prompt_reads_no_page_before_its_window(isa: str, dtype: torch.dtype, parts: int) -> None:
    step = random_prompt(4, "int8", dtype, 700, 60, 2, 3, 8, 40, 50, windows=(0, 300), parts=parts)
    in_kinds = in_two_kinds(paged(step, 2))
    assert same_bits(in_kinds.run(), step.run())


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CACHES
def test_tokens_of_one_row_at_once_are_those_one_by_one(isa: str, format_: str, dtype: torch.dtype, parts: int) -> None:
    """Forty tokens of twelve rows: some have one, some up to nine, across the end of a chunk."""
    each = [1, 1, 5, 1, 9, 2, 1, 8, 1, 3, 7, 1]
    step = paged(random_step(5, format_, dtype, 12, 2, 3, 8, 40, 50, longest=300, windows=(0, 100), parts=parts), 3)
    rows = torch.tensor([row for row, n in enumerate(each) for _ in range(n)])
    begin = torch.tensor([7, 255, 253, 0, 250, 20, 290, 3, 64, 255, 100, 256])
    positions = begin[rows][:, None] + torch.tensor([i for n in each for i in range(n)])[:, None]
    layers = [layer._replace(k=filled(layer.k), v=filled(layer.v)) for layer in step.layers]
    rng = generator(6)
    together = step._replace(
        x=torch.randn(40, 1, 40, generator=rng).to(dtype),
        cos=torch.rand(40, 1, 8, generator=rng),
        sin=torch.rand(40, 1, 8, generator=rng),
        positions=positions,
        layers=layers,
        pages=step.pages[rows],
    )
    alone = together.copy()
    y = together.run()
    for i in range(40):
        at = slice(i, i + 1)
        one = alone._replace(**{name: getattr(alone, name)[at] for name in ("x", "cos", "sin", "positions", "pages")})
        assert same_bits(one.run(), y[at]), i
    for a, b in zip(together.layers, alone.layers, strict=True):
        assert same_bits(a.k, b.k)
        assert same_bits(a.v, b.v)


def filled(cache: Tensor) -> Tensor:
    if cache.dtype == torch.int8:
        return to_codes(torch.randn((*cache.shape[:-1], cache.shape[-1] - SCALE_BYTES), generator=generator(9)))
    return torch.where(cache.isnan(), torch.randn(cache.shape, generator=generator(9)).to(cache.dtype), cache)
