"""Opening and saving whole checkpoints: what comes back, what transformers makes of it, and what it costs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from llama_mini.errors import CheckpointError, CheckpointPathError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from llama_mini.model.rope_scaling import Llama3Scaling
from tests.tiny_models import hf_llama, random_tokens, tiny_model

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = Llama3Scaling(**SCALING, original_max_seq_len=32)
OWN_PLAN = NormPlan(
    attention=BranchPlan(q=NormSpec(view="full"), post=NormSpec(eps=0.1, gain="1+w", cast="late"), alpha=1.5),
    feed_forward=BranchPlan(mid=NormSpec(scale=0.5), out=NormSpec(gain="none")),
    embed=NormSpec(),
    final=None,
)


def stored(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """What the one file holds, by name: dtype, shape and bytes."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {
            name: (
                file.get_slice(name).get_dtype(),
                file.get_slice(name).get_shape(),
                file.get_tensor(name).view(torch.uint8).numpy().tobytes(),
            )
            for name in file.keys()  # noqa: SIM118  (not a dict)
        }


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model: Any = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits


def test_a_model_comes_back_ready_to_use(tmp_path: Path) -> None:
    hf_llama(3).save_pretrained(tmp_path)
    model = Llama.from_pretrained(str(tmp_path))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert type(model) is Llama

    class Derived(Llama):
        pass

    assert type(Derived.from_pretrained(tmp_path)) is Derived


def test_both_spellings_of_rope_are_the_same_model(tmp_path: Path) -> None:
    scaling = SCALING | {"original_max_position_embeddings": 32}
    hf_llama(4, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | scaling).save_pretrained(tmp_path)
    tokens = random_tokens(1, 60)
    expected = hf_logits(tmp_path, tokens)
    v5 = Llama.from_pretrained(tmp_path)
    torch.testing.assert_close(v5(tokens), expected, rtol=0, atol=2e-5)

    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw["torch_dtype"] = raw.pop("dtype")
    for kind in ("type", "rope_type"):
        spelling = {"rope_theta": 5e5, "rope_scaling": {kind: "llama3"} | scaling}
        (tmp_path / "config.json").write_text(json.dumps(raw | spelling))
        v4 = Llama.from_pretrained(tmp_path)
        assert v4.config == v5.config
        assert torch.equal(v4(tokens), v5(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"norm_plan": OWN_PLAN}, {"norm_plan": "mix(.5)+qk"}],
    ids=["plain", "tied", "own plan", "mix"],
)
def test_a_saved_model_is_the_same_model(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = tiny_model(1, dtype, rope_scaling=SCALED, eos_ids=(2, 3), norm_eps=1e-3, **changes)
    model.save_pretrained(tmp_path / "one")
    again = Llama.from_pretrained(tmp_path / "one")
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype == dtype
        assert torch.equal(before[name], after[name]), name
    tokens = random_tokens(2, 9)
    assert torch.equal(again(tokens), model(tokens))

    again.save_pretrained(tmp_path / "two")
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    own = json.loads((tmp_path / "one" / "config.json").read_text())
    assert own["model_type"] == ("llama_mini" if "norm_plan" in changes else "llama")


def test_what_transformers_wrote_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    hf_llama(5).bfloat16().save_pretrained(tmp_path / "theirs")
    Llama.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")


@pytest.mark.parametrize("changes", [{"n_heads": 6}, {"tie_word_embeddings": True, "rope_scaling": SCALED}])
def test_transformers_opens_what_we_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(6, eos_ids=(5,), bos_id=1, **changes), random_tokens(2, 60)
    if model.config.tie_word_embeddings:
        model.tok_embeddings.weight.data.mul_(0.2)  # logits near one, as the tolerance means them
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(hf_logits(tmp_path / "ours", tokens), model(tokens), rtol=0, atol=2e-5)


def test_a_directory_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path)
    before = stored(tmp_path)
    with pytest.raises(CheckpointPathError, match=f"{tmp_path} exists already"):
        tiny_model(2).save_pretrained(tmp_path)
    assert stored(tmp_path) == before


def test_saving_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        args[0].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama_mini.checkpoint.load.write_file", full_disk)
    with pytest.raises(CheckpointPathError, match=f"cannot write {tmp_path / 'model'}: No space left on device"):
        tiny_model().save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file by Linux's means")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    run_in_child(
        """
        import resource, signal
        from llama_mini.errors import CheckpointPathError
        from llama_mini.model.config import LlamaConfig
        from llama_mini.model.llama import Llama
        model = Llama(LlamaConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=100))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            model.save_pretrained(path + "/model")
        except CheckpointPathError as error:
            print(error)
        """,
        tmp_path,
        expected=f"cannot write {tmp_path}",
    )
    assert not any(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path / "file", "file is not a checkpoint: it is empty"),
        (tmp_path, "it has no config.json, no params.json and no GGUF file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Llama.from_pretrained(path)


def run_in_child(code: str, path: Path, expected: str = "") -> str:
    """Runs `code` with `path` defined, in a process of its own; returns what it printed."""
    lines = [line.strip("\n")[8:] for line in code.splitlines(keepends=True)]
    script = "\n".join([f"path = {str(path)!r}", *lines])
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    return done.stdout


MEASURE = """
        import re
        from pathlib import Path
        from llama_mini.model.llama import Llama
        import llama_mini.checkpoint.load, llama_mini.checkpoint.open

        def kib(what):
            return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = kib("VmRSS")
        model = Llama.from_pretrained(path, dtype=DTYPE)
        print((kib("VmHWM") - before) * 1024)
        """


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 130 MB of bfloat16, of which no tensor is more than a fifteenth."""
    path = tmp_path_factory.mktemp("large") / "model"
    sizes: dict[str, Any] = {
        "dim": 1024,
        "hidden_dim": 4096,
        "n_layers": 4,
        "n_heads": 16,
        "n_kv_heads": 4,
        "vocab_size": 4000,
    }
    with torch.device("meta"):
        model = Llama(LlamaConfig(**sizes, tie_word_embeddings=True)).bfloat16()
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(0.5)
    model.save_pretrained(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(("dtype", "most"), [(None, 1.3), pytest.param("float32", 2.3, marks=pytest.mark.slow)])
def test_loading_peaks_near_the_size_of_the_model(large_dir: Path, dtype: str | None, most: float) -> None:
    size = (large_dir / "model.safetensors").stat().st_size
    peak = int(run_in_child(MEASURE.replace("DTYPE", repr(dtype)), large_dir))
    assert peak < most * size, f"{peak / size:.2f} times the file"
