"""The sound checkpoints that the fuzz test damages: small, one for each format and spelling."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llama_mini.checkpoint.io.files import INDEX, SINGLE, write_json
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.tokenizer.meta_vocabulary import meta_tokenizer_files
from llama_mini.tokenizer.tiktoken_file import N_SPECIAL
from tests.checkpoint.adapters.tiny_adapters import write_adapter
from tests.checkpoint.fuzz import quantized
from tests.checkpoint.fuzz.gguf import ARRAY, GGUF, STRING, Entry
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.meta.test_directory import meta_tensors, model, write_meta
from tests.conftest import TINY
from tests.tiny_families import random_model
from tests.tiny_models import randomise

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
N_PIECES = 300
SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
SIZES |= {"num_hidden_layers": 2}
# Joined tensors with lists of rotary factors; windows by default, caps and 1 + w; flags of windows, LayerNorm, pairs
# side by side; scales; biases of norms.
GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": False, "layer_types": None},
    "phi3": {"hidden_size": 64, "intermediate_size": 96},
    "gemma2": {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    "cohere2": {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": True},
    "granite": {},
    "stablelm": {"hidden_size": 64, "use_parallel_residual": True},
}
MORE_WORDS = """
attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa blk.0.attn_qkv.weight blk.0.attn_norm.bias
quantization_config auto_map layer_types gelu longrope gemma2 float16 float8_e4m3fn F16 BF16 F64 I64 BOOL F8_E4M3 F4 C64
U8 __metadata__ lm_head.weight default added_tokens_decoder chat_template add_bos_token add_eos_token truncation padding
dropout Unigram WordPiece WordLevel Metaspace Precompiled Strip NFC Split RobertaProcessing Lowercase TemplateProcessing
ids BertPreTokenizer use_scaled_rope ffn_dim_multiplier moe head_dim general.alignment llama.expert_count
llama.rope.scaling.type tokenizer.ggml.add_space_prefix tokenizer.ggml.precompiled_charsmap
quantization compression_config quant_method bits vision_config architectures BertModel unheard_of_key general.type
mmproj split.count model.layers.0.self_attn.q_proj.qweight model.layers.0.mlp.up_proj.weight.absmax g_idx qzeros
scales biases U32 I32 group_size sym desc_act gptq_v2 gptq awq mlx auto-round bitsandbytes version packing_format
lora_A.weight score.weight _orig_mod.lm_head.weight module.model.embed_tokens.weight ./model-00001-of-00002.safetensors
"""
TEXTS = ["the apple and the other apples on the table", "12 apples are there", "a text of some words and other words"]


@dataclass(frozen=True)
class Base:
    """A checkpoint in `folder`; `path` is what is opened. Only `damaged` files are.

    settings_decide: config.json says how tensors are read, so that other settings may give other values.
    """

    name: str
    path: Path
    damaged: tuple[str, ...]
    tokenizer: bool = True
    pickles: bool = False
    settings_decide: bool = False

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for name in self.damaged for path in sorted(self.folder.glob(name))}


def make_bases(folder: Path, write_gguf: Callable[..., Path]) -> list[Base]:
    """`write_gguf` is the fixture: a tiny llama with a byte-level tokenizer."""
    shutil.copytree(TINY, folder / "tiny")
    bases = [Base("tiny", folder / "tiny", ("*.json", "*.jinja", "*.safetensors")), _sharded(folder / "sharded")]
    for family in FAMILIES:
        for spelling in ("v5", "v4"):
            bases.append(_family(folder / f"{family}-{spelling}", family, spelling))
    bases += [_prefixed(folder / "prefixed"), _other_head(folder / "other-head"), _adapter(folder / "adapter")]
    bases += [_sentencepiece_directory(folder / "slow"), _own_plan(folder / "own")]
    bases += [_meta(folder / "meta-tiktoken", _tiktoken()), _meta(folder / "meta-sentencepiece", _sentencepiece())]
    bases += [_quantized(folder / name) for name in quantized.NAMES]
    bases += [_meta_pickles(folder / "meta-pickles"), _pickle(folder / "pickle")]
    (folder / "gguf-bytes").mkdir()
    gguf = write_gguf(folder / "gguf-bytes" / "tiny.gguf", quantised=True)
    bases += [_gguf(gguf), _gguf_sentencepiece(folder / "gguf-pieces")]
    bases += [_gguf(quantized.write_gguf(folder / "gguf-codes"), tokenizer=False)]
    return bases + [_gguf_family(folder / f"gguf-{model_type}", model_type) for model_type in GGUF_FAMILIES]


def words_of(bases: list[Base]) -> list[str]:
    """The names and short texts that stand anywhere in their JSON and GGUF files, but for the vocabularies' tokens."""
    words: set[str] = set()
    for base in bases:
        for name, data in base.files.items():
            if name.endswith(".json"):
                words |= _words(json.loads(data))
            elif name.endswith(".gguf"):
                words |= {entry.key for entry in GGUF.parse(data).entries}
    return sorted({word for word in words if len(word) > 3} | set(MORE_WORDS.split()))


