"""llama_mini: the LLaMA you can run, read and take apart.

The public names load on first use, so that `import llama_mini` and `--help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM as LLM
    from llama_mini.engine.request import Chunk as Chunk
    from llama_mini.engine.request import Completion as Completion
    from llama_mini.engine.sampling_params import SamplingParams as SamplingParams
    from llama_mini.model.config import LlamaConfig as LlamaConfig
    from llama_mini.model.kv_cache import KVCache as KVCache
    from llama_mini.model.llama import Llama as Llama
    from llama_mini.model.norm import RMSNorm as RMSNorm
    from llama_mini.model.norm_plan import NormPlan as NormPlan
    from llama_mini.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "engine.llm",
    "Chunk": "engine.request",
    "Completion": "engine.request",
    "KVCache": "model.kv_cache",
    "Llama": "model.llama",
    "LlamaConfig": "model.config",
    "NormPlan": "model.norm_plan",
    "RMSNorm": "model.norm",
    "SamplingParams": "engine.sampling_params",
    "Tokenizer": "tokenizer",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
