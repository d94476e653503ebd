"""The pages of sequences: none is lost, none that a token may see is given back, and of a window no more are held."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mini.engine.pages import PAGE, PagedCache, PagedTokens, Pages, SequencePages, pages_of
from llama_mini.engine.prefix_cache import MIN_PREFIX, Node, PrefixCache, common_prefix_length
from llama_mini.memory import PREFILL_CHUNK
from tests.tiny_models import tiny_model

SIZES = {"max_seq_len": 8192, "dim": 8, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 8, "vocab_size": 8}


def pool_of(window: int | None, count: int = 200) -> Pages:
    return Pages(tiny_model(sliding_window=window, **SIZES), count, window)


@given(st.sampled_from((None, 1, 2, 255, 256, 257, 600, 4096)), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_no_page_is_lost_and_none_that_a_token_sees_is_given_back(window: int | None, seed: int) -> None:
    """Prompts in parts, answers, guesses that are taken back, and several answers to one prompt."""
    draw, pool = random.Random(seed), pool_of(window)
    lists, filled = [SequencePages(pool)], [0]
    for _ in range(60):
        at = draw.randrange(len(lists))
        if draw.random() < 0.1 and len(lists) < 5:
            lists.append(lists[at].fork(filled[at]))
            filled.append(filled[at])
        elif draw.random() < 0.1:
            lists[at].clear()
            filled[at] = 0
        else:
            n = draw.choice((1, 1, 16, 300, PREFILL_CHUNK + 1))
            if filled[at] + n > 8000:
                continue
            lists[at].slide(filled[at])
            lists[at].grow(pages_of(filled[at] + n))
            assert lists[at].end >= pages_of(filled[at] + n)  # more if guesses were taken back
            oldest = 0 if window is None else max(0, filled[at] - window + 1)
            assert lists[at].first * PAGE <= oldest
            assert len(lists[at].pages) <= pool.needed(8192)
            filled[at] += draw.choice((n, max(1, n // 2)))
        used = [page for each in lists for page in each.pages]
        assert all(pool._users[page] == used.count(page) for page in range(pool.count))
        assert sorted([*pool.free, *set(used)]) == list(range(pool.count))


def test_a_page_that_is_given_back_holds_zeros() -> None:
    """PyTorch's attention reads masked positions of the next owner, and 0 · NaN is NaN."""
    pool = pool_of(256, 8)
    pages = SequencePages(pool)
    pages.grow(3)
    shared = pool.share(pages.pages[1])
    pool._storage.fill_(torch.nan)
    first = pages.pages[0]
    pages.slide(3 * PAGE - 1)
    assert (pages.first, len(pages.pages), pages.numbered[:2]) == (2, 1, [None, None])
    assert not pool._storage[first].any()
    assert pool._storage[shared].isnan().all()  # the prefix cache has it


def test_a_step_names_only_pages_of_its_own() -> None:
    """Also in the place of those that were given back, and beyond the end: PyTorch's attention reads all of them."""
    cache = PagedCache(tiny_model(sliding_window=300, sliding_layers=(1,), **SIZES), 40 * PAGE, 40 * PAGE)
    rows, ends = [cache.sequence() for _ in range(3)], (2000, 300, 1200)
    for row, end in zip(rows, ends, strict=True):
        for pages in row:
            pages.grow(pages_of(end))
            pages.slide(end - 1)
    step = PagedTokens(cache, rows, [[end - 1] for end in ends])
    for kind, table in enumerate(step._pages):
        for row, numbers in zip(rows, table.tolist(), strict=True):
            pages = row[kind]
            assert len(numbers) == 8
            assert set(numbers) == set(pages.pages)
            assert numbers[pages.first : pages.end] == pages.pages


@pytest.mark.parametrize(
    ("changes", "windows", "kinds"),
    [
        ({}, [None], [0, 0, 0]),
        ({"sliding_window": 30}, [30], [0, 0, 0]),
        ({"sliding_window": 30, "sliding_layers": (0, 2)}, [None, 30], [1, 0, 1]),
        ({"sliding_window": 30, "sliding_layers": ()}, [None], [0, 0, 0]),
    ],
)
def test_kinds_of_pages(changes: dict[str, object], windows: list[int | None], kinds: list[int]) -> None:
    cache = PagedCache(tiny_model(**SIZES | changes), 20 * PAGE, 5 * PAGE)
    assert [kind.window for kind in cache.kinds] == windows
    assert [kind.count for kind in cache.kinds] == [20 if window is None else 5 for window in windows]
    assert [kind for _, _, kind in cache.layers] == kinds
    assert len({k.data_ptr() for k, _, _ in cache.layers}) == 3
    assert all(len(k) == cache.kinds[kind].count for k, _, kind in cache.layers)


