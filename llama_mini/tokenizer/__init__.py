"""Text to token ids and back: one Tokenizer over tokenizer.json, tiktoken and SentencePiece, and chat templates."""

from llama_mini.tokenizer.stream import DecodeStream
from llama_mini.tokenizer.tokenizer import Tokenizer

__all__ = ["DecodeStream", "Tokenizer"]
