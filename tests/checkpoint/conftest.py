"""The fixtures of tiny_gguf, for the tests here."""

from tests.tiny_gguf import tiny_llama, write_gguf  # noqa: F401
