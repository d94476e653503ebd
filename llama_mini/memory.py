"""How much memory a model needs, and whether it fits. It is checked before any weights are read."""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import torch

from llama_mini.errors import CapacityError, RequestError
from llama_mini.machine import available_memory, dtype_name, format_bytes
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import BLOCK, whole_blocks
from llama_mini.validate import check_choice

PAGE = 256  # positions: as many as the operators read from one page (PAGE_MULTIPLE in optimize/native/isa.h)
PREFILL_CHUNK = 512  # tokens of a prompt per forward pass: enough for fast matrix products, with bounded memory
ATTENTION_BYTES_PER_THREAD = 2**18  # 64 x 512 scores in float32, and a copy
WeightBytes = Callable[[torch.dtype, str], int]  # (dtype, quantize) -> bytes of a checkpoint's weights in memory
SCALE_BYTES = 4  # in an int8 cache, of the key or value of a head
CACHE_SHARE = 0.9  # of the available memory, for the engine's cache and work memory at most
Need = Callable[[torch.dtype, str, int], int]  # (dtype, quantize, positions) -> bytes of the model and its cache
_FORMATS = {  # what to advise where no dtype fits; the most bits come first, since they are closest to the weights
    "auto": "--dtype auto --quantize auto",
    "int8": "--quantize int8",
    "int4": "--quantize int4",
}


def cache_dtype(name: str) -> torch.dtype | None:
    """The dtype of a cache by its name, `int8`; None for `auto`, the model's. Raises RequestError."""
    check_choice("kv_dtype", name, ("auto", "int8"), RequestError)
    return torch.int8 if name == "int8" else None


def check_fits(
    config: LlamaConfig,
    weights: WeightBytes,
    dtype: torch.dtype,
    positions: int,
    device: torch.device,
    available: int | None = None,
    quantize: str = "none",
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Checks that the weights, a cache of one sequence of `positions` and the work memory fit; allocates nothing.

    `available` is in bytes; None asks the machine. If the machine does not say, the check passes. `kv_dtype`: of the
    cache, None: as the model. Raises CapacityError with the numbers and with what would fit.
    """

    def need(dtype: torch.dtype, quantize: str, positions: int) -> int:
        cache = sequence_bytes(config, positions, kv_dtype or dtype)
        return weights(dtype, quantize) + cache + work_bytes(config, positions, dtype)

    available = available_memory(device) if available is None else available
    if available is None or need(dtype, quantize, positions) <= available:
        return
    cache, work = sequence_bytes(config, positions, kv_dtype or dtype), work_bytes(config, positions, dtype)
    form = {"none": f"in {dtype_name(dtype)}", "auto": "as it is stored"}.get(quantize, f"in {quantize}")
    raise CapacityError(
        f"the model needs {format_bytes(need(dtype, quantize, positions))} {form} "
        f"({format_bytes(weights(dtype, quantize))} of weights, {format_bytes(cache)} of cache for {positions} "
        f"positions, {format_bytes(work)} of work memory), but {device} has {format_bytes(available)} available; "
        + _advice(need, dtype, quantize, positions, available)
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
    longest = _longest(positions, available, need)
    advice = f"{longest} positions would fit" if longest else "no prompt at all fits beside the model"
    prompts = "a prompt" if rows == 1 else f"{rows} prompts"
    raise CapacityError(
        f"{prompts} with {positions} positions of cache, {format_bytes(cache)}, and {format_bytes(work)} of work "
        f"memory do not fit in the {format_bytes(available)} that {device} has available; {advice}"
    )


def fitting_positions(
    config: LlamaConfig,
    most: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
    windowed: int | None = None,
) -> int:
    """How many positions of cache fit beside the work memory, in whole blocks: `most`, or fewer; 0 if none.

    The layers with a sliding window have as many, but at most `windowed`.
    """
    available = available_memory(device)

    def need(positions: int) -> int:
        work = work_bytes(config, min(positions, config.max_seq_len), dtype, PREFILL_CHUNK)
        return cache_bytes(config, positions, kv_dtype or dtype, windowed) + work

    if available is None or need(most) <= CACHE_SHARE * available:
        return most
    return _longest(most, int(CACHE_SHARE * available), need)


def pages_of(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // PAGE)


def window_positions(config: LlamaConfig) -> int:
    """How many positions of a sequence the layers with a sliding window keep at most.

    Those are the window and a part of a prompt, in whole pages, of which the first and the last may be partly used.
    """
    return PAGE * (pages_of((config.sliding_window or 0) + PREFILL_CHUNK) + 1)


def sequence_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that the engine keeps of one sequence."""
    return cache_bytes(config, positions, dtype, window_positions(config))


def cache_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype, windowed: int | None = None) -> int:
    """Bytes of keys and values of one cache row of this dtype, in whole blocks as the cache allocates them.

    `windowed`: the most positions that layers with a sliding window keep; None: all.
    """
    head = config.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)
    near, n_near = positions if windowed is None else min(positions, windowed), len(config.sliding_layers)
    rows = (config.n_layers - n_near) * whole_blocks(positions) + n_near * whole_blocks(near)
    return 2 * config.n_kv_heads * head * rows


