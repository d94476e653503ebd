"""Meta directories: safetensors read as they are, pickles converted, shards merged; what params.json may say."""

import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mini.cli.convert import convert
from llama_mini.errors import (
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    LlamaMiniWarning,
)
from llama_mini.model.llama import Llama
from tests.checkpoint.gguf.gguf_files import interleaved
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer; none is written")
ROOT = Path(__file__).parents[3]
NAMES = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),  # the dimension that LLaMA 1 and 2 split
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
PARAMS = {"dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
PARAMS |= {"multiple_of": 8, "ffn_dim_multiplier": 0.5, "max_seq_len": 256}
TOKENS = random_tokens(1, 201, vocab_size=96)  # positions 0 to 200


def model(**changes: Any) -> PreTrainedModel:
    """A LLaMA of the sizes of PARAMS, its hidden width by Meta's formula: 2/3 · 4 · 48 · 0.5 = 64."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    plain = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": 12}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "rms_norm_eps": 1e-5}
    return random_model(
        "llama", 0, **sizes | plain | rope | {"vocab_size": 96, "max_position_embeddings": 256} | changes
    )


def meta_tensors(theirs: PreTrainedModel) -> dict[str, tuple[Tensor, int | None]]:
    """Meta's name -> the tensor in Meta's layout, and the dimension in which ranks split it."""
    found = {}
    for name, tensor in theirs.state_dict().items():
        for part, (meta, axis) in NAMES.items():
            if part in name:
                heads = {"attention.wq": 4, "attention.wk": 2}.get(meta)
                values = torch.from_numpy(interleaved(tensor.numpy(), heads)) if heads else tensor
                layer = f"layers.{name.split('.')[2]}." if "layers." in name else ""
                found[layer + meta + ("" if meta.endswith("weight") else ".weight")] = (values.clone(), axis)
    return found


def write_meta(directory: Path, theirs: PreTrainedModel, ranks: int = 1, vocab_axis: int = 1, **params: Any) -> Path:
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(PARAMS | params))
    tensors = meta_tensors(theirs) | {"rope.freqs": (torch.ones(6), None)}
    for rank in range(ranks):
        shard = {}
        for name, (tensor, axis) in tensors.items():
            axis = vocab_axis if name == "tok_embeddings.weight" else axis
            parts = tensor.shape[axis] // ranks if axis is not None else 0
            if axis is not None and name.endswith(("wk.weight", "wv.weight")) and ranks > 2:
                shard[name] = tensor.chunk(2)[rank // (ranks // 2)].clone()  # fewer KV heads than ranks: repeated
            else:
                shard[name] = tensor if axis is None else tensor.narrow(axis, rank * parts, parts).clone()
        torch.save(shard, directory / f"consolidated.{rank:02}.pth")
    return directory


@pytest.mark.parametrize(("ranks", "vocab_axis"), [(1, 1), (2, 1), (2, 0), (4, 0)])
def test_pickled_shards_become_a_directory_that_transformers_loads(tmp_path: Path, ranks: int, vocab_axis: int) -> None:
    theirs = model()
    convert(write_meta(tmp_path / "meta", theirs, ranks, vocab_axis), tmp_path / "hf")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ours = Llama.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(ours(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


def test_safetensors_are_read_as_they_are(tmp_path: Path) -> None:
    theirs = model()
    directory = write_meta(tmp_path / "meta", theirs)
    (directory / "consolidated.00.pth").unlink()
    save_file(
        {name: tensor for name, (tensor, _) in meta_tensors(theirs).items()}, directory / "consolidated.safetensors"
    )
    ours = Llama.from_pretrained(directory)
    torch.testing.assert_close(ours(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)
    convert(directory, tmp_path / "hf")
    assert torch.equal(Llama.from_pretrained(tmp_path / "hf")(TOKENS), ours(TOKENS))


def test_quantised_weights_are_named(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", model())
    pickled, name = directory / "consolidated.00.pth", "layers.0.attention.wq.scales"
    tensors = torch.load(pickled) | {name: torch.ones(4)}
    torch.save(tensors, pickled)
    says = f"'{name}' is quantised by MLX, which is read from Hugging Face's safetensors only: give these, or"
    with pytest.raises(CheckpointFormatError, match=rf"{pickled}: {says}"):
        convert(directory, tmp_path / "hf")
    pickled.unlink()
    save_file(tensors, directory / "consolidated.safetensors")
    with pytest.raises(CheckpointFormatError, match=f"{directory}: {says}"):
        Llama.from_pretrained(directory)


def test_the_engine_reads_no_pickle_and_names_the_command(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", model(), 2)
    with pytest.raises(CheckpointFormatError, match=rf"llama-mini convert {directory} NEW_DIRECTORY"):
        Llama.from_pretrained(directory)
    with pytest.raises(CheckpointFormatError, match="convert its directory with `llama-mini convert SRC DST`"):
        Llama.from_pretrained(directory / "consolidated.00.pth")


def test_the_command_is_as_it_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_meta(tmp_path / "meta", model(), 2)
    arguments = [str(directory), str(tmp_path / "hf")]
    command = [sys.executable, "-m", "llama_mini", "convert", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'hf'}\n")
    assert done.stderr == f"warning: {directory} has no tokenizer; none is written\n"
    monkeypatch.setattr(sys, "argv", ["scripts/convert.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
    assert end.value.code == 3
    assert capfd.readouterr().err.endswith(
        f"error: {tmp_path / 'hf'} exists already; give a new or an empty directory\n"
    )


class Hostile:
    def __reduce__(self) -> Any:
        return (open, (str(Path("pwned").resolve()), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    directory = write_meta(tmp_path / "meta", model())
    monkeypatch.chdir(tmp_path)
    with (directory / "consolidated.00.pth").open("wb") as file:
        torch.save({"norm.weight": Hostile()}, file) if how == "torch" else pickle.dump(Hostile(), file)
    with pytest.raises(CheckpointFormatError, match=r"consolidated\.00\.pth"):
        convert(directory, tmp_path / "hf")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"norm.weight": torch.ones(48), "step": 5}, "'step' is a int, not a plain tensor"),
        ({"norm.weight": torch.ones(48, dtype=torch.int64)}, "norm.weight is stored as torch.int64"),
        ([torch.ones(3)], "holds a list, not tensors by name"),
        ({}, "holds a dict, not tensors by name"),
        ({"model": {"norm.weight": torch.ones(48)}}, "'model' is a dict, not a plain tensor"),
        ({"norm.weight": torch.ones(48).to_sparse()}, "'norm.weight' is a Tensor, not a plain tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path: Path, content: Any, sentence: str) -> None:
    directory = write_meta(tmp_path / "meta", model())
    torch.save(content, directory / "consolidated.00.pth")
    with pytest.raises(CheckpointFormatError, match=sentence):
        convert(directory, tmp_path / "hf")


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04" + b"\0" * 40, b"x" * 100])
def test_a_broken_pickle_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    directory = write_meta(tmp_path / "meta", model())
    (directory / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=r"consolidated\.00\.pth") as caught:
        convert(directory, tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", model(), 4, 0)
    (directory / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"missing 1 of 4 shards: consolidated\.01\.pth"):
        convert(directory, tmp_path / "hf")


@pytest.mark.parametrize("kept", [1, 2])
def test_shards_that_are_missing_at_the_end(tmp_path: Path, kept: int) -> None:
    directory = write_meta(tmp_path / "meta", model(), 4, 0)
    for rank in range(kept, 4):
        (directory / f"consolidated.{rank:02}.pth").unlink()
    with pytest.raises(CheckpointIncompleteError, match=rf"holds {kept} of 4 shards; down"):
        convert(directory, tmp_path / "hf")


def test_norms_that_differ_between_shards_are_warned_of(tmp_path: Path) -> None:
    theirs = model()
    directory = write_meta(tmp_path / "meta", theirs, 2)
    shard = torch.load(directory / "consolidated.01.pth")
    shard["layers.1.ffn_norm.weight"] += 1e-4
    torch.save(shard, directory / "consolidated.01.pth")
    with pytest.warns(LlamaMiniWarning, match=r"layers\.1\.ffn_norm\.weight differs between shards; the first"):
        convert(directory, tmp_path / "hf")
    torch.testing.assert_close(
        Llama.from_pretrained(tmp_path / "hf")(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5
    )


def test_a_shard_of_another_shape_is_named(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", model(), 2)
    shard = torch.load(directory / "consolidated.01.pth")
    shard["layers.0.attention.wo.weight"] = torch.zeros(48, 7)
    torch.save(shard, directory / "consolidated.01.pth")
    with pytest.raises(CheckpointMismatchError, match=r"1 misshaped: layers\.0\.attention\.wo\.weight"):
        convert(directory, tmp_path / "hf")


def test_hugging_face_pickles_are_converted(tmp_path: Path) -> None:
    theirs = model()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    state = theirs.state_dict()
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(CheckpointFormatError, match=r"as a pickle, pytorch_model\.bin, .*llama-mini convert"):
        Llama.from_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "one")
    names = sorted(state)
    (tmp_path / "theirs" / "pytorch_model.bin").unlink()
    files = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: state[n] for n in names if files[n] == file}, tmp_path / "theirs" / file)
    index = tmp_path / "theirs" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    convert(tmp_path / "theirs", tmp_path / "two")
    for target in ("one", "two"):
        torch.testing.assert_close(
            Llama.from_pretrained(tmp_path / target)(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5
        )


def test_a_mistral_params_file_has_its_window_and_widths(tmp_path: Path) -> None:
    theirs = random_model(
        "mistral", 0, sliding_window=7, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=72, tie_word_embeddings=False, vocab_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5,
    )  # fmt: skip
    (tmp_path / "meta").mkdir()
    save_file(
        {name: tensor for name, (tensor, _) in meta_tensors(theirs).items()}, tmp_path / "meta/consolidated.safetensors"
    )
    params = {"dim": 48, "n_layers": 3, "head_dim": 16, "hidden_dim": 72, "n_heads": 4, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-5, "vocab_size": 96, "rope_theta": 1e6, "sliding_window": 7, "max_seq_len": 128}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    ours = Llama.from_pretrained(tmp_path / "meta")
    torch.testing.assert_close(ours(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)
    assert np.isfinite(ours.config.rope_theta)
