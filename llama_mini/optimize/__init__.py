"""Makes a model fast: replaces its modules by ones with fused projections, quantized weights and C++ operators.

The plain model is the reference that every fast path is tested against. Start with README.md in this folder.
"""

from llama_mini.machine import set_threads
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.fuse import fuse, fuser, is_fused, optimize, quantized_formats, runs_kernels

__all__ = ["fuse", "fuser", "is_fused", "load_kernels", "optimize", "quantized_formats", "runs_kernels", "set_threads"]
