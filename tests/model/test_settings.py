"""What other families add to LLaMA: each setting, and all together, against float64 NumPy; with caches; in batches."""

from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import Llama3Scaling, YarnScaling
from tests.model.test_llama import assert_is_the_reference, in_float64
from tests.tiny_models import TINY, random_tokens, tiny_model

WINDOW: dict[str, Any] = {"sliding_window": 5, "sliding_layers": (0, 2)}
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
LAYER_NORM = {"kind": "layer", "cast": "late"}


def plan(text: str, **settings: Any) -> NormPlan:
    return NormPlan.parse(text, TINY["n_layers"]).with_norms(**settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "relu2": {"activation": "relu2"},
    "no gate": {"activation": "relu2", "gated_mlp": False},
    "no gate, biases": {"activation": "gelu_tanh", "gated_mlp": False, "mlp_bias": True, "o_bias": True},
    "scales": {"embedding_scale": 6.7, "attention_scale": 0.9, "logit_scale": 0.3},
    "attention softcap": {"attention_softcap": 0.7},
    "softcaps and scales": {"attention_softcap": 0.5, "logit_softcap": 0.8, "attention_scale": 1.3, "logit_scale": 1.7},
    "partial rotary": {"rotary_dim": 4, "qkv_bias": True},
    "partial rotary, scaled": {"rotary_dim": 6, "rope_scaling": SCALING},
    "window": WINDOW,
    "unrotated layers": {"unrotated_layers": (1,), **WINDOW},
    "sliding theta": {"sliding_rope_theta": 77.0, **WINDOW, "rope_scaling": SCALING},
    "sliding scaling": {"sliding_rope_theta": 1e4, "sliding_rope_scaling": SCALING, **WINDOW},
    "q and k norms after rope": {"qk_norm_after_rope": True, "norm_plan": "pre+qk"},
    "full q and k norms after rope": {"qk_norm_after_rope": True, "norm_plan": "out+qk:full", "unrotated_layers": (2,)},
    "bias": {"norm_plan": plan("peri+embed", bias=True, **LAYER_NORM)},
    "bias of 1+w": {"norm_plan": plan("pre+qk", bias=True, gain="1+w", **LAYER_NORM)},
    "bias without a gain": {"norm_plan": plan("pre", bias=True, gain="none", scale=0.7, **LAYER_NORM)},
    "no weights": {"norm_plan": plan("pre", kind="layer", gain="none")},
    "parallel": {"norm_plan": "parallel"},
    "parallel, more norms": {
        "norm_plan": NormPlan.from_dict(
            {
                "attention": {"pre": {}, "out": {}, "beta": 0.4},
                "feed_forward": {"pre": {"gain": "1+w"}, "mid": {}, "post": {}, "alpha": 0.8},
                "parallel": True,
            }
        )
    },
}
TOGETHER: dict[str, Any] = {
    "activation": "gelu_tanh",
    "embedding_scale": 6.9,
    "attention_scale": 0.31,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "logit_scale": 0.8,
    "rotary_dim": 4,
    "unrotated_layers": (1,),
    "sliding_rope_theta": 50.0,
    "qk_norm_after_rope": True,
    "tie_word_embeddings": True,
    "qkv_bias": True,
    "norm_plan": plan("parallel+qk", bias=True, gain="1+w", **LAYER_NORM),
    **WINDOW,
}
EVERY = {**SETTINGS, "together": TOGETHER}


@pytest.mark.parametrize("name", EVERY)
def test_each_setting_computes_its_formula(name: str) -> None:
    assert_is_the_reference(in_float64(tiny_model(7, **EVERY[name])), random_tokens(2, 21))


