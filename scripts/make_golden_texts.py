"""Records what transformers computes in float32, so that tests can hold this engine to it without running transformers.

texts.json: answers, to which the command line is held. greedy.json: for the default checkpoint, the greedy tokens after
eight prompts and some of the logits before them, and how far transformers' own bfloat16 is from its float32.
"""

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


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Die Hauptstadt von Deutschland ist",
    "人工智能是",
    "Q: What is 17 + 25?\nA:",
    "Once upon a time, in a village by the sea,",
    "La receta de la tortilla española lleva",
    "<html>\n<body>\n  <h1>",
]
STEPS, EVERY, PROSE = 64, 499, 512


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


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """By hand: `generate` stops at the end of text, or bans it, and either hides steps."""
    tokens, past, found = torch.tensor([ids]), None, []
    for _ in range(steps):
        out = model(tokens, past_key_values=past, use_cache=True)
        past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(tokens))
    return found


def kl_of_bfloat16(directory: Path, model: Any, ids: list[int]) -> float:
    """Mean KL of transformers' bfloat16 from its float32, in nats a token."""
    half: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    exact, rounded = (m(torch.tensor([ids])).logits[0].float().log_softmax(-1) for m in (model, half))
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


def record(directory: Path) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prose = tokenizer((ROOT / "tests" / "golden" / "alice.txt").read_text(encoding="utf-8")).input_ids[:PROSE]
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        logits = model(torch.tensor([ids])).logits[0, -1]
        shown = [round(float(value), 4) for value in logits[::EVERY]]
        cases.append({"prompt": prompt, "ids": ids, "tokens": greedy(model, ids, STEPS), "logits": shown})
    return {
        "every": EVERY,
        "prose_tokens": PROSE,
        "kl_of_bfloat16": kl_of_bfloat16(directory, model, prose),
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the folder to write both files to; they must not exist")
    target: Path = parser.parse_args().target
    if taken := [name for name in ("texts.json", "greedy.json") if (target / name).exists()]:
        parser.error(f"{target / taken[0]} exists already")
    directories = {"tiny": ROOT / "tests" / "tiny", "smollm2": ensure_default_checkpoint()}
    texts = []
    for case in CASES:
        text = answer(directories[case["checkpoint"]], case["prompt"], case["raw"], case["max_tokens"])
        texts.append(case | {"text": text})
    with torch.inference_mode():
        recorded = record(directories["smollm2"])
    for name, content, indent in (("texts.json", texts, 2), ("greedy.json", recorded, None)):
        text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
