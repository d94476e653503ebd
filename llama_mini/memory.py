"""How much memory a model needs, and whether it fits. It is checked before any weights are read."""

from bisect import bisect_right

import torch

from llama_mini.errors import CapacityError
from llama_mini.machine import available_memory, dtype_name, format_bytes
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import BLOCK, whole_blocks

PREFILL_CHUNK = 512  # tokens of a prompt per forward pass: enough for fast matrix products, with bounded memory
BITS_PER_WEIGHT = {"int8": 8.5, "int4": 5.0}  # of a quantized matrix in the layers, with its scales
ATTENTION_BYTES_PER_THREAD = 2**18  # 64 x 512 scores in float32, and a copy


def check_fits(
    config: LlamaConfig,
    n_parameters: int,
    dtype: torch.dtype,
    positions: int,
    device: torch.device,
    available: int | None = None,
    quantize: str | None = None,
) -> None:
    """Checks that the weights, a cache of one row with `positions` and the work memory fit; allocates nothing.

    `available` is in bytes; None asks the machine. If the machine does not say, the check passes.
    Raises CapacityError with the numbers and with what would fit.
    """
    available = available_memory(device) if available is None else available
    weights = weight_bytes(n_parameters, dtype, config, quantize)
    need = weights + _need(config, 0, dtype, positions)
    if available is None or need <= available:
        return
    cache, work = cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype)
    if quantize is None:
        advice = _advice(config, n_parameters, dtype, positions, available)
    else:
        shorter = _longest(config, 0, dtype, positions, available - weights)
        advice = f"a context of {shorter} positions would fit" if shorter else "no context fits"
    raise CapacityError(
        f"the model needs {format_bytes(need)} in {quantize or dtype_name(dtype)} ({format_bytes(weights)} of weights, "
        f"{format_bytes(cache)} of cache for {positions} positions, {format_bytes(work)} of work memory), "
        f"but {device} has {format_bytes(available)} available; {advice}"
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
    """Checks that a cache of `rows` and the work memory for prompts of up to `n_new` tokens fit beside the model.

    Raises CapacityError.
    """
    available = available_memory(device) if available is None else available

    def need(n: int) -> int:
        return rows * cache_bytes(config, n, dtype) + work_bytes(config, n, dtype, n_new)

    if available is None or need(positions) <= available:
        return
    cache, work = rows * cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype, n_new)
    n_blocks = bisect_right(range(BLOCK, whole_blocks(positions), BLOCK), available, key=need)
    advice = f"{BLOCK * n_blocks} positions would fit" if n_blocks else "no prompt at all fits beside the model"
    prompts = "a prompt" if rows == 1 else f"{rows} prompts"
    raise CapacityError(
        f"{prompts} with {positions} positions of cache, {format_bytes(cache)}, and {format_bytes(work)} of work "
        f"memory do not fit in the {format_bytes(available)} that {device} has available; {advice}"
    )


def weight_bytes(
    n_parameters: int, dtype: torch.dtype, config: LlamaConfig | None = None, quantize: str | None = None
) -> int:
    """Bytes of the parameters. `quantize` counts only together with `config`."""
    if config is None or quantize is None:
        return n_parameters * dtype.itemsize
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layers = config.n_layers * config.dim * (2 * q + 2 * kv + 3 * config.hidden_dim)
    head = config.vocab_size * config.dim  # int8 in both formats; also the embedding, if it is tied to the head
    others = max(0, n_parameters - layers - head)
    return int((layers * BITS_PER_WEIGHT[quantize] + head * BITS_PER_WEIGHT["int8"]) / 8) + others * dtype.itemsize


def cache_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one cache row, in whole blocks as the cache allocates them."""
    width = config.n_kv_heads * config.head_dim
    return 2 * config.n_layers * width * whole_blocks(positions) * dtype.itemsize


def work_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype, n_new: int | None = None) -> int:
    """An upper bound on the temporary memory in bytes, of a prefill chunk or of sampling a token: whichever is larger.

    `n_new`: tokens of the longest prompt; None: as many as `positions`.
    """
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)  # norms, rotary embedding and sampling use float32 at least
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    branches = map(config.norm_plan.layer, range(config.n_layers))
    mid = any(feed_forward.mid is not None for _, feed_forward in branches)
    branch = max(
        2 * (q + 2 * kv) * size + 3 * q * wide,  # q, k, v, their rotated copies, temporaries of rotating q
        3 * config.hidden_dim * size,  # gate, up and their product
        2 * (config.hidden_dim if mid else config.dim) * (size + wide),  # a norm
    )
    mask = (3 + size) * whole_blocks(positions)  # bool: full, windowed, temporary; in dtype: added to scores
    chunk = min(PREFILL_CHUNK, positions if n_new is None else n_new) * (3 * config.dim * size + branch + mask)
    chunk += 2 * kv * whole_blocks(positions) * size  # a contiguous copy of one layer's keys and values for attention
    sampling = config.vocab_size * (size + 8 * wide)
    return max(chunk + torch.get_num_threads() * ATTENTION_BYTES_PER_THREAD, sampling)


def _need(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int) -> int:
    cache, work = cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype)
    return weight_bytes(n_parameters, dtype) + cache + work


def _advice(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int, available: int) -> str:
    """Which changes of dtype, context or format would fit; a narrower dtype and a shorter context come first."""
    narrow = torch.bfloat16 if dtype.itemsize > torch.bfloat16.itemsize else dtype
    ways = []
    if _need(config, n_parameters, narrow, positions) <= available:
        ways.append(f"--dtype {dtype_name(narrow)}")
    if shorter := _longest(config, n_parameters, dtype, positions, available):
        ways.append(f"a context of {shorter} positions")
    if not ways and (shorter := _longest(config, n_parameters, narrow, positions, available)):
        ways.append(f"--dtype {dtype_name(narrow)} with a context of {shorter} positions")
    if not ways:  # int8 comes first: it is closer to the weights than int4
        others = _need(config, 0, narrow, positions)
        formats = [q for q in BITS_PER_WEIGHT if weight_bytes(n_parameters, narrow, config, q) + others <= available]
        ways = [f"--quantize {formats[0]}"] if formats else []
    if ways:
        return f"{' or '.join(ways)} would fit"
    least = _need(config, n_parameters, narrow, min(positions, BLOCK))
    return (
        f"no dtype, format or context fits: the least, {dtype_name(narrow)} with the shortest context, "
        f"needs {format_bytes(least)}"
    )


def _longest(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int, available: int) -> int:
    """The longest context below `positions` that fits, in whole blocks; 0 if none does."""
    shorter = range(BLOCK, whole_blocks(positions), BLOCK)
    return BLOCK * bisect_right(shorter, available, key=lambda n: _need(config, n_parameters, dtype, n))
