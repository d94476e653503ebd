"""The cache: what is read back is what an uncached model computes, whoever shares the batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini.errors import CapacityError
from llama_mini.model.attention import causal_mask
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama
from tests.tiny_models import TINY, random_tokens, tiny_model

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}  # float64: only the order of sums may differ
UNEQUAL = [5, 19, 33, 1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Which thread computes a head decides how the scratch memory under it is aligned, and that a few last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["pre", "out+qk:full"])
def model(request: pytest.FixtureRequest) -> Llama:
    return tiny_model(4, torch.float64, norm_plan=request.param)


def storage(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Keys and values of every layer, (L, B, K, S, D)."""
    layers = cache.layers(cache.positions(0))
    return torch.stack([layer.k for layer in layers]), torch.stack([layer.v for layer in layers])


def filled_cache(model: Llama, lengths: list[int], capacity: int = 64) -> KVCache:
    """A batch whose row r holds `lengths[r]` tokens of its own."""
    cache = model.new_cache(len(lengths), capacity)
    for row, length in enumerate(lengths):
        model(random_tokens(1, length, seed=row), cache.row(row))
    return cache


def decode(model: Llama, cache: KVCache, tokens: Tensor) -> Tensor:
    return torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 16, 15, 1], [16, 16, 8], [39, 1]], ids=str)
def test_cached_in_any_chunks_is_uncached(model: Llama, chunks: list[int]) -> None:
    tokens = random_tokens(2, 40)
    cache = model.new_cache(2, 40)
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    assert cache.lengths == [40, 40]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), **EXACT)


def test_rows_of_unequal_length_decode_as_each_alone(model: Llama) -> None:
    cache, new = filled_cache(model, UNEQUAL), random_tokens(4, 20, seed=9)
    together = decode(model, cache, new)
    assert cache.lengths == [length + 20 for length in UNEQUAL]
    for row, length in enumerate(UNEQUAL):
        whole = torch.cat((random_tokens(1, length, seed=row), new[row : row + 1]), dim=1)
        torch.testing.assert_close(together[row : row + 1], model(whole)[:, length:], **EXACT)


def test_rows_of_unequal_length_stay_close_in_float32() -> None:
    model, new = tiny_model(4), random_tokens(4, 20, seed=9)
    together = decode(model, filled_cache(model, UNEQUAL), new)
    for row, length in enumerate(UNEQUAL):
        whole = torch.cat((random_tokens(1, length, seed=row), new[row : row + 1]), dim=1)
        torch.testing.assert_close(together[row : row + 1], model(whole)[:, length:], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 8), (9, 3, 64), (4, 1, 18), (4, 4, 128)])
def test_attentions_bits_do_not_depend_on_who_shares_the_batch(heads: int, kv_heads: int, head_dim: int) -> None:
    sizes = TINY | {"n_layers": 1, "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": head_dim}
    lengths = [5, 20, 37, 1, 64, 520]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cache = KVCache(LlamaConfig(**sizes), len(lengths), 600, dtype=dtype)
        rng = torch.Generator().manual_seed(heads)
        for row, length in enumerate(lengths):
            part = cache.row(row)
            k, v = torch.randn(2, 1, length, kv_heads, head_dim, generator=rng).to(dtype)
            part.layers(part.positions(length))[0].append(k, v, length)
            part.advance(length)
        qkv = [torch.randn(6, 1, h, head_dim, generator=rng).to(dtype) for h in (heads, kv_heads, kv_heads)]
        together = attend(cache, *qkv)
        for row in range(len(lengths)):
            alone = attend(cache.row(row), *(x[row : row + 1] for x in qkv))
            assert torch.equal(alone, together[row : row + 1]), (dtype, lengths[row])


def attend(cache: KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = cache.positions(1)
    mask = causal_mask(positions, cache.read_length(1))
    keys, values = cache.layers(positions)[0].append(k, v, mask.shape[-1])
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)


def test_reads_are_whole_blocks_of_sixteen_also_alone() -> None:
    cache = KVCache(LlamaConfig(**TINY), 2, 50)
    assert storage(cache)[0].shape == (3, 2, 2, 64, 8)  # capacity too
    reads = {}
    for filled in (0, 1, 14, 15, 16, 17, 47, 48, 49):
        cache.row(1).advance(filled - cache.lengths[1])
        reads[filled] = (cache.read_length(1), cache.row(0).read_length(1))
    assert reads == dict(zip(reads, [(16, 16)] * 4 + [(32, 16)] * 2 + [(48, 16)] + [(64, 16)] * 2, strict=True))


