"""Writes tests/golden/texts.json: what transformers answers greedily in float32, to which the command line is held."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_mini.cli.default_model import ensure_default_checkpoint

ROOT = Path(__file__).parent.parent
CASES: list[dict[str, Any]] = [
    {"checkpoint": "tiny", "prompt": "Why is the sky blue?", "raw": False, "max_tokens": 60},
    {"checkpoint": "tiny", "prompt": "Once upon a time", "raw": True, "max_tokens": 60},
    {"checkpoint": "smollm2", "prompt": "Why is the sky blue?", "raw": False, "max_tokens": 64},
]


def answer(directory: Path, prompt: str, raw: bool, max_tokens: int) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if raw:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="the file to write, which must not exist")
    target: Path = parser.parse_args().target
    if target.exists():
        parser.error(f"{target} exists already")
    directories = {"tiny": ROOT / "tests" / "tiny", "smollm2": ensure_default_checkpoint()}
    texts = []
    for case in CASES:
        text = answer(directories[case["checkpoint"]], case["prompt"], case["raw"], case["max_tokens"])
        texts.append(case | {"text": text})
    target.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
