"""The table of norms, against the configuration, NumPy and the tensors of the checkpoint's file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llama_mini import Llama, lab
from llama_mini.checkpoint.match import empty_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.lab.norm_table import effective_gain
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import tiny_model


def test_every_setting_and_the_effective_gain() -> None:
    attention = BranchPlan(
        pre=NormSpec(gain="1+w", cast="late", eps=1e-3),
        q=NormSpec(kind="l2", gain="none"),
        out=NormSpec(kind="layer", cast="late", bias=True),
    )
    plan = NormPlan(attention=attention, feed_forward=BranchPlan(post=NormSpec(kind="scale", scale=0.5)), embed=None)
    model = tiny_model(n_layers=1, norm_plan=plan, norm_eps=1e-5)
    pre, q, out, post, final = table = lab.norms(model)
    assert table.column("path") == [
        "layers.0.attention.pre_norm",
        "layers.0.attention.q_norm",
        "layers.0.attention.out_norm",
        "layers.0.feed_forward.post_norm",
        "norm",
    ]
    assert table.column("slot") == ["pre_norm", "q_norm", "out_norm", "post_norm", "norm"]
    assert table.column("kind") == ["rms", "l2", "layer", "scale", "rms"]
    assert table.column("eps") == [1e-3, 1e-5, 1e-5, 1e-5, 1e-5]
    assert table.column("gain") == ["1+w", "none", "w", "w", "w"]
    assert table.column("cast") == ["late", "early", "late", "early", "early"]
    assert table.column("bias") == [False, False, True, False, False]
    assert table.column("scale") == [1, 1, 1, 0.5, 1]
    assert (q.min, q.mean, q.max) == (None, None, None)
    weights = model.layers[0].attention.pre_norm.weight.double().numpy()
    np.testing.assert_allclose([pre.min, pre.mean, pre.max], [1 + f(weights) for f in (np.min, np.mean, np.max)], 1e-6)
    weights = model.layers[0].attention.out_norm.weight.double().numpy()
    np.testing.assert_allclose([out.min, out.mean, out.max], [f(weights) for f in (np.min, np.mean, np.max)], 1e-6)
    assert post.min == post.mean == post.max == float(model.layers[0].feed_forward.post_norm.weight)
    assert 0.5 < final.min < final.mean < final.max < 1.5


def test_a_plan_without_norms() -> None:
    assert len(lab.norms(tiny_model(norm_plan="none-final"))) == 0


def test_the_gain_of_half_precision_is_not_rounded_again() -> None:
    norm = tiny_model(norm_plan="pre", dtype=torch.bfloat16).norm
    norm.gain = "1+w"
    expected = 1 + norm.weight.double().numpy()
    np.testing.assert_array_equal(effective_gain(norm).numpy(), expected.astype(np.float32))


def test_a_model_on_the_meta_device_has_settings_and_no_values(tiny_dir: Path) -> None:
    with torch.device("meta"):
        table = lab.norms(empty_model(Llama, open_checkpoint(tiny_dir)))
    assert table.column("path") == lab.norms(Llama.from_pretrained(tiny_dir)).column("path")
    assert table.column("mean") == [None] * len(table)


def test_the_default_checkpoint(smollm2_dir: Path) -> None:
    """61 norms; the gains against the file's own numbers, read without the project."""
    model = Llama.from_pretrained(smollm2_dir)
    table = lab.norms(model)
    assert len(table) == 61 == sum(isinstance(module, Norm) for module in model.modules())
    assert set(table.column("eps")) == {1e-5}
    keys = {"attention": "input_layernorm", "feed_forward": "post_attention_layernorm"}
    with safe_open(smollm2_dir / "model.safetensors", "pt") as file:
        for row in table:
            _, *layer = row.path.split(".")
            key = f"layers.{layer[0]}.{keys[layer[1]]}" if layer else "norm"
            gain = file.get_tensor(f"model.{key}.weight").double().numpy()
            assert [row.min, row.mean, row.max] == pytest.approx([gain.min(), gain.mean(), gain.max()], rel=1e-9), key
    assert "layers.29.feed_forward.pre_norm" in str(table)
