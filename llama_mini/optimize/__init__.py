"""Makes a model fast: fused projections, weight formats and operators in C++, in place of whole modules.

The plain model stays the reference that every path here is held to; nothing here repeats its forward pass.
"""

from llama_mini.machine import set_threads
from llama_mini.optimize.fuse import fuse, fuser, is_fused, optimize

__all__ = ["fuse", "fuser", "is_fused", "optimize", "set_threads"]
