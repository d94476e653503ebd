"""What is relied on from outside. A change here is a change for every user: make it on purpose."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import llama_mini
from llama_mini import LLM, Chunk, Completion, KVCache, Llama, LlamaConfig, NormPlan, RMSNorm, SamplingParams, Tokenizer
from llama_mini import errors as errors_module
from llama_mini.generate import parser

SIGNATURES = {
    LLM: "(model, dtype='auto', device='cpu', quantize='auto', kernels='auto', threads=None, adapter=None, "
    "prefix_cache=True, draft=None, speculation='auto', kv_dtype='auto')",
    LLM.generate: "(self, prompts=None, params=None, **settings)",
    LLM.chat: "(self, messages, params=None, **settings)",
    LLM.completions: "(self, prompts, params=None, **settings)",
    LLM.stream: "(self, prompt, params=None, **settings)",
    LLM.astream: "(self, prompt, params=None, **settings)",
    LLM.submit: "(self, prompts, params=None, loop=None, **settings)",
    LLM.activity: "(self)",
    LLM.forget: "(self)",
    LLM.score: "(self, ids)",
    Llama: "(config)",
    Llama.forward: "(self, tokens, cache=None)",
    Llama.new_cache: "(self, batch, length)",
    Llama.from_pretrained: "(path, dtype=None, device='cpu')",
    Llama.save_pretrained: "(self, path)",
    RMSNorm: "(dim, eps=1e-06, *, gain='w', cast='early', scale=1.0, bias=False, groups=1, power=1.0, "
    "device=None, dtype=None)",
    NormPlan.parse: "(text, n_layers)",
    NormPlan.to_dict: "(self)",
    NormPlan.from_dict: "(data)",
    Tokenizer.from_pretrained: "(path)",
    Tokenizer.encode: "(self, text, add_special_tokens=True, parse_special=False)",
    Tokenizer.decode: "(self, ids, skip_special_tokens=True)",
    Tokenizer.apply_chat_template: "(self, messages, add_generation_prompt=True, *, continue_final_message=False, "
    "chat_template=None, **variables)",
    KVCache.advance: "(self, n_new)",
    KVCache.truncate: "(self, row, length)",
    KVCache.clear: "(self, row)",
    KVCache.row: "(self, index)",
}

FIELDS = {
    SamplingParams: "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty "
    "logit_bias logits_processors n seed min_tokens max_tokens max_time stop stop_token_ids ignore_eos top_logprobs "
    "prompt_logprobs token_logprobs cache_salt json_schema regex grammar choice",
    Completion: "text token_ids finish_reason error logprobs stats top_logprobs prompt_logprobs prompt_top_logprobs",
    Chunk: "text token_id finish_reason completion",
    LlamaConfig: "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size max_seq_len norm_eps rope_theta "
    "rope_scaling rotary_dim unrotated_layers sliding_window sliding_layers sliding_rope_theta sliding_rope_scaling "
    "attention_scale attention_softcap qk_norm_after_rope qkv_bias o_bias mlp_bias activation gated_mlp "
    "embedding_scale logit_scale logit_softcap tie_word_embeddings norm_plan bos_id eos_ids pad_id",
    NormPlan: "attention feed_forward embed final parallel overrides",
}

OPTIONS = (
    "--help --prompt --file --interactive --batch --output --info --version --model --adapter --dtype --device "
    "--edit --quantize --kernels --threads --kv-dtype --draft --speculation "
    "--chat --raw --system --max-tokens --min-tokens --max-time --stop --stop-token --ignore-eos --logit-bias "
    "--repetition-penalty --presence-penalty --frequency-penalty --temperature --top-k --top-p --min-p --seed "
    "--no-stream --stats --json --top-logprobs --prompt-logprobs "
    "--special --template-arg --json-schema --regex --grammar --choice"
)

LAYER_KEYS = (
    "attention.pre_norm attention.q_proj attention.k_proj attention.v_proj attention.o_proj "
    "feed_forward.pre_norm feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj"
)


def plain(target: object) -> str:
    signature = inspect.signature(target)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_names() -> None:
    expected = "LLM Chunk Completion KVCache Llama LlamaConfig NormPlan RMSNorm SamplingParams Tokenizer"
    assert llama_mini.__all__ == expected.split()
    assert all(getattr(llama_mini, name).__name__ == name for name in llama_mini.__all__)
    with pytest.raises(AttributeError, match="GPT"):
        _ = llama_mini.GPT


@pytest.mark.parametrize("target", SIGNATURES, ids=lambda t: t.__qualname__)
def test_signatures(target: object) -> None:
    assert plain(target) == SIGNATURES[target]


@pytest.mark.parametrize("cls", FIELDS, ids=lambda c: c.__name__)
def test_fields(cls: type) -> None:
    assert [f.name for f in fields(cls)] == FIELDS[cls].split()


def test_attributes(tiny_dir) -> None:
    llm = LLM(tiny_dir)
    assert isinstance(llm.tokenizer.bos_id, int)
    assert llm.tokenizer.eos_ids
    assert llm.tokenizer.eos_id in llm.tokenizer.eos_ids
    assert llm.tokenizer.chat_template is not None
    assert llm.tokenizer.vocab_size == 260
    assert llm.model.new_cache(2, 5).lengths == [0, 0]
    assert llm.config is llm.model.config


def test_options() -> None:
    found = [option for action in parser()._actions for option in action.option_strings]
    assert sorted(found) == sorted([*OPTIONS.split(), "-h"])


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_keys_of_two_layers(tied: bool) -> None:
    config = LlamaConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=8, vocab_size=9, tie_word_embeddings=tied)
    layers = [f"layers.{i}.{key}.weight" for i in range(2) for key in LAYER_KEYS.split()]
    expected = ["tok_embeddings.weight", *layers, "norm.weight", *([] if tied else ["lm_head.weight"])]
    assert sorted(Llama(config).state_dict()) == sorted(expected)


def test_errors_and_their_exit_codes() -> None:
    codes = {
        name: cls.exit_code
        for name, cls in vars(errors_module).items()
        if isinstance(cls, type) and issubclass(cls, errors_module.LlamaMiniError)
    }
    assert codes == {
        "LlamaMiniError": 1,
        "ConfigError": 3,
        "CheckpointError": 3,
        "CheckpointPathError": 3,
        "CheckpointFormatError": 3,
        "CheckpointIncompleteError": 3,
        "CheckpointMismatchError": 3,
        "TokenizerError": 3,
        "RequestError": 2,
        "ContextError": 2,
        "CapacityError": 4,
        "NumericalError": 1,
    }


def test_importing_the_package_waits_for_nothing() -> None:
    code = "import sys, llama_mini; assert not {'torch', 'tokenizers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
