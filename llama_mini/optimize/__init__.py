"""Makes a model fast: replaces modules by ones with fused projections, quantized weights and operators in C++.

The plain model is the reference that every fast path is tested against. README.md in this folder says where to begin.
"""

from llama_mini.machine import set_threads
from llama_mini.optimize.fuse import fuse, fuser, is_fused, optimize

__all__ = ["fuse", "fuser", "is_fused", "optimize", "set_threads"]