def work_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype, n_new: int | None = None) -> int:
    """An upper bound on the temporary memory in bytes, of a prefill chunk or of sampling a token: whichever is larger.

    `n_new`: tokens of the longest prompt; None: as many as `positions`.
    """
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)  # norms, rotary embedding and sampling use float32 at least
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    feed_forward = [config.norm_plan.layer(i)[1] for i in range(config.n_layers)]
    inside = any(plan.gate or plan.up for plan in feed_forward)
    wide_norm = inside or any(plan.mid for plan in feed_forward)
    branch = max(
        2 * (q + 2 * kv) * size + 3 * q * wide,  # q, k, v, their rotated copies, temporaries of rotating q
        3 * config.hidden_dim * size,  # gate, up and their product
        2 * (config.hidden_dim if wide_norm else config.dim) * (size + wide)  # a norm
        + 2 * config.hidden_dim * size * inside,  # beside gate and up
    )
    scores = 0 if config.attention_softcap is None else 3 * config.n_heads * wide  # of a capped attention
    mask = (3 + size + scores) * whole_blocks(positions)  # bool: full, windowed, temporary; in dtype: added to scores
    chunk = min(PREFILL_CHUNK, positions if n_new is None else n_new) * (3 * config.dim * size + branch + mask)
    chunk += 2 * kv * whole_blocks(positions) * size  # a contiguous copy of one layer's keys and values for attention
    sampling = config.vocab_size * (size + 8 * wide)
    return max(chunk + torch.get_num_threads() * ATTENTION_BYTES_PER_THREAD, sampling)


def _advice(need: Need, dtype: torch.dtype, quantize: str, positions: int, available: int) -> str:
    """Which changes of dtype, context or format would fit; a narrower dtype and a shorter context come first."""
    narrow = torch.bfloat16 if quantize == "none" and dtype.itemsize > torch.bfloat16.itemsize else dtype

    def fits(quantize: str) -> bool:
        return need(narrow, quantize, positions) <= available

    def longest(dtype: torch.dtype, quantize: str) -> int:
        return _longest(positions, available, partial(need, dtype, quantize))

    to_narrow = f"--dtype {dtype_name(narrow)}"
    ways = [to_narrow] if fits(quantize) else []
    if shorter := longest(dtype, quantize):
        ways.append(f"a context of {shorter} positions")
    changes = [(to_narrow, quantize), *((change, name) for name, change in _FORMATS.items())]
    if not ways and not longest(narrow, quantize):
        ways = [change for change, name in changes if fits(name)][:1]
    if not ways:
        lengths = ((change, longest(narrow, name)) for change, name in changes)
        ways = [f"{change} with a context of {n} positions" for change, n in lengths if n][:1]
    if ways:
        return f"{' or '.join(ways)} would fit"
    least, name = min((need(narrow, name, min(positions, BLOCK)), name) for name in _FORMATS)
    form = {"auto": "the bits of the file"}.get(name, name)
    return f"no dtype, format or context fits: the least, {form} with a context of {BLOCK}, needs {format_bytes(least)}"


def _longest(positions: int, available: int, need: Callable[[int], int]) -> int:
    """The longest context below `positions` that fits, in whole blocks; 0 if none does."""
    return BLOCK * bisect_right(range(BLOCK, whole_blocks(positions), BLOCK), available, key=need)
