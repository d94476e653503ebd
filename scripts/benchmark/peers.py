"""The other engines, each driven as its makers drive it, with the same two measures: seconds of a prompt and of steps.

Each runs in a process of its own, which imports no other engine.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT = 1024  # positions: more than most measures need


class LlamaCpp:
    """llama.cpp through its C interface, without the Python layer above it; NumPy picks the greedy token."""

    def __init__(self, path: str, threads: int, context: int = CONTEXT) -> None:
        import llama_cpp

        self._cpp = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp gives no context for {path}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def build(self) -> str:
        """The processor features that it was compiled for and that it found."""
        return self._cpp.llama_print_system_info().decode().strip(" |")

    def prefill(self, ids: list[int]) -> float:
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
        started = time.perf_counter()
        for first in range(0, len(ids), 512):
            self._next(ids[first : first + 512])
        return time.perf_counter() - started

    def decode(self, ids: list[int], new: int) -> float:
        self.prefill(ids)
        token = ids[-1]
        started = time.perf_counter()
        for _ in range(new):
            token = self._next([token])
        return time.perf_counter() - started

    def _next(self, ids: list[int]) -> int:
        from numpy.ctypeslib import as_array

        tokens = (self._cpp.llama_token * len(ids))(*ids)
        if self._cpp.llama_decode(self._context, self._cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(as_array(self._cpp.llama_get_logits_ith(self._context, -1), (self._vocab,)).argmax())


class Transformers:
    """transformers in eager mode, with its default attention and cache."""

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def prefill(self, ids: list[int]) -> float:
        return self._prefill(ids)[0]

    def decode(self, ids: list[int], new: int) -> float:
        _, token, cache = self._prefill(ids)
        started = time.perf_counter()
        with self._torch.inference_mode():
            for _ in range(new):
                logits = self._model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    def _prefill(self, ids: list[int]) -> tuple[float, Any, Any]:
        tokens = self._torch.tensor([ids])
        started = time.perf_counter()
        with self._torch.inference_mode():
            output = self._model(tokens, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started, token, output.past_key_values


class OpenVino:
    """OpenVINO GenAI on a GGUF file, timed by its own counters: µs to the first token, ms after it."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self._tensor, self._genai = openvino.Tensor, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def prefill(self, ids: list[int]) -> float:
        return self._metrics(ids, 1).m_times_to_first_token[0] / 1e6

    def decode(self, ids: list[int], new: int) -> float:
        times = self._metrics(ids, new + 1).m_new_token_times
        return (times[new] - times[0]) / 1e3

    def _metrics(self, ids: list[int], new: int) -> Any:
        import numpy as np

        config = self._genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        return self._pipeline.generate(self._tensor(np.array([ids], dtype=np.int64)), config).perf_metrics.raw_metrics


class OnnxRuntime:
    """onnxruntime-genai on the directory that its own model builder wrote."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def prefill(self, ids: list[int]) -> float:
        return self._times(ids, 1)[0]

    def decode(self, ids: list[int], new: int) -> float:
        times = self._times(ids, new + 1)
        return times[new] - times[0]

    def _times(self, ids: list[int], new: int) -> list[float]:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
        generator = self._genai.Generator(self._model, params)
        started = time.perf_counter()
        generator.append_tokens(ids)
        times: list[float] = []
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        return times


class CTranslate2:
    """CTranslate2 on a converted directory; it calls back after each token, which times the steps."""

    def __init__(self, path: str, tokenizer: str, kind: str, threads: int) -> None:
        import ctranslate2
        from tokenizers import Tokenizer

        self._words = Tokenizer.from_file(tokenizer)
        self._generator = ctranslate2.Generator(path, compute_type=kind, intra_threads=threads, inter_threads=1)

    def prefill(self, ids: list[int]) -> float:
        started = time.perf_counter()
        return self._times(ids, 1)[0] - started

    def decode(self, ids: list[int], new: int) -> float:
        times = self._times(ids, new + 1)
        return times[new] - times[0]

    def _times(self, ids: list[int], new: int) -> list[float]:
        times: list[float] = []
        words = [[self._words.id_to_token(i) for i in ids]]
        self._generator.generate_batch(
            words,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            callback=lambda _: times.append(time.perf_counter()),
        )
        return times


class Files:
    """Writes the default checkpoint in the formats that the peers read."""

    def gguf(self, source: str, target: str, kind: str) -> None:
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = {
            "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
            "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
            "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
            "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
            "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
        }[kind]
        params.allow_requantize = True
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not write {target}")

    def ctranslate2(self, source: str, target: str) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(source).convert(str(Path(target)))

    def onnx(self, source: str, target: str) -> None:
        """In 4 bits, with products of bytes, the fastest there are for a processor."""
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target]
        with tempfile.TemporaryDirectory() as cache:
            options = ["-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", "int4_accuracy_level=4"]
            subprocess.run([*builder, *options], check=True)