@pytest.mark.parametrize("name", EVERY)
def test_each_setting_acts_and_a_cache_changes_nothing(name: str) -> None:
    model, tokens = tiny_model(3, torch.float64, **EVERY[name]), random_tokens(2, 40)
    whole = model(tokens)
    plain = Llama(LlamaConfig(**TINY)).double().eval().requires_grad_(False)
    if (shared := model.state_dict()).keys() == plain.state_dict().keys():
        plain.load_state_dict(shared)
        assert (plain(tokens) - whole).abs().max() > 1e-3
    cache = model.new_cache(2, 40)
    parts = [model(part, cache) for part in tokens.split([9, 1, 1, 17, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_queries_grow_with_their_position() -> None:
    """1 + β·ln(1 + ⌊p / n⌋), as Ministral 3 has it: nothing changes up to the original context."""
    rope = {"factor": 4.0, "original_max_seq_len": 16}
    plain, grown = (
        tiny_model(2, torch.float64, rope_scaling=YarnScaling(**rope, q_growth=growth)) for growth in (0.0, 0.5)
    )
    tokens = random_tokens(1, 40)
    assert torch.equal(plain(tokens)[:, :16], grown(tokens)[:, :16])
    assert (plain(tokens) - grown(tokens))[:, 16:].abs().amax(-1).min() > 1e-4
    factor = 1 + 0.5 * np.log(1 + np.arange(40) // 16)
    seen = []
    for model in (plain, grown):
        attention = model.layers[0].attention
        x = attention.pre_norm(model.tok_embeddings(tokens))
        seen.append(attention.qkv(x, model.rope(torch.arange(40)[None]))[0])
    expected = seen[0] * torch.from_numpy(factor)[None, :, None, None]
    torch.testing.assert_close(seen[1], expected, rtol=1e-6, atol=0)  # the factor is float32


@pytest.mark.parametrize("heads", [(8, 4, 32), (4, 1, 64), (9, 3, 16)], ids=str)
def test_a_row_of_a_batch_has_the_bits_that_it_has_alone_under_a_softcap(heads: tuple[int, int, int]) -> None:
    n_heads, n_kv_heads, head_dim = heads
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "max_seq_len": 400}
    settings = sizes | {"attention_softcap": 5.0, "logit_softcap": 7.0}
    model, lengths = tiny_model(1, torch.bfloat16, **settings), [3, 40, 150, 300]
    together = model.new_cache(len(lengths), 400)
    alone = [model.new_cache(1, 400) for _ in lengths]
    for row, length in enumerate(lengths):
        for cache in (together.row(row), alone[row]):
            model(random_tokens(1, length, seed=row), cache)
    assert together.lengths == lengths
    for step in range(3):
        tokens = random_tokens(len(lengths), 1, seed=100 + step)
        batch = model(tokens, together)
        for row, cache in enumerate(alone):
            assert torch.equal(batch[row : row + 1], model(tokens[row : row + 1], cache))


def test_the_embedding_scale_is_rounded_to_the_models_dtype() -> None:
    model = tiny_model(0, torch.bfloat16, embedding_scale=48**0.5)
    tokens = random_tokens(1, 9)
    scale = torch.tensor(48**0.5).to(torch.bfloat16)  # 6.9375, not 6.9282
    assert torch.equal(model.embed(tokens), model.tok_embeddings(tokens) * scale)
    assert not torch.equal(model.embed(tokens), model.tok_embeddings(tokens) * 48**0.5)


BAD: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name} must be a finite number above 0") for name in ("embedding_scale", "logit_scale")),
    *(({name: -1.0}, f"{name} must be a finite") for name in ("attention_scale", "attention_softcap", "logit_softcap")),
    ({"embedding_scale": None}, "embedding_scale must be a finite number above 0, not None"),
    ({"activation": "swish"}, "unknown activation 'swish'; known: silu, gelu_tanh, gelu, relu2"),
    ({"gated_mlp": 1}, "gated_mlp must be true or false"),
    ({"qk_norm_after_rope": None}, "qk_norm_after_rope must be true or false"),
    ({"rotary_dim": 3}, "rotary_dim must be even, .*found 3"),
    ({"rotary_dim": 10}, "rotary_dim must be a whole number from 1 to 8, not 10"),
    ({"unrotated_layers": (3,)}, r"unrotated_layers must be a tuple of layer indices, from 0 to 2; found \(3,\)"),
    ({"unrotated_layers": [0]}, "unrotated_layers must be a tuple"),
    ({"sliding_rope_theta": 1e4}, "sliding_rope_theta is given, but no layer has a sliding window"),
    ({"sliding_rope_scaling": SCALING, **WINDOW}, "sliding_rope_scaling needs a sliding_rope_theta"),
    (
        {"sliding_rope_theta": 1e4, "sliding_rope_scaling": "yarn", **WINDOW},
        "sliding_rope_scaling must be a RopeScaling",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_setting_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**TINY | changes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"bias": True, "cast": "late"}, "RMSNorm has no bias; kinds with it: layer, dyt, derf"),
        ({"kind": "layer", "bias": True}, "LayerNorm with a bias rounds last: give cast 'late'"),
        ({"kind": "layer", "bias": 1, "cast": "late"}, "LayerNorm: bias must be true or false"),
    ],
    ids=["rms", "early", "no flag"],
)
def test_a_bias_belongs_to_a_few_kinds_that_round_last(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormPlan.from_dict({"final": spec})


def test_a_parallel_plan_is_a_flag() -> None:
    with pytest.raises(ConfigError, match="norm plan: parallel must be true or false"):
        NormPlan.from_dict({"parallel": 1})


def test_the_default_settings_are_llamas() -> None:
    plain = LlamaConfig(**TINY)
    given = {"rotary_dim": 8, "activation": "silu", "gated_mlp": True, "embedding_scale": 1, "attention_softcap": None}
    assert LlamaConfig(**TINY | given) == plain
    model = Llama(plain)
    assert model.sliding_rope is None