def _words(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_words, value.values()))
    if isinstance(value, list):
        return set().union(*map(_words, value))
    return {value} if isinstance(value, str) and len(value) < 60 else set()


def _sharded(folder: Path) -> Base:
    """With a SentencePiece vocabulary as tokenizer.json."""
    _random(folder, "llama", vocab_size=N_PIECES, max_shard_size="20KB")
    model_file = folder.with_name("tokenizer.model")
    model_file.write_bytes(_sentencepiece())
    for name, content in meta_tokenizer_files(model_file).items():
        if isinstance(content, dict):
            write_json(folder / name, content)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    write_json(folder / INDEX, index)
    return Base("sharded", folder, ("*index.json", "model-00001-of-*.safetensors", "tokenizer*.json"))


def _family(folder: Path, family: str, spelling: str) -> Base:
    """transformers 5 writes its own spelling; the older one has the rotary settings in two keys."""
    _random(folder, family)
    if spelling == "v4":
        raw = json.loads((folder / "config.json").read_text())
        rope = raw.pop("rope_parameters")
        raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        write_json(folder / "config.json", raw)
    return Base(folder.name, folder, ("config.json", "*.safetensors"), tokenizer=False)


def _quantized(folder: Path) -> Base:
    damaged = ("*config.json", "*.safetensors")
    return Base(folder.name, quantized.write(folder, folder.name), damaged, tokenizer=False, settings_decide=True)


def _prefixed(folder: Path) -> Base:
    """The text part of a multimodal model that was compiled: the head lies outside."""
    _random(folder, "qwen2", tie_word_embeddings=False)
    tensors = {
        f"_orig_mod.{name}".replace(".model.", ".model.language_model."): tensor
        for name, tensor in load_file(folder / SINGLE).items()
    }
    save_file(tensors, folder / SINGLE)
    return Base("prefixed", folder, ("config.json", "*.safetensors"), tokenizer=False)


def _adapter(folder: Path) -> Base:
    """A LoRA with DoRA, and its model in a folder of it."""
    folder.mkdir()
    _random(folder / "base", "llama")
    rng, name = torch.Generator().manual_seed(0), "base_model.model.model.layers.1.mlp.up_proj"
    shapes = {"lora_A.weight": (2, 24), "lora_B.weight": (40, 2), "lora_magnitude_vector": (40,)}
    tensors = {f"{name}.{part}": torch.randn(shape, generator=rng) for part, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "base_model_name_or_path": "base"}
    return Base("adapter", write_adapter(folder, config, tensors), ("*.json", "*.safetensors"), tokenizer=False)


def _other_head(folder: Path) -> Base:
    """Tied by its configuration, untied by its tensors."""
    _random(folder, "llama", tie_word_embeddings=False)
    raw = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", raw | {"tie_word_embeddings": True})
    return Base("other-head", folder, ("config.json", "*.safetensors"), tokenizer=False)


