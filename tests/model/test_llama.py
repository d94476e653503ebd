"""The whole model: against transformers, against float64 NumPy for every norm plan, hooked, exported."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.model.attention import Attention, causal_mask
from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import KVCache, LayerCache
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope import Rope
from llama_mini.model.rope_scaling import Llama3Scaling
from tests import reference
from tests.tiny_models import TINY, hf_llama, random_tokens, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLANS = ["pre", "post", "peri", "out", "none", "deep", "mix(.4)", "lns", "sub", "normformer", "simple"]
PLANS += ["pre+qk", "pre+qk:full", "out+qk:full", "peri+qk+embed", "mix(1)+qk", "post+qk:full+embed", "pre-final"]
INSIDE = {"gate": {"scale": 0.9}, "up": {"eps": 0.15}, "mid": {"gain": "1+w"}}
INSIDE_KINDS = {"gate": {"kind": "l2"}, "up": {"kind": "group", "groups": 4}, "mid": {"kind": "dyt", "gain": "1+w"}}
EVERY_SLOT: dict[str, Any] = {  # each slot filled, each setting away from its default, and layers that differ
    "attention": {
        "pre": {"gain": "1+w", "cast": "late"},
        "q": {"view": "full", "gain": "1+w"},
        "k": {"eps": 0.3},
        "v": {"view": "full", "scale": 0.7},
        "mid": {"gain": "none", "eps": 0.1},
        "out": {"scale": -1.3, "cast": "late"},
        "post": {"eps": 0.01},
        "alpha": 1.7,
        "beta": 0.6,
    },
    "feed_forward": INSIDE | {"pre": {"eps": 0.2}, "out": {}, "post": {"gain": "none"}, "alpha": -0.8},
    "embed": {"scale": 1.4, "eps": 0.05},
    "final": {"gain": "1+w", "eps": 0.4},
    "overrides": [
        {"layers": "1-2", "attention": {"v": {}, "beta": -0.4}, "feed_forward": {"beta": 2.5}},
        {"layers": "2", "feed_forward": {"pre": {"scale": 3.0}, "alpha": 0.5}},
    ],
}
EVERY_KIND = {  # each in a slot before a branch, in one of the heads or inside, and behind one
    "attention": {
        "pre": {"kind": "layer", "gain": "1+w", "eps": 0.2},
        "q": {"kind": "scale", "view": "full"},
        "k": {"kind": "l2", "eps": 0.1},
        "v": {"kind": "dyt", "gain": "none"},
        "mid": {"kind": "prms", "scale": 0.7},
        "post": {"kind": "scale", "eps": 0.3},
    },
    "feed_forward": INSIDE_KINDS | {"pre": {"kind": "prms"}, "out": {"kind": "layer"}},
    "embed": {"kind": "dyt", "scale": 1.6},
    "final": {"kind": "l2"},
    "overrides": [
        {
            "layers": "2",
            "attention": {
                "pre": {"kind": "dyt"},
                "q": {"kind": "prms"},
                "k": {"kind": "dyt", "view": "full"},
                "v": {"kind": "layer"},
                "mid": {"kind": "l2", "scale": 5.0},
                "out": {"kind": "prms"},
            },
            "feed_forward": {"pre": {"kind": "l2", "scale": 7.0}, "mid": {"kind": "scale", "gain": "1+w"}},
        }
    ],
}


def random_hf_settings(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    heads, kv_heads = [(4, 4), (6, 2), (4, 1), (8, 2), (5, 5), (9, 3)][seed % 6]
    scaled = bool(rng.integers(2))
    theta = {"rope_type": "default", "rope_theta": float(rng.choice([500.0, 10_000.0]))}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * int(rng.choice([6, 8, 10])),
        "head_dim": int(rng.choice([6, 8, 14, 20])),
        "intermediate_size": int(rng.integers(17, 90)),
        "vocab_size": int(rng.integers(50, 120)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": LLAMA3 | {"factor": float(rng.choice([8, 32]))} if scaled else theta,
    }


@pytest.mark.parametrize("seed", range(12))
def test_logits_are_those_of_transformers(tmp_path: Any, seed: int) -> None:
    settings = random_hf_settings(seed)
    theirs = hf_llama(seed, **settings)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(3, 70, settings["vocab_size"], seed)
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), expected, rtol=0, atol=2e-5)


def numpy_logits(model: Llama, tokens: Tensor) -> np.ndarray:
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return reference.logits(model.config, state, tokens.numpy())


def in_float64(model: Llama) -> Llama:
    """All of it: the rotary tables are float32 in any model, so here their frequencies are exchanged."""
    model.double().rope.inv_freq = torch.from_numpy(reference.frequencies(model.config))
    if model.sliding_rope is not None:
        model.sliding_rope.inv_freq = torch.from_numpy(reference.frequencies(model.config, sliding=True))
    return model


def assert_is_the_reference(model: Llama, tokens: Tensor) -> None:
    expected = numpy_logits(model, tokens)
    np.testing.assert_allclose(model(tokens).numpy(), expected, rtol=0, atol=1e-10 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("plan", [*PLANS, EVERY_SLOT, EVERY_KIND], ids=[*PLANS, "every slot", "every kind"])
def test_any_norm_plan_computes_its_formula(plan: Any) -> None:
    plan = plan if isinstance(plan, str) else NormPlan.from_dict(plan)
    assert_is_the_reference(in_float64(tiny_model(7, norm_plan=plan)), random_tokens(2, 21))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "norm_eps": 0.5},
        {"dim": 56, "n_heads": 6, "n_kv_heads": 3, "head_dim": 16},  # 56 / 6 is not whole, as 1792 / 24 with 128
        {"n_kv_heads": 1, "head_dim": 2},
        {
            "rope_theta": 500_000.0,
            "rope_scaling": Llama3Scaling(
                factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16
            ),
        },
    ],
    ids=["tied", "heads wider than the stream", "one KV head of two elements", "scaled rope"],
)
def test_shapes_that_transformers_may_refuse_compute_the_formula(changes: dict[str, Any]) -> None:
    assert_is_the_reference(in_float64(tiny_model(3, **changes)), random_tokens(2, 40))


def test_float32_tables_cost_a_float64_model_no_more_than_their_rounding() -> None:
    model, tokens = tiny_model(2, torch.float64), random_tokens(1, 50)
    assert model(tokens).dtype == torch.float64
    np.testing.assert_allclose(model(tokens).numpy(), numpy_logits(model, tokens), rtol=0, atol=1e-4)


def test_a_new_model_keeps_the_variance_of_a_unit_input() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**TINY | {"dim": 240, "hidden_dim": 600, "vocab_size": 500, "norm_plan": "peri+qk"}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = 1 if name == "tok_embeddings.weight" else weight.shape[1] ** -0.5
        error = 5 / weight.numel() ** 0.5  # five standard errors
        assert abs(weight.mean().item()) < error * std, name
        assert abs(weight.std().item() / std - 1) < error, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    model, tokens = tiny_model(dtype=dtype), random_tokens(2, 7)
    hidden = model.hidden(tokens)
    assert (hidden.shape, hidden.dtype) == ((2, 7, 48), dtype)
    logits = model(tokens)
    assert (logits.shape, logits.dtype) == ((2, 7, 97), torch.float32)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(model.logits(hidden[:, -1]), logits[:, -1], rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.zeros(1, 5, dtype=torch.int32), "int32"),
        (torch.zeros(1, 5), "float32"),
        (torch.zeros(1, 1, 5, dtype=torch.int64), r"\(1, 1, 5\)"),
        ([1, 2, 3], "a list"),
        (None, "a NoneType"),
    ],
)
def test_tokens_of_another_shape_or_dtype_are_refused(tokens: Tensor, found: str) -> None:
    with pytest.raises(RequestError, match=rf"tokens must be \(batch, length\) int64, not .*{found}"):
        tiny_model()(tokens)


def test_generate_says_what_generates() -> None:
    with pytest.raises(RequestError, match=r"llama_mini\.LLM\(path\)\.generate\(prompts\)"):
        tiny_model().generate(random_tokens(1, 4), max_new_tokens=3)


def test_a_cache_of_another_batch_is_refused_and_left_as_it_was() -> None:
    model = tiny_model()
    cache = model.new_cache(2, 16)
    with pytest.raises(RequestError, match="3 rows of tokens for a cache of 2 rows"):
        model(random_tokens(3, 4), cache)
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_llama_has_the_parameters_of_llama_and_no_more(tied: bool) -> None:
    layer = ["attention.pre_norm", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"]
    layer += ["feed_forward.pre_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"]
    expected = {"tok_embeddings.weight", "norm.weight"} | (set() if tied else {"lm_head.weight"})
    expected |= {f"layers.{i}.{name}.weight" for i in (0, 1) for name in layer}
    assert set(tiny_model(n_layers=2, tie_word_embeddings=tied).state_dict()) == expected


def test_every_norm_can_be_watched_and_edited_by_its_address() -> None:
    model, tokens = tiny_model(norm_plan=NormPlan.from_dict(EVERY_SLOT)), random_tokens(1, 5)
    plain = model(tokens)
    addresses = [name for name, _ in model.named_modules() if name.rpartition(".")[2].endswith("norm")]
    assert len(addresses) == 2 + 3 * (7 + 6)
    assert any(isinstance(model.get_submodule(address), nn.Identity) for address in addresses)  # an empty slot
    seen: list[str] = []
    hooks = [
        model.get_submodule(address).register_forward_hook(lambda *_, address=address: seen.append(address))
        for address in addresses
    ]
    assert torch.equal(model(tokens), plain)
    assert sorted(seen) == sorted(addresses)  # each once
    for hook in hooks:
        hook.remove()
    for address in addresses:
        hook = model.get_submodule(address).register_forward_hook(lambda _module, _input, output: output.flip(-1))
        assert not torch.equal(model(tokens), plain), address
        hook.remove()


OTHERS = {"sliding_window": 9, "sliding_layers": (0, 2), "sliding_rope_theta": 50.0, "unrotated_layers": (1,)}
OTHERS |= {"attention_softcap": 3.0, "rotary_dim": 4, "embedding_scale": 7.0, "activation": "gelu_tanh"}


@pytest.mark.parametrize("settings", [{}, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["llama", "others"])
def test_one_exported_decode_step_serves_every_batch_and_length(settings: dict[str, Any]) -> None:
    model = tiny_model(norm_plan="peri+qk", **settings)

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, kv: list[LayerCache]) -> Tensor:
            return self.model.trunk(tokens, positions, mask, kv)

    def decode_step(batch: int, longest: int) -> tuple[KVCache, tuple[Tensor, Tensor, Tensor, list[LayerCache]]]:
        cache = model.new_cache(batch, 128)
        for row in range(batch):
            model(random_tokens(1, longest - row, seed=row), cache.row(row))
        positions = cache.positions(1)
        mask = causal_mask(positions, cache.read_length(1))
        return cache, (random_tokens(batch, 1), positions, mask, cache.layers(positions))

    batch, blocks = torch.export.Dim("batch", max=64), torch.export.Dim("blocks", max=8)
    rows = {0: batch}
    shapes = {
        "tokens": rows,
        "positions": rows,
        "mask": {0: batch, 3: 16 * blocks},
        "kv": [LayerCache(rows, rows, rows, rows)] * len(model.layers),  # type: ignore[arg-type]
    }
    exported = torch.export.export(Trunk(), decode_step(3, 40)[1], dynamic_shapes=shapes).module()
    for batch_size, longest in [(3, 40), (2, 10), (5, 70), (1, 100), (8, 110)]:
        cache, inputs = decode_step(batch_size, longest)
        twin, twin_inputs = decode_step(batch_size, longest)
        torch.testing.assert_close(exported(*inputs), model.trunk(*twin_inputs), rtol=0, atol=1e-5)
        torch.testing.assert_close(cache._k, twin._k, rtol=0, atol=1e-5)  # both wrote the new keys


def test_attention_overrides_are_adopted_in_place() -> None:
    """A branch can be replaced by a subclass that takes over its modules: the way every fast path comes in."""
    model, tokens = tiny_model(), random_tokens(1, 9)
    plain = model(tokens)

    class Louder(Attention):
        def qkv(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().qkv(x, rope)
            return q, k, 2 * v

    replacement = Louder(model.config, model.config.norm_plan.layer(1)[0])
    layer = model.get_submodule("layers.1")
    replacement.load_state_dict(layer.get_submodule("attention").state_dict())
    layer.attention = replacement
    assert not torch.equal(model(tokens), plain)
    replacement.o_proj.weight.data.mul_(0.5)  # undoes it exactly, since two is a power of two
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=0)
