"""The table of norms, against the configuration, NumPy and the tensors of the checkpoint's file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llama_mini import Llama, lab
from llama_mini.checkpoint.match import empty_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import RequestError
from llama_mini.lab.norm_table import effective_gain
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import tiny_model

SLOTS_THAT_FOLD = ("attention.pre", "attention.mid", "feed_forward.pre", "feed_forward.mid")


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


def test_folded_gains_are_the_columns_of_the_folded_matrices() -> None:
    attention = BranchPlan(pre=NormSpec(gain="1+w"), mid=NormSpec(kind="scale"), q=NormSpec(), out=NormSpec())
    feed_forward = BranchPlan(pre=NormSpec(gain="none", scale=-0.5), mid=NormSpec(kind="dyt"), post=NormSpec())
    plan = NormPlan(attention=attention, feed_forward=feed_forward, embed=NormSpec())
    model = tiny_model(1, n_layers=2, norm_plan=plan, tie_word_embeddings=True)
    gains, state = lab.folded_gains(model), {n: t.double().numpy() for n, t in model.state_dict().items()}
    in_layers = [f"layers.{i}.{name}_norm" for i in (0, 1) for name in SLOTS_THAT_FOLD]
    assert list(gains) == [*in_layers, "norm"]
    for i in (0, 1):
        at, pre, mid = f"layers.{i}.", "attention.pre_norm", "attention.mid_norm"
        qkv = np.concatenate([state[f"{at}attention.{name}_proj.weight"] for name in "qkv"])
        gate_up = np.concatenate([state[f"{at}feed_forward.{name}_proj.weight"] for name in ("gate", "up")])
        expected = {
            pre: np.linalg.norm(qkv * (1 + state[f"{at}{pre}.weight"]), axis=0),
            mid: np.linalg.norm(state[f"{at}attention.o_proj.weight"] * state[f"{at}{mid}.weight"], axis=0),
            "feed_forward.pre_norm": 0.5 * np.linalg.norm(gate_up, axis=0),
        }
        for path, values in expected.items():
            np.testing.assert_allclose(gains[at + path].numpy(), values, rtol=1e-5)
    folded = lab.fold(model)
    np.testing.assert_allclose(gains["norm"].numpy(), folded.lm_head.weight.norm(dim=0).numpy(), rtol=1e-5)
    row, values = gains.table()[0], gains["layers.0.attention.pre_norm"].double().numpy()
    assert (row.min, row.min_dim, row.max, row.max_dim) == (
        values.min(),
        values.argmin(),
        values.max(),
        values.argmax(),
    )
    assert row.median == pytest.approx(np.median(values), rel=1e-6)


def test_folding_leaves_the_folded_gains() -> None:
    model = tiny_model(1, norm_plan="sub")
    before, after = lab.folded_gains(model), lab.folded_gains(lab.fold(model))
    assert all(torch.allclose(before[path], after[path], rtol=1e-6) for path in before)


def test_models_without_folded_gains_are_refused() -> None:
    with pytest.raises(RequestError, match="no norm of the model is read by matrices alone"):
        lab.folded_gains(tiny_model(norm_plan="post"))
    model = tiny_model()
    with lab.edit(model, {"norm": {"eps": 0.1}}), pytest.raises(RequestError, match="leave the edit"):
        lab.folded_gains(model)
