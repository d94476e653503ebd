"""The norm against recorded calls of the norms of transformers, bit by bit; and the defects that this rejects."""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini.model.norm import RMSNorm
from tests.oracles import GOLDEN_DIR, NormCall, emulated_rms_norm, read_norm_golden, same_bits

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_goldens.py"
TINY = {"llama": 15, "qwen3": 27, "olmo2": 27, "gemma2": 27, "gemma3": 39}  # norm calls, three dtypes together
CALLS = {**TINY, "smollm2": 61}
DTYPES = {**dict.fromkeys(TINY, ("float32", "bfloat16", "float16")), "smollm2": ("float32",)}
RECORDED = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]

Build = Callable[[NormCall], RMSNorm]


def rebuild(call: NormCall, kind: type[RMSNorm] = RMSNorm, cast: str | None = None) -> RMSNorm:
    norm = kind(len(call.weight), call.eps, gain=call.gain, cast=cast or call.cast, dtype=call.weight.dtype)
    norm.load_state_dict({"weight": call.weight})
    return norm.requires_grad_(False)


def rejected(calls: list[NormCall], build: Build) -> list[str]:
    """The calls whose recorded input does not give the recorded output, in every bit."""
    return [call.name for call in calls if not same_bits(build(call)(call.input), call.output)]


def recorded_calls(name: str, dtype: str) -> list[NormCall]:
    return [call for call in read_norm_golden(name)[1] if call.dtype == dtype]


def test_the_goldens_hold_what_they_should() -> None:
    assert {path.name for path in GOLDEN_DIR.glob("norms_*")} == {f"norms_{name}.safetensors" for name in CALLS}
    assert {name: len(read_norm_golden(name)[1]) for name in CALLS} == CALLS
    for name, dtype in RECORDED:
        for call in recorded_calls(name, dtype):
            assert call.input.dtype == call.weight.dtype == call.output.dtype == getattr(torch, dtype)
            assert call.weight.std() > 0.01, "a gain that is the same everywhere"
    assert sum(path.stat().st_size for path in GOLDEN_DIR.glob("norms_*")) < 2.5e6


@pytest.mark.parametrize(
    ("name", "shape"), [("qwen3", (2, 5, 4, 10)), ("gemma3", (2, 4, 5, 10)), ("olmo2", (2, 5, 40))]
)
def test_q_norms_are_recorded_per_head_and_over_the_projection(name: str, shape: tuple[int, ...]) -> None:
    shapes = {tuple(call.input.shape) for call in read_norm_golden(name)[1] if call.name.endswith("q_norm")}
    assert shapes == {shape}


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_every_recorded_input_gives_the_recorded_bits(name: str, dtype: str) -> None:
    assert rejected(recorded_calls(name, dtype), rebuild) == []


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_instruction_set() -> None:
    test = f"{__file__}::{test_every_recorded_input_gives_the_recorded_bits.__name__}"
    narrow = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=narrow, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(RECORDED)} passed" in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TINY)
def test_the_recordings_follow_the_rounding_rule(name: str, dtype: str) -> None:
    for call in recorded_calls(name, dtype):
        by_hand, certain = emulated_rms_norm(call.input, call.weight, call.eps, call.gain, call.cast)
        assert np.array_equal(call.output.double().numpy()[certain], by_hand[certain]), call.name
        assert certain.mean() > 0.98