def _sentencepiece_directory(folder: Path) -> Base:
    """A directory of LLaMA 2's time: tokenizer.model, and tokens that only tokenizer_config.json has."""
    _random(folder, "mistral", vocab_size=N_PIECES + 1)
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    added = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config: dict[str, Any] = {"added_tokens_decoder": {str(N_PIECES): added}, "bos_token": added | {"content": "<s>"}}
    config |= {"eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}
    template = (TINY / "chat_template.jinja").read_text()
    config["chat_template"] = [{"name": "default", "template": template}, {"name": "tools", "template": ""}]
    write_json(folder / "tokenizer_config.json", config)
    return Base("slow", folder, ("tokenizer*", "generation_config.json"))


def _own_plan(folder: Path) -> Base:
    """A configuration that no other program has words for."""
    sizes: dict[str, Any] = {
        "dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "hidden_dim": 40,
        "vocab_size": 40,
    }
    config = LlamaConfig(**sizes, max_seq_len=64, norm_plan=NormPlan.parse("peri+qk+embed", 2))
    randomise(Llama(config), 0).save_pretrained(folder)
    return Base("own", folder, ("config.json",), tokenizer=False)


def _meta(folder: Path, vocabulary: bytes) -> Base:
    size = N_PIECES if vocabulary.startswith(b"\n") else 256 + N_SPECIAL
    theirs = model(vocab_size=size)
    write_meta(folder, theirs, vocab_size=size)
    (folder / "consolidated.00.pth").unlink()
    tensors = {name: tensor for name, (tensor, _) in meta_tensors(theirs).items()}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    return Base(folder.name, folder, ("*",))


def _meta_pickles(folder: Path) -> Base:
    return Base(folder.name, write_meta(folder, model(), 2), ("*",), tokenizer=False, pickles=True)


def _pickle(folder: Path) -> Base:
    theirs = _random(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    return Base(folder.name, folder, ("pytorch_model.bin",), tokenizer=False, pickles=True)


def _gguf(path: Path, tokenizer: bool = True) -> Base:
    return Base(path.parent.name, path, (path.name,), tokenizer)


def _gguf_sentencepiece(folder: Path) -> Base:
    processor = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece())
    ids = range(N_PIECES)
    types = [2 if i == 0 else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in ids]
    folder.mkdir()
    path = write_family(folder / "tiny.gguf", random_model("llama", 0, **SIZES, vocab_size=N_PIECES), Kind.F16)
    gguf = GGUF.parse(path.read_bytes())
    keys: list[tuple[str, int, Any]] = [
        ("model", STRING, "llama"),
        ("tokens", ARRAY, (STRING, [processor.id_to_piece(i) for i in ids])),
        ("scores", ARRAY, (6, [processor.get_score(i) for i in ids])),
        ("token_type", ARRAY, (5, types)),
        ("bos_token_id", 4, 1),
        ("eos_token_id", 4, 2),
        ("unknown_token_id", 4, 0),
        ("add_bos_token", 7, True),
    ]
    gguf.entries += [Entry(f"tokenizer.ggml.{key}", kind, value) for key, kind, value in keys]
    gguf.entries.append(Entry("tokenizer.chat_template", STRING, (TINY / "chat_template.jinja").read_text()))
    path.write_bytes(gguf.to_bytes())
    return _gguf(path)


def _gguf_family(folder: Path, model_type: str) -> Base:
    """With rotary scaling by yarn; matrices of BF16, or Q8_0 where the width allows."""
    folder.mkdir()
    kind = Kind.Q8_0 if model_type == "phi3" else Kind.BF16
    theirs = random_model(model_type, 4, **SIZES | GGUF_FAMILIES[model_type], vocab_size=40)
    return _gguf(write_family(folder / "tiny.gguf", theirs, kind), tokenizer=False)


def _random(
    folder: Path, family: str, vocab_size: int = 40, max_shard_size: str = "1GB", **changes: Any
) -> PreTrainedModel:
    theirs = random_model(family, FAMILIES.index(family) + 3, **SIZES, vocab_size=vocab_size, **changes)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs


def _tiktoken() -> bytes:
    return b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@cache
def _sentencepiece() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=N_PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_end|>", "word"],
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()
