"""What a model needs of memory, held against what the machine has before any data is read."""

from bisect import bisect_right

import torch

from llama_mini.errors import CapacityError
from llama_mini.machine import available_memory, dtype_name, format_bytes
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import BLOCK

PREFILL_CHUNK = 512  # tokens of a prompt that run at once: enough to fill the matrix units, small enough for the cache
BITS = {"int8": 8.5, "int4": 5.0}  # of a weight of the layers, its share of the scales included
THREAD_SCRATCH = 2**18  # bytes: the block of scores, 64 x 512 float32 and a copy, that attention keeps in each thread


def check_fits(
    config: LlamaConfig,
    n_parameters: int,
    dtype: torch.dtype,
    positions: int,
    device: torch.device,
    available: int | None = None,
    quantize: str | None = None,
) -> None:
    """Whether weights, a cache row of `positions` and the work on them fit; nothing is allocated.

    `available` is in bytes; None asks the machine, and where it does not say, everything fits.
    Raises CapacityError with the numbers and with what would fit.
    """
    there = available_memory(device) if available is None else available
    weights = weight_bytes(n_parameters, dtype, config, quantize)
    need = weights + _need(config, 0, dtype, positions)
    if there is None or need <= there:
        return
    cache, work = cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype)
    if quantize is None:
        advice = _advice(config, n_parameters, dtype, positions, there)
    else:
        shorter = _longest(config, 0, dtype, positions, there - weights)
        advice = f"a context of {shorter} positions would fit" if shorter else "no context fits"
    raise CapacityError(
        f"the model needs {format_bytes(need)} in {quantize or dtype_name(dtype)} ({format_bytes(weights)} of weights, "
        f"{format_bytes(cache)} of cache for {positions} positions, {format_bytes(work)} of work), "
        f"but {device} has {format_bytes(there)} available; {advice}"
    )


def check_cache_fits(
    config: LlamaConfig,
    rows: int,
    dtype: torch.dtype,
    positions: int,
    n_new: int,
    device: torch.device,
    available: int | None = None,
) -> None:
    """The same for `rows` of cache beside a loaded model, for prompts of up to `n_new` tokens. Raises CapacityError."""
    there = available_memory(device) if available is None else available

    def need(n: int) -> int:
        return rows * cache_bytes(config, n, dtype) + work_bytes(config, n, dtype, n_new)

    if there is None or need(positions) <= there:
        return
    cache, work = rows * cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype, n_new)
    left = bisect_right(range(BLOCK, _in_blocks(positions), BLOCK), there, key=need)
    fits = f"{BLOCK * left} positions would fit" if left else "no prompt at all fits beside the model"
    prompts = "a prompt" if rows == 1 else f"{rows} prompts"
    raise CapacityError(
        f"{prompts} with {positions} positions of cache, {format_bytes(cache)}, "
        f"and {format_bytes(work)} of work do not "
        f"fit in the {format_bytes(there)} that {device} has available; {fits}"
    )


def weight_bytes(
    n_parameters: int, dtype: torch.dtype, config: LlamaConfig | None = None, quantize: str | None = None
) -> int:
    if config is None or quantize is None:
        return n_parameters * dtype.itemsize
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layers = config.n_layers * config.dim * (2 * q + 2 * kv + 3 * config.hidden_dim)
    head = config.vocab_size * config.dim  # the embedding too, where it is the head
    others = max(0, n_parameters - layers - head)
    return int((layers * BITS[quantize] + head * BITS["int8"]) / 8) + others * dtype.itemsize


def cache_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype) -> int:
    """Keys and values of one row, in whole blocks as the cache has them."""
    width = config.n_kv_heads * config.head_dim
    return 2 * config.n_layers * width * _in_blocks(positions) * dtype.itemsize


def work_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype, n_new: int | None = None) -> int:
    """An upper bound of what is alive besides weights and cache: in a chunk of the prompt, or in sampling a token.

    `n_new`: tokens of the longest prompt; None: all positions are.
    """
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)  # norms, rotation and sampling compute in float32 at least
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    branches = map(config.norm_plan.layer, range(config.n_layers))
    mid = any(feed_forward.mid is not None for _, feed_forward in branches)
    branch = max(
        2 * (q + 2 * kv) * size + 3 * q * wide,  # q, k and v, what turns one of them, and their turned copies
        3 * config.hidden_dim * size,  # gate, up and their product
        2 * (config.hidden_dim if mid else config.dim) * (size + wide),  # a norm
    )
    mask = (3 + size) * _in_blocks(positions)  # of bool: itself, its window, and one to make it; what attention adds
    chunk = min(PREFILL_CHUNK, positions if n_new is None else n_new) * (3 * config.dim * size + branch + mask)
    chunk += 2 * kv * _in_blocks(positions) * size  # keys and values of one layer, as attention lays them out anew
    return max(chunk + torch.get_num_threads() * THREAD_SCRATCH, config.vocab_size * (size + 8 * wide))


def _need(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int) -> int:
    cache, work = cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype)
    return weight_bytes(n_parameters, dtype) + cache + work


def _advice(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int, there: int) -> str:
    narrow = torch.bfloat16 if dtype.itemsize > torch.bfloat16.itemsize else dtype
    ways = []
    if _need(config, n_parameters, narrow, positions) <= there:
        ways.append(f"--dtype {dtype_name(narrow)}")
    if shorter := _longest(config, n_parameters, dtype, positions, there):
        ways.append(f"a context of {shorter} positions")
    if not ways and (shorter := _longest(config, n_parameters, narrow, positions, there)):
        ways.append(f"--dtype {dtype_name(narrow)} with a context of {shorter} positions")
    if not ways:  # int8 before int4: it is closer to the weights
        work = _need(config, 0, narrow, positions)
        coded = [name for name in BITS if weight_bytes(n_parameters, narrow, config, name) + work <= there]
        ways = [f"--quantize {coded[0]}"] if coded else []
    if ways:
        return f"{' or '.join(ways)} would fit"
    least = _need(config, n_parameters, narrow, min(positions, BLOCK))
    return (
        f"no dtype, format or context fits: the least, {dtype_name(narrow)} with the shortest context, "
        f"needs {format_bytes(least)}"
    )


def _longest(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int, there: int) -> int:
    """The longest context that fits, in whole blocks and with fewer of them than `positions` take; 0 if none does."""
    shorter = range(BLOCK, _in_blocks(positions), BLOCK)
    return BLOCK * bisect_right(shorter, there, key=lambda n: _need(config, n_parameters, dtype, n))


def _in_blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK
