"""Writes tests/tiny: a small random LLaMA with a byte-level tokenizer, so that tests need no download.

Its settings are unusual on purpose, so that nothing passes by luck: heads wider than dim / n_heads, shared KV heads,
LLaMA 3.1 rotary scaling, an untied head, random gains, and a BOS that both the tokenizer and the chat template write.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llama_mini import Llama, LlamaConfig, RMSNorm
from llama_mini.model.rope_scaling import Llama3Scaling

SEED = 20240
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """256 bytes, then the control tokens: a text is a BOS and its UTF-8 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def make_model(tokenizer: Tokenizer) -> Llama:
    bos, end, _, turn = (tokenizer.get_vocab()[text] for text in SPECIAL)
    config = LlamaConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=10,
        hidden_dim=64,
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=512,
        rope_theta=10_000.0,
        rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
        bos_id=bos,
        eos_ids=(end, turn),
    )
    torch.manual_seed(SEED)
    model = Llama(config).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.normal_(1.0, 0.3)
    letters = [tokenizer.token_to_id(char) for char in "abcdefghijklmnopqrstuvwxyzĠ"]
    assert model.lm_head is not None
    rare = torch.ones(config.vocab_size, dtype=torch.bool)
    rare[letters] = False
    model.lm_head.weight[rare] *= 0.5  # so that most of its output is readable
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="a new directory")
    target: Path = parser.parse_args().target
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(target)
    tokenizer.save(str(target / "tokenizer.json"))
    bos, end, _, turn = SPECIAL
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": turn}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {
        "bos_token_id": tokenizer.token_to_id(bos),
        "eos_token_id": [tokenizer.token_to_id(t) for t in (end, turn)],
    }
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
