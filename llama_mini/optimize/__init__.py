"""Makes a model fast: replaces its modules by ones with fused projections, quantized weights and C++ operators.

The plain model is the reference that every fast path is tested against. Start with README.md in this folder.
"""

from llama_mini.machine import set_threads
from llama_mini.optimize.fuse import fuse, fuser, is_fused, optimize

__all__ = ["fuse", "fuser", "is_fused", "optimize", "set_threads"]