def test_a_mask_shows_a_token_every_position_up_to_its_own() -> None:
    mask = causal_mask(torch.tensor([[0, 1], [3, 4]]), 6)
    assert mask.shape == (2, 1, 2, 6)
    assert mask[:, 0].sum(-1).tolist() == [[1, 2], [4, 5]]
    assert mask[1, 0, 0].tolist() == [True] * 4 + [False] * 2


def test_storage_starts_as_zeros_in_the_models_dtype() -> None:
    for part in storage(tiny_model(dtype=torch.bfloat16).new_cache(2, 20)):
        assert part.dtype == torch.bfloat16
        assert not part.any()


@pytest.mark.parametrize("keep", [0, 1, 15, 16, 30])
def test_a_truncated_row_goes_on_from_there_and_the_other_is_left_alone(model: Llama, keep: int) -> None:
    tokens, other = random_tokens(2, 30), random_tokens(2, 12, seed=8)
    cache = model.new_cache(2, 64)
    model(tokens, cache)
    cache.truncate(0, keep)
    assert cache.lengths == [keep, 30]
    together = model(other, cache)
    for row, kept in ((0, keep), (1, 30)):
        whole = torch.cat((tokens[row : row + 1, :kept], other[row : row + 1]), dim=1)
        torch.testing.assert_close(together[row : row + 1], model(whole)[:, kept:], **EXACT)


@pytest.mark.parametrize("length", [-1, 6])
def test_a_row_cannot_be_cut_to_what_it_does_not_hold(length: int) -> None:
    cache = filled_cache(tiny_model(), [5, 9])
    with pytest.raises(CapacityError, match=f"row 0 holds 5 positions and cannot be cut to {length}"):
        cache.truncate(0, length)
    assert cache.lengths == [5, 9]


def test_nan_left_by_a_failed_row_does_not_poison_the_next_one(model: Llama) -> None:
    cache = filled_cache(model, [20, 20])
    for part in storage_views(cache):
        part[:, 0, :, :20] = torch.nan
    new = random_tokens(2, 3)
    assert model(new[:1], cache.row(0)).isnan().all()
    cache.row(0).truncate(0, 0)
    assert model(new[:1], cache.row(0)).isnan().any()  # under the mask, and poison all the same
    cache.clear(0)
    assert not any(part[:, 0].any() for part in storage(cache))
    assert cache.lengths == [0, 20]
    torch.testing.assert_close(model(new[:1], cache.row(0)), model(new[:1]), **EXACT)


def storage_views(cache: KVCache) -> tuple[Tensor, Tensor]:
    return cache._k, cache._v


def test_a_row_is_a_view_of_storage_and_length() -> None:
    model = tiny_model()
    cache = model.new_cache(3, 32)
    row = cache.row(1)
    model(random_tokens(1, 7), row)
    assert cache.lengths == [0, 7, 0]
    assert cache.positions(2).tolist() == [[0, 1], [7, 8], [0, 1]]  # the tensor the model gets, too
    k = storage(cache)[0]
    assert k[:, 1, :, :7].all()
    assert not k[:, [0, 2]].any()
    cache.truncate(1, 4)
    assert (row.lengths, row.batch, row.length) == ([4], 1, 32)
    row.clear(0)
    assert not storage(cache)[0].any()


@pytest.mark.parametrize(("length", "filled", "new"), [(20, 20, 1), (20, 15, 6), (20, 0, 21), (16, 16, 1), (1, 1, 1)])
def test_what_does_not_fit_is_refused_with_both_numbers(length: int, filled: int, new: int) -> None:
    model = tiny_model()
    cache = model.new_cache(2, length)
    if filled:
        model(random_tokens(1, filled), cache.row(1))  # one full row is enough
    before = [part.clone() for part in storage(cache)]
    with pytest.raises(CapacityError, match=f"holds {length} positions: {filled} are filled, {new} more do not fit"):
        model(random_tokens(2, new), cache)
    assert cache.lengths == [0, filled]
    assert all(torch.equal(part, old) for part, old in zip(storage(cache), before, strict=True))


def test_exactly_full_fits() -> None:
    model, tokens = tiny_model(), random_tokens(1, 20)
    torch.testing.assert_close(model(tokens, model.new_cache(1, 20)), model(tokens), rtol=0, atol=1e-5)
