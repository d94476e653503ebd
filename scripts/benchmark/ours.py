"""This engine as its users drive it: `model(tokens, cache)`, `LLM.stream`, `LLM.score`. All times are seconds."""

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmark.profiles import profiled
from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.source import Rows, Source, StoredTensor
from llama_mini.engine.llm import LLM
from llama_mini.engine.next_tokens import step
from llama_mini.engine.pages import PagedCache, PagedTokens
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.machine import as_dtype
from llama_mini.memory import PAGE, PREFILL_CHUNK, cache_dtype, pages_of
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser, set_threads
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.fused_step import FusedStep
from llama_mini.optimize.packed_linear import PackedLinear

BILLION = {  # LLaMA-3.2-1B
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "hidden_dim": 8192,
    "vocab_size": 128256,
    "max_seq_len": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


class Ours:
    """`LLM` on a checkpoint."""

    def __init__(self, path: str, dtype: str, quantize: str | None, threads: int) -> None:
        # The others decode token by token, and texts of random weights repeat themselves.
        self._llm = LLM(path, dtype=dtype, quantize=quantize, threads=threads, speculation="off")
        self._model = self._llm.model

    def prefill(self, ids: list[int]) -> float:
        """A prompt to its first token, by the model alone."""
        return prefill(self._model, ids)

    def stream_prefill(self, ids: list[int]) -> float:
        """The same through `LLM.stream`."""
        return self._stream(ids, 1)[0]

    def decode(self, ids: list[int], new: int, batch: int = 1) -> float:
        """`new` steps of `batch` sequences after a prompt, by the model alone."""
        return decode(self._model, ids, new, batch)

    def stream_decode(self, ids: list[int], new: int) -> float:
        """The same for one sequence through `LLM.stream`: from the first token to the last."""
        times = self._stream(ids, new + 1)
        return times[-1] - times[0]

    def closed_loop(self, prompts: list[str], new: list[int], users: int) -> float:
        """New tokens per second of as many threads, each of which waits for an answer before it asks again."""
        started = time.perf_counter()
        with ThreadPoolExecutor(users) as pool:
            list(pool.map(self._answer, prompts, new))
        return sum(new) / (time.perf_counter() - started)

    def nll(self, ids: list[int]) -> float:
        """The mean loss of a text, in nats a token."""
        scores = [score for score in self._llm.score(ids) if score is not None]
        return -sum(scores) / len(scores)

    def profile(self, ids: list[int], new: int) -> str:
        self.decode(ids, new)
        return profiled(lambda: self.decode(ids, new), f"a prompt of {len(ids)} tokens and {new} steps")

    def _answer(self, prompt: str, new: int) -> None:
        self._llm.generate(prompt, max_tokens=new, ignore_eos=True, logprobs=False)

    def _stream(self, ids: list[int], new: int) -> list[float]:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        self._llm.forget()  # a prefix kept from the last round would shorten the prefill
        started = time.perf_counter()
        return [time.perf_counter() - started for _ in self._llm.stream(ids, params)]


class Weights:
    """A file without a tokenizer, kept as it is stored; the model alone, and the memory that it takes."""

    def __init__(self, path: str, threads: int) -> None:
        dtype = as_dtype("auto", "cpu", load_kernels())
        self._floor, self._size = peak_bytes(), Path(path).stat().st_size
        set_threads(threads)
        self._model = load_model(Llama, open_checkpoint(Path(path)), dtype, "cpu", fuser("auto"), "auto")

    def prefill(self, ids: list[int]) -> float:
        return prefill(self._model, ids)

    def decode(self, ids: list[int], new: int) -> float:
        return decode(self._model, ids, new)

    def memory(self) -> float:
        """The peak until now over the floor, by the size of the file."""
        return (peak_bytes() - self._floor) / self._size


class Steps:
    """Steps of the whole model in the engine's cache, which a text has filled."""

    def __init__(
        self, path: str, dtype: str, quantize: str | None, kv_dtype: str, threads: int, ids: list[int]
    ) -> None:
        self._model = LLM(path, dtype=dtype, quantize=quantize, threads=threads).model
        self._step = FusedStep(self._model)
        n_positions = pages_of(len(ids)) * PAGE
        self._cache = PagedCache(self._model, n_positions, n_positions, cache_dtype(kv_dtype))
        self._row = self._cache.sequence()
        for pages in self._row:
            pages.grow(pages_of(len(ids)))
        with torch.inference_mode():
            for first in range(0, len(ids), PREFILL_CHUNK):
                part = ids[first : first + PREFILL_CHUNK]
                positions = [range(first, first + len(part))]
                self._model.hidden(torch.tensor([part]), PagedTokens(self._cache, [self._row], positions))

    def at(self, context: int, tokens: int, count: int) -> float:
        """`count` steps, each of as many tokens of the row as there are `tokens`, the first at position `context`."""
        cache = PagedTokens(self._cache, [self._row] * tokens, [[context + i] for i in range(tokens)])
        started = time.perf_counter()
        for _ in range(count):
            step(self._model, self._step, [[1]] * tokens, cache)
        return time.perf_counter() - started


class Billion:
    """A model of LLaMA-3.2-1B's shape with random weights, quantized as it is made; there is no file.

    Its cache is filled once; a run at some context declares that many positions of it filled.
    """

    def __init__(self, quantize: str | None, context: int, threads: int, changes: dict[str, int]) -> None:
        set_threads(threads)
        source = random_source(LlamaConfig(**BILLION | changes))  # type: ignore[arg-type]
        self._model = load_model(Llama, source, torch.bfloat16, "cpu", fuser("auto"), quantize or "none")
        self._cache = self._model.new_cache(1, context)
        with torch.inference_mode():
            for chunk in torch.randint(source.config.vocab_size, (1, context)).split(512, dim=1):
                self._model.hidden(chunk, self._cache)

    def step_bytes(self) -> int:
        """Bytes of weights that a decoding step reads: all matrices, the head included."""
        return matrix_bytes(self._model)

    def decode(self, context: int, new: int) -> float:
        self._cache.truncate(0, 0)
        self._cache.advance(context)
        return steps(self._model, self._cache, new)


class Loading:
    """One load in a fresh process, after the imports, and the memory that it and one answer take."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        load_kernels()
        self._floor = peak_bytes()

    def load(self, path: str, dtype: str, quantize: str | None, ids: list[int], new: int) -> dict[str, float]:
        started = time.perf_counter()
        llm = LLM(path, dtype=dtype, quantize=quantize, threads=self._threads)
        seconds = time.perf_counter() - started
        llm.generate(ids, SamplingParams(max_tokens=new, ignore_eos=True))
        return {"seconds": seconds, "floor": self._floor, "peak": peak_bytes(), "weights": weight_bytes(llm.model)}


class Reader:
    """Plain reads of memory and of a file, to compare with."""

    def __init__(self, threads: int) -> None:
        set_threads(threads)
        self._words = torch.empty(0, dtype=torch.int64)

    def memory(self, n_bytes: int) -> float:
        """Seconds to read `n_bytes` once: the fastest of a sum of int64, a sum of float32 and a maximum of int64."""
        if self._words.nbytes < n_bytes:
            self._words = torch.randint(2**20, (n_bytes // 8 + 1,))
        words = self._words[: n_bytes // 8]
        floats = words.view(torch.float32)
        return min(map(timed, (words.sum, floats.sum, words.amax)))

    def file(self, path: str) -> float:
        return timed(Path(path).read_bytes)


def timed(run: object) -> float:
    assert callable(run)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def prefill(model: Llama, ids: list[int]) -> float:
    """Seconds of a prompt to its first token, in parts as the engine runs it."""
    cache = model.new_cache(1, len(ids))
    started = time.perf_counter()
    with torch.inference_mode():
        for part in torch.tensor([ids]).split(PREFILL_CHUNK, dim=1):
            hidden = model.hidden(part, cache)
        model.logits(hidden[0, -1]).argmax().item()
    return time.perf_counter() - started


def decode(model: Llama, ids: list[int], new: int, batch: int = 1) -> float:
    """Seconds of `new` steps of `batch` sequences after a prompt."""
    cache = model.new_cache(batch, len(ids) + new)
    with torch.inference_mode():
        for row in range(batch):
            model.hidden(torch.tensor([ids]), cache.row(row))
    return steps(model, cache, new)


def steps(model: Llama, cache: KVCache, new: int) -> float:
    """Seconds of greedy steps of every sequence of a filled cache."""
    tokens = torch.ones(cache.batch, 1, dtype=torch.int64)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(new):
            best = (
                model(tokens, cache)[:, -1].numpy().argmax(-1)
            )  # NumPy: as the engine does, and the bench for llama.cpp
            tokens = torch.from_numpy(best)[:, None]
    return time.perf_counter() - started


def matrix_bytes(model: nn.Module) -> int:
    return sum(module.n_bytes for module in model.modules() if isinstance(module, PackedLinear))


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def peak_bytes() -> int:
    """VmHWM; `getrusage` would begin with the maximum of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def random_source(config: LlamaConfig) -> Source:
    """A checkpoint without a file: matrices N(0, 1/fan_in), gains uniform in 0.5 to 1.5."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    table = key_table("llama")
    theirs = {to_file_name(name, table): shape for name, shape in shapes.items()}

    def read(names: Collection[str], dtype: torch.dtype, *_: object) -> Iterator[Rows[Tensor]]:
        for name in names:
            tensor = torch.empty(theirs[name], dtype=dtype)
            yield (
                name,
                0,
                tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=tensor.shape[1] ** -0.5),
            )

    path = Path("random weights")
    return Source(
        path=path,
        format="random weights",
        model_type="llama",
        config=config,
        dtype=torch.bfloat16,
        keys=table,
        tensors={name: StoredTensor(path, shape, "BF16", 2) for name, shape in theirs.items()},
        read_rows=read,
    )