@pytest.mark.parametrize("sliding_layers", [(0, 1, 2), (1,)])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_prefix_is_as_long_as_its_window_is_there(sliding_layers: tuple[int, ...], seed: int) -> None:
    """Random prompts with common beginnings, of which some lose pages: the longest prefix that can be used is found."""
    draw = random.Random(seed)
    window = draw.choice((1, 100, 257, 600))
    model = tiny_model(sliding_window=window, sliding_layers=sliding_layers, **SIZES)
    cache = PagedCache(model, 100 * PAGE, 100 * PAGE)
    prefixes, held = PrefixCache(cache.kinds, most=20), list[list[SequencePages]]()
    stem = draw.choices(range(3), k=2500)
    for _ in range(25):
        prompt = stem[: draw.choice((40, 256, 300, 700, 1500, 2500))] + draw.choices(
            range(5, 8), k=draw.choice((0, draw.randrange(2, 300)))
        )
        sequence = cache.sequence()
        filled = prefixes.take_over(prompt, None, sequence)
        assert filled == _longest(prefixes, prompt)
        for pages in sequence:
            assert pages.end == pages_of(filled)
            assert pages.first * PAGE <= max(0, filled - window + 1) or not filled
            for i, page in enumerate(pages.pages, pages.first):
                ids = prompt[i * PAGE : min((i + 1) * PAGE, filled)]
                assert _held(pages.pool, page)[: len(ids)].tolist() == ids
        while filled < len(prompt):
            n = min(PREFILL_CHUNK, len(prompt) - filled)
            for pages in sequence:
                pages.slide(filled)
                pages.grow(pages_of(filled + n))
                for at in range(filled, filled + n):
                    _held(pages.pool, pages.pages[at // PAGE - pages.first])[at % PAGE] = prompt[at]
            filled += n
        prefixes.insert(prompt, sequence, None)
        held.append(sequence)
        if len(held) > draw.randrange(3):
            for pages in held.pop(0):
                pages.clear()
            prefixes.trim()
        for _ in range(draw.randrange(3)):
            prefixes.evict(draw.randrange(len(cache.kinds)))
        for i, kind in enumerate(cache.kinds):
            assert prefixes.n_unused(i) <= 20
            kept = [node.pages[i] for node in prefixes._nodes if node.pages[i] is not None]
            used = [*kept, *(page for sequence in held for page in sequence[i].pages)]
            assert all(kind._users[page] == used.count(page) for page in range(kind.count))
            assert sorted([*kind.free, *set(used)]) == list(range(kind.count))
        for node in prefixes._nodes:
            assert node.children or None not in node.pages
    prefixes.clear()
    for sequence in held:
        for pages in sequence:
            pages.clear()
    assert all(sorted(kind.free) == list(range(kind.count)) for kind in cache.kinds)


def _held(pool: Pages, page: int) -> torch.Tensor:
    """A number of each position of a page, which stands for its keys and values."""
    return pool._storage[page, 0, 0, 0, :, 0]


def _longest(prefixes: PrefixCache, prompt: list[int]) -> int:
    """The longest prefix that can be used, by trying all lengths."""
    node, path, length = prefixes._roots.get(None), list[Node](), 0
    while node is not None:
        rest = prompt[length : min(len(prompt) - 2, length + PAGE)]
        equal = {common_prefix_length(child.ids, rest): child for child in reversed(node.children)}
        length += (most := max(equal, default=0))
        node = equal[most] if most else None
        path += [node] if node else []
        if most < PAGE:
            break
    for n in range(length, MIN_PREFIX - 1, -1):
        if all(
            node.pages[i] is not None
            for i, kind in enumerate(prefixes._kinds)
            for node in path[0 if kind.window is None else max(0, n - kind.window + 1) // PAGE : pages_of(n)]
        ):
            return n
    return 0
