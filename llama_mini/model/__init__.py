"""The model, from tokens to logits: read `norm.py` first and `llama.py` last; README.md lists the files in order."""

from llama_mini.model.llama import Llama

__all__ = ["Llama"]