class Longhand(RMSNorm):
    """The norm with its root spelled out, so that a subclass can spell it wrongly."""

    def inverse_root(self, mean: Tensor) -> Tensor:
        return torch.rsqrt(mean + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * self.inverse_root(wide.pow(2).mean(-1, keepdim=True))
        gain = self.weight.float() + (self.gain == "1+w")
        return (normed.to(x.dtype).float() if self.cast == "early" else normed).mul(gain).to(x.dtype)


class EpsOutsideTheRoot(Longhand):
    def inverse_root(self, mean: Tensor) -> Tensor:
        return 1 / (mean.sqrt() + self.eps)


class RootInBfloat16(Longhand):
    def inverse_root(self, mean: Tensor) -> Tensor:
        return super().inverse_root(mean).bfloat16().float()


def other_cast(call: NormCall) -> RMSNorm:
    return rebuild(call, cast={"early": "late", "late": "early"}[call.cast])


def gain_left_at_one(call: NormCall) -> RMSNorm:
    norm = rebuild(call)
    norm.reset_parameters()
    return norm


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_the_longhand_norm_passes_until_it_is_broken(name: str, dtype: str) -> None:
    assert rejected(recorded_calls(name, dtype), lambda call: rebuild(call, Longhand)) == []


@pytest.mark.parametrize("kind", [EpsOutsideTheRoot, RootInBfloat16])
@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_a_wrong_root_is_rejected(name: str, dtype: str, kind: type[RMSNorm]) -> None:
    assert rejected(recorded_calls(name, dtype), lambda call: rebuild(call, kind))


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_the_other_cast_order_is_rejected_wherever_it_rounds(name: str, dtype: str) -> None:
    calls = recorded_calls(name, dtype)
    assert rejected(calls, other_cast) == ([] if dtype == "float32" else [call.name for call in calls])


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_a_gain_left_at_one_is_rejected_everywhere(name: str, dtype: str) -> None:
    calls = recorded_calls(name, dtype)
    assert rejected(calls, gain_left_at_one) == [call.name for call in calls]


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_any_swapped_pair_is_rejected(name: str, dtype: str) -> None:
    calls = recorded_calls(name, dtype)
    for one, other in itertools.combinations(calls, 2):
        if one.weight.shape == other.weight.shape:
            pair = [one._replace(weight=other.weight), other._replace(weight=one.weight)]
            assert rejected(pair, rebuild) == [one.name, other.name]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_goldens", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_the_goldens_are_what_the_script_builds() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as rebuilt") == len(CALLS)


def test_an_existing_golden_is_never_replaced_silently(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = script.read(GOLDEN_DIR / "norms_llama.safetensors")
    for name in ("llama", "qwen3"):
        monkeypatch.setitem(script.BUILDERS, name, lambda: golden)
    path = tmp_path / "norms_qwen3.safetensors"
    path.write_bytes(b"mine")
    assert script.main(["llama", "qwen3", "--out", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]  # nothing beside it was begun, either
    assert script.main(["llama", "qwen3", "--out", str(tmp_path), "--force"]) == 0
    assert script.compare(golden, script.read(path))[0] == []


def test_the_check_finds_what_was_changed(script: ModuleType) -> None:
    golden = script.read(GOLDEN_DIR / "norms_llama.safetensors")
    assert script.compare(golden, golden)[0] == []
    call = "float32/model.layers.1.input_layernorm"
    changed = {name: tensor.clone() for name, tensor in golden.tensors.items()}
    changed[f"{call}/gain"][0] += 2**-20
    changed[f"{call}/output"][0, 0, 0] += 2**-20
    faults, _ = script.compare(golden._replace(tensors=changed), golden)
    assert [fault.partition(" ")[0] for fault in faults] == [f"{call}/gain", f"{call}/output"]
    missing = {name: tensor for name, tensor in changed.items() if name != f"{call}/input"}
    assert f"{call}/input" in script.compare(golden._replace(tensors=missing), golden)[0][0]
    calls = golden.metadata["calls"].replace("1e-05", "1e-06")
    assert "'calls'" in script.compare(golden._replace(metadata={**golden.metadata, "calls": calls}), golden)[0][0]


def test_the_check_lets_matrix_products_drift_but_no_output_on_equal_input(script: ModuleType) -> None:
    golden = script.read(GOLDEN_DIR / "norms_llama.safetensors")
    call = "float32/model.layers.1.input_layernorm"
    drifted = {name: tensor.clone() for name, tensor in golden.tensors.items()}
    for part in ("input", "output"):
        drifted[f"{call}/{part}"] *= 1 + 2**-20
    faults, note = script.compare(golden, golden._replace(tensors=drifted))
    assert faults == []
    assert "2 tensors drift" in note
    drifted[f"{call}/input"] *= 1 + 2**-10
    assert script.compare(golden, golden._replace(tensors=drifted))[0]
