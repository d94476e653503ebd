"""The doctor: silent on what is healthy, and speaks on a copy with each fault planted."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.errors import CheckpointPathError, LlamaMiniWarning, RequestError
from llama_mini.lab import doctor
from llama_mini.lab.diagnosis import Finding
from llama_mini.lab.table import Table
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from llama_mini.tokenizer import Tokenizer
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.meta.test_directory import PARAMS, meta_tensors
from tests.checkpoint.meta.test_directory import model as meta_model
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, tiny_model

GAINS = "layernorm.weight"
FINAL = "model.norm.weight"
BRANCHES = ("attention", "feed_forward")
ATTENTION = "model.layers.{}.input_layernorm.weight"
TOKENS = random_tokens(2, 33)


def only(found: Table[Finding]) -> Finding:
    """The one finding there is."""
    assert len(found) == 1, str(found)
    assert "\n" not in found[0].finding + found[0].advice
    return found[0]


@pytest.fixture(scope="module")
def small(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default checkpoint's configuration and norms, without a vocabulary to speak of and with narrow layers."""
    path = tmp_path_factory.mktemp("small")
    raw = json.loads((smollm2_dir / "config.json").read_text())
    raw |= {"vocab_size": 64, "intermediate_size": 4}
    (path / "config.json").write_text(json.dumps(raw))
    kept = {}
    for name, tensor in load_file(smollm2_dir / "model.safetensors").items():
        if "embed" in name:
            tensor = tensor[:64]
        elif "gate" in name or "up_proj" in name:
            tensor = tensor[:4]
        elif "down" in name:
            tensor = tensor[:, :4]
        kept[name] = tensor.clone()
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def plant(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy with a changed config and tensors: None takes one away."""

    def make(tensors: Callable[[dict[str, Tensor]], None] = lambda _: None, **config: Any) -> Path:
        path = tmp_path / "planted"
        path.mkdir()
        raw = json.loads((small / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))
        found = load_file(small / "model.safetensors")
        tensors(found)
        save_file(found, path / "model.safetensors", {"format": "pt"})
        return path

    return make


def test_the_default_checkpoint_is_healthy_in_every_form(smollm2_dir: Path, small: Path) -> None:
    text = (Path(__file__).parents[1] / "golden" / "alice.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_pretrained(smollm2_dir).encode(text)[:300]
    assert len(doctor(smollm2_dir, ids)) == 0
    assert len(doctor(str(small))) == 0  # what the faults are planted in
    assert len(doctor(Llama.from_pretrained(small))) == 0


def test_the_default_gguf_is_healthy(smollm2_gguf: Path) -> None:
    assert len(doctor(smollm2_gguf)) == 0


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_random_models_of_every_family_are_healthy(model_type: str, tmp_path: Path) -> None:
    theirs = random_model(model_type, 2, rms_norm_eps=1e-6)
    theirs.save_pretrained(tmp_path / "hf")
    assert len(doctor(tmp_path / "hf", TOKENS)) == 0
    assert len(doctor(write_family(tmp_path / "model.gguf", theirs), TOKENS)) == 0


def test_no_norm_alone_tells_the_convention(small: Path) -> None:
    """Why the verdict is on a slot: the first norm of the healthy checkpoint has half its gains below zero."""
    gains = Llama.from_pretrained(small).layers[0].attention.pre_norm.weight.float()
    assert gains.mean().abs() < 0.01
    assert (gains < 0).float().mean() > 0.4


def test_one_plus_w_read_as_w(plant: Callable[..., Path]) -> None:
    def take_one_off(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(GAINS) or name == FINAL:
                tensors[name] = (tensors[name].float() - 1).to(tensors[name].dtype)

    found = doctor(plant(take_one_off))
    assert found.column("path") == ["layers.*.attention.pre_norm", "layers.*.feed_forward.pre_norm"]
    assert set(found.column("severity")) == {"warning"}
    assert "read as `w`, 100% of a typical norm's gains are below 0" in found[0].finding
    assert "`1+w`" in found[0].advice


def add_one(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith(GAINS) or name == FINAL:
            tensors[name] = (tensors[name].float() + 1).to(tensors[name].dtype)


def test_one_added_to_w(plant: Callable[..., Path]) -> None:
    found = doctor(plant(add_one))
    assert found.column("path") == ["layers.*.attention.pre_norm", "layers.*.feed_forward.pre_norm"]
    assert "1 seems to be added twice" in found[1].finding
    assert found[1].advice.startswith("subtract 1")


@pytest.mark.parametrize("stored_as", ["w", "1+w"])
def test_w_read_as_one_plus_w(small: Path, stored_as: str, tmp_path: Path) -> None:
    model = Llama.from_pretrained(small, dtype="float32")
    branch = BranchPlan(pre=NormSpec(gain="1+w"))
    plan = NormPlan(attention=branch, feed_forward=branch, final=NormSpec(gain="1+w"))
    gemma = Llama(replace(model.config, norm_plan=plan))
    gemma.load_state_dict(model.state_dict())
    if stored_as == "1+w":  # healthy
        for norm in (m for m in gemma.modules() if isinstance(m, Norm)):
            norm.weight.data -= 1
    gemma.save_pretrained(tmp_path / "gemma")
    found = doctor(tmp_path / "gemma")
    assert [row.path for row in found] == ([] if stored_as == "1+w" else [f"layers.*.{b}.pre_norm" for b in BRANCHES])
    assert all("read as `1+w`" in row.finding and "to `w`" in row.advice for row in found)


def test_a_few_dead_norms_are_no_convention(plant: Callable[..., Path]) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        for layer in range(10):
            tensors[ATTENTION.format(layer)] = tensors[ATTENTION.format(0)].clone()

    assert len(doctor(plant(kill))) == 0


def test_absent_eps(plant: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = only(doctor(plant(rms_norm_eps="absent")))
    assert (row.severity, Path(row.path).name) == ("warning", "config.json")
    assert row.finding == "rms_norm_eps is absent; 1e-06 is assumed"


def test_absent_eps_in_metas_layout(tmp_path: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, (tensor, _) in meta_tensors(meta_model()).items()},
        tmp_path / "consolidated.safetensors",
    )
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert len(doctor(tmp_path)) == 0
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"norm_eps": None}))
    row = only(doctor(tmp_path))
    assert (Path(row.path).name, row.finding) == ("params.json", "norm_eps is absent; 1e-05 is assumed")


def test_absent_eps_in_gguf(tmp_path: Path) -> None:
    path = write_family(tmp_path / "model.gguf", random_model("llama", 2), attention__layer_norm_rms_epsilon=None)
    row = only(doctor(path))
    assert row.severity == "error"
    assert "llama.attention.layer_norm_rms_epsilon is missing" in row.finding


@pytest.mark.parametrize(
    ("eps", "severity", "finding"),
    [
        (1e-12, "warning", "eps is 1e-12; usual for model_type llama is 1e-05 or 1e-06"),
        (1e-3, "warning", "eps is 0.001; usual for model_type llama is 1e-05 or 1e-06"),
        (1.0013580322265625e-05, "warning", "eps is 1.0013580322265625e-05; usual"),  # 1e-5 by way of float16
        (0, "warning", "eps is 0: a row of zeros becomes NaN"),
        (9.999999747378752e-06, "note", "eps is 9.999999747378752e-06, which is 1e-05 rounded to float32"),
        (9.999999974752427e-07, "note", "eps is 9.999999974752427e-07, which is 1e-06 rounded to float32"),
        (1e-6, None, ""),
    ],
)
def test_unusual_eps(plant: Callable[..., Path], eps: float, severity: str | None, finding: str) -> None:
    found = doctor(plant(rms_norm_eps=eps))
    if severity is None:
        assert len(found) == 0
        return
    row = only(found)
    assert row.finding.startswith(finding)
    assert (row.severity, Path(row.path).name) == (severity, "config.json")


def test_eps_is_judged_by_family_and_in_gguf(tmp_path: Path) -> None:
    theirs = random_model("qwen3", 2, rms_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path / "hf")
    for path in (tmp_path / "hf", write_family(tmp_path / "model.gguf", theirs)):
        row = only(doctor(path))
        assert row.finding == "eps is 1e-05; usual for model_type qwen3 is 1e-06"
    assert row.path == str(tmp_path / "model.gguf")


def test_norm_tensors_that_nobody_reads(plant: Callable[..., Path]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("self_attn.q_norm.weight", "input_layernorm.bias"):
            tensors[f"model.layers.3.{name}"] = torch.ones(64)
        tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(32)  # old files have it

    row = only(doctor(plant(add)))
    assert row.path == "model.layers.3.input_layernorm.bias, model.layers.3.self_attn.q_norm.weight"
    assert (row.severity, row.finding) == ("error", "no norm of model_type llama reads it")


def test_norm_settings_that_nobody_reads(plant: Callable[..., Path]) -> None:
    row = only(doctor(plant(sandwich_norm=True)))
    assert row.severity == "error"
    assert "sandwich_norm" in row.finding


def test_norm_tensors_that_are_missing_or_of_another_shape(plant: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[ATTENTION.format(4)]
        tensors[FINAL] = tensors[FINAL][:7].clone()

    row = only(doctor(plant(damage)))
    assert (row.severity, row.path) == ("error", f"{ATTENTION.format(4)}, {FINAL}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gains_that_are_no_numbers(plant: Callable[..., Path], value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[ATTENTION.format(7)][[3, 5]] = value

    row = only(doctor(plant(damage), TOKENS))  # nothing is run, since nothing would come of it
    assert (row.severity, row.path) == ("error", "layers.7.attention.pre_norm")
    assert row.finding == "2 of 576 gains are NaN or infinite"


def test_gains_that_overflow_float16(plant: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[FINAL][5] = -2688  # × √576 = 64,512
        tensors[ATTENTION.format(2)][1] = 2736  # × √576 = 65,664

    row = only(doctor(plant(damage)))
    assert (row.severity, row.path) == ("warning", "layers.2.attention.pre_norm")
    assert row.finding == "a gain of 2736 can give outputs of 6.57e+04; float16 ends at 65504"


def test_a_norm_that_was_never_trained(plant: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        for layer in (4, 9):
            tensors[ATTENTION.format(layer)].fill_(1)

    row = only(doctor(plant(damage)))
    assert (row.severity, row.path) == ("warning", "layers.4.attention.pre_norm, layers.9.attention.pre_norm")
    assert row.finding == "all its gains are exactly 1, while other norms are trained"


def test_gains_of_zero(plant: Callable[..., Path]) -> None:
    row = only(doctor(plant(lambda tensors: tensors.update({ATTENTION.format(4): torch.zeros(576)}))))
    assert (row.severity, row.path) == ("error", "layers.4.attention.pre_norm")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointPathError, match="does not exist"):
        doctor(tmp_path / "nothing")
    with pytest.raises(RequestError, match="outside the vocabulary"):
        doctor(tiny_model(), [1, 97])


def test_other_warnings_of_opening_stay(plant: Callable[..., Path]) -> None:
    with pytest.warns(LlamaMiniWarning, match="unknown colour ignored"):
        assert len(doctor(plant(colour="red"))) == 0


def test_the_table_prints(plant: Callable[..., Path]) -> None:
    found = doctor(plant(add_one, rms_norm_eps=0.5))
    assert str(found).splitlines()[0].split() == ["severity", "path", "finding", "advice"]
    assert len(json.loads(found.to_json())) == 3
