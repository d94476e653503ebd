"""GGUF files that hold no whole model, alone or beside one: a sentence says what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.not_models import describe_gguf
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import CheckpointFormatError, LlamaMiniWarning

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"general.type": "mmproj"}, "general.type is 'mmproj': it turns images or sound into a model's input"),
        ({"general.architecture": "clip"}, "general.architecture is 'clip': it turns images"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "'clip': it turns images"),
        ({"general.type": "imatrix"}, "it is an importance matrix"),
        ({"general.type": "adapter"}, "general.type is 'adapter': it is an adapter: merge it .* llama-export-lora"),
        (
            {"general.type": "adapter", "general.base_model.0.name": "Llama 3.1"},
            "and give the result; its model is 'Llama 3.1'",
        ),
        ({"general.type": "vocab"}, "general.type is 'vocab': only files of type 'model' are read"),
        ({"general.type": 5}, "general.type is 5: only files"),
        ({"split.count": 3, "split.no": 0}, "split.count is 3: it is a part of a split model; merge the parts with"),
        ({"split.count": 3, "split.no": 1}, "split.count is 3"),
    ],
)
def test_a_gguf_file_that_is_no_model(tmp_path: Path, write_gguf: Write, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointFormatError, match=what):
        open_checkpoint(write_gguf(tmp_path / "tiny.gguf", changes))


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    (tmp_path / "vocab.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(16))
    with pytest.raises(CheckpointFormatError, match="it holds no tensors: give the file"):
        open_checkpoint(tmp_path)


def test_a_projector_beside_its_model(tmp_path: Path, write_gguf: Write) -> None:
    """As LM Studio keeps them: the one model of the directory is opened, whatever else is there."""
    write_gguf(tmp_path / "mmproj-F16.gguf", {"general.type": "mmproj"})
    write_gguf(tmp_path / "model-Q4.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as people publish GGUF files
    for name in ("training_args.bin", "adapter_model.safetensors"):  # no weights of the model
        (tmp_path / name).write_bytes(b"PK")
    with pytest.warns(LlamaMiniWarning, match=r"mmproj-F16\.gguf not read, since it holds no language model"):
        assert open_checkpoint(tmp_path).path == tmp_path / "model-Q4.gguf"


def test_the_parts_of_a_split_model(tmp_path: Path, write_gguf: Write) -> None:
    for i in (1, 2):
        write_gguf(tmp_path / f"model-0000{i}-of-00002.gguf", {"split.count": 2, "split.no": i - 1})
    with pytest.raises(CheckpointFormatError, match=r"model-00001-of-00002\.gguf: split\.count is 2: it is a part"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("metadata", [{"general.type": "imatrix"}, {"split.count": 2, "split.no": 1}])
def test_such_files_name_no_architecture(metadata: dict[str, Any]) -> None:
    header = GGUFHeader(Path("tiny.gguf"), 3, metadata, {})
    assert str(describe_gguf(header)).startswith(f"{next(iter(metadata))} is ")
